"""A split's shards on this node: fetched or expanded once, ahead of need.

The raw shards that training maps lie in the split's local folder. Where they come from is decided here: from a remote
folder or URL, or from packed shards beside them. All processes of a node share the folder: one makes a shard while the
others wait for it or make another (shard_cache.py has the locks and the limit). A file gets its name only when it is whole
and of the stated hash; what is not is fetched once more, then it is an error.

Not here: what is in the files (shard_format.py), transport and its retries (storage.py), a remote set's small files
(remote.py), which shards are needed (order.py), what happens without a shard (mds.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ettin_foundry.data.cache import CACHE, FETCHED, Room, locked, own_folder
from ettin_foundry.data.manifest import refuse
from ettin_foundry.data.shards import expand, map_file
from ettin_foundry.data.storage import open_storage

__all__ = ["ShardFiles"]

log = logging.getLogger(__name__)

_PATIENCE = 600.0  # seconds that a needed shard waits for room before the run stops
_POLL = 0.1
_IDLE = 0.5  # seconds between looks for room ahead of need


class ShardFiles:
    """The raw shards of one split folder, made when they are needed or shortly before.

    Safe to pickle and to inherit through fork.

    Args:
        local: the split's folder. shards: the manifest's entries.
        remote: folder or URL of the same split, or None.
        cache_limit: most bytes that shards (whole and partial, this node's processes together) may take in `local`.

    Attributes:
        fetches: shards have to be made; otherwise nothing here does anything.

    Raises:
        ValueError: the limit has no effect, is below one shard, or would delete a set that was not fetched.
    """

    def __init__(self, local: Path, shards: Sequence[dict[str, Any]], *, remote: str | None,
                 cache_limit: int | None) -> None:
        self.local, self.cache_limit, self._shards = local, cache_limit, shards
        self._storage = None if remote is None else open_storage(remote)
        self.fetches = remote is not None or shards[0]["zip"] is not None
        self._cache = local / CACHE
        self._numbers = {shard["raw"]["basename"]: number for number, shard in enumerate(shards)}
        self._ahead: _Ahead | None = None
        self._room = None
        if cache_limit is None:
            return
        self._room = Room(local, cache_limit, self._can_go)
        if not self.fetches:
            raise ValueError(f"dataset.cache_limit: {cache_limit} given, but these shards are neither remote nor "
                             "compressed, so it would do nothing; dataset.remote or a zstd set is needed. Remove it")
        if remote is not None and not (self._cache / FETCHED).is_file():
            raise ValueError(f"dataset.cache_limit: {cache_limit} given with dataset.local {str(local)!r}, which was not "
                             "made by fetching, so that its shards could be deleted for good; a new or empty folder is "
                             "needed. Name another dataset.local, or remove the limit")
        self.check_room([0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def path(self, shard: int) -> Path:
        """Where the raw shard lies, or will lie."""
        return self.local / self._shards[shard]["raw"]["basename"]

    def check_room(self, shards: Collection[int]) -> None:
        """Refuses a limit that cannot hold this many shards at once, whichever they are.

        Raises:
            ValueError: naming the bytes needed.
        """
        if self.cache_limit is not None and (need := self.room_needed(len(set(shards)))) > self.cache_limit:
            raise ValueError(f"dataset.cache_limit: {self.cache_limit} bytes given; {len(set(shards))} shards are in use at "
                             f"a time, which take up to {need} bytes. Raise it, or lower train_loader.shuffle_window")

    def room_needed(self, number: int) -> int:
        """Most bytes that so many shards take, with what making one of them takes besides."""
        sizes = sorted((shard["raw"]["bytes"] for shard in self._shards), reverse=True)
        return sum(sizes[:number]) + max(self._bytes_to_make(shard) - shard["raw"]["bytes"] for shard in self._shards)

    def set_limit(self, limit: int) -> None:
        """Another cache limit for this process; all processes of a node must be given the same."""
        assert self._room is not None
        self.cache_limit = self._room.limit = limit

    def read_remote(self, name: str, num_bytes: int) -> bytes:
        """A file of the remote split, not kept.

        Raises:
            FileNotFoundError: no such file there, or the split is not remote. ValueError: it has another size.
        """
        if self._storage is None:
            raise FileNotFoundError(f"{self.local / name}: missing; the manifest names it. Fetch or convert the set again")
        if (found := self._storage.size(name)) != num_bytes:
            raise refuse(self._storage.where(name), f"has {found} bytes", f"the manifest states {num_bytes}")
        return self._storage.read_bytes(name)

    def ensure(self, shard: int, release: Callable[[], bool] = lambda: False) -> None:
        """Returns when the raw shard lies in the local folder, made by this process or another.

        Args:
            release: called when there is no room: unmaps a shard of this process, False when it has none.

        Raises:
            ValueError: what was fetched is not what the manifest states, twice. FileNotFoundError, PermissionError,
            ConnectionError: from storage. OSError: no room.
        """
        if not self.fetches or os.path.lexists(self.path(shard)):
            return
        with locked(self._lock(shard)) as lock:
            if not os.path.lexists(self.path(shard)):
                self._wait_for_room(lock, shard, release)
                self._make(shard, tries=1 if self._storage is None else 2)

    def renew(self, shard: int, release: Callable[[], bool] = lambda: False) -> bool:
        """Makes a raw shard again that turned out wrong, unless another process has done so already.

        Returns:
            Whether there is a file that may be better than the one that was wrong. Errors as in `ensure`.
        """
        if not self.fetches:
            return False
        raw = self._shards[shard]["raw"]
        with locked(self._lock(shard)) as lock:
            with contextlib.suppress(FileNotFoundError, ValueError):
                map_file(self.path(shard), raw["bytes"], raw["xxh64"])
                return True
            self.path(shard).unlink(missing_ok=True)
            self._wait_for_room(lock, shard, release)
            self._make(shard, tries=1)
        return True

    def prefetch(self, shards: Sequence[int]) -> None:
        """Makes these shards in the background, in this order, leaving out those that other processes are making."""
        if not self.fetches:
            return
        if self._ahead is None or self._ahead.pid != os.getpid():  # threads do not survive a fork
            self._ahead = _Ahead(self)
        self._ahead.want(tuple(shards))

    def make_ahead(self, shard: int, keep: Collection[int]) -> bool:
        """Makes a shard if nobody else does and there is room without removing any of `keep`; False: no room."""
        if os.path.lexists(self.path(shard)):
            return True
        with locked(self._lock(shard), wait=False) as lock:
            if lock is None or os.path.lexists(self.path(shard)):
                return True
            if not self._reserve(lock, shard, keep):
                return False
            self._make(shard, tries=1 if self._storage is None else 2)
            return True

    def touch(self, shards: Sequence[int]) -> None:
        """Marks shards as asked for just now, the first one last."""
        if self.cache_limit is not None:
            for shard in reversed(shards):
                with contextlib.suppress(OSError):
                    os.utime(self.path(shard), follow_symlinks=False)

    # -------------------------------------------------------------- making a file

    def _lock(self, shard: int) -> Path:
        return own_folder(self._cache) / f"{self._shards[shard]['raw']['basename']}.lock"

    def _bytes_to_make(self, entry: dict[str, Any]) -> int:
        """Bytes that a shard's files take while it is made."""
        packed = entry["zip"] if self._storage is not None else None
        return entry["raw"]["bytes"] + (packed["bytes"] if packed else 0)

    def _make(self, shard: int, *, tries: int) -> None:
        """Fetches and expands, the shard's lock being held; the last try's error is raised."""
        work = self._cache / f"{self._shards[shard]['raw']['basename']}.part"
        for number in range(1, tries + 1):
            shutil.rmtree(own_folder(work))  # what a process that died has left
            os.mkdir(work)
            try:
                os.replace(self._make_in(work, self._shards[shard], use_local=number == 1), self.path(shard))
                return
            except ValueError as error:
                if number == tries:
                    raise
                log.warning("%s: it is fetched once more", error)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                need = self._bytes_to_make(self._shards[shard])
                raise OSError(error.errno, f"{self.path(shard)}: no space left on its disk; {need} bytes are needed. Set "
                              "dataset.cache_limit, or name another dataset.local") from None
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _make_in(self, work: Path, entry: dict[str, Any], *, use_local: bool) -> Path:
        raw, zipped = entry["raw"], entry["zip"]
        target = work / raw["basename"]
        if zipped is None:
            where = self._fetch(raw, target)
        else:
            packed = self.local / zipped["basename"]
            where = str(packed)
            if self._storage is not None and not (use_local and os.path.lexists(packed)):
                packed = work / zipped["basename"]
                where = self._fetch(zipped, packed)
            content = map_file(packed, zipped["bytes"], zipped["xxh64"], name=where)
            with open(target, "xb") as stream:
                for block in expand(content, where, raw["bytes"]):
                    stream.write(block)
            where = f"{where}, expanded"
        map_file(target, raw["bytes"], raw["xxh64"], name=where)
        return target

    def _fetch(self, file: dict[str, Any], target: Path) -> str:
        """Fetches a file; what it is called in messages."""
        assert self._storage is not None
        try:
            self._storage.get_file(file["basename"], target, num_bytes=file["bytes"])
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:
                raise
            raise ValueError(str(error)) from None  # another size than stated
        return self._storage.where(file["basename"])

    # -------------------------------------------------------------- room

    def _reserve(self, lock: int | None, shard: int, keep: Collection[int] = ()) -> bool:
        if self._room is None:
            return True
        assert lock is not None
        names = {self.path(other).name for other in keep}
        return self._room.reserve(lock, self.path(shard).name, self._bytes_to_make(self._shards[shard]), names)

    def _wait_for_room(self, lock: int | None, shard: int, release: Callable[[], bool]) -> None:
        end = time.monotonic() + _PATIENCE
        while not self._reserve(lock, shard):
            if release():
                continue
            if time.monotonic() > end:
                raise OSError(f"dataset.cache_limit: {self.cache_limit} bytes given; for {_PATIENCE:.0f} s the processes of "
                              f"this node have used all of it and {self.path(shard).name} had to wait. Raise it")
            time.sleep(_POLL)

    def _can_go(self, name: str) -> bool:
        number = self._numbers.get(name)
        if number is None or self._storage is not None:
            return number is not None
        zipped = self._shards[number]["zip"] or {}
        with contextlib.suppress(OSError, KeyError):
            return os.lstat(self.local / zipped["basename"]).st_size == zipped["bytes"]
        return False


class _Ahead:
    """The thread of one process that makes shards before they are needed. It ends when its list is done."""

    def __init__(self, files: ShardFiles) -> None:
        self.pid = os.getpid()
        self._files = files
        self._changed = threading.Condition()
        self._wanted: tuple[int, ...] = ()
        self._running = False
        self._failed: set[int] = set()  # for good: who needs the shard tries once more

    def want(self, shards: tuple[int, ...]) -> None:
        if shards == self._wanted:
            return
        self._files.touch(shards)
        with self._changed:
            self._wanted = shards
            self._changed.notify()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="ettin-shards-ahead", daemon=True).start()

    def _run(self) -> None:
        while True:
            wanted = self._wanted
            done = self._go_through(wanted)
            with self._changed:
                if self._wanted is wanted:
                    if done:
                        self._running = False
                        return
                    self._changed.wait(_IDLE)

    def _go_through(self, wanted: tuple[int, ...]) -> bool:
        for shard in wanted:
            if self._wanted is not wanted:
                return False
            try:
                if shard not in self._failed and not self._files.make_ahead(shard, wanted):
                    return False
            except Exception as error:  # only a hint: who needs the shard meets the error and stops, or goes on
                log.warning("Shard %d could not be fetched ahead of need: %s", shard, error)
                self._failed.add(shard)
        return True
