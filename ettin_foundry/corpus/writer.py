"""Writes one shard group: documents, given as tokens, become chunks in MDS shards, each with an entry for the manifest.

Shards are what `streaming.MDSWriter` writes, byte for byte, for the same chunks, size limit and compression (a test holds
them to it), made without an object per sample: 1 us of CPU a sample and 2 ns a token, where streaming's writer takes 16 to
22 us a sample. A shard is built in memory, then hashed, compressed, written, synced and placed by one background thread
while the next one grows: memory holds two shards, with compression three. What comes out depends on the documents and the
options alone. index.json, lengths.npy and manifest.json are made later from the entries, not here; the layout of a shard is
told in shard_format.py.

Where a shard ends: before the first chunk with which it would exceed `shard_bytes`, header and offsets included.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import struct
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.data.manifest import COLUMNS
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts

__all__ = ["ShardGroupWriter"]

_ZSTD_LEVEL = 3  # streaming's default for "zstd"
_MAX_SHARD_BYTES = 2**32 - 1  # offsets are uint32
_MAX_ZSTD_BYTES = 2**31 - 1  # what zstd.compress takes
_GROUP = 1 << 12  # chunks made and put together at a time: bounds the objects around them, also of one huge document

_COLUMN_NAMES = sorted(COLUMNS)  # MDS stores columns in sorted order: doc, last, part, source, tokens
_SIZES = struct.Struct("<III")  # bytes of doc, source and tokens, in front of each sample
_NUMBERS = struct.Struct("<qq")  # last and part
_FIXED_BYTES = _SIZES.size + _NUMBERS.size
_OFFSET_BYTES = 4


class _Chunks(NamedTuple):
    """The chunks of some documents, in order. K chunks; all int64."""

    documents: np.ndarray
    """(K,): number of the document, from 0."""
    parts: np.ndarray
    """(K,): number of the chunk in its document."""
    lasts: np.ndarray
    """(K,): 1 where the chunk ends its document, else 0."""
    ends: np.ndarray
    """(K,): where its tokens end in the concatenated tokens; they begin where the chunk before it ends."""


class _Shard:
    """A shard that is being filled. Its parts stay separate: one copy of the bytes, no larger buffer to grow."""

    def __init__(self, number: int, header_bytes: int) -> None:
        self.number = number
        self.num_bytes = header_bytes
        self.num_documents = 0
        self.blobs: list[bytes] = []
        self.sizes: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []


class ShardGroupWriter:
    """Writes documents of one source, in the order given, into shards STEM.000.mds, STEM.001.mds, ...

    Args:
        folder: where partial files are written, under hidden names of their own; must exist.
        stem: first part of the shards' names, e.g. "shard.00012".
        source: name of the documents' source, stored in every chunk.
        chunker: where documents are cut.
        shard_bytes: largest size of an uncompressed shard, 1 to 2**32 - 1, or to 2**31 - 1 with compression.
        compression: "zstd" writes STEM.000.mds.zstd instead; None plain shards.
        place: called as place(path, basename) with each finished file, to move or upload it; from a thread, one at a time,
            in order. What it leaves at `path` is removed.

    Raises:
        ValueError: `shard_bytes` or `compression` is impossible.
    """

    def __init__(self, folder: Path, *, stem: str, source: str, chunker: Chunker, shard_bytes: int, compression: str | None,
                 place: Callable[[Path, str], None]) -> None:
        if compression not in (None, "zstd"):
            raise ValueError(f"--compression: {compression!r} given; zstd is possible. Leave it out for plain shards")
        largest = _MAX_ZSTD_BYTES if compression else _MAX_SHARD_BYTES
        if not 1 <= shard_bytes <= largest:
            raise ValueError(f"--shard-size: {shard_bytes} bytes given; 1 to {largest} are possible. 64mb is the default")
        self._folder, self._stem, self._source, self._place = Path(folder), stem, source, place
        self._chunker, self._limit, self._compression = chunker, shard_bytes, compression
        self._config = _config(shard_bytes, compression)
        source_bytes = source.encode()
        self._num_source = len(source_bytes)
        # what stands between part and tokens, per chunk length: source, then the head of a uint16 array of one axis
        self._heads = [source_bytes + (bytes([4, n]) if n < 256 else struct.pack("<BH", 5, n))
                       for n in range(chunker.chunk_length + 1)]
        self._shard = self._new_shard(0)
        self._entries: list[dict[str, Any]] = []
        self._given = np.zeros(3, np.int64)  # documents, chunks, tokens
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shards")
        self._pending: Future[dict[str, Any]] | None = None

    def write(self, ids: Sequence[str], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Writes D documents.

        Args:
            ids: D strings, UTF-8 of them is stored; need not differ.
            tokens: (N,) uint16, the documents' tokens one after the other. May be a memmap: it is read front to back, and
                of a huge document some 4,000 chunks at a time are in memory.
            lengths: (D,) int64, tokens of each document, at least 1; their sum is N.

        Raises:
            ValueError: the three do not fit together, an id is no valid Unicode, or one chunk alone is larger than a shard.
            RuntimeError: the cuts of a document lose or double a token; a bug, not an input.
            Whatever `place` raised for an earlier shard.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, np.int64)
        if tokens.dtype != np.uint16 or tokens.ndim != 1 or lengths.shape != (len(ids),) \
                or int(lengths.sum()) != len(tokens) or (lengths < 1).any():
            raise ValueError(f"documents: {len(ids)} ids, {lengths.shape} lengths and {tokens.dtype} tokens {tokens.shape} "
                             "given; every document needs an id and a length of at least 1, and the lengths must add up to "
                             "the tokens. Leave empty documents out")
        encoded = self._encode_ids(ids)
        ends = np.cumsum(lengths)
        huge = np.flatnonzero(lengths > _GROUP * self._chunker.chunk_length).tolist()
        for begin, end in zip([0, *(d + 1 for d in huge)], [*huge, len(ids)]):
            if begin < end:
                self._write_run(encoded[begin:end], tokens[ends[begin] - lengths[begin]:ends[end - 1]], lengths[begin:end])
            if end < len(ids):
                self._write_huge(encoded[end], tokens[ends[end] - lengths[end]:ends[end]])
        self._given += (len(ids), 0, len(tokens))

    def finish(self) -> list[dict[str, Any]]:
        """Ends the last shard and waits until all are placed.

        Returns:
            One entry per shard, in order, as manifest.json has it, plus `lengths`: number of its chunks of 0, 1, ...,
            chunk_length tokens.

        Raises:
            RuntimeError: the shards do not hold exactly what was written; a bug, not an input. Whatever `place` raised.
        """
        if self._shard.blobs:
            self._end_shard()
        self._wait()
        self._thread.shutdown()
        held = [sum(entry[key] for entry in self._entries) for key in ("documents", "samples", "tokens")]
        if held != self._given.tolist():
            raise RuntimeError(f"{self._stem}: shards hold (documents, chunks, tokens) {held}, {self._given.tolist()} were "
                               "written")
        return self._entries

    def abort(self) -> None:
        """Stops writing; waits for the shard under way, whose partial file is removed. May be called at any time."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._shard = self._new_shard(0)

    def _new_shard(self, number: int) -> _Shard:
        return _Shard(number, 2 * _OFFSET_BYTES + len(self._config))  # count, first offset, config

    def _encode_ids(self, ids: Sequence[str]) -> list[bytes]:
        try:
            return [name.encode() for name in ids]
        except UnicodeEncodeError as error:
            raise ValueError(f"{self._source}: the document id {error.object[:80]!a} holds half a surrogate pair; valid "
                             "Unicode is needed. Correct it, or take the ids from another field") from None

    def _write_run(self, names: list[bytes], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Documents of ordinary size: chunks of all are laid out at once."""
        document_ends = np.cumsum(lengths)
        longer = np.flatnonzero(lengths > self._chunker.chunk_length).tolist()
        cuts = [self._chunker.cuts(tokens[document_ends[d] - lengths[d]:document_ends[d]]) for d in longer]
        num_parts = np.ones(len(lengths), np.int64)
        num_parts[longer] = [len(ends) for ends in cuts]
        firsts = np.cumsum(num_parts) - num_parts  # number of each document's first chunk
        ends = np.repeat(document_ends, num_parts)
        for d, of_document in zip(longer, cuts):
            ends[firsts[d]:firsts[d] + len(of_document)] += np.array(of_document) - lengths[d]
        lasts = np.zeros(len(ends), np.int64)
        lasts[firsts + num_parts - 1] = 1
        if (ends[lasts == 1] != document_ends).any():
            raise self._lost()
        documents = np.repeat(np.arange(len(lengths)), num_parts)
        self._add(names, _Chunks(documents, np.arange(len(ends)) - np.repeat(firsts, num_parts), lasts, ends), tokens)

    def _write_huge(self, name: bytes, tokens: np.ndarray) -> None:
        """One document, some chunks at a time; of a memmap no more than these are in memory."""
        cuts = iter(self._chunker.cuts(tokens))
        begin = part = 0
        while len(ends := np.fromiter(itertools.islice(cuts, _GROUP), np.int64)):
            parts = np.arange(part, part + len(ends))
            lasts = (ends == len(tokens)).astype(np.int64)
            self._add([name], _Chunks(np.zeros_like(ends), parts, lasts, ends - begin), tokens[begin:ends[-1]])
            begin, part = int(ends[-1]), part + len(ends)
            _release(tokens)
        if begin != len(tokens):
            raise self._lost()

    def _lost(self) -> RuntimeError:
        return RuntimeError(f"{self._stem}: the cuts of a document lose or double tokens")

    def _add(self, names: list[bytes], chunks: _Chunks, tokens: np.ndarray) -> None:
        """Puts chunks into shards, ending a shard where the next chunk does not fit."""
        counts = np.diff(chunks.ends, prepend=0)  # (K,) tokens of each chunk
        if (counts < 1).any() or (counts > self._chunker.chunk_length).any():
            raise self._lost()
        num_name = np.fromiter(map(len, names), np.int64, len(names))
        array_bytes = 2 + (counts > 255) + 2 * counts
        sizes = _FIXED_BYTES + num_name[chunks.documents] + self._num_source + array_bytes
        filled = np.cumsum(sizes + _OFFSET_BYTES)
        begin, before = 0, 0
        while begin < len(counts):
            room = self._limit - self._shard.num_bytes
            end = int(np.searchsorted(filled, before + room, side="right"))
            if end > begin:
                self._fill(slice(begin, end), names, chunks, counts, array_bytes, tokens)
                self._shard.sizes.append(sizes[begin:end])
                self._shard.num_bytes += int(filled[end - 1]) - before
                before = int(filled[end - 1])
            if end < len(counts):
                if not self._shard.blobs:
                    raise ValueError(f"--shard-size: {self._limit} bytes given; one chunk of {self._source} alone needs "
                                     f"more: {sizes[end]}, {num_name[chunks.documents[end]]} of them its document's id, and "
                                     f"{self._shard.num_bytes} of the header. Choose a larger one; 64mb is the default")
                self._end_shard()
            begin = end
        self._given[1] += len(counts)

    def _fill(self, which: slice, names: list[bytes], chunks: _Chunks, counts: np.ndarray, array_bytes: np.ndarray,
              tokens: np.ndarray) -> None:
        """Puts some chunks, for which there is room, into the shard."""
        plain: Any = np.ascontiguousarray(tokens, "<u2")  # no copy; Any: numpy's stubs do not call it a buffer
        data = memoryview(plain).cast("B")
        heads, num_source, pack_sizes, pack_numbers = self._heads, self._num_source, _SIZES.pack, _NUMBERS.pack
        for first in range(which.start, which.stop, _GROUP):
            group = slice(first, min(first + _GROUP, which.stop))
            pieces: list[bytes | memoryview] = []
            for d, part, last, end, count, size in zip(*(array[group].tolist() for array in (*chunks, counts, array_bytes))):
                name = names[d]
                pieces += (pack_sizes(len(name), num_source, size), name, pack_numbers(last, part), heads[count],
                           data[2 * (end - count):2 * end])
            self._shard.blobs.append(b"".join(pieces))
        self._shard.lengths.append(counts[which])
        self._shard.num_documents += int(chunks.lasts[which].sum())

    def _end_shard(self) -> None:
        shard, self._shard = self._shard, self._new_shard(self._shard.number + 1)
        self._wait()
        self._pending = self._thread.submit(self._finish_shard, shard)

    def _wait(self) -> None:
        """Takes the entry of the shard under way; whatever its thread raised is raised here."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._entries.append(pending.result())

    def _finish_shard(self, shard: _Shard) -> dict[str, Any]:
        sizes = np.concatenate(shard.sizes)
        header = np.empty(len(sizes) + 2, np.int64)  # count, then the offset of every sample and of the end
        header[:2] = len(sizes), header.size * _OFFSET_BYTES + len(self._config)
        np.cumsum(sizes, out=header[2:])
        header[2:] += header[1]
        parts = [header.astype("<u4").tobytes(), self._config, *shard.blobs]
        shard.blobs.clear()
        name = f"{self._stem}.{shard.number:03}.mds"
        raw, packed = _file_entry(name, parts), None
        if self._compression:
            parts = [_compress(parts)]
            packed = _file_entry(f"{name}.zstd", parts)
        self._put(parts, (packed or raw)["basename"])
        lengths = np.bincount(np.concatenate(shard.lengths), minlength=self._chunker.chunk_length + 1)
        row_length = self._chunker.chunk_length + SPECIALS_PER_PIECE
        return {
            "raw": raw, "zip": packed, "samples": len(sizes), "tokens": int(lengths @ np.arange(len(lengths))),
            "documents": shard.num_documents, "source": self._source,
            "rows": {str(row_length): pack_lengths(piece_counts(lengths), row_length).num_rows}, "lengths": lengths.tolist(),
        }

    def _put(self, parts: list[bytes], basename: str) -> None:
        partial = self._folder / f".{basename}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        try:
            with open(partial, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            parts.clear()
            self._place(partial, basename)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()


def _config(shard_bytes: int, compression: str | None) -> bytes:
    """The JSON in a shard's header, as streaming 0.12 writes it."""
    return json.dumps({
        "version": 2, "format": "mds", "compression": compression, "hashes": ["xxh64"], "size_limit": shard_bytes,
        "column_names": _COLUMN_NAMES, "column_encodings": [COLUMNS[name] for name in _COLUMN_NAMES],
        "column_sizes": [8 if COLUMNS[name] == "int" else None for name in _COLUMN_NAMES]}, sort_keys=True).encode()


def _file_entry(basename: str, parts: list[bytes]) -> dict[str, Any]:
    digest = xxhash.xxh64()
    for part in parts:
        digest.update(part)
    return {"basename": basename, "bytes": sum(map(len, parts)), "xxh64": digest.hexdigest()}


def _compress(parts: list[bytes]) -> bytes:
    """One zstd frame that states its size; equal on every machine with the same zstd."""
    import zstd  # streaming's own binding; comes with it

    whole = b"".join(parts)
    parts.clear()
    return zstd.compress(whole, _ZSTD_LEVEL, 1)  # 1 thread: the number changes no byte, but workers share the machine


def _release(array: np.ndarray) -> None:
    """Takes a memmap's pages out of this process's memory; they are read again where needed."""
    base: Any = array
    mode = None
    while isinstance(base, np.ndarray):
        base, mode = base.base, getattr(base, "mode", mode)
    if isinstance(base, mmap.mmap) and mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)  # a private mapping, mode "c", would lose what was written to it
