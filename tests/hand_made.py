"""Splits written by hand, byte by byte, from the description of the format: independent of the package's writer."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstd

from ettin_foundry.data import COLUMNS
from ettin_foundry.data.packing import pack_lengths, piece_counts
from ettin_foundry.data.shards import index_entry

VOCAB_SIZE = 512
CHUNK_LENGTH = 62
CONFIG: dict[str, Any] = {
    "version": 2, "format": "mds", "compression": None, "hashes": ["xxh64"], "size_limit": 1 << 26,
    "column_names": ["doc", "last", "part", "source", "tokens"],
    "column_encodings": ["str", "int", "int", "str", "ndarray:uint16"],
    "column_sizes": [None, 8, 8, None, None]}

Document = tuple[str, np.ndarray]


def random_documents(rng: np.random.Generator, number: int, prefix: str = "d\u00e9") -> list[Document]:
    """Ids and token arrays of 1 to 200 tokens, lengths spread over the orders of magnitude."""
    lengths = np.exp(rng.uniform(0, np.log(200), number)).astype(int)
    return [(f"{prefix}{i}", rng.integers(0, VOCAB_SIZE, length, dtype=np.uint16)) for i, length in enumerate(lengths)]


def cut(documents: Sequence[Document], chunk_length: int) -> list[dict[str, Any]]:
    """Chunks of documents as dictionaries of all columns but the source."""
    return [{"doc": name, "part": at // chunk_length, "last": int(at + chunk_length >= len(tokens)),
             "tokens": tokens[at:at + chunk_length]}
            for name, tokens in documents for at in range(0, len(tokens), chunk_length)]


def sample_bytes(chunk: dict[str, Any], source: str) -> bytes:
    tokens, wide = chunk["tokens"], len(chunk["tokens"]) > 255
    array = bytes([1 << 2 | wide]) + len(tokens).to_bytes(1 + wide, "little") + tokens.astype("<u2").tobytes()
    doc, name = chunk["doc"].encode(), source.encode()
    numbers = struct.pack("<qq", chunk["last"], chunk["part"])
    return struct.pack("<III", len(doc), len(name), len(array)) + doc + numbers + name + array


def shard_bytes(samples: Sequence[bytes], config: dict[str, Any]) -> bytes:
    header = json.dumps(config, sort_keys=True).encode()
    begin = 4 + 4 * (len(samples) + 1) + len(header)
    offsets = begin + np.cumsum([0, *map(len, samples)])
    return struct.pack("<I", len(samples)) + offsets.astype("<u4").tobytes() + header + b"".join(samples)


def file_entry(name: str, data: bytes) -> dict[str, Any]:
    return {"basename": name, "bytes": len(data), "xxh64": xxhash.xxh64(data).hexdigest()}


def array_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def write_split(folder: Path, shards: Sequence[tuple[str, Sequence[Document]]], *, chunk_length: int = CHUNK_LENGTH,
                vocab_size: int = VOCAB_SIZE, packed: bool = False) -> Path:
    """Writes a split of (source, documents) per shard."""
    compression = "zstd" if packed else None
    folder.mkdir(parents=True)
    entries, histograms = [], []
    for number, (source, documents) in enumerate(shards):
        chunks = cut(documents, chunk_length)
        name = f"shard.{number:05}.000.mds"
        data = shard_bytes([sample_bytes(chunk, source) for chunk in chunks],
                           {**CONFIG, "compression": compression})
        histogram = np.bincount([len(chunk["tokens"]) for chunk in chunks], minlength=chunk_length + 1)
        stored = zstd.compress(data, 3) if packed else None
        (folder / (name + ".zstd" if packed else name)).write_bytes(stored or data)
        entries.append({
            "raw": file_entry(name, data), "zip": stored and file_entry(name + ".zstd", stored),
            "samples": len(chunks), "tokens": sum(len(chunk["tokens"]) for chunk in chunks),
            "documents": len(documents), "source": source,
            "rows": {str(chunk_length + 2): pack_lengths(piece_counts(histogram), chunk_length + 2).num_rows}})
        histograms.append(histogram)
    lengths = array_file(np.array(histograms, "<u4"))
    (folder / "lengths.npy").write_bytes(lengths)
    totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "samples", "tokens")}
    manifest = {"format": "ettin-mds", "version": 1, "split": folder.name, "chunk_length": chunk_length,
                "compression": compression, "tokenizer": {"name": "none", "vocab_size": vocab_size},
                "columns": COLUMNS, "options": {}, "code_version": "0", "lengths": file_entry("lengths.npy", lengths),
                "sources": {}, "shards": entries, "totals": totals}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "index.json").write_text(json.dumps(
        {"version": 2, "shards": [{**CONFIG, "compression": compression, **index_entry(entry)} for entry in entries]}))
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "manifest.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def set_in(*path: Any, value: Any) -> Callable[[Any], None]:
    """A change for `edit`: the value at a path of keys and indices."""
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value
    return change


WRONG = (None, True, -1, 0, 1, 2**31, 2**62, 1.5, "", "../outside/secret.mds", "/etc/passwd", "pkl", [], {}, ["x"])


def spoil(path: Path, *, values: int = 6) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Puts some wrong values, one after the other, in each place of a JSON file; says which, and restores it."""
    def places(content: Any) -> Iterator[tuple[Any, ...]]:
        content = dict(enumerate(content)) if isinstance(content, list) else content
        for step, value in content.items() if isinstance(content, dict) else ():
            yield from ((step,), *((step, *rest) for rest in places(value)))

    text, draw = path.read_text(), random.Random(1)
    for place in places(json.loads(text)):
        for value in draw.sample(WRONG, values):
            path.write_text(text)
            edit(path.parent, set_in(*place, value=value), path.name)
            if json.loads(path.read_text()) != json.loads(text):
                yield place, value
    path.write_text(text)


def seal(folder: Path) -> None:
    """Makes the manifest's sizes and hashes those of the files, so that what is tested is the check behind them."""
    def change(manifest: dict[str, Any]) -> None:
        for item in [manifest["lengths"], *(shard[kind] for shard in manifest["shards"] for kind in ("raw", "zip"))]:
            if item and (folder / item["basename"]).exists():
                item.update(file_entry(item["basename"], (folder / item["basename"]).read_bytes()))

    edit(folder, change)


def shard_file(folder: Path, shard: int, end: str = "") -> Path:
    return folder / (json.loads((folder / "manifest.json").read_text())["shards"][shard]["raw"]["basename"] + end)


def flip(path: Path, at: int, bit: int = 4) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def samples_of(data: Any) -> list[dict[str, Any]]:
    """Every chunk with all its columns, of shards that are opened for training."""
    return [{**data.sample(shard, index), "tokens": data.chunk(shard, index).tolist()}
            for shard in range(data.num_shards) if data.chunk(shard, 0).size
            for index in range(int(data.samples[shard]))]
