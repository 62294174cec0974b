"""One small interface over local folders, S3 and whatever fsspec reaches: names in, bytes out.

The rest of the package does not ask whether a folder lies on a disk or in a bucket (storage_remote.py). Writing is
atomic: a name is either absent or whole.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO

log = logging.getLogger(__name__)

# what git-lfs (also by its first name) and git-annex leave in place of a file that was not downloaded
_POINTERS = (b"version https://git-lfs.github.com/", b"version https://hawser.github.com/", b"/annex/objects/")


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a place is reached through a network client; `file://` writes a path."""
    return bool(re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(text)))


def join(base: str | os.PathLike[str], *names: str) -> str:
    """A place below a folder or URL."""
    base = os.fspath(base)
    return "/".join([base.rstrip("/"), *names]) if is_url(base) else os.path.join(base.removeprefix("file://"), *names)


def open_storage(place: str | os.PathLike[str]) -> Storage:
    """The storage of a folder or URL, which need not exist; ValueError for a URL that cannot be read here."""
    if not os.fspath(place):
        raise ValueError("a place of files must be a folder or URL, got an empty text")
    if not is_url(place):
        return Storage(join(place))
    from ettin_foundry.data.storage_remote import RemoteStorage  # here: fsspec takes 0.1 s to import

    return RemoteStorage(os.fspath(place))


def check_name(name: str) -> str:
    """The name, if it is relative and stays inside the folder; else ValueError."""
    if "\0" in name or not all(part not in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"file name {name!r:.200} must be a plain name inside the folder, without '.', '..' or '//'")
    return name


def refuse_pointer(head: bytes, where: str | os.PathLike[str], close: Callable[[], None]) -> None:
    """Closes the file and raises ValueError where a small file, by its first bytes, only stands for the real one."""
    if head.startswith(_POINTERS):
        close()
        raise ValueError(f"{where} must be the file itself, got a pointer of git-lfs or git-annex to it; run git lfs "
                         "pull (git annex get) in the clone that it comes from")


def folder_of(prefix: str) -> str:
    """The folder that names beginning with `prefix` are in; empty for the folder of the storage itself."""
    upper, slash, _ = prefix.rpartition("/")
    return check_name(upper) if slash else ""


@contextlib.contextmanager
def atomic_file(path: Path, folder: Path | None = None) -> Iterator[IO[bytes]]:
    """A hidden file in `folder` (default: beside `path`), open for writing, renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = (folder or path.parent) / f".{path.name[:100]}.{uuid.uuid4().hex[:16]}.partial"
    try:
        with open(partial, "xb") as stream:
            yield stream
        _place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _place(source: str | os.PathLike[str], target: Path) -> None:
    """Renames a file so that content and name survive a power cut."""
    with open(source, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Storage:
    """A folder of this machine, or (`RemoteStorage`) elsewhere. Instances hold no connection and can be pickled.

    Names are relative, divided by slashes; hidden ones (a part starts with a dot) are read and written like others but
    never listed. Every method raises ValueError for a name that is not plain, FileNotFoundError for a missing one,
    PermissionError where access is refused, ConnectionError when a network fails for minutes, OSError for the rest.
    """

    is_local = True

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or url

    def where(self, name: str) -> str:
        """How a file is called in messages."""
        return join(self.url, name)

    def _path(self, name: str, *, existing: bool = False) -> Path:
        path = Path(self.url, check_name(name))
        if existing and not path.is_file():  # also keeps the reader out of devices and pipes
            raise FileNotFoundError(f"{path}: no such file")
        return path

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._path(name, existing=True).stat().st_size

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; folders do not count."""
        with contextlib.suppress(FileNotFoundError):
            return self.size(name) >= 0
        return False

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(name, bytes) of every file whose name begins with `prefix`, in the order of names."""
        def unreadable(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # what cannot be listed is an error, not an empty folder
                raise error

        found: list[tuple[str, int]] = []
        for folder, folders, files in os.walk(os.path.join(self.url, folder_of(prefix)), onerror=unreadable):
            start = os.path.relpath(folder, self.url)
            start = "" if start == "." else start + "/"
            folders[:] = [name for name in folders if not name.startswith(".")]
            for link in filter(os.path.islink, (os.path.join(folder, name) for name in folders)):
                log.warning("%s: is a link to a folder and not followed; name the folder itself", link)
            for name in files:
                path = os.path.join(folder, name)
                if name.startswith(".") or not (start + name).startswith(prefix):
                    continue
                try:
                    entry = os.stat(path)
                    found += [(start + name, entry.st_size)] if stat.S_ISREG(entry.st_mode) else []
                except FileNotFoundError:  # else removed just now
                    if os.path.islink(path):
                        log.warning("%s: is a link to nothing and left out; fetch the file, or remove the link", path)
        return sorted(found)

    def open(self, name: str) -> BinaryIO:
        """A seekable stream of a file's bytes, to be closed; ValueError where it holds a pointer of git-lfs instead."""
        size = self.size(name)
        stream = io.BufferedReader(self._open(name, size), 1 << 20)
        if size < 1024:
            refuse_pointer(stream.peek(64), self.where(name), stream.close)
        return stream

    def _open(self, name: str, num_bytes: int) -> io.RawIOBase:
        return io.FileIO(self._path(name))

    def read_bytes(self, name: str, *, at_most: int | None = None) -> bytes:
        """A whole file; ValueError when it is larger than `at_most` bytes."""
        size = self._check_size(name, None, at_most)
        with self.open(name) as stream:
            return stream.read(size)

    def get_file(self, name: str, local_path: str | os.PathLike[str], *, num_bytes: int | None = None,
                 at_most: int | None = None) -> None:
        """Copies a file to `local_path`, atomically; ValueError if it has not `num_bytes`, or more than `at_most`."""
        self._check_size(name, num_bytes, at_most)
        with self.open(name) as source, atomic_file(Path(local_path)) as stream:
            shutil.copyfileobj(source, stream, 1 << 20)

    def _check_size(self, name: str, num_bytes: int | None, at_most: int | None) -> int:
        found = self.size(name)
        if num_bytes not in (None, found) or found > (at_most or found):
            self.open(name).close()
            wanted = f"at most {at_most}" if num_bytes is None else num_bytes
            raise ValueError(f"{self.where(name)} must have {wanted} bytes, got {found}; upload or convert it again")
        return found

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces one, atomically."""
        with atomic_file(self._path(name), self.scratch()) as stream:
            stream.write(data)

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        """Moves a local file into place atomically; it is gone from where it was. Cheapest from `scratch()`."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.stat(local_path).st_dev == path.parent.stat().st_dev:
            return _place(local_path, path)
        with open(local_path, "rb") as source, atomic_file(path, self.scratch()) as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        os.unlink(local_path)

    def delete(self, name: str) -> None:
        """Removes a file; a missing one is fine."""
        self._path(name).unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A local folder for temporary files: inside the storage where that is local, else one for this process."""
        folder = Path(self.url, ".scratch")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
