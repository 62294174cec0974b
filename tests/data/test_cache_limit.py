"""The limit of what fetched shards may take on a node: never exceeded, whoever reads, and nobody waits for ever."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_place import (
    KINDS,
    SPAWN,
    downloads,
    fresh,
    hold_and_wait,
    limit_for,
    make_splits,
    order_of,
    read_as_rank,
    samples_of,
    serve,
    shard_name,
    train,
    used,
    wait_until,
)
from s3_server import S3Server

from ettin_foundry.data import cache
from ettin_foundry.data.cache import locked
from ettin_foundry.data.quantities import parse_bytes
from ettin_foundry.data.shards import MDSSplit


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def running(splits: dict[str, Path]) -> Iterator[S3Server]:
    with serve(splits) as server:
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    return fresh(running, monkeypatch)


@KINDS
def test_the_limit_holds_while_training_and_what_went_is_fetched_again(server: S3Server, splits: dict[str, Path],
                                                                       tmp_path: Path, kind: str) -> None:
    local = MDSSplit(splits["plain"])
    order = order_of(local)
    limit = limit_for(splits[kind], len(order.shards_ahead(0)))
    data = MDSSplit(tmp_path / "train", remote=server.url(f"{kind}/train"), cache_limit=limit)
    rows = range(3 * order.rows_per_epoch)
    peaks, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.001):
            peaks.append(used(tmp_path / "train"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = train(data, order_of(data), rows, lambda _: peaks.append(used(tmp_path / "train")))
    finally:
        stop.set()
        watcher.join()
    assert found == train(local, order, rows)
    assert limit // 2 < max(peaks) <= limit < limit_for(splits[kind], local.num_shards)
    assert max(downloads(server).values()) > 1


def test_two_processes_share_the_limit(server: S3Server, splits: dict[str, Path], tmp_path: Path) -> None:
    local = MDSSplit(splits["plain"])
    order = order_of(local)
    rows, limit = 2 * order.rows_per_epoch, limit_for(splits["plain"], len(order.shards_ahead(0)) + 1)
    start, answers = SPAWN.Barrier(2), SPAWN.Queue()
    ranks = [SPAWN.Process(target=read_as_rank, args=(str(tmp_path / "train"), server.url("plain/train"), limit, rows,
                                                      start, answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    found: list[str] = []
    peak = 0
    end = time.monotonic() + 60
    while len(found) < 2:
        assert time.monotonic() < end
        peak = max(peak, used(tmp_path / "train")) if (tmp_path / "train").exists() else 0
        if not answers.empty():
            found.append(answers.get())
    for rank in ranks:
        rank.join()
    assert found == [train(local, order, range(rows))] * 2 and limit // 2 < peak <= limit


def test_a_shard_in_use_never_goes_and_the_least_recently_used_goes_first(server: S3Server, splits: dict[str, Path],
                                                                          tmp_path: Path) -> None:
    url = server.url("plain/train")
    sizes = [shard["raw"]["bytes"] for shard in MDSSplit(splits["plain"]).manifest["shards"]]
    limit = sum(sizes[shard] for shard in (0, 1, 3)) + max(sizes[2], sizes[4])
    holder, reader = (MDSSplit(tmp_path / "train", remote=url, cache_limit=limit) for _ in range(2))
    holder.chunk(0, 0)
    for shard in (1, 2, 3, 1, 4):  # 4 needs room: 0 is in use, 2 was used least recently
        reader.prefetch([shard])  # unmaps the one before
        reader.chunk(shard, 0)
        time.sleep(0.02)
    there = [shard for shard in range(5) if (tmp_path / "train" / shard_name(splits["plain"], shard)).exists()]
    assert there == [0, 1, 3, 4]
    assert holder.chunk(0, 1).tolist() == MDSSplit(splits["plain"]).chunk(0, 1).tolist()
    assert set(downloads(server).values()) == {1}


def test_a_limit_that_cannot_hold_the_windows_is_refused(server: S3Server, splits: dict[str, Path], tmp_path: Path) -> None:
    url = server.url("packed/train")
    with pytest.raises(ValueError, match=r"dataset.cache_limit: 2000 bytes given; 1 shards .* up to \d+ bytes. Raise it"):
        MDSSplit(tmp_path / "train", remote=url, cache_limit=2000)
    limit = limit_for(splits["packed"], 4)
    data = MDSSplit(tmp_path / "train", remote=url, cache_limit=limit)
    data.check_room([5, 2, 9, 1])
    with pytest.raises(ValueError, match="5 shards are in use at a time.*lower train_loader.shuffle_window"):
        data.check_room([5, 2, 9, 1, 0])


def test_a_process_without_room_says_so_and_does_not_wait_for_ever(server: S3Server, splits: dict[str, Path], tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PATIENCE", 0.1)
    limit = limit_for(splits["plain"], 2)
    holder, other = (MDSSplit(tmp_path / "train", remote=server.url("plain/train"), cache_limit=limit) for _ in range(2))
    for shard in (0, 1):
        holder.chunk(shard, 0)
    with pytest.raises(OSError, match="dataset.cache_limit: .* this node have used all of it.* Raise it"):
        other.chunk(9, 0)


def test_what_is_wanted_soon_does_not_go_for_what_is_wanted_later(splits: dict[str, Path], tmp_path: Path) -> None:
    names = [shard_name(splits["plain"], shard) for shard in range(4)]
    sizes = [(splits["plain"] / name).stat().st_size for name in names]
    limit = max(sum(sizes[:3]), sum(sizes[1:]))
    data = MDSSplit(tmp_path / "train", remote=str(splits["plain"]), cache_limit=limit)

    def there() -> list[str]:
        return sorted(path.name for path in (tmp_path / "train").glob("*.mds"))

    data.prefetch([0, 1, 2, 3])
    wait_until(lambda: len(there()) == 3)
    time.sleep(0.05)  # it goes on looking for room
    assert there() == names[:3]
    data.prefetch([1, 2, 3])  # the reader has gone on
    wait_until(lambda: there() == names[1:])


def test_a_forked_child_does_not_keep_the_shards_of_its_parent(splits: dict[str, Path], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_PATIENCE", 0.5)
    data = MDSSplit(tmp_path / "train", remote=str(splits["plain"]), cache_limit=limit_for(splits["plain"], 2))
    for shard in (0, 1):
        data.chunk(shard, 0)
    read, write = os.pipe()
    if not (child := os.fork()):  # a worker of another loader, say, that lives on
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        for shard in (2, 3, 4):
            assert data.chunk(shard, 0).tolist() == MDSSplit(splits["plain"]).chunk(shard, 0).tolist()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_a_set_that_was_not_fetched_is_never_deleted(splits: dict[str, Path], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(splits["plain"], tmp_path / "train"))
    with pytest.raises(ValueError, match="dataset.cache_limit: .* was not made by fetching.*deleted for good"):
        MDSSplit(mine, remote=str(splits["plain"]), cache_limit="1gb")
    assert samples_of(MDSSplit(mine, remote=str(splits["plain"]))) == samples_of(MDSSplit(splits["plain"]))


def test_expanded_shards_of_a_local_set_go_and_packed_ones_stay(splits: dict[str, Path], tmp_path: Path) -> None:
    mine = Path(shutil.copytree(splits["packed"], tmp_path / "train"))
    shutil.rmtree(mine / ".cache", ignore_errors=True)
    for path in mine.glob("*.mds"):
        path.unlink()
    data = MDSSplit(mine, cache_limit=limit_for(splits["plain"], 2))
    assert samples_of(data) == samples_of(MDSSplit(splits["plain"]))
    assert 1 <= len(list(mine.glob("*.mds"))) <= 3 and len(list(mine.glob("*.mds.zstd"))) == data.num_shards
    (mine / (shard_name(mine, 0) + ".zstd")).unlink()  # then its raw file is the only one
    [path.unlink() for path in mine.glob("*.mds")]
    raw = mine / shard_name(mine, 0)
    shutil.copy(splits["plain"] / raw.name, raw)
    os.utime(raw, (0, 0))
    fresh = MDSSplit(mine, cache_limit=limit_for(splits["plain"], 2))
    for shard in range(1, fresh.num_shards):
        fresh.chunk(shard, 0)
    assert raw.exists()


def test_what_a_killed_process_held_is_free_again(server: S3Server, splits: dict[str, Path], tmp_path: Path) -> None:
    limit, url = limit_for(splits["plain"], 2), server.url("plain/train")
    local = tmp_path / "train"
    ready = SPAWN.Event()
    child = SPAWN.Process(target=hold_and_wait, args=(str(local), url, limit, ready))
    child.start()
    assert ready.wait(30)
    name = shard_name(local, 0)
    size = (splits["plain"] / name).stat().st_size
    assert (local / ".cache" / f"{name}.lock").read_text() == f"{size}\n"
    data = MDSSplit(local, remote=url, cache_limit=limit)
    with pytest.raises(BlockingIOError), open(local / ".cache" / f"{name}.lock", "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    for shard in (1, 2):  # need the room that it had reserved
        data.chunk(shard, 0)
    assert not (local / ".cache" / f"{name}.part").exists()
    assert data.chunk(0, 0).tolist() == MDSSplit(splits["plain"]).chunk(0, 0).tolist()
    assert used(local) <= limit


@pytest.mark.parametrize("text, number", [(7, 7), ("7", 7), ("200gb", 200 << 30), ("1.5 KB", 1536), ("1_000b", 1000),
                                          (None, None)])
def test_sizes_are_written_as_people_write_them(text: Any, number: int | None) -> None:
    assert parse_bytes("key", text) == number


def test_a_lock_file_that_is_removed_while_another_waits_is_no_lock(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(50):
            with locked(path):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0002)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and not path.exists()
    with locked(path), locked(path, wait=False) as second:
        assert second is None
