"""Reading text: every format, cut anywhere, of any size."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet
from text_files import PACKERS, TEXTS, content, pair, read, records, shrink

from ettin_foundry.corpus.documents import utf8_pieces
from ettin_foundry.corpus.parquet import _values
from ettin_foundry.corpus.readers import Document, LongDocument, read_parts, read_source
from ettin_foundry.corpus.sources import Meter, Part, find_source, part_bytes, plan_parts


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"corpus{kind}{packing}"
    path.write_bytes(PACKERS[packing](content(kind, TEXTS)))
    assert read(path) == [(f"id-{i}", text) for i, text in enumerate(TEXTS)]
    assert read(path, id_field="other") == [(str(i), text) for i, text in enumerate(TEXTS)]
    assert find_source(str(path)).name == "corpus"


@pytest.mark.parametrize("packing", PACKERS)
def test_one_text_file_is_one_document(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKERS[packing](b"\xef\xbb\xbf" + "\n".join(TEXTS).encode()))
    assert read(path) == [(f"a.txt{packing}", "\n".join(TEXTS))]


def test_json_may_be_one_record_or_a_list_with_blanks(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for data, expected in [(b'{"body": "x"}', ["x"]), (b'\xef\xbb\xbf [ {"body":"x"}\r\n,\t{"body":"y"} ] \n', ["x", "y"]),
                           (b" [ ] ", [])]:
        path.write_bytes(data)
        assert read(path, text_field="body") == [(f"a.json:{number}", text) for number, text in enumerate(expected, 1)]


def test_json_list_is_read_a_record_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the windows are cut at; and a window never holds more than a record and a block."""
    texts = ["x" * (7 * i % 300) + "\u00fc\\\"" for i in range(60)]
    (tmp_path / "a.json").write_bytes(json.dumps(records(texts), indent=1).encode())
    for block in (1000, 37, 3, 2, 1):
        monkeypatch.setattr("ettin_foundry.corpus.json_array._BLOCK_BYTES", block)
        assert [text for _, text in read(tmp_path / "a.json")] == texts
    monkeypatch.setattr("ettin_foundry.corpus.json_array._RECORD_CHARACTERS", 100)
    with pytest.raises(ValueError, match=r"a\.json record 10: it has more than 100 characters.*\.jsonl"):
        read(tmp_path / "a.json")


def test_lines_may_be_blank_end_with_crlf_or_not_end(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"text": "x"}\n\n  \r\n{"text": "y", "id": 7}\r\n\r\n{"text": "z", "id": null}'
    (tmp_path / "b.jsonl").write_bytes(data)
    assert read(tmp_path / "b.jsonl") == [("b.jsonl:3", "x"), ("7", "y"), (f"b.jsonl:{data.rindex(b'{')}", "z")]


def test_ids_are_exact(tmp_path: Path) -> None:
    ids = ['"\u00fc"', "7", "-3", str(2**64 - 1), str(2**64), str(10**30), "1.5", "true", '""']
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "x", "id": {value}}}\n' for value in ids))
    expected = ["\u00fc", "7", "-3", str(2**64 - 1), str(2**64), str(10**30), "1.5", "True", ""]
    assert [identity for identity, _ in read(tmp_path / "a.jsonl")] == expected
    assert [identity for identity, _ in read(tmp_path / "a.jsonl", id_field="id")] == expected


def test_default_id_is_the_byte_that_the_line_begins_at_before_compression(tmp_path: Path) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for packing, pack in PACKERS.items():
        (tmp_path / f"a.jsonl{packing}").write_bytes(pack(data))
        for identity, text in read(tmp_path / f"a.jsonl{packing}"):
            offset = int(identity.removeprefix(f"a.jsonl{packing}:"))
            assert json.loads(data[offset:].split(b"\n")[0])["text"] == text
            assert offset == 0 or data[offset - 1:offset] == b"\n"


def test_json_that_only_the_standard_library_reads_is_read(tmp_path: Path) -> None:
    """NaN and huge numbers beside the text are not orjson's, and no reason to refuse a corpus."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "score": NaN}\n{"text": "y", "score": 1e400, "id": "i"}\n')
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:0", "x"), ("i", "y")]


def test_several_compressed_frames_are_read_to_the_end(tmp_path: Path) -> None:
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    lines = content(".jsonl", TEXTS).splitlines(keepends=True)
    for suffix, between in ((".gz", b""), (".zst", b""), (".zst", skippable)):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(between.join(PACKERS[suffix](line) for line in lines))
        assert [text for _, text in read(tmp_path / f"a.jsonl{suffix}")] == TEXTS


def messy_lines() -> bytes:
    """Lines of every kind, of lengths around those at which blocks, strings and documents are cut in `small`."""
    texts = ["", "x" * 30, "y" * 45, "\u00fc\\\"\n" * 10, "\U0001f600" * 25, "\\" * 60, "z" * 310, "tail"]
    records = [{"text": text, "meta": "m" * (i * 13 % 60)} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    ends = ["\n", "\r\n", "\n\n", "\n \t\n"]
    return b"\xef\xbb\xbf" + "".join(line + ends[i % 4] for i, line in enumerate(lines)).rstrip().encode()


@pytest.mark.parametrize("last_end", ["", "\n"])
def test_cut_at_any_byte_gives_the_same_documents(tmp_path: Path, small: None, last_end: str) -> None:
    path = tmp_path / "a.jsonl"
    data = messy_lines() + last_end.encode()
    path.write_bytes(data)
    source = find_source(str(path))
    whole = [pair(document) for document in read_source(source, Meter())]
    lines = [json.loads(line) for line in data[3:].decode().split("\n") if line.strip()]
    assert [text for _, text in whole] == [line["text"] for line in lines] and len(whole) == 8
    for cut in range(1, len(data)):
        cuts = [0, cut, min(cut + 1 + cut % 37, len(data)), len(data)]
        parts = [Part("a.jsonl", begin, end) for begin, end in zip(cuts, cuts[1:])]
        assert [pair(document) for document in read_parts(source, parts, Meter())] == whole, cuts


def test_every_byte_as_a_part_of_its_own(tmp_path: Path, small: None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(messy_lines())
    source = find_source(str(path))
    parts = [Part("a.jsonl", begin, begin + 1) for begin in range(source.num_bytes)]
    meter = Meter()
    found = list(map(pair, read_parts(source, parts, meter)))
    assert found == list(map(pair, read_source(source, Meter()))) and meter.position() == source.num_bytes


def test_row_groups_are_read_once_wherever_the_file_is_cut(tmp_path: Path) -> None:
    texts = [f"text {i} " * (i % 7) for i in range(40)]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=3)
    source = find_source(str(tmp_path / "a.parquet"))
    whole = [pair(document) for document in read_source(source, Meter())]
    assert whole == [(f"a.parquet:{i}", text) for i, text in enumerate(texts, 1)]
    metadata = parquet.read_metadata(tmp_path / "a.parquet")
    starts = [metadata.row_group(i).column(0).dictionary_page_offset for i in range(metadata.num_row_groups)]
    assert starts[0] == 4 and len(starts) == 14
    for cut in [*range(1, source.num_bytes, 41), *(start + i for start in starts for i in (-1, 0, 1))]:
        parts = [Part("a.parquet", 0, cut), Part("a.parquet", cut, source.num_bytes)]
        assert [pair(document) for document in read_parts(source, parts, Meter())] == whole


TEXT_COLUMNS = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]


@pytest.mark.parametrize("kind", TEXT_COLUMNS, ids=["string", "large", "dictionary"])
def test_columns_of_text_of_any_kind_with_long_ones_among_them(tmp_path: Path, small: None, kind: pyarrow.DataType,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ettin_foundry.corpus.parquet._BATCH_ROWS", 3)
    texts = ["\u00fc" * (900 if i % 5 == 3 else i) + str(i) for i in range(20)]
    table = pyarrow.table({"text": pyarrow.array(texts).cast(kind), "id": list(range(20))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=11)
    assert read(tmp_path / "a.parquet") == [(str(i), text) for i, text in enumerate(texts)]
    parquet.write_table(table.drop_columns("id"), tmp_path / "a.parquet", row_group_size=11)
    assert read(tmp_path / "a.parquet") == [(f"a.parquet:{i}", text) for i, text in enumerate(texts, 1)]
    batch = table.combine_chunks().to_batches()[0].slice(2, 9)  # as an Arrow array may come
    values = [text if isinstance(text, str) else "".join(utf8_pieces(text.span(), "")) for text, _ in
              _values(batch, "text", "id", "row", 2)]
    assert values == texts[2:11]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_long_line_gives_the_text_that_json_gives(tmp_path: Path, small: None, packing: str, ensure_ascii: bool) -> None:
    rng = random.Random(7)
    alphabet = ["a", "bc ", '"', "\\", "\\\\", "\n", "\u00fc", "\u4f60", "\U0001f600", "\ud7ff", "\ue000", "\x7f", "/",
                "ud83d", "\\ud83d"]
    data, expected = b"", []
    for number in range(60):
        text = "".join(rng.choice(alphabet) * rng.choice([1, 1, 1, 9]) for _ in range(rng.randint(0, 300)))
        record = {"a": [1, {"b": "x\"" * 5}], "text": text, "id": f"i{number}", "html": "\\\"" * rng.randint(0, 90)}
        keys = rng.sample(list(record), 4)
        data += json.dumps({key: record[key] for key in keys}, ensure_ascii=ensure_ascii).encode() + b"\n"
        expected.append((f"i{number}", text))
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKERS[packing](data))
    source = find_source(str(path))
    found = list(read_source(source, Meter()))
    assert [pair(document) for document in found] == expected  # after the reader went on: nothing is held by it
    assert {type(document) for document in found} == {Document, LongDocument}
    assert [pair(document) for document in found] == expected  # and once more


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".txt.zst", ".json", ".parquet"])
def test_long_text_of_any_format_comes_in_pieces(tmp_path: Path, small: None, kind: str) -> None:
    text = "".join(random.Random(1).choices("ab \n\u00fc\u4f60\U0001f600", k=1000))
    data = b"\xef\xbb\xbf" + text.encode() if kind.startswith(".txt") else content(kind, ["short", text, "short"])
    path = tmp_path / f"a{kind}"
    path.write_bytes(PACKERS["." + kind.split(".")[-1] if kind.count(".") > 1 else ""](data))
    found = list(read_source(find_source(str(path)), Meter()))
    long = [document for document in found if isinstance(document, LongDocument)]
    assert len(long) == 1 and pair(long[0])[1] == text == pair(long[0])[1]


MEASURE = """
import re, sys
from ettin_foundry.corpus.readers import LongDocument, read_source
from ettin_foundry.corpus.sources import Meter, find_source
sizes, kept = [], []
for document in read_source(find_source(sys.argv[1]), Meter()):
    kept.append(document)
    sizes.append(sum(map(len, document.pieces())) if isinstance(document, LongDocument) else len(document.text))
print(*sizes, int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10)
"""


def test_large_documents_take_little_memory(tmp_path: Path) -> None:
    """Three documents of 40 MB, kept by who reads them, in a process of its own."""
    text = "kalo mi ter an dre ous " * 1_740_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\n' * 2)
    (tmp_path / "b.txt").write_text(text)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).resolve().parents[2])
    *sizes, peak = map(int, done.stdout.split())
    assert sizes == [len(text)] * 3
    assert peak < 100, "MB: an interpreter with what is imported 30, a piece of 8 MiB in three forms 24; all texts 120"


def test_hub_dataset_is_streamed_at_a_fixed_revision_shard_by_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Records(list):
        n_shards = 2

        def shard(self, *, num_shards: int, index: int) -> list[dict]:
            return self[index::num_shards]

    def load_dataset(repo: str, config: str | None, **options: object) -> Records:
        asked.append((repo, config, options))
        return Records([{"text": "x", "id": "a"}, {"text": "y"}, {"text": "z"}])

    info = SimpleNamespace(sha="abc", card_data={"license": ["mit"]})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo: info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = find_source("some/set:english")
    assert (source.name, source.licence, source.revision) == ("some--set", "mit", "abc")
    assert plan_parts(source, 1) == [(Part("hub", 0, 2),), (Part("hub", 1, 2),)]
    assert [tuple(d) for d in read_source(source, Meter())] == [("x", "a"), ("z", "0:2"), ("y", "1:1")]
    assert set(map(str, asked)) == {"('some/set', 'english', {'split': 'train', 'streaming': True, 'revision': 'abc'})"}
    Records.n_shards = 3
    with pytest.raises(ValueError, match="some/set:english: the dataset has 3 data shards; 2 were planned"):
        list(read_parts(source, [Part("hub", 0, 2)], Meter()))


def test_stdlib_is_real_text_with_licence_and_module_docstrings() -> None:
    source = find_source("python-stdlib")
    assert (source.licence, source.revision) == ("PSF-2.0", sys.version.split()[0])
    found = dict(read("python-stdlib"))
    assert "class JSONDecoder" in found["json/decoder.py"]
    assert "cos(x, /)" in found["docstrings/math"].replace("($module, x, /)", "(x, /)")
    assert not [name for name in found if "test" in Path(name).parts[:-1] or "site-packages" in name]
    assert 5e6 < sum(map(len, found.values())) < 1e8
    units = plan_parts(source, 2_000_000)
    cut = [pair(d) for unit in units for d in read_parts(source, unit, Meter())]
    assert len(units) > 3 and dict(cut) == found and len(cut) == len(found)
    assert sum(part_bytes(source, part) for unit in units for part in unit) == source.num_bytes
