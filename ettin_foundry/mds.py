"""Reads one split of a converted set without trusting it: manifest, shards, samples.

Shards are plain MDS files (written by streaming.MDSWriter); `manifest.json` beside them states what they must be. The
reference readers trust names, offsets and counts: a forged index opens any file of the machine, a flipped byte is a
wrong token, a pickled column is code execution. Here the manifest is checked when a set is opened, and a shard's size,
hash, header, offsets and sample layout are checked, vectorised, before one of its tokens is handed out. The column set
is fixed, so nothing is ever unpickled. No iteration order lives here (order.py) and nothing is written (convert.py).

Layout of a shard (streaming 0.12, format/mds/writer.py; little-endian): uint32 samples; uint32 offsets[samples + 1];
JSON config; samples. A sample is one uint32 size per variable-length column in sorted order (doc, source, tokens), then
the columns' bytes: doc, last int64, part int64, source, tokens. tokens starts with a byte (axes << 2 | log2 of the
bytes per axis length) and the length.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ettin_foundry.manifest import COLUMNS, MANIFEST, read_json, read_manifest, refuse
from ettin_foundry.packing import pack_lengths, piece_counts

__all__ = ["MDSSet"]

_COLUMN_NAMES = sorted(COLUMNS)  # MDS stores columns in sorted order
_COLUMN_SIZES = [8 if COLUMNS[name] == "int" else None for name in _COLUMN_NAMES]
_NUM_SIZES = _COLUMN_SIZES.count(None)  # doc, source, tokens carry their size in front of the sample
_HEAD_BYTES = 4 * _NUM_SIZES
_FIXED_BYTES = 8 + 8  # last and part
_MAX_CONFIG_BYTES = 1 << 16  # the header's JSON is about 300 bytes; anything near this is not ours


class _Shard(NamedTuple):
    """One checked, open shard. S samples."""

    buffer: mmap.mmap
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


class MDSSet:
    """One split folder: its manifest, and random access to its chunks.

    Safe to pickle and to inherit through fork: open files are per process. A shard's hash is verified once per process,
    when the shard is first opened; at most `max_open` shards stay mapped, the least recently used is dropped.

    Args:
        local: the split's folder, e.g. `data/train`.
        verify_hashes: compare every file's xxh64 with the manifest before use. False still checks size and structure.
        max_open: shards kept mapped at a time.

    Raises:
        FileNotFoundError: no such folder, or it holds no manifest.
        ValueError: a file is not what the manifest says, or the manifest is not one of ours; it names the file.
    """

    def __init__(self, local: str | os.PathLike[str], verify_hashes: bool = True, *, max_open: int = 32) -> None:
        self.local = Path(local)
        self.verify_hashes = verify_hashes
        self.max_open = max_open
        self.manifest = read_manifest(self.local)
        shards = self.manifest["shards"]
        self._samples = np.array([shard["samples"] for shard in shards], dtype=np.int64)
        self._tokens = np.array([shard["tokens"] for shard in shards], dtype=np.int64)
        self._fingerprint: str | None = None
        self._lengths: np.ndarray | None = None
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._verified: set[int] = set()
        totals = self.manifest["totals"]
        for key, values in (("samples", self._samples), ("tokens", self._tokens)):
            if int(values.sum()) != totals[key]:
                raise refuse(self.local / MANIFEST, f"totals.{key} is {totals[key]}",
                              f"its shards sum to {int(values.sum())}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None, "_open": OrderedDict(), "_verified": set()}

    @property
    def split(self) -> str:
        return self.manifest["split"]

    @property
    def chunk_length(self) -> int:
        """Most tokens a chunk may hold, special tokens not counted."""
        return self.manifest["chunk_length"]

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The manifest's tokenizer block, see `tokenizer.fingerprint`."""
        return self.manifest["tokenizer"]

    @property
    def num_shards(self) -> int:
        return len(self._samples)

    @property
    def samples(self) -> np.ndarray:
        """(num_shards,) int64: chunks per shard."""
        return self._samples

    @property
    def tokens(self) -> np.ndarray:
        """(num_shards,) int64: tokens per shard, without special tokens."""
        return self._tokens

    @property
    def sources(self) -> list[str]:
        """Source name per shard; a shard holds one source."""
        return [shard["source"] for shard in self.manifest["shards"]]

    @property
    def fingerprint(self) -> str:
        """sha256 over what determines the data: tokenizer (but not its name), chunk length, every shard's content."""
        if self._fingerprint is None:
            keys = ("format", "version", "split", "chunk_length", "columns")
            tokenizer = {key: value for key, value in self.tokenizer.items() if key != "name"}
            shards = [(s["raw"]["bytes"], s["raw"]["xxh64"], s["samples"], s["tokens"], s["source"])
                      for s in self.manifest["shards"]]
            parts = [{key: self.manifest[key] for key in keys}, tokenizer, self.manifest["lengths"]["xxh64"], shards]
            self._fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        """(num_shards,) int64: best-fit packed rows per shard at this row length, or None where not counted."""
        counts = [shard["rows"].get(str(max_seq_len)) for shard in self.manifest["shards"]]
        return None if None in counts else np.array(counts, dtype=np.int64)

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
            raise refuse(self.local / self.manifest["lengths"]["basename"],
                          f"row {shard} counts {samples} chunks, {tokens} tokens ({int(row[0])} chunks of length 0)",
                          f"the manifest states {self._samples[shard]} chunks, {self._tokens[shard]} tokens")
        return row

    def sample_lengths(self, shard: int) -> np.ndarray:
        """(samples,) int32: tokens of each chunk of this shard, in stored order."""
        return self._shard(shard).lengths

    def last(self, shard: int) -> np.ndarray:
        """(samples,) bool: whether each chunk ends its document."""
        return self._shard(shard).last

    def chunk(self, shard: int, index: int) -> np.ndarray:
        """(L,) uint16: the plain tokens of one chunk, a copy.

        Raises:
            IndexError: no such chunk. ValueError: a token is outside the tokenizer's vocabulary.
        """
        opened = self._shard(shard)
        if not 0 <= index < len(opened.lengths):
            raise IndexError(f"chunk {index} of shard {shard}: the shard has {len(opened.lengths)} chunks")
        tokens = np.frombuffer(opened.buffer, "<u2", int(opened.lengths[index]), int(opened.token_starts[index])).copy()
        if int(tokens.max()) >= self.tokenizer["vocab_size"]:
            raise refuse(self._path(shard), f"token {int(tokens.max())} in chunk {index}",
                          f"the tokenizer has {self.tokenizer['vocab_size']} entries")
        return tokens

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """All columns of one chunk: tokens (L,) uint16, doc str, part int, last int, source str."""
        tokens = self.chunk(shard, index)
        opened = self._shard(shard)
        num_doc, num_source, _ = (int(size) for size in opened.sizes[index])
        doc_at = int(opened.starts[index]) + _HEAD_BYTES
        source_at = doc_at + num_doc + _FIXED_BYTES
        part = int(np.frombuffer(opened.buffer, "<i8", 1, doc_at + num_doc + 8)[0])
        try:
            doc = opened.buffer[doc_at:doc_at + num_doc].decode()
            source = opened.buffer[source_at:source_at + num_source].decode()
        except UnicodeDecodeError as error:
            raise refuse(self._path(shard), f"doc or source of chunk {index} is not UTF-8 ({error})",
                          "both must be UTF-8") from None
        return {"tokens": tokens, "doc": doc, "part": part, "last": int(opened.last[index]), "source": source}

    def verify(self) -> None:
        """Checks every file of the split in full: hashes, layout, counts, packed rows, token range, stock index.json.

        Raises:
            ValueError: the first lie found, naming its file.
        """
        self._check_index()
        for shard, entry in enumerate(self.manifest["shards"]):
            for index in range(int(self._samples[shard])):
                self.chunk(shard, index)
            for length, stated in entry["rows"].items():
                found = pack_lengths(piece_counts(self.lengths(shard)), int(length)).num_rows
                if found != stated:
                    raise refuse(self.local / MANIFEST, f"shards[{shard}] states {stated} rows of {length}",
                                 f"its chunks fill {found}")
        documents = sum(int(self.last(shard).sum()) for shard in range(self.num_shards))
        if documents != self.manifest["totals"]["documents"]:
            raise refuse(self.local / MANIFEST, f"totals.documents is {self.manifest['totals']['documents']}",
                         f"{documents} documents end in its shards")

    def _path(self, shard: int) -> Path:
        return self.local / self.manifest["shards"][shard]["raw"]["basename"]

    def _map(self, path: Path, num_bytes: int, xxh64: str | None) -> mmap.mmap:
        """Maps a file read-only after checking that it is a plain file of the stated size and hash."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; the manifest names it. Fetch or convert the set again") from None
        except OSError as error:
            raise refuse(path, f"cannot be opened as a plain file ({error.strerror})",
                          "links are not followed inside a set") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise refuse(path, "is not a plain file", "shards are plain files")
            if status.st_size != num_bytes:
                raise refuse(path, f"has {status.st_size} bytes", f"the manifest states {num_bytes}")
            if not num_bytes:
                raise refuse(path, "is empty", "every file of a set holds data")
            buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if xxh64 is not None and (found := xxhash.xxh64(buffer).hexdigest()) != xxh64:
            raise refuse(path, f"xxh64 is {found}", f"the manifest states {xxh64}: the file was altered")
        return buffer

    def _read_lengths(self) -> np.ndarray:
        entry = self.manifest["lengths"]
        path = self.local / entry["basename"]
        buffer = self._map(path, entry["bytes"], entry["xxh64"] if self.verify_hashes else None)
        shape = (self.num_shards, self.chunk_length + 1)
        try:  # by hand rather than np.load: the bytes read are the bytes checked, and no pickle branch exists
            version = np.lib.format.read_magic(buffer)
            found, by_columns, dtype = np.lib.format.read_array_header_1_0(buffer)
        except (ValueError, TypeError) as error:
            raise refuse(path, f"is no NumPy array ({error})", "a uint32 array is needed") from None
        if (version, found, by_columns, dtype) != ((1, 0), shape, False, np.dtype("<u4")) \
                or len(buffer) - buffer.tell() != 4 * shape[0] * shape[1]:
            raise refuse(path, f"holds {dtype} {found}", f"uint32 {shape} is needed")
        return np.frombuffer(buffer, "<u4", offset=buffer.tell()).reshape(shape)

    def _shard(self, shard: int) -> _Shard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard}: the set {self.local} has {self.num_shards} shards")
        raw = self.manifest["shards"][shard]["raw"]
        path = self._path(shard)
        check_hash = self.verify_hashes and shard not in self._verified
        buffer = self._map(path, raw["bytes"], raw["xxh64"] if check_hash else None)
        opened = _parse_shard(buffer, path, int(self._samples[shard]), self.chunk_length)
        counts = np.bincount(opened.lengths, minlength=self.chunk_length + 1)
        if not np.array_equal(counts, self.lengths(shard)):
            raise refuse(path, "its chunk lengths differ from the manifest's histogram",
                          f"row {shard} of {self.manifest['lengths']['basename']} must match")
        self._verified.add(shard)
        self._open[shard] = opened
        while len(self._open) > self.max_open:
            self._open.popitem(last=False)
        return opened

    def _check_index(self) -> None:
        """index.json is what stock readers trust; it must say what the manifest says."""
        path = self.local / "index.json"
        index = read_json(path)
        expected = [(s["raw"]["basename"], s["raw"]["bytes"], s["samples"], _COLUMN_NAMES,
                     [COLUMNS[n] for n in _COLUMN_NAMES], None) for s in self.manifest["shards"]]
        try:
            found = [(s["raw_data"]["basename"], s["raw_data"]["bytes"], s["samples"], s["column_names"],
                      s["column_encodings"], s["zip_data"]) for s in index["shards"]]
        except (KeyError, TypeError) as error:
            raise refuse(path, f"is not an MDS index ({error!r})", "the writer's index is needed") from None
        if found != expected:
            at = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), len(expected))
            raise refuse(path, f"its shard {at} differs from {MANIFEST}", "both must list the same shards")


def _parse_shard(buffer: mmap.mmap, path: Path, num_samples: int, chunk_length: int) -> _Shard:
    """Checks a shard's header, offsets and the layout of every sample, in a few vectorised passes.

    Raises:
        ValueError: any of them contradicts the format, the file's size or the manifest; nothing was read past the end.
    """
    raw = np.frombuffer(buffer, np.uint8)  # (bytes,)
    table_end = 4 + 4 * (num_samples + 1)
    if table_end > len(raw):
        raise refuse(path, f"{len(raw)} bytes", f"{num_samples} samples, as the manifest states, need more")
    stated = int(np.frombuffer(buffer, "<u4", 1)[0])
    if stated != num_samples:
        raise refuse(path, f"its header states {stated} samples", f"the manifest states {num_samples}")
    offsets = np.frombuffer(buffer, "<u4", num_samples + 1, 4).astype(np.int64)  # (S + 1,)
    smallest = _HEAD_BYTES + _FIXED_BYTES
    if offsets[0] < table_end or offsets[-1] != len(raw) or (np.diff(offsets) < smallest).any():
        raise refuse(path, "its sample offsets overlap, run backwards or leave the file",
                      f"they must rise from the header to byte {len(raw)}")
    _check_shard_config(buffer[table_end:min(int(offsets[0]), table_end + _MAX_CONFIG_BYTES)], path)

    starts = offsets[:-1]  # (S,)
    sizes = raw[starts[:, None] + np.arange(_HEAD_BYTES)].view("<u4").astype(np.int64)  # (S, 3): doc, source, tokens
    if (smallest + sizes.sum(axis=1) != np.diff(offsets)).any():
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
    last_at = starts + _HEAD_BYTES + sizes[:, 0]
    last = raw[last_at[:, None] + np.arange(8)].view("<i8")[:, 0]
    if ((last != 0) & (last != 1)).any():
        raise refuse(path, "`last` of a sample is neither 0 nor 1", "it must be one of both")
    return _Shard(buffer, starts, array_starts + 1 + (1 << wide), lengths.astype(np.int32), last == 1, sizes)


def _check_shard_config(config: bytes, path: Path) -> None:
    """The JSON in a shard's header must describe exactly our columns."""
    try:
        found = json.loads(config)
    except (ValueError, RecursionError):
        found = None
    expected = {"version": 2, "format": "mds", "compression": None, "column_names": _COLUMN_NAMES,
                "column_encodings": [COLUMNS[name] for name in _COLUMN_NAMES], "column_sizes": _COLUMN_SIZES}
    if not isinstance(found, dict) or any(found.get(key) != value for key, value in expected.items()):
        raise refuse(path, f"its header describes other columns: {config[:300]!r}", f"only {expected} is read",
                      "Do not use this shard: no other column is ever decoded")
