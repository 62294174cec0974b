"""Reading a split: the same as the stock reader on good files, and every damaged byte noticed. See test_hostile.py."""

import pickle
import random
import shutil
from pathlib import Path

import numpy as np
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
def texts():
    rng = np.random.default_rng(7)
    return [(source, random_documents(rng, 12 + at, prefix=f"d\u00e9{at}-")) for at, source in enumerate(SOURCES)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, texts):
    """Five shards of two sources, for reading only."""
    return write_split(tmp_path_factory.mktemp("plain") / "train", texts)


@pytest.fixture
def private(plain, tmp_path):
    """A copy of `plain`, to be spoilt."""
    return Path(shutil.copytree(plain, tmp_path / "train"))


@pytest.fixture
def packed(tmp_path, texts):
    """The same split in zstd, not yet expanded."""
    return write_split(tmp_path / "packed" / "train", texts, packed=True)


def test_stock_streaming_dataset_reads_the_same_samples(data_set, tmp_path, monkeypatch):
    from streaming import StreamingDataset

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # it leaves lock files in the temporary folder
    for split in ("train", "validation"):
        mine = MDSSplit(data_set / split)
        stock = StreamingDataset(local=str(data_set / split), shuffle=False, batch_size=1)
        places = [(s, i) for s in range(mine.num_shards) for i in range(int(mine.samples[s]))]
        assert len(stock) == len(places) == mine.manifest["totals"]["samples"]
        for number, (shard, index) in enumerate(places):
            expected, found = stock[number], mine.sample(shard, index)
            tokens = expected.pop("tokens").tolist()
            assert found.pop("tokens").tolist() == tokens and found == expected
            assert (mine.sample_lengths(shard)[index], mine.last(shard)[index]) == (len(tokens), expected["last"])
        del stock  # its shared memory goes with it, or when this process ends


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_written_chunks_come_back(kind, texts, request):
    data = MDSSplit(request.getfixturevalue(kind))
    for shard in range(data.num_shards):
        entry = data.manifest["shards"][shard]
        assert data.check_shard(shard) == entry["raw"]["bytes"] + (entry["zip"]["bytes"] if kind == "packed" else 0)
    assert kind == "plain" or not list(data.local.glob("*.mds"))  # a check leaves nothing behind
    data.check_index()
    chunks = [(source, chunk) for source, part in texts for chunk in cut(part, CHUNK_LENGTH)]
    expected = [{**chunk, "source": source, "tokens": chunk["tokens"].tolist()} for source, chunk in chunks]
    assert samples_of(data) == samples_of(pickle.loads(pickle.dumps(data))) == expected and data.sources == SOURCES
    for shard, (_, part) in enumerate(texts):
        lengths = [len(chunk["tokens"]) for chunk in cut(part, CHUNK_LENGTH)]
        assert data.lengths(shard).tolist() == np.bincount(lengths, minlength=CHUNK_LENGTH + 1).tolist()
        assert (data.samples[shard], data.tokens[shard]) == (len(lengths), sum(lengths))
    for shard, index in ((0, -1), (0, int(data.samples[0])), (-1, 0), (data.num_shards, 0)):
        with pytest.raises(IndexError):
            data.chunk(shard, index)


def test_chunks_around_the_step_to_two_bytes_of_length(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 60_000, length, dtype=np.uint16) for length in LONG_LENGTHS]
    arrays[0][0] = 60_000
    documents = [(str(i), array) for i, array in enumerate(arrays)]
    data = MDSSplit(write_split(tmp_path / "train", [("s", documents)], chunk_length=300, vocab_size=60_001))
    data.check_shard(0)
    assert data.sample_lengths(0).tolist() == [*LONG_LENGTHS[:-1], 300, 300, 50]
    assert np.array_equal(np.concatenate([data.chunk(0, i) for i in range(11)]), np.concatenate(arrays))


def test_open_shards_are_bounded_and_chunks_outlive_them(plain):
    def open_files():
        return sum(".mds" in line for line in Path("/proc/self/maps").read_text().splitlines())

    before, data, many = open_files(), MDSSplit(plain, max_open=2), MDSSplit(plain)
    chunks = [data.chunk(shard, 0) for shard in (*range(5), *range(5))]
    assert open_files() == before + 2 and all(chunk.flags.owndata and chunk.flags.aligned for chunk in chunks)
    data.prefetch([0, 1, 2])  # so many are needed at a time
    assert all(data.chunk(shard, 0).size for shard in range(5)) and open_files() == before + 3
    assert [chunk.tolist() for chunk in chunks] == 2 * [many.chunk(shard, 0).tolist() for shard in range(5)]


def test_the_fingerprint_follows_the_data_and_not_its_place(plain, private, data_set):
    expected = MDSSplit(plain).fingerprint
    assert MDSSplit(private).fingerprint == expected != MDSSplit(data_set / "train").fingerprint
    edit(private, lambda m: m["tokenizer"].update(name="other"))
    assert MDSSplit(private).fingerprint == expected
    edit(private, lambda m: m["tokenizer"].update(probe_sha256="0"))
    assert MDSSplit(private).fingerprint != expected
    edit(private, lambda m: (m.update(tokenizer=MDSSplit(plain).tokenizer), m["shards"].reverse()))
    assert MDSSplit(private).fingerprint != expected


def test_a_compressed_shard_is_expanded_once_and_made_again_when_it_is_damaged(packed, caplog):
    first, raw = MDSSplit(packed), shard_file(packed, BAD)
    expected, when = first.chunk(BAD, 0).tolist(), raw.stat().st_mtime_ns
    assert MDSSplit(packed).chunk(BAD, 0).tolist() == expected and raw.stat().st_mtime_ns == when
    assert [path.name for path in packed.glob("*.mds")] == [raw.name]  # only what is read
    flip(raw, 40)
    assert MDSSplit(packed).chunk(BAD, 0).tolist() == expected and f"{raw.name}: xxh64 is" in caplog.text


def test_expanding_stops_at_the_declared_size():
    blocks = []
    with pytest.raises(ValueError, match="x.zstd: expands beyond 3000000 bytes"):
        blocks.extend(map(len, expand(zstd.compress(bytes(1 << 26), 3), "x.zstd", 3_000_000)))
    assert sum(blocks) <= 3_000_000 and all(block <= 1 << 20 for block in blocks)


def test_any_wrong_bytes_under_a_right_hash_are_refused_or_tokens_of_the_vocabulary(plain):
    """Structure is checked for itself: whoever can write a shard can also write its hash."""
    good = shard_file(plain, BAD).read_bytes()
    sizes = {"num_samples": int(MDSSplit(plain).samples[BAD]), "chunk_length": CHUNK_LENGTH, "vocab_size": VOCAB_SIZE}
    expected = parse_shard(good, "x", **sizes)
    rng, refused = random.Random(5), 0
    for _ in range(1200):  # most of them in what describes the samples
        at, spoilt = rng.randrange(rng.choice((len(good), 600))), bytearray(good)
        flipped = bytes([good[at] ^ 1 << rng.randrange(8)])
        wrong = rng.choice((flipped, bytes(4), b"\xff" * 4, b"\xff" * 8, rng.randbytes(4)))
        spoilt[at:at + len(wrong)] = wrong[:len(good) - at]
        try:
            found = parse_shard(bytes(spoilt), "x", **sizes)
        except ValueError:
            refused += 1
            continue
        assert np.array_equal(found.starts, expected.starts) and np.array_equal(found.lengths, expected.lengths)
        for begin, length in zip(found.token_starts.tolist(), found.lengths.tolist()):
            assert np.frombuffer(found.buffer, "<u2", length, begin).max() < VOCAB_SIZE
    assert refused > 100
