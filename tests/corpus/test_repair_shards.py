"""`ettin repair` and shards: fetched again, or taken out with a statement of exactly what is lost; killed and repeated."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from converting import options
from whole_sets import (
    SHARD,
    SOURCES,
    TABLES,
    UNIT,
    contents,
    copy_set,
    draw_once,
    expected_cuts,
    flip,
    in_use,
    missing_lines,
    nothing_lost,
    samples_of,
    shards_of,
    whole_samples,
    whole_set,
)

from ettin_foundry.cli import main as cli
from ettin_foundry.corpus.convert import convert
from ettin_foundry.corpus.repair import repair_set
from ettin_foundry.corpus.verify import verify_set
from ettin_foundry.data.storage import open_storage


@pytest.fixture(autouse=True)
def _drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin_foundry.corpus.repair.picture", draw_once)


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> Path:
    return whole_set(tokenizer_dir)


@pytest.fixture
def damaged(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A private copy of the whole set, to be damaged."""
    return copy_set(tokenizer_dir, tmp_path)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
def test_bad_and_missing_shards_are_fetched_again(tokenizer_dir: Path, tmp_path: Path, compression: str | None,
                                                  records: bool) -> None:
    out = copy_set(tokenizer_dir, tmp_path, compression=compression, records=records)
    before, paths = contents(out), shards_of(out / "train")
    url = f"memory://{tmp_path.name}/copy"
    for name, data in before.items():
        open_storage(url).write_bytes(name, data)
    flip(paths[0], -1)
    bad = paths[0].read_bytes()
    paths[1].unlink()
    paths[2].write_bytes(b"")
    report = repair_set(out, remote=url, threads=1)
    assert report.ok and not report.lost and in_use(out) == before
    assert (out / "quarantine" / "train" / paths[0].name).read_bytes() == bad
    assert sum("fetched again" in text for text in report.actions) == 3
    if records:  # and with everything of the split but its shards gone
        for name in ("train/manifest.json", "train/lengths.npy", "units/00001.json", "tokenizer/tokenizer.json"):
            (out / name).unlink()
        paths[3].unlink()
        assert repair_set(out, remote=url, threads=1).ok and in_use(out) == before


def test_copy_that_is_no_better_is_not_taken(damaged: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    paths = shards_of(damaged / "train")
    flip(paths[0], -1)
    flip(tmp_path / "copy" / "train" / paths[0].name, -2)
    (tmp_path / "copy" / "train" / paths[1].name).unlink()
    paths[1].unlink()
    before = contents(damaged)
    report = repair_set(damaged, remote=tmp_path / "copy", threads=1)
    assert not report.ok and contents(damaged) == before
    for words in ("is no better (xxh64", "not fetched"):
        assert any(words in text for text in report.actions)


def test_lost_manifest_is_fetched_from_a_copy_where_nothing_else_tells(tokenizer_dir: Path, tmp_path: Path,
                                                                       whole: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=False, card=False)
    before = contents(out)
    for name in TABLES:
        (out / "train" / name).unlink()
    (out / "train" / shards_of(whole / "train")[1].name).unlink()
    assert repair_set(out, remote=whole, threads=1).ok and contents(out) == before


def test_without_a_copy_nothing_changes_and_what_would_be_lost_is_said(damaged: Path, capsys: pytest.CaptureFixture) -> None:
    path = shards_of(damaged / "train")[1]
    flip(path, 1)
    (damaged / "train" / "shard.00088.000.mds").write_bytes(b"junk")
    before = contents(damaged)
    with pytest.raises(SystemExit) as end:
        cli.main(["repair", str(damaged)])
    text = capsys.readouterr().out
    entry = json.loads((damaged / "train" / "manifest.json").read_text())["shards"][1]
    assert end.value.code == 1 and contents(damaged) == before
    assert f"still wrong: {path}: " in text and "shard.00088.000.mds: no manifest names it" in text
    assert f"{entry['samples']:,} chunks, {entry['tokens']:,} tokens; {entry['documents']:,} documents end in it" in text
    assert "--remote" in text and "--quarantine" in text and "the same conversion run again" in text


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
@pytest.mark.parametrize("damage", ["unreadable", "flipped token", "missing"])
def test_quarantine_takes_out_exactly_the_bad_shards_and_names_their_documents(
        tokenizer_dir: Path, tmp_path: Path, compression: str | None, records: bool, damage: str) -> None:
    out = copy_set(tokenizer_dir, tmp_path, compression=compression, records=records)
    stored, paths = whole_samples(tokenizer_dir, "train", compression), shards_of(out / "train")
    bad = [1, 5]
    for at in bad:
        if damage == "missing":
            paths[at].unlink()
        else:
            flip(paths[at], 1 if damage == "unreadable" else -1)
    before = contents(out)
    report = repair_set(out, quarantine=True, threads=1)
    assert report.ok and nothing_lost(before, out)
    assert verify_set(out, threads=1).ok
    names = [path.name.removesuffix(".zstd") for path in paths]
    left = {name: samples for at, (name, samples) in enumerate(stored.items()) if at not in bad}
    found = samples_of(out / "train")
    assert {name: [(s["doc"], s["part"], s["tokens"].tolist()) for s in samples] for name, samples in found.items()} \
        == {name: [(s["doc"], s["part"], s["tokens"].tolist()) for s in samples] for name, samples in left.items()}
    assert report.lost == missing_lines(out)
    assert [line["shard"]["raw"]["basename"] for line in report.lost] == [names[1], names[5]]
    remaining = {(s["source"], s["doc"]) for samples in left.values() for s in samples}
    for line in report.lost:
        samples = stored[line["shard"]["raw"]["basename"]]
        ids = list(dict.fromkeys(s["doc"] for s in samples))
        assert (line["chunks"], line["tokens"]) == (len(samples), sum(len(s["tokens"]) for s in samples))
        assert line["documents"] == sum(s["last"] for s in samples)
        assert line["whole_documents"] == sum(bool(s["last"]) and (samples[0]["source"], s["doc"]) not in remaining
                                              for s in samples)
        assert sorted(line["cut"], key=str) == expected_cuts(stored, line["shard"]["raw"]["basename"])
        if damage == "flipped token" and not compression:  # a packed shard with a flipped bit does not expand
            assert line["ids"] == ids
        else:
            assert line["ids"] is None and line["after"] is not None and line["before"] is not None
    manifest = json.loads((out / "train" / "manifest.json").read_text())
    for source in SOURCES:
        of_source = [s for samples in left.values() for s in samples if s["source"] == source]
        lost = sum(line["documents"] for line in report.lost if line["shard"]["source"] == source)
        stated = manifest["sources"][source]
        assert stated["documents"] == sum(s["last"] for s in of_source) and stated["chunks"] == len(of_source)
        assert stated["dropped"] == ({"quarantined": lost} if lost else {}) and (stated["bytes"] is None) == bool(lost)
    after = contents(out)
    again = repair_set(out, quarantine=True, threads=1)
    assert again.ok and not again.actions and not again.lost and contents(out) == after


def test_document_that_goes_through_lost_shards_is_said_to_lack_what_it_lacks(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = {"short": "kalo mi ter.", "long": "kalo mi ter volsta" * 700, "end": "ge. " * 300}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts.items()))
    seen = set()
    for number, lost in enumerate(((3,), (0,), (-1,), (2, 4))):
        out = tmp_path / str(number)
        convert(options(out, [tmp_path / "long.jsonl"], tokenizer_dir, shard_size="1kb"))
        paths, stored = shards_of(out / "train"), samples_of(out / "train")
        assert len(paths) > 8
        for at in lost:
            flip(paths[at], 1)
        report = repair_set(out, quarantine=True, threads=1)
        for at, line in zip(lost, report.lost, strict=True):
            assert sorted(line["cut"], key=str) == expected_cuts(stored, paths[at].name)
            seen |= {part["lost"] for part in line["cut"]}
    assert seen == {"beginning", "middle", "end"}


@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
def test_tables_of_a_set_with_shards_taken_out_come_back_too(tokenizer_dir: Path, tmp_path: Path, records: bool) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=records)
    flip(shards_of(out / "train")[2], 2)
    assert repair_set(out, quarantine=True, threads=1).ok
    before = in_use(out)
    for name in TABLES:
        (out / "train" / name).unlink()
    assert repair_set(out, threads=1).ok and in_use(out) == before
    report = verify_set(out, threads=1)
    assert report.ok and (not records or any("1 shards with" in text and "taken out" in text for text in report.notes))


def test_set_with_shards_taken_out_is_healed_by_the_same_conversion_or_a_copy(tokenizer_dir: Path, whole: Path,
                                                                             tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path)
    before = contents(out)
    paths = shards_of(out / "train")
    flip(paths[2], 2)
    assert repair_set(out, quarantine=True, threads=1).ok and in_use(out) != before
    shutil.copytree(out, tmp_path / "other")
    convert(options(out, [whole.parent / "texts" / name for name in SOURCES], tokenizer_dir, validation=0.2, unit_size=UNIT,
                    shard_size=SHARD, licence="cc-by-4.0"))
    assert in_use(out) == before
    assert repair_set(tmp_path / "other", remote=whole, threads=1).ok and in_use(tmp_path / "other") == before
    paths[2].unlink()  # once more, and nobody has asked to do without it this time
    for spoil in (lambda: None, lambda: (out / "train" / "manifest.json").unlink()):
        spoil()
        report = repair_set(out, threads=1)
        assert any(f"{paths[2]}: missing" in text for text in report.problems)


def test_lost_shard_that_nothing_names_any_more_is_counted(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=False)
    entry = json.loads((out / "train" / "manifest.json").read_text())["shards"][3]
    for name in [*TABLES, entry["raw"]["basename"]]:
        (out / "train" / name).unlink()
    before = contents(out)
    report = repair_set(out, threads=1)
    words = f"{entry['samples']:,} chunks of source '{entry['source']}', {entry['tokens']:,} tokens, in which"
    assert not report.ok and words in report.problems[0] and contents(out) == before
    report = repair_set(out, quarantine=True, threads=1)
    assert report.ok and any(words in text for text in report.actions) and verify_set(out, threads=1).ok


def test_index_still_names_a_lost_shard(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=False)
    before, path = contents(out), shards_of(out / "train")[3]
    for name in ("manifest.json", "lengths.npy", path.name):
        (out / "train" / name).unlink()
    report = repair_set(out, threads=1)
    assert not report.ok and any(f"{path}: missing" in text for text in report.problems)
    assert repair_set(out, remote=whole_set(tokenizer_dir), threads=1).ok and contents(out) == before


def test_split_without_one_good_shard_is_left_as_it_is(damaged: Path) -> None:
    for path in shards_of(damaged / "validation"):
        flip(path, 1)
    manifest = (damaged / "validation" / "manifest.json").read_bytes()
    report = repair_set(damaged, quarantine=True, threads=1)
    assert any("no good shard is left" in text for text in report.problems)
    assert (damaged / "validation" / "manifest.json").read_bytes() == manifest


def test_files_that_belong_to_nothing_are_moved_only_when_asked(damaged: Path) -> None:
    before = contents(damaged)
    shutil.copy(shards_of(damaged / "train")[0], damaged / "train" / "shard.00099.000.mds")
    (damaged / "train" / "notes.txt").write_text("x")
    (damaged / "old").mkdir()
    shutil.copy(shards_of(damaged / "train")[0], damaged / "old")
    assert len(repair_set(damaged, threads=1).problems) == 3
    assert repair_set(damaged, quarantine=True, threads=1).ok and in_use(damaged) == before
    assert sorted(contents(damaged / "quarantine")) == ["old/" + shards_of(damaged / "train")[0].name, "train/notes.txt",
                                                        "train/shard.00099.000.mds"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is caught, and everything after it fails too."""


@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
def test_repair_that_is_killed_anywhere_is_repeated(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    records: bool) -> None:
    def damage(folder: Path) -> Path:
        out = copy_set(tokenizer_dir, folder, records=records)
        flip(shards_of(out / "train")[1], -1)
        shards_of(out / "validation")[2].unlink()
        (out / "train" / "lengths.npy").unlink()
        flip(out / "validation" / "index.json", 5)
        return out

    def noted(folder: Path) -> dict[str, list]:
        """The documents of each lost shard, as one of its lines names them."""
        found: dict[str, list] = {}
        for line in missing_lines(folder):
            found[line["shard"]["raw"]["basename"]] = line["ids"] or found.get(line["shard"]["raw"]["basename"])
        return found

    one = damage(tmp_path / "one")
    before = contents(one)
    assert repair_set(one, quarantine=True, threads=1).ok
    expected = in_use(one)
    for stop in range(1 + 2 * records, 40, 4):
        out, count = damage(tmp_path / str(stop)), [0]
        with monkeypatch.context() as patch:
            for owner, name in ((os, "rename"), (os, "replace")):
                original = getattr(owner, name)

                def counted(*args: object, _original=original, _count=count, _stop=stop, **more: object) -> None:
                    _count[0] += 1
                    if _count[0] >= _stop:
                        raise Killed
                    _original(*args, **more)

                patch.setattr(owner, name, counted)
            try:
                repair_set(out, quarantine=True, threads=1)
                break
            except Killed:
                pass
        assert repair_set(out, quarantine=True, threads=1).ok
        assert {n: d for n, d in in_use(out).items() if ".scratch" not in n} == expected, stop
        assert nothing_lost(before, out)
        assert noted(out) == noted(one)
    else:
        pytest.fail("never came to its end")
    assert stop > 15
