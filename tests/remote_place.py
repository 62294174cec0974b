"""For tests of remote sets: the same split plain and packed on an S3 server, and processes that read from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstd
from hand_made import CHUNK_LENGTH, random_documents, write_split
from s3_server import S3Server

from ettin_foundry.data import cache
from ettin_foundry.data.order import Order
from ettin_foundry.data.shards import MDSSplit

SOURCES = "aabaabaaab"
KINDS = pytest.mark.parametrize("kind", ["plain", "packed"])
SPAWN = multiprocessing.get_context("spawn")  # the server's threads must not be forked


def make_splits(place: Path) -> dict[str, Path]:
    """The same ten shards of two sources, plain and packed."""
    rng = np.random.default_rng(11)
    shards = [(source, random_documents(rng, 20 + number)) for number, source in enumerate(SOURCES)]
    return {"plain": write_split(place / "plain" / "train", shards),
            "packed": write_split(place / "packed" / "train", shards, compress=lambda data: zstd.compress(data, 3))}


@contextlib.contextmanager
def serve(splits: dict[str, Path]) -> Iterator[S3Server]:
    """A server with the splits as plain/train and packed/train."""
    with S3Server() as server:
        for kind, folder in splits.items():
            for path in folder.iterdir():
                server.put(f"{kind}/train/{path.name}", path.read_bytes())
        yield server


def fresh(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server with nothing asked yet, known to this process, whose waits are short."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("ettin_foundry.data.storage_remote.FIRST_DELAY", 0.0)
    monkeypatch.setattr(cache, "_IDLE", 0.02)
    monkeypatch.setattr(cache, "_POLL", 0.01)
    server.clear()
    return server


def downloads(server: S3Server) -> Counter[str]:
    """How often each shard was asked for."""
    return Counter(request.path.rpartition("/")[2] for request in server.requests
                   if request.method == "GET" and ".mds" in request.path)


def samples_of(data: MDSSplit) -> list[dict[str, Any]]:
    return [{**sample, "tokens": sample["tokens"].tolist()} for shard in range(data.num_shards)
            for sample in (data.sample(shard, index) for index in range(int(data.samples[shard])))]


def order_of(data: MDSSplit, window: int = 2) -> Order:
    return Order(data, CHUNK_LENGTH + 2, packing=True, shuffle=True, seed=3, window=window)


def train(data: MDSSplit, order: Order, rows: range, each: Callable[[int], object] = lambda row: None) -> str:
    """Reads rows as the loader does; a hash of all their tokens and ends."""
    digest = hashlib.sha256()
    for number in rows:
        data.prefetch(order.shards_ahead(number))
        _, shard, samples = order.row(number)
        for sample in samples:
            digest.update(data.chunk(shard, sample).tobytes() + bytes([data.last(shard)[sample]]))
        each(number)
    return digest.hexdigest()


def used(folder: Path) -> int:
    """Bytes of all shards in a folder, whole and partial, as a stranger would count them."""
    total = 0
    for path in [Path(place, name) for place, _, names in os.walk(folder) for name in names if ".mds" in name]:
        with contextlib.suppress(FileNotFoundError):
            total += 0 if path.suffix == ".lock" else path.stat().st_size
    return total


def shard_name(folder: Path, shard: int) -> str:
    return json.loads((folder / "manifest.json").read_text())["shards"][shard]["raw"]["basename"]


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def limit_for(folder: Path, number: int) -> int:
    """Just enough for so many shards, and for one packed one that is on its way."""
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    packed = max(shard["zip"]["bytes"] if shard["zip"] else 0 for shard in shards)
    return sum(sorted((shard["raw"]["bytes"] for shard in shards), reverse=True)[:number]) + packed


def read_as_rank(local: str, url: str, limit: int | None, rows: int, start: Any, answers: Any) -> None:
    """One process of a node."""
    data = MDSSplit(local, remote=url, cache_limit=limit)
    start.wait()
    answers.put(train(data, order_of(data), range(rows)))


def hold_and_wait(local: str, url: str, limit: int, ready: Any) -> None:
    """Reserves room for shard 0, begins its file, and waits to be killed."""
    data = MDSSplit(local, remote=url, cache_limit=limit)

    def stuck(*_: Any, **__: Any) -> None:
        (Path(local) / ".cache" / f"{shard_name(Path(local), 0)}.part" / "half").write_bytes(b"x" * 500)
        ready.set()
        time.sleep(600)

    data._files._make_in = stuck  # type: ignore[method-assign]
    data.chunk(0, 0)
