"""The manifest of a converted split: what it states, and reading it without trusting it.

`manifest.json` is written last, so a folder that holds one is complete. Everything that another module relies on is
checked here, names above all: a name with a slash in it would open any file of the machine, and one such as
`manifest.json` would be overwritten when a shard of that name is fetched. Numbers are held to what the format can hold,
so that no sum overflows and nothing larger than a shard can be is ever fetched or expanded. Opening the files that the
manifest names is the work of shard_format.py and mds.py, fetching them that of remote.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import xxhash

FORMAT = "ettin-mds"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.json"
LENGTHS = "lengths.npy"
COLUMNS = {"tokens": "ndarray:uint16", "doc": "str", "part": "int", "last": "int", "source": "str"}
"""Column name -> MDS encoding. No other column or encoding is read, so none that executes or decodes anything."""

MAX_CHUNK_LENGTH = 65_535  # a chunk's length is stored in at most two bytes
MAX_JSON_BYTES = 1 << 30
"""70,000 shards, two trillion tokens, take about 30 MB."""
_MAX_RAW_BYTES = 2**32 - 1  # a shard's offsets are uint32
_SMALLEST_SAMPLE = 34  # bytes of an empty doc and source with a chunk's sizes, numbers, array head and table entry
_MAX_VOCAB = 1 << 16  # tokens are uint16
_MAX_TOTAL = 2**53

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.mds")
_XXH64 = re.compile(r"[0-9a-f]{16}")
_ROW_LENGTH = re.compile(r"[1-9][0-9]{0,8}")


def bad_file(path: Path | str, found: str, allowed: str, advice: str = "Fetch or convert the set again") -> ValueError:
    """The error for a file that is not what it must be, to be raised by the caller."""
    return ValueError(f"{path}: {found}; {allowed}. {advice}")


def open_plain(path: Path) -> int:
    """Opens a file of a set for reading, if it is a plain file: no link, folder, pipe or device.

    Returns:
        A file descriptor, to be closed by the caller.

    Raises:
        FileNotFoundError: no such file. ValueError: there is something else under this name.
    """
    try:  # without O_NONBLOCK a named pipe would wait for a writer for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; the manifest names it. Fetch or convert the set again") from None
    except (OSError, ValueError) as error:
        raise bad_file(path, f"cannot be opened as a plain file ({getattr(error, 'strerror', None) or error})",
                     "links are not followed inside a set") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise bad_file(path, "is not a plain file", "no folder, pipe or device is read")
    return descriptor


def read_json(path: Path) -> Any:
    """The JSON in a file of the set; a missing or unreadable one is an error that names it."""
    try:
        descriptor = open_plain(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; a split folder made by data_prep/convert.py is needed. Convert the "
                                "corpus, or correct dataset.local and dataset.split") from None
    with open(descriptor, "rb") as stream:
        if (size := os.fstat(descriptor).st_size) > MAX_JSON_BYTES:
            raise bad_file(path, f"has {size} bytes", f"at most {MAX_JSON_BYTES} are read")
        text = stream.read()
    try:
        return orjson.loads(text)  # strict: no NaN, no number beyond 64 bits, bounded depth
    except ValueError as error:
        raise bad_file(path, f"is not JSON ({error})", "it must be the file that convert.py wrote") from None


def _need(where: str, mapping: Any, key: str, kind: type, *, most: int = _MAX_TOTAL) -> Any:
    """The value of a key, of the given type; numbers must be 0 to `most`."""
    value: Any = mapping.get(key) if isinstance(mapping, dict) else None
    if type(value) is not kind or (kind is int and not 0 <= value <= most):
        allowed = f"0 to {most} is possible" if kind is type(value) is int else f"{kind.__name__} is needed"
        raise bad_file(where, f"{key} is {value!r:.200}", allowed)
    return value


def _check_file_entry(where: str, entry: Any, name: str | None = None, *, most: int = _MAX_RAW_BYTES) -> None:
    """A manifest's {basename, bytes, xxh64}: a shard's name must be plain, any other exactly `name`."""
    found = _need(where, entry, "basename", str)
    if found != name if name else not _SHARD_NAME.fullmatch(found):
        allowed = f"it must be {name}" if name else "only plain file names inside the folder that end in .mds are allowed"
        raise bad_file(where, f"file name {found!r:.300}", allowed, "Do not use this set: it was made to read other files")
    if _need(where, entry, "bytes", int, most=most) == 0:
        raise bad_file(where, f"bytes of {found} is 0", "every file of a set holds data")
    if not _XXH64.fullmatch(_need(where, entry, "xxh64", str)):
        raise bad_file(where, f"xxh64 of {found} is {entry['xxh64']!r:.100}", "16 hexadecimal digits are needed")


def _check_shard(place: str, shard: Any, chunk_length: int, compression: str | None) -> None:
    """One entry of `shards`: names, sizes, and counts that can be true of a file of that size."""
    raw = _need(place, shard, "raw", dict)
    _check_file_entry(f"{place} raw", raw)
    if (shard.get("zip") is None) != (compression is None):
        raise bad_file(place, f"zip is {shard.get('zip')!r:.100}", f"compression is {compression!r}; all have one, or "
                     "none")
    if compression is not None:  # what zstd makes of any input, and a little more
        _check_file_entry(f"{place} zip", shard["zip"], raw["basename"] + ".zstd",
                          most=raw["bytes"] + raw["bytes"] // 128 + 1024)
    samples = _need(place, shard, "samples", int)
    tokens = _need(place, shard, "tokens", int)
    if not samples:
        raise bad_file(place, "samples is 0", "a shard holds at least one chunk")
    if not samples <= tokens <= samples * chunk_length or _SMALLEST_SAMPLE * samples + 2 * tokens > raw["bytes"]:
        raise bad_file(place, f"{samples} samples with {tokens} tokens", f"{raw['bytes']} bytes of chunks with 1 to "
                     f"{chunk_length} tokens cannot hold that")
    if "documents" in shard and _need(place, shard, "documents", int) > samples:
        raise bad_file(place, f"documents is {shard['documents']}", f"its {samples} chunks cannot end more than one each")
    _need(place, shard, "source", str)
    for length, count in _need(place, shard, "rows", dict).items():
        _need(f"{place} rows[{length!r:.20}]", {"count": count}, "count", int)
        if not _ROW_LENGTH.fullmatch(length) or not 1 <= count <= samples:
            raise bad_file(place, f"{count} rows of {length!r:.20}", f"1 to {samples} rows of a whole number are possible")


def _check_head(where: str, manifest: Any) -> None:
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        found = [manifest.get(key) for key in ("format", "version")] if isinstance(manifest, dict) else manifest
        raise bad_file(where, f"format and version are {found!r:.80}", f"[{FORMAT!r}, {VERSION}] is read here")
    if manifest.get("columns") != COLUMNS:
        raise bad_file(where, f"columns are {manifest.get('columns')!r:.300}", f"only {COLUMNS} is read")
    if manifest.get("compression") not in (None, "zstd"):
        raise bad_file(where, f"compression is {manifest['compression']!r:.80}", "null and 'zstd' are read")
    if not 1 <= _need(where, manifest, "chunk_length", int) <= MAX_CHUNK_LENGTH:
        raise bad_file(where, f"chunk_length is {manifest['chunk_length']}", f"1 to {MAX_CHUNK_LENGTH} is possible")
    _need(where, manifest, "split", str)
    _need(where + " tokenizer", _need(where, manifest, "tokenizer", dict), "vocab_size", int, most=_MAX_VOCAB)
    for key in ("documents", "samples", "tokens"):
        _need(where + " totals", manifest.get("totals"), key, int)
    if not _need(where, manifest, "shards", list):
        raise bad_file(where, "it lists no shards", "at least one is needed")


def read_manifest(local: Path) -> dict[str, Any]:
    """The manifest of a split folder, every field that anything relies on checked.

    Raises:
        FileNotFoundError: there is none. ValueError: it states what cannot be; the message names the field.
    """
    where = str(local / MANIFEST)
    manifest = read_json(local / MANIFEST)
    _check_head(where, manifest)
    shards, chunk_length = manifest["shards"], manifest["chunk_length"]
    for number, shard in enumerate(shards):
        _check_shard(f"{where} shards[{number}]", shard, chunk_length, manifest.get("compression"))
    if len({shard["raw"]["basename"] for shard in shards}) != len(shards):
        raise bad_file(where, "a file is named twice", "every shard has a file of its own")
    _check_file_entry(where + " lengths", manifest.get("lengths"), LENGTHS, most=4 * len(shards) * (chunk_length + 1) + 4096)
    counted = {"samples", "tokens", *(["documents"] if all("documents" in shard for shard in shards) else [])}
    for key in sorted(counted):
        if (found := sum(shard[key] for shard in shards)) != manifest["totals"][key]:
            raise bad_file(where, f"totals.{key} is {manifest['totals'][key]}", f"its shards sum to {found}")
    return manifest


class SplitFacts:
    """What the manifest of a split states, in the form that an order, a plan or a mixture needs.

    Args:
        manifest: from `read_manifest`.
    """

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self._samples = np.array([shard["samples"] for shard in manifest["shards"]], dtype=np.int64)
        self._tokens = np.array([shard["tokens"] for shard in manifest["shards"]], dtype=np.int64)
        self._fingerprint: str | None = None

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


Buffer = mmap.mmap | bytes | bytearray
_BLOCK = 1 << 20


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
            raise bad_file(name or path, f"has {status.st_size} bytes", f"the manifest states {num_bytes}")
        if not status.st_size:
            raise bad_file(name or path, "is empty", "every file of a set holds data")
        buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    check_hash(buffer, name or path, xxh64)
    return buffer


def check_hash(data: Buffer, path: Path | str, xxh64: str | None) -> None:
    """Refuses bytes of another hash than `xxh64`; None leaves the check out."""
    if xxh64 is not None and (found := xxhash.xxh64(data).hexdigest()) != xxh64:
        raise bad_file(path, f"xxh64 is {found}", f"the manifest states {xxh64}: the file was altered")


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
                raise bad_file(where, f"expands beyond {num_bytes} bytes", "no more is stated for it",
                             "Do not use this file: it was made to fill memory or disk")
            yield block
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system, not of the format
            raise
        raise bad_file(where, f"is not a whole zstd file ({error})", "one written by convert.py is needed") from None
    if left and exact:
        raise bad_file(where, f"expands to {num_bytes - left} bytes", f"the manifest states {num_bytes}")


def expand_all(data: Buffer, where: Path | str, num_bytes: int, *, exact: bool = True) -> bytearray:
    """The content of a zstd file in memory; see `expand`."""
    content = bytearray()
    for block in expand(data, where, num_bytes, exact=exact):
        content += block
    return content
