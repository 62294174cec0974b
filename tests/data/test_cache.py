"""Remote and compressed splits: the rows of a local split, fetched once per node, ahead of need, within the limit."""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until
from hand_made import CHUNK_LENGTH, flip, random_documents, samples_of, shard_file, write_split

from ettin_foundry.data import cache
from ettin_foundry.data.order import Order
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import Storage

KINDS = pytest.mark.parametrize("kind", ["plain", "packed"])
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    rng, place = np.random.default_rng(11), tmp_path_factory.mktemp("splits")
    shards = [(source, random_documents(rng, 20 + number)) for number, source in enumerate("aabaabaaab")]
    return {kind: write_split(place / kind / "train", shards, packed=kind == "packed") for kind in ("plain", "packed")}


@pytest.fixture(scope="module")
def expected(splits):
    return samples_of(MDSSplit(splits["plain"]))


def watch(patch, before=lambda name: None, after=lambda name, path: None):
    """The shards that are asked for from now on, in that order; calls may come before and after each."""
    asked, true = [], Storage.get_file

    def get_file(storage, name, path, **options):
        if ".mds" in name:
            asked.append(name)
            before(name)
        true(storage, name, path, **options)
        after(name, path)

    patch.setattr(Storage, "get_file", get_file)
    for name in ("_IDLE", "_POLL", "_PAUSE"):
        patch.setattr(cache, name, 0.02)
    return asked


@pytest.fixture
def asked(monkeypatch):
    return watch(monkeypatch)


def order_of(data):
    return Order(data, CHUNK_LENGTH + 2, packing=True, shuffle=True, seed=3, window=2)


def train(data, rows):
    order, read = order_of(data), []
    for number in range(rows):
        data.prefetch(order.shards_ahead(number))
        _, shard, samples = order.row(number)
        read.append([data.chunk(shard, sample).tolist() for sample in samples])
    return read


def used(folder):
    """Bytes of all shards in a folder, whole and partial, as a stranger would count them."""
    total = 0
    for path in [Path(place, name) for place, _, names in os.walk(folder) for name in names if ".mds" in name]:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def limit_for(folder, number):
    """Just enough for so many shards, and for one compressed one that is on its way."""
    shards = MDSSplit(folder).manifest["shards"]
    packed = max(shard["zip"]["bytes"] if shard["zip"] else 0 for shard in shards)
    return sum(sorted((shard["raw"]["bytes"] for shard in shards), reverse=True)[:number]) + packed


def read_as_rank(local, url, limit, rows, start, answers):
    with pytest.MonkeyPatch.context() as patch:
        asked, data = watch(patch), MDSSplit(local, remote=url, cache_limit=limit)
        start.wait()
        answers.put((train(data, rows), asked))


@KINDS
def test_remote_samples_are_the_local_ones_bit_for_bit(asked, splits, tmp_path, kind, expected):
    data = MDSSplit(tmp_path / "train", remote=str(splits[kind]))
    assert not asked
    assert samples_of(data) == expected and data.fingerprint == MDSSplit(splits[kind]).fingerprint
    assert len(asked) == len(set(asked)) == data.num_shards
    assert not list((tmp_path / "train" / ".cache").glob("*.part"))
    assert samples_of(MDSSplit(tmp_path / "train", remote=str(splits[kind]))) == expected
    assert len(asked) == data.num_shards
    data.check_index()


@pytest.mark.parametrize("limited", [False, True])
def test_two_processes_share_a_folder_and_its_limit(splits, tmp_path, limited):
    local = MDSSplit(splits["plain"])
    rows = 2 * order_of(local).rows_per_epoch
    limit = limit_for(splits["packed"], len(order_of(local).shards_ahead(0)) + 1) if limited else None
    start, answers = SPAWN.Barrier(2), SPAWN.Queue()
    ranks = [SPAWN.Process(target=read_as_rank, args=(str(tmp_path / "train"), str(splits["packed"]), limit, rows,
                                                      start, answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    peaks, found = [0], []
    while len(found) < 2:
        peaks.append(used(tmp_path / "train"))
        found += [] if answers.empty() else [answers.get()]
    assert [read for read, _ in found] == [train(local, rows)] * 2
    asked = Counter(name for _, names in found for name in names)
    if limit is None:
        assert asked == Counter(shard["zip"]["basename"] for shard in MDSSplit(splits["packed"]).manifest["shards"])
    else:
        assert limit // 2 < max(peaks) <= limit and max(asked.values()) > 1


@KINDS
def test_a_shard_damaged_on_the_way_or_later_is_fetched_again(splits, tmp_path, kind, monkeypatch, expected, caplog):
    damaged = []

    def damage(name, path):
        if not damaged and ".mds" in name:
            damaged.append(name)
            flip(Path(path), -1)

    asked = watch(monkeypatch, after=damage)
    data = MDSSplit(tmp_path / "train", remote=str(splits[kind]))
    assert samples_of(data) == expected
    assert caplog.text.count("it is made once more") == 1 and asked.count(damaged[0]) == 2
    flip(shard_file(tmp_path / "train", 1), -1)
    assert samples_of(MDSSplit(tmp_path / "train", remote=str(splits[kind]))) == expected
    assert len(asked) == data.num_shards + 2


def test_a_shard_that_is_bad_or_missing_at_its_source_stops_the_run_with_its_name(asked, splits, tmp_path):
    place = Path(shutil.copytree(splits["packed"], tmp_path / "place"))
    bad, data = shard_file(place, 1, ".zstd"), MDSSplit(tmp_path / "train", remote=str(place))
    flip(bad, -1)
    with pytest.raises(ValueError, match=rf"{bad}: xxh64 is"):
        data.chunk(1, 0)
    assert asked == [bad.name] * 2 and not any((tmp_path / "train").glob("*.mds"))  # no byte of it was kept
    bad.unlink()
    with pytest.raises(FileNotFoundError, match=str(bad)):
        data.chunk(1, 0)


def test_shards_are_fetched_in_the_order_of_need_without_being_read(splits, tmp_path, caplog, monkeypatch):
    def fail(name):
        if name == data.files.path(0).name and asked.count(name) <= 3:
            raise PermissionError(name)

    asked, data = watch(monkeypatch, before=fail), MDSSplit(tmp_path / "train", remote=str(splits["plain"]))
    data.prefetch([7, 2, 5])
    wait_until(lambda: data.files.path(5).exists())
    assert asked == [data.files.path(shard).name for shard in (7, 2, 5)]
    other = data.files.path(1).name
    with cache.locked(tmp_path / "train" / ".cache" / f"{other}.lock"):  # another process fetches it
        data.prefetch([0, 1, 3])
        wait_until(lambda: data.files.path(3).exists())
        assert other not in asked
    wait_until(lambda: data.files.path(0).exists() and data.files.path(1).exists())  # both are tried again
    assert caplog.text.count("Shard 0 could not be fetched ahead of need") == 3


def test_a_copied_or_forked_split_fetches_for_itself(splits, tmp_path):
    data = MDSSplit(tmp_path / "train", remote=str(splits["plain"]))
    data.prefetch([0])
    data.chunk(0, 0)
    pickle.loads(pickle.dumps(data)).prefetch([1])
    wait_until(lambda: data.files.path(1).exists())
    if not (child := os.fork()):
        try:
            data.prefetch([2])
            wait_until(lambda: data.files.path(2).exists() and data.chunk(0, 0).size and data.chunk(2, 0).size)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_shard_in_use_never_goes_and_the_least_recently_used_goes_first(asked, splits, tmp_path):
    url, local = str(splits["plain"]), MDSSplit(splits["plain"])
    sizes = [shard["raw"]["bytes"] for shard in local.manifest["shards"]]
    limit = sum(sizes[shard] for shard in (0, 1, 3)) + max(sizes[2], sizes[4])
    holder, reader = (MDSSplit(tmp_path / "train", remote=url, cache_limit=limit) for _ in range(2))
    holder.chunk(0, 0)
    for shard in (1, 2, 3, 1, 4):  # 4 needs room: 0 is in use, 2 was used least recently
        reader.prefetch([shard])  # unmaps the one before
        reader.chunk(shard, 0)
        time.sleep(0.02)
    assert [shard for shard in range(5) if holder.files.path(shard).exists()] == [0, 1, 3, 4]
    assert holder.chunk(0, 1).tolist() == local.chunk(0, 1).tolist() and len(asked) == len(set(asked))


def test_a_limit_that_is_wrong_too_small_or_would_delete_originals_is_refused(splits, tmp_path):
    for limit in ("many", 0, "1gb"):  # the last has no effect
        with pytest.raises(ValueError, match="dataset.cache_limit must be"):
            MDSSplit(splits["plain"], cache_limit=limit)
    data = MDSSplit(tmp_path / "train", remote=str(splits["packed"]), cache_limit=limit_for(splits["packed"], 4))
    data.check_room([5, 2, 9, 1])
    with pytest.raises(ValueError, match="for 5 shards.*lower train_loader.shuffle_window"):
        data.check_room([5, 2, 9, 1, 0])
    mine = Path(shutil.copytree(splits["plain"], tmp_path / "mine"))
    with pytest.raises(ValueError, match="dataset.local must be .* deleted for good"):
        MDSSplit(mine, remote=str(splits["plain"]), cache_limit="1gb")


def test_what_is_wanted_soon_does_not_go_for_what_is_wanted_later(asked, splits, tmp_path):
    data = MDSSplit(tmp_path / "train", remote=str(splits["plain"]), cache_limit=limit_for(splits["plain"], 3))

    def there():
        return [shard for shard in range(4) if data.files.path(shard).exists()]

    data.prefetch([0, 1])
    wait_until(lambda: there() == [0, 1])
    data.chunk(2, 0)
    data.prefetch([1, 0])
    data.chunk(3, 0)
    assert there() == [0, 1, 3]  # 2 was used last, but is not wanted
    data.prefetch([0, 1, 2])
    wait_until(lambda: there() == [0, 1, 2])
    data.prefetch([0, 1, 2, 3])
    time.sleep(0.05)  # it goes on looking for room
    assert there() == [0, 1, 2]
    data.prefetch([1, 2, 3])  # the reader has gone on
    wait_until(lambda: there() == [1, 2, 3])


def test_a_shard_on_its_way_keeps_its_room_and_holds_nobody_up(splits, tmp_path, monkeypatch):
    begun, goes_on, waits = threading.Event(), threading.Event(), []

    def wait(name):
        if name == shard_file(splits["plain"], 0).name:
            begun.set()
            waits.append(goes_on.wait(20))

    watch(monkeypatch, before=wait)
    limit, local = limit_for(splits["plain"], 2), MDSSplit(splits["plain"])
    ahead, other = (MDSSplit(tmp_path / "train", remote=str(splits["plain"]), cache_limit=limit) for _ in range(2))
    ahead.prefetch([0])
    assert begun.wait(20) and other.chunk(1, 0).tolist() == local.chunk(1, 0).tolist()
    assert not other.room.clear(other.files, 2, ahead=True)  # for a third there is none
    goes_on.set()
    assert ahead.chunk(0, 0).tolist() == local.chunk(0, 0).tolist() and waits == [True]


def test_nobody_waits_for_ever(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_PATIENCE", 0.5)
    limit, local = limit_for(splits["plain"], 2), MDSSplit(splits["plain"])
    data, other = (MDSSplit(tmp_path / "train", remote=str(splits["plain"]), cache_limit=limit) for _ in range(2))
    for shard in (0, 1):
        data.chunk(shard, 0)
    with pytest.raises(OSError, match="dataset.cache_limit must be larger"):
        other.chunk(9, 0)
    true = data.files.ensure

    def ensure(shard, release):  # before it is mapped, another process makes room of it
        true(shard, release)
        data.files.ensure = true
        data.files.path(shard).unlink()

    data.files.ensure = ensure
    for shard in (2, 3, 4):  # it unmaps its own
        assert data.chunk(shard, 0).tolist() == local.chunk(shard, 0).tolist()


def test_expanded_shards_go_unless_their_compressed_one_is_gone(splits, tmp_path, expected):
    mine = Path(shutil.copytree(splits["packed"], tmp_path / "train"))
    MDSSplit(mine).chunk(0, 0)
    raw = shard_file(mine, 0)
    os.utime(raw, (0, 0))
    shard_file(mine, 0, ".zstd").unlink()  # then the raw file is the only one
    data = MDSSplit(mine, cache_limit=limit_for(splits["plain"], 3))
    assert samples_of(data) == expected
    assert raw.exists() and 1 < len(list(mine.glob("*.mds"))) <= 4
    assert len(list(mine.glob("*.mds.zstd"))) == data.num_shards - 1


def test_what_a_process_that_died_held_is_free_again(splits, tmp_path):
    limit, local = limit_for(splits["plain"], 2), tmp_path / "train"
    data = MDSSplit(local, remote=str(splits["plain"]), cache_limit=limit)
    part = local / ".cache" / f"{data.files.path(0).name}.part"
    part.mkdir()
    (part / "half").write_bytes(bytes(limit // 2))  # nobody holds its lock
    data.chunk(1, 0)
    assert not part.exists()
    part.mkdir()
    (part / "half").write_bytes(b"x")
    assert data.chunk(0, 0).tolist() == MDSSplit(splits["plain"]).chunk(0, 0).tolist() and used(local) <= limit
