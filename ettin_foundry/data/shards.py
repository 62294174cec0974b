"""The bytes of one MDS shard, checked before one of them is used.

The reference readers trust names, offsets and counts: a forged header reads anywhere in the file, a pickled column is
code execution, a packed shard expands to whatever it likes. Here a file is mapped only if it is a plain file of the
stated size and hash; header, offsets, sample layout and token range are checked, vectorised, and expanding stops at the
declared size. The column set is fixed, so nothing is ever unpickled. What the numbers should be comes from the caller
(manifest.py through mds.py); fetching is remote.py's work.

Layout of a shard (streaming 0.12, format/mds/writer.py; little-endian): uint32 samples; uint32 offsets[samples + 1];
JSON config; samples. A sample is one uint32 size per variable-length column in sorted order (doc, source, tokens), then
the columns' bytes: doc, last int64, part int64, source, tokens. tokens starts with a byte (axes << 2 | log2 of the
bytes per axis length) and the length.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from ettin_foundry.data.manifest import COLUMNS, open_plain, refuse
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts

__all__ = ["COLUMN_NAMES", "Buffer", "Shard", "check_content", "check_hash", "expand", "expand_all", "map_file",
           "parse_shard", "read_columns", "read_lengths", "scan_shard"]

COLUMN_NAMES = sorted(COLUMNS)  # MDS stores columns in sorted order
_COLUMN_SIZES = [8 if COLUMNS[name] == "int" else None for name in COLUMN_NAMES]
_HEAD_BYTES = 4 * _COLUMN_SIZES.count(None)  # doc, source, tokens carry their size in front of the sample
_FIXED_BYTES = 8 + 8  # last and part
_MAX_CONFIG_BYTES = 1 << 16  # the header's JSON is about 300 bytes; anything near this is not ours
_COMPRESSION = re.compile(r"zstd(:\d{1,2})?")  # of the file around this shard; the writer puts it into the header
_BLOCK = 1 << 20
_RANGE_BYTES = 2 << 20  # of a shard whose tokens are compared at a time; what is copied stays in the processor's cache
_GROUP = 1 << 14  # samples whose texts are looked at together, likewise
_MAX_SCANNED_BYTES = 1 << 30  # of a packed shard for which nothing states a size

Buffer = mmap.mmap | bytes | bytearray


class Shard(NamedTuple):
    """One checked, open shard. S samples."""

    buffer: Buffer
    starts: np.ndarray
    """(S,) int64: byte offset of each sample."""
    token_starts: np.ndarray
    """(S,) int64: byte offset of each chunk's first token."""
    lengths: np.ndarray
    """(S,) int32: tokens per chunk."""
    last: np.ndarray
    """(S,) bool: the chunk ends its document."""
    sizes: np.ndarray
    """(S, 3) int64: bytes of doc, source and tokens."""
    donor: int | None = None
    """Number of the shard that these tokens were taken from in place of an unreadable one, see mds.py."""


def map_file(path: Path, num_bytes: int | None, xxh64: str | None, *, shared: bool = False, name: str = "") -> mmap.mmap:
    """Maps a file read-only after checking that it is a plain file of the stated size and hash.

    Args:
        path: the file; a link is never followed.
        num_bytes, xxh64: what it must be; None leaves the check out.
        shared: hold a shared lock on the file for as long as it is mapped, so that remote.py does not remove it, and mark
            it as just used.
        name: what the file is called in messages about its content, if not by its path.

    Raises:
        FileNotFoundError: missing, or removed at this moment. ValueError: it is something else; the message says what.
    """
    descriptor = open_plain(path)
    try:
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # mmap keeps a duplicate of the descriptor, and with it the lock
            with contextlib.suppress(PermissionError):  # another user's file: its age stays that of its fetching
                os.utime(descriptor)
        status = os.fstat(descriptor)
        if shared and not status.st_nlink:
            raise FileNotFoundError(f"{path}: removed while it was opened; the cache made room. Open it again")
        if num_bytes is not None and status.st_size != num_bytes:
            raise refuse(name or path, f"has {status.st_size} bytes", f"the manifest states {num_bytes}")
        if not status.st_size:
            raise refuse(name or path, "is empty", "every file of a set holds data")
        buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    check_hash(buffer, name or path, xxh64)
    return buffer


def check_hash(data: Buffer, path: Path | str, xxh64: str | None) -> None:
    """Refuses bytes of another hash than `xxh64`; None leaves the check out."""
    if xxh64 is not None and (found := xxhash.xxh64(data).hexdigest()) != xxh64:
        raise refuse(path, f"xxh64 is {found}", f"the manifest states {xxh64}: the file was altered")


def expand(stream: BinaryIO | Buffer, where: Path | str, num_bytes: int, *, exact: bool = True) -> Iterator[bytes]:
    """The content of a zstd file in blocks, which together have `num_bytes` bytes (not exact: at most that).

    Memory is bounded by the block and zstd's window (128 MiB at most, more is refused), whatever the file claims.

    Raises:
        ValueError: it is no zstd file, it holds more or less, or something follows its content.
    """
    import pyarrow as pa  # late: only packed sets need it

    left = num_bytes
    source = pa.PythonFile(stream, "r") if hasattr(stream, "readinto") else pa.BufferReader(stream)
    try:
        reader = pa.CompressedInputStream(source, "zstd")
        while block := reader.read(min(_BLOCK, left + 1)):
            left -= len(block)
            if left < 0:
                raise refuse(where, f"expands beyond {num_bytes} bytes", "no more is stated for it",
                             "Do not use this file: it was made to fill memory or disk")
            yield block
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of the format
            raise
        raise refuse(where, f"is not a whole zstd file ({error})", "one written by convert.py is needed") from None
    if left and exact:
        raise refuse(where, f"expands to {num_bytes - left} bytes", f"the manifest states {num_bytes}")


def expand_all(data: Buffer, where: Path | str, num_bytes: int, *, exact: bool = True) -> bytearray:
    """The content of a zstd file in memory; see `expand`."""
    content = bytearray()
    for block in expand(data, where, num_bytes, exact=exact):
        content += block
    return content


def parse_shard(buffer: Buffer, path: Path | str, *, num_samples: int | None, chunk_length: int, vocab_size: int) -> Shard:
    """Checks a shard's header, offsets, the layout of every sample and the range of every token.

    Args:
        buffer: the whole raw shard.
        path: its name in messages.
        num_samples: what the header must state; None takes what it states.
        chunk_length, vocab_size: bounds of a chunk's tokens.

    Raises:
        ValueError: anything contradicts the format, the file's size or the bounds; nothing was read past the end.
    """
    raw = np.frombuffer(buffer, np.uint8)  # (bytes,)
    stated = int.from_bytes(raw[:4].tobytes(), "little")
    num_samples = stated if num_samples is None else num_samples
    table_end = 4 + 4 * (num_samples + 1)
    if table_end > len(raw) or not num_samples:
        raise refuse(path, f"{len(raw)} bytes", f"{num_samples} samples, as stated, need more, and at least one is needed")
    if stated != num_samples:
        raise refuse(path, f"its header states {stated} samples", f"the manifest states {num_samples}")
    offsets = np.frombuffer(buffer, "<u4", num_samples + 1, 4).astype(np.int64)  # (S + 1,)
    smallest = _HEAD_BYTES + _FIXED_BYTES
    if offsets[0] < table_end or offsets[-1] != len(raw) or (np.diff(offsets) < smallest).any():
        raise refuse(path, "its sample offsets overlap, run backwards or leave the file",
                     f"they must rise from the header to byte {len(raw)}")
    _check_config(raw[table_end:min(int(offsets[0]), table_end + _MAX_CONFIG_BYTES)].tobytes(), path)
    shard = _parse_samples(buffer, raw, offsets, path, chunk_length)
    _check_range(raw, shard, path, vocab_size)
    return shard


def _at(raw: np.ndarray, dtype: str, offsets: np.ndarray) -> np.ndarray:
    """Numbers of `dtype` at byte offsets, which need not be aligned. The caller has bounded them."""
    return np.ndarray((len(raw) - np.dtype(dtype).itemsize + 1,), dtype, raw, 0, (1,))[offsets]


def _parse_samples(buffer: Buffer, raw: np.ndarray, offsets: np.ndarray, path: Path | str, chunk_length: int) -> Shard:
    starts = offsets[:-1]  # (S,)
    sizes = np.stack([_at(raw, "<u4", starts + 4 * i) for i in range(3)], 1).astype(np.int64)  # (S, 3): doc, source, tokens
    if (_HEAD_BYTES + _FIXED_BYTES + sizes.sum(axis=1) != np.diff(offsets)).any():
        raise refuse(path, "the column sizes of a sample do not add up to its bytes", "they must")
    if (sizes[:, 2] < 2).any():
        raise refuse(path, "a sample has no tokens", "every chunk has at least one")
    array_starts = offsets[1:] - sizes[:, 2]  # (S,)
    head = raw[array_starts]
    wide = (head & 3).astype(np.int64)  # 0: the length has one byte, 1: two bytes
    low, high = raw[array_starts + 1].astype(np.int64), raw[np.minimum(array_starts + 2, len(raw) - 1)].astype(np.int64)
    lengths = low + (high << 8) * (wide == 1)
    if ((head >> 2) != 1).any() or (wide > 1).any() or (1 + (1 << wide) + 2 * lengths != sizes[:, 2]).any():
        raise refuse(path, "the tokens of a sample are not one row of uint16 of their stated length", "they must be")
    if (lengths < 1).any() or (lengths > chunk_length).any():
        raise refuse(path, f"it holds chunks of {lengths.min()} to {lengths.max()} tokens",
                     f"1 to chunk_length={chunk_length} is allowed")
    last = _at(raw, "<i8", starts + _HEAD_BYTES + sizes[:, 0])
    if ((last != 0) & (last != 1)).any():
        raise refuse(path, "`last` of a sample is neither 0 nor 1", "it must be one of both")
    return Shard(buffer, starts, array_starts + 1 + (1 << wide), lengths.astype(np.int32), last == 1, sizes)


def _check_config(config: bytes, path: Path | str) -> None:
    """The JSON in a shard's header must describe exactly our columns."""
    try:
        found = json.loads(config)
    except (ValueError, RecursionError):
        found = None
    expected = {"version": 2, "format": "mds", "column_names": COLUMN_NAMES,
                "column_encodings": [COLUMNS[name] for name in COLUMN_NAMES], "column_sizes": _COLUMN_SIZES}
    compression = found.get("compression") if isinstance(found, dict) else None
    if not isinstance(found, dict) or any(found.get(key) != value for key, value in expected.items()) \
            or not (compression is None or (isinstance(compression, str) and _COMPRESSION.fullmatch(compression))):
        raise refuse(path, f"its header describes other columns: {config[:300]!r}", f"only {expected} is read",
                     "Do not use this shard: no other column is ever decoded")


def _check_range(raw: np.ndarray, shard: Shard, path: Path | str, vocab_size: int) -> None:
    """Every token must be an entry of the vocabulary."""
    if vocab_size > 0xFFFF:
        return  # uint16 holds no larger number
    begins, ends = shard.token_starts, shard.token_starts + 2 * shard.lengths.astype(np.int64)
    first = 0
    while first < len(begins):  # blocks of samples, so that the copy below stays small
        past = max(first + 1, int(np.searchsorted(ends, begins[first] + _RANGE_BYTES)))
        block = slice(first, past)
        largest = _largest(raw, begins[block], ends[block])
        if (wrong := np.flatnonzero(largest >= vocab_size)).size:
            raise refuse(path, f"token {int(largest[wrong[0]])} in chunk {first + int(wrong[0])}",
                         f"the tokenizer has {vocab_size} entries")
        first = past


def _largest(raw: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(S,) uint16: the largest of the little-endian uint16 in each byte range [begin, end)."""
    largest = np.empty(len(begins), np.uint16)
    for odd in (0, 1):
        chosen = np.flatnonzero(begins % 2 == odd)
        if not chosen.size:
            continue
        first, past = int(begins[chosen[0]]), int(ends[chosen[-1]])
        words = raw[first:past]
        # numbers at odd places are copied to even ones, where comparing them is three times as fast
        words = (words.copy() if odd else words).view("<u2")
        bounds = (np.stack([begins[chosen], ends[chosen]], 1).reshape(-1) - first) // 2
        largest[chosen] = np.maximum.reduceat(words, bounds[:-1])[::2]  # the last range goes to the end by itself
    return largest


def read_columns(shard: Shard, index: int, path: Path | str) -> tuple[str, int, str]:
    """doc, part and source of one chunk.

    Raises:
        ValueError: doc or source is not UTF-8.
    """
    num_doc, num_source, _ = (int(size) for size in shard.sizes[index])
    doc_at = int(shard.starts[index]) + _HEAD_BYTES
    source_at = doc_at + num_doc + _FIXED_BYTES
    part = int(np.frombuffer(shard.buffer, "<i8", 1, doc_at + num_doc + 8)[0])
    try:
        return (shard.buffer[doc_at:doc_at + num_doc].decode(), part,
                shard.buffer[source_at:source_at + num_source].decode())
    except UnicodeDecodeError as error:
        raise refuse(path, f"doc or source of chunk {index} is not UTF-8 ({error})", "both must be UTF-8") from None


def _ragged(raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> bytes:
    """The bytes [begin, begin + size) of `raw`, one range after the other."""
    before = np.cumsum(sizes) - sizes
    return raw[np.repeat(begins - before, sizes) + np.arange(sizes.sum())].tobytes()


def check_content(shard: Shard, path: Path | str, source: str | None = None) -> str:
    """What training does not look at: ids, parts and sources of all chunks.

    Args:
        shard: parsed. path: its name in messages. source: what every chunk must state; None takes the first one's.

    Returns:
        The source.

    Raises:
        ValueError: text that is not UTF-8, a document whose parts do not count up, or chunks of another source.
    """
    raw = np.frombuffer(shard.buffer, np.uint8)
    source = read_columns(shard, 0, path)[2] if source is None else source
    wanted = np.frombuffer(source.encode(), np.uint8)
    doc_at, num_doc = shard.starts + _HEAD_BYTES, shard.sizes[:, 0]
    source_at, named = doc_at + num_doc + _FIXED_BYTES, shard.sizes[:, 1] == len(wanted)
    parts = _at(raw, "<i8", doc_at + num_doc + 8)
    for first in range(0, len(parts), _GROUP):
        group = slice(first, first + _GROUP)
        try:  # the byte after a doc is 0 or 1, so that no character reaches from one into the next
            _ragged(raw, doc_at[group], num_doc[group] + 1).decode()
        except UnicodeDecodeError as error:
            raise refuse(path, f"the doc of a chunk is not UTF-8 ({error.reason})", "all must be UTF-8") from None
        if named[group].all():
            named[group] = (raw[source_at[group, None] + np.arange(len(wanted))] == wanted).all(axis=1)
        if not named[group].all():
            at = first + int(np.argmin(named[group]))
            raise refuse(path, f"chunk {at} is of source {read_columns(shard, at, path)[2]!r:.100}",
                         f"all chunks of a shard have one source, here {source!r:.100}")
    expected = np.concatenate([parts[:1], np.where(shard.last[:-1], 0, parts[:-1] + 1)])
    if (wrong := np.flatnonzero((parts != expected) | (parts < 0))).size:
        raise refuse(path, f"chunk {wrong[0]} is part {parts[wrong[0]]} of its document",
                     "parts count up to the one that is marked as last, and start at 0 after it")
    return source


def scan_shard(path: Path, *, chunk_length: int, vocab_size: int) -> dict[str, Any]:
    """The manifest's entry of a shard, from the file alone, everything in it checked.

    Args:
        path: `NAME.mds`, or `NAME.mds.zstd`, which is expanded in memory (at most 1 GiB: nothing states its size).
        chunk_length, vocab_size: bounds of a chunk's tokens.

    Returns:
        {raw, zip, samples, tokens, documents, source, rows, lengths}; `lengths` is the histogram as a list, index = tokens
        of a chunk; `rows` is counted for rows of chunk_length + 2.

    Raises:
        FileNotFoundError, ValueError: it is not such a shard.
    """
    buffer: Buffer = map_file(path, None, None)
    packed = path.name.endswith(".zstd")
    entry = {"basename": path.name, "bytes": len(buffer), "xxh64": xxhash.xxh64(buffer).hexdigest()}
    raw = zipped = entry
    if packed:
        buffer = expand_all(buffer, path, _MAX_SCANNED_BYTES, exact=False)
        raw = {"basename": path.name.removesuffix(".zstd"), "bytes": len(buffer), "xxh64": xxhash.xxh64(buffer).hexdigest()}
    shard = parse_shard(buffer, path, num_samples=None, chunk_length=chunk_length, vocab_size=vocab_size)
    source = check_content(shard, path)
    histogram = np.bincount(shard.lengths, minlength=chunk_length + 1)
    row_length = chunk_length + SPECIALS_PER_PIECE
    return {
        "raw": raw, "zip": zipped if packed else None, "samples": len(shard.lengths), "tokens": int(shard.lengths.sum()),
        "documents": int(shard.last.sum()), "source": source,
        "rows": {str(row_length): pack_lengths(piece_counts(histogram), row_length).num_rows}, "lengths": histogram.tolist(),
    }


def read_lengths(buffer: mmap.mmap, path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The histograms of lengths.npy: `shape` uint32, (shards, chunk_length + 1).

    By hand rather than by np.load: the bytes read are the bytes checked, and no pickle branch exists.

    Raises:
        ValueError: it is another array, or none.
    """
    buffer.seek(0)
    try:
        version = np.lib.format.read_magic(buffer)
        found, by_columns, dtype = np.lib.format.read_array_header_1_0(buffer)
    except Exception as error:  # numpy evaluates the header as a literal, and a forged one fails in many ways
        raise refuse(path, f"is no NumPy array ({error})", "a uint32 array is needed") from None
    if (version, found, by_columns, dtype) != ((1, 0), shape, False, np.dtype("<u4")) \
            or len(buffer) - buffer.tell() != 4 * shape[0] * shape[1]:
        by = "columns" if by_columns else "rows"
        raise refuse(path, f"holds {dtype} {found} by {by} in {len(buffer)} bytes", f"uint32 {shape} by rows is needed")
    return np.frombuffer(buffer, "<u4", offset=buffer.tell()).reshape(shape)
