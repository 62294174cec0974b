"""One small interface over local folders, S3 (through boto3) and whatever fsspec reaches: names in, bytes out.

Writing is atomic: a name is either absent or whole. What fails because of a network is tried again for minutes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import multiprocessing.util
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import fsspec
from fsspec.spec import AbstractBufferedFile

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20  # read at a time from a network
_PAUSES = (1, 2, 4, 8, 15, 30, *[60] * 9)  # seconds between tries, ten minutes in all: most outages are shorter
_SIZE = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([kmgt]?)b?", re.IGNORECASE)
# what git-lfs (also by its first name) and git-annex leave in place of a file that was not downloaded
_POINTERS = (b"version https://git-lfs.github.com/", b"version https://hawser.github.com/", b"/annex/objects/")


def parse_bytes(key: str, value: Any) -> int | None:
    """A number of bytes given as an integer or as text such as "200gb" (1 gb = 2**30); None stays None."""
    if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        value = int(float(match[1].replace("_", "")) * 1024 ** " kmgt".index(match[2].lower() or " "))
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"{key} must be a number of bytes, as an integer or a text such as 200gb, got {value!r}")
    return value


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
    return RemoteStorage(os.fspath(place)) if is_url(place) else Storage(join(place))


def check_name(name: str) -> str:
    """The name, if it is relative and stays inside the folder; else ValueError."""
    if "\0" in name or not all(part not in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"file name {name!r:.200} must be a plain name inside the folder, without '.', '..' or '//'")
    return name


def _no_pointer(stream: io.BufferedReader, where: str) -> io.BufferedReader:
    """The stream; closes it and raises ValueError where the file, by its first bytes, only stands for the real one."""
    if stream.peek(64).startswith(_POINTERS):
        stream.close()
        raise ValueError(f"{where} must be the file itself, got a pointer of git-lfs or git-annex to it; run git lfs "
                         "pull (git annex get) in the clone that it comes from")
    return stream


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A hidden file beside `path`, open for writing, renamed to `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name[:100]}.{uuid.uuid4().hex[:16]}.partial"
    try:
        with open(partial, "xb") as stream:
            yield stream
        _place(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` when the block ends; if anything fails, the old one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new, earlier = Path(beside, "new"), Path(beside, "earlier")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(earlier)
        try:
            new.rename(folder)
        finally:
            if earlier.exists() and not folder.exists():
                earlier.rename(folder)


def _place(source: str | os.PathLike[str], target: Path) -> None:
    """Renames a file so that content and name survive a power cut."""
    with open(source, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        return self._path(name, existing=True).stat().st_size

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name; folders do not count."""
        with contextlib.suppress(FileNotFoundError):
            return self.size(name) >= 0
        return False

    def list(self, folder: str = "") -> list[tuple[str, int]]:
        """(name, bytes) of every file, of all or of those in a folder such as "units/", in the order of names."""
        def unreadable(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # what cannot be listed is an error, not an empty folder
                raise error

        found: list[tuple[str, int]] = []
        top = self._path(folder.removesuffix("/")) if folder else self.url
        for place, folders, files in os.walk(top, onerror=unreadable):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (os.path.join(place, name) for name in (*folders, *files) if not name.startswith(".")):
                if os.path.isfile(path):
                    with contextlib.suppress(FileNotFoundError):  # removed just now
                        found.append((os.path.relpath(path, self.url), os.path.getsize(path)))
                elif os.path.islink(path):
                    log.warning("%s: is a link to %s and left out; put the files themselves there", path,
                                "a folder" if os.path.isdir(path) else "nothing")
        return sorted(found)

    def open(self, name: str) -> BinaryIO:
        """A seekable stream of a file's bytes, to be closed; ValueError where it holds a pointer of git-lfs instead."""
        return _no_pointer(io.BufferedReader(io.FileIO(self._path(name, existing=True)), 1 << 20), self.where(name))

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
            wanted = f"at most {at_most}" if num_bytes is None else num_bytes
            raise ValueError(f"{self.where(name)} must have {wanted} bytes, got {found}; upload or convert it again")
        return found

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file, or replaces one, atomically."""
        partial = self.scratch() / f"{uuid.uuid4().hex}.partial"
        try:
            partial.write_bytes(data)
            self.put_file(partial, name)
        finally:
            partial.unlink(missing_ok=True)

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        """Moves a file made in `scratch()` into place atomically; it is gone from where it was."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _place(local_path, path)

    def delete(self, name: str) -> None:
        """Removes a file; a missing one is fine."""
        self._path(name).unlink(missing_ok=True)

    def scratch(self) -> Path:
        """A local folder for temporary files: inside the storage where that is local, else one for this process."""
        folder = Path(self.url, ".scratch")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class RemoteStorage(Storage):
    """A bucket or a folder of one, or a folder of a file system that fsspec knows."""

    is_local = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        scheme = self.url.partition("://")[0]
        try:
            if scheme != "s3":  # our own
                fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: {scheme}:// cannot be read here ({error}); install its driver of fsspec (gs:// "
                             "needs gcsfs, az:// adlfs)") from error

    def ask(self, name: str, do: Callable[[Any, str], Any], *, afresh: bool = True) -> Any:
        """What `do` returns for the client of this process and a file's path; errors are Python's own, see Storage."""
        for pause in (*_PAUSES, None):
            try:
                system, root = _client(self.url, os.getpid(), os.environ.get("S3_ENDPOINT_URL"))
                if afresh:
                    system.invalidate_cache()
                return do(system, f"{root}/{name}" if name else root)
            except Exception as raised:
                error = _own_error(raised, self.where(name))
                if pause is None or not isinstance(error, ConnectionError):
                    raise error from (None if error is raised else raised)
                log.warning("%s; tried again in %d s, for ten minutes in all", error, pause)
                time.sleep(pause)

    def _info(self, name: str) -> dict[str, Any]:
        info = self.ask(check_name(name), lambda system, path: system.info(path))
        if info.get("type") == "directory":
            raise FileNotFoundError(f"{self.where(name)}: no such file")
        return info

    def size(self, name: str) -> int:
        return int(self._info(name)["size"])

    def open(self, name: str) -> BinaryIO:
        info = self._info(name)
        raw: Any = _RemoteFile(self, name, cache_type="none", size=info["size"], pinned=info.get("pinned", {}))
        stream = io.BufferedReader(raw, _BLOCK_BYTES)
        return _no_pointer(stream, self.where(name)) if info["size"] < 1024 else stream

    def list(self, folder: str = "") -> list[tuple[str, int]]:
        found, folder = [], check_name(folder.removesuffix("/")) if folder else ""
        try:
            top, paths = self.ask(folder, lambda system, path: (path, system.find(path, detail=True)))
        except FileNotFoundError:
            return []
        for path, info in paths.items():
            name = f"{folder}/".removeprefix("/") + path.removeprefix(top).removeprefix("/")
            hidden = any(part.startswith(".") and part.strip(".") for part in name.split("/"))
            try:
                if not name.endswith("/") and not hidden:
                    found.append((check_name(name), int(info["size"])))
            except ValueError as error:
                log.warning("%s: left out: %s", self.url, error)
        return sorted(found)

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        self.ask(check_name(name), lambda system, path: system.put_file(os.fspath(local_path), path))
        os.unlink(local_path)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.ask(check_name(name), lambda system, path: system.rm_file(path))

    def scratch(self) -> Path:
        # multiprocessing removes its folder when the process that made it ends
        folder = Path(multiprocessing.util.get_temp_dir(), f"{os.getpid()}-{abs(hash(self.url))}")
        folder.mkdir(exist_ok=True)
        return folder


class _RemoteFile(AbstractBufferedFile):
    """A remote file, read in ranges; `fs` is its storage."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)

        def read(system: Any, path: str) -> bytes:
            data = system.cat_file(path, start=start, end=end, **self.kwargs["pinned"])
            if len(data) != end - start:
                raise ConnectionError(f"{len(data)} bytes came instead of the {end - start} from byte {start} on")
            return data

        return self.fs.ask(self.path, read, afresh=False)


@functools.lru_cache(maxsize=64)
def _client(url: str, process: int, endpoint: str | None) -> tuple[Any, str]:
    """The client of this process for a URL, and the folder as it writes it; forked processes share no connections."""
    if url.startswith("s3://"):
        return _S3(endpoint), url[len("s3://"):]
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return system, root.rstrip("/")


def _own_error(error: Any, place: str) -> Exception:
    """Python's own error for what a client raised, with the place; ConnectionError for what may pass by itself."""
    response = getattr(error, "response", None)  # boto3's is a dictionary
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else \
        getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", None)
    kind = type(error).__name__
    if isinstance(error, (FileNotFoundError, IsADirectoryError)) or status == 404:
        return FileNotFoundError(f"{place}: no such file")
    if isinstance(error, PermissionError) or status in (401, 403) or kind == "NoCredentialsError":
        return PermissionError(f"{place}: access is refused ({error}); see the credentials, and their right to list")
    if isinstance(error, NotImplementedError) or re.match("ParamVal|Invalid|No[A-Z]|Unknown", kind) or \
            isinstance(status, int) and status < 500 and status not in (408, 429):
        return OSError(f"{place}: the store refuses this ({error}); see URL, region and S3_ENDPOINT_URL")
    if type(error).__module__ == "builtins" and not isinstance(error, (ConnectionError, TimeoutError)):
        return error  # of the disk, or a mistake here
    return ConnectionError(f"{place}: {kind}: {error}; see the network and the endpoint")


class _S3:
    """What `RemoteStorage` asks of a file system of fsspec, through boto3; paths are BUCKET/KEY."""

    invalidate_cache = staticmethod(lambda: None)  # there is none

    def __init__(self, endpoint: str | None) -> None:
        import boto3
        import botocore.config

        session = boto3.Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": botocore.UNSIGNED}
        # the standard mode gives up at once when its quota of retries is used up, which a shaky network does
        options |= {"retries": {"mode": "legacy", "total_max_attempts": 3}, "connect_timeout": 10}
        config = botocore.config.Config(**options)
        self.client = session.client("s3", endpoint_url=endpoint or None, config=config)  # Streaming's variable

    @staticmethod
    def _key(path: str) -> dict[str, str]:
        return dict(zip(("Bucket", "Key"), path.split("/", 1)))

    def info(self, path: str) -> dict[str, Any]:
        answer = self.client.head_object(**self._key(path))
        return {"size": answer["ContentLength"], "pinned": {"IfMatch": answer["ETag"]}}

    def find(self, path: str, **_: Any) -> dict[str, dict[str, Any]]:
        bucket, prefix = f"{path}/".split("/", 1)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = (entry for page in pages for entry in page.get("Contents", ()))
        return {f"{bucket}/{entry['Key']}": {"size": entry["Size"]} for entry in found}

    def cat_file(self, path: str, start: int, end: int, **pinned: str) -> bytes:
        """A range of an object; an error where it is not the pinned one, so that two versions are never mixed."""
        return self.client.get_object(**self._key(path), Range=f"bytes={start}-{end - 1}", **pinned)["Body"].read()

    def put_file(self, lpath: str, rpath: str) -> None:
        with open(lpath, "rb") as body:  # up to 5 GiB; a shard has at most four
            self.client.put_object(**self._key(rpath), Body=body)

    def rm_file(self, path: str) -> None:
        self.client.delete_object(**self._key(path))
