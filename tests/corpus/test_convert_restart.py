"""A conversion may stop anywhere, be shared out in any way and go on later: the bytes of the set are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from converting import UNIT, files_of, is_finished, options, run, stored, write_corpus
from s3_server import S3Server

from ettin_foundry.corpus.convert import main
from ettin_foundry.corpus.filters import FilterOptions
from ettin_foundry.corpus.finalize import finalize
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import LocalStorage

FILTERS = FilterOptions(deduplicate=True, min_characters=5)
SETTINGS = {"validation": 0.2, "filters": FILTERS}


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five .jsonl files and a .txt, converted in about ten units."""
    folder = tmp_path_factory.mktemp("restart") / "texts"
    write_corpus(folder, files=5, documents=25)
    (folder / "z.txt").write_text("kalo mi ter. " * 40)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path, tokenizer_dir: Path) -> dict[str, bytes]:
    """The files of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("whole") / "set"
    summary = run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    assert summary.units[0] == summary.units[1] >= 6
    return files_of(out)


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up by the code under test because everything after it fails too."""


def kill_at(operation: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From this storage operation on (counted from 1), every write fails."""
    count = [0]
    for name in ("write_bytes", "put_file"):
        original: Callable[..., None] = getattr(LocalStorage, name)

        def counted(self: LocalStorage, *args: object, _original: Callable[..., None] = original) -> None:
            count[0] += 1
            if count[0] >= operation:
                raise Killed
            _original(self, *args)

        monkeypatch.setattr(LocalStorage, name, counted)
    return count


def test_killed_before_any_write_and_started_again_gives_the_same_bytes(
        tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path, whole: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of the run is a point to be killed at; each new start gets a few writes further than the one before."""
    out, starts = tmp_path / "set", 0
    while True:
        starts += 1
        with monkeypatch.context() as patch:
            kill_at(3 + starts % 4, patch)
            try:
                run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
                break
            except Killed:
                pass
        if starts > 60:  # the last writes of finalize need more than 6 in one start
            run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
            break
    assert starts > 8
    assert files_of(out) == whole


@pytest.mark.parametrize("operation", range(1, 42, 4))
def test_killed_at_a_write_leaves_no_set_or_a_whole_one(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                                        whole: dict[str, bytes], operation: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        kill_at(operation, patch)
        with pytest.raises(Killed):
            run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    for manifest in out.rglob("manifest.json"):
        assert stored(manifest.parent)  # MDSSplit.verify() inside
    run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    assert files_of(out) == whole


def test_finished_set_is_left_alone(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path, whole: dict[str, bytes],
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    first = run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    again = run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    assert again.units == (0, first.units[1]) and again.tokens == first.tokens and again.tokens_done == 0
    assert files_of(out) == whole
    assert f"{first.units[1]} of {first.units[1]} units were done before" in str(again)


def test_workers_do_not_change_a_byte(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                      whole: dict[str, bytes]) -> None:
    run(tmp_path / "set", [corpus_folder], tokenizer_dir, workers=2, **SETTINGS)
    assert files_of(tmp_path / "set") == whole


def test_tasks_of_an_array_and_finalize_give_the_bytes_of_one_run(tmp_path: Path, corpus_folder: Path,
                                                                  tokenizer_dir: Path) -> None:
    settings = {"validation": 0.2}
    run(tmp_path / "one", [corpus_folder], tokenizer_dir, **settings)
    out, num_tasks = tmp_path / "many", 3
    done = 0
    for task in (2, 0):
        summary = run(out, [corpus_folder], tokenizer_dir, task_index=task, num_tasks=num_tasks, **settings)
        done += summary.units[0]
        assert f"ettin finalize {out}" in str(summary)
    assert not is_finished(out)
    with pytest.raises(FileNotFoundError, match=r"units are not finished, the first is unit 1 \(texts: .*do.* only those"):
        finalize(out)
    done += run(out, [corpus_folder], tokenizer_dir, task_index=1, num_tasks=num_tasks, **settings).units[0]
    assert done == summary.units[1]
    finalize(out)
    assert files_of(out) == files_of(tmp_path / "one")


def test_appending_gives_the_bytes_of_converting_both_at_once(tmp_path: Path, corpus_folder: Path,
                                                              tokenizer_dir: Path) -> None:
    texts = write_corpus(tmp_path / "more", files=2, documents=30, seed=5)
    (tmp_path / "more" / "again.jsonl").write_bytes((corpus_folder / "0.jsonl").read_bytes())  # duplicates of the first
    run(tmp_path / "both", [corpus_folder, tmp_path / "more"], tokenizer_dir, **SETTINGS)
    out = tmp_path / "set"
    run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    for _ in range(2):  # appending twice is appending once
        summary = run(out, [tmp_path / "more"], None, append=True, **SETTINGS)
    assert files_of(out) == files_of(tmp_path / "both")
    assert summary.sources["more"]["documents"] + summary.sources["more"]["dropped"]["duplicate"] == len(texts) + 25


def test_interrupted_append_goes_on(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "more", files=3, documents=30, seed=5)
    run(tmp_path / "both", [corpus_folder, tmp_path / "more"], tokenizer_dir)
    out = tmp_path / "set"
    run(out, [corpus_folder], tokenizer_dir)
    before = stored(out / "train")
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            run(out, [tmp_path / "more"], tokenizer_dir, append=True)
    assert stored(out / "train").keys() == before.keys()  # until it is finished, the old set stands
    with pytest.raises(ValueError, match="sources: texts given, but .* was begun with texts, more; .*--append"):
        run(out, [corpus_folder], tokenizer_dir)
    run(out, [tmp_path / "more"], tokenizer_dir, append=True)
    assert files_of(out) == files_of(tmp_path / "both")


def test_append_needs_a_finished_set(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path) -> None:
    write_corpus(tmp_path / "more")
    with pytest.raises(FileNotFoundError, match="--append: given, but .* holds no set"):
        run(tmp_path / "none", [tmp_path / "more"], tokenizer_dir, append=True)
    run(tmp_path / "half", [corpus_folder], tokenizer_dir, task_index=0, num_tasks=2)
    with pytest.raises(ValueError, match=r"--append: .*half is not finished.*Run the conversion of texts again first"):
        run(tmp_path / "half", [tmp_path / "more"], tokenizer_dir, append=True)


OTHERS: dict[str, tuple[object, str]] = {
    "chunk_length": (40, r"chunk_length \(62 then, 40 now\)"),
    "cut_window": (0.0, r"cut_window \(0\.1 then, 0\.0 now\)"),
    "validation": (0.3, r"validation \(0\.0 then, 0\.3 now\)"),
    "text_field": ("body", r"text_field \('text' then, 'body' now\)"),
    "id_field": ("id", r"id_field \(None then, 'id' now\)"),
    "shard_size": ("16kb", r"shard_size \(8192 then, 16384 now\)"),
    "unit_size": (UNIT + 1, rf"unit_size \({UNIT} then, {UNIT + 1} now\)"),
    "compression": ("zstd", r"compression \(None then, 'zstd' now\)"),
    "limit_bytes": (10_000, r"limit_bytes \(None then, 10000 now\)"),
    "seed": (1, r"seed \(0 then, 1 now\)"),
    "filters": (FilterOptions(min_characters=9), r"filters \(.*'min_characters': 9"),
}


@pytest.mark.parametrize("option", OTHERS)
def test_another_option_over_the_same_set_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path,
                                                             tokenizer_dir: Path, option: str) -> None:
    out = tmp_path_factory.getbasetemp() / "refused" / "set"
    if not out.exists():
        run(out, [corpus_folder], tokenizer_dir)
    before = files_of(out)
    value, message = OTHERS[option]
    with pytest.raises(ValueError, match=f"begun with other options: {message}.*never change"):
        run(out, [corpus_folder], tokenizer_dir, **{option: value})
    assert {name: data for name, data in files_of(out).items() if not name.startswith(".scratch")} == before


def test_every_option_that_shapes_the_data_is_compared() -> None:
    compared = options(Path("x"), ["y"], Path("z")).record().keys()
    assert compared == OTHERS.keys() | {"train_tokenizer"}


def test_another_tokenizer_over_the_same_set_is_refused(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path) -> None:
    run(tmp_path / "set", [corpus_folder], None, train_tokenizer=400)
    with pytest.raises(ValueError, match=r"tokenizer vocab_size \(400 then, 512 now\)"):
        run(tmp_path / "set", [corpus_folder], tokenizer_dir)


def test_folder_with_something_else_in_it_is_refused_and_stays(tmp_path: Path, corpus_folder: Path,
                                                               tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"it holds thesis\.txt and no plan\.json.*Name another"):
        run(out, [corpus_folder], tokenizer_dir)
    assert files_of(out) == {"thesis.txt": b"years of work"}


def test_bad_file_can_be_repaired_and_finished_units_stay(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "in"
    write_corpus(folder, files=4)
    good = (folder / "2.jsonl").read_bytes()
    run(tmp_path / "whole", [folder], tokenizer_dir)
    (folder / "2.jsonl").write_bytes(b'{"text": 3}\n' + good)
    out = tmp_path / "set"
    with pytest.raises(ValueError, match=r"2\.jsonl"):
        run(out, [folder], tokenizer_dir)
    finished = len(list((out / "units").iterdir()))
    assert finished > 0
    (folder / "2.jsonl").write_bytes(good)
    summary = run(out, [folder], tokenizer_dir)
    assert summary.units[0] == summary.units[1] - finished
    assert files_of(out) == files_of(tmp_path / "whole")
    (folder / "0.jsonl").write_bytes(good)
    with pytest.raises(ValueError, match=r"unit 0 .*the input was changed after it was converted \(0\.jsonl\)"):
        run(out, [folder], tokenizer_dir)


def test_lost_or_cut_shard_is_made_again(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                         whole: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    run(out, [corpus_folder], tokenizer_dir, **SETTINGS)
    shards = sorted((out / "train").glob("*.mds"))
    shards[0].unlink()
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    assert run(out, [corpus_folder], tokenizer_dir, **SETTINGS).units[0] == 2
    assert files_of(out) == whole


def test_record_of_another_unit_is_refused(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "set"
    run(out, [corpus_folder], tokenizer_dir)
    records = sorted((out / "units").iterdir())
    records[0].write_bytes(records[1].read_bytes())
    with pytest.raises(ValueError, match=r"00000\.json: is of another unit than unit 0"):
        run(out, [corpus_folder], tokenizer_dir)


def test_lost_document_is_a_bug_that_stops_the_run(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from ettin_foundry.corpus.writer import ShardGroupWriter

    write = ShardGroupWriter.write

    def lose_one(self: ShardGroupWriter, ids: list[str], tokens: object, lengths: object) -> None:
        write(self, ids[1:], tokens[int(lengths[0]):], lengths[1:])  # type: ignore[index]

    monkeypatch.setattr(ShardGroupWriter, "write", lose_one)
    with pytest.raises(RuntimeError, match="hold .tokens, documents. .* were given"):
        run(tmp_path / "set", [corpus_folder], tokenizer_dir)
    assert not (tmp_path / "set" / "units").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--task-index", "0"], "--task-index 0 and --num-tasks None given; both are needed"),
    (["--task-index", "3", "--num-tasks", "3"], "--task-index: 3 given; 0 to 2 is possible"),
    (["--task-index", "0", "--num-tasks", "2", "--deduplicate"], "--deduplicate: given with --task-index"),
    (["--workers", "0"], "--workers: 0 given"),
    (["--engine", "slow"], "--engine: 'slow' given; auto, fast, tokenizers are possible"),
    (["--executor", "spark"], "--executor: 'spark' given; local or ray"),
    (["--ray-address", "auto"], "--ray-address: auto given with --executor local"),
    (["--compression", "gzip"], "--compression: 'gzip' given; zstd is possible"),
    (["--unit-size", "many"], "--unit-size: 'many' given; a number of bytes such as 64mb"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_execution_options_are_refused_before_work(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                                       arguments: list[str], message: str,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    status = main([str(corpus_folder), "--out", str(tmp_path / "set"), "--tokenizer", str(tokenizer_dir), *arguments])
    assert status == 1 and message in capsys.readouterr().err and not (tmp_path / "set").exists()


def test_sets_on_s3_are_the_local_ones_also_when_requests_fail(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                                               whole: dict[str, bytes],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as server:
        server.connect(monkeypatch)
        for path in sorted(corpus_folder.iterdir()):
            server.put(f"in/texts/{path.name}", path.read_bytes())
        server.fail(lambda request: request.method == "PUT" and "shard" in request.path, times=2, status=503)
        server.cut(lambda request: request.method == "GET" and request.path.endswith("3.jsonl"), times=1, after=500)
        run(server.url("out/set"), [server.url("in/texts")], tokenizer_dir, **SETTINGS)
        found = {key.removeprefix("out/set/"): server.get(key) for key in server.keys("out/set/")}
    assert found == whole


def test_input_may_change_between_looking_for_copies_and_converting(tmp_path: Path, tokenizer_dir: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of the old input must not decide which documents of the new one are dropped."""
    folder = tmp_path / "in"
    write_corpus(folder, files=2, documents=30)
    lines = (folder / "0.jsonl").read_text().splitlines(keepends=True)
    (folder / "1.jsonl").write_text("".join(lines[5:20]))
    with monkeypatch.context() as patch:
        patch.setattr("ettin_foundry.corpus.convert.ConvertUnit.__call__", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(tmp_path / "set", [folder], tokenizer_dir, **SETTINGS)
    assert list((tmp_path / "set" / "work" / "hashes").iterdir())
    (folder / "0.jsonl").write_text("".join(lines[1:]))
    run(tmp_path / "set", [folder], tokenizer_dir, **SETTINGS)
    run(tmp_path / "fresh", [folder], tokenizer_dir, **SETTINGS)
    for split in ("train", "validation"):
        found, expected = stored(tmp_path / "set" / split), stored(tmp_path / "fresh" / split)
        assert list(found) == list(expected) and all((found[name] == expected[name]).all() for name in found)


def test_growing_set_is_never_half_old_and_half_new(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at every write of an append: what has a manifest is whole, and the command goes on."""
    write_corpus(tmp_path / "more", files=1, documents=20, seed=5)
    run(tmp_path / "both", [corpus_folder, tmp_path / "more"], tokenizer_dir, validation=0.2)
    out, states, operation = tmp_path / "set", set(), 0
    run(out, [corpus_folder], tokenizer_dir, validation=0.2)
    while True:
        operation += 1
        with monkeypatch.context() as patch:
            kill_at(2 + operation // 2, patch)
            try:
                run(out, [tmp_path / "more"], tokenizer_dir, append=True, validation=0.2)
                break
            except Killed:
                manifests = sorted(out.rglob("manifest.json"))
                states.add(len(manifests))
                for manifest in manifests:
                    MDSSplit(manifest.parent).verify()
    assert states >= {0, 2} and files_of(out) == files_of(tmp_path / "both")


def test_unfinished_append_is_finished_before_another(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    for name in ("b", "c"):
        write_corpus(tmp_path / name, files=3, seed=ord(name))
    run(out, [corpus_folder], tokenizer_dir)
    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(Killed):
            run(out, [tmp_path / "b"], tokenizer_dir, append=True)
    with pytest.raises(ValueError, match=r"not finished: \d of its units are not done, the first is unit \d+ \(b: .*"
                                         "Run the conversion of texts, b again first, without --append"):
        run(out, [tmp_path / "c"], tokenizer_dir, append=True)
    run(out, [corpus_folder, tmp_path / "b"], tokenizer_dir)
    run(out, [tmp_path / "c"], tokenizer_dir, append=True)
    run(tmp_path / "all", [corpus_folder, tmp_path / "b", tmp_path / "c"], tokenizer_dir)
    assert files_of(out) == files_of(tmp_path / "all")


@pytest.mark.parametrize("content, message", [(b"\n\n", "bad: the corpus is empty"), (b'{"body": 1}\n', "is a string")])
def test_bad_append_can_be_left_out_again(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path, content: bytes,
                                          message: str) -> None:
    write_corpus(tmp_path / "good")
    (tmp_path / "bad.jsonl").write_bytes(content)
    out = tmp_path / "set"
    run(out, [corpus_folder], tokenizer_dir)
    with pytest.raises(ValueError, match=message):
        run(out, [tmp_path / "bad.jsonl"], tokenizer_dir, append=True)
    run(out, [tmp_path / "good"], tokenizer_dir, append=True)
    run(tmp_path / "both", [corpus_folder, tmp_path / "good"], tokenizer_dir)
    found, expected = files_of(out), files_of(tmp_path / "both")
    assert {name for name in found.keys() - expected.keys()} <= {name for name in found if "shard." in name}
    assert {name: found[name] for name in expected} == expected


def test_options_may_be_corrected_until_a_unit_is_finished(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "kalo mi"}\n')
    with pytest.raises(ValueError, match="--text-field"):
        run(tmp_path / "set", [tmp_path / "a.jsonl"], tokenizer_dir)
    run(tmp_path / "set", [tmp_path / "a.jsonl"], tokenizer_dir, text_field="body")
    run(tmp_path / "new", [tmp_path / "a.jsonl"], tokenizer_dir, text_field="body")
    assert files_of(tmp_path / "set") == files_of(tmp_path / "new")


def test_trained_tokenizer_follows_options_corrected_before_a_unit_is_finished(tmp_path: Path, corpus_folder: Path,
                                                                               tokenizer_dir: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ettin_foundry.corpus.convert.ConvertUnit.__call__", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(tmp_path / "set", [corpus_folder], None, train_tokenizer=400, validation=0.1)
    assert (tmp_path / "set" / "plan.json").exists()
    for name in ("set", "new"):
        run(tmp_path / name, [corpus_folder], None, train_tokenizer=450, validation=0.3)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "new")


def test_another_licence_over_a_finished_set_is_refused(tmp_path: Path, corpus_folder: Path, tokenizer_dir: Path) -> None:
    run(tmp_path / "set", [corpus_folder], tokenizer_dir, licence="mit")
    with pytest.raises(ValueError, match=r"licence of texts \('mit' then, 'gpl-3.0' now\)"):
        run(tmp_path / "set", [corpus_folder], tokenizer_dir, licence="gpl-3.0")


def test_set_inside_its_source_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_corpus(tmp_path / "in")
    with pytest.raises(ValueError, match="lies in the source .*in, whose files are all read"):
        run(tmp_path / "in" / "out", [tmp_path / "in"], tokenizer_dir)
    assert not (tmp_path / "in" / "out").exists()
