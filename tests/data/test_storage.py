"""Storage: one behaviour over a folder, an S3 server on loopback and fsspec; atomic, tried again, and no name is trusted."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server

from ettin_foundry.data.storage import LocalStorage, Storage, is_url, join, open_storage

BLOCK = 1000


def noise(number: int) -> bytes:
    return random.Random(number).randbytes(number)


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


@pytest.fixture(params=["local", "file", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "s3":
        return open_storage(request.getfixturevalue("server").url("some/set/"))
    if request.param == "memory":
        import fsspec

        fsspec.filesystem("memory").store.clear()
    places = {"local": str(tmp_path / "set"), "file": f"file://{tmp_path}/set", "memory": "memory://some/set"}
    return open_storage(places[request.param])


# ------------------------------------------------------------------ the same over every kind


def test_what_is_written_is_read_listed_and_deleted(storage: Storage) -> None:
    assert storage.list() == [] and not storage.exists("a")
    content = {"a.bin": noise(10), "train/b.bin": noise(5 * BLOCK + 7), "train/b2/c": b"", "units/00001.json": b"{}"}
    for name in reversed(content):
        storage.write_bytes(name, b"old")
        storage.write_bytes(name, content[name])
    storage.write_bytes("train/.hidden", b"x")
    storage.write_bytes(".work/x", b"x")
    assert storage.list() == [(name, len(content[name])) for name in sorted(content)]
    assert storage.list("train/") == [("train/b.bin", 5 * BLOCK + 7), ("train/b2/c", 0)] == storage.list("train/b")
    assert storage.list("train/b.") == [("train/b.bin", 5 * BLOCK + 7)]
    assert storage.list("t/") == storage.list("train/x") == []
    for name, data in content.items():
        assert storage.read_bytes(name) == data and storage.size(name) == len(data) and storage.exists(name)
    assert storage.read_bytes("train/.hidden") == b"x"
    assert not storage.exists("train") and not storage.exists("trai")  # a folder is no file
    with pytest.raises(ValueError, match="a.bin must have at most 9 bytes, got 10"):
        storage.read_bytes("a.bin", at_most=9)
    storage.delete("a.bin")
    storage.delete("a.bin")
    assert storage.list("a") == [] and not storage.exists("a.bin")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("units/00001.json") == b"{}"


def test_a_stream_reads_and_seeks_like_a_file(storage: Storage) -> None:
    data = noise(4 * BLOCK + 123)
    storage.write_bytes("x", data)
    rng, expected = random.Random(0), io.BytesIO(data)
    with storage.open("x") as stream:
        for _ in range(200):
            if rng.random() < 0.3:
                position = rng.randrange(len(data))
                assert stream.seek(position) == expected.seek(position)
            number = rng.choice([0, 1, 17, BLOCK, 3 * BLOCK])
            assert stream.read(number) == expected.read(number) and stream.tell() == expected.tell()
        assert stream.seek(-5, io.SEEK_END) == len(data) - 5 and stream.read() == data[-5:]
    with storage.open("x", 1234) as stream:
        assert stream.tell() == 1234 and stream.read() == data[1234:]
    storage.write_bytes("lines", b"a\nb\n" * BLOCK)
    with storage.open("lines") as stream:
        assert list(stream) == [b"a\n", b"b\n"] * BLOCK


def test_files_move_in_and_are_copied_out(storage: Storage, tmp_path: Path) -> None:
    data = noise(3 * BLOCK + 1)
    for folder in (storage.scratch(), tmp_path):
        (folder / "made").write_bytes(data)
        storage.put_file(folder / "made", "train/x")
        assert storage.read_bytes("train/x") == data and not (folder / "made").exists()
    target = tmp_path / "cache" / "deep" / "x"
    storage.get_file("train/x", target, num_bytes=len(data))
    assert target.read_bytes() == data and [path.name for path in target.parent.iterdir()] == ["x"]
    with pytest.raises(ValueError, match="train/x must have 3000 bytes, got 3001"):
        storage.get_file("train/x", tmp_path / "cache" / "y", num_bytes=3000)
    assert not (tmp_path / "cache" / "y").exists() and storage.list() == [("train/x", len(data))]
    (storage.scratch() / "x").write_bytes(b"x")
    storage.clear_scratch()
    assert list(storage.scratch().iterdir()) == []


def test_a_missing_file_is_one_clear_error(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("folder/x", b"x")
    for name in ("y", "folder"):
        for ask in (storage.size, storage.read_bytes, storage.open,
                    lambda name: storage.get_file(name, tmp_path / "out")):
            with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
                ask(name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.", "./a", "a/", "a\0b", ".."])
def test_a_name_that_leaves_the_folder_is_refused(storage: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    for ask in (storage.size, storage.exists, storage.read_bytes, storage.open, storage.delete,
                lambda name: storage.write_bytes(name, b"bad"),
                lambda name: storage.get_file(name, tmp_path / "out"), lambda name: storage.put_file(tmp_path / "x", name)):
        with pytest.raises(ValueError, match="must be a plain name inside the folder"):
            ask(name)
    if name and "\0" not in name and name != "a//b":
        with pytest.raises(ValueError, match="must be a plain name"):
            storage.list(f"{name}/")
    assert (tmp_path / "x").read_bytes() == b"secret"


# ------------------------------------------------------------------ places


def test_places_are_told_apart_and_joined() -> None:
    assert [is_url(text) for text in ("s3://b/c", "gs://b", "file:///x", "/x/y", "x", "C:/x", "hf://datasets/x/y")] == \
        [True, True, False, False, False, False, True]
    assert join("s3://b/c/", "d", "e") == join("s3://b/c", "d/e") == "s3://b/c/d/e"
    assert join("/a/b", "c", "d") == join("file:///a/b", "c/d") == "/a/b/c/d"


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "nowhere://x/y", "memory://x::s3://y", ""])
def test_a_url_of_no_use_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match=url or "empty"):
        open_storage(url)


# ------------------------------------------------------------------ folders


def test_writing_locally_is_atomic_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path / "set")
    storage.write_bytes("x", b"old")
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("no")))
    for act in (lambda: storage.write_bytes("x", b"new"), lambda: storage.get_file("x", tmp_path / "y" / "z")):
        with pytest.raises(OSError, match="no"):
            act()
    assert storage.read_bytes("x") == b"old" and list(storage.scratch().iterdir()) == list((tmp_path / "y").iterdir()) == []


def test_put_file_works_across_file_systems(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    source = elsewhere / f"{tmp_path.parent.name}.{os.getpid()}"
    source.write_bytes(noise(100))
    storage = open_storage(tmp_path / "set")
    storage.put_file(source, "x")
    assert storage.read_bytes("x") == noise(100) and not source.exists() and list(storage.scratch().iterdir()) == []


def test_links_to_files_are_followed_those_to_folders_named_and_pipes_left_out(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("abc")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "b.txt").symlink_to(tmp_path / "real" / "a.txt")
    (folder / "more").symlink_to(tmp_path / "real")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    storage = open_storage(folder)
    assert storage.list() == [("b.txt", 3)] and "more: it is a link to a folder" in caplog.text
    with pytest.raises(FileNotFoundError):
        storage.open("pipe")


def test_a_folder_that_cannot_be_listed_is_an_error_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)  # root may list everything, so modes would prove nothing
    with pytest.raises(PermissionError, match="locked"):
        LocalStorage(str(tmp_path)).list()


# ------------------------------------------------------------------ networks that fail


def test_lost_connections_and_busy_answers_cost_one_block_each(server: S3Server, tmp_path: Path,
                                                               caplog: pytest.LogCaptureFixture) -> None:
    data = noise(7 << 20)
    server.put("set/x", data)
    server.clear()
    server.cut(lambda request: request.range is not None, times=2, after=10)
    server.fail(lambda request: request.range is not None, status=503)
    open_storage(server.url("set")).get_file("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data and not server.faults_left()
    ranges = Counter(request.range for request in server.requests if request.method == "GET")
    assert len(ranges) > 4 and ranges.total() == len(ranges) + 3 and "try 2 of 5" in caplog.text


@pytest.mark.parametrize(("act", "method"), [
    (lambda s, t: s.write_bytes("new", b"12"), "PUT"), (lambda s, t: s.put_file(t / "made", "new"), "PUT"),
    (lambda s, t: s.list(), "GET"), (lambda s, t: s.size("x"), "HEAD"), (lambda s, t: s.delete("x"), "DELETE"),
    (lambda s, t: s.get_file("x", t / "got"), "GET")], ids=["write", "put", "list", "size", "delete", "get"])
def test_every_request_is_tried_again_and_given_up_in_the_end(server: S3Server, tmp_path: Path,
                                                              act: Callable[[Storage, Path], object], method: str) -> None:
    server.put("set/x", noise(10))
    (tmp_path / "made").write_bytes(b"12")
    storage = open_storage(server.url("set"))
    server.fail(lambda request: request.method == method, times=3)
    act(storage, tmp_path)
    assert not server.faults_left()
    (tmp_path / "made").write_bytes(b"12")
    (tmp_path / "got").unlink(missing_ok=True)
    server.fail(lambda request: request.method == method, times=99)
    with pytest.raises(ConnectionError, match="s3://corpus/set"):
        act(storage, tmp_path)
    assert (tmp_path / "made").exists() and not (tmp_path / "got").exists()  # nothing is lost, nothing half is there
    assert not list(tmp_path.glob(".*partial"))


def test_refusals_are_final(server: S3Server) -> None:
    server.put("set/x", b"12")
    storage = open_storage(server.url("set"))
    for status, kind in [(403, PermissionError), (401, PermissionError), (404, FileNotFoundError), (400, OSError)]:
        server.clear()
        server.fail(lambda request: request.method == "GET", times=9, status=status)
        with pytest.raises(kind, match="s3://corpus/set/x"):
            storage.read_bytes("x")
        assert server.faults_left() == 8
    server.clear()
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/x"):
        open_storage("s3://no-such-bucket").read_bytes("x")


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(server: S3Server) -> None:
    server.put("set/x", b"a" * (3 << 20))
    with open_storage(server.url("set")).open("x") as stream:
        assert stream.read(10) == b"a" * 10
        server.put("set/x", b"b" * (3 << 20))
        with pytest.raises(OSError, match="set/x"):
            stream.read()


def test_large_files_go_up_in_parts(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin_foundry.data.storage_remote._PART_BYTES", 5 << 20)  # the least that S3 allows
    data = noise(11 << 20)
    (tmp_path / "x").write_bytes(data)
    server.fail(lambda request: "partNumber=2" in request.query)
    open_storage(server.url("set")).put_file(tmp_path / "x", "x")
    assert server.get("set/x") == data and len([r for r in server.requests if "partNumber=3" in r.query]) == 1


def test_many_files_are_listed_and_bad_names_left_out(server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    for key in [*(f"many/{number:04d}" for number in range(1001)), "many/a//b", "many/../x", "many/folder/", "manyother"]:
        server.put(key, b"")
    server.clear()
    server.fail(lambda request: "continuation-token" in request.query)
    assert open_storage(server.url("many")).list() == [(f"{number:04d}", 0) for number in range(1001)]
    assert "'a//b'" in caplog.text and "'../x'" in caplog.text


FORKED = """
import os, sys
from ettin_foundry.data.storage import open_storage
storage = open_storage(sys.argv[1])
scratch = storage.scratch()
assert storage.read_bytes("x") == b"12"
child = os.fork()
mine = storage.scratch()
assert (mine == scratch) == bool(child) and storage.read_bytes("x") == b"12"
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(scratch)
"""


def test_a_forked_process_has_a_client_and_a_scratch_folder_of_its_own(server: S3Server) -> None:
    server.put("set/x", b"12")
    done = subprocess.run([sys.executable, "-c", FORKED, server.url("set")], capture_output=True, text=True, check=True,
                          env={**os.environ, **server.environment}, cwd=Path(__file__).resolve().parents[2])
    assert not Path(done.stdout.strip()).exists()


def http_error(status: int) -> Exception:
    error = Exception("answer")
    error.status = status  # type: ignore[attr-defined]
    return error


def test_errors_of_fsspec_drivers_become_pythons_own(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("memory://x")
    for error, kind in [(http_error(404), FileNotFoundError), (http_error(403), PermissionError), (ValueError(), ValueError),
                        (PermissionError(), PermissionError), (FileNotFoundError(), FileNotFoundError),
                        (http_error(503), ConnectionError), (ConnectionResetError(), ConnectionError),
                        (NotImplementedError(), OSError)]:
        def info(*_: Any, error: Exception = error, **__: Any) -> dict[str, Any]:
            raise error

        monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", info)
        with pytest.raises(kind):
            storage.size("y")
