"""What the manifest of a converted split states, and files opened without trusting them.

`manifest.json` is written last, so a folder that holds one is complete. Names are checked, because one with a slash
would open any file of the machine, and numbers, because sums must not overflow.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import orjson
import xxhash
from pydantic import BaseModel, Field, ValidationError

from ettin_foundry.data import COLUMNS, MANIFEST, MAX_CHUNK_LENGTH

MAX_JSON_BYTES = 1 << 30  # the manifest of 70,000 shards, two trillion tokens, takes about 30 MB

Buffer = mmap.mmap | bytes | bytearray
Count = Annotated[int, Field(ge=0, le=2**53)]
Model = TypeVar("Model", bound=BaseModel)


def bad_file(path: Path | str, found: str, allowed: str,
             advice: str = "remove it and convert or fetch again") -> ValueError:
    return ValueError(f"{path}: {found}; {allowed}; {advice}")


def open_plain(path: Path) -> int:
    """A descriptor of a file, to be closed by the caller; ValueError for a link, folder, pipe or device."""
    try:  # without O_NONBLOCK a named pipe would wait for a writer for ever
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; convert again, or correct dataset.local and dataset.split") from None
    except (OSError, ValueError) as error:
        raise bad_file(path, f"cannot be opened as a plain file ({error})", "links are not followed",
                       "copy the dataset with cp -rL, or name this folder as dataset.remote") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise bad_file(path, "is not a plain file", "no folder, pipe or device is read")
    return descriptor


def map_file(path: Path, num_bytes: int | None, xxh64: str | None, *, shared: bool = False,
             name: str = "") -> mmap.mmap:
    """Maps a plain file read-only; ValueError, about `name`, for another size or hash than stated (None: any).

    `shared` locks the file while it is mapped, so that cache.py does not remove it, and marks it as just used.
    """
    descriptor = open_plain(path)
    try:
        if shared:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # mmap keeps a duplicate of the descriptor, and with it the lock
            with contextlib.suppress(PermissionError):  # another user's file: its age stays that of its fetching
                os.utime(descriptor)
        status = os.fstat(descriptor)
        if shared and not status.st_nlink:
            raise FileNotFoundError(f"{path}: removed while it was opened, the cache made room")
        if not (size := status.st_size) or num_bytes not in (None, size):
            raise bad_file(name or path, f"has {size} bytes", f"the manifest states {num_bytes or 'more'}")
        buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    if xxh64 is not None and (found := xxhash.xxh64(buffer).hexdigest()) != xxh64:
        raise bad_file(name or path, f"xxh64 is {found}", f"the manifest states {xxh64}: the file was altered")
    return buffer


def expand(data: Buffer, where: Path | str, num_bytes: int) -> Iterator[bytes]:
    """Decompresses a zstd file in blocks of 1 MiB, which together have `num_bytes` bytes; ValueError for more or less.

    Memory is bounded by the block and zstd's window (128 MiB), whatever the file claims.
    """
    import pyarrow as pa  # late: only compressed datasets need it

    left = num_bytes
    try:
        reader = pa.CompressedInputStream(pa.BufferReader(data), "zstd")
        while block := reader.read(min(1 << 20, left + 1)):
            left -= len(block)
            if left < 0:
                raise bad_file(where, f"expands beyond {num_bytes} bytes", "no more is stated for it", "do not use it")
            yield block
    except (pa.ArrowException, OSError) as error:
        raise bad_file(where, f"is not a whole zstd file ({error})", "one written by convert.py is needed") from None
    if left:
        raise bad_file(where, f"expands to {num_bytes - left} bytes", f"the manifest states {num_bytes}")


def read_json(path: Path) -> Any:
    """The JSON in a file of a dataset; ValueError if it is no plain file, larger than 1 GiB, or no JSON."""
    with open(open_plain(path), "rb") as stream:
        if (size := os.fstat(stream.fileno()).st_size) > MAX_JSON_BYTES:
            raise bad_file(path, f"has {size} bytes", f"at most {MAX_JSON_BYTES} are read")
        return parse_json(stream.read(), path)


def parse_json(text: bytes, where: Path | str) -> Any:
    """The JSON in the bytes of a file; ValueError if it is none."""
    try:
        return orjson.loads(text)  # strict: no NaN, no number beyond 64 bits, bounded depth
    except ValueError as error:
        raise bad_file(where, f"is not JSON ({error})", "the file that convert.py wrote is needed") from None


def check_record(model: type[Model], data: Any, where: Path | str, place: str = "",
                 advice: Sequence[str] = ("as ettin writes it",)) -> Model:
    """A record from disk, or the part at `place`, as a pydantic model; ValueError names the first wrong field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join([*([place] if place else []), *map(str, first["loc"])]) or "its content"
        must = re.sub("^(Value error, |(Input|String) should)", lambda found: "must" if found[2] else "", first["msg"])
        raise bad_file(where, f"{key}: {must}, got {first['input']!r:.300}", *advice) from None


class _File(BaseModel, strict=True):
    basename: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.(mds|mds\.zstd|npy)$")
    bytes: int = Field(ge=1, le=2**32 - 1)  # a shard's offsets are uint32
    xxh64: str = Field(pattern=r"^[0-9a-f]{16}$")


class ShardEntry(BaseModel, strict=True):
    raw: _File
    zip: _File | None
    samples: int = Field(ge=1, le=2**32)
    tokens: Count
    documents: Count
    source: str
    rows: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")], Annotated[int, Field(ge=1, le=2**32)]]


class _Tokenizer(BaseModel, strict=True):
    vocab_size: int = Field(ge=0, le=1 << 16)  # tokens are uint16


class _Manifest(BaseModel, strict=True):
    format: Literal["ettin-mds"]
    version: Literal[1]
    columns: dict[str, str]
    compression: Literal["zstd"] | None
    chunk_length: int = Field(ge=1, le=MAX_CHUNK_LENGTH)
    split: str
    tokenizer: _Tokenizer
    totals: dict[str, Any]
    lengths: _File
    shards: list[Any] = Field(min_length=1)


def read_manifest(local: Path) -> dict[str, Any]:
    """The manifest of a split folder; ValueError if it states what cannot be."""
    where = local / MANIFEST
    manifest = read_json(where)
    check_record(_Manifest, manifest, where)
    shards, wrong = manifest["shards"], None
    for number, shard in enumerate(shards):  # one by one, so that 70,000 models need not be kept
        check_record(ShardEntry, shard, where, f"shards.{number}")
    files = [(shard["raw"]["basename"], (shard["zip"] or {"basename": None})["basename"]) for shard in shards]
    if manifest["columns"] != COLUMNS:
        wrong = f"columns must be {COLUMNS}, got {manifest['columns']}"
    elif any(raw[-4:] != ".mds" or packed != (manifest["compression"] and raw + ".zstd") for raw, packed in files):
        wrong = "raw must be NAME.mds, and zip NAME.mds.zstd in all shards or in none, as compression is"
    elif len(set(files)) != len(files):
        wrong = "basename must be another one for each shard"
    for key in ("documents", "samples", "tokens"):
        if manifest["totals"].get(key) != (total := sum(shard[key] for shard in shards)):
            wrong = wrong or f"totals.{key} must be the sum over shards, {total}"
    if wrong:
        raise bad_file(where, wrong, "they contradict each other")
    return manifest
