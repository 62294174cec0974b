"""What storages over a network have in common: reading in ranges, trying again, streams that fetch ahead.

A file is read in ranges, each a request of its own: where one is lost, that range alone is asked for again, and a file
that was replaced meanwhile is an error, not a mixture of two (stores that give versions). Refusals (403, 404) are final.
The requests themselves are in storage_s3.py and storage_fsspec.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import multiprocessing.util
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from ettin_foundry.data.storage import BLOCK_BYTES, Storage, check_name, folder_of, too_short

__all__ = ["BUSY", "FIRST_DELAY", "TRIES", "RemoteStorage", "brief", "client_of_this_process", "refused"]

log = logging.getLogger(__name__)

TRIES = 5
FIRST_DELAY = 0.5
"""Seconds before the second try, three times as many before each further one; up to half is taken off by chance."""
BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Answers that may be another one a moment later."""

_chance = random.Random()  # its own generator: the global one belongs to whoever seeded it
_scratch_folders: dict[tuple[int, str], Path] = {}
_clients: dict[tuple[int, str], Any] = {}
_clients_lock = threading.Lock()

T = TypeVar("T")


def _after_fork() -> None:
    global _clients_lock
    _clients_lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


def client_of_this_process(key: str, make: Callable[[], Any]) -> Any:
    """The one client for `key` of this process, made on first use: a forked one must not share its parent's connections."""
    with _clients_lock:
        if (os.getpid(), key) not in _clients:
            _clients[os.getpid(), key] = make()
        return _clients[os.getpid(), key]


def brief(error: Exception) -> str:
    """What an error says, without what it says about retries: those of the client are switched off."""
    return str(error).replace(" (reached max retries: 0)", "")[:200]


def refused(place: str, reason: str) -> PermissionError:
    """The error for a store that does not let this user in, to be raised by the caller."""
    return PermissionError(f"{place}: access is refused ({reason}); credentials that may read, write and list it are "
                           "needed (without leave to list, a missing file is refused too). Check them, and the name")


class RemoteStorage(Storage):
    """A storage whose every access is a request that may fail. Subclasses bring the six requests and judge their errors."""

    def stat(self, name: str) -> tuple[int, str | None]:
        """Bytes of a file, and a mark of this version of its content where the store has one."""
        return self.tried(name, lambda: self.request_stat(name))

    def request_stat(self, name: str) -> tuple[int, str | None]:
        raise NotImplementedError

    def request_list(self, prefix: str, after: str | None) -> tuple[list[tuple[str, int]], str | None]:
        """(name, bytes) of some of the files whose name begins with `prefix`, and what to give as `after` for more."""
        raise NotImplementedError

    def request_range(self, name: str, begin: int, end: int, version: str | None) -> bytes:
        raise NotImplementedError

    def request_write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def request_upload(self, path: str, name: str) -> None:
        raise NotImplementedError

    def request_delete(self, name: str) -> None:
        raise NotImplementedError

    def judge(self, error: Exception, place: str) -> Exception | None:
        """The error to raise for a failed request; None where trying again may help."""
        raise NotImplementedError

    def tried(self, name: str, request: Callable[[], T]) -> T:
        """A request's answer, asked for up to `TRIES` times."""
        place = self.where(name)
        for number in range(1, TRIES + 1):
            try:
                return request()
            except Exception as error:
                if final := self.judge(error, place):
                    raise final from (None if final is error else error)
                reason = f"{type(error).__name__}: {brief(error)}"
                if number == TRIES:
                    raise ConnectionError(f"{place}: no answer after {TRIES} tries ({reason}); a store that can be reached "
                                          "is needed. Check the network and the endpoint, then start again") from error
                seconds = FIRST_DELAY * 3 ** (number - 1) * (1 - _chance.random() / 2)
                log.warning("%s: %s; try %d of %d in %.1f s", place, reason, number + 1, TRIES, seconds)
                time.sleep(seconds)
        raise AssertionError("unreachable")

    def size(self, name: str) -> int:
        check_name(name)
        return self.stat(name)[0]

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        folder_of(prefix)
        found, after = [], None
        while True:
            page, after = self.tried(prefix, functools.partial(self.request_list, prefix, after))
            for name, num_bytes in page:
                if name.endswith("/") or any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
                    continue  # markers of folders, and hidden ones
                try:
                    found.append((check_name(name), num_bytes))
                except ValueError as error:
                    log.warning("%s: left out: %s", self.url, error)
            if after is None:
                return sorted(found)

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        return self.read_version(check_name(name), begin, end, None)

    def read_version(self, name: str, begin: int, end: int, version: str | None) -> bytes:
        """The bytes [begin, end) of a file that has not changed since `stat` gave `version`."""
        if begin >= end:
            return b""

        def request() -> bytes:
            data = self.request_range(name, begin, end, version)
            if len(data) == end - begin:
                return data
            if len(data) > end - begin:
                raise OSError(f"{self.where(name)}: the store sends more than the part that was asked for; one that serves "
                              "ranges of bytes is needed. Copy the file to such a one, or to a disk")
            if self.request_stat(name)[0] < end:
                raise too_short(self.where(name), begin, end)
            raise ConnectionError(f"the answer ended after {len(data)} of {end - begin} bytes")

        return self.tried(name, request)

    def open(self, name: str, begin: int = 0) -> BinaryIO:
        blocks = _Blocks(self, check_name(name))
        blocks.seek(begin)
        return io.BufferedReader(blocks, 1 << 20)

    def write_bytes(self, name: str, data: bytes) -> None:
        check_name(name)
        self.tried(name, lambda: self.request_write(name, data))

    def put_file(self, local_path: str | os.PathLike[str], name: str) -> None:
        check_name(name)
        self.tried(name, lambda: self.request_upload(os.fspath(local_path), name))
        os.unlink(local_path)

    def delete(self, name: str) -> None:
        check_name(name)
        with contextlib.suppress(FileNotFoundError):
            self.tried(name, lambda: self.request_delete(name))

    def scratch(self) -> Path:
        key = os.getpid(), self.url
        if key not in _scratch_folders or not _scratch_folders[key].is_dir():
            _scratch_folders[key] = Path(tempfile.mkdtemp(prefix="ettin-"))
            multiprocessing.util.Finalize(None, shutil.rmtree, (_scratch_folders[key], True), exitpriority=0)
        return _scratch_folders[key]


class _Fetch(threading.Thread):
    """One block being fetched. A daemon: the end of the process does not wait for a slow network."""

    def __init__(self, fetch: Callable[[int], bytes], begin: int) -> None:
        super().__init__(name="read-ahead", daemon=True)
        self.fetch, self.begin = fetch, begin
        self.data, self.error = b"", None
        self.start()

    def run(self) -> None:
        try:
            self.data = self.fetch(self.begin)
        except Exception as error:
            self.error = error

    def result(self) -> bytes:
        self.join()
        if self.error:
            raise self.error
        return self.data


class _Blocks(io.RawIOBase):
    """A remote file as a seekable stream, one block held; while it is used the one after it is fetched."""

    def __init__(self, storage: RemoteStorage, name: str) -> None:
        self.storage, self.file = storage, name
        self.num_bytes, self.version = storage.stat(name)
        self.position = 0
        self.block, self.block_begin = b"", 0
        self.ahead: _Fetch | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.num_bytes}[whence]
        self.position = max(0, start + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self.position >= self.num_bytes or not len(view):
            return 0
        if not self.block_begin <= self.position < self.block_begin + len(self.block):
            self._load()
        offset = self.position - self.block_begin
        number = min(len(view), len(self.block) - offset)
        view[:number] = self.block[offset:offset + number]
        self.position += number
        return number

    def _load(self) -> None:
        """Takes the block that begins at the position, and asks for the next one when reading goes straight on."""
        begin, ahead = self.position, self.ahead
        straight = begin == self.block_begin + len(self.block)
        self.block = ahead.result() if ahead and ahead.begin == begin else self._fetch(begin)
        self.block_begin, self.ahead = begin, None
        after = begin + len(self.block)
        if straight and after < self.num_bytes:
            self.ahead = _Fetch(self._fetch, after)

    def _fetch(self, begin: int) -> bytes:
        return self.storage.read_version(self.file, begin, min(begin + BLOCK_BYTES, self.num_bytes), self.version)

    def close(self) -> None:
        self.block, self.ahead = b"", None
        super().close()
