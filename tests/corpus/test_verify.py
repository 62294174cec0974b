"""`ettin verify`: a good set passes, every kind of damage is found, all of it is listed, and nothing is written."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from whole_sets import contents, copy_set, edit, flip, shards_of, whole_set

from ettin_foundry.cli import main as cli
from ettin_foundry.corpus.mix import build_mix
from ettin_foundry.corpus.show import show_set
from ettin_foundry.corpus.units import Plan, Unit
from ettin_foundry.corpus.verify import verify_set
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import open_storage

SMALL = ["train/lengths.npy", "train/index.json", "train/manifest.json", "validation/manifest.json", "plan.json",
         "units/00001.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "lengths.svg", "README.md"]


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> Path:
    return whole_set(tokenizer_dir)


@pytest.fixture
def hostile(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A private copy of the whole set."""
    return copy_set(tokenizer_dir, tmp_path)


@pytest.fixture
def bare(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A private copy without plan, records and card: only the manifests say what must be."""
    return copy_set(tokenizer_dir, tmp_path, records=False, card=False)


def problems(location: Path | str) -> str:
    return "\n".join(verify_set(location, threads=1).problems)


def reseal(folder: Path) -> None:
    """Makes the manifest's sizes and hashes those of the files, so that what is tested is not the hash."""
    def entry(item: dict) -> None:
        data = (folder / item["basename"]).read_bytes()
        item.update(bytes=len(data), xxh64=xxhash.xxh64(data).hexdigest())

    def change(manifest: dict) -> None:
        entry(manifest["lengths"])
        for shard in manifest["shards"]:
            entry(shard["raw"])

    edit(folder / "manifest.json", change)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_whole_set_has_no_problem_and_is_not_touched(tokenizer_dir: Path, compression: str | None) -> None:
    whole = whole_set(tokenizer_dir, compression)
    before = contents(whole)
    for split in ("train", "validation"):
        assert len({Path(name).name for name in shards_of(whole / split)}) > 5
    report = verify_set(whole)
    assert report.ok and not report.notes and [s.source for s in report.samples] == ["code", "wiki"] * 2
    assert all(sample.text for sample in report.samples)
    for split, counts in report.counts.items():
        totals = json.loads((whole / split / "manifest.json").read_text())["totals"]
        assert counts == (totals["documents"], totals["samples"], totals["tokens"])
        one = verify_set(whole / split)
        assert one.ok and not one.notes and one.counts == {split: counts}
    of_splits = {name: data for name, data in before.items() if name.startswith(("train/", "validation/"))}
    assert report.files == len(of_splits) and report.num_bytes == sum(map(len, of_splits.values()))
    assert contents(whole) == before


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("place", range(6))
def test_flipped_bit_of_a_shard_is_found(tokenizer_dir: Path, tmp_path: Path, compression: str | None, place: int) -> None:
    out = copy_set(tokenizer_dir, tmp_path, compression=compression)
    path = shards_of(out / "train")[place]
    size = path.stat().st_size
    flip(path, [0, 5, size // 3, size // 2, size - 20, size - 1][place], place)
    found = verify_set(out, threads=1).problems
    assert found and all(str(path) in text for text in found)


@pytest.mark.parametrize("name", SMALL)
def test_flipped_bit_of_a_small_file_is_found(hostile: Path, name: str) -> None:
    """Wherever it is; only in a record may it fall on what means the same."""
    path, rng = hostile / name, random.Random(name)
    before = path.read_bytes()
    from_here = before.index(b"<!-- ettin-set") + 20 if name == "README.md" else 0
    for at in [from_here, len(before) - 3, *(rng.randrange(from_here, len(before) - 2) for _ in range(4))]:
        flip(path, at, rng.randrange(7))
        report = verify_set(hostile, threads=1)
        if not report.ok:
            assert any(part in text for text in report.problems for part in (name, "units/", "README.md", "tokenizer"))
        elif name == "README.md":
            assert any("its text is not the one that ettin finalize writes" in text for text in report.notes)
        else:
            assert name.startswith(("units/", "plan")) and json.loads(path.read_text()) == json.loads(before)
        path.write_bytes(before)


def test_cards_own_text_may_be_edited(hostile: Path) -> None:
    path = hostile / "README.md"
    path.write_text(path.read_text().replace("## Sources", "Collected by us.\n\n## Sources"))
    report = verify_set(hostile, threads=1)
    assert report.ok and len(report.notes) == 1 and "fine if someone edited it" in report.notes[0]


@pytest.mark.parametrize("name", [*SMALL[:-1], "tokenizer", "validation", "train/SHARD"])
def test_deleted_file_is_found(hostile: Path, name: str) -> None:
    path = shards_of(hostile / "train")[3] if name.endswith("SHARD") else hostile / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = verify_set(hostile, threads=1)
    assert not report.ok and any(path.name in text and ("missing" in text or "no such" in text) for text in report.problems)


def test_deleted_card_is_noted(hostile: Path) -> None:
    (hostile / "README.md").unlink()
    report = verify_set(hostile, threads=1)
    assert report.ok and any("README.md: no data card" in text for text in report.notes)


@pytest.mark.parametrize("name", [*SMALL, "train/SHARD"])
@pytest.mark.parametrize("left", [0, 0.5])
def test_truncated_file_is_found(hostile: Path, name: str, left: float) -> None:
    path = shards_of(hostile / "train")[3] if name.endswith("SHARD") else hostile / name
    path.write_bytes(path.read_bytes()[:int(left * path.stat().st_size)])
    report = verify_set(hostile, threads=1)
    assert any(path.name in text for text in (report.notes if name == "README.md" else report.problems))


def test_everything_wrong_is_listed_at_once_with_exit_code_1(hostile: Path, capsys: pytest.CaptureFixture) -> None:
    train, validation = shards_of(hostile / "train"), shards_of(hostile / "validation")
    flip(train[0], -1)
    train[1].unlink()
    train[2].write_bytes(train[2].read_bytes()[:-3])
    train[3].rename(hostile.parent / "outside")
    train[3].symlink_to(hostile.parent / "outside")
    shutil.copy(train[4], hostile / "train" / "shard.00099.000.mds")
    flip(hostile / "train" / "index.json", 5)
    flip(hostile / "train" / "lengths.npy", -1)
    flip(validation[0], 3)
    (hostile / "validation" / "index.json").unlink()
    flip(hostile / "tokenizer" / "tokenizer.json", 2000)
    (hostile / "units" / "00000.json").unlink()
    flip(hostile / "units" / "00001.json", 1)
    named = [*train[:4], hostile / "train" / "shard.00099.000.mds", hostile / "train" / "index.json",
             hostile / "train" / "lengths.npy", validation[0], hostile / "validation" / "index.json",
             hostile / "tokenizer" / "tokenizer.json", hostile / "units" / "00000.json", hostile / "units" / "00001.json"]
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(hostile), "--no-samples"])
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    for path in named:
        assert any(line.startswith(f"problem: {path}: ") for line in lines), path
    assert not any(str(path) in line for path in [*train[4:], *validation[1:]] for line in lines)  # and no good file


def test_command_prints_speed_and_samples(whole: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(whole), "--threads", "2"])
    out = capsys.readouterr().out
    assert end.value.code in (0, None) and "MB/s; train: " in out and "[wiki] " in out and "all is as it should be" in out
    with pytest.raises(SystemExit) as end:
        cli.main(["verify", str(whole), "--threads", "0"])
    assert end.value.code == 1 and "--threads: 0 given" in capsys.readouterr().err


def test_long_checks_say_how_far_they_are(whole: Path, capsys: pytest.CaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin_foundry.cli.data._TOLD_SECONDS", -1.0)
    for command in ("verify",):
        with pytest.raises(SystemExit):
            cli.main([command, str(whole)])
        lines = capsys.readouterr().err.splitlines()
        shards = len(shards_of(whole / "train")) + len(shards_of(whole / "validation"))
        assert len(lines) == shards and all(line.startswith(f"{command}: 0 MB read, ") for line in lines)


def test_commands_finalize_and_mix_are_those_of_the_package(hostile: Path, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture) -> None:
    before = contents(hostile)
    (hostile / "train" / "manifest.json").unlink()
    (tmp_path / "spec.yaml").write_text("tolerance: 0.1\nsets:\n  mine: {set: set, tokens: 2000}\n")
    for arguments, words in ((["finalize", hostile], "train: 81 documents, 175 chunks, 7,875 tokens, 17 shards"),
                             (["mix", tmp_path / "spec.yaml", tmp_path / "mix", "--seed", 3], "passes")):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        assert end.value.code in (0, None) and words in capsys.readouterr().out
    assert contents(hostile) == before and verify_set(tmp_path / "mix").ok
    for arguments in (["finalize", tmp_path / "none"], ["mix", tmp_path / "none.yaml", tmp_path / "other"]):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        assert end.value.code == 1 and "none" in capsys.readouterr().err.splitlines()[-1]


def bump(table: dict, key: str, by: int = 1) -> None:
    table[key] += by


@pytest.mark.parametrize("change,words", [
    (lambda m: bump(m["totals"], "documents"), "totals.documents"),
    (lambda m: bump(m["sources"]["wiki"], "documents"), "its sources sum to"),
    (lambda m: (bump(m["sources"]["wiki"], "tokens"), bump(m["sources"]["code"], "tokens", -1)), "'wiki' states .* hold"),
    (lambda m: (bump(m["shards"][1], "documents"), bump(m["shards"][2], "documents", -1)), "states .* documents"),
    (lambda m: bump(m["shards"][1]["rows"], "64", -1), r"states \d+ rows of 64|fill \d+ rows of 64"),
    (lambda m: (bump(m["shards"][1], "tokens"), bump(m["shards"][2], "tokens", -1)), "lengths.npy: row 1 counts"),
    (lambda m: m["shards"][1].update(source="code"), "is of source 'wiki'"),
    (lambda m: m["shards"].reverse(), "index.json: its shard 0 differs"),
    (lambda m: m["tokenizer"].update(vocab_size=300), "token .* the tokenizer has 300 entries"),
    (lambda m: m["tokenizer"].update(probe_sha256="0"), "its probe_sha256 is"),
    (lambda m: m["tokenizer"]["special_ids"].update(mask=3), "special_ids|holds the special token 3"),
    (lambda m: m.update(chunk_length=61), "chunk_length"),
    (lambda m: m["sources"].pop("wiki"), "source 'wiki' states None"),
    (lambda m: m.update(sources=7), "sources cannot be read"),
    (lambda m: m.update(options={}), "options differs between the manifests"),
    (lambda m: m.update(shards=[]), "lists no shards"),
])
def test_lie_of_a_manifest_is_found_by_the_files_alone(bare: Path, change: Callable[[dict], object], words: str) -> None:
    """Without records and card; a few facts (licences) stand in the manifest only."""
    assert verify_set(bare, threads=1).ok
    edit(bare / "train" / "manifest.json", change)
    report = verify_set(bare, threads=1)
    assert any(re.search(words, text) for text in report.problems), report.problems


@pytest.mark.parametrize("change", [
    lambda m: m["sources"]["wiki"].update(licence="mit"), lambda m: m["options"].update(seed=7),
    lambda m: bump(m["sources"]["wiki"], "bytes"), lambda m: m.update(code_version="9")])
def test_changed_fact_is_found_by_records_or_card(hostile: Path, change: Callable[[dict], object]) -> None:
    edit(hostile / "train" / "manifest.json", change)
    text = problems(hostile)
    assert "train/manifest.json: sha256 is" in text
    assert "differs from plan.json and units/" in text or json.loads((hostile / "train" / "manifest.json").read_text())[
        "code_version"] == "9"
    (hostile / "README.md").unlink()
    shutil.rmtree(hostile / "units")
    (hostile / "plan.json").unlink()
    edit(hostile / "validation" / "manifest.json", lambda m: change(m) and None)
    assert verify_set(hostile, threads=1).ok  # what nothing contradicts


def test_tokens_are_held_to_the_vocabulary_even_under_a_right_hash(bare: Path) -> None:
    path = shards_of(bare / "train")[2]
    data = bytearray(path.read_bytes())
    data[-2:] = np.array([600], "<u2").tobytes()
    path.write_bytes(data)
    reseal(bare / "train")
    text = problems(bare)
    assert f"{path}: token 600 in chunk" in text


def test_special_tokens_in_a_chunk_are_found(bare: Path) -> None:
    special = json.loads((bare / "train" / "manifest.json").read_text())["tokenizer"]["special_ids"]["mask"]
    for path in shards_of(bare / "train"):
        data = bytearray(path.read_bytes())
        data[-2:] = np.array([special], "<u2").tobytes()
        path.write_bytes(data)
    reseal(bare / "train")
    edit(bare / "train" / "index.json", lambda index: [
        shard["raw_data"].update(hashes={"xxh64": xxhash.xxh64((bare / "train" / shard["raw_data"]["basename"]).read_bytes())
                                         .hexdigest()}) for shard in index["shards"]])
    found = verify_set(bare, threads=1).problems
    assert found and all(f"holds the special token {special}" in text for text in found)


def test_index_is_held_to_the_manifest_hashes_too(bare: Path) -> None:
    path = bare / "train" / "index.json"
    good = path.read_text()
    for change in (lambda i: i["shards"][1]["raw_data"].update(basename="../x"), lambda i: i["shards"].pop(),
                   lambda i: i["shards"][0].update(column_encodings=["pkl"] * 5), lambda i: i.pop("shards"),
                   lambda i: i["shards"][0]["raw_data"]["hashes"].update(xxh64="0" * 16), lambda i: i.update(version=3),
                   lambda i: i["shards"][2].update(zip_data={"basename": "x", "bytes": 3, "hashes": {"xxh64": "0"}})):
        edit(path, change)
        assert f"{path}: " in problems(bare)
        path.write_text(good)
    assert verify_set(bare, threads=1).ok


def test_split_without_manifest_is_still_checked_shard_by_shard(bare: Path) -> None:
    (bare / "train" / "manifest.json").unlink()
    paths = shards_of(bare / "validation")
    bad = bare / "train" / paths[1].name
    flip(bad, 1)
    found = verify_set(bare, threads=1).problems
    assert any("manifest.json: missing" in text for text in found) and any(str(bad) in text for text in found)
    assert not any(str(path) in text for text in found for path in (bare / "train").glob("*.mds") if path != bad)


def test_altered_expanded_copy_of_a_packed_shard_is_found(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, compression="zstd")
    MDSSplit(out / "train").chunk(1, 0)
    assert verify_set(out, threads=1).ok
    expanded = [path for path in (out / "train").glob("*.mds")]
    assert len(expanded) == 1
    flip(expanded[0], -1)
    found = verify_set(out, threads=1).problems
    assert found and all(str(expanded[0]) in text for text in found)


def test_source_being_added_is_a_note_and_not_a_problem(hostile: Path) -> None:
    plan = Plan.from_bytes((hostile / "plan.json").read_bytes(), "plan")
    units = [*plan.units, Unit(len(plan.units), "code", plan.units[-1].parts, (9,))]
    (hostile / "plan.json").write_bytes(Plan(plan.options, plan.tokenizer, plan.sources, units).to_bytes())
    report = verify_set(hostile, threads=1)
    assert report.ok and [f"1 of {len(units)} units are not done yet" in text for text in report.notes] == [True]


def test_record_that_contradicts_itself_or_its_plan_is_named(hostile: Path) -> None:
    path = hostile / "units" / "00001.json"
    good = path.read_text()
    for change, words in ((lambda r: bump(r, "read"), "documents read"), (lambda r: r.update(unit=2), "it is of unit 2"),
                          (lambda r: r.update(key="0"), "is of another unit"), (lambda r: r.pop("splits"), "no completion"),
                          (lambda r: bump(r["splits"]["train"], "tokens"), "sum to another"),
                          (lambda r: bump(r["splits"]["train"]["shards"][0]["lengths"], 5), "lengths of .* count another"),
                          (lambda r: r["splits"]["train"].update(shards=3), "no completion record|contradicts")):
        edit(path, change)
        assert re.search(f"{path}: .*{words}", problems(hostile)), words
        path.write_text(good)
    shutil.copy(path, hostile / "units" / "00099.json")
    assert "00099.json: belongs to no unit" in problems(hostile)


def test_set_behind_a_url_is_checked_the_same_way(whole: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path)
    url = f"memory://{tmp_path.name}/set"
    remote = open_storage(url)

    def upload() -> None:
        for name, data in contents(out).items():
            remote.write_bytes(name, data)

    upload()
    report = verify_set(url)
    assert report.ok and not report.notes and report.counts == verify_set(whole).counts
    paths = shards_of(out / "train")
    flip(paths[1], -1)
    flip(out / "validation" / "lengths.npy", -1)
    upload()
    remote.delete(f"train/{paths[2].name}")
    found = problems(url)
    for name in (f"train/{paths[1].name}", f"train/{paths[2].name}", "validation/lengths.npy"):
        assert f"{url}/{name}: " in found
    assert len(found.splitlines()) == 3


def test_mixture_is_held_to_its_sets(hostile: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    tokens = json.loads((hostile / "train" / "manifest.json").read_text())["sources"]
    wanted = {name: int(1.5 * tokens[name]["tokens"]) for name in tokens}
    (tmp_path / "spec.yaml").write_text("tolerance: 0.05\nsets:\n" + "".join(
        f"  {name}: {{set: set, source: {name}, tokens: {number}}}\n" for name, number in wanted.items()))
    build_mix(tmp_path / "spec.yaml", tmp_path / "mix")
    report = verify_set(tmp_path / "mix")
    totals = json.loads((tmp_path / "mix" / "train" / "manifest.json").read_text())["totals"]
    assert report.ok and report.counts["train"] == (None, totals["samples"], totals["tokens"])
    shown = "\n".join(show_set(tmp_path / "mix"))
    assert "[wiki] " in shown and f"{totals['tokens']:,} tokens" in shown
    paths = shards_of(hostile / "train")
    flip(paths[0], -1)
    flip(paths[4], -1)
    found = problems(tmp_path / "mix")
    assert str(paths[0]) in found and str(paths[4]) in found
    edit(hostile / "train" / "manifest.json", lambda m: m["shards"].reverse())
    found = problems(tmp_path / "mix")
    assert "the set was altered or replaced" in found and str(paths[0]) in found


def test_nothing_of_a_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no split.*data_prep/convert.py is needed"):
        verify_set(tmp_path)
