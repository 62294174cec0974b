"""Storage in whatever else fsspec has a driver for: gs://, hf://, az://, sftp://, ..."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ettin_foundry.data.storage import folder_of, missing
from ettin_foundry.data.storage_remote import BUSY, RemoteStorage, brief, client_of_this_process, refused

__all__ = ["FsspecStorage"]

_RENAMING = {"sftp", "ssh", "hdfs", "arrow_hdfs", "webhdfs", "smb", "ftp", "dbfs", "webdav"}
"""Schemes of true file systems: what is being written there can be seen, so it is written elsewhere and renamed."""


class FsspecStorage(RemoteStorage):
    """A folder of a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.scheme = self.url.partition("://")[0].lower()
        import fsspec

        try:
            if "::" in url:
                raise ValueError("chained URLs are not read")
            fsspec.get_filesystem_class(self.scheme)
        except (ImportError, ValueError) as error:
            raise ValueError(f"{url}: {self.scheme}:// cannot be read here ({error}); local paths, s3:// and what fsspec "
                             "has an installed driver for can. Install the driver (gs:// needs gcsfs, az:// adlfs), or copy "
                             "the files") from error

    def _system(self, *, fresh: bool = False) -> tuple[Any, str]:
        """The file system of this process, and the folder as it writes it. `fresh`: nothing it remembers counts."""
        from fsspec.core import url_to_fs

        system, root = client_of_this_process(self.url, lambda: url_to_fs(self.url, skip_instance_cache=True))
        if fresh:
            system.invalidate_cache()
        return system, root.rstrip("/")

    def request_stat(self, name: str) -> tuple[int, str | None]:
        system, root = self._system(fresh=True)
        info = system.info(f"{root}/{name}")
        if info.get("type") == "directory":
            raise FileNotFoundError(name)
        return self._size(name, info), None

    def _size(self, name: str, info: dict[str, Any]) -> int:
        if info.get("size") is None:
            raise OSError(f"{self.where(name)}: the store does not tell its size; a file of known size is needed. Copy it "
                          "to a disk or bucket")
        return int(info["size"])

    def request_list(self, prefix: str, after: str | None) -> tuple[list[tuple[str, int]], str | None]:
        system, root = self._system(fresh=True)
        upper = folder_of(prefix)
        try:
            found = system.find(f"{root}/{upper}" if upper else root, detail=True)
        except FileNotFoundError:
            return [], None
        names = [(path[len(root) + 1:], info) for path, info in found.items() if path.startswith(root + "/")]
        return [(name, self._size(name, info)) for name, info in names if name.startswith(prefix)], None

    def request_range(self, name: str, begin: int, end: int, version: str | None) -> bytes:
        system, root = self._system()
        return system.cat_file(f"{root}/{name}", start=begin, end=end)

    def request_write(self, name: str, data: bytes) -> None:
        self._place(name, lambda system, path: system.pipe_file(path, data))

    def request_upload(self, path: str, name: str) -> None:
        self._place(name, lambda system, target: system.put_file(path, target))

    def _place(self, name: str, write: Callable[[Any, str], Any]) -> None:
        system, root = self._system()
        path = f"{root}/{name}"
        if self.scheme not in _RENAMING:  # object stores show a file when it is whole
            write(system, path)
            return
        folder, _, last = path.rpartition("/")
        system.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.{last}.{os.urandom(8).hex()}.partial"
        write(system, partial)
        system.mv(partial, path)

    def request_delete(self, name: str) -> None:
        system, root = self._system()
        system.rm_file(f"{root}/{name}")

    def judge(self, error: Exception, place: str) -> Exception | None:
        status = getattr(error, "status", None) or getattr(error, "code", None)
        status = status or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError) or status == 404:
            return missing(place)
        if isinstance(error, PermissionError) or status in (401, 403):
            return refused(place, brief(error))
        if isinstance(error, (ConnectionError, TimeoutError)) or status in BUSY:
            return None
        if isinstance(error, NotImplementedError):
            return OSError(f"{place}: {self.scheme}:// does not allow this; a store that can be read, written and listed is "
                           "needed. Name another")
        if isinstance(error, (OSError, ValueError, TypeError, ImportError)) and not status:
            known = type(error).__module__ == "builtins"  # a driver's own kind of OSError is a client's trouble
            return error if known else None
        return None
