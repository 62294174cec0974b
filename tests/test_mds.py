"""Reading a split: the same as the stock reader on good files, and a clear refusal of every lie.

Hostile files are made from good ones; `seal` puts sizes and hashes right again, so that what is tested is the check
behind them and not the hash.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from conftest import CHUNK_LENGTH
from streaming import MDSWriter, StreamingDataset

from ettin_foundry.manifest import COLUMNS
from ettin_foundry.mds import MDSSet
from ettin_foundry.split_writer import SourceCounts, SplitWriter

LONG_LENGTHS = [1, 2, 254, 255, 256, 257, 299, 300, 650]  # around the step from one to two bytes; 650 is cut
SHARD = "shard.00000.mds"
TOKENIZER = {"name": "none", "vocab_size": 60_001}


@pytest.fixture(scope="module")
def long_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A split of known arrays with chunks of up to 300 tokens, and the arrays."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 60_000, length, dtype=np.uint16) for length in LONG_LENGTHS]
    arrays[0][0] = 60_000
    writer = SplitWriter(tmp_path_factory.mktemp("long") / "train", "train", chunk_length=300, shard_size="3kb")
    writer.begin_source("s", SourceCounts())
    for index, array in enumerate(arrays):
        writer.write(f"d\u00e9{index}", array, num_bytes=1)
    writer.finish()
    writer.write_manifest(TOKENIZER, {})
    return writer.folder, arrays


@pytest.fixture
def hostile(data_set: Path, tmp_path: Path) -> Path:
    """A private copy of a good split, to be spoilt."""
    return Path(shutil.copytree(data_set / "train", tmp_path / "train"))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def seal(folder: Path) -> None:
    """Makes the manifest's sizes and hashes those of the files."""
    def entry(item: dict) -> None:
        data = (folder / item["basename"]).read_bytes()
        item.update(bytes=len(data), xxh64=xxhash.xxh64(data).hexdigest())

    def change(manifest: dict) -> None:
        entry(manifest["lengths"])
        for shard in manifest["shards"]:
            entry(shard["raw"])

    edit(folder, change)


def rewrite(folder: Path, change: Callable[[bytearray], object]) -> None:
    """Changes the first shard's bytes and seals the set again."""
    data = bytearray((folder / SHARD).read_bytes())
    change(data)
    (folder / SHARD).write_bytes(data)
    seal(folder)


def put(data: bytearray, at: int, value: int, dtype: str = "<u4") -> None:
    raw = np.array([value], dtype).tobytes()
    data[at:at + len(raw)] = raw


def sample_at(data: bytearray, index: int) -> int:
    return int(np.frombuffer(data, "<u4", 1, 4 + 4 * index)[0])


def test_stock_streaming_dataset_reads_the_same_samples(data_set: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # it leaves lock files in the temporary folder
    for split in ("train", "validation"):
        mine = MDSSet(data_set / split)
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


def test_written_arrays_come_back_cut_at_the_chunk_length(long_set: tuple[Path, list[np.ndarray]]) -> None:
    folder, arrays = long_set
    data = MDSSet(folder)
    data.verify()
    assert data.num_shards > 1 and data.tokens.sum() == sum(LONG_LENGTHS)
    documents: dict[str, list[np.ndarray]] = {}
    for shard in range(data.num_shards):
        for index in range(int(data.samples[shard])):
            sample = data.sample(shard, index)
            parts = documents.setdefault(sample["doc"], [])
            assert sample["part"] == len(parts) and sample["source"] == "s"
            parts.append(sample["tokens"])
            assert sample["last"] == (sum(map(len, parts)) == len(arrays[int(sample["doc"][2:])]))
    assert [np.concatenate(parts).tolist() for parts in documents.values()] == [array.tolist() for array in arrays]
    assert [len(part) for part in documents["d\u00e98"]] == [300, 300, 50]


def test_histogram_counts_chunks_of_each_length(data_set: Path) -> None:
    data = MDSSet(data_set / "train")
    assert data.chunk_length == CHUNK_LENGTH and data.num_shards > 3
    for shard in range(data.num_shards):
        expected = [0] * (CHUNK_LENGTH + 1)
        for index in range(int(data.samples[shard])):
            expected[len(data.chunk(shard, index))] += 1
        assert data.lengths(shard).tolist() == expected and data.lengths(shard).dtype == np.uint32


def test_rows_are_those_of_naive_best_fit(data_set: Path) -> None:
    data = MDSSet(data_set / "train")
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


def test_copies_read_alike_in_other_processes(data_set: Path) -> None:
    data = MDSSet(data_set / "train")
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


def test_open_shards_are_bounded(data_set: Path) -> None:
    data = MDSSet(data_set / "train", max_open=2)
    expected = [MDSSet(data_set / "train").chunk(shard, 0).tolist() for shard in range(data.num_shards)]
    for _ in range(2):
        assert [data.chunk(shard, 0).tolist() for shard in range(data.num_shards)] == expected
        assert len(data._open) == 2


def test_a_chunk_outlives_its_shard(data_set: Path) -> None:
    data = MDSSet(data_set / "train", max_open=1)
    chunk = data.chunk(0, 0)
    before = chunk.tolist()
    data.chunk(1, 0)
    assert chunk.tolist() == before and chunk.flags.owndata and chunk.flags.aligned


def test_fingerprint_follows_the_data_and_not_its_place(data_set: Path, hostile: Path) -> None:
    expected = MDSSet(data_set / "train").fingerprint
    assert MDSSet(hostile).fingerprint == expected != MDSSet(data_set / "validation").fingerprint
    edit(hostile, lambda m: m["tokenizer"].update(name="other"))
    assert MDSSet(hostile).fingerprint == expected
    edit(hostile, lambda m: m["tokenizer"].update(probe_sha256="0"))
    assert MDSSet(hostile).fingerprint != expected
    edit(hostile, lambda m: (m["tokenizer"].update(MDSSet(data_set / "train").tokenizer), m["shards"].reverse()))
    assert MDSSet(hostile).fingerprint != expected


def test_places_outside_the_set_are_index_errors(data_set: Path) -> None:
    data = MDSSet(data_set / "train")
    for shard, index in ((0, -1), (0, int(data.samples[0])), (-1, 0), (data.num_shards, 0)):
        with pytest.raises(IndexError):
            data.chunk(shard, index)


def test_sets_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="manifest.json: missing.*data_prep/convert.py"):
        MDSSet(tmp_path / "nothing")
    for text, message in (("{", "is not JSON"), ("[]", "format and version"), ('{"format": 1}', "format and version")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            MDSSet(tmp_path)


@pytest.mark.parametrize("name", ["../outside.mds", "/etc/hostname", "a/b.mds", "..", ".hidden", "shard\x00.mds", "",
                                  "shard.00001.mds"])
def test_names_that_leave_the_folder_are_refused(hostile: Path, name: str) -> None:
    edit(hostile, lambda m: m["shards"][0]["raw"].update(basename=name))
    with pytest.raises(ValueError, match="plain file names|named twice"):
        MDSSet(hostile)
    edit(hostile, lambda m: (m["shards"][0]["raw"].update(basename=SHARD), m["lengths"].update(basename=name)))
    with pytest.raises(ValueError, match="plain file names|named twice"):
        MDSSet(hostile)


@pytest.mark.parametrize("name", [SHARD, "lengths.npy"])
def test_links_are_not_followed(hostile: Path, name: str, tmp_path: Path) -> None:
    (hostile / name).rename(tmp_path / "outside")
    (hostile / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name}: cannot be opened as a plain file.*links"):
        MDSSet(hostile).chunk(0, 0)


def test_missing_shard_is_named(hostile: Path) -> None:
    (hostile / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD}: missing"):
        MDSSet(hostile).chunk(0, 0)


@pytest.mark.parametrize("change,message", [
    (lambda m: m["columns"].update(extra="pkl"), "columns are .*pkl"),
    (lambda m: m["columns"].update(tokens="pkl"), "columns are .*pkl"),
    (lambda m: m["columns"].update(doc="jpeg"), "columns are .*jpeg"),
    (lambda m: m.update(version=2), r"\['ettin-mds', 2\].*\['ettin-mds', 1\] is read"),
    (lambda m: m.update(chunk_length=0), "chunk_length is 0"),
    (lambda m: m.update(chunk_length="62"), "chunk_length is '62'"),
    (lambda m: m["totals"].update(tokens=1), "totals.tokens is 1; its shards sum to"),
    (lambda m: m["totals"].pop("samples"), "samples is None"),
    (lambda m: m["shards"][1].update(samples=0), r"shards\[1\].*samples is 0"),
    (lambda m: m["shards"][1].update(samples=-5), r"shards\[1\].*samples is -5"),
    (lambda m: m["shards"][1].update(tokens=True), r"shards\[1\].*tokens is True"),
    (lambda m: m["shards"][1].update(zip={"basename": "a.zstd"}), "no compressed shards"),
    (lambda m: m["shards"][1]["raw"].update(xxh64="abc"), "16 hexadecimal digits"),
    (lambda m: m["shards"][1].pop("source"), "source is None"),
    (lambda m: m["shards"][1]["rows"].update({"64": -1}), "count is -1"),
    (lambda m: m.update(shards=[]), "lists no shards|sum to 0"),
    (lambda m: m.update(shards=[3]), r"shards\[0\]: raw is None"),
    (lambda m: m["tokenizer"].pop("vocab_size"), "vocab_size is None"),
])
def test_manifest_lies_are_refused_when_the_set_is_opened(hostile: Path, change: Callable[[dict], object],
                                                          message: str) -> None:
    edit(hostile, change)
    with pytest.raises(ValueError, match=f"manifest.json.*{message}"):
        MDSSet(hostile)


def test_truncated_shard_is_refused(hostile: Path) -> None:
    data = (hostile / SHARD).read_bytes()
    (hostile / SHARD).write_bytes(data[:-7])
    with pytest.raises(ValueError, match=rf"{SHARD}: has {len(data) - 7} bytes; the manifest states {len(data)}"):
        MDSSet(hostile, verify_hashes=False).chunk(0, 0)


@pytest.mark.parametrize("name", [SHARD, "lengths.npy"])
def test_flipped_byte_is_refused(hostile: Path, name: str) -> None:
    data = bytearray((hostile / name).read_bytes())
    data[-1] ^= 1
    (hostile / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: xxh64 is [0-9a-f]+; the manifest states .* altered"):
        MDSSet(hostile).chunk(0, 0)


@pytest.mark.parametrize("spoil,message", [
    (lambda d: put(d, 0, 3), "its header states 3 samples"),
    (lambda d: put(d, 0, 2**32 - 1), "its header states 4294967295 samples"),
    (lambda d: put(d, 4 + 4 * 2, sample_at(d, 1)), "offsets overlap"),
    (lambda d: put(d, 4 + 4 * 2, sample_at(d, 5)), "offsets overlap|do not add up"),
    (lambda d: put(d, 4, 0), "offsets overlap"),
    (lambda d: put(d, 4, 8), "offsets overlap"),
    (lambda d: put(d, 4 + 4 * 3, 2**32 - 1), "offsets overlap"),
    (lambda d: d.extend(b"xx"), "leave the file"),
    (lambda d: put(d, sample_at(d, 0), 2**32 - 1), "do not add up"),
    (lambda d: put(d, sample_at(d, 0) + 8, 2**31), "do not add up"),
    (lambda d: put(d, sample_at(d, 1) - 2, 60_000, "<u2"), "token 60000 in chunk 0; the tokenizer has 512 entries"),
    (lambda d: d.__setitem__(slice(0, 8), b"\xff" * 8), "its header states"),
    (lambda d: d.__setitem__(slice(len(d) // 2, len(d)), b""), "offsets overlap|need more|leave the file"),
    (lambda d: d.__setitem__(slice(3, len(d)), b""), "need more"),
    (lambda d: put(d, 4 + 4 * int.from_bytes(d[:4], "little") + 4 + 30, 0), "its header describes other columns"),
])
def test_shard_lies_are_refused_even_under_a_right_hash(hostile: Path, spoil: Callable[[bytearray], object],
                                                        message: str) -> None:
    rewrite(hostile, spoil)
    with pytest.raises(ValueError, match=f"{SHARD}: .*({message})"):
        MDSSet(hostile).chunk(0, 0)


def test_wrong_sample_layouts_are_refused_even_under_a_right_hash(hostile: Path) -> None:
    good = bytearray((hostile / SHARD).read_bytes())
    start = sample_at(good, 0)
    num_doc, num_source, num_tokens = np.frombuffer(good, "<u4", 3, start).tolist()
    array = start + 12 + num_doc + 16 + num_source
    assert good[array] == 4 and 2 + 2 * good[array + 1] == num_tokens  # one axis, length in one byte

    def with_bytes(at: int, value: bytes) -> bytearray:
        return bytearray(good[:at] + value + good[at + len(value):])

    moved = with_bytes(start, np.array([num_doc + num_tokens, num_source, 0], "<u4").tobytes())
    for data, message in [(with_bytes(array, b"\x08"), "one row of uint16"), (with_bytes(array, b"\x05"), "one row of"),
                          (with_bytes(array, b"\x07"), "one row of uint16"), (moved, "a sample has no tokens"),
                          (with_bytes(array + 1, bytes([good[array + 1] - 1])), "one row of uint16"),
                          (with_bytes(start + 12 + num_doc, b"\x02"), "`last` of a sample is neither"),
                          (with_bytes(start + 12 + num_doc + 7, b"\x80"), "`last` of a sample is neither")]:
        (hostile / SHARD).write_bytes(data)
        seal(hostile)
        with pytest.raises(ValueError, match=f"{SHARD}: .*{message}"):
            MDSSet(hostile).chunk(0, 0)
    (hostile / SHARD).write_bytes(with_bytes(start + 12, b"\xff"))
    seal(hostile)
    with pytest.raises(ValueError, match="doc or source of chunk 0 is not UTF-8"):
        MDSSet(hostile).sample(0, 0)


@pytest.mark.parametrize("column", ["extra", "tokens", "doc"])
def test_pickle_in_a_shard_is_refused_and_not_executed(hostile: Path, column: str, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "executed"),))

    sample = {"tokens": np.ones(3, np.uint16), "doc": "d", "part": 0, "last": 1, "source": "s", column: Payload()}
    writer = MDSWriter(columns={**COLUMNS, column: "pkl"}, out=str(tmp_path / "evil"))
    writer.write(sample)
    writer.finish()
    shutil.copy(tmp_path / "evil" / SHARD, hostile / SHARD)
    seal(hostile)
    edit(hostile, lambda m: (m["shards"][0].update(samples=1, tokens=3), m["totals"].update(
        samples=sum(s["samples"] for s in m["shards"]), tokens=sum(s["tokens"] for s in m["shards"]))))
    with pytest.raises(ValueError, match="its header describes other columns.*pkl.*Do not use"):
        MDSSet(hostile).sample(0, 0)
    assert not (tmp_path / "executed").exists()


def spoil_lengths(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(folder / "lengths.npy", change(np.load(folder / "lengths.npy")))
    seal(folder)


def swap_lengths(lengths: np.ndarray) -> np.ndarray:
    """Other lengths, with the same number of chunks and tokens: a - 1 and b + 1 instead of a and b."""
    a, b = (int(at) for at in np.flatnonzero(lengths[0])[[3, -3]])
    lengths[0, [a, b]] -= 1
    lengths[0, [a - 1, b + 1]] += 1
    return lengths


@pytest.mark.parametrize("change,message", [
    (swap_lengths, f"{SHARD}: its chunk lengths differ from the manifest's histogram"),
    (lambda a: a[::-1], "lengths.npy: row 0 counts .*; the manifest states"),
    (lambda a: a + np.eye(*a.shape, dtype=a.dtype), "lengths.npy: row 0 counts"),
    (lambda a: a.astype(np.int64), "lengths.npy: holds int64"),
    (lambda a: a[:-1], r"lengths.npy: holds uint32 \("),
    (lambda a: np.asfortranarray(a), "lengths.npy: holds"),
    (lambda a: np.array([object()]), "lengths.npy: holds object"),
])
def test_histogram_lies_are_refused(hostile: Path, change: Callable[[np.ndarray], np.ndarray], message: str) -> None:
    spoil_lengths(hostile, change)
    with pytest.raises(ValueError, match=message):
        MDSSet(hostile).chunk(0, 0)


def test_lengths_file_that_is_no_array_is_refused(hostile: Path) -> None:
    for data in (b"", b"junk" * 20, (hostile / "lengths.npy").read_bytes()[:-4]):
        (hostile / "lengths.npy").write_bytes(data)
        seal(hostile)
        with pytest.raises(ValueError, match="lengths.npy: "):
            MDSSet(hostile).lengths(0)


def test_verify_holds_the_stock_index_to_the_manifest(hostile: Path) -> None:
    MDSSet(hostile).verify()
    index = json.loads((hostile / "index.json").read_text())
    for change in (lambda i: i["shards"][1]["raw_data"].update(basename="../x"), lambda i: i["shards"].pop(),
                   lambda i: i["shards"][0].update(column_encodings=["pkl"] * 5), lambda i: i.pop("shards")):
        changed = json.loads(json.dumps(index))
        change(changed)
        (hostile / "index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="index.json: "):
            MDSSet(hostile).verify()


@pytest.mark.parametrize("change,message", [
    (lambda m: m["shards"][1]["rows"].update({"64": 1}), r"shards\[1\] states 1 rows of 64; its chunks fill \d+"),
    (lambda m: m["totals"].update(documents=5), "totals.documents is 5; 173 documents end"),
])
def test_verify_counts_rows_and_documents(hostile: Path, change: Callable[[dict], object], message: str) -> None:
    edit(hostile, change)
    with pytest.raises(ValueError, match=message):
        MDSSet(hostile).verify()
