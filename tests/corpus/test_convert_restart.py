"""A conversion may stop anywhere, be shared out in any way and go on later: the bytes of the dataset are the same."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from converting import UNIT, files_of, run, stored, write_corpus, write_jsonl
from hand_made import flip
from s3_server import S3Server

from ettin_foundry.corpus import convert as converting
from ettin_foundry.corpus import plan as plans
from ettin_foundry.corpus.finalize import finalize
from ettin_foundry.corpus.sources import Part
from ettin_foundry.corpus.verify import verify_dataset
from ettin_foundry.corpus.worker import ConvertUnit
from ettin_foundry.data.storage import Storage, open_storage

SETTINGS = {"validation": 0.2, "min_characters": 5}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five .jsonl files and a .txt, converted in about ten units."""
    folder = tmp_path_factory.mktemp("restart") / "texts"
    write_corpus(folder, files=5, documents=25)
    (folder / "z.txt").write_text("kalo mi ter. " * 40)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path, tokenizer_dir: Path) -> dict[str, bytes]:
    """The files of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("whole") / "set"
    summary = run(out, [texts], tokenizer_dir, **SETTINGS)
    assert summary.units[0] == summary.units[1] >= 6
    return files_of(out)


PLAN = r"""{
 "format": "ettin-plan",
 "version": 1,
 "options": {
  "seed": 1,
  "limit_bytes": null
 },
 "tokenizer": {
  "name": "mine",
  "vocab_size": 300
 },
 "sources": {
  "texts": {
   "licence": null
  }
 },
 "units": [
  {"source": "texts", "parts": [["\u00fc \"b\".jsonl", 0, 9, 30]]},
  {"source": "texts", "parts": [["\u00fc \"b\".jsonl", 9, null, 30], ["c.txt", 0, null, 4]]}
 ]
}
"""


def test_plans_and_keys_of_records_are_those_of_older_datasets(tmp_path):
    """Keys that moved would have every unit of every unfinished dataset done again."""
    (tmp_path / "plan.json").write_text(PLAN)
    plan = plans.read_plan(open_storage(tmp_path))
    assert plan and plan.to_bytes() == PLAN.encode() and plan.units[0].parts == (Part("\u00fc \"b\".jsonl", 0, 9, 30),)
    keys = [plans.record_key(plan.base_key, unit) for unit in plan.units]
    assert keys == ["577a7ffe8565ef8e", "22447f111481e353"]
    assert plan.units[1].label == 'unit 1 (texts: \u00fc "b".jsonl and 1 more)'
    (tmp_path / "plan.json").write_text(PLAN.replace('{"source": "texts"', '{"source": "others"'))
    with pytest.raises(ValueError, match="plan.json: units: 'others' must be one of its sources"):
        plans.read_plan(open_storage(tmp_path))


class Killed(BaseException):
    """Stands for SIGKILL: the code under test cleans nothing up, because every later write fails too."""


def killed(operation: int, *args: object, **more: object) -> bool:
    """Converts until this write (counted from 1), which fails like all after it; whether it was killed there."""
    left, put_file = iter(range(operation - 1)), Storage.put_file

    def write(*args: Any) -> None:
        if next(left, None) is None:
            raise Killed
        put_file(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "put_file", write)
        try:
            run(*args, **more)  # type: ignore[arg-type]
            return False
        except Killed:
            return True


@pytest.mark.parametrize("append", [False, True])
def test_killed_again_and_again_it_is_never_half_a_dataset_and_ends_the_same(tmp_path, texts, tokenizer_dir, append):
    """Each start gets one write further than the one before. What has a manifest is whole, be it the old or the new."""
    out, more = tmp_path / "set", tmp_path / "more"
    write_corpus(more, files=1, documents=20, seed=5, first=6)
    if append:
        run(out, [texts], tokenizer_dir, **SETTINGS)
    states, starts = set(), 0
    while killed(3 + starts, out, [more if append else texts], tokenizer_dir, append=append, **SETTINGS):
        starts += 1
        manifests = list(out.rglob("manifest.json"))
        states.add(len(manifests))
        assert all(stored(manifest.parent) for manifest in manifests)
    if append:  # appending twice is appending once
        run(out, [more], None, append=True, **SETTINGS)
    run(tmp_path / "new", [texts, more] if append else [texts], tokenizer_dir, **SETTINGS)
    assert starts > 4 and states >= ({0, 2} if append else {0}) and files_of(out) == files_of(tmp_path / "new")


def test_workers_and_a_second_start_change_no_byte(tmp_path, texts, tokenizer_dir, whole):
    first = run(tmp_path / "set", [texts], tokenizer_dir, workers=2, **SETTINGS)
    assert files_of(tmp_path / "set") == whole
    again = run(tmp_path / "set", [texts], tokenizer_dir, **SETTINGS)
    assert again.units == (0, first.units[1]) and again.manifests == first.manifests
    assert files_of(tmp_path / "set") == whole


def test_tasks_of_an_array_and_finalize_give_the_bytes_of_one_run(tmp_path, texts, tokenizer_dir):
    run(tmp_path / "one", [texts], tokenizer_dir, validation=0.2)
    array = {"num_tasks": 3, "validation": 0.2}
    done = [run(tmp_path / "many", [texts], tokenizer_dir, task_index=task, **array).units[0] for task in (2, 0)]
    assert not list((tmp_path / "many").rglob("manifest.json"))
    with pytest.raises(FileNotFoundError, match="units are not finished, the first is unit 1"):
        finalize(tmp_path / "many")
    summary = run(tmp_path / "many", [texts], tokenizer_dir, task_index=1, **array)
    assert sum(done) + summary.units[0] == summary.units[1]
    finalize(tmp_path / "many")
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_an_unfinished_append_is_finished_before_another(tmp_path, texts, tokenizer_dir):
    for name in ("b", "c"):
        write_corpus(tmp_path / name, files=3, seed=ord(name))
    with pytest.raises(FileNotFoundError, match="--append needs a finished dataset"):
        run(tmp_path / "none", [tmp_path / "b"], tokenizer_dir, append=True)
    out = tmp_path / "set"
    run(out, [texts], tokenizer_dir, task_index=0, num_tasks=2)
    with pytest.raises(ValueError, match="--append needs a finished dataset.* texts again before, without --append"):
        run(out, [tmp_path / "b"], tokenizer_dir, append=True)
    run(out, [texts], tokenizer_dir)
    before = stored(out / "train")
    assert killed(5, out, [tmp_path / "b"], tokenizer_dir, append=True)
    assert stored(out / "train").keys() == before.keys()  # until it is finished, the old dataset stands
    with pytest.raises(ValueError, match=r"not done: first unit \d+ \(b: .* texts, b again before, without --append"):
        run(out, [tmp_path / "c"], tokenizer_dir, append=True)
    with pytest.raises(ValueError, match="sources must be those .* texts, b, got texts; use --append"):
        run(out, [texts], tokenizer_dir)
    run(out, [texts, tmp_path / "b"], tokenizer_dir)
    run(out, [tmp_path / "c"], tokenizer_dir, append=True)
    run(tmp_path / "all", [texts, tmp_path / "b", tmp_path / "c"], tokenizer_dir)
    assert files_of(out) == files_of(tmp_path / "all")


def test_what_holds_no_document_is_said_and_the_rest_is_written(tmp_path, texts, tokenizer_dir, caplog):
    write_corpus(tmp_path / "good", first=6)
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n")
    (tmp_path / "nothing.jsonl").touch()
    out, settings = tmp_path / "set", {"validation": 1e-9}  # of which no document falls to validation
    with pytest.raises(ValueError, match="sources must hold a document for training, got .*'short': 126"):
        run(out, [texts], tokenizer_dir, min_characters=10**6, **settings)
    run(out, [texts, tmp_path / "nothing.jsonl"], tokenizer_dir, **settings)  # then options may be changed
    for _ in range(2):
        run(out, [tmp_path / "blank.jsonl"], tokenizer_dir, append=True, **settings)
    assert "nothing: no document" in caplog.text and "blank: no document" in caplog.text
    assert "--validation 1e-09: no document fell to validation" in caplog.text
    run(out, [tmp_path / "good"], tokenizer_dir, append=True, **settings)
    assert verify_dataset(out).ok and not (out / "validation").exists()
    run(tmp_path / "both", [texts, tmp_path / "good"], tokenizer_dir)
    assert list(stored(out / "train")) == list(stored(tmp_path / "both" / "train"))


OTHERS: dict[str, object] = {
    "chunk_length": 40, "cut_window": 0.0, "validation": 0.3, "text_field": "body", "id_field": "id", "licence": "mit",
    "shard_size": 16384, "unit_size": UNIT + 1, "compression": "zstd", "seed": 1, "max_document_bytes": 5000,
    "min_characters": 9}


@pytest.mark.parametrize("option", OTHERS)
def test_another_option_over_the_same_dataset_is_refused_by_name(tmp_path_factory, texts, tokenizer_dir, option):
    out = tmp_path_factory.getbasetemp() / "refused" / "set"
    if not out.exists():
        run(out, [texts], tokenizer_dir)
    before = files_of(out)
    with pytest.raises(ValueError, match=f"begun with other options: (filters|{option}( of texts)?) .*never change"):
        run(out, [texts], tokenizer_dir, **{option: OTHERS[option]})
    assert files_of(out) == before


def test_foreign_folders_and_those_inside_a_source_are_refused_and_stay(tmp_path, tokenizer_dir):
    write_corpus(tmp_path / "in")
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds 0\.jsonl and no plan\.json"):
        run(tmp_path / "in", [tmp_path / "in" / "0.jsonl"], tokenizer_dir)
    with pytest.raises(ValueError, match="--out must be outside of the sources"):
        run(tmp_path / "in" / "out", [tmp_path / "in"], tokenizer_dir)
    assert files_of(tmp_path) == before


def test_changed_input_is_read_again_in_an_unfinished_dataset(tmp_path, tokenizer_dir, caplog):
    """A record is taken out of a file, another file is removed and one is added; a later file repeats the record."""
    folder, out = tmp_path / "in", tmp_path / "set"
    texts = write_corpus(folder, files=5)
    write_jsonl(folder / "2.jsonl", texts[5:45])
    assert killed(20, out, [folder], tokenizer_dir)
    finished = len(list((out / "units").iterdir()))
    lines = (folder / "1.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "1.jsonl").write_bytes(b"".join(lines[1:]))
    (folder / "4.jsonl").unlink()
    write_jsonl(folder / "5.jsonl", texts[-9:])
    summary = run(out, [folder], tokenizer_dir)
    run(tmp_path / "new", [folder], tokenizer_dir)
    assert summary.units[1] - summary.units[0] < finished and "(in: 1.jsonl) is done again" in caplog.text
    assert (found := files_of(out)) == files_of(tmp_path / "new")
    (folder / "1.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"unit \d+ .*files of a finished dataset must stay as they were"):
        run(out, [folder], tokenizer_dir)
    assert files_of(out) == found


@pytest.mark.parametrize("task, unit_size", [(0, UNIT), (1, "1mb"), (None, UNIT)],
                         ids=["the same unit", "no such unit now", "records removed by hand"])
def test_nothing_is_left_of_a_try_with_other_options(tmp_path, texts, tokenizer_dir, task, unit_size):
    out, settings = tmp_path / "set", {"validation": 0.4, "shard_size": "1kb"}
    if task is None:
        run(out, [texts], tokenizer_dir, **settings)
        shutil.rmtree(out / "units")
    else:
        assert killed(8, out, [texts], tokenizer_dir, task_index=task, num_tasks=2, **settings)
    before = set(out.rglob("shard.*"))
    run(out, [texts], tokenizer_dir, unit_size=unit_size)
    run(tmp_path / "new", [texts], tokenizer_dir, unit_size=unit_size)
    assert files_of(out) == files_of(tmp_path / "new") and before - {*out.rglob("*")}


def test_lost_shards_are_made_again_and_a_foreign_record_is_refused(tmp_path, texts, tokenizer_dir, whole):
    out = tmp_path / "set"
    run(out, [texts], tokenizer_dir, **SETTINGS)
    shards = sorted((out / "train").glob("*.mds"))
    shards[0].unlink()
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    assert run(out, [texts], tokenizer_dir, **SETTINGS).units[0] == 2
    assert files_of(out) == whole
    damaged = shards[1], out / "train" / "lengths.npy"  # of the right size: verify finds it, and its advice helps
    for path in damaged:
        flip(path, -1)
    found = "".join(verify_dataset(out).problems)
    for path in damaged:
        assert re.search(f"{path}: xxh64 is .*?; remove it and convert or fetch again", found)
        path.unlink()
    out, texts = shutil.move(out, tmp_path / "moved"), shutil.copytree(texts, tmp_path / "elsewhere" / "texts")
    run(out, [texts], out / "tokenizer", **SETTINGS)  # nothing depends on where things lay
    assert files_of(out) == whole
    records = sorted((out / "units").iterdir())
    records[0].write_bytes(records[1].read_bytes())
    with pytest.raises(ValueError, match=r"00000\.json: .*another unit"):
        run(out, [texts], tokenizer_dir, **SETTINGS)
    records[0].write_bytes(b'{"unit": 0')
    with pytest.raises(ValueError, match=r"00000\.json: .* not JSON .*; remove it"):
        finalize(out)
    records[0].unlink()
    assert run(out, [texts], tokenizer_dir, **SETTINGS).units[0] == 1 and files_of(out) == whole


def test_units_of_another_tokenizers_version_are_done_again_in_an_unfinished_dataset(
        tmp_path, texts, tokenizer_dir, monkeypatch, caplog):
    out = tmp_path / "set"
    write_corpus(tmp_path / "more", files=2, first=6)
    run(tmp_path / "new", [texts], tokenizer_dir)
    with monkeypatch.context() as patch:
        patch.setattr(converting, "version", lambda name: "0.2")
        assert killed(12, out, [texts], tokenizer_dir)
    units = run(out, [texts], tokenizer_dir).units
    assert files_of(out) == files_of(tmp_path / "new") and "made with tokenizers 0.2, here is" in caplog.text
    monkeypatch.setattr(converting, "version", lambda name: "0.3")  # what is finished stays, also when it grows
    (out / "train" / "shard.00001.000.mds").unlink()
    assert run(out, [texts], tokenizer_dir).units[0] == 1
    summary = run(out, [tmp_path / "more"], None, append=True)
    assert units[0] == units[1] == summary.units[1] - summary.units[0]


def test_datasets_on_s3_are_the_local_ones_also_when_requests_fail(texts, tokenizer_dir, whole, monkeypatch):
    with S3Server() as server:
        server.connect(monkeypatch)
        for path in sorted(texts.iterdir()):
            server.put(f"in/texts/{path.name}", path.read_bytes())
        server.fail(lambda request: request.method == "PUT" and "shard" in request.path, times=2, status=503)
        server.cut(lambda request: request.method == "GET" and request.path.endswith("3.jsonl"), times=1, after=500)
        run(server.url("out/set"), [server.url("in/texts")], tokenizer_dir, **SETTINGS)
        found = server.objects("out/set/")
    assert found == whole


def test_until_a_unit_is_finished_input_and_options_may_change(tmp_path, tokenizer_dir, monkeypatch):
    """A tokenizer trained on the old input has no say afterwards."""
    write_corpus(tmp_path / "in", files=2, documents=30)
    lines = (tmp_path / "in" / "0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "in" / "1.jsonl").write_text("".join(lines[5:20]))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ConvertUnit, "__call__", lambda *_: (_ for _ in ()).throw(Killed))
        run(tmp_path / "set", [tmp_path / "in"], None, train_tokenizer=400, **SETTINGS)
    (tmp_path / "in" / "0.jsonl").write_text("".join(lines[1:]))
    for name in ("set", "new"):
        run(tmp_path / name, [tmp_path / "in"], None, train_tokenizer=450, **SETTINGS)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "new")
