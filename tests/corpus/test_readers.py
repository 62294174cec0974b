"""Reading text: every format, cut anywhere; and input that is not what it should be."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow
import pytest
from conftest import make_documents
from converting import run, stored, write_jsonl
from pyarrow import parquet
from text_files import FORMATS, PACKERS, TEXTS, content, read, read_all, table_bytes

from ettin_foundry.corpus import readers
from ettin_foundry.corpus.readers import ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Part, find_source, plan_parts


@pytest.mark.parametrize("packing", PACKERS)
def test_every_format_gives_the_same_documents(tmp_path, packing):
    for kind in (".jsonl", ".json", *[".parquet"] * (not packing)):  # which packs its columns itself
        path = tmp_path / f"corpus{kind}{packing}"
        path.write_bytes(PACKERS[packing](content(kind, TEXTS)))
        assert read(path) == [(f"id-{i}", text) for i, text in enumerate(TEXTS)]
        assert read(path, id_field="other") == [(str(i), text) for i, text in enumerate(TEXTS)]
    for name, data, expected in [  # without ids, a file is named by its name, a line by its first byte
            ("a.txt", b"\xef\xbb\xbf" + "\n".join(TEXTS).encode(), {"": "\n".join(TEXTS)}),
            ("a.jsonl", b'{"text": "\xc3\xbc"}\n\n{"text": "y"}\n', {":0": "\u00fc", ":16": "y"})]:
        (tmp_path / f"{name}{packing}").write_bytes(PACKERS[packing](data))
        assert read(tmp_path / f"{name}{packing}") == [(name + packing + at, text) for at, text in expected.items()]
    assert read(tmp_path / f"a.txt{packing}", text_field="body", id_field="key")[0][0] == f"a.txt{packing}"


def test_json_over_several_lines_is_refused_with_what_to_do(tmp_path):
    for name in ("a.json", "a.jsonl"):
        for data in (b'[{"text": "x"}]', b' [\n{"text": "x"}\n]', b'\xef\xbb\xbf{\n"text": "x"}', b"[\n"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(ValueError, match=rf"{name} must have one record a line.*jq -c"):
                read(tmp_path / name)
    (tmp_path / "a.json").write_bytes(b'{"a": [{"text": "x"}],\t"text": "y"}')
    assert read(tmp_path / "a.json") == [("a.json:0", "y")]


@pytest.mark.parametrize("packing", PACKERS)
def test_a_part_that_nothing_was_written_to_holds_no_document(tmp_path, packing):
    no_rows = table_bytes(pyarrow.table({"other": pyarrow.array([], pyarrow.null())}))
    for kind, contents in {"json": [b" \n", b"\xef\xbb\xbf"], "jsonl": [b"\n \n", b"\xef\xbb\xbf"],
                           **({} if packing else {"parquet": [no_rows]})}.items():
        for data in [b"", *map(PACKERS[packing], [b"", *contents])]:
            (tmp_path / f"a.{kind}{packing}").write_bytes(data)
            assert read(tmp_path / f"a.{kind}{packing}") == []


def test_lines_may_be_blank_and_ids_are_exact(tmp_path):
    data = b'\xef\xbb\xbf{"text": "x"}\n\n  \r\n{"text": "y", "id": 7}\r\n\r\n{"text": "z", "id": null}'
    (tmp_path / "b.jsonl").write_bytes(data)
    assert read(tmp_path / "b.jsonl") == [("b.jsonl:3", "x"), ("7", "y"), (f"b.jsonl:{data.rindex(b'{')}", "z")]
    ids = {'"\u00fc"': "\u00fc", "-3": "-3", str(2**64): str(2**64), "1.5": "1.5", "true": "True", '""': ""}
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "x", "id": {value}}}\n' for value in ids))
    for id_field in (None, "id"):
        assert [identity for identity, _ in read(tmp_path / "a.jsonl", id_field=id_field)] == list(ids.values())
    # NaN and huge numbers beside the text are not orjson's, and no reason to refuse a corpus
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN}\n{"text": "y", "score": 1e400, "id": "i"}\n')
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:0", "x"), ("i", "y")]


def test_several_compressed_frames_are_read_to_the_end(tmp_path):
    lines = content(".jsonl", TEXTS).splitlines(keepends=True)
    for suffix, between in ((".gz", b""), (".zst", b""), (".zst", b"\x50\x2a\x4d\x18\5\0\0\0hello")):  # left out
        (tmp_path / f"a.jsonl{suffix}").write_bytes(between.join(PACKERS[suffix](line) for line in lines))
        assert [text for _, text in read(tmp_path / f"a.jsonl{suffix}")] == TEXTS


@pytest.mark.parametrize("limit", [10**6, 200, 60])
@pytest.mark.parametrize("last_end", ["", "\n"])
def test_cut_at_any_byte_gives_the_same_documents(tmp_path, last_end, limit, monkeypatch):
    """Lines of every kind, of lengths around a block; also with lines left out for their size, which are never held."""
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 50)
    texts = ["", "x" * 30, "y" * 45, "\u00fc\\\"\n" * 10, "\U0001f600" * 25, "\\" * 60, "z" * 310, "tail"]
    lines = [json.dumps({"text": text, "meta": "m" * (i * 13 % 60)}, ensure_ascii=i % 2 == 0)
             + ["\n", "\r\n", "\n\n", "\n \t\n"][i % 4] for i, text in enumerate(texts)]
    data = ("\ufeff" + "".join(lines).rstrip() + last_end).encode()
    (tmp_path / "a.jsonl").write_bytes(data)
    source, options = find_source(str(tmp_path / "a.jsonl")), ReadOptions(max_document_bytes=limit)
    expected = [json.loads(line)["text"] for line in data[3:].split(b"\n") if line.strip() and len(line) <= limit]
    whole = read_all(source, max_document_bytes=limit)
    assert [document.text for document in whole] == expected
    every_byte = list(range(len(data) + 1))
    for cuts in [every_byte, *([0, cut, min(cut + 1 + cut % 37, len(data)), len(data)] for cut in every_byte[1:])]:
        parts, meter = [Part("a.jsonl", begin, end) for begin, end in zip(cuts, cuts[1:])], Meter()
        assert list(read_parts(source, parts, meter, options)) == whole, cuts
        assert meter.oversized == 8 - len(expected) and meter.position() == len(data)


def test_row_groups_are_read_once_wherever_the_file_is_cut(tmp_path):
    texts = [f"text {i} " * (i % 7) for i in range(40)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=3)
    source = find_source(str(tmp_path / "a.parquet"))
    whole = read_all(source)
    assert [(d.id, d.text) for d in whole] == [(f"a.parquet:{i}", text) for i, text in enumerate(texts, 1)]
    metadata, size = parquet.read_metadata(tmp_path / "a.parquet"), sum(source.files.values())
    starts = [metadata.row_group(i).column(0).dictionary_page_offset for i in range(metadata.num_row_groups)]
    assert starts[0] == 4 and len(starts) == 14
    for cut in [*range(1, size, 41), *(start + i for start in starts for i in (-1, 0, 1))]:
        assert list(read_parts(source, [Part("a.parquet", 0, cut), Part("a.parquet", cut, size)], Meter())) == whole


STRINGS = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()]
COLUMNS = [*STRINGS, pyarrow.dictionary(pyarrow.int8(), STRINGS[0]), pyarrow.dictionary(pyarrow.int32(), STRINGS[2])]


@pytest.mark.parametrize("kind", COLUMNS, ids=str)
def test_columns_of_text_of_any_kind(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(readers, "_PARQUET_ROWS", 3)
    texts, path = ["\u00fc" * (900 if i % 5 == 3 else i) + str(i) for i in range(20)], tmp_path / "a.parquet"
    column = pyarrow.array(texts).cast(kind)
    for name, ids, expected in [("other", column, [f"a.parquet:{i}" for i in range(1, 21)]), ("id", column, texts),
                                ("id", list(range(20)), [str(i) for i in range(20)])]:
        parquet.write_table(pyarrow.table({"text": column, name: ids}), path, row_group_size=11)
        assert read(path) == list(zip(expected, texts))


@pytest.mark.parametrize("kind, packing", [form for form in FORMATS if form[0] != ".json"])
def test_documents_above_the_limit_are_left_out_and_counted(tmp_path, kind, packing):
    texts = ["\u4f60" * 50, "\u4f60" * 51, "x" * 151, "kept", "y" * 5000]  # 150 bytes of UTF-8 are allowed
    path = tmp_path / f"a{kind}{packing}"
    for case in [texts] if kind != ".txt" else [[text] for text in texts]:
        path.write_bytes(PACKERS[packing](case[0].encode() if kind == ".txt" else content(kind, case)))
        # a line of .jsonl counts as it is written
        limit, meter = 150 + len('{"id": "id-0", "text": "", "other": 0}') * (kind == ".jsonl"), Meter()
        found = read_all(find_source(str(path)), meter, max_document_bytes=limit)
        expected = [text for text in case if len(text.encode()) <= 150]
        assert [document.text for document in found] == expected and meter.oversized == len(case) - len(expected)


def test_hub_dataset_is_streamed_at_a_fixed_revision_shard_by_shard(monkeypatch):
    class Records(list):
        n_shards = 2

        def shard(self, *, num_shards: int, index: int) -> list[dict]:
            return self[index::num_shards]

    load = mock.Mock(return_value=Records([{"text": "x", "id": "a"}, {"text": "y"}, {"text": "z"}]))
    info = SimpleNamespace(sha="abc", card_data={"license": ["mit"]})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo: info)
    monkeypatch.setattr("datasets.load_dataset", load)
    source = find_source("some/set:english")
    assert (source.name, source.licence, source.revision) == ("some--set", "mit", "abc")
    assert plan_parts(source, 1) == [(Part("hub", 0, 2),), (Part("hub", 1, 2),)]
    assert read_all(source) == [("x", "a"), ("z", "0:2"), ("y", "1:1")]
    load.assert_called_with("some/set", "english", split="train", streaming=True, revision="abc")
    Records.n_shards = 3
    with pytest.raises(ValueError, match="some/set:english must have the 2 data shards"):
        list(read_parts(source, [Part("hub", 0, 2)], Meter()))


def test_stdlib_is_real_text_with_its_licence():
    source, found = find_source("python-stdlib"), dict(read("python-stdlib"))
    assert (source.licence, source.revision) == ("PSF-2.0", sys.version.split()[0])
    assert "class JSONDecoder" in found["json/decoder.py"] and len(found) > 500
    assert not [name for name in found if "test" in Path(name).parts[:-1] or "site-packages" in name]


def text_table(*texts: bytes, kind: str = "string") -> bytes:
    """Parquet whose texts need not be UTF-8, as writers in other languages make it."""
    buffers = [None, np.cumsum([0, *map(len, texts)]).astype(np.int32), b"".join(texts)]
    column = pyarrow.Array.from_buffers(pyarrow.type_for_alias(kind), len(texts), [
        data if data is None else pyarrow.py_buffer(data) for data in buffers])
    return table_bytes(pyarrow.table({"text": column}))


BAD_RECORDS = {  # name, content of which one record cannot be read, place and reason in the log
    "null": ("b.jsonl", b'{"text": "ok"}\n{"text": null}\n', r"line 2 \(byte 15\): 'text' must be a string, got"),
    "cut off": ("b.jsonl", b'{"text": "ok"}\n{"text": "x', r"line 2 \(byte 15\): Unterminated string"),
    "tab": ("b.jsonl", b'{"text": "a\tb"}\n{"text": "ok"}\n', r"line 1 \(byte 0\): Invalid control"),
    "nested": ("b.jsonl", b"[" * 100_000 + b'\n{"text": "ok"}', r"line 1 \(byte 0\): .*recursion"),
    "surrogate": ("b.jsonl", b'{"text": "a\\ud83d"}\n{"text": "ok"}', r"line 1 .*surrogates not allowed"),
    "Latin-1": ("b.jsonl", b'{"text": "ok"}\n{"text": "\xe4"}\n', "line 2 .*0xe4.*iconv -f LATIN1"),
    "null in a table": ("b.parquet", content(".parquet", ["ok", None]), "row 2: 'text' must be"),
    "numbers": ("b.parquet", table_bytes(pyarrow.table({"text": [1]})), r"row 1: 'text' must be a string, got {.*: 1}"),
    "table": ("b.parquet", text_table(b"A\xff", b"ok"), r"row 1: .*0xff in position 1"),
    "UTF-16": ("b.txt", b"\xff\xfeo\0k\0", ": .*iconv -f UTF-16"), "gzip": ("b.txt", b"\x1f\x8b8", ": .*add .gz"),
    "text": ("b.txt", b"\xe4", ": .*LATIN1")}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_that_cannot_be_read_is_left_out_counted_and_named(tmp_path, case, caplog):
    (name, data, message), meter = BAD_RECORDS[case], Meter()
    (tmp_path / name).write_bytes(data)
    found = [document.text for document in read_all(find_source(str(tmp_path / name)), meter)]
    assert found == (["ok"] if b"ok" in data else []) and meter.unreadable == 1
    assert len(caplog.records) == 1 and re.search(rf"left out: .*{re.escape(name)} ?{message}", caplog.text)
    with pytest.raises(ValueError, match=f"{message}.* --max-bad-records \\(0\\) must allow for it"):
        read(tmp_path / name, max_bad_records=0)


GOOD = content(".jsonl", TEXTS * 50)
BAD_FILES = {  # what is said of the content of a file
    "b.jsonl.gz": [(gzip.compress(GOOD)[:-20], "a whole file, got EOF"), (GOOD, "a whole file.*Not a gzipped file"),
                   (gzip.compress(GOOD)[:-8] + bytes(8), "CRC")],
    "b.jsonl.zst": [(PACKERS[".zst"](GOOD) + PACKERS[".zst"](GOOD)[:-9], "Trunc")],
    "b.parquet": [(content(".parquet", TEXTS)[:-20], r"must be a whole \.parquet"),
                  (content(".parquet", TEXTS).replace(b"text", b"tixt"), r"have a column 'text', got \['id', 'tixt'")]}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_clear_error(tmp_path, name):
    for data, message in BAD_FILES[name]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 800


def test_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    source = find_source(str(tmp_path))
    (tmp_path / "a.txt").write_text("other")
    (tmp_path / "b.txt").write_text("new")
    for name, message in (("a.txt", "the 3 bytes that were listed, got 5"), ("b.txt", "the None bytes"),
                          ("../a.txt", r"'\.\./a\.txt'")):
        with pytest.raises(ValueError, match=message):
            list(read_parts(source, [Part(name)], Meter()))


def test_a_conversion_counts_what_it_leaves_out_and_holds_all_its_units_to_the_limit(tmp_path, tokenizer_dir):
    for number in range(6):
        good = write_jsonl(tmp_path / "clean" / f"{number}.jsonl", make_documents(20, seed=number // 2))
        lines = good.read_text().splitlines()
        write_jsonl(tmp_path / "bad" / good.name, []).write_text("\n".join([*lines[:9], '{"text": null}', *lines[9:]]))
    run(tmp_path / "expected", [tmp_path / "clean"], tokenizer_dir)
    with pytest.raises(ValueError, match="--max-bad-records must be at least the 6 records"):
        run(tmp_path / "set", [tmp_path / "bad"], tokenizer_dir, max_bad_records=5)
    summary = run(tmp_path / "set", [tmp_path / "bad"], tokenizer_dir, max_bad_records=6)
    assert summary.units[0] == 0 < summary.units[1]
    assert summary.manifests["train"]["sources"]["bad"]["dropped"] == {"unreadable": 6}
    found, expected = stored(tmp_path / "set" / "train"), stored(tmp_path / "expected" / "train")
    assert found.keys() == expected.keys() and all(np.array_equal(found[doc], expected[doc]) for doc in found)
