"""The storage of buckets and of what fsspec reaches: S3 through boto3, which Streaming brings, the rest through drivers.

Both try requests again. storage.py says what the methods promise.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import multiprocessing.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from ettin_foundry.data.storage import Storage, check_name, folder_of

log = logging.getLogger(__name__)

_BLOCK_BYTES = 8 << 20  # asked for ahead of need from a network
_PART_BYTES = 64 << 20  # larger files go to S3 in parts of this size
_TRIES = 5


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

    @contextlib.contextmanager
    def _at(self, name: str) -> Iterator[tuple[Any, str]]:
        """The client of this process, which is to remember nothing, and a file's path; errors become Python's own."""
        system, root = _client(self.url, os.getpid(), os.environ.get("S3_ENDPOINT_URL"))
        system.invalidate_cache()
        with _errors(self.where(name)):
            yield system, f"{root}/{name}" if name else root

    def size(self, name: str) -> int:
        with self._at(check_name(name)) as (system, path):
            info = system.info(path)
            if info.get("type") == "directory":
                raise FileNotFoundError
            return int(info["size"])

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        found, above = [], folder_of(prefix)
        with self._at(above) as (system, path):
            root = path.removesuffix(above).rstrip("/") + "/"
            try:
                paths = system.find(path, detail=True, **({"start": root + prefix} if isinstance(system, _S3) else {}))
            except FileNotFoundError:
                paths = {}
        for path, info in paths.items():
            name = path.removeprefix(root)
            hidden = any(part.startswith(".") and part.strip(".") for part in name.split("/"))
            try:
                if name.startswith(prefix) and not name.endswith("/") and not hidden:
                    found.append((check_name(name), int(info["size"])))
            except ValueError as error:
                log.warning("%s: left out: %s", self.url, error)
        return sorted(found)

    def open(self, name: str) -> BinaryIO:
        with self._at(check_name(name)) as (system, path):
            return io.BufferedReader(system.open(path, "rb", block_size=_BLOCK_BYTES), 1 << 20)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self._at(check_name(name)) as (system, path):
            system.pipe_file(path, data)

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        with self._at(check_name(name)) as (system, path):
            system.put_file(os.fspath(local_path), path)
        os.unlink(local_path)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._at(check_name(name)) as (system, path):
            system.rm_file(path)

    def scratch(self) -> Path:
        # multiprocessing removes its folder when the process that made it ends
        folder = Path(multiprocessing.util.get_temp_dir(), f"{os.getpid()}-{abs(hash(self.url))}")
        folder.mkdir(exist_ok=True)
        return folder


@functools.lru_cache(maxsize=64)
def _client(url: str, process: int, endpoint: str | None) -> tuple[AbstractFileSystem, str]:
    """The client of this process for a URL, and the folder as it writes it; forked processes share no connections."""
    if url.startswith("s3://"):
        return _S3(endpoint), url[len("s3://"):]
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    return system, root.rstrip("/")


@contextlib.contextmanager
def _errors(place: str) -> Iterator[None]:
    """Turns what clients raise into Python's own errors, which name the place."""
    try:
        yield
    except Exception as error:
        cause: Any = error.__context__ if type(error).__name__ == "S3UploadFailedError" else error
        response = getattr(cause, "response", None)  # boto3's is a dictionary
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else \
            getattr(response, "status_code", None) or getattr(cause, "status", None) or getattr(cause, "code", None)
        if isinstance(cause, (FileNotFoundError, IsADirectoryError)) or status == 404:
            raise FileNotFoundError(f"{place}: no such file") from error
        if isinstance(cause, PermissionError) or status in (401, 403) or type(cause).__name__ == "NoCredentialsError":
            raise PermissionError(f"{place}: access is refused ({cause}); credentials that may read, write and list it are "
                                  "needed") from error
        if isinstance(cause, NotImplementedError) or (isinstance(status, int) and status < 500):
            raise OSError(f"{place}: the store refuses this ({cause}); see URL, region and S3_ENDPOINT_URL") from error
        if isinstance(cause, (OSError, ValueError)) and type(cause).__module__ == "builtins":
            raise
        raise ConnectionError(f"{place}: {type(cause).__name__}: {cause}; see the network and the endpoint") from error


class _S3(AbstractFileSystem):
    """The calls that `RemoteStorage` makes, through boto3; paths are BUCKET/KEY. boto3 tries requests again itself."""

    cachable = False

    def __init__(self, endpoint: str | None) -> None:
        super().__init__(use_listings_cache=False)
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        session = Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        # the standard mode gives up at once when its quota of retries is used up, which a shaky network does
        config = Config(retries={"mode": "legacy", "total_max_attempts": _TRIES}, connect_timeout=10, **options)
        self.client = session.client("s3", endpoint_url=endpoint or None, config=config)  # Streaming's variable

    @staticmethod
    def _key(path: str) -> dict[str, str]:
        return dict(zip(("Bucket", "Key"), path.split("/", 1)))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        head = self.client.head_object(**self._key(path))
        return {"name": path, "type": "file", "size": head["ContentLength"], "version": head["ETag"]}

    def find(self, path: str, *, start: str = "", **_: Any) -> dict[str, dict[str, Any]]:
        bucket, prefix = start.partition("/")[::2]
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {f"{bucket}/{entry['Key']}": {"size": entry["Size"]} for page in pages for entry in page.get("Contents", ())}

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
    """An object as a seekable stream. One that is replaced while it is read is an error, not a mixture of two."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        asked = {**self.fs._key(self.path), "Range": f"bytes={start}-{end - 1}", "IfMatch": self.details["version"]}
        for number in range(1, _TRIES + 1):
            with _errors(f"s3://{self.path}"):
                answer = self.fs.client.get_object(**asked)
            try:
                return answer["Body"].read()
            except Exception as error:  # lost in the middle of an answer, where boto3 does not try again
                log.warning("s3://%s: %s: %s; try %d of %d", self.path, type(error).__name__, error, number, _TRIES)
        raise ConnectionError(f"s3://{self.path}: no whole answer in {_TRIES} tries")
