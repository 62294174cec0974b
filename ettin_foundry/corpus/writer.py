"""Writes documents, given as tokens, as chunks in MDS shards, each with an entry for the manifest.

Shards are what `streaming.MDSWriter` writes for the same chunks, size limit and compression, byte for byte, in 2 to 4
us of CPU a chunk instead of 16 to 22. data/shards.py describes the layout.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts
from ettin_foundry.data.shards import CONFIG

_ZSTD_LEVEL = 3  # streaming's default for "zstd"
_SIZES = struct.Struct("<III")  # bytes of doc, source and tokens, in front of each sample
_NUMBERS = struct.Struct("<qq")  # last and part
_OFFSET_BYTES = 4


def shard_config(shard_bytes: int, compression: str | None) -> dict[str, Any]:
    """What streaming 0.12 states of a shard, in its header and index.json (format/mds/writer.py `get_config`)."""
    return {**CONFIG, "compression": compression, "hashes": ["xxh64"], "size_limit": shard_bytes}


class ShardGroupWriter:
    """Writes documents of one source, in the order given, into shards STEM.000.mds, STEM.001.mds, ...

    Args:
        shard_bytes: most bytes of an uncompressed shard. compression: "zstd" writes STEM.000.mds.zstd instead, or None.
        place: called with name and content of each file, to write or upload it.
    """

    def __init__(self, *, stem: str, source: str, chunker: Chunker, shard_bytes: int, compression: str | None,
                 place: Callable[[str, bytes], None]) -> None:
        self._stem, self._source, self._place = stem, source.encode(), place
        self._chunker, self._limit, self._compression = chunker, shard_bytes, compression
        self._config = json.dumps(shard_config(shard_bytes, compression), sort_keys=True).encode()
        self._empty = 2 * _OFFSET_BYTES + len(self._config)  # bytes of a shard's count, first offset and config
        self._entries: list[dict[str, Any]] = []
        self._begin_shard()

    def write(self, ids: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Writes D documents; raises ValueError for a chunk larger than a shard, and whatever `place` raises.

        Args:
            ids: D strings. tokens: (N,) uint16, the documents' tokens one after the other.
            lengths: (D,) int64, tokens of each document, at least 1; their sum is N.
        """
        data, first = memoryview(np.ascontiguousarray(tokens, "<u2")).cast("B"), 0  # type: ignore[arg-type]
        for doc, length in zip(map(str.encode, ids), lengths.tolist()):
            begin = 0
            for part, end in enumerate(self._chunker.cuts(tokens[first:first + length])):
                self._add(doc, part, end == length, data[2 * (first + begin):2 * (first + end)])
                begin = end
            first += length

    def finish(self) -> list[dict[str, Any]]:
        """Ends the last shard; one entry per shard as manifest.json has it, plus `lengths`: number of its chunks of
        0, 1, ... tokens."""
        if self._samples:
            self._end_shard()
        return self._entries

    def _begin_shard(self) -> None:
        self._samples, self._lengths = list[bytes](), list[int]()  # the shard's, and the tokens of each
        self._num_bytes, self._num_documents = self._empty, 0

    def _add(self, doc: bytes, part: int, last: bool, tokens: memoryview) -> None:
        """Puts a chunk into the shard, or into the next one where it does not fit."""
        count = len(tokens) // 2
        head = bytes([4, count]) if count < 256 else struct.pack("<BH", 5, count)  # of a uint16 array of one axis
        sizes = _SIZES.pack(len(doc), len(self._source), len(head) + len(tokens))
        sample = b"".join((sizes, doc, _NUMBERS.pack(last, part), self._source, head, tokens))
        num_bytes = len(sample) + _OFFSET_BYTES
        if self._empty + num_bytes > self._limit:
            raise ValueError(f"--shard-size must hold any chunk, got {self._limit} bytes: one of "
                             f"{self._source.decode()} has {len(sample)}, the header {self._empty}")
        if self._num_bytes + num_bytes > self._limit:
            self._end_shard()
        self._samples.append(sample)
        self._lengths.append(count)
        self._num_bytes += num_bytes
        self._num_documents += last

    def _end_shard(self) -> None:
        """Hashes, compresses and places the shard, and begins the next one."""
        header = np.empty(len(self._samples) + 2, np.int64)  # count, then the offset of every sample and of the end
        header[:2] = len(self._samples), header.size * _OFFSET_BYTES + len(self._config)
        header[2:] = header[1] + np.cumsum([len(sample) for sample in self._samples])
        data = b"".join([header.astype("<u4").tobytes(), self._config, *self._samples])
        name = f"{self._stem}.{len(self._entries):03}.mds"
        raw, packed = _file_entry(name, data), None
        if self._compression:
            import zstd  # streaming's own binding; one frame that states its size

            data = zstd.compress(data, _ZSTD_LEVEL, 1)  # 1 thread: the number changes no byte
            packed = _file_entry(f"{name}.zstd", data)
        self._place((packed or raw)["basename"], data)
        lengths = np.bincount(self._lengths, minlength=self._chunker.chunk_length + 1)
        row_length = self._chunker.chunk_length + SPECIALS_PER_PIECE
        self._entries.append({
            "raw": raw, "zip": packed, "samples": len(self._samples), "tokens": sum(self._lengths),
            "documents": self._num_documents, "source": self._source.decode(),
            "rows": {str(row_length): pack_lengths(piece_counts(lengths), row_length).num_rows},
            "lengths": lengths.tolist()})
        self._begin_shard()


def _file_entry(basename: str, data: bytes) -> dict[str, Any]:
    return {"basename": basename, "bytes": len(data), "xxh64": xxhash.xxh64_hexdigest(data)}
