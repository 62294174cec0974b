"""Reading a split: the same as the stock reader on good files, and what an operator relies on. Lies: test_hostile.py."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstd
from conftest import CHUNK_LENGTH
from hand_made import VOCAB_SIZE, cut, edit, random_documents, seal, write_split

from ettin_foundry.data.manifest import expand
from ettin_foundry.data.shards import MDSSplit, parse_shard, scan_shard

LONG_LENGTHS = [1, 2, 254, 255, 256, 257, 299, 300, 650]  # around the step from one to two bytes; 650 is cut
BAD = 1  # the shard that is spoilt in tests of bad shards
SOURCES = ["a", "a", "b", "a", "b"]


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, list]]:
    rng = np.random.default_rng(7)
    return [(source, random_documents(rng, 12 + number, prefix=f"d\u00e9{number}-"))
            for number, source in enumerate(SOURCES)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, texts: list) -> Path:
    """Five shards of two sources, for reading only."""
    return write_split(tmp_path_factory.mktemp("plain") / "train", texts)


@pytest.fixture(scope="module")
def packed_master(tmp_path_factory: pytest.TempPathFactory, texts: list) -> Path:
    return write_split(tmp_path_factory.mktemp("packed") / "train", texts, compress=lambda data: zstd.compress(data, 3))


@pytest.fixture
def private(plain: Path, tmp_path: Path) -> Path:
    """A copy of `plain`, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "train"))


@pytest.fixture
def packed(packed_master: Path, tmp_path: Path) -> Path:
    """The same set in zstd, not yet expanded."""
    return Path(shutil.copytree(packed_master, tmp_path / "packed"))


def shard_file(folder: Path, shard: int, end: str = "") -> Path:
    return folder / (json.loads((folder / "manifest.json").read_text())["shards"][shard]["raw"]["basename"] + end)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def everything(data: MDSSplit) -> list[dict]:
    return [{**sample, "tokens": sample["tokens"].tolist()} for shard in range(data.num_shards)
            for sample in (data.sample(shard, index) for index in range(int(data.samples[shard])))]


# ------------------------------------------------------------------ reading


def test_stock_streaming_dataset_reads_the_same_samples(data_set: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from streaming import StreamingDataset

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # it leaves lock files in the temporary folder
    for split in ("train", "validation"):
        mine = MDSSplit(data_set / split)
        stock = StreamingDataset(local=str(data_set / split), shuffle=False, batch_size=1)
        places = [(s, i) for s in range(mine.num_shards) for i in range(int(mine.samples[s]))]
        assert len(stock) == len(places) == mine.manifest["totals"]["samples"]
        lengths = np.concatenate([mine.sample_lengths(s) for s in range(mine.num_shards)])
        last = np.concatenate([mine.last(s) for s in range(mine.num_shards)])
        for number, (shard, index) in enumerate(places):
            expected, found = stock[number], mine.sample(shard, index)
            assert found.pop("tokens").tolist() == expected["tokens"].tolist()
            assert found == {key: value for key, value in expected.items() if key != "tokens"}
            assert (lengths[number], last[number]) == (len(expected["tokens"]), bool(expected["last"]))
        del stock  # its shared memory goes with it, or when this process ends


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_written_chunks_come_back(kind: str, texts: list, request: pytest.FixtureRequest) -> None:
    data = MDSSplit(request.getfixturevalue(kind))
    expected = [{**chunk, "source": source, "tokens": chunk["tokens"].tolist()} for source, part in texts
                for chunk in cut(part, CHUNK_LENGTH)]
    assert everything(data) == expected
    assert data.sources == SOURCES and data.tokens.sum() == sum(len(tokens) for _, part in texts for _, tokens in part)
    assert [data.last(s).tolist() for s in range(data.num_shards)] == [
        [bool(chunk["last"]) for chunk in cut(part, CHUNK_LENGTH)] for _, part in texts]
    data.verify()


def test_chunks_around_the_step_to_two_bytes_of_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 60_000, length, dtype=np.uint16) for length in LONG_LENGTHS]
    arrays[0][0] = 60_000
    folder = write_split(tmp_path / "train", [("s", [(str(i), array) for i, array in enumerate(arrays)])], chunk_length=300,
                         vocab_size=60_001)
    data = MDSSplit(folder)
    data.verify()
    assert data.sample_lengths(0).tolist() == [*LONG_LENGTHS[:-1], 300, 300, 50]
    assert np.array_equal(np.concatenate([data.chunk(0, i) for i in range(11)]), np.concatenate(arrays))


def test_histogram_counts_chunks_of_each_length(plain: Path) -> None:
    data = MDSSplit(plain)
    for shard in range(data.num_shards):
        expected = [0] * (CHUNK_LENGTH + 1)
        for index in range(int(data.samples[shard])):
            expected[len(data.chunk(shard, index))] += 1
        assert data.lengths(shard).tolist() == expected and data.lengths(shard).dtype == np.uint32


def test_rows_are_those_of_naive_best_fit(data_set: Path) -> None:
    data = MDSSplit(data_set / "train")
    expected = []
    for shard in range(data.num_shards):
        free: list[int] = []
        for piece in sorted(data.sample_lengths(shard) + 2, reverse=True):
            fitting = [i for i, space in enumerate(free) if space >= piece]
            best = min(fitting, key=lambda i: free[i], default=None)
            if best is None:
                free.append(CHUNK_LENGTH + 2)
                best = -1
            free[best] -= int(piece)
        expected.append(len(free))
    assert data.rows(CHUNK_LENGTH + 2).tolist() == expected
    assert data.rows(1024) is None


def test_copies_read_alike_in_other_processes(plain: Path) -> None:
    data = MDSSplit(plain)
    expected = data.chunk(1, 2)
    assert np.array_equal(pickle.loads(pickle.dumps(data)).chunk(1, 2), expected)
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(write, data.chunk(1, 2).tobytes() + data.chunk(2, 0)[:1].tobytes())
        finally:
            os._exit(0)
    os.close(write)  # or a child that fails would leave the read waiting
    os.waitpid(child, 0)
    assert os.read(read, 4096) == expected.tobytes() + data.chunk(2, 0)[:1].tobytes()
    os.close(read)


def test_open_shards_are_bounded(plain: Path) -> None:
    data = MDSSplit(plain, max_open=2)
    expected = [MDSSplit(plain).chunk(shard, 0).tolist() for shard in range(data.num_shards)]
    for _ in range(2):
        assert [data.chunk(shard, 0).tolist() for shard in range(data.num_shards)] == expected
        assert len(data._open) == 2
    data.prefetch([0, 1, 2])  # so many are needed at a time
    assert [data.chunk(shard, 0).tolist() for shard in range(data.num_shards)] == expected and len(data._open) == 3


def test_a_chunk_outlives_its_shard(plain: Path) -> None:
    data = MDSSplit(plain, max_open=1)
    chunk = data.chunk(0, 0)
    before = chunk.tolist()
    data.chunk(1, 0)
    assert chunk.tolist() == before and chunk.flags.owndata and chunk.flags.aligned


def test_fingerprint_follows_the_data_and_not_its_place(plain: Path, private: Path, data_set: Path) -> None:
    expected = MDSSplit(plain).fingerprint
    assert MDSSplit(private).fingerprint == expected != MDSSplit(data_set / "train").fingerprint
    edit(private, lambda m: m["tokenizer"].update(name="other"))
    assert MDSSplit(private).fingerprint == expected
    edit(private, lambda m: m["tokenizer"].update(probe_sha256="0"))
    assert MDSSplit(private).fingerprint != expected
    edit(private, lambda m: (m.update(tokenizer=MDSSplit(plain).tokenizer), m["shards"].reverse()))
    assert MDSSplit(private).fingerprint != expected


def test_places_outside_the_set_are_index_errors(plain: Path) -> None:
    data = MDSSplit(plain)
    for shard, index in ((0, -1), (0, int(data.samples[0])), (-1, 0), (data.num_shards, 0)):
        with pytest.raises(IndexError):
            data.chunk(shard, index)


def test_a_manifest_of_the_first_version_is_still_read(private: Path) -> None:
    expected = everything(MDSSplit(private))

    def older(manifest: dict) -> None:
        del manifest["compression"]
        for shard in manifest["shards"]:
            del shard["documents"]

    edit(private, older)
    MDSSplit(private).verify()
    assert everything(MDSSplit(private)) == expected


# ------------------------------------------------------------------ packed shards


def test_a_packed_shard_is_expanded_once_and_used_by_every_process(packed: Path) -> None:
    first = MDSSplit(packed)
    first.chunk(0, 0)
    raw = shard_file(packed, 0)
    when = raw.stat().st_mtime_ns
    assert raw.stat().st_size == first.manifest["shards"][0]["raw"]["bytes"]
    again = MDSSplit(packed)
    assert np.array_equal(again.chunk(0, 0), first.chunk(0, 0)) and raw.stat().st_mtime_ns == when
    assert not shard_file(packed, 1).exists()  # only what is read
    assert list((packed / ".cache").iterdir()) == []


@pytest.mark.parametrize("at", [0, 3, 4, 40, -1])
def test_a_flipped_byte_in_an_expanded_shard_is_mended_from_the_packed_one(packed: Path, at: int,
                                                                          caplog: pytest.LogCaptureFixture) -> None:
    expected = everything(MDSSplit(packed))
    flip(shard_file(packed, BAD), at)
    assert everything(MDSSplit(packed)) == expected
    assert "made once more" in caplog.text and shard_file(packed, BAD).name in caplog.text


def test_expanding_stops_at_the_declared_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Stream:
        def __init__(self, *arguments: object) -> None:
            self.stream = true(*arguments)

        def read(self, number: int) -> bytes:
            asked.append(number)
            return self.stream.read(number)

    true = pyarrow.CompressedInputStream
    monkeypatch.setattr(pyarrow, "CompressedInputStream", Stream)
    given = 0
    with pytest.raises(ValueError, match="x.zstd: expands beyond 3000000 bytes"):
        for block in expand(zstd.compress(bytes(1 << 26), 3), "x.zstd", 3_000_000):
            given += len(block)
    assert given <= 3_000_000 and sum(asked) <= 3_000_001 and max(asked) <= 1 << 20  # one more, to see that there is more


# ------------------------------------------------------------------ any flipped byte


@pytest.mark.parametrize("kind, name", [("plain", "shard"), ("plain", "lengths.npy"), ("packed", "zip")])
def test_no_flipped_byte_is_read_silently(kind: str, name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(kind)
    folder = Path(shutil.copytree(source, tmp_path / "spoilt"))
    path = folder / "lengths.npy" if name == "lengths.npy" else shard_file(folder, BAD, ".zstd" if name == "zip" else "")
    size = path.stat().st_size
    good = path.read_bytes()
    rng = np.random.default_rng(3)
    for at in {*range(0, min(size, 48), 3), *rng.integers(0, size, 60).tolist(), size - 1}:
        flip(path, at)
        with pytest.raises(ValueError, match=rf"{path.name}: xxh64 is [0-9a-f]+; the manifest states .* altered"):
            MDSSplit(folder).chunk(BAD, 0)
        path.write_bytes(good)
    assert MDSSplit(folder).chunk(BAD, 0).size


def test_a_shard_that_changes_while_training_is_noticed_when_it_is_mapped_again(private: Path) -> None:
    data = MDSSplit(private, max_open=1)
    data.chunk(BAD, 0)
    data.chunk(0, 0)
    flip(shard_file(private, BAD), -1)
    with pytest.raises(ValueError, match="altered"):
        data.chunk(BAD, 0)


def test_any_flipped_byte_under_a_right_hash_is_refused_or_a_token_of_the_vocabulary(private: Path) -> None:
    """Structure is checked for itself: whoever can write a shard can also write its hash."""
    data = MDSSplit(private)
    good = shard_file(private, BAD).read_bytes()
    sizes = {"num_samples": int(data.samples[BAD]), "chunk_length": CHUNK_LENGTH, "vocab_size": VOCAB_SIZE}
    expected = parse_shard(good, "x", **sizes)
    rng = np.random.default_rng(5)
    refused = 0
    for at in rng.integers(0, len(good), 400).tolist():
        spoilt = bytearray(good)
        spoilt[at] ^= 1 << int(rng.integers(8))
        try:
            found = parse_shard(bytes(spoilt), "x", **sizes)
        except ValueError:
            refused += 1
            continue
        assert np.array_equal(found.starts, expected.starts) and np.array_equal(found.lengths, expected.lengths)
        for begin, length in zip(found.token_starts.tolist(), found.lengths.tolist()):
            assert np.frombuffer(found.buffer, "<u2", length, begin).max() < VOCAB_SIZE
    assert refused > 100


# ------------------------------------------------------------------ checks


def test_verify_holds_the_stock_index_to_the_manifest(private: Path, packed: Path) -> None:
    for folder, key in ((private, "raw_data"), (packed, "zip_data")):
        MDSSplit(folder).verify()
        index = json.loads((folder / "index.json").read_text())
        for change in (lambda i, k: i["shards"][1][k].update(basename="../x"), lambda i, k: i["shards"].pop(),
                       lambda i, k: i["shards"][0].update(column_encodings=["pkl"] * 5), lambda i, k: i.pop("shards"),
                       lambda i, k: i["shards"][1][k].update(bytes=1), lambda i, k: i["shards"][1].update({k: None})):
            changed = json.loads(json.dumps(index))
            change(changed, key)
            (folder / "index.json").write_text(json.dumps(changed))
            with pytest.raises(ValueError, match="index.json: "):
                MDSSplit(folder).verify()


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_check_shard_counts_its_bytes_and_leaves_nothing_behind(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    before = sorted(folder.rglob("*"))
    data = MDSSplit(folder)
    entry = data.manifest["shards"][BAD]
    assert data.check_shard(BAD) == entry["raw"]["bytes"] + (entry["zip"]["bytes"] if kind == "packed" else 0)
    assert sorted(folder.rglob("*")) == before and not data._open


def test_scanned_entry_is_that_of_the_manifest(plain: Path, packed: Path) -> None:
    for folder, end in ((plain, ""), (packed, ".zstd")):
        data = MDSSplit(folder)
        for shard in range(data.num_shards):
            found = scan_shard(shard_file(folder, shard, end), chunk_length=CHUNK_LENGTH, vocab_size=VOCAB_SIZE)
            assert found.pop("lengths") == data.lengths(shard).tolist()
            assert found == data.manifest["shards"][shard]


# ------------------------------------------------------------------ bad shards


def spoil(folder: Path, how: str) -> None:
    path = shard_file(folder, BAD)
    if how == "flipped":
        flip(path, path.stat().st_size // 2)
    elif how == "missing":
        path.unlink()
    elif how == "token":  # a lie under a right hash
        data = bytearray(path.read_bytes())
        data[-2:] = np.array([VOCAB_SIZE], "<u2").tobytes()
        path.write_bytes(data)
        seal(folder)


@pytest.mark.parametrize("how", ["flipped", "missing", "token"])
def test_skip_keeps_lengths_and_counts_and_takes_tokens_by_the_rule(private: Path, how: str,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    spoil(private, how)
    with pytest.raises((ValueError, FileNotFoundError), match=shard_file(private, BAD).name):
        MDSSplit(private).chunk(BAD, 0)
    data = MDSSplit(private, on_bad_shard="skip", max_open=1)
    donor = 3  # the next shard of source a
    expected = np.repeat(np.arange(CHUNK_LENGTH + 1), data.lengths(BAD))
    for _ in range(2):  # again after it was unmapped
        assert data.sample_lengths(BAD).tolist() == expected.tolist() and not data.last(BAD).any()
        for index, length in enumerate(expected):
            given = data.chunk(donor, index % int(data.samples[donor])).tolist()
            assert data.chunk(BAD, index).tolist() == [given[i % len(given)] for i in range(length)]
        data.chunk(0, 0)
    sample = data.sample(BAD, 2)
    assert (sample["source"], sample["last"]) == ("a", 0) and shard_file(private, BAD).name in sample["doc"]
    [record] = [json.loads(line) for line in (private / "substitutions.jsonl").read_text().splitlines()]
    assert record["shard"] == shard_file(private, BAD).name and record["replaced_by"] == shard_file(private, donor).name
    assert (record["samples"], record["tokens"]) == (data.samples[BAD], data.tokens[BAD]) and record["reason"]
    assert caplog.text.count("are replaced by tokens of") == 1
    MDSSplit(private, on_bad_shard="skip").chunk(BAD, 0)  # another process, another run: noted already
    assert len((private / "substitutions.jsonl").read_text().splitlines()) == 1


def test_shard_that_goes_bad_after_it_was_read_is_not_replaced(private: Path) -> None:
    """Rows were planned from its own chunks, which a substitute's order does not match."""
    data = MDSSplit(private, on_bad_shard="skip", max_open=1)
    data.sample_lengths(BAD)
    data.sample_lengths(0)  # unmaps it
    flip(shard_file(private, BAD), -1)
    with pytest.raises(ValueError, match="xxh64"):
        data.chunk(BAD, 0)


def test_skip_passes_over_a_bad_donor_and_stops_without_any(private: Path) -> None:
    for shard in (BAD, 3):
        flip(shard_file(private, shard), -1)
    data = MDSSplit(private, on_bad_shard="skip")
    assert data.chunk(BAD, 0)[0] == data.chunk(0, 0)[0]  # the next after 3 is 0
    assert data.chunk(3, 0)[0] == data.chunk(0, 0)[0]
    flip(shard_file(private, 0), -1)
    with pytest.raises(ValueError, match="source 'a' has no other shard that can, which on_bad_shard: skip needs"):
        MDSSplit(private, on_bad_shard="skip").chunk(BAD, 0)


def test_nothing_is_replaced_without_a_note(private: Path, tmp_path: Path) -> None:
    spoil(private, "flipped")
    (private / "substitutions.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="substitutions.jsonl: cannot be written.*no shard is replaced without a note"):
        MDSSplit(private, on_bad_shard="skip").chunk(BAD, 0)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("options, message", [
    ({"on_bad_shard": "ignore"}, "dataset.on_bad_shard: 'ignore' given; stop or skip is needed"),
    ({"cache_limit": "1gb"}, "dataset.cache_limit: .* neither remote nor compressed, so it would do nothing"),
    ({"cache_limit": "many"}, "dataset.cache_limit: 'many' given; bytes as a whole number"),
    ({"cache_limit": 0}, "dataset.cache_limit: 0 given"), ({"cache_limit": True}, "dataset.cache_limit: True given"),
    ({"cache_limit": "-3gb"}, "dataset.cache_limit: '-3gb' given"), ({"cache_limit": 1.5}, "cache_limit: 1.5 given")])
def test_settings_that_are_wrong_or_without_effect_are_refused(plain: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MDSSplit(plain, **options)
