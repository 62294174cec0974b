"""`ettin repair` and the small files of a set: they come back byte for byte, and nothing is ever deleted or trusted."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
from whole_sets import TABLES, contents, copy_set, draw_once, edit, flip, in_use, shards_of, whole_set

from ettin_foundry.corpus.repair import repair_set
from ettin_foundry.corpus.verify import verify_set
from ettin_foundry.corpus.workbench import Workbench
from ettin_foundry.data.inspect import shard_order
from ettin_foundry.data.storage import open_storage

SUBSETS = [names for number in (1, 2, 3) for names in itertools.combinations(TABLES, number)]


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


@pytest.mark.parametrize("names,compression", [*((names, None) for names in SUBSETS), (TABLES, "zstd"),
                                               (TABLES[:1], "zstd")])
@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
def test_deleted_tables_come_back_byte_for_byte(tokenizer_dir: Path, tmp_path: Path, names: tuple[str, ...], records: bool,
                                               compression: str | None) -> None:
    out = copy_set(tokenizer_dir, tmp_path, compression=compression, records=records)
    before = contents(out)
    for split in ("train", "validation"):
        for name in names:
            (out / split / name).unlink()
    report = repair_set(out, threads=1)
    assert report.ok and not report.lost and contents(out) == before
    assert len([text for text in report.actions if "made from" in text]) == 2 * len(names)


@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
@pytest.mark.parametrize("name", TABLES)
def test_altered_tables_come_back_and_the_bad_ones_are_kept(tokenizer_dir: Path, tmp_path: Path, name: str,
                                                           records: bool) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=records)
    before, path = contents(out), out / "train" / name
    for at, spoil in enumerate((lambda: flip(path, 1), lambda: flip(path, -9, 1), lambda: path.write_bytes(b"[]"))):
        spoil()
        bad = path.read_bytes()
        assert repair_set(out, threads=1).ok and in_use(out) == before
        kept = out / "quarantine" / "train" / (name if not at else f"{name}.{at}")
        assert kept.read_bytes() == bad


@pytest.mark.parametrize("records", [True, False], ids=["records", "no-records"])
def test_readable_lie_of_a_manifest_is_put_right(tokenizer_dir: Path, tmp_path: Path, records: bool) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=records)
    before = contents(out)
    edit(out / "train" / "manifest.json", lambda m: (m["sources"]["wiki"].update(licence="mit"), m["shards"].reverse()))
    assert repair_set(out, threads=1).ok and in_use(out) == before


def test_version_of_the_code_that_made_the_set_is_kept(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(damaged)
    for name in ("manifest.json", "index.json"):
        (damaged / "train" / name).unlink()
    monkeypatch.setattr("ettin_foundry.corpus.finalize.__version__", "99.0")
    assert repair_set(damaged, threads=1).ok and contents(damaged) == before


def test_one_split_is_repaired_by_itself(damaged: Path) -> None:
    before = contents(damaged)
    for name in TABLES:
        (damaged / "validation" / name).unlink()
    (damaged / "train" / "index.json").unlink()
    assert repair_set(damaged / "validation", threads=1).ok
    assert contents(damaged) == {name: data for name, data in before.items() if name != "train/index.json"}


def test_card_and_picture_come_back(damaged: Path) -> None:
    before = contents(damaged)
    (damaged / "README.md").unlink()
    flip(damaged / "lengths.svg", 500)
    assert repair_set(damaged, threads=1).ok and in_use(damaged) == before
    flip(damaged / "README.md", (damaged / "README.md").read_bytes().index(b'"files"'), 1)
    assert repair_set(damaged, threads=1).ok and in_use(damaged) == before
    (damaged / "README.md").write_text("mine")
    assert repair_set(damaged, threads=1).ok and (damaged / "README.md").read_text() == "mine"


def test_whole_set_is_not_touched(damaged: Path) -> None:
    before = contents(damaged)
    report = repair_set(damaged, quarantine=True, threads=1)
    assert report.ok and not report.actions and not report.lost and contents(damaged) == before
    assert not (damaged / ".scratch").exists()


def test_from_the_shards_alone_a_readable_set_is_made_and_what_is_unknown_is_said(tokenizer_dir: Path,
                                                                                 tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=False, card=False)
    expected = {split: json.loads((out / split / "manifest.json").read_text()) for split in ("train", "validation")}
    for split in expected:
        for name in ("manifest.json", "index.json"):
            (out / split / name).unlink()
    report = repair_set(out, threads=1)
    assert report.ok and any("made from the shards alone; options, licences, bytes of text and drops are not known" in text
                             for text in report.actions)
    assert verify_set(out, threads=1).ok
    for split, manifest in expected.items():
        found = json.loads((out / split / "manifest.json").read_text())
        for key in ("format", "version", "chunk_length", "tokenizer", "compression", "lengths", "shards", "totals"):
            if key == "tokenizer":  # its name is that of the folder now
                assert {**found[key], "name": None} == {**manifest[key], "name": None}
            else:
                assert found[key] == manifest[key], key
        for name, source in manifest["sources"].items():
            assert found["sources"][name] == {**source, "licence": None, "bytes": None}
    (out / "train" / "manifest.json").unlink()  # a sibling knows more
    assert repair_set(out, threads=1).ok
    assert json.loads((out / "train" / "manifest.json").read_text())["totals"] == expected["train"]["totals"]


def test_unfinished_conversion_is_not_taken_for_a_set(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, card=False)
    for name in ("train/manifest.json", "validation/manifest.json", "units/00002.json"):
        (out / name).unlink()
    before = contents(out)
    report = repair_set(out, quarantine=True, threads=1)
    assert len(report.problems) == 2 and all("1 of 5 units have no completion record" in text for text in report.problems)
    assert contents(out) == before


def test_shards_that_are_being_added_are_not_put_into_a_lost_manifest(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path, records=False)
    for name in TABLES[:2]:
        (out / "train" / name).unlink()
    shutil.copy(out / "validation" / shards_of(out / "validation")[0].name, out / "train" / "shard.00009.000.mds")
    before = contents(out)
    report = repair_set(out, threads=1)
    assert "perhaps more is being added" in "".join(report.problems) and contents(out) == before


def test_older_manifest_stays_as_it_is(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Without documents of each shard and without `compression`."""
    out = copy_set(tokenizer_dir, tmp_path, records=False, card=False)
    for split in ("train", "validation"):
        edit(out / split / "manifest.json", lambda m: (m.pop("compression"), [s.pop("documents") for s in m["shards"]]))
    before = contents(out)
    (out / "train" / "index.json").unlink()
    (out / "train" / "lengths.npy").unlink()
    assert repair_set(out, threads=1).ok and contents(out) == before
    shards_of(out / "train")[2].unlink()
    assert repair_set(out, quarantine=True, threads=1).ok and verify_set(out, threads=1).ok


def test_record_cannot_make_repair_touch_other_files(damaged: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious.mds"
    outside.write_bytes(b"x")
    for name in ("../../precious.mds", str(outside), "a/b.mds"):
        edit(damaged / "units" / "00001.json", lambda r, name=name: r["splits"]["train"]["shards"][0]["raw"].update(
            basename=name))
        before = contents(damaged)
        report = repair_set(damaged, quarantine=True, threads=1)
        assert not report.ok and outside.read_bytes() == b"x"
        assert {key: data for key, data in contents(damaged).items() if not key.startswith("quarantine/")} == before


def test_card_cannot_make_repair_touch_other_files(damaged: Path, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_bytes(b"x")
    card = damaged / "README.md"
    card.write_text(card.read_text().replace('"lengths.svg": "', '"../precious": "00", "lengths.svg": "'))
    report = repair_set(damaged, quarantine=True, remote=tmp_path, threads=1)
    assert outside.read_bytes() == b"x" and not (tmp_path / "quarantine").exists()
    assert report.problems or report.actions


def test_shards_are_listed_by_number_and_not_by_letter() -> None:
    names = ["shard.00009.999.mds", "shard.00009.1000.mds", "shard.99999.000.mds.zstd", "shard.100000.000.mds"]
    assert sorted(reversed(names), key=shard_order) == names


def test_mixture_and_url_are_refused(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="s3://b/set given; repair works on a folder of this machine"):
        repair_set("s3://b/set")
    edit(damaged / "train" / "manifest.json", lambda m: m.update(format="ettin-mix"))
    with pytest.raises(ValueError, match="a mixture; .*Repair the sets that it points at"):
        repair_set(damaged)
    with pytest.raises(FileNotFoundError, match="holds no split"):
        repair_set(tmp_path / "nothing")


def test_workbench_never_writes_over_what_is_in_quarantine(damaged: Path, tmp_path: Path) -> None:
    bench = Workbench(open_storage(damaged), whole=True, remote=None, quarantine=True, scratch=tmp_path, tick=print)
    for number in range(3):
        (damaged / "train" / "x").write_text(str(number))
        bench.set_aside("train/x", "test")
    found = sorted((damaged / "quarantine" / "train").iterdir())
    assert [path.name for path in found] == ["x", "x.1", "x.2"] and [path.read_text() for path in found] == ["0", "1", "2"]
