"""A split's files on this node: fetched or decompressed once, ahead of need, within a limit.

The raw shards that training maps lie in the split's local folder. They come from a remote folder or URL, or from
compressed shards beside them. All processes of a node share the folder: one makes a shard while the others wait for it
or make another; with a limit one shard is made at a time. A shard gets its name only when it is whole and of the stated
hash; a wrong one is fetched once more, then it is an error. To stay within the limit, the least recently used shards
are removed, never one that a process has mapped (it holds a shared lock on it, see manifest.map_file).

Layout of `.cache/` in the folder: `NAME.lock`, or `shards.lock` with a limit, and `lock` for the small files (held with
flock: the kernel releases it when its holder dies), `NAME.part/` (files being made), `remote` (filled by fetching).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ettin_foundry.data import INDEX, LENGTHS, MANIFEST
from ettin_foundry.data.manifest import MAX_JSON_BYTES, bad_file, expand, map_file, open_plain
from ettin_foundry.data.storage import atomic_file, check_name, open_storage

log = logging.getLogger(__name__)

_CACHE, _FETCHED = ".cache", "remote"
_MAX_TOKENIZER_BYTES = 1 << 28
_PATIENCE = 600.0  # seconds that a needed shard waits for room before the run stops
_POLL, _IDLE = 0.1, 0.5  # seconds between looks for room, for a shard that is needed and ahead of need


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file of all processes of the node; yields False when another holds it and `wait` is False."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have inherited the descriptor
        os.close(descriptor)


def _own_folder(path: Path) -> Path:
    """Makes a folder; a link in its place is an error, because it would lead files out of the dataset."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(parents=True)
    if path.is_symlink() or not path.is_dir():
        raise bad_file(path, "is not a folder", "no link is followed", "remove it")
    return path


def fetch_manifest(local: Path, remote: str) -> None:
    """Puts the manifest of a remote split into its local folder; ValueError if another one is there."""
    storage, path, cache = open_storage(remote), local / MANIFEST, local / _CACHE
    try:
        data = storage.read_bytes(MANIFEST, at_most=MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"dataset.remote must hold a split made by data_prep/convert.py: {error}") from None
    with locked(_own_folder(cache) / "lock"):
        if not os.path.lexists(path):
            (cache / _FETCHED).write_text(remote + "\n")
            with atomic_file(path) as stream:
                stream.write(data)
        with open(open_plain(path), "rb") as stream:
            if stream.read() != data:
                raise ValueError(f"dataset.local {str(local)!r} holds another dataset than dataset.remote {remote!r}; name "
                                 f"another folder, or, if it has grown, delete {MANIFEST}, {LENGTHS} and {INDEX} there")


def fetch_table(local: Path, remote: str, name: str, num_bytes: int | None = None) -> None:
    """Puts lengths.npy or index.json of a remote split into its local folder, unless it is there."""
    storage = open_storage(remote)
    with locked(_own_folder(local / _CACHE) / "lock"):
        if not os.path.lexists(local / name):
            storage.get_file(name, local / name, num_bytes=num_bytes, at_most=MAX_JSON_BYTES)


def fetch_tokenizer(local: Path, remote: str) -> None:
    """Puts the tokenizer/ of a remote dataset into its local folder, unless one is there."""
    storage, target, cache = open_storage(remote), local / "tokenizer", local / _CACHE
    with locked(_own_folder(cache) / "lock"):
        if os.path.lexists(target):
            return
        if not (files := storage.list("tokenizer/")):
            raise FileNotFoundError(f"{storage.where('tokenizer')}: holds no file; put the dataset's tokenizer there")
        shutil.rmtree(_own_folder(cache / "tokenizer"))
        for name, _ in files:
            storage.get_file(name, cache / check_name(name), at_most=_MAX_TOKENIZER_BYTES)
        os.replace(cache / "tokenizer", target)


class ShardFiles:
    """The raw shards of one split folder, made when they are needed or shortly before; may be pickled and forked.

    `shards` are the manifest's entries, `remote` a folder or URL of the same split, `cache_limit` the most bytes that
    shards (whole and partial, of all processes) may take in `local`.
    """

    def __init__(self, local: Path, shards: Sequence[dict[str, Any]], remote: str | None, cache_limit: int | None) -> None:
        self.local, self._cache, self._shards = local, local / _CACHE, shards
        self._storage = None if remote is None else open_storage(remote)
        self.fetches = remote is not None or shards[0]["zip"] is not None  # else nothing here does anything
        self._wanted: tuple[int, tuple[int, ...]] | None = None  # this process, the shards that it prefetches
        self.cache_limit: int | None = None
        if cache_limit is not None:
            self.set_limit(cache_limit)

    def set_limit(self, cache_limit: int) -> None:
        """Bounds what shards may take; ValueError if that has no effect, is too little, or would delete originals."""
        if not self.fetches:
            raise ValueError(f"dataset.cache_limit must be left out for local, uncompressed shards, got {cache_limit}")
        if self._storage is not None and not (self._cache / _FETCHED).is_file():
            raise ValueError("dataset.local must be a new folder where dataset.cache_limit is given: the shards in "
                             f"{str(self.local)!r} were not fetched and would be deleted for good")
        self.cache_limit = cache_limit
        self.check_room([0])

    def path(self, shard: int) -> Path:
        """Where the raw shard lies, or will lie."""
        return self.local / self._shards[shard]["raw"]["basename"]

    def check_room(self, shards: Collection[int]) -> None:
        """Raises ValueError for a limit that cannot hold so many shards at once, whichever they are."""
        number = len(set(shards))
        if self.cache_limit is not None and (need := self.room_needed(number)) > self.cache_limit:
            raise ValueError(f"dataset.cache_limit must be at least {need} bytes for the {number} shards in use at a "
                             f"time, got {self.cache_limit}; raise it, or lower train_loader.shuffle_window")

    def room_needed(self, number: int) -> int:
        """Most bytes that so many shards take, with what making one of them takes besides."""
        sizes = sorted((shard["raw"]["bytes"] for shard in self._shards), reverse=True)
        return sum(sizes[:number]) + max(self._bytes_to_make(shard) - shard["raw"]["bytes"] for shard in self._shards)

    def ensure(self, shard: int, release: Callable[[], bool]) -> None:
        """Returns when the raw shard lies in the local folder, made by this process or another.

        Where there is no room, `release` unmaps a shard of this process (False when it has none). ValueError: what was
        fetched is not what the manifest states, twice. OSError: no room, or from storage.
        """
        path, end = self.path(shard), time.monotonic() + _PATIENCE
        while self.fetches and not os.path.lexists(path):
            with locked(self._lock(shard)):
                if os.path.lexists(path):
                    return
                if self._make_room(shard):
                    return self._make(shard)
            if not release():
                if time.monotonic() > end:
                    raise OSError(f"dataset.cache_limit must be larger than {self.cache_limit} bytes, all in use here; "
                                  f"{path.name} waited {_PATIENCE:.0f} s")
                time.sleep(_POLL)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Makes these shards in the background, in this order, leaving out those that other processes are making."""
        wanted = os.getpid(), tuple(shards)  # threads do not survive a fork
        if not self.fetches or wanted == self._wanted:
            return
        self._wanted = wanted
        for shard in reversed(shards if self.cache_limit is not None else ()):  # the one needed first is the last to go
            with contextlib.suppress(OSError):
                os.utime(self.path(shard), follow_symlinks=False)
        threading.Thread(target=self._make_ahead, args=(wanted,), name="ettin-prefetch", daemon=True).start()

    def _make_ahead(self, wanted: tuple[int, tuple[int, ...]]) -> None:
        """Makes shards until others are wanted; without room it waits."""
        for shard in wanted[1]:
            while self._wanted is wanted and not os.path.lexists(self.path(shard)):
                try:
                    with locked(self._lock(shard), wait=self.cache_limit is not None) as held:
                        if not held or os.path.lexists(self.path(shard)):
                            break
                        if self._make_room(shard, wanted[1]):
                            self._make(shard)
                            break
                except Exception as error:  # only a hint: who needs the shard meets the error
                    log.warning("Shard %d could not be fetched ahead of need: %s", shard, error)
                    break
                time.sleep(_IDLE)

    def _lock(self, shard: int) -> Path:
        name = "shards" if self.cache_limit is not None else self.path(shard).name
        return _own_folder(self._cache) / f"{name}.lock"

    def _bytes_to_make(self, entry: dict[str, Any]) -> int:
        """Bytes that a shard's files take while it is made."""
        return entry["raw"]["bytes"] + (entry["zip"]["bytes"] if self._storage is not None and entry["zip"] else 0)

    def _make(self, shard: int) -> None:
        """Fetches and expands a shard, its lock held; a wrong file is fetched once more."""
        path = self.path(shard)
        work = self._cache / f"{path.name}.part"
        for use_local in (True, False):
            shutil.rmtree(_own_folder(work))  # what a process that died has left
            work.mkdir()
            try:
                return os.replace(self._make_in(work, self._shards[shard], use_local=use_local), path)
            except ValueError as error:
                if self._storage is None or not use_local:
                    raise
                log.warning("%s: it is fetched once more", error)
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _make_in(self, work: Path, entry: dict[str, Any], *, use_local: bool) -> Path:
        """The whole, checked raw shard in the folder `work`."""
        raw, stored = entry["raw"], entry["zip"] or entry["raw"]
        source = self.local / stored["basename"]
        where = str(source)
        if self._storage is not None and not (entry["zip"] and use_local and os.path.lexists(source)):
            source, where = work / stored["basename"], self._storage.where(stored["basename"])
            self._storage.get_file(stored["basename"], source, num_bytes=stored["bytes"])
        content = map_file(source, stored["bytes"], stored["xxh64"], name=where)
        if not entry["zip"]:
            return source
        target = work / raw["basename"]
        with open(target, "wb") as stream:
            stream.writelines(expand(content, where, raw["bytes"]))
        map_file(target, raw["bytes"], raw["xxh64"], name=f"{where}, expanded")
        return target

    def _make_room(self, shard: int, keep: Collection[int] = ()) -> bool:
        """Whether there is room for a shard; removes others, not of `keep`, for it. The folder's lock is held."""
        if self.cache_limit is None:
            return True
        for part in self._cache.glob("*.part"):
            shutil.rmtree(part, ignore_errors=True)  # its maker died
        left = self.cache_limit - self._bytes_to_make(self._shards[shard])
        known, kept = {entry["raw"]["basename"]: entry for entry in self._shards}, {self.path(other).name for other in keep}
        found = []
        for entry in os.scandir(self.local):
            if entry.name.endswith(".mds"):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime_ns, entry.name, status.st_size))
                left -= status.st_size
        for _, name, size in sorted(found):
            if left < 0 and name not in kept and name in known and self._remove(known[name]):
                left += size
        return left >= 0

    def _remove(self, entry: dict[str, Any]) -> bool:
        """Removes a raw shard that could be made again and that no process has mapped (see `manifest.map_file`)."""
        path, packed = self.local / entry["raw"]["basename"], entry["zip"]
        with contextlib.suppress(OSError, ValueError):
            if self._storage is None and os.lstat(self.local / packed["basename"]).st_size != packed["bytes"]:
                return False
            descriptor = open_plain(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                return True
            finally:
                os.close(descriptor)
        return False
