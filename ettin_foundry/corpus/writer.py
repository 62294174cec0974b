"""Writes documents, given as tokens, as chunks in MDS shards, each with an entry for the manifest.

Shards are what `streaming.MDSWriter` writes for the same chunks, size limit and compression, byte for byte, made
without an object for each sample: 1 us of CPU a sample and 2 ns a token instead of 16 to 22 us a sample. A shard is
hashed, compressed and placed by a thread while the next one grows. data/shards.py describes the layout.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts
from ettin_foundry.data.shards import CONFIG

_ZSTD_LEVEL = 3  # streaming's default for "zstd"
_GROUP = 1 << 12  # chunks joined at a time: bounds the number of objects around them
_SIZES = struct.Struct("<III")  # bytes of doc, source and tokens, in front of each sample
_NUMBERS = struct.Struct("<qq")  # last and part
_OFFSET_BYTES = 4


def shard_config(shard_bytes: int, compression: str | None) -> dict[str, Any]:
    """What streaming 0.12 states of a shard, in its header and index.json (format/mds/writer.py `get_config`)."""
    return {**CONFIG, "compression": compression, "hashes": ["xxh64"], "size_limit": shard_bytes}


@dataclass
class _Shard:
    """A shard that is being filled. Its pieces stay separate: one copy of the bytes, no larger buffer to grow."""

    number: int
    num_bytes: int
    num_documents: int = 0
    blobs: list[bytes] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)


class ShardGroupWriter:
    """Writes documents of one source, in the order given, into shards STEM.000.mds, STEM.001.mds, ...

    Args:
        shard_bytes: most bytes of an uncompressed shard. compression: "zstd" writes STEM.000.mds.zstd instead, or None.
        place: called from one thread with name and content of each file, to write or upload it.
    """

    def __init__(self, *, stem: str, source: str, chunker: Chunker, shard_bytes: int, compression: str | None,
                 place: Callable[[str, bytes], None]) -> None:
        self._stem, self._source, self._place = stem, source.encode(), place
        self._chunker, self._limit, self._compression = chunker, shard_bytes, compression
        self._config = json.dumps(shard_config(shard_bytes, compression), sort_keys=True).encode()
        # what stands between part and tokens, per chunk length: source, then the head of a uint16 array of one axis
        self._heads = [self._source + (bytes([4, n]) if n < 256 else struct.pack("<BH", 5, n))
                       for n in range(chunker.chunk_length + 1)]
        self._empty = 2 * _OFFSET_BYTES + len(self._config)  # bytes of a shard's count, first offset and config
        self._shard = _Shard(0, self._empty)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._entries: list[Future[dict[str, Any]]] = []

    def write(self, ids: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Writes D documents; raises ValueError for a chunk larger than a shard, and whatever `place` raised.

        Args:
            ids: D strings. tokens: (N,) uint16, the documents' tokens one after the other.
            lengths: (D,) int64, tokens of each document, at least 1; their sum is N.
        """
        ends = np.cumsum(lengths)
        longer = np.flatnonzero(lengths > self._chunker.chunk_length).tolist()
        cuts = [self._chunker.cuts(tokens[ends[d] - lengths[d]:ends[d]]) for d in longer]
        num_parts = np.ones(len(lengths), np.int64)
        num_parts[longer] = [len(of_document) for of_document in cuts]
        firsts = np.cumsum(num_parts) - num_parts  # number of each document's first chunk
        chunk_ends = np.repeat(ends, num_parts)
        for d, of_document in zip(longer, cuts):
            chunk_ends[firsts[d]:firsts[d] + len(of_document)] += np.array(of_document) - lengths[d]
        lasts = np.zeros(len(chunk_ends), np.int64)
        lasts[firsts + num_parts - 1] = 1
        documents = np.repeat(np.arange(len(lengths)), num_parts)
        parts = np.arange(len(chunk_ends)) - np.repeat(firsts, num_parts)
        self._add([name.encode() for name in ids], documents, parts, lasts, chunk_ends, tokens)

    def finish(self) -> list[dict[str, Any]]:
        """Ends the last shard, waits until all are placed; one entry per shard as manifest.json has it, plus `lengths`:
        number of its chunks of 0, 1, ... tokens."""
        if self._shard.blobs:
            self._end_shard()
        self._thread.shutdown()
        return [entry.result() for entry in self._entries]

    def abort(self) -> None:
        """Stops writing; waits for the shard under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _add(self, names: list[bytes], documents: np.ndarray, parts: np.ndarray, lasts: np.ndarray,
             ends: np.ndarray, tokens: np.ndarray) -> None:
        """Puts chunks into shards, ending a shard where the next one does not fit.

        (K,) each: number of the document, number of the chunk in it, 1 where it is the last one, where its tokens end.
        """
        data = memoryview(np.ascontiguousarray(tokens, "<u2")).cast("B")  # type: ignore[arg-type]
        heads, num_source, pack_sizes, pack_numbers = self._heads, len(self._source), _SIZES.pack, _NUMBERS.pack
        counts, num_name = np.diff(ends, prepend=0), np.fromiter(map(len, names), np.int64, len(names))
        array_bytes = 2 + (counts > 255) + 2 * counts
        sizes = _SIZES.size + _NUMBERS.size + num_name[documents] + num_source + array_bytes
        filled = np.cumsum(sizes + _OFFSET_BYTES)
        begin, before = 0, 0
        while begin < len(counts):
            shard = self._shard
            room = np.searchsorted(filled, before + self._limit - shard.num_bytes, side="right")
            if (end := min(begin + _GROUP, int(room))) == begin:
                if not shard.blobs:
                    raise ValueError(f"--shard-size must hold any chunk, got {self._limit} bytes: one of "
                                     f"{self._source.decode()} has {sizes[end]}, the header {self._empty}")
                self._end_shard()
                continue
            group, pieces = slice(begin, end), list[bytes | memoryview]()
            columns = (column[group].tolist() for column in (documents, parts, lasts, ends, counts, array_bytes))
            for d, part, last, at, count, size in zip(*columns):
                name = names[d]
                pieces += (pack_sizes(len(name), num_source, size), name, pack_numbers(last, part), heads[count],
                           data[2 * (at - count):2 * at])
            shard.blobs.append(b"".join(pieces))
            shard.sizes.append(sizes[group])
            shard.lengths.append(counts[group])
            shard.num_documents += int(lasts[group].sum())
            shard.num_bytes += int(filled[end - 1]) - before
            begin, before = end, int(filled[end - 1])

    def _end_shard(self) -> None:
        shard, self._shard = self._shard, _Shard(self._shard.number + 1, self._empty)
        if self._entries:
            self._entries[-1].result()  # memory holds two shards; what its thread raised is raised here
        self._entries.append(self._thread.submit(self._finish_shard, shard))

    def _finish_shard(self, shard: _Shard) -> dict[str, Any]:
        sizes = np.concatenate(shard.sizes)
        header = np.empty(len(sizes) + 2, np.int64)  # count, then the offset of every sample and of the end
        header[:2] = len(sizes), header.size * _OFFSET_BYTES + len(self._config)
        np.cumsum(sizes, out=header[2:])
        header[2:] += header[1]
        data = b"".join([header.astype("<u4").tobytes(), self._config, *shard.blobs])
        shard.blobs.clear()
        name = f"{self._stem}.{shard.number:03}.mds"
        raw, packed = _file_entry(name, data), None
        if self._compression:
            import zstd  # streaming's own binding; one frame that states its size

            data = zstd.compress(data, _ZSTD_LEVEL, 1)  # 1 thread: the number changes no byte
            packed = _file_entry(f"{name}.zstd", data)
        self._place((packed or raw)["basename"], data)
        lengths = np.bincount(np.concatenate(shard.lengths), minlength=self._chunker.chunk_length + 1)
        row_length = self._chunker.chunk_length + SPECIALS_PER_PIECE
        return {"raw": raw, "zip": packed, "samples": len(sizes), "tokens": int(lengths @ np.arange(len(lengths))),
                "documents": shard.num_documents, "source": self._source.decode(),
                "rows": {str(row_length): pack_lengths(piece_counts(lengths), row_length).num_rows},
                "lengths": lengths.tolist()}


def _file_entry(basename: str, data: bytes) -> dict[str, Any]:
    return {"basename": basename, "bytes": len(data), "xxh64": xxhash.xxh64_hexdigest(data)}
