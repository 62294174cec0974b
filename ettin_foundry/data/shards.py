"""One split of a converted dataset, read without trusting it: its shards' bytes, and access to any chunk.

All of a shard is checked before one of its tokens is handed out: size and hash (manifest.json states them), header,
offsets, layout of every sample, range of every token. The columns are fixed, so nothing is ever unpickled.

Layout of a shard (streaming 0.12, format/mds/writer.py; little-endian): uint32 samples; uint32 offsets[samples + 1];
JSON config; samples. A sample is one uint32 size per variable-length column in sorted order (doc, source, tokens), then
the columns' bytes: doc, last int64, part int64, source, tokens. tokens starts with a byte (axes << 2 | log2 of the
bytes per axis length) and the length.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import struct
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ettin_foundry.data import COLUMNS, INDEX, LENGTHS, MANIFEST, manifest
from ettin_foundry.data.cache import Room, ShardFiles, fetch_manifest, fetch_table
from ettin_foundry.data.manifest import Buffer, bad_file, map_file
from ettin_foundry.data.packing import pack_lengths, piece_counts

log = logging.getLogger(__name__)

_COLUMN_NAMES = sorted(COLUMNS)  # MDS stores columns in sorted order
CONFIG = {"version": 2, "format": "mds", "column_names": _COLUMN_NAMES,
          "column_encodings": [COLUMNS[name] for name in _COLUMN_NAMES],
          "column_sizes": [8 if COLUMNS[name] == "int" else None for name in _COLUMN_NAMES]}
_HEAD_BYTES = 4 * 3  # doc, source, tokens carry their size in front of the sample
_FIXED_BYTES = 8 + 8  # last and part
_MAX_CONFIG_BYTES = 1 << 16  # the header's JSON is about 300 bytes


def index_entry(shard: Mapping[str, Any]) -> dict[str, Any]:
    """What index.json says of a shard of the manifest (streaming 0.12, format/mds/writer.py `encode_joint_shard`)."""
    def file(entry: dict[str, Any] | None) -> dict[str, Any] | None:
        return entry and {"basename": entry["basename"], "bytes": entry["bytes"], "hashes": {"xxh64": entry["xxh64"]}}

    return {"samples": shard["samples"], "raw_data": file(shard["raw"]), "zip_data": file(shard["zip"])}


class Shard(NamedTuple):
    """One checked, open shard. S samples."""

    buffer: Buffer
    starts: np.ndarray  # (S,) int64: byte of each sample
    token_starts: np.ndarray  # (S,) int64: byte of each chunk's first token
    lengths: np.ndarray  # (S,) int32: tokens per chunk
    last: np.ndarray  # (S,) bool: the chunk ends its document
    sizes: np.ndarray  # (S, 3) int64: bytes of doc, source and tokens


def parse_shard(buffer: Buffer, path: Path | str, *, num_samples: int, chunk_length: int, vocab_size: int) -> Shard:
    """Checks a raw shard's header, offsets, every sample's layout, every token's range; ValueError names `path`."""
    raw = np.frombuffer(buffer, np.uint8)  # (bytes,)
    stated = int.from_bytes(raw[:4].tobytes(), "little")
    table_end = 4 + 4 * (stated + 1)
    if table_end > len(raw) or not 0 < stated == num_samples:
        raise bad_file(path, f"its header states {stated} samples", f"it must be {num_samples}")
    offsets = np.frombuffer(buffer, "<u4", stated + 1, 4).astype(np.int64)  # (S + 1,)
    if offsets[0] < table_end or offsets[-1] != len(raw) or (np.diff(offsets) < _HEAD_BYTES + _FIXED_BYTES).any():
        raise bad_file(path, "its sample offsets overlap or leave the file", f"they must rise to byte {len(raw)}")
    config = manifest.parse_json(raw[table_end:min(int(offsets[0]), table_end + _MAX_CONFIG_BYTES)].tobytes(), path)
    if not isinstance(config, dict) or {key: config.get(key) for key in CONFIG} != CONFIG:
        raise bad_file(path, f"its header has other columns: {config!r:.300}", f"only {CONFIG} is read")
    shard = _parse_samples(buffer, raw, offsets, path, chunk_length)
    _check_range(raw, shard, path, vocab_size)
    return shard


def _at(raw: np.ndarray, dtype: str, offsets: np.ndarray) -> np.ndarray:
    """Numbers of `dtype` at byte offsets, which need not be aligned. The caller has bounded them."""
    return np.ndarray((len(raw) - np.dtype(dtype).itemsize + 1,), dtype, raw, 0, (1,))[offsets]


def _parse_samples(buffer: Buffer, raw: np.ndarray, offsets: np.ndarray, path: Path | str, chunk_length: int) -> Shard:
    starts = offsets[:-1]  # (S,)
    sizes = np.stack([_at(raw, "<u4", starts + 4 * i) for i in range(3)], 1).astype(np.int64)  # (S, 3)
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
        found = f"chunks have {lengths.min()} to {lengths.max()} tokens"
        raise bad_file(path, found, f"chunk_length is {chunk_length}")
    last = _at(raw, "<i8", starts + _HEAD_BYTES + sizes[:, 0])
    if ((last != 0) & (last != 1)).any():
        raise bad_file(path, "`last` of a sample is neither 0 nor 1", "it must be one of both")
    return Shard(buffer, starts, array_starts + 1 + (1 << wide), lengths.astype(np.int32), last == 1, sizes)


def _check_range(raw: np.ndarray, shard: Shard, path: Path | str, vocab_size: int) -> None:
    """Raises ValueError for a token that is no entry of the vocabulary."""
    begins, ends = shard.token_starts, shard.token_starts + 2 * shard.lengths.astype(np.int64)
    for odd in (0, 1):
        if (chosen := np.flatnonzero(begins % 2 == odd)).size:
            words = raw[odd:ends[chosen[-1]]]
            words = (words.copy() if odd else words).view("<u2")  # aligned, comparing them is three times as fast
            bounds = (np.stack([begins[chosen], ends[chosen]], 1).reshape(-1) - odd) // 2
            largest = np.maximum.reduceat(words, bounds[:-1])[::2]  # the last range goes to the end by itself
            if (wrong := np.flatnonzero(largest >= vocab_size)).size:
                raise bad_file(path, f"token {largest[wrong[0]]} in chunk {chosen[wrong[0]]}",
                               f"the tokenizer has {vocab_size} entries")


class MDSSplit:
    """One split folder, e.g. `data/train`: manifest, and access to any chunk. It may be pickled and forked. S shards.

    Args:
        max_open: shards kept mapped at a time; the least recently used is dropped.
        remote: folder or URL of the same split; its files are fetched into `local`, shards when they are needed.
        cache_limit: most bytes, such as "200gb", of fetched or decompressed shards; see `cache.Room`.

    Raises FileNotFoundError without a manifest there, ValueError for what it cannot state or an argument out of range.
    """

    def __init__(self, local: str | os.PathLike[str], *, max_open: int = 32, remote: str | None = None,
                 cache_limit: int | str | None = None) -> None:
        self.local, self.remote, self.max_open = Path(local), remote, max_open
        if remote is not None:
            fetch_manifest(self.local, remote)
        self.manifest = manifest.read_manifest(self.local)
        self.split: str = self.manifest["split"]
        self.chunk_length: int = self.manifest["chunk_length"]  # most tokens of a chunk, special tokens not counted
        self.tokenizer: dict[str, Any] = self.manifest["tokenizer"]  # see tokenizer.fingerprint
        shards = self.manifest["shards"]
        self.num_shards = len(shards)
        self.samples = np.array([shard["samples"] for shard in shards], np.int64)  # (S,) chunks
        self.tokens = np.array([shard["tokens"] for shard in shards], np.int64)  # (S,), special tokens not counted
        self.sources: list[str] = [shard["source"] for shard in shards]  # (S,), a shard holds one source
        self.files = ShardFiles(self.local, shards, remote)
        self.fetches = self.files.fetches  # whether `prefetch` does something
        self.room = None if cache_limit is None else Room(cache_limit, self.local, [self.files])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lengths"} | {"_open": OrderedDict()}

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over what determines the data: tokenizer (but not its name), chunk length, every shard's content."""
        stated = {key: self.manifest[key] for key in ("format", "version", "split", "chunk_length", "columns")}
        tokenizer = {key: value for key, value in self.tokenizer.items() if key != "name"}
        shards = [(s["raw"]["bytes"], s["raw"]["xxh64"], s["samples"], s["tokens"], s["source"])
                  for s in self.manifest["shards"]]
        parts = [stated, tokenizer, self.manifest["lengths"]["xxh64"], shards]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        """(S,) int64: best-fit packed rows per shard at this row length, or None where not counted."""
        counts = [shard["rows"].get(str(max_seq_len)) for shard in self.manifest["shards"]]
        return None if None in counts else np.array(counts, dtype=np.int64)

    def lengths(self, shard: int) -> np.ndarray:
        """(chunk_length + 1,) uint32: number of chunks of each length; ValueError if the manifest's counts differ."""
        row = self._lengths[shard]
        found = int(row.sum()), int(np.dot(row.astype(np.int64), np.arange(len(row))))
        stated = int(self.samples[shard]), int(self.tokens[shard])
        if row[0] or found != stated:
            raise bad_file(self.local / LENGTHS, f"row {shard} counts {found} chunks and tokens, {row[0]} chunks empty",
                           f"the manifest states {stated}")
        return row

    def sample_lengths(self, shard: int) -> np.ndarray:
        """(samples,) int32: tokens of each chunk of this shard, in stored order."""
        return self._shard(shard).lengths

    def last(self, shard: int) -> np.ndarray:
        """(samples,) bool: whether each chunk ends its document."""
        return self._shard(shard).last

    def chunk(self, shard: int, index: int) -> np.ndarray:
        """(L,) uint16: the plain tokens of one chunk, a copy; IndexError if there is no such chunk."""
        opened = self._shard(shard)
        if not 0 <= index < len(opened.lengths):
            raise IndexError(f"chunk {index} of shard {shard} must be below {len(opened.lengths)}")
        return np.frombuffer(opened.buffer, "<u2", int(opened.lengths[index]), int(opened.token_starts[index])).copy()

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """All columns of one chunk: tokens (L,) uint16, doc str, part int, last int, source str."""
        opened, tokens = self._shard(shard), self.chunk(shard, index)
        num_doc, num_source, _ = opened.sizes[index].tolist()
        layout, begin = f"<{num_doc}sqq{num_source}s", int(opened.starts[index]) + _HEAD_BYTES
        doc, last, part, source = struct.unpack_from(layout, opened.buffer, begin)
        doc, source = (text.decode(errors="replace") for text in (doc, source))
        return {"tokens": tokens, "doc": doc, "part": part, "last": last, "source": source}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Announces the shards of the next rows, in order of need: they are fetched, and others may make room."""
        self.max_open = max(self.max_open, len(shards))
        if self.files.room is not None:
            for shard in self._open.keys() - set(shards):
                del self._open[shard]
        self.files.prefetch(shards)

    def check_room(self, shards: Collection[int]) -> None:
        """Raises ValueError for a cache limit too small for so many shards at a time."""
        if self.room is not None:
            self.room.check([(self.files, len(set(shards)))])

    def check_shard(self, shard: int) -> int:
        """Checks all that can be known of one shard, keeping no file or mapping; returns the bytes of its files."""
        entry, path, where = self.manifest["shards"][shard], self.files.path(shard), self.local / MANIFEST
        is_kept = not self.fetches or path.exists()
        self.files.ensure(shard, lambda: False)
        try:
            opened = self._parse(shard, map_file(path, entry["raw"]["bytes"], entry["raw"]["xxh64"]))
        finally:
            if not is_kept:
                path.unlink()
        begins = opened.starts + _HEAD_BYTES + opened.sizes[:, 0] + _FIXED_BYTES
        ends = begins + opened.sizes[:, 1]
        if {bytes(opened.buffer[a:b]) for a, b in zip(begins.tolist(), ends.tolist())} != {entry["source"].encode()}:
            raise bad_file(path, "it holds chunks of another source", f"all must be of source {entry['source']!r:.100}")
        if (documents := int(opened.last.sum())) != entry["documents"]:
            raise bad_file(where, f"shards.{shard}: documents is {entry['documents']}", f"{documents} end in it")
        for length, stated in entry["rows"].items():
            if (found := pack_lengths(piece_counts(self.lengths(shard)), int(length)).num_rows) != stated:
                raise bad_file(where, f"shards.{shard}: rows of {length} is {stated}", f"its chunks fill {found}")
        return entry["raw"]["bytes"] + (entry["zip"] or {"bytes": 0})["bytes"]

    def check_index(self) -> None:
        """Raises ValueError when index.json, which stock readers trust, does not say what the manifest says."""
        if self.remote is not None:
            fetch_table(self.local, self.remote, INDEX)
        index, found = manifest.read_json(self.local / INDEX), None
        expected = [{**CONFIG, **index_entry(shard)} for shard in self.manifest["shards"]]
        with contextlib.suppress(KeyError, TypeError):
            found = index["version"] == 2 and [{key: shard[key] for key in expected[0]} for shard in index["shards"]]
        if found != expected:
            raise bad_file(self.local / INDEX, f"its shards differ from those of {MANIFEST}", "both must list the same")

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """The histograms of lengths.npy, (S, chunk_length + 1) uint32; read by hand, so that nothing is unpickled."""
        entry, path, shape = self.manifest["lengths"], self.local / LENGTHS, (self.num_shards, self.chunk_length + 1)
        if self.remote is not None:
            fetch_table(self.local, self.remote, LENGTHS, entry["bytes"], entry["xxh64"])
        table = map_file(path, entry["bytes"], entry["xxh64"])
        begin = len(table) - 4 * shape[0] * shape[1]
        form = rb"\x93NUMPY\x01\x00..\{'descr': '<u4', 'fortran_order': False, 'shape': \(%d, %d\), \} *\n" % shape
        if not re.fullmatch(form, table[:max(begin, 0)], re.DOTALL):
            raise bad_file(path, f"its header is {table[:100]!r}", f"a uint32 array {shape} by rows is needed")
        return np.frombuffer(table, "<u4", offset=begin).reshape(shape)

    def _parse(self, shard: int, buffer: Buffer) -> Shard:
        path = self.files.path(shard)
        opened = parse_shard(buffer, path, num_samples=int(self.samples[shard]), chunk_length=self.chunk_length,
                             vocab_size=self.tokenizer["vocab_size"])
        if not np.array_equal(np.bincount(opened.lengths, minlength=self.chunk_length + 1), self.lengths(shard)):
            raise bad_file(path, f"its chunk lengths differ from row {shard} of {LENGTHS}", "they must match")
        return opened

    def _shard(self, shard: int) -> Shard:
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard}: {self.local} has {self.num_shards} shards")
        if shard not in self._open:
            self._open[shard] = self._load(shard)
            while len(self._open) > self.max_open:
                self._release()
        self._open.move_to_end(shard)
        return self._open[shard]

    def _load(self, shard: int) -> Shard:
        """Opens a shard and checks all of it; one that fails is made once more where that is possible."""
        raw, path, failed = self.manifest["shards"][shard]["raw"], self.files.path(shard), not self.fetches
        while True:
            was_there = False
            try:
                self.files.ensure(shard, self._release)
                was_there = self.fetches
                buffer = map_file(path, raw["bytes"], raw["xxh64"], shared=self.files.room is not None)
                return self._parse(shard, buffer)
            except FileNotFoundError:  # unless it was removed to make room before it could be mapped
                if not was_there:
                    raise
            except ValueError as error:
                if failed:
                    raise
                failed = True
                log.warning("%s: it is made once more", error)
                with contextlib.suppress(OSError):  # of a folder in its place the next look tells
                    path.unlink()

    def _release(self) -> bool:
        """Unmaps the least recently used shard; False when none is mapped."""
        return bool(self._open) and bool(self._open.popitem(last=False))
