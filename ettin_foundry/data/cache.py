"""A split's files on this node: fetched or decompressed once, ahead of need, within a limit.

The raw shards that training maps lie in the split's local folder. They come from a remote folder or URL, or from
compressed shards beside them. All processes of a node share the folder: one makes a shard while the others wait for it
or make another. A shard gets its name only when it is whole and of the stated hash. With a limit, its room is reserved
first; the lock of the room is held for that alone, so that nobody waits for another's network.

Layout of `.cache/` in the folder: `NAME.lock`, `room.lock` with a limit, `lock` for the small files (held with flock:
the kernel releases it when its holder dies), `NAME.part/` (a shard being made: its room), `remote` (it was fetched).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ettin_foundry.data import INDEX, LENGTHS, MANIFEST
from ettin_foundry.data.manifest import MAX_JSON_BYTES, bad_file, expand, map_file, open_plain, parse_json
from ettin_foundry.data.storage import atomic_file, open_storage, parse_bytes

log = logging.getLogger(__name__)

_CACHE, _FETCHED = ".cache", "remote"
_PATIENCE = 900.0  # seconds that a needed shard waits for room; an outage lets others keep theirs for ten minutes
_POLL, _IDLE, _PAUSE = 0.1, 0.5, 30.0  # seconds between looks: for room, ahead of need, and after a failure


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Holds a lock file, which it makes, or a folder, against all processes; `shared` with others that share it.

    Yields False when another holds it and `wait` is False; an OSError where the storage has no locks.
    """
    flags, is_held = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, False
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        yield is_held
    finally:
        if is_held:
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
        raise FileNotFoundError(f"dataset.remote must hold a split made by ettin convert: {error}; without validation "
                                "there, train with eval_loader=null") from None
    parse_json(data, storage.where(MANIFEST))  # nothing else is kept under that name
    with locked(_own_folder(cache) / "lock"):
        if not os.path.lexists(path):
            (cache / _FETCHED).write_text(remote + "\n")
            with atomic_file(path) as stream:
                stream.write(data)
        with open(open_plain(path), "rb") as stream:
            if stream.read() != data:
                raise ValueError(f"dataset.local {str(local)!r} holds another dataset than dataset.remote {remote!r}; "
                                 f"name another folder, or, if it has grown, delete its {MANIFEST}, {LENGTHS}, {INDEX}")


def fetch_table(local: Path, remote: str, name: str, num_bytes: int | None = None, xxh64: str | None = None) -> None:
    """Puts lengths.npy or index.json of a remote split into its local folder, unless it is there."""
    storage, cache = open_storage(remote), _own_folder(local / _CACHE)
    with locked(cache / "lock"):
        if not os.path.lexists(local / name):
            storage.get_file(name, cache / name, num_bytes=num_bytes, at_most=MAX_JSON_BYTES)
            map_file(cache / name, num_bytes, xxh64, name=storage.where(name))
            os.replace(cache / name, local / name)


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
            storage.get_file(name, cache / name, at_most=1 << 28)
        os.replace(cache / "tokenizer", target)


class ShardFiles:
    """The raw shards of one split folder, made when they are needed or shortly before; may be pickled and forked."""

    def __init__(self, local: Path, shards: Sequence[dict[str, Any]], remote: str | None) -> None:
        self.local, self.cache, self.shards = local, local / _CACHE, shards
        self.storage = None if remote is None else open_storage(remote)
        self.fetches = remote is not None or shards[0]["zip"] is not None  # else nothing here does anything
        self.wanted: tuple[int, tuple[int, ...]] = (0, ())  # a process, and the shards that it prefetches
        self.room: Room | None = None

    def path(self, shard: int) -> Path:
        return self.local / self.shards[shard]["raw"]["basename"]

    def ensure(self, shard: int, release: Callable[[], bool]) -> None:
        """Returns when the raw shard is there; without room, `release` unmaps one of this process, or returns False."""
        end = time.monotonic() + _PATIENCE
        while self.fetches and not os.path.lexists(self.path(shard)):
            if not self._make(shard) and not release():
                if time.monotonic() > end:
                    raise OSError(f"dataset.cache_limit must be larger: for {_PATIENCE:.0f} s there was no room for "
                                  f"{self.path(shard)}")
                time.sleep(_POLL)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Makes these shards in the background, in this order, leaving out those that other processes are making."""
        wanted = os.getpid(), tuple(shards)  # threads do not survive a fork
        if self.fetches and wanted != self.wanted:
            self.wanted = wanted
            threading.Thread(target=self._make_ahead, args=(wanted,), name="ettin-prefetch", daemon=True).start()

    def _make_ahead(self, wanted: tuple[int, tuple[int, ...]]) -> None:
        """Makes shards until all are there or others are wanted; what fails is tried again after a pause."""
        while self.wanted is wanted and (missing := [s for s in wanted[1] if not os.path.lexists(self.path(s))]):
            failed = False
            for shard in missing:
                try:
                    if self.wanted is not wanted or not self._make(shard, ahead=True):
                        break  # without room for it there is none for those that are needed later
                except Exception as error:  # only a hint: who needs the shard meets the error
                    failed = True
                    log.warning("Shard %d could not be fetched ahead of need (%s); tried again", shard, error)
            time.sleep(_PAUSE if failed else _IDLE)

    def _make(self, shard: int, *, ahead: bool = False) -> bool:
        """Makes a shard, or waits for who is making it, unless ahead of need; False where there is no room for it."""
        path, room, lock = self.path(shard), self.room, _own_folder(self.cache) / f"{self.path(shard).name}.lock"
        work = lock.with_suffix(".part")
        with contextlib.ExitStack() as stack:
            with locked(_own_folder(room.cache) / "room.lock") if room else contextlib.nullcontext():
                mine = stack.enter_context(locked(lock, wait=False))
                if is_missing := mine and not os.path.lexists(path):
                    shutil.rmtree(_own_folder(work))  # what a process that died has left
                    if room and not room.clear(self, shard, ahead=ahead):
                        return False
                    work.mkdir()
            if is_missing:
                try:
                    os.replace(self._fetch(work, self.shards[shard]), path)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
        if not mine and not ahead:
            with locked(lock):
                pass
        return True

    def _fetch(self, work: Path, entry: dict[str, Any]) -> Path:
        """The whole, checked raw shard in the folder `work`."""
        raw, stored = entry["raw"], entry["zip"] or entry["raw"]
        source = self.local / stored["basename"]
        where = str(source)
        if self.storage is not None:
            source, where = work / stored["basename"], self.storage.where(stored["basename"])
            self.storage.get_file(stored["basename"], source, num_bytes=stored["bytes"])
        content = map_file(source, stored["bytes"], stored["xxh64"], name=where)
        if not entry["zip"]:
            return source
        target = work / raw["basename"]
        with open(target, "wb") as stream:
            stream.writelines(expand(content, where, raw["bytes"]))
        map_file(target, raw["bytes"], raw["xxh64"], name=f"{where}, expanded")
        return target

    def bytes_to_make(self, entry: dict[str, Any]) -> int:
        """Bytes that a shard's files take while it is made."""
        return entry["raw"]["bytes"] + (entry["zip"]["bytes"] if self.storage is not None and entry["zip"] else 0)

    def remove(self, entry: dict[str, Any]) -> bool:
        """Removes a raw shard that could be made again and that no process has mapped (see `manifest.map_file`)."""
        path, packed = self.local / entry["raw"]["basename"], entry["zip"]
        with contextlib.suppress(OSError, ValueError):
            if self.storage is None and os.lstat(self.local / packed["basename"]).st_size != packed["bytes"]:
                return False
            with open(open_plain(path), "rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                return True
        return False


class Room:
    """One limit on the bytes of shards, whole and partial, of all processes: of a split, or of a mixture's datasets.

    What is least recently used goes first, and what is wanted soon last; never a shard that a process has mapped.
    """

    def __init__(self, limit: int | str, folder: Path, members: Iterable[ShardFiles]) -> None:
        self.limit, self.cache = parse_bytes("dataset.cache_limit", limit) or 0, folder / _CACHE
        self._members = [files for files in members if files.fetches]
        if not self._members:
            raise ValueError(f"dataset.cache_limit must be left out for local, uncompressed datasets, got {limit}")
        for files in self._members:
            if files.storage is not None and not (files.cache / _FETCHED).is_file():
                raise ValueError("dataset.local must be a new folder where dataset.cache_limit is given: the shards in "
                                 f"{str(files.local)!r} were not fetched and would be deleted for good")
            files.room = self

    def check(self, numbers: Iterable[tuple[ShardFiles, int]]) -> None:
        """Raises ValueError for a limit that cannot hold so many shards of each folder at once, whichever they are."""
        sizes, making = list[int](), 0
        for files, number in numbers:
            if files.fetches:
                sizes += sorted((shard["raw"]["bytes"] for shard in files.shards), reverse=True)[:number]
                making = max(making, *(files.bytes_to_make(shard) - shard["raw"]["bytes"] for shard in files.shards))
        if (need := sum(sizes) + making) > self.limit:
            raise ValueError(f"dataset.cache_limit must be at least {need} bytes for {len(sizes)} shards in use, "
                             f"got {self.limit}; raise it, or lower train_loader.shuffle_window (a source keeps 2)")

    def clear(self, wanting: ShardFiles, shard: int, *, ahead: bool) -> bool:
        """Whether there is room for a shard; removes others for it, ahead of need none that are wanted soon."""
        left, found = self.limit - wanting.bytes_to_make(wanting.shards[shard]), []
        for files in {files.local: files for files in self._members}.values():
            known = {entry["raw"]["basename"]: entry for entry in files.shards}
            for part in files.cache.glob("*.part"):
                with locked(part.with_suffix(".lock"), wait=False) as free:
                    if free:
                        shutil.rmtree(part, ignore_errors=True)  # its maker died
                    elif part.stem in known:
                        left -= files.bytes_to_make(known[part.stem])
            soon = {files.path(other).name: -at for at, other in enumerate(files.wanted[1])}
            for entry in os.scandir(files.local):
                with contextlib.suppress(FileNotFoundError):  # a damaged one is removed without the lock of the room
                    status = entry.stat(follow_symlinks=False)
                    left -= status.st_size * entry.name.endswith(".mds")
                    order = soon.get(entry.name, -len(files.shards)), status.st_mtime_ns
                    if entry.name in known and not (ahead and entry.name in soon):
                        found.append((order, status.st_size, files, known[entry.name]))
        for _, num_bytes, files, entry in sorted(found, key=lambda item: item[0]):
            if left < 0 and files.remove(entry):
                left += num_bytes
        return left >= 0
