"""Reading a split: the same as the stock reader on good files, and every damaged byte noticed. Lies: test_hostile.py."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstd
from conftest import CHUNK_LENGTH
from hand_made import VOCAB_SIZE, cut, edit, flip, random_documents, samples_of, shard_file, write_split

from ettin_foundry.data.manifest import expand
from ettin_foundry.data.shards import MDSSplit, parse_shard

LONG_LENGTHS = [1, 2, 254, 255, 256, 257, 299, 300, 650]  # around the step from one to two bytes; 650 is cut
BAD = 1  # the shard that is spoilt
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


@pytest.fixture
def private(plain: Path, tmp_path: Path) -> Path:
    """A copy of `plain`, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "train"))


@pytest.fixture
def packed(tmp_path: Path, texts: list) -> Path:
    """The same split in zstd, not yet expanded."""
    return write_split(tmp_path / "packed" / "train", texts, compress=lambda data: zstd.compress(data, 3))


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
    for shard in range(data.num_shards):
        entry = data.manifest["shards"][shard]
        assert data.check_shard(shard) == entry["raw"]["bytes"] + (entry["zip"]["bytes"] if kind == "packed" else 0)
    assert kind == "plain" or not list(data.local.glob("*.mds"))  # a check leaves nothing behind
    data.check_index()
    expected = [{**chunk, "source": source, "tokens": chunk["tokens"].tolist()} for source, part in texts
                for chunk in cut(part, CHUNK_LENGTH)]
    assert samples_of(data) == expected
    assert data.sources == SOURCES and data.tokens.sum() == sum(len(tokens) for _, part in texts for _, tokens in part)
    for shard, (_, part) in enumerate(texts):
        chunks = cut(part, CHUNK_LENGTH)
        assert data.last(shard).tolist() == [bool(chunk["last"]) for chunk in chunks]
        histogram = np.bincount([len(chunk["tokens"]) for chunk in chunks], minlength=CHUNK_LENGTH + 1)
        assert data.lengths(shard).tolist() == histogram.tolist()
    for shard, index in ((0, -1), (0, int(data.samples[0])), (-1, 0), (data.num_shards, 0)):
        with pytest.raises(IndexError):
            data.chunk(shard, index)


def test_chunks_around_the_step_to_two_bytes_of_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 60_000, length, dtype=np.uint16) for length in LONG_LENGTHS]
    arrays[0][0] = 60_000
    folder = write_split(tmp_path / "train", [("s", [(str(i), array) for i, array in enumerate(arrays)])], chunk_length=300,
                         vocab_size=60_001)
    data = MDSSplit(folder)
    data.check_shard(0)
    assert data.sample_lengths(0).tolist() == [*LONG_LENGTHS[:-1], 300, 300, 50]
    assert np.array_equal(np.concatenate([data.chunk(0, i) for i in range(11)]), np.concatenate(arrays))


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


def test_open_shards_are_bounded_and_chunks_outlive_them(plain: Path) -> None:
    def open_files() -> int:
        return sum(".mds" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before, data = open_files(), MDSSplit(plain, max_open=2)
    expected = samples_of(MDSSplit(plain))
    chunks = [data.chunk(shard, 0) for shard in (*range(data.num_shards), *range(data.num_shards))]
    assert open_files() == before + 2 and all(chunk.flags.owndata and chunk.flags.aligned for chunk in chunks)
    firsts = [next(s for s in expected if s["doc"].startswith(f"d\u00e9{n}-"))["tokens"] for n in range(data.num_shards)]
    assert [chunk.tolist() for chunk in chunks] == 2 * firsts
    data.prefetch([0, 1, 2])  # so many are needed at a time
    assert [data.chunk(shard, 0).tolist() for shard in range(data.num_shards)] == firsts and open_files() == before + 3


def test_the_fingerprint_follows_the_data_and_not_its_place(plain: Path, private: Path, data_set: Path) -> None:
    expected = MDSSplit(plain).fingerprint
    assert MDSSplit(private).fingerprint == expected != MDSSplit(data_set / "train").fingerprint
    edit(private, lambda m: m["tokenizer"].update(name="other"))
    assert MDSSplit(private).fingerprint == expected
    edit(private, lambda m: m["tokenizer"].update(probe_sha256="0"))
    assert MDSSplit(private).fingerprint != expected
    edit(private, lambda m: (m.update(tokenizer=MDSSplit(plain).tokenizer), m["shards"].reverse()))
    assert MDSSplit(private).fingerprint != expected


def test_a_manifest_of_the_first_version_is_still_read(private: Path) -> None:
    expected = samples_of(MDSSplit(private))

    def older(manifest: dict) -> None:
        del manifest["compression"]
        for shard in manifest["shards"]:
            del shard["documents"]

    edit(private, older)
    assert samples_of(MDSSplit(private)) == expected


@pytest.mark.parametrize("limit", ["1gb", "many", 0, True, "-3gb", 1.5])
def test_a_cache_limit_that_is_wrong_or_without_effect_is_refused(plain: Path, limit: object) -> None:
    with pytest.raises(ValueError, match="dataset.cache_limit must be"):
        MDSSplit(plain, cache_limit=limit)


# ------------------------------------------------------------------ compressed shards


def test_a_compressed_shard_is_expanded_once_and_used_by_every_process(packed: Path) -> None:
    first = MDSSplit(packed)
    first.chunk(0, 0)
    raw = shard_file(packed, 0)
    when = raw.stat().st_mtime_ns
    assert raw.stat().st_size == first.manifest["shards"][0]["raw"]["bytes"]
    again = MDSSplit(packed)
    assert np.array_equal(again.chunk(0, 0), first.chunk(0, 0)) and raw.stat().st_mtime_ns == when
    assert not shard_file(packed, 1).exists()  # only what is read
    assert not list((packed / ".cache").glob("*.part"))


@pytest.mark.parametrize("at", [0, 3, 4, 40, -1])
def test_a_flipped_byte_in_an_expanded_shard_is_mended_from_the_compressed_one(packed: Path, at: int,
                                                                              caplog: pytest.LogCaptureFixture) -> None:
    expected = samples_of(MDSSplit(packed))
    flip(shard_file(packed, BAD), at)
    assert samples_of(MDSSplit(packed)) == expected
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
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "spoilt"))
    path = folder / "lengths.npy" if name == "lengths.npy" else shard_file(folder, BAD, ".zstd" if name == "zip" else "")
    good = path.read_bytes()
    rng = np.random.default_rng(3)
    for at in {*range(0, min(len(good), 48), 3), *rng.integers(0, len(good), 60).tolist(), len(good) - 1}:
        flip(path, at)
        with pytest.raises(ValueError, match=rf"{path.name}: xxh64 is .* altered"):
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


def test_any_flipped_byte_under_a_right_hash_is_refused_or_a_token_of_the_vocabulary(plain: Path) -> None:
    """Structure is checked for itself: whoever can write a shard can also write its hash."""
    good = shard_file(plain, BAD).read_bytes()
    sizes = {"num_samples": int(MDSSplit(plain).samples[BAD]), "chunk_length": CHUNK_LENGTH, "vocab_size": VOCAB_SIZE}
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
