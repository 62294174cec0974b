"""Storage: one behaviour over a folder, an S3 server on loopback and fsspec; atomic, retried, and never trusting a name."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, noise

from ettin_foundry.data.storage import LocalStorage, Storage, is_url, join, open_storage

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


@pytest.fixture(params=["local", "file", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind."""
    if request.param == "s3":
        return open_storage(request.getfixturevalue("server").url("some/set/"))
    if request.param == "memory":
        import fsspec

        fsspec.filesystem("memory").store.clear()
    return open_storage({"local": str(tmp_path / "set"), "file": f"file://{tmp_path}/set", "memory": "memory://some/set"}
                        [request.param])


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
    storage.delete("a.bin")
    storage.delete("a.bin")
    assert storage.list("a") == [] and not storage.exists("a.bin")


def test_stream_reads_seeks_and_tells_like_a_file(storage: Storage) -> None:
    data = noise(4 * BLOCK + 123)
    storage.write_bytes("x", data)
    rng, expected = random.Random(0), io.BytesIO(data)
    with storage.open("x") as stream:
        for _ in range(200):
            if rng.random() < 0.3:
                position = rng.randrange(len(data) + 50)
                assert stream.seek(position) == expected.seek(position)
            number = rng.choice([0, 1, 17, BLOCK, 3 * BLOCK])
            assert stream.read(number) == expected.read(number) and stream.tell() == expected.tell()
        assert stream.seek(-5, io.SEEK_END) == len(data) - 5 and stream.read() == data[-5:]
    with storage.open("x", 1234) as stream:
        assert stream.tell() == 1234 and stream.read() == data[1234:]
    storage.write_bytes("lines", b"a\nb\n" * BLOCK)
    with storage.open("lines") as stream:
        assert list(stream) == [b"a\n", b"b\n"] * BLOCK


def test_range_is_exact_or_an_error(storage: Storage) -> None:
    storage.write_bytes("x", noise(50))
    for begin, end in [(0, 50), (0, 1), (49, 50), (7, 7), (13, 29)]:
        assert storage.read_range("x", begin, end) == noise(50)[begin:end]
    with pytest.raises(OSError, match="x: it ends before byte 51; bytes 40 to 51 were to be read"):
        storage.read_range("x", 40, 51)
    with pytest.raises(OSError, match="x: "):
        storage.read_range("x", 60, 70)


def test_files_move_in_and_are_copied_out(storage: Storage, tmp_path: Path) -> None:
    data = noise(3 * BLOCK + 1)
    for folder in (storage.scratch(), tmp_path):
        (folder / "made").write_bytes(data)
        storage.put_file(folder / "made", "train/x")
        assert storage.read_bytes("train/x") == data and not (folder / "made").exists()
    target = tmp_path / "cache" / "deep" / "x"
    storage.get_file("train/x", target, num_bytes=len(data))
    assert target.read_bytes() == data and [path.name for path in target.parent.iterdir()] == ["x"]
    with pytest.raises(OSError, match=r"train/x: 3001 bytes; 3000 are stated for it"):
        storage.get_file("train/x", tmp_path / "cache" / "y", num_bytes=3000)
    assert not (tmp_path / "cache" / "y").exists() and storage.list() == [("train/x", len(data))]


def test_scratch_is_of_this_machine_and_can_be_cleared(storage: Storage) -> None:
    assert storage.scratch().is_dir() and storage.scratch() == storage.scratch()
    (storage.scratch() / "x").write_bytes(b"x")
    storage.clear_scratch()
    assert list(storage.scratch().iterdir()) == [] == storage.list()


def test_missing_file_is_one_clear_error(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("folder/x", b"x")
    for name in ("y", "folder", "folder/x/z"):
        for ask in (storage.size, storage.read_bytes, storage.open, lambda name: storage.read_range(name, 0, 1),
                    lambda name: storage.get_file(name, tmp_path / "out")):
            with pytest.raises(FileNotFoundError, match=f"{name}: no such file; a present one is needed. Correct the name"):
                ask(name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/.", "./a", "a/", "a\0b", ".."])
def test_name_that_leaves_the_folder_is_refused_before_anything_is_done(storage: Storage, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    for ask in (storage.size, storage.exists, storage.read_bytes, storage.open, storage.delete,
                lambda name: storage.read_range(name, 0, 1), lambda name: storage.write_bytes(name, b"bad"),
                lambda name: storage.get_file(name, tmp_path / "out"), lambda name: storage.put_file(tmp_path / "x", name)):
        with pytest.raises(ValueError, match="is not a plain name inside the folder"):
            ask(name)
    assert (tmp_path / "x").read_bytes() == b"secret"


@pytest.mark.parametrize("prefix", ["../", "/", "/etc/", "a/../../", "a//b", "./x"])
def test_listing_stays_inside_the_folder(storage: Storage, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "x").write_bytes(b"secret")
    with pytest.raises(ValueError, match="is not a plain name inside the folder"):
        storage.list(prefix)


def test_storage_can_be_pickled(storage: Storage) -> None:
    storage.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def test_places_are_told_apart_and_joined() -> None:
    assert [is_url(text) for text in ("s3://b/c", "gs://b", "file:///x", "/x/y", "x", "C:/x", "hf://datasets/x/y")] == \
        [True, True, False, False, False, False, True]
    assert join("s3://b/c/", "d", "e") == join("s3://b/c", "d/e") == "s3://b/c/d/e"
    assert join("/a/b", "c", "d") == join("file:///a/b", "c/d") == "/a/b/c/d"


@pytest.mark.parametrize(("url", "message"), [("s3://", "s3://: no bucket; s3://BUCKET"), ("s3:///x", "no bucket"),
                                              ("nowhere://x/y", "nowhere:// cannot be read here"),
                                              ("memory://x::s3://y", "chained URLs are not read"),
                                              ("", "an empty one given")])
def test_url_of_no_use_is_refused_at_once(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_storage(url)


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


def test_links_to_files_are_followed_links_to_folders_named_and_devices_left_out(
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
    assert storage.list() == [("b.txt", 3)] and "more: it is a link to a folder and not followed" in caplog.text
    with pytest.raises(FileNotFoundError):
        storage.open("pipe")


def test_folder_that_cannot_be_listed_is_an_error_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a").write_bytes(b"")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)  # root may list everything, so modes would prove nothing
    with pytest.raises(PermissionError, match="locked"):
        LocalStorage(str(tmp_path)).list()
