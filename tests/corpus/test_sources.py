"""Finding a corpus and cutting it into parts: what is listed, in which order, and where the cuts fall."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from s3_server import S3Server
from text_files import FORMATS, PACKERS, content, read_all

from ettin_foundry.corpus.sources import Part, Source, file_kind, find_source, plan_parts


@pytest.fixture
def server(monkeypatch):
    with S3Server() as running:
        running.connect(monkeypatch)
        yield running


def test_folder_is_listed_in_sorted_order(tmp_path, caplog):
    names = ["b/z.txt", "b.txt", "a/2.txt.gz", "a/10.TXT", ".hidden/x.txt", "a/.x.txt", "README.md", "\u00fc.json"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * number)
    source = find_source(str(tmp_path))
    assert list(source.files) == ["a/10.TXT", "a/2.txt.gz", "b.txt", "b/z.txt", "\u00fc.json"]
    assert (sum(source.files.values()), source.name, source.root) == (13, tmp_path.name, str(tmp_path))
    assert "1 of 6 files are not read, the first is README.md" in caplog.text


def test_names_licences_and_places(tmp_path):
    path = str(tmp_path / "a=b.jsonl.gz")
    Path(path).write_bytes(b"x")
    (tmp_path / "c.txt").write_bytes(b"x")
    assert find_source(path, licence="MIT") == Source("a=b", path, {"a=b.jsonl.gz": 1}, str(tmp_path), "MIT")
    assert find_source(f"one={path}").name == "one" and find_source(f"one={tmp_path}").name == "one"
    assert find_source(f"file://{tmp_path}/c.txt").files == {"c.txt": 1}
    assert find_source(os.path.relpath(tmp_path / "c.txt")).name == "c"
    names = "a.jsonl", "b/A.JSON.GZ", "a.b.txt.zst", "a.parquet", "a.parquet.gz", "a.gz", ".txt", "a.bz2", "x.txt/a"
    assert [file_kind(name) for name in names] == [".jsonl", ".json", ".txt", ".parquet"] + [None] * 5


@pytest.mark.parametrize("text, message", [
    ("{tmp}/nowhere.jsonl", r"nowhere\.jsonl: no such file or folder"), ("", "an empty name"),
    ("{tmp}/csv/a.csv", r"csv must hold files named \.jsonl, \.json, \.txt .*, \.parquet, got a\.csv"),
    ("{tmp}/csv", "csv must hold files named .* got a.csv"), ("{tmp}/empty", "empty must hold .* got none"),
    ("owner/name", "the Hugging Face dataset owner/name cannot be reached"),
    ("{tmp}/pipe", "pipe must be a file or folder"), ("nope://x/y", "nope:// cannot be read here"),
    ("{tmp}/saved", "saved/data-00000.arrow must be a Parquet file.*load_from_disk.'.*/saved'."),
    ("{tmp}/names", r"must be UTF-8, got b'a\\xff\.txt'"),
    *[("{tmp}/clone" + name, "clone/b.parquet must be the file itself.*git lfs pull") for name in ("", "/b.parquet")]])
def test_bad_source_is_one_clear_error(tmp_path, text, message):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n"
    for name, data in {b"csv/a.csv": b"x", b"names/a\xff.txt": b"x", b"clone/a.txt": b"x", b"clone/b.parquet": pointer,
                       b"empty/.x.txt": b"x", b"saved/data-00000.arrow": b"x", b"saved/state.json": b"{}"}.items():
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_source(text.format(tmp=tmp_path))


def test_small_neighbours_share_a_unit_and_large_files_are_cut():
    files = {"a.txt": 40, "b.jsonl": 50, "c.jsonl": 20, "d.jsonl": 150, "e.jsonl": 151, "f.jsonl.gz": 999,
             "g.parquet": 301, "h.json": 999, "i.txt": 0, "j.txt": 60, "k.txt": 40, "l.txt": 1}
    assert plan_parts(Source("x", "x", files), 100) == [
        (Part("a.txt"), Part("b.jsonl")), (Part("c.jsonl"),), (Part("d.jsonl"),),
        (Part("e.jsonl", 0, 75),), (Part("e.jsonl", 75, 151),), (Part("f.jsonl.gz"),),
        (Part("g.parquet", 0, 75),), (Part("g.parquet", 75, 150),), (Part("g.parquet", 150, 225),),
        (Part("g.parquet", 225, 301),), (Part("h.json"),), (Part("i.txt"), Part("j.txt"), Part("k.txt")),
        (Part("l.txt"),)]


def test_bucket_is_a_corpus_like_a_folder(server, tmp_path, caplog):
    files = {"b.jsonl": b'{"text": "one"}\n{"text": "two"}\n', "a/c.txt": b"three", "x.csv": b"", ".h.txt": b"hidden"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
        server.put(f"lang=en/{name}", data)
    server.put("other.txt", b"four")
    server.clear()
    here, there = find_source(str(tmp_path)), find_source(server.url("lang=en"))
    assert (there.files, there.name, there.root) == (here.files, "lang=en", "s3://corpus/lang=en")
    assert sum("list-type" in request.args for request in server.requests) == 1
    assert "1 of 3 files are not read, the first is x.csv" in caplog.text
    assert find_source(server.url("lang=en") + "/").files == here.files and read_all(there) == read_all(here)
    one = find_source("one=" + server.url("lang=en/b.jsonl"), licence="MIT")
    assert one == Source("one", server.url("lang=en/b.jsonl"), {"b.jsonl": 32}, "s3://corpus/lang=en", "MIT")
    for missing in ("nothing", "nothing.txt"):
        with pytest.raises(FileNotFoundError, match=rf"s3://corpus/{missing}: nothing is there"):
            find_source(server.url(missing))


def test_reading_from_a_bucket_survives_lost_connections(server, monkeypatch):
    """Every format; and when the network stays away, that is said, not that the file is broken."""
    server.connect(monkeypatch, block_bytes=300)
    texts = [f"{random.Random(i).random()} \u00fc" for i in range(60)]
    for kind, packing in FORMATS:
        data = "".join(texts).encode() if kind == ".txt" else content(kind, texts)
        server.put(f"in/a{kind}{packing}", PACKERS[packing](data))
        source = find_source(server.url(f"in/a{kind}{packing}"))
        server.fail(lambda request: request.range is not None, times=2)
        server.cut(lambda request: request.range is not None, times=2, after=100)
        assert "".join(document.text for document in read_all(source)) == "".join(texts)
        assert not server.faults_left()
        server.fail(lambda request: request.range is not None, times=99)
        with pytest.raises(ConnectionError):
            read_all(source)
        server.clear()
