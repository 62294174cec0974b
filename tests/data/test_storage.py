"""Storage: one behaviour over a folder, an S3 server on loopback and fsspec; atomic, patient, no name is trusted."""

import io
import os
import pickle
import random
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import S3Server

from ettin_foundry.data.storage import _client, is_url, join, open_storage

BLOCK = 1000


@pytest.fixture(scope="module")
def running():
    with S3Server() as server:
        yield server


@pytest.fixture
def server(running, monkeypatch):
    running.empty()
    running.connect(monkeypatch, block_bytes=BLOCK)
    return running


@pytest.fixture(params=["local", "file", "s3", "memory"])
def storage(request, tmp_path):
    """An empty storage of each kind."""
    if request.param == "s3":
        return open_storage(request.getfixturevalue("server").url("some/set/"))
    fsspec.filesystem("memory").store.clear()
    places = {"local": str(tmp_path / "set"), "file": f"file://{tmp_path}/set", "memory": "memory://some/set"}
    return open_storage(places[request.param])


def test_what_is_written_is_read_listed_and_deleted(storage):
    assert storage.list() == [] and not storage.exists("a")
    content = {"a.bin": os.urandom(10), "train/b.bin": os.urandom(5 * BLOCK + 7), "train/b2/c": b"", "units/1": b"{}"}
    for name in reversed(content):
        storage.write_bytes(name, b"old")
        storage.write_bytes(name, content[name])
    storage.write_bytes("train/.hidden", b"x")
    storage.write_bytes(".work/x", b"x")
    assert storage.list() == [(name, len(content[name])) for name in sorted(content)]
    assert storage.list("train/") == [("train/b.bin", 5 * BLOCK + 7), ("train/b2/c", 0)]
    assert storage.list("train/b2/") == [("train/b2/c", 0)] and storage.list("t/") == storage.list("train/x/") == []
    for name, data in content.items():
        assert storage.read_bytes(name) == data and storage.size(name) == len(data) and storage.exists(name)
    assert storage.read_bytes("train/.hidden") == b"x"
    assert not storage.exists("train") and not storage.exists("trai")  # a folder is no file
    with pytest.raises(ValueError, match="a.bin must have at most 9 bytes, got 10"):
        storage.read_bytes("a.bin", at_most=9)
    for _ in range(2):
        storage.delete("a.bin")
    assert len(storage.list()) == 3 and not storage.exists("a.bin")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("units/1") == b"{}"


def test_a_stream_reads_and_seeks_like_a_file(storage):
    data = b"a\nbc\n" * BLOCK
    storage.write_bytes("x", data)
    rng, expected = random.Random(0), io.BytesIO(data)
    with storage.open("x") as stream:
        for _ in range(200):
            position, number = rng.randrange(len(data)), rng.choice([0, 1, 17, BLOCK, 3 * BLOCK])
            assert rng.random() < 0.7 or stream.seek(position) == expected.seek(position)
            assert stream.read(number) == expected.read(number) and stream.tell() == expected.tell()
        assert stream.seek(-5, io.SEEK_END) == len(data) - 5 and list(stream) == [b"a\n", b"bc\n"]


def test_files_move_in_and_are_copied_out(storage, tmp_path):
    data = os.urandom(3 * BLOCK + 1)
    (made := storage.scratch() / "made").write_bytes(data)
    storage.put_file(made, "train/x")
    assert storage.read_bytes("train/x") == data and not made.exists()
    target = tmp_path / "cache" / "deep" / "x"
    storage.get_file("train/x", target, num_bytes=len(data))
    assert target.read_bytes() == data and [path.name for path in target.parent.iterdir()] == ["x"]
    with pytest.raises(ValueError, match="train/x must have 3000 bytes, got 3001"):
        storage.get_file("train/x", tmp_path / "cache" / "y", num_bytes=3000)
    assert not (tmp_path / "cache" / "y").exists() and storage.list() == [("train/x", len(data))]
    for name in ("y", "train"):  # missing, and a folder
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            storage.open(name)


def test_a_name_that_leaves_the_folder_is_refused(storage, tmp_path):
    (tmp_path / "x").write_bytes(b"secret")
    asks = (storage.size, storage.exists, storage.read_bytes, storage.open, storage.delete,
            lambda name: storage.write_bytes(name, b"bad"), lambda name: storage.list(f"{name}/x"),
            lambda name: storage.get_file(name, tmp_path / "out"), lambda name: storage.put_file(tmp_path / "x", name))
    for name in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.", "./a", "a/", "a\0b", ".."):
        for ask in asks:
            with pytest.raises(ValueError, match="must be a plain name inside the folder"):
                ask(name)
    assert (tmp_path / "x").read_bytes() == b"secret"


def test_a_pointer_in_place_of_a_file_is_never_read(storage):
    for pointer in (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", b"/annex/objects/SHA256E-4d7a\n"):
        storage.write_bytes("train/x.mds", pointer)
        with pytest.raises(ValueError, match="train/x.mds must be the file itself.*run git lfs pull"):
            storage.open("train/x.mds")
    storage.write_bytes("y", b"a text on " + pointer)
    assert storage.read_bytes("y") == b"a text on " + pointer


def test_places_are_told_apart_and_joined():
    assert [is_url(text) for text in ("s3://b/c", "gs://b", "file:///x", "/x/y", "x", "C:/x", "hf://datasets/x/y")] == \
        [True, True, False, False, False, False, True]
    assert join("s3://b/c/", "d", "e") == join("s3://b/c", "d/e") == "s3://b/c/d/e"
    assert join("/a/b", "c", "d") == join("file:///a/b", "c/d") == "/a/b/c/d"
    for url in ("s3://", "nowhere://x/y", ""):
        with pytest.raises(ValueError, match=url or "empty"):
            open_storage(url)


def test_writing_locally_is_atomic_and_leaves_nothing(tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "set")
    storage.write_bytes("x", b"old")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("no")))
    for act in (lambda: storage.write_bytes("x", b"new"), lambda: storage.get_file("x", tmp_path / "y" / "z")):
        with pytest.raises(OSError, match="no"):
            act()
    assert storage.read_bytes("x") == b"old" and not [*storage.scratch().iterdir(), *(tmp_path / "y").iterdir()]


def test_a_listing_follows_links_to_files_names_others_leaves_pipes_out_and_never_hides_an_error(
        tmp_path, caplog, monkeypatch):
    real, folder = tmp_path / "real", tmp_path / "in"
    for path in (real, folder):
        path.mkdir()
    (real / "a.txt").write_text("abc")
    for name, target in (("b.txt", real / "a.txt"), ("more", real), ("broken", tmp_path / "nowhere")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    storage = open_storage(folder)
    assert storage.list() == [("b.txt", 3)]
    assert "more: is a link to a folder" in caplog.text and "broken: is a link to nothing" in caplog.text
    with pytest.raises(FileNotFoundError):
        storage.open("pipe")
    monkeypatch.setattr("os.scandir", Mock(side_effect=PermissionError))  # root may list everything: no use of modes
    with pytest.raises(PermissionError):
        storage.list()


def test_lost_connections_and_busy_answers_cost_one_block_each(server, tmp_path, monkeypatch):
    server.connect(monkeypatch, block_bytes=1 << 20)
    server.put("set/x", data := os.urandom(7 << 20))
    server.clear()
    server.cut(lambda request: request.range is not None and "bytes=0-" not in str(request.range), times=2, after=10)
    server.fail(lambda request: request.range is not None, status=503)
    open_storage(server.url("set")).get_file("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data and not server.faults_left()
    ranges = [str(request.range) for request in server.requests if request.range]
    assert len(ranges) > 7 and len(ranges) == len(set(ranges)) + 3


class HTTPError(Exception):
    def __init__(self, status):
        self.status = status


@pytest.mark.parametrize(("act", "method", "error"), [
    (lambda s, t: s.write_bytes("new", b"12"), "put_file", HTTPError(503)),
    (lambda s, t: s.put_file(t / "made", "new"), "put_file", HTTPError(429)),
    (lambda s, t: s.list(), "find", TimeoutError()), (lambda s, t: s.size("x"), "info", ConnectionResetError()),
    (lambda s, t: s.delete("x"), "rm_file", HTTPError(500)),
    (lambda s, t: s.get_file("x", t / "got"), "cat_file", HTTPError(408)),
    (lambda s, t: s.get_file("x", t / "got"), "cat_file", None)])  # the answer is too short
def test_whatever_is_asked_is_asked_for_minutes_with_growing_pauses_and_it_is_said(
        monkeypatch, caplog, tmp_path, act, method, error):
    """An outage of five minutes passes; one that does not end is an error after at most twenty."""
    clock, faults, true = [0.0], [], getattr(MemoryFileSystem, method)

    def fail(*arguments, **options):
        if clock[0] < outage:
            faults.append(clock[0])
            if error is None:
                return b""
            raise error
        return true(*arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, method, fail)
    monkeypatch.setattr("ettin_foundry.data.storage.time", SimpleNamespace(
        sleep=lambda seconds: clock.__setitem__(0, clock[0] + seconds)))
    storage, outage = open_storage("memory://x"), 0.0
    storage.write_bytes("x", b"1")
    (tmp_path / "made").write_bytes(b"12")
    outage = float("inf")
    with pytest.raises(ConnectionError, match="memory://x"):
        act(storage, tmp_path)
    assert clock[0] < 1500 and [path.name for path in tmp_path.iterdir()] == ["made"]  # nothing half is there
    outage = clock[0] + 300
    faults.clear()
    act(storage, tmp_path)
    pauses = [later - sooner for sooner, later in zip(faults, faults[1:])]
    assert pauses == sorted(pauses) and pauses[0] < 5 < pauses[-1]
    assert "memory://x" in caplog.text and "tried again in 2 s, for ten minutes" in caplog.text


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (401, PermissionError), (404, FileNotFoundError),
                                              (400, OSError)])
def test_refusals_are_final(server, monkeypatch, status, kind):
    server.put("set/x", b"12")
    server.fail(lambda request: request.method == "GET", times=9, status=status)
    with pytest.raises(kind, match="s3://corpus/set/x"):
        open_storage(server.url("set")).read_bytes("x")
    assert server.faults_left() == 8
    monkeypatch.setattr(MemoryFileSystem, "info", fail := Mock(side_effect=HTTPError(status)))
    with pytest.raises(kind):
        open_storage("memory://x").size("y")
    assert fail.call_count == 1


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(server):
    server.put("set/x", b"a" * (3 << 20))
    with open_storage(server.url("set")).open("x") as stream:
        assert stream.read(10) == b"a" * 10
        server.put("set/x", b"b" * (3 << 20))
        with pytest.raises(OSError, match="set/x"):
            stream.read()


def test_names_that_lead_out_of_a_bucket_are_left_out(server, caplog):
    for key in ("many/x", "many/a//b", "many/../x", "many/folder/", "manyother"):
        server.put(key, b"")
    assert open_storage(server.url("many")).list() == [("x", 0)]
    assert "'a//b'" in caplog.text and "'../x'" in caplog.text


def test_a_forked_process_has_a_client_and_a_scratch_folder_of_its_own(server):
    def own():
        assert storage.read_bytes("x") == b"12"
        return id(_client(storage.url, os.getpid(), server.endpoint)[0]), storage.scratch()

    server.put("set/x", b"12")
    storage = open_storage(server.url("set"))
    before = own()
    if not (child := os.fork()):
        try:
            os._exit(any(mine == theirs for mine, theirs in zip(own(), before)))
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
