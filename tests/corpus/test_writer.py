"""Shards against streaming's own writer and reader: the same bytes, the same borders, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data import COLUMNS
from ettin_foundry.data.packing import pack_lengths, piece_counts

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES: Any = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(ALPHABET)}, merges=[]))
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel()
CHUNKER = Chunker(BYTES.to_str(), 300, 0.1)  # every byte is a token
Documents = list[tuple[str, np.ndarray]]


def documents(lengths: list[int], seed: int = 0) -> Documents:
    rng = np.random.default_rng(seed)
    names = ["a.jsonl:1", "\u6c49\u5b57/\U0001f600", "", "x" * 90]
    return [(f"{names[number % 4]}{number}" if number % 4 != 2 else "", rng.integers(0, 256, length).astype(np.uint16))
            for number, length in enumerate(lengths)]


def various(number: int, seed: int = 0) -> Documents:
    """Lengths from 1 to some chunks, those around 255 and 300 among them: there the heads of arrays change."""
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 254, 255, 256, 257, 299, 300, 301, 330, 900, *np.exp(rng.uniform(0, 7, number)).astype(int)]
    return documents(lengths, seed)


def write(given: Documents, shard_bytes: int = 6_000, *, compression: str | None = None, batch: int = 7,
          place: Any = None) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Entries and files of the shards."""
    files: dict[str, bytes] = {}
    writer = ShardGroupWriter(stem="shard.00012", source="caf\u00e9", chunker=CHUNKER, shard_bytes=shard_bytes,
                              compression=compression, place=place or files.__setitem__)
    for begin in range(0, len(given), batch):
        names, tokens = zip(*given[begin:begin + batch])
        writer.write(names, np.concatenate(tokens), np.array([len(of_document) for of_document in tokens]))
    return writer.finish(), files


def samples(given: Documents) -> list[dict[str, Any]]:
    """What the set must hold, chunk after chunk."""
    found = []
    for name, tokens in given:
        ends = CHUNKER.cuts(tokens)
        found += [{"tokens": tokens[begin:end], "doc": name, "part": part, "last": int(end == len(tokens)),
                   "source": "caf\u00e9"} for part, (begin, end) in enumerate(zip([0, *ends], ends))]
    return found


def stock(folder: Path, expected: list[dict[str, Any]], shard_bytes: int, compression: str | None = None) -> tuple[
        list[dict[str, Any]], list[bytes]]:
    """The entries of streaming's own index of these samples, and its shards."""
    from streaming import MDSWriter

    with mock.patch("streaming.base.format.base.writer.sleep"), \
            MDSWriter(columns=dict(COLUMNS), out=str(folder), hashes=["xxh64"], size_limit=shard_bytes,
                      compression=compression) as writer:  # it sleeps whole seconds until its thread has caught up
        for sample in expected:
            writer.write(sample)
    index = json.loads((folder / "index.json").read_text())["shards"]
    return index, [path.read_bytes() for path in sorted(folder.glob("shard.*"))]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("shard_bytes", [2_000, 6_000, 1 << 26])
def test_bytes_are_those_of_the_stock_writer(tmp_path, shard_bytes, compression):
    given = various(60)
    entries, files = write(given, shard_bytes, compression=compression)
    index, expected = stock(tmp_path, samples(given), shard_bytes, compression)
    assert [*files.values()] == expected and [e["samples"] for e in entries] == [e["samples"] for e in index]
    for number, (entry, theirs) in enumerate(zip(entries, index)):
        for key, suffix in ("raw", ""), ("zip", ".zstd"):
            if (file := theirs[f"{key}_data"]) is not None:
                file = {"basename": f"shard.00012.{number:03}.mds{suffix}", "bytes": file["bytes"], **file["hashes"]}
            assert entry[key] == file


def test_a_shard_ends_where_the_next_chunk_does_not_fit(tmp_path):
    """Limits from less than one chunk to three: streaming's borders, or a refusal where streaming exceeds the limit."""
    given, num_refused = documents([100, 255, 256, 90, 1, 1, 301]), 0
    expected = samples(given)
    sizes = [stock(tmp_path / f"{n}", expected[:n], 3_000)[0][0]["raw_data"]["bytes"] for n in range(1, len(expected))]
    for shard_bytes in {size + more for size in sizes for more in (-2, -1, 0, 1)}:
        index, shards = stock(tmp_path / f"stock{shard_bytes}", expected, shard_bytes)
        if any(entry["raw_data"]["bytes"] > shard_bytes or not entry["samples"] for entry in index):
            num_refused += 1
            with pytest.raises(ValueError, match=f"--shard-size must hold any chunk, got {shard_bytes} bytes"):
                write(given, shard_bytes, batch=2)
        else:
            assert [*write(given, shard_bytes, batch=2)[1].values()] == shards
    assert 3 < num_refused < 20


def test_entries_state_what_the_shards_hold():
    given = [*various(50), *documents([150] * 20)]  # two of 150 do not fit into a row of 302 with their BOS and EOS
    (entries, _), expected = write(given), samples(given)
    for entry in entries:
        held, expected = expected[:entry["samples"]], expected[entry["samples"]:]
        counts = [len(sample["tokens"]) for sample in held]
        assert entry["tokens"] == sum(counts) and entry["documents"] == sum(sample["last"] for sample in held)
        assert entry["lengths"] == [counts.count(length) for length in range(301)]
        assert entry["rows"] == {"302": pack_lengths(piece_counts(np.bincount(counts)), 302).num_rows}
        assert entry["source"] == "caf\u00e9"
        assert json.loads(json.dumps(entry)) == entry
    assert not expected and len(entries) > 2


@pytest.mark.parametrize("given", [various(60), documents([300] * 18)], ids=["by a write", "by finish"])
def test_failure_to_place_is_raised(given):
    def place(name: str, data: bytes) -> None:
        if ".001." in name:
            raise PermissionError(f"{name}: refused")

    with pytest.raises(PermissionError, match="shard.00012.001.mds: refused"):
        write(given, place=place)
