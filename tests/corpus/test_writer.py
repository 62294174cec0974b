"""Shards against streaming's own writer and reader: the same bytes, the same borders, nothing lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from test_packing import place_one_by_one
from tokenizers import Tokenizer, models, pre_tokenizers

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data import COLUMNS

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
Documents = list[tuple[str, np.ndarray]]


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    """Every byte is a token."""
    tokenizer = Tokenizer(models.BPE(vocab={character: number for number, character in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer.to_str()


@pytest.fixture
def make(tmp_path: Path, tokenizer_json: str) -> Callable[..., ShardGroupWriter]:
    """Writers that write into `tmp_path`/out."""
    (tmp_path / "out").mkdir()

    def build(*, shard_bytes: int = 6_000, compression: str | None = None, place: Any = None) -> ShardGroupWriter:
        return ShardGroupWriter(
            stem="shard.00012", source="caf\u00e9", compression=compression, shard_bytes=shard_bytes,
            chunker=Chunker(tokenizer_json, 300),
            place=place or (lambda name, data: (tmp_path / "out" / name).write_bytes(data)))
    return build


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


def write(writer: ShardGroupWriter, given: Documents, batch: int = 7) -> list[dict[str, Any]]:
    for begin in range(0, len(given), batch):
        part = given[begin:begin + batch]
        writer.write([name for name, _ in part], np.concatenate([tokens for _, tokens in part]),
                     np.array([len(tokens) for _, tokens in part]))
    return writer.finish()


def samples(given: Documents, chunker: Chunker) -> list[dict[str, Any]]:
    """What the set must hold, chunk after chunk."""
    found = []
    for name, tokens in given:
        ends = chunker.cuts(tokens)
        found += [{"tokens": tokens[begin:end], "doc": name, "part": part, "last": int(end == len(tokens)),
                   "source": "caf\u00e9"} for part, (begin, end) in enumerate(zip([0, *ends], ends))]
    return found


def stock(folder: Path, expected: list[dict[str, Any]], shard_bytes: int, compression: str | None) -> list[dict]:
    """streaming's own shards of these samples; the entries of its index."""
    from streaming import MDSWriter

    with mock.patch("streaming.base.format.base.writer.sleep"), \
            MDSWriter(columns=dict(COLUMNS), out=str(folder), hashes=["xxh64"], size_limit=shard_bytes,
                      compression=compression) as writer:  # it sleeps whole seconds until its thread has caught up
        for sample in expected:
            writer.write(sample)
    return json.loads((folder / "index.json").read_text())["shards"]


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("shard.*"))]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("shard_bytes", [2_000, 6_000, 1 << 26])
def test_bytes_are_those_of_the_stock_writer(tmp_path, make, tokenizer_json, shard_bytes, compression):
    given = various(60)
    entries = write(make(shard_bytes=shard_bytes, compression=compression), given)
    index = stock(tmp_path / "stock", samples(given, Chunker(tokenizer_json, 300)), shard_bytes, compression)
    assert contents(tmp_path / "out") == contents(tmp_path / "stock")
    assert [entry["samples"] for entry in entries] == [entry["samples"] for entry in index]
    for number, (entry, expected) in enumerate(zip(entries, index)):
        for mine, theirs, suffix in ((entry["raw"], expected["raw_data"], ""),
                                     (entry["zip"], expected["zip_data"], ".zstd")):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert mine == {"basename": f"shard.00012.{number:03}.mds{suffix}", "bytes": theirs["bytes"],
                                "xxh64": theirs["hashes"]["xxh64"]}


def test_a_shard_ends_where_the_next_chunk_does_not_fit(tmp_path, make, tokenizer_json):
    """Limits from less than one chunk to three: streaming's borders, or a refusal where streaming exceeds the limit."""
    given = documents([100, 255, 256, 90, 1, 1, 301])
    expected = samples(given, Chunker(tokenizer_json, 300))
    sizes = [stock(tmp_path / f"{n}", expected[:n], 3_000, None)[0]["raw_data"]["bytes"]
             for n in range(1, len(expected))]
    num_refused = 0
    for shard_bytes in {size + more for size in sizes for more in (-2, -1, 0, 1)}:
        mine, theirs = tmp_path / f"mine{shard_bytes}", tmp_path / f"stock{shard_bytes}"
        mine.mkdir()
        writer = make(shard_bytes=shard_bytes, place=lambda name, data, mine=mine: (mine / name).write_bytes(data))
        index = stock(theirs, expected, shard_bytes, None)
        if any(entry["raw_data"]["bytes"] > shard_bytes or not entry["samples"] for entry in index):
            num_refused += 1
            with pytest.raises(ValueError, match=f"--shard-size must hold any chunk, got {shard_bytes} bytes"):
                write(writer, given, batch=2)
            writer.abort()
        else:
            write(writer, given, batch=2)
            assert contents(mine) == contents(theirs)
    assert 3 < num_refused < 20


def test_entries_state_what_the_shards_hold(make, tokenizer_json):
    given = [*various(50), *documents([150] * 20)]  # two of 150 do not fit into a row of 302 with their BOS and EOS
    entries = write(make(), given)
    expected = samples(given, Chunker(tokenizer_json, 300))
    for entry in entries:
        held, expected = expected[:entry["samples"]], expected[entry["samples"]:]
        counts = [len(sample["tokens"]) for sample in held]
        assert entry["tokens"] == sum(counts) and entry["documents"] == sum(sample["last"] for sample in held)
        assert entry["lengths"] == [counts.count(length) for length in range(301)]
        assert entry["rows"] == {"302": len(place_one_by_one([count + 2 for count in counts], 302))}
        assert entry["source"] == "caf\u00e9"
        assert json.loads(json.dumps(entry)) == entry
    assert not expected and len(entries) > 2


def test_failure_to_place_stops_the_next_write(make):
    def place(name: str, data: bytes) -> None:
        if ".001." in name:
            raise PermissionError(f"{name}: refused")

    for given in (various(60), documents([300] * 18)):  # raised by a write, or by finish where none follows
        writer = make(place=place, shard_bytes=6_000)
        with pytest.raises(PermissionError, match="shard.00012.001.mds: refused"):
            write(writer, given)
        writer.abort()
