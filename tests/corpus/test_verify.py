"""`ettin verify`: a good dataset passes, every kind of damage is found, all is listed, nothing is written."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from converting import copy_set, files_of, shards_of, whole_set
from hand_made import edit, flip

from ettin_foundry.corpus.mix import build_mix
from ettin_foundry.corpus.verify import verify_dataset
from ettin_foundry.data.storage import open_storage

SMALL = ["train/lengths.npy", "train/index.json", "train/manifest.json", "validation/manifest.json",
         "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "README.md"]


@pytest.fixture
def private(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A copy of the whole dataset, to be spoilt."""
    return copy_set(tokenizer_dir, tmp_path)


def problems(location: Path | str) -> str:
    return "\n".join(verify_dataset(location, threads=1).problems)


def bump(table: dict, key: str | int, by: int = 1) -> None:
    table[key] += by


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_whole_dataset_has_no_problem_and_is_not_touched(tokenizer_dir, compression):
    whole = whole_set(tokenizer_dir, compression)
    before = files_of(whole)
    report = verify_dataset(whole)
    assert report.ok and not report.notes and files_of(whole) == before
    for split, counts in report.counts.items():
        totals = json.loads((whole / split / "manifest.json").read_text())["totals"]
        assert counts == (totals["documents"], totals["samples"], totals["tokens"])
        assert verify_dataset(whole / split).counts == {split: counts}
    paths = [path for split in report.counts for path in shards_of(whole / split)]
    assert report.shards == len(paths) > 10 and report.num_bytes >= sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_flipped_bit_of_a_shard_is_found(tokenizer_dir, tmp_path, compression):
    out = copy_set(tokenizer_dir, tmp_path, compression=compression)
    for place, path in enumerate(shards_of(out / "train")[:6]):
        good = path.read_bytes()
        flip(path, [0, 5, len(good) // 3, len(good) // 2, len(good) - 20, len(good) - 1][place], place)
        found = verify_dataset(out, threads=1).problems
        assert found and all(str(path) in text for text in found)
        path.write_bytes(good)


@pytest.mark.parametrize("name", SMALL)
def test_damage_to_a_small_file_is_found_wherever_it_is(private, name):
    """Of the card only its table of hashes counts."""
    path, rng = private / name, random.Random(name)
    before = path.read_bytes()
    begin, end = 0, len(before)
    if name == "README.md":
        begin, end = re.search(rb"`train/manifest.json` \| `(.*)`", before).span(1)
    for at in [begin + 2, *(rng.randrange(begin, end) for _ in range(3))]:
        flip(path, at, rng.randrange(7))
        assert not verify_dataset(private, threads=1).ok, at
        path.write_bytes(before)
    for damage in (lambda: path.write_bytes(before[:len(before) // 2]), path.unlink):
        damage()
        report = verify_dataset(private, threads=1)
        assert any(path.name in text for text in (report.notes if name == "README.md" else report.problems))


def test_everything_wrong_is_listed_at_once(private, ettin):
    train, validation = shards_of(private / "train"), shards_of(private / "validation")
    flip(train[0], -1)
    train[1].unlink()
    train[2].write_bytes(train[2].read_bytes()[:-3])
    train[3].rename(private.parent / "outside")
    train[3].symlink_to(private.parent / "outside")
    stray = Path(shutil.copy(train[4], private / "train" / "shard.00099.000.mds"))
    flip(validation[0], 3)
    small = [private / name for name in SMALL if name.startswith(("train/index", "train/lengths", "tokenizer/tok"))]
    for path in small:
        flip(path, -30)
    (private / "validation" / "index.json").unlink()
    code, text, _ = ettin("verify", private)
    assert code == 1
    for path in [*train[:4], stray, validation[0], *small, private / "validation" / "index.json"]:
        assert f"problem: {path}: " in text
    assert not any(str(path) in text for path in [*train[4:], *validation[1:]])


def test_commands_verify_finalize_and_mix(private, tmp_path, ettin):
    before, none, spec = files_of(private), tmp_path / "none", tmp_path / "spec.yaml"
    (private / "train" / "manifest.json").unlink()
    spec.write_text("sets:\n  mine: {set: set, tokens: 2000}\n")
    for words, text in ((["finalize", private], "train: 175 chunks of at most 62 tokens, 7,875 tokens, 17 shards"),
                        (["verify", private, "--threads", 2], "all is as it should be"),
                        (["mix", spec, tmp_path / "mix", "--seed", 3], "passes"),
                        (["finalize", none], ""), (["verify", none], ""), (["mix", none, "x"], "")):
        code, out, err = ettin(*words)
        assert text in out if text else code == 1 and "none" in err.splitlines()[-1]
    assert files_of(private) == before and verify_dataset(tmp_path / "mix").ok


@pytest.mark.parametrize("change,words", [
    (lambda m: bump(m["totals"], "documents"), "totals.documents"),
    (lambda m: [bump(m["shards"][n], "documents", by) for n, by in ((1, 1), (2, -1))], "documents is"),
    (lambda m: bump(m["shards"][1]["rows"], "64", -1), r"rows of 64 is \d+"),
    (lambda m: [bump(m["shards"][n], "tokens", by) for n, by in ((1, 1), (2, -1))], "lengths.npy: row 1 counts"),
    (lambda m: m["shards"][1].update(source="code"), "chunks of another source"),
    (lambda m: m["shards"].reverse(), "index.json: its shards differ"),
    (lambda m: m["tokenizer"].update(vocab_size=300), "the tokenizer has 300 entries"),
    (lambda m: m["tokenizer"].update(probe_sha256="0"), "probe_sha256")])
def test_lie_of_a_manifest_is_found_by_the_files_alone(private, change, words):
    (private / "README.md").unlink()
    edit(private / "train", change)
    assert re.search(words, problems(private))


def test_split_that_is_none_and_a_card_that_names_files_elsewhere_are_found(private):
    shutil.copytree(private / "validation", private / "test")
    assert "test: is no split of this dataset" in problems(private)
    card = private / "README.md"
    card.write_text(card.read_text().replace("`train/manifest.json`", "`../precious`"))
    assert "'../precious' must be a plain name inside the folder" in problems(private)


def test_dataset_behind_a_url_is_checked_the_same_way(private, tmp_path):
    remote = open_storage(url := f"memory://{tmp_path.name}/set")
    for name, data in files_of(private).items():
        remote.write_bytes(name, data)
    report = verify_dataset(url)
    assert report.ok and not report.notes and report.counts == verify_dataset(private).counts
    paths = shards_of(private / "train")
    for path in (paths[1], private / "validation" / "lengths.npy"):
        flip(path, -1)
        remote.write_bytes(path.relative_to(private).as_posix(), path.read_bytes())
    remote.delete(f"train/{paths[2].name}")
    found = problems(url)
    for name in (f"train/{paths[1].name}", f"train/{paths[2].name}", "validation/lengths.npy"):
        assert f"{url}/{name}: " in found
    assert paths[3].name not in found


def test_mixture_is_held_to_its_datasets(private, tmp_path):
    sources = json.loads((private / "train" / "manifest.json").read_text())["sources"]
    entries = {name: {"set": "set", "source": name, "tokens": sources[name]["tokens"] / 2} for name in sources}
    (tmp_path / "spec.yaml").write_text(json.dumps({"sets": entries}))
    build_mix(tmp_path / "spec.yaml", tmp_path / "mix")
    report = verify_dataset(tmp_path / "mix")
    manifest = json.loads((tmp_path / "mix" / "train" / "manifest.json").read_text())
    assert report.ok and report.counts["train"] == (None, manifest["totals"]["samples"], manifest["totals"]["tokens"])
    taken = {shard for run in manifest["runs"] for shard in run["shards"]}
    paths = shards_of(private / "train")
    for path in paths:
        flip(path, -1)
    found = problems(tmp_path / "mix")
    assert 0 < len(taken) < len(paths)
    assert all((str(path) in found) == (number in taken) for number, path in enumerate(paths))
    edit(private / "train", lambda m: m["shards"].reverse())
    assert "altered or replaced" in problems(tmp_path / "mix")
