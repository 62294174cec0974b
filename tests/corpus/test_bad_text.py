"""Input that is not what it should be: one clear error with file, place and advice, whatever is wrong with it."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from text_files import PACKERS, TEXTS, content, read, shrink

from ettin_foundry.corpus.readers import read_parts, read_source
from ettin_foundry.corpus.sources import Meter, Part, find_source


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def bad_parquet() -> bytes:
    """Parquet whose second text is no UTF-8, as writers in other languages make it."""
    offsets, data = np.array([0, 2, 5], np.int32), b"okA\xffB"
    bad = pyarrow.StringArray.from_buffers(2, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data))
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": bad}), sink)
    return sink.getvalue().to_pybytes()


def long_window(data: bytes) -> bytes:
    """As `zstd --ultra --long=30` packs a stream."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


GOOD = content(".jsonl", TEXTS * 50)
BAD_FILES = {
    "invalid UTF-8 in text": ("b.txt", b"ok \xff", r"b\.txt: invalid UTF-8 \(invalid start byte at byte 3\).*iconv"),
    "invalid UTF-8 in a line": ("b.jsonl", b'{"text": "ok"}\n{"text": "\xe4"}\n',
                                r"b\.jsonl line 2 \(byte 15\): invalid UTF-8 \(invalid continuation byte at byte 10 of the"
                                r".*iconv.*look at it with `cat .*b\.jsonl \| tail -c \+16 \|"),
    "UTF-16": ("b.json", '{"text": "x"}'.encode("utf-16"), r"b\.json: invalid UTF-8 \(invalid start byte at byte 0\)"),
    "truncated gz": ("b.jsonl.gz", gzip.compress(GOOD)[:-20], r"b\.jsonl\.gz: the file cannot be read to its end"),
    "no gz": ("b.jsonl.gz", GOOD, r"b\.jsonl\.gz: the file cannot be read to its end \(Not a gzipped"),
    "flipped gz": ("b.txt.gz", gzip.compress(GOOD)[:-8] + bytes(8), r"b\.txt\.gz: .*CRC.*a whole \.txt\.gz file is needed"),
    "second gz member cut": ("b.jsonl.gz", gzip.compress(GOOD) + gzip.compress(GOOD)[:-9], r"b\.jsonl\.gz: .*to its end"),
    "truncated zst": ("b.jsonl.zst", PACKERS[".zst"](GOOD)[:-20], r"b\.jsonl\.zst: .*Truncated"),
    "second zst frame cut": ("b.jsonl.zst", PACKERS[".zst"](GOOD) + PACKERS[".zst"](GOOD)[:-9], r"b\.jsonl\.zst: .*Trunc"),
    "large zst window": ("b.jsonl.zst", long_window(GOOD), r"b\.jsonl\.zst: .*a window of over 128 MiB.*zstd -d --long=31"),
    "no zst": ("b.txt.zst", GOOD, r"b\.txt\.zst: the file cannot be read to its end"),
    "truncated parquet": ("b.parquet", content(".parquet", TEXTS)[:-20], r"b\.parquet: no readable Parquet"),
    "empty parquet": ("b.parquet", b"", r"b\.parquet: no readable Parquet"),
    "parquet without text": ("b.parquet", content(".parquet", TEXTS).replace(b"text", b"tixt"),
                             r"b\.parquet: no column 'text'; it has id, tixt, other.*--text-field"),
    "invalid UTF-8 in parquet": ("b.parquet", bad_parquet(),
                                 r"b\.parquet row 2: invalid UTF-8 \(invalid start byte at byte 1 of the text\)"),
    "record without text": ("b.jsonl", b'{"text": "x"}\n{"id": 1}\n', r"b\.jsonl line 2 \(byte 14\): .*without text: no ke"),
    "text null": ("b.jsonl", b'{"text": null}\n', r"b\.jsonl line 1 \(byte 0\): .*'text' is None; a string"),
    "text a number": ("b.json", b'[{"text": "x"}, {"text": 3}]', r"b\.json record 2: .*'text' is 3"),
    "no object": ("b.jsonl", b'\n["x"]\n', r"b\.jsonl line 2 \(byte 1\): a list; an object"),
    "no JSON": ("b.jsonl", b'{"text": "x"}\n{"text": \n', r"b\.jsonl line 2 \(byte 14\): no JSON \(Expecting value"),
    "two records in a line": ("b.jsonl", b'{"text": "x"},{"text": "y"}', r"b\.jsonl line 1 \(byte 0\): no JSON \(Extra"),
    "control character": ("b.jsonl", b'{"text": "x\x01"}\n', r"b\.jsonl line 1 \(byte 0\): no JSON \(Invalid control char"),
    "no JSON file": ("b.json", GOOD, r"b\.json: no JSON .*more after the end.*\.jsonl"),
    "list that ends early": ("b.json", b'[{"text": "x"},', r"b\.json: no JSON \(record 2: Expecting value"),
    "comma at the end": ("b.json", b'[{"text": "x"},]', r"b\.json: no JSON \(record 1: a comma before the end"),
    "comma forgotten": ("b.json", b'[{"text": "x"} {"text": "y"}]', r"b\.json: no JSON \(record 1: no comma"),
    "empty .json": ("b.json", b"", r"b\.json: no JSON"),
    "nested JSON": ("b.jsonl", b"[" * 100_000, r"b\.jsonl line 1 \(byte 0\): no JSON"),
    "nested .json": ("b.json", b"[" * 100_000, r"b\.json: no JSON"),
    "lone surrogate": ("b.jsonl", b'{"text": "ab\\ud800"}', r"b\.jsonl line 1 \(byte 0\): half of a surrogate pair at char"),
    "lone surrogate in .json": ("b.json", b'{"text": "ab\\ud800"}', r"b\.json record 1: half of a surrogate pair at char"),
    "lone surrogate in an id": ("b.jsonl", b'{"text": "", "id": "\\udc00"}', r"line 1 \(byte 0\): its 'id' is '\\udc00'; v"),
    "id a list": ("b.jsonl", b'{"text": "", "nr": []}', r"line 1 \(byte 0\): its 'nr' is \[\]; a string.*--id-field"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    name, data, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, id_field="nr" if case == "id a list" else None)
    assert str(error.value).count("\n") == 0 and len(str(error.value)) < 800


LONG_BAD = {
    "escape": (b'{"text": "' + b"x" * 350 + b'\\q"}', r"the text in bytes 344 to 376 has no JSON \(Invalid \\escape"),
    "surrogate": (b'{"text": "' + b"x" * 350 + b'\\ud800"}', r"half of a surrogate pair about \d+ characters after byte"),
    "UTF-8": (b'{"text": "' + b"x" * 350 + b'\xff"}', r"the text in bytes \d+ to \d+ has invalid UTF-8 \(invalid start"),
    "control": (b'{"text": "' + b"x" * 350 + b'\0' + b"x" * 350 + b'"}', r"has no JSON \(Invalid control character"),
    "no end": (b'{"text": "' + b"x" * 350, "no JSON"),
    "escaped end": (b'{"text": "' + b"x" * 350 + b'\\"', "no JSON"),
    "no comma": (b'{"text": "' + b"x" * 350 + b'" "id": 3}', "no JSON"),
    "no object": (b'["' + b"x" * 350 + b'"]', "a list; an object"),
    "no text": (b'{"html": "' + b"x" * 350 + b'"}', "without text: no key 'text', its keys are html"),
    "long id": (b'{"text": "' + b"x" * 350 + b'", "id": "' + b"x" * 50 + b'"}', "its 'id' is longer than 40 bytes"),
    "too much else": (b'{"text": "x", "list": [' + b"1," * 1100 + b'1]}', "more than 2000 of them outside of its long str"),
}


@pytest.mark.parametrize("case", LONG_BAD)
def test_bad_long_line_is_one_clear_error(tmp_path: Path, small: None, case: str) -> None:
    line, message = LONG_BAD[case]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "x"}\n' + line)
    with pytest.raises(ValueError, match=rf"b\.jsonl line 2 \(byte 14\): .*{message}"):
        read(tmp_path / "b.jsonl")


def test_bad_utf8_deep_in_a_long_text_is_found_with_its_byte(tmp_path: Path, small: None) -> None:
    for place in (0, 63, 64, 65, 500, 998, 999):
        data = bytearray(b"\xef\xbb\xbf" + b"x" * 1000)
        data[3 + place] = 0xE4
        (tmp_path / "b.txt").write_bytes(data)
        with pytest.raises(ValueError, match=rf"b\.txt: invalid UTF-8 \(.* at byte {3 + place}\); text must be UTF-8"):
            read(tmp_path / "b.txt")


def test_error_in_the_middle_of_a_file_names_the_byte(tmp_path: Path) -> None:
    lines = [b'{"text": "x"}\n'] * 9 + [b"oops\n"]
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
    source = find_source(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=r"b\.jsonl byte 126: no JSON"):
        list(read_parts(source, [Part("b.jsonl", 50, source.num_bytes)], Meter()))


def test_file_that_changed_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    source = find_source(str(tmp_path))
    (tmp_path / "a.txt").write_text("other")
    with pytest.raises(ValueError, match=r"a\.txt: 5 bytes; 3 were listed: it changed since"):
        list(read_source(source, Meter()))
    (tmp_path / "b.txt").write_text("new")
    with pytest.raises(ValueError, match=r"b\.txt: 3 bytes; None were listed"):
        list(read_parts(source, [Part("b.txt")], Meter()))
    with pytest.raises(ValueError, match=r"'\.\./a\.txt': it is not a plain name inside the folder"):
        list(read_parts(source, [Part("../a.txt")], Meter()))
