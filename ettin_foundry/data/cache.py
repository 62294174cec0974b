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
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ettin_foundry.data.manifest import open_plain, refuse

__all__ = ["CACHE", "FETCHED", "Room", "locked", "own_folder"]

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
        raise refuse(path, "is not a folder", "a link would lead files out of the set", "Remove it")
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


