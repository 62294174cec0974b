"""One small interface over local folders, S3 and whatever fsspec reaches: names in, bytes out.

Corpora, converted sets and the shards of a training run may lie on a disk or in a bucket; the rest of the package does
not ask which. Writing is atomic everywhere, so that a name is either absent or whole. Reading from a network goes in
ranges of 8 MiB, each tried several times: a lost connection costs one range, not the file. S3 is spoken through boto3
(Streaming brings it), any other scheme (gs://, hf://, ...) through fsspec and its driver: storage_remote.py and what it
names.

Not here: what the files mean, hashes of their content (mds.py), caches and their limits (remote.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

__all__ = ["BLOCK_BYTES", "LocalStorage", "Storage", "atomic_file", "check_name", "folder_of", "is_url", "join", "missing",
           "open_storage", "too_short"]

log = logging.getLogger(__name__)

BLOCK_BYTES = 8 << 20
"""Bytes asked for at a time from a network."""
_SCRATCH = ".scratch"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a place is reached through a network client; `file://` is a way to write a path."""
    return bool(_URL.match(os.fspath(text))) and not os.fspath(text).lower().startswith("file://")


def join(base: str | os.PathLike[str], *names: str) -> str:
    """A place below a folder or URL."""
    if is_url(base):
        return "/".join([os.fspath(base).rstrip("/"), *names])
    return os.path.join(_as_path(base), *names)


def open_storage(place: str | os.PathLike[str]) -> Storage:
    """The storage of a folder or URL; nothing is read, nothing has to exist.

    Raises:
        ValueError: a URL of no use: no bucket, a scheme that nothing installed here reads.
    """
    if not os.fspath(place):
        raise ValueError("place of files: an empty one given; a folder or URL is needed. Name it")
    if not is_url(place):
        return LocalStorage(_as_path(place))
    if os.fspath(place).lower().startswith("s3://"):
        from ettin_foundry.data.storage_s3 import S3Storage

        return S3Storage(os.fspath(place))
    from ettin_foundry.data.storage_fsspec import FsspecStorage

    return FsspecStorage(os.fspath(place))


def check_name(name: str) -> str:
    """The name, if it is relative and stays inside the folder.

    Raises:
        ValueError: it is empty, absolute, or has a part that is empty, `.` or `..`.
    """
    if "\0" in name or not all(part not in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"file name {name!r:.200}: it is not a plain name inside the folder; parts divided by single "
                         "slashes, none of them '.' or '..', are allowed. Correct the name, or do not use this set")
    return name


def folder_of(prefix: str) -> str:
    """The folder that names beginning with `prefix` are in; empty for the folder of the storage itself.

    Raises:
        ValueError: it is outside.
    """
    upper, slash, _ = prefix.rpartition("/")
    return check_name(upper) if slash else ""


def _as_path(place: str | os.PathLike[str]) -> str:
    text = os.fspath(place)
    return text[len("file://"):] if text.lower().startswith("file://") else text


@contextlib.contextmanager
def atomic_file(path: Path, folder: Path | None = None) -> Iterator[IO[bytes]]:
    """A hidden file in `folder` (by default beside `path`), which becomes `path` when the block ends without an error."""
    folder = folder or path.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{path.name[:100]}.{uuid.uuid4().hex[:16]}.partial"
    try:
        with open(partial, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def missing(place: str) -> FileNotFoundError:
    """The error for a file that is not there, to be raised by the caller."""
    return FileNotFoundError(f"{place}: no such file; a present one is needed. Correct the name, or fetch or write it again")


def too_short(place: str, begin: int, end: int) -> OSError:
    """The error for a file that ends before what was asked for, to be raised by the caller."""
    return OSError(f"{place}: it ends before byte {end}; bytes {begin} to {end} were to be read. Fetch or write it again")


def _unreadable(error: OSError) -> None:
    """What cannot be listed is an error, not an empty folder; what is missing is empty."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _replace(source: str | os.PathLike[str], target: Path) -> None:
    """Renames, and makes the new name survive a power cut."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Storage:
    """A folder, here or elsewhere. Instances hold no connection: they are cheap and can be pickled.

    Names are relative, divided by slashes; hidden ones (a part starts with a dot) are read and written like others but
    never listed. Every method raises ValueError for a name that is not plain, FileNotFoundError for a missing one,
    PermissionError where access is refused, ConnectionError when a network fails `TRIES` times, OSError for the rest.
    """

    is_local = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or url

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def where(self, name: str) -> str:
        """How a file is called in messages."""
        return join(self.url, name)

    def local_path(self, name: str = "") -> Path | None:
        """The file's own path on this machine; None for remote storage."""
        return None

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; folders do not count."""
        try:
            self.size(name)
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        """Bytes of a file."""
        raise NotImplementedError

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(name, bytes) of every file whose name begins with `prefix`, in the order of names; none when nothing is there."""
        raise NotImplementedError

    def read_bytes(self, name: str) -> bytes:
        """A whole file."""
        with self.open(name) as stream:
            return stream.read()

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Exactly the bytes [begin, end) of a file; an OSError when it is shorter."""
        raise NotImplementedError

    def open(self, name: str, begin: int = 0) -> BinaryIO:
        """A seekable stream of a file's bytes, standing at `begin`; to be closed."""
        raise NotImplementedError

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces one, atomically."""
        raise NotImplementedError

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        """Moves a local file into place atomically; it is gone from where it was. Cheapest from `scratch()`."""
        raise NotImplementedError

    def get_file(self, name: str, local_path: str | os.PathLike[str], *, num_bytes: int | None = None) -> None:
        """Copies a file to `local_path`: block by block into a hidden partial file beside it, which is then renamed.

        Args:
            name: the file here.
            local_path: the file there; a present one is replaced. Its folder is made.
            num_bytes: what the file must measure. Not a byte more is fetched.

        Raises:
            OSError: the file has another size; nothing was fetched.
        """
        found = self.size(name)
        if num_bytes is not None and found != num_bytes:
            raise OSError(f"{self.where(name)}: {found} bytes; {num_bytes} are stated for it. Upload or convert it again")
        target = Path(local_path)
        with atomic_file(target) as stream:
            for begin in range(0, found, BLOCK_BYTES):
                stream.write(self.read_range(name, begin, min(found, begin + BLOCK_BYTES)))

    def delete(self, name: str) -> None:
        """Removes a file; a missing one is fine."""
        raise NotImplementedError

    def scratch(self) -> Path:
        """A local folder for temporary files: inside the storage where that is local, else one for this process."""
        raise NotImplementedError

    def clear_scratch(self) -> None:
        """Removes `scratch()` with all that killed processes left in it. Only for who works here alone."""
        shutil.rmtree(self.scratch(), ignore_errors=True)


class LocalStorage(Storage):
    """A folder of this machine, or of a file system that it mounts."""

    is_local = True

    def local_path(self, name: str = "") -> Path:
        return self._path(name) if name else Path(self.url)

    def _path(self, name: str) -> Path:
        return Path(self.url, check_name(name))

    def size(self, name: str) -> int:
        path = self._path(name)
        if not path.is_file():
            raise missing(str(path))
        return path.stat().st_size

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        found: list[tuple[str, int]] = []
        below = os.path.join(self.url, upper) if (upper := folder_of(prefix)) else self.url
        for folder, folders, files in os.walk(below, onerror=_unreadable):
            relative = Path(folder).relative_to(self.url).as_posix()
            start = "" if relative == "." else relative + "/"
            folders[:] = [name for name in folders if not name.startswith(".")]
            if linked := [name for name in folders if os.path.islink(os.path.join(folder, name))]:
                log.warning("%s: it is a link to a folder and not followed; name the folder itself",
                            os.path.join(folder, linked[0]))
            for name in files:
                if not name.startswith(".") and (start + name).startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # a link to nothing, or removed just now
                        entry = os.stat(os.path.join(folder, name))
                        found += [(start + name, entry.st_size)] if stat.S_ISREG(entry.st_mode) else []
        return sorted(found)

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        with self.open(name, begin) as stream:
            data = stream.read(end - begin)
        if len(data) != end - begin:
            raise too_short(self.where(name), begin, end)
        return data

    def open(self, name: str, begin: int = 0) -> BinaryIO:
        path = self._path(name)
        if not path.is_file():  # also keeps the reader out of devices and pipes
            raise missing(str(path))
        stream = open(path, "rb", buffering=1 << 20)
        stream.seek(begin)
        return stream

    def write_bytes(self, name: str, data: bytes) -> None:
        with atomic_file(self._path(name), self.scratch()) as stream:
            stream.write(data)

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.stat(local_path).st_dev == path.parent.stat().st_dev:
            with open(local_path, "rb") as stream:
                os.fsync(stream.fileno())
            _replace(local_path, path)
            return
        with open(local_path, "rb") as source, atomic_file(path, self.scratch()) as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        os.unlink(local_path)

    def delete(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def scratch(self) -> Path:
        folder = self.local_path() / _SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        return folder
