"""Storage elsewhere: S3 through boto3, which Streaming brings, the rest through drivers of fsspec.

What fails because of the network is tried again for minutes. storage.py says what the methods promise.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import multiprocessing.util
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ettin_foundry.data.storage import Storage, check_name, folder_of

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20  # asked for ahead of need from a network
_PART_BYTES = 64 << 20  # larger files go to S3 in parts of this size
_PAUSES = (1, 2, 4, 8, 15, 30, *[60] * 9)  # seconds between tries, ten minutes in all: most outages are shorter


class RemoteStorage(Storage):
    """A bucket or a folder of one, or a folder of a file system that fsspec knows."""

    is_local = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        scheme, _, rest = self.url.partition("://")
        if scheme == "s3":
            if not re.match("[^/]", rest):
                raise ValueError(f"{url} must be s3://BUCKET or s3://BUCKET/FOLDER")
            return
        try:
            if "::" in url:
                raise ValueError("chained URLs are not read")
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: {scheme}:// cannot be read here ({error}); install its driver of fsspec (gs:// "
                             "needs gcsfs, az:// adlfs)") from error

    def ask(self, name: str, do: Callable[[Any, str], Any]) -> Any:
        """What `do` returns for the client of this process and a file's path; errors are Python's own, see Storage."""
        for pause in (*_PAUSES, None):
            system, root = _client(self.url, os.getpid(), os.environ.get("S3_ENDPOINT_URL"))
            system.invalidate_cache()
            try:
                return do(system, f"{root}/{name}" if name else root)
            except Exception as raised:
                error = _own_error(raised, self.where(name))
                if pause is None or not isinstance(error, ConnectionError):
                    raise error from (None if error is raised else raised)
                log.warning("%s; tried again in %d s, for ten minutes in all", error, pause)
                time.sleep(pause)

    def size(self, name: str) -> int:
        def size(system: Any, path: str) -> int:
            info = system.info(path)
            if info.get("type") == "directory":
                raise FileNotFoundError
            return int(info["size"])

        return self.ask(check_name(name), size)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        def find(system: Any, path: str) -> tuple[str, dict[str, Any]]:
            root = path.removesuffix(above).rstrip("/") + "/"
            options = {"start": root + prefix} if isinstance(system, _S3) else {}
            with contextlib.suppress(FileNotFoundError):
                return root, system.find(path, detail=True, **options)
            return root, {}

        found, above = [], folder_of(prefix)
        root, paths = self.ask(above, find)
        for path, info in paths.items():
            name = path.removeprefix(root)
            hidden = any(part.startswith(".") and part.strip(".") for part in name.split("/"))
            try:
                if name.startswith(prefix) and not name.endswith("/") and not hidden:
                    found.append((check_name(name), int(info["size"])))
            except ValueError as error:
                log.warning("%s: left out: %s", self.url, error)
        return sorted(found)

    def _open(self, name: str, num_bytes: int) -> io.RawIOBase:
        return _Stream(self, name, num_bytes)

    def write_bytes(self, name: str, data: bytes) -> None:
        self.ask(check_name(name), lambda system, path: system.pipe_file(path, data))

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


class _Stream(io.RawIOBase):
    """A file of `num_bytes`, opened again where reading broke; one that is replaced meanwhile is an error."""

    def __init__(self, storage: RemoteStorage, name: str, num_bytes: int) -> None:
        self._storage, self._name, self._end = storage, name, num_bytes
        self._at, self._file, self._version = 0, None, None

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._end)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        def read(system: Any, path: str) -> bytes:
            file = self._file or system.open(path, "rb", block_size=_BLOCK_BYTES)
            self._file, version = None, getattr(file, "details", {}).get("ETag")
            if version != (self._version or version):
                raise OSError(f"{self._storage.where(self._name)}: was replaced while it was read; read it again")
            if file.tell() != self._at:
                file.seek(self._at)
            if not (data := file.read(len(buffer))):
                raise ConnectionError(f"the answer ends at byte {self._at} of {self._end}")
            self._file, self._version = file, version
            return data

        data = self._storage.ask(self._name, read) if self._at < self._end else b""
        buffer[:len(data)] = data
        self._at += len(data)
        return len(data)


@functools.lru_cache(maxsize=64)
def _client(url: str, process: int, endpoint: str | None) -> tuple[AbstractFileSystem, str]:
    """The client of this process for a URL, and the folder as it writes it; forked processes share no connections."""
    if url.startswith("s3://"):
        return _S3(endpoint), url[len("s3://"):]
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return system, root.rstrip("/")


def _own_error(error: Any, place: str) -> Exception:
    """Python's own error for what a client raised, naming the place; ConnectionError for what may pass by itself."""
    cause = error.__context__ if type(error).__name__ == "S3UploadFailedError" else error
    response = getattr(cause, "response", None)  # boto3's is a dictionary
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else \
        getattr(response, "status_code", None) or getattr(cause, "status", None) or getattr(cause, "code", None)
    if isinstance(cause, (FileNotFoundError, IsADirectoryError)) or status == 404:
        return FileNotFoundError(f"{place}: no such file")
    if isinstance(cause, PermissionError) or status in (401, 403) or type(cause).__name__ == "NoCredentialsError":
        return PermissionError(f"{place}: access is refused ({cause}); see the credentials, and their right to list")
    if isinstance(cause, NotImplementedError) or isinstance(status, int) and status < 500 and status not in (408, 429):
        return OSError(f"{place}: the store refuses this ({cause}); see URL, region and S3_ENDPOINT_URL")
    if type(cause).__module__ == "builtins" and not isinstance(cause, (ConnectionError, TimeoutError)):
        return cause  # of the disk, or a mistake here
    return ConnectionError(f"{place}: {type(cause).__name__}: {cause}; see the network and the endpoint")


class _S3(AbstractFileSystem):
    """The calls that `RemoteStorage` makes, through boto3; paths are BUCKET/KEY."""

    cachable = False

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(use_listings_cache=False)
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        session = Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        # the standard mode gives up at once when its quota of retries is used up, which a shaky network does
        config = Config(retries={"mode": "legacy", "total_max_attempts": 3}, connect_timeout=10, **options)
        self.client = session.client("s3", endpoint_url=endpoint or None, config=config)  # Streaming's variable

    @staticmethod
    def _key(path: str) -> dict[str, str]:
        return dict(zip(("Bucket", "Key"), path.split("/", 1)))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        head = self.client.head_object(**self._key(path))
        return {"name": path, "type": "file", "size": head["ContentLength"], "ETag": head["ETag"]}

    def find(self, path: str, *, start: str = "", **_: Any) -> dict[str, dict[str, Any]]:
        bucket, prefix = start.partition("/")[::2]
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = (entry for page in pages for entry in page.get("Contents", ()))
        return {f"{bucket}/{entry['Key']}": {"size": entry["Size"]} for entry in found}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> AbstractBufferedFile:
        return _S3File(self, path, mode, **options)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        self.client.put_object(**self._key(path), Body=value)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, use_threads=False)
        self.client.upload_file(lpath, *self._key(rpath).values(), Config=config)

    def rm_file(self, path: str) -> None:
        self.client.delete_object(**self._key(path))


class _S3File(AbstractBufferedFile):
    """An object, read in blocks."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        asked = {**self.fs._key(self.path), "Range": f"bytes={start}-{end - 1}", "IfMatch": self.details["ETag"]}
        return self.fs.client.get_object(**asked)["Body"].read()
