"""Room for shards in a folder that several processes fill: locks that end with their holder, and a limit.

A lock file per shard, held with flock and therefore released by the kernel when its holder dies, lets one process make a
shard while the others wait for it or make another. With a limit, what a shard will take is reserved before a byte of it is
fetched: the least recently used shards go first, never one that some process has mapped (it holds a shared lock on the
file, see shard_format.py).

Layout of `.cache/` in the folder: `NAME.lock` (held while a shard is made; holds the bytes reserved for it), `NAME.part/`
(files being made), `lock` (held while room is counted), `remote` (the folder was filled by fetching, see remote.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ettin_foundry.data.manifest import INDEX, LENGTHS, MANIFEST, MAX_JSON_BYTES, bad_file, expand, map_file, open_plain
from ettin_foundry.data.storage import check_name, open_storage

log = logging.getLogger(__name__)

CACHE = ".cache"
FETCHED = "remote"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Holds a lock file that every process of the node sees; it ends with the block, or with the process.

    Yields:
        The file's descriptor, or None when another holds it and `wait` is False.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OSError(error.errno, f"{path}: cannot be opened ({error.strerror}); a plain file that all processes of "
                          "the node may write is needed. Remove it, and see who may write to its folder") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(path)):  # else its holder has removed it meanwhile
                    os.ftruncate(descriptor, 0)  # what a holder that died had reserved
                    break
        except BlockingIOError:
            os.close(descriptor)
            yield None
            return
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have inherited the descriptor
        os.close(descriptor)


def own_folder(path: Path) -> Path:
    """Makes a folder, or refuses what is there instead: a link would lead its files out of the set."""
    try:
        os.mkdir(path)
    except FileExistsError:
        pass
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be made ({error.strerror}); shards that are fetched or compressed need "
                      "a folder to be written to. Name a writable one as dataset.local; a read-only one with compressed "
                      "shards may be dataset.remote") from None
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise bad_file(path, "is not a folder", "a link would lead files out of the set", "Remove it")
    return path


class Room:
    """Counts what shards take in a folder, all processes of the node together, and removes some to make room.

    Args:
        folder: the split's local folder.
        limit: most bytes that raw shards and files being made may take.
        can_go: whether a raw shard of this name could be made again.
    """

    def __init__(self, folder: Path, limit: int, can_go: Callable[[str], bool]) -> None:
        self.folder, self.limit, self._can_go = folder, limit, can_go
        self._cache = folder / CACHE

    def reserve(self, lock: int, name: str, need: int, keep: Collection[str] = ()) -> bool:
        """Notes in a shard's lock file what the shard will take, and removes others if that makes room.

        Args:
            lock: descriptor of the shard's lock file, which the caller holds.
            name: of the raw shard. need: bytes. keep: names that are not removed.

        Returns:
            Whether there is room; the reservation ends with the lock.
        """
        with locked(self._cache / "lock"):
            used, idle = self._usage(name)
            for _, other, size in sorted(idle):
                if used + need <= self.limit:
                    break
                if other not in keep and _remove(self.folder / other):
                    used -= size
            if used + need > self.limit:
                return False
            os.pwrite(lock, f"{need}\n".encode(), 0)
            return True

    def _usage(self, name: str) -> tuple[int, list[tuple[int, str, int]]]:
        """Bytes taken, and what may go as (time of last use in ns, name, bytes); `name` itself is left out.

        Shards being made are looked at before whole ones: one that is finished in between is counted, not missed.
        """
        used, making = 0, {name}
        for entry in list(os.scandir(self._cache)):
            other = entry.name.removesuffix(".lock")
            if other != entry.name and other not in making and (reserved := _reserved(entry.path)):
                used += reserved
                making.add(other)
        for entry in list(os.scandir(self._cache)):
            if entry.name.endswith(".part") and entry.name.removesuffix(".part") not in making:
                shutil.rmtree(entry.path, ignore_errors=True)  # its maker died
        idle = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".mds") and entry.name not in making:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    used += status.st_size
                    if self._can_go(entry.name):
                        idle.append((status.st_mtime_ns, entry.name, status.st_size))
        return used, idle


def _reserved(path: str) -> int:
    """Bytes reserved in a lock file; 0 when its holder has died or reserved nothing."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            content = os.read(descriptor, 32)
            if content:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(content)
        finally:
            os.close(descriptor)
    return 0


def _remove(path: Path) -> bool:
    """Removes a shard that no process has mapped; see `shard_format.map_file`."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = open_plain(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return True
        finally:
            os.close(descriptor)
    return False


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
            raise bad_file(self._storage.where(name), f"has {found} bytes", f"the manifest states {num_bytes}")
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


_TOKENIZER = "tokenizer"
_MAX_TOKENIZER_BYTES = 1 << 28


def fetch_manifest(local: Path, remote: str) -> None:
    """Puts the manifest of a remote split into its local folder, or makes sure that the one there is the same.

    Raises:
        ValueError: the local folder holds another set. FileNotFoundError, PermissionError, ConnectionError: from storage.
    """
    storage, path = open_storage(remote), local / MANIFEST
    try:
        size = storage.size(MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(f"dataset.remote: {storage.where(MANIFEST)} is missing; a split of a set made by "
                                "data_prep/convert.py is needed there. Correct dataset.remote and dataset.split") from None
    if size > MAX_JSON_BYTES:
        raise bad_file(storage.where(MANIFEST), f"has {size} bytes", f"at most {MAX_JSON_BYTES} are read")
    data = storage.read_bytes(MANIFEST)
    local.mkdir(parents=True, exist_ok=True)
    cache = own_folder(local / CACHE)
    with locked(cache / "lock"):
        if not os.path.lexists(path):
            (cache / FETCHED).write_text(remote + "\n")
            partial = cache / MANIFEST
            partial.unlink(missing_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
            return
        with open(open_plain(path), "rb") as stream:
            if stream.read() != data:
                raise ValueError(f"dataset.local: {str(local)!r} holds another set than dataset.remote {remote!r} (their "
                                 "manifests differ); both must be the same. Name another folder, or, to follow a remote set "
                                 f"that has grown, delete {MANIFEST}, {LENGTHS} and {INDEX} there; shards are kept")


def fetch_tokenizer(local: Path, remote: str) -> None:
    """Puts the tokenizer/ of a remote set into its local folder, unless one is there.

    Raises:
        FileNotFoundError: the set has none. ValueError: a file's name or size is none of a tokenizer's.
    """
    storage = open_storage(remote)
    local.mkdir(parents=True, exist_ok=True)
    cache = own_folder(local / CACHE)
    with locked(cache / "lock"):
        if os.path.lexists(local / _TOKENIZER):
            return
        if not (files := storage.list(f"{_TOKENIZER}/")):
            raise FileNotFoundError(f"{storage.where(_TOKENIZER)}: holds no file; the tokenizer that the set was made with "
                                    "is needed. Correct dataset.remote, or put it there")
        shutil.rmtree(own_folder(cache / _TOKENIZER))
        for name, size in files:
            if size > _MAX_TOKENIZER_BYTES:
                raise bad_file(storage.where(name), f"has {size} bytes", f"at most {_MAX_TOKENIZER_BYTES} are fetched")
            storage.get_file(name, cache / check_name(name), num_bytes=size)
        os.replace(cache / _TOKENIZER, local / _TOKENIZER)


def fetch_table(local: Path, remote: str, name: str, num_bytes: int | None = None, *, again: bool = False) -> None:
    """Puts lengths.npy or index.json of a remote split into its local folder, unless it is there.

    Args:
        num_bytes: what it must measure. again: replace the one that is there.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: from storage. ValueError, OSError: it has another size.
    """
    storage = open_storage(remote)
    with locked(own_folder(local / CACHE) / "lock"):
        if again or not os.path.lexists(local / name):
            if num_bytes is None and (found := storage.size(name)) > MAX_JSON_BYTES:
                raise bad_file(storage.where(name), f"has {found} bytes", f"at most {MAX_JSON_BYTES} are read")
            storage.get_file(name, local / name, num_bytes=num_bytes)
