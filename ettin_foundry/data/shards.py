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

import json
import logging
import mmap
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ettin_foundry.data.cache import ShardFiles, fetch_manifest, fetch_table
from ettin_foundry.data.manifest import (
    COLUMNS,
    INDEX,
    LENGTHS,
    MANIFEST,
    Buffer,
    SplitFacts,
    bad_file,
    check_hash,
    expand_all,
    map_file,
    read_json,
    read_manifest,
)
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts
from ettin_foundry.data.quantities import parse_bytes

log = logging.getLogger(__name__)

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
        raise bad_file(path, f"{len(raw)} bytes", f"{num_samples} samples, as stated, need more, and at least one is needed")
    if stated != num_samples:
        raise bad_file(path, f"its header states {stated} samples", f"the manifest states {num_samples}")
    offsets = np.frombuffer(buffer, "<u4", num_samples + 1, 4).astype(np.int64)  # (S + 1,)
    smallest = _HEAD_BYTES + _FIXED_BYTES
    if offsets[0] < table_end or offsets[-1] != len(raw) or (np.diff(offsets) < smallest).any():
        raise bad_file(path, "its sample offsets overlap, run backwards or leave the file",
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
        raise bad_file(path, "the column sizes of a sample do not add up to its bytes", "they must")
    if (sizes[:, 2] < 2).any():
        raise bad_file(path, "a sample has no tokens", "every chunk has at least one")
    array_starts = offsets[1:] - sizes[:, 2]  # (S,)
    head = raw[array_starts]
    wide = (head & 3).astype(np.int64)  # 0: the length has one byte, 1: two bytes
    low, high = raw[array_starts + 1].astype(np.int64), raw[np.minimum(array_starts + 2, len(raw) - 1)].astype(np.int64)
    lengths = low + (high << 8) * (wide == 1)
    if ((head >> 2) != 1).any() or (wide > 1).any() or (1 + (1 << wide) + 2 * lengths != sizes[:, 2]).any():
        raise bad_file(path, "the tokens of a sample are not one row of uint16 of their stated length", "they must be")
    if (lengths < 1).any() or (lengths > chunk_length).any():
        raise bad_file(path, f"it holds chunks of {lengths.min()} to {lengths.max()} tokens",
                     f"1 to chunk_length={chunk_length} is allowed")
    last = _at(raw, "<i8", starts + _HEAD_BYTES + sizes[:, 0])
    if ((last != 0) & (last != 1)).any():
        raise bad_file(path, "`last` of a sample is neither 0 nor 1", "it must be one of both")
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
        raise bad_file(path, f"its header describes other columns: {config[:300]!r}", f"only {expected} is read",
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
            raise bad_file(path, f"token {int(largest[wrong[0]])} in chunk {first + int(wrong[0])}",
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
        raise bad_file(path, f"doc or source of chunk {index} is not UTF-8 ({error})", "both must be UTF-8") from None


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
            raise bad_file(path, f"the doc of a chunk is not UTF-8 ({error.reason})", "all must be UTF-8") from None
        if named[group].all():
            named[group] = (raw[source_at[group, None] + np.arange(len(wanted))] == wanted).all(axis=1)
        if not named[group].all():
            at = first + int(np.argmin(named[group]))
            raise bad_file(path, f"chunk {at} is of source {read_columns(shard, at, path)[2]!r:.100}",
                         f"all chunks of a shard have one source, here {source!r:.100}")
    expected = np.concatenate([parts[:1], np.where(shard.last[:-1], 0, parts[:-1] + 1)])
    if (wrong := np.flatnonzero((parts != expected) | (parts < 0))).size:
        raise bad_file(path, f"chunk {wrong[0]} is part {parts[wrong[0]]} of its document",
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
        raise bad_file(path, f"is no NumPy array ({error})", "a uint32 array is needed") from None
    if (version, found, by_columns, dtype) != ((1, 0), shape, False, np.dtype("<u4")) \
            or len(buffer) - buffer.tell() != 4 * shape[0] * shape[1]:
        by = "columns" if by_columns else "rows"
        raise bad_file(path, f"holds {dtype} {found} by {by} in {len(buffer)} bytes", f"uint32 {shape} by rows is needed")
    return np.frombuffer(buffer, "<u4", offset=buffer.tell()).reshape(shape)


SUBSTITUTIONS = "substitutions.jsonl"

_LIMITED: weakref.WeakSet[MDSSplit] = weakref.WeakSet()


def _unmap_after_fork() -> None:
    """A forked child would keep its parent's shards from being removed from a limited cache; it maps its own."""
    for data in list(_LIMITED):
        data._open.clear()


os.register_at_fork(after_in_child=_unmap_after_fork)


class MDSSplit(SplitFacts):
    """One split folder: its manifest, and random access to its chunks.

    Safe to pickle and to inherit through fork: open files are per process. At most `max_open` shards stay mapped, the
    least recently used is dropped; all of a shard is checked each time it is mapped.

    Args:
        local: the split's folder, e.g. `data/train`.
        verify_hashes: compare every file's xxh64 with the manifest before use. False still checks size and structure.
        max_open: shards kept mapped at a time.
        remote: folder or URL of the same split; its files are then fetched into `local`, shards when they are needed.
        cache_limit: most bytes that fetched or expanded shards may take in `local`, such as "200gb"; the least recently
            used ones are removed.

    Raises:
        FileNotFoundError: no such folder, or it holds no manifest.
        ValueError: a file is not what the manifest says, the manifest is not one of ours, or an argument is out of range;
            it names the file or the key.
        OSError: the remote place cannot be reached.
    """

    def __init__(self, local: str | os.PathLike[str], verify_hashes: bool = True, *, max_open: int = 32,
                 remote: str | None = None, cache_limit: int | str | None = None) -> None:
        self.local, self.remote = Path(local), remote
        self.verify_hashes, self.max_open = verify_hashes, max_open
        limit = parse_bytes("dataset.cache_limit", cache_limit)
        if remote is not None:
            fetch_manifest(self.local, remote)
        super().__init__(read_manifest(self.local))
        self._files = ShardFiles(self.local, self.manifest["shards"], remote=remote, cache_limit=limit)
        if remote is not None:
            fetch_table(self.local, remote, LENGTHS, self.manifest["lengths"]["bytes"])
            fetch_table(self.local, remote, INDEX)
        self._lengths: np.ndarray | None = None
        self._open: OrderedDict[int, Shard] = OrderedDict()
        if limit is not None:
            _LIMITED.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None, "_open": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._files.cache_limit is not None:
            _LIMITED.add(self)

    @property
    def fetches(self) -> bool:
        """Whether shards are fetched or expanded before they are read, so that `prefetch` does something."""
        return self._files.fetches

    def lengths(self, shard: int) -> np.ndarray:
        """(chunk_length + 1,) uint32: number of chunks of each length in this shard.

        Raises:
            ValueError: lengths.npy is altered, or its row contradicts the manifest's counts.
        """
        if self._lengths is None:
            self._lengths = self._read_lengths()
        row = self._lengths[shard]
        samples, tokens = int(row.sum()), int(np.dot(row.astype(np.int64), np.arange(len(row))))
        if row[0] or samples != self._samples[shard] or tokens != self._tokens[shard]:
            raise bad_file(self.local / LENGTHS,
                         f"row {shard} counts {samples} chunks, {tokens} tokens ({int(row[0])} chunks of length 0)",
                         f"the manifest states {self._samples[shard]} chunks, {self._tokens[shard]} tokens")
        return row

    def sample_lengths(self, shard: int) -> np.ndarray:
        """(samples,) int32: tokens of each chunk of this shard, in stored order (in a substitute: ascending)."""
        return self._shard(shard).lengths

    def last(self, shard: int) -> np.ndarray:
        """(samples,) bool: whether each chunk ends its document."""
        return self._shard(shard).last

    def chunk(self, shard: int, index: int) -> np.ndarray:
        """(L,) uint16: the plain tokens of one chunk, a copy.

        Raises:
            IndexError: no such chunk. ValueError, OSError: see the class.
        """
        opened = self._shard(shard)
        if not 0 <= index < len(opened.lengths):
            raise IndexError(f"chunk {index} of shard {shard}: the shard has {len(opened.lengths)} chunks")
        return np.frombuffer(opened.buffer, "<u2", int(opened.lengths[index]), int(opened.token_starts[index])).copy()

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """All columns of one chunk: tokens (L,) uint16, doc str, part int, last int, source str."""
        tokens, opened = self.chunk(shard, index), self._shard(shard)
        doc, part, source = read_columns(opened, index, self._files.path(shard))
        return {"tokens": tokens, "doc": doc, "part": part, "last": int(opened.last[index]), "source": source}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Announces the shards of the next rows, in order of need, so that they are fetched in the background.

        Also raises `max_open` to their number, and with a cache limit unmaps others, so that they can make room.
        """
        self.max_open = max(self.max_open, len(shards))
        if self._files.cache_limit is not None and not self._open.keys() <= set(shards):
            for shard in self._open.keys() - set(shards):
                del self._open[shard]
        self._files.prefetch(shards)

    def check_room(self, shards: Collection[int]) -> None:
        """Refuses a cache limit too small for so many shards at a time; see `ShardFiles.check_room`."""
        self._files.check_room(shards)

    @property
    def files(self) -> ShardFiles:
        """Where its files are and what room they may take."""
        return self._files

    def check_shard(self, shard: int) -> int:
        """Checks all that can be known of one shard, without keeping anything; may run in several threads.

        Files are read where they are: those of a remote split that are not here are read into memory.

        Returns:
            Bytes read and hashed.

        Raises:
            FileNotFoundError, OSError: a file cannot be read. ValueError: the first lie found, naming its file.
        """
        return self._check(shard)[0]

    def _check(self, shard: int) -> tuple[int, int]:
        """Bytes read and documents ended, see `check_shard`."""
        entry, path = self.manifest["shards"][shard], self._files.path(shard)
        raw, zipped = entry["raw"], entry["zip"]
        num_bytes = 0
        buffer: Buffer | None = None
        if os.path.lexists(path) or (zipped is None and self.remote is None):
            buffer = map_file(path, raw["bytes"], raw["xxh64"])
            num_bytes += len(buffer)
        if zipped is not None and (buffer is None or os.path.lexists(self.local / zipped["basename"])):
            packed = self._read(zipped)
            content = expand_all(packed, self.local / zipped["basename"], raw["bytes"])
            check_hash(content, path, raw["xxh64"])
            buffer, num_bytes = content, num_bytes + len(packed) + len(content)
        if buffer is None:
            buffer = self._read(raw)
            num_bytes += len(buffer)
        opened = self._parse(shard, buffer)
        check_content(opened, path, entry["source"])
        documents = int(opened.last.sum())
        if documents != entry.get("documents", documents):
            raise bad_file(self.local / MANIFEST, f"shards[{shard}] states {entry['documents']} documents",
                         f"{documents} end in it")
        for length, stated in entry["rows"].items():
            if (found := pack_lengths(piece_counts(self.lengths(shard)), int(length)).num_rows) != stated:
                raise bad_file(self.local / MANIFEST, f"shards[{shard}] states {stated} rows of {length}",
                             f"its chunks fill {found}")
        return num_bytes, documents

    def verify(self) -> None:
        """Checks every file of the split in full: hashes, layout, counts, packed rows, token range, stock index.json.

        Raises:
            ValueError: the first lie found, naming its file.
        """
        self.check_index()
        documents = sum(self._check(shard)[1] for shard in range(self.num_shards))
        if documents != self.manifest["totals"]["documents"]:
            raise bad_file(self.local / MANIFEST, f"totals.documents is {self.manifest['totals']['documents']}",
                         f"{documents} documents end in its shards")

    # -------------------------------------------------------------- files

    def _read(self, file: dict[str, Any]) -> Buffer:
        """A file of the split, of the stated size and hash; a remote one that is not here is not kept."""
        path = self.local / file["basename"]
        if os.path.lexists(path) or self.remote is None:
            return map_file(path, file["bytes"], file["xxh64"])
        data = self._files.read_remote(file["basename"], file["bytes"])
        check_hash(data, path, file["xxh64"])
        return data

    def _read_lengths(self) -> np.ndarray:
        entry, path = self.manifest["lengths"], self.local / LENGTHS
        shape = (self.num_shards, self.chunk_length + 1)
        xxh64 = entry["xxh64"] if self.verify_hashes else None
        try:
            return read_lengths(map_file(path, entry["bytes"], xxh64), path, shape)
        except ValueError as error:
            if self.remote is None:
                raise
            log.warning("%s: it is fetched once more", error)
        fetch_table(self.local, self.remote, LENGTHS, entry["bytes"], again=True)
        return read_lengths(map_file(path, entry["bytes"], xxh64), path, shape)

    def _parse(self, shard: int, buffer: Buffer) -> Shard:
        path = self._files.path(shard)
        opened = parse_shard(buffer, path, num_samples=int(self._samples[shard]), chunk_length=self.chunk_length,
                             vocab_size=self.tokenizer["vocab_size"])
        if not np.array_equal(np.bincount(opened.lengths, minlength=self.chunk_length + 1), self.lengths(shard)):
            raise bad_file(path, "its chunk lengths differ from the manifest's histogram",
                         f"row {shard} of {LENGTHS} must match")
        return opened

    def _shard(self, shard: int) -> Shard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard}: the set {self.local} has {self.num_shards} shards")
        opened = self._open[shard] = self._load(shard)
        while len(self._open) > self.max_open:
            self._open.popitem(last=False)
        return opened

    def _load(self, shard: int) -> Shard:
        """Opens a shard and checks all of it; one that fails is made once more where that is possible."""
        raw, path, renewed = self.manifest["shards"][shard]["raw"], self._files.path(shard), False
        xxh64 = raw["xxh64"] if self.verify_hashes else None
        while True:
            self._files.ensure(shard, self._release)
            try:
                return self._parse(shard, map_file(path, raw["bytes"], xxh64, shared=self._files.cache_limit is not None))
            except FileNotFoundError:
                if not self._files.fetches:
                    raise
                # else removed to make room between the two lines above
            except ValueError as error:
                if renewed or not self._files.renew(shard, self._release):
                    raise
                renewed = True
                log.warning("%s: it was made once more", error)

    def _release(self) -> bool:
        """Unmaps the least recently used shard; False when none is mapped."""
        if self._open:
            self._open.popitem(last=False)
            return True
        return False

    def check_index(self) -> None:
        """index.json is what stock readers trust; it must say what the manifest says."""
        path = self.local / INDEX
        index = read_json(path)
        encodings = [COLUMNS[name] for name in COLUMN_NAMES]

        def file(entry: dict[str, Any] | None) -> tuple[str, int, str] | None:
            return entry and (entry["basename"], entry["bytes"], entry.get("hashes", entry)["xxh64"])

        expected = [(2, 2, "mds", file(s["raw"]), file(s["zip"]), s["samples"], COLUMN_NAMES, encodings)
                    for s in self.manifest["shards"]]
        try:
            found = [(index["version"], s["version"], s["format"], file(s["raw_data"]), file(s["zip_data"]),
                      s["samples"], s["column_names"], s["column_encodings"]) for s in index["shards"]]
        except (KeyError, TypeError) as error:
            raise bad_file(path, f"is not an MDS index ({error!r})", "the writer's index is needed") from None
        if found != expected:
            at = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), len(expected))
            raise bad_file(path, f"its shard {at} differs from {MANIFEST}", "both must list the same shards")
