"""Remote and packed sets: the same rows as a local set, fetched once per node, ahead of need, again when damaged.

The remote place is an S3 server on loopback, which can be told to fail. Limits: test_cache_limit.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import random_documents, write_split
from remote_place import (
    KINDS,
    SOURCES,
    SPAWN,
    downloads,
    fresh,
    make_splits,
    order_of,
    read_as_rank,
    samples_of,
    serve,
    shard_name,
    train,
    wait_until,
)
from s3_server import S3Server

from ettin_foundry.data import cache, storage
from ettin_foundry.data.cache import locked
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


@pytest.fixture
def alter(server: S3Server) -> Iterator[Callable[[str, Callable[[bytes], bytes | None]], None]]:
    """Changes a file on the server, or deletes it, until the test ends."""
    before: dict[str, bytes] = {}

    def alter(key: str, change: Callable[[bytes], bytes | None]) -> None:
        before[key] = server.get(key)
        content = change(before[key])
        if content is None:
            server.client().delete_object(Bucket=server.bucket, Key=key)
        else:
            server.put(key, content)
        server.clear()

    yield alter
    for key, content in before.items():
        server.put(key, content)


# ------------------------------------------------------------------ the same data


@KINDS
def test_remote_samples_are_the_local_ones_bit_for_bit(server: S3Server, splits: dict[str, Path], tmp_path: Path,
                                                       kind: str) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url(f"{kind}/train"))
    assert {request.path.rpartition("/")[2] for request in server.requests} == {"manifest.json", "lengths.npy", "index.json"}
    assert samples_of(data) == samples_of(MDSSplit(splits["plain"]))
    assert data.fingerprint == MDSSplit(splits[kind]).fingerprint
    assert set(downloads(server).values()) == {1} and len(downloads(server)) == data.num_shards
    assert list((tmp_path / "train" / ".cache").iterdir()) == [tmp_path / "train" / ".cache" / "remote"]
    server.clear()
    again = MDSSplit(tmp_path / "train", remote=server.url(f"{kind}/train"))
    assert samples_of(again) == samples_of(data) and not downloads(server)


@KINDS
def test_a_read_only_folder_may_be_the_remote_place(splits: dict[str, Path], tmp_path: Path, kind: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in splits[kind].rglob("*")}
    data = MDSSplit(tmp_path / "train", remote=str(splits[kind]))
    assert samples_of(data) == samples_of(MDSSplit(splits["plain"]))
    assert {path: path.stat().st_mtime_ns for path in splits[kind].rglob("*")} == before


def test_two_processes_with_one_folder_fetch_each_shard_once(server: S3Server, splits: dict[str, Path],
                                                             tmp_path: Path) -> None:
    local = MDSSplit(splits["plain"])
    rows = 2 * order_of(local).rows_per_epoch
    expected = train(local, order_of(local), range(rows))
    start, answers = SPAWN.Barrier(2), SPAWN.Queue()
    ranks = [SPAWN.Process(target=read_as_rank, args=(str(tmp_path / "train"), server.url("packed/train"), None, rows,
                                                      start, answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert [answers.get(timeout=60) for _ in ranks] == [expected] * 2
    for rank in ranks:
        rank.join()
    assert downloads(server) == Counter([shard_name(splits["packed"], shard) + ".zstd" for shard in range(local.num_shards)])


# ------------------------------------------------------------------ failures on the way


def test_a_lost_connection_resumes_where_it_broke(server: S3Server, splits: dict[str, Path], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 512)
    data = MDSSplit(tmp_path / "train", remote=server.url("plain/train"))
    name, size = shard_name(splits["plain"], 0), data.manifest["shards"][0]["raw"]["bytes"]
    server.clear()
    server.cut(lambda request: name in request.path and request.range == "bytes=1024-1535", times=2, after=100)
    server.fail(lambda request: name in request.path and request.range == "bytes=1536-2047", times=1, status=503)
    assert data.chunk(0, 0).tolist() == MDSSplit(splits["plain"]).chunk(0, 0).tolist()
    asked = Counter(request.range for request in server.requests if request.method == "GET" and name in request.path)
    assert len(asked) == -(-size // 512) > 3
    assert asked.pop("bytes=1024-1535") == 3 and asked.pop("bytes=1536-2047") == 2 and set(asked.values()) == {1}
    assert "try 2 of 5" in caplog.text


def test_a_place_that_stays_silent_stops_the_run_and_is_no_bad_shard(server: S3Server, splits: dict[str, Path],
                                                                     tmp_path: Path) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url("plain/train"), on_bad_shard="skip")
    server.fail(lambda request: ".mds" in request.path, times=10**6)
    with pytest.raises(ConnectionError, match="no answer after 5 tries"):
        data.chunk(0, 0)
    server.clear()
    assert samples_of(data) == samples_of(MDSSplit(splits["plain"]))  # as soon as it is back
    assert not (tmp_path / "train" / "substitutions.jsonl").exists()


@KINDS
def test_a_shard_that_was_damaged_on_the_way_is_fetched_once_more(server: S3Server, splits: dict[str, Path], tmp_path: Path,
                                                                  kind: str, monkeypatch: pytest.MonkeyPatch,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url(f"{kind}/train"))
    true, damaged = storage.Storage.get_file, []

    def get_file(self: storage.Storage, name: str, local_path: Path, **options: Any) -> None:
        true(self, name, local_path, **options)
        if not damaged:
            damaged.append(name)
            content = bytearray(Path(local_path).read_bytes())
            content[-1] ^= 1
            Path(local_path).write_bytes(content)

    monkeypatch.setattr(storage.Storage, "get_file", get_file)
    assert samples_of(data) == samples_of(MDSSplit(splits["plain"]))
    assert caplog.text.count("it is fetched once more") == 1 and damaged[0] in caplog.text
    assert downloads(server)[damaged[0]] == 2


@KINDS
def test_a_shard_that_is_bad_at_its_source_stops_the_run_with_its_name_or_is_replaced(
        server: S3Server, alter: Callable, splits: dict[str, Path], tmp_path: Path, kind: str) -> None:
    name = shard_name(splits[kind], 1) + (".zstd" if kind == "packed" else "")
    alter(f"{kind}/train/{name}", lambda content: content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
    url = server.url(f"{kind}/train")
    with pytest.raises(ValueError, match=rf"s3://.*{name}: xxh64 is"):
        MDSSplit(tmp_path / "stop", remote=url).chunk(1, 0)
    assert downloads(server)[name] == 2
    assert not any((tmp_path / "stop").glob("*.mds"))  # no byte of it was kept
    local = MDSSplit(splits["plain"])
    data = MDSSplit(tmp_path / "skip", remote=url, on_bad_shard="skip")
    data_order, local_order = order_of(data), order_of(local)
    for number in range(local_order.rows_per_epoch):  # rows and clock are those of the good set
        mine, good = data_order.row(number), local_order.row(number)
        assert [len(data.chunk(mine[1], s)) for s in mine[2]] == [len(local.chunk(good[1], s)) for s in good[2]]
        assert data_order.tokens_before(number) == local_order.tokens_before(number)
        if good[1] != 1:
            assert mine == good
    [record] = (tmp_path / "skip" / "substitutions.jsonl").read_text().splitlines()
    assert json.loads(record)["shard"] == shard_name(splits[kind], 1)


def test_a_missing_remote_shard_stops_with_its_name_or_is_replaced(server: S3Server, alter: Callable,
                                                                   splits: dict[str, Path], tmp_path: Path) -> None:
    name = shard_name(splits["plain"], 1)
    alter(f"plain/train/{name}", lambda content: None)
    url = server.url("plain/train")
    with pytest.raises(FileNotFoundError, match=name):
        MDSSplit(tmp_path / "train", remote=url).chunk(1, 0)
    assert MDSSplit(tmp_path / "train", remote=url, on_bad_shard="skip").chunk(1, 0).size


@pytest.mark.parametrize("name", ["shard", "lengths.npy"])
@KINDS
def test_a_flipped_byte_in_the_local_copy_is_mended_by_one_fetch(server: S3Server, splits: dict[str, Path], tmp_path: Path,
                                                                 kind: str, name: str) -> None:
    url = server.url(f"{kind}/train")
    MDSSplit(tmp_path / "train", remote=url).chunk(1, 0)
    path = tmp_path / "train" / (shard_name(splits[kind], 1) if name == "shard" else name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    server.clear()
    assert samples_of(MDSSplit(tmp_path / "train", remote=url)) == samples_of(MDSSplit(splits["plain"]))
    assert len([request for request in server.requests if request.method == "GET" and path.name in request.path]) == 1


# ------------------------------------------------------------------ ahead of need


def test_shards_are_fetched_in_the_order_of_need_without_being_read(server: S3Server, splits: dict[str, Path],
                                                                    tmp_path: Path) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url("plain/train"))
    wanted = order_of(data).shards_ahead(0)
    assert len(wanted) > 3
    data.prefetch(wanted)
    wait_until(lambda: all((tmp_path / "train" / shard_name(splits["plain"], shard)).exists() for shard in wanted))
    asked = [request.path.rpartition("/")[2] for request in server.requests if request.method == "GET"]
    assert [name for name in asked if name.endswith(".mds")] == [shard_name(splits["plain"], shard) for shard in wanted]
    wait_until(lambda: not any(thread.name == "ettin-shards-ahead" for thread in threading.enumerate()))


def test_a_shard_that_another_process_fetches_is_left_to_it(server: S3Server, splits: dict[str, Path],
                                                            tmp_path: Path) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url("plain/train"))
    name = shard_name(splits["plain"], 0)
    with locked(tmp_path / "train" / ".cache" / f"{name}.lock"):
        data.prefetch([0, 1])
        wait_until(lambda: (tmp_path / "train" / shard_name(splits["plain"], 1)).exists())
        assert not downloads(server)[name]
    assert data.chunk(0, 0).size and downloads(server)[name] == 1


def test_errors_ahead_of_need_wait_for_who_needs_the_shard(server: S3Server, splits: dict[str, Path], tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url("plain/train"))
    server.fail(lambda request: shard_name(splits["plain"], 0) in request.path, times=5)
    data.prefetch([0, 1])
    wait_until(lambda: (tmp_path / "train" / shard_name(splits["plain"], 1)).exists())
    assert "could not be fetched ahead of need" in caplog.text
    assert data.chunk(0, 0).size


def test_a_copied_or_forked_set_fetches_for_itself(server: S3Server, splits: dict[str, Path], tmp_path: Path) -> None:
    data = MDSSplit(tmp_path / "train", remote=server.url("plain/train"))
    data.prefetch([0])
    data.chunk(0, 0)
    copy = pickle.loads(pickle.dumps(data))
    copy.prefetch([1])
    wait_until(lambda: (tmp_path / "train" / shard_name(splits["plain"], 1)).exists())
    if not (child := os.fork()):
        good = False
        try:
            data.prefetch([2])
            wait_until(lambda: (tmp_path / "train" / shard_name(splits["plain"], 2)).exists())
            good = data.chunk(2, 0).tolist() == MDSSplit(splits["plain"]).chunk(2, 0).tolist()
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


# ------------------------------------------------------------------ small files


def test_a_grown_remote_set_is_followed_when_its_old_tables_are_deleted(tmp_path: Path, splits: dict[str, Path],
                                                                        caplog: pytest.LogCaptureFixture) -> None:
    place = Path(shutil.copytree(splits["plain"], tmp_path / "place"))
    local = tmp_path / "train"
    samples_of(MDSSplit(local, remote=str(place)))
    shutil.rmtree(place)
    rng = np.random.default_rng(11)
    shards = [(source, random_documents(rng, 20 + number)) for number, source in enumerate(SOURCES)]
    write_split(place, [*shards, ("c", random_documents(rng, 9))])
    with pytest.raises(ValueError, match="holds another set than dataset.remote.*delete manifest.json, lengths.npy"):
        MDSSplit(local, remote=str(place))
    for name in ("manifest.json", "lengths.npy", "index.json"):
        (local / name).unlink()
    before = {path.name: path.stat().st_ino for path in local.glob("*.mds")}
    grown = MDSSplit(local, remote=str(place))
    assert samples_of(grown) == samples_of(MDSSplit(place)) and grown.num_shards == len(SOURCES) + 1
    assert {name: (local / name).stat().st_ino for name in before} == before  # nothing was fetched twice


def test_the_tokenizer_of_a_remote_set_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, local = tmp_path / "place", tmp_path / "set"
    with pytest.raises(FileNotFoundError, match="place/tokenizer: holds no file"):
        cache.fetch_tokenizer(local, str(place))
    (place / "tokenizer").mkdir(parents=True)
    (place / "tokenizer" / "tokenizer.json").write_text("{}")
    cache.fetch_tokenizer(local, str(place))
    assert (local / "tokenizer" / "tokenizer.json").read_text() == "{}"
    (place / "tokenizer" / "tokenizer.json").write_text("other")
    cache.fetch_tokenizer(local, str(place))
    assert (local / "tokenizer" / "tokenizer.json").read_text() == "{}"
    shutil.rmtree(local)
    for listed, message in (([("tokenizer/../../../escaped", 2)], "plain name inside"),
                            ([("tokenizer/a", 1 << 40)], "are fetched")):
        monkeypatch.setattr(storage.LocalStorage, "list", lambda self, prefix, listed=listed: listed)
        with pytest.raises(ValueError, match=message):
            cache.fetch_tokenizer(local, str(place))
