"""Storage over a network that fails: what is tried again, what is final, and that nothing half is ever seen."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import Request, S3Server, noise

from ettin_foundry.data import storage_remote
from ettin_foundry.data.storage import open_storage

BLOCK = 1000


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def server(running_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server with an empty bucket, blocks of 1,000 bytes."""
    running_server.empty()
    running_server.connect(monkeypatch, block_bytes=BLOCK)
    return running_server


def is_get(request: Request) -> bool:
    return request.method == "GET" and request.range is not None


def test_lost_connections_and_busy_answers_cost_one_block_each(server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    data = noise(6 * BLOCK)
    server.put("set/x", data)
    storage = open_storage(server.url("set"))
    server.cut(lambda request: request.range == "bytes=1000-1999", times=2, after=10)
    server.fail(lambda request: request.range == "bytes=3000-3999", status=503)
    server.fail(lambda request: request.range == "bytes=4000-4999", status=429)
    server.clear_requests()
    with storage.open("x") as stream:
        assert stream.read() == data
    assert sorted(request.range or "" for request in server.requests) == sorted(
        [""] + [f"bytes={begin}-{begin + 999}" for begin in (0, 1000, 1000, 1000, 2000, 3000, 3000, 4000, 4000, 5000)])
    assert caplog.text.count("s3://corpus/set/x") == 4 and "try 3 of 5" in caplog.text and "IncompleteRead" in caplog.text


@pytest.mark.parametrize(("act", "method"), [
    (lambda s, t: s.write_bytes("new", b"12"), "PUT"), (lambda s, t: s.put_file(t / "made", "new"), "PUT"),
    (lambda s, t: s.list(), "GET"), (lambda s, t: s.size("x"), "HEAD"), (lambda s, t: s.delete("x"), "DELETE"),
    (lambda s, t: s.get_file("x", t / "got"), "GET")], ids=["write", "put", "list", "size", "delete", "get"])
def test_every_request_is_tried_again_and_given_up_in_the_end(server: S3Server, tmp_path: Path, act: object,
                                                              method: str) -> None:
    server.put("set/x", noise(10))
    (tmp_path / "made").write_bytes(b"12")
    storage = open_storage(server.url("set"))
    server.fail(lambda request: request.method == method, times=4, status=500)
    act(storage, tmp_path)
    (tmp_path / "made").write_bytes(b"12")
    (tmp_path / "got").unlink(missing_ok=True)
    server.fail(lambda request: request.method == method, times=5, status=500)
    with pytest.raises(ConnectionError, match=r"s3://corpus/set.*: no answer after 5 tries \(.*500.*\); a store that can"):
        act(storage, tmp_path)
    assert (tmp_path / "made").exists() and not (tmp_path / "got").exists()  # nothing is lost, nothing half is there
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_refusals_are_final(server: S3Server) -> None:
    server.put("set/x", b"12")
    storage = open_storage(server.url("set"))
    for status, kind, text in [(403, PermissionError, "access is refused.*Check them"), (401, PermissionError, "access"),
                               (404, FileNotFoundError, "no such file"), (400, OSError, "the store refuses .*S3_ENDPOINT")]:
        server.clear()
        server.fail(lambda request: True, times=9, status=status)
        with pytest.raises(kind, match=f"s3://corpus/set/x: {text}"):
            storage.read_range("x", 0, 2)
        assert len(server.requests) == 1
    server.clear()
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/x"):
        open_storage("s3://no-such-bucket").read_bytes("x")


def test_server_that_is_not_there_is_a_clear_error(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no answer after 5 tries .*Check the network and the endpoint"):
        open_storage("s3://corpus/set").list()


def test_file_that_is_replaced_while_it_is_read_is_an_error(server: S3Server) -> None:
    server.put("set/x", b"a" * 5 * BLOCK)
    with open_storage(server.url("set")).open("x") as stream:
        assert stream.read(10) == b"a" * 10
        server.put("set/x", b"b" * 5 * BLOCK)
        with pytest.raises(OSError, match="set/x: it was replaced while it was read"):
            stream.read()


def test_next_block_is_fetched_while_one_is_used(server: S3Server) -> None:
    server.put("set/x", noise(4 * BLOCK))
    with open_storage(server.url("set")).open("x") as stream:
        raw = stream.raw  # type: ignore[attr-defined]
        raw.read(10)
        raw.ahead.join()
        assert [request.range for request in server.requests if is_get(request)] == ["bytes=0-999", "bytes=1000-1999"]


def test_large_files_go_up_in_parts(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin_foundry.data.storage_s3._UPLOAD_PART_BYTES", 5 << 20)  # the least that S3 allows
    data = noise(11 << 20)
    (tmp_path / "x").write_bytes(data)
    server.fail(lambda request: "partNumber=2" in request.query)
    open_storage(server.url("set")).put_file(tmp_path / "x", "x")
    assert server.get("set/x") == data and len([r for r in server.requests if "partNumber=3" in r.query]) == 1


def test_many_files_are_listed_page_by_page(server: S3Server, monkeypatch: pytest.MonkeyPatch,
                                            caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("ettin_foundry.data.storage_s3._PAGE", 10)
    for key in [f"many/{number:02d}" for number in range(25)] + ["many/a//b", "many/../x", "many/folder/", "manyother"]:
        server.put(key, b"")
    server.clear()
    server.fail(lambda request: "continuation-token" in request.query)
    assert open_storage(server.url("many")).list() == [(f"{number:02d}", 0) for number in range(25)]
    assert len(server.requests) == 4 and "'a//b'" in caplog.text and "'../x'" in caplog.text


FORKED = """
import os, sys
from ettin_foundry.data.storage import open_storage
storage = open_storage(sys.argv[1])
scratch = storage.scratch()
assert storage.read_bytes("x") == b"12"
child = os.fork()
mine = storage.scratch()
assert (mine == scratch) == bool(child) and storage.read_bytes("x") == b"12"
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(scratch)
"""


def test_forked_process_has_a_client_and_a_scratch_folder_of_its_own(server: S3Server) -> None:
    server.put("set/x", b"12")
    done = subprocess.run([sys.executable, "-c", FORKED, server.url("set")], capture_output=True, text=True, check=True,
                          env={**os.environ, **server.environment}, cwd=Path(__file__).resolve().parents[2])
    assert not Path(done.stdout.strip()).exists()


def test_chance_in_retries_does_not_touch_the_seeded_generator(server: S3Server) -> None:
    server.put("set/x", b"12")
    server.fail(is_get, times=3)
    state = random.getstate()
    assert open_storage(server.url("set")).read_range("x", 0, 2) == b"12" and random.getstate() == state


def test_waits_grow_and_are_logged(server: S3Server, monkeypatch: pytest.MonkeyPatch,
                                   caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage_remote, "FIRST_DELAY", 1.0)
    monkeypatch.setattr("time.sleep", waits.append)
    server.put("set/x", b"12")
    server.fail(is_get, times=5)
    with caplog.at_level(logging.WARNING), pytest.raises(ConnectionError):
        open_storage(server.url("set")).read_range("x", 0, 2)
    assert len(waits) == 4 == caplog.text.count("s3://corpus/set/x") and all(
        3**n / 2 <= wait <= 3**n for n, wait in enumerate(waits))


class Flaky:
    """An fsspec file system whose first answers are errors."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def invalidate_cache(self) -> None:
        pass

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        if self.errors:
            raise self.errors.pop(0)
        return b"0123456789"[start:end]

    def info(self, path: str) -> dict[str, object]:
        return {"type": "file", "size": 10}


def http_error(status: int) -> Exception:
    error = Exception("answer")
    error.status = status  # type: ignore[attr-defined]
    return error


def test_fsspec_drivers_are_tried_again_where_that_may_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_remote, "FIRST_DELAY", 0.0)
    storage = open_storage("memory://x")

    def with_errors(*errors: Exception) -> bytes:
        system = Flaky(*errors)
        monkeypatch.setattr("ettin_foundry.data.storage_fsspec.client_of_this_process", lambda key, make: (system, "/x"))
        return storage.read_range("y", 2, 5)

    assert with_errors(ConnectionResetError(), TimeoutError(), http_error(503), http_error(429)) == b"234"
    for error, kind in [(http_error(404), FileNotFoundError), (http_error(403), PermissionError),
                        (PermissionError(), PermissionError), (FileNotFoundError(), FileNotFoundError),
                        (ValueError(), ValueError)]:
        with pytest.raises(kind):
            with_errors(error)
    with pytest.raises(OSError, match="memory:// does not allow this; a store that can be read, written and listed"):
        with_errors(NotImplementedError())
    with pytest.raises(ConnectionError, match="memory://x/y: no answer after 5 tries"):
        with_errors(*[ConnectionResetError()] * 5)
