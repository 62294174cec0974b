"""Text to a data set: every input format, nothing lost or doubled, all or nothing, and clear words about bad input."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import zstandard
from conftest import CHUNK_LENGTH, make_documents
from pyarrow import parquet
from transformers import AutoTokenizer

from ettin_foundry import tokenizer as tokenizers
from ettin_foundry.convert import ConvertOptions, convert, main
from ettin_foundry.mds import MDSSet
from ettin_foundry.sources import Meter, find_source, read_source
from ettin_foundry.split_writer import SplitWriter

TEXTS = ["One text.", "Zwei \u00dc\u00dfe \U0001f600\nlines\r\n", "  three  ", "four \u2028 \u0000 five"]


def records(texts: list[str]) -> list[dict]:
    return [{"id": f"id-{i}", "text": text, "other": i} for i, text in enumerate(texts)]


def content(kind: str, texts: list[str]) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records(texts)).encode()
    if kind == ".json":
        return json.dumps(records(texts), ensure_ascii=False).encode()
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(records(texts)), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress,
                                                ".zst": lambda data: zstandard.ZstdCompressor().compress(data)}


def read(location: Path | str, **options: str | None) -> list[tuple[str, str]]:
    """(id, text) of every document, after checking that the progress meter arrives at the end."""
    meter, source = Meter(), find_source(str(location))
    found = [(document.id, document.text) for document in read_source(source, meter, **options)]
    assert meter.position() == source.num_bytes
    return found


def run(out: Path, sources: list[Path | str], tokenizer: Path | None, **options: object) -> Path:
    defaults = {"chunk_length": CHUNK_LENGTH, "validation": 0.0, "shard_size": "8kb", "progress": False}
    convert(ConvertOptions(sources=[str(source) for source in sources], out=out, tokenizer=tokenizer,
                           **{**defaults, **options}))  # type: ignore[arg-type]
    return out


def stored(split: Path) -> dict[str, np.ndarray]:
    """Document id -> its tokens, put together again from chunks found in order."""
    data, parts = MDSSet(split), {}
    data.verify()
    open_document = None
    for shard in range(data.num_shards):
        for index in range(int(data.samples[shard])):
            sample = data.sample(shard, index)
            pieces = parts.setdefault(sample["doc"], [])
            assert sample["part"] == len(pieces) and (open_document in (None, sample["doc"]))
            assert sample["last"] or len(sample["tokens"]) == data.chunk_length
            assert sample["source"] == data.sources[shard]
            open_document = None if sample["last"] else sample["doc"]
            pieces.append(sample["tokens"])
    assert open_document is None
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def nothing_left(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))


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


def test_json_may_be_one_record_and_lines_may_be_blank(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"body": "x"}')
    assert read(tmp_path / "a.json", text_field="body") == [("a.json:1", "x")]
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n\n  \r\n{"text": "y", "id": 7}')
    assert read(tmp_path / "b.jsonl") == [("b.jsonl:1", "x"), ("7", "y")]


def test_several_compressed_frames_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        pack, lines = PACKERS[suffix], content(".jsonl", TEXTS).splitlines(keepends=True)
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(pack(line) for line in lines))
        assert [text for _, text in read(tmp_path / f"a.jsonl{suffix}")] == TEXTS


def test_folder_is_read_in_sorted_order_whatever_is_written_first(tmp_path: Path,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    names = ["b/z.txt", "b.txt", "a/2.txt.gz", "a/10.txt", ".hidden/x.txt", "README.md"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(name.encode()) if name.endswith("gz") else name.encode())
    assert [text for _, text in read(tmp_path)] == ["a/10.txt", "a/2.txt.gz", "b.txt", "b/z.txt"]
    assert [name for name, _ in read(tmp_path)] == ["a/10.txt", "a/2.txt.gz", "b.txt", "b/z.txt"]
    assert "1 of 5 files are not read, the first is README.md" in caplog.text


def test_set_holds_exactly_the_tokens_of_the_corpus(data_set: Path, tokenizer_dir: Path, documents: list[str]) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer_dir)
    found = {**stored(data_set / "train"), **stored(data_set / "validation")}
    assert list(sorted(found)) == sorted(f"doc-{i}" for i in range(len(documents)))
    for index, text in enumerate(documents):
        assert found[f"doc-{index}"].tolist() == plain(text, add_special_tokens=False)["input_ids"]
    totals = [MDSSet(data_set / split).manifest["totals"] for split in ("train", "validation")]
    assert sum(t["documents"] for t in totals) == len(documents)
    assert sum(t["tokens"] for t in totals) == sum(map(len, found.values()))


def test_training_order_is_the_corpus_order(data_set: Path) -> None:
    numbers = [int(name[4:]) for name in stored(data_set / "train")]
    assert numbers == sorted(numbers)


def test_saved_tokenizer_is_the_one_in_the_manifest(data_set: Path) -> None:
    for split in ("train", "validation"):
        tokenizers.check(tokenizers.load(data_set / "tokenizer"), MDSSet(data_set / split).tokenizer)


def test_copies_of_a_document_are_on_one_side(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = make_documents(60, longest=10)
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": text, "id": f"{name}-{i}"}) + "\n" for i, text in enumerate(texts)))
    out = run(tmp_path / "out", [tmp_path / "first.jsonl", tmp_path / "second.jsonl"], tokenizer_dir, validation=0.3)
    sides = [{name.partition("-")[2] for name in stored(out / split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60 and 8 <= len(sides[1]) <= 28
    other = run(tmp_path / "other", [tmp_path / "first.jsonl"], tokenizer_dir, validation=0.3, seed=1)
    assert {name.partition("-")[2] for name in stored(other / "validation")} != sides[1]


def test_converting_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    first, second = (run(tmp_path / name, [corpus], None, train_tokenizer=400, validation=0.1) for name in "ab")
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path
    assert str(tmp_path) not in "".join(path.read_text() for path in first.rglob("*.json"))


def test_tokenizer_is_trained_on_the_training_documents_only(tmp_path: Path, corpus: Path,
                                                             documents: list[str]) -> None:
    out = run(tmp_path / "out", [corpus], None, train_tokenizer=400, validation=0.3)
    held_out = {int(name[4:]) for name in stored(out / "validation")}
    expected = tokenizers.train_bpe((text for i, text in enumerate(documents) if i not in held_out), 400)
    assert 20 < len(held_out) < 100
    assert tokenizers.load(out / "tokenizer").get_vocab() == expected.get_vocab() != \
        tokenizers.train_bpe(documents, 400).get_vocab()


def test_literal_special_tokens_in_a_corpus_stay_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = "kalo [MASK] and [CLS]x[SEP] [PAD]"
    (tmp_path / "a.txt").write_text(text)
    ids = stored(run(tmp_path / "out", [tmp_path / "a.txt"], tokenizer_dir) / "train")["a.txt"].tolist()
    tok = tokenizers.load(tokenizer_dir)
    assert not set(ids) & set(tok.all_special_ids) and tok.decode(ids, clean_up_tokenization_spaces=False) == text


def test_sources_have_shards_and_counts_of_their_own(tmp_path: Path, tokenizer_dir: Path, corpus: Path) -> None:
    (tmp_path / "a.txt").write_text("kalo " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": " "}\n{"text": "mi"}\n{"text": ""}\n')
    out = run(tmp_path / "out", ["one=" + str(tmp_path / "a.txt"), tmp_path / "b.jsonl", corpus], tokenizer_dir,
              licence="CC0-1.0")
    data = MDSSet(out / "train")
    tokens = dict.fromkeys(data.sources, 0)
    for source, number in zip(data.sources, data.tokens.tolist()):
        tokens[source] += number
    assert list(tokens) == ["one", "b", "corpus"]
    counts = data.manifest["sources"]
    assert {name: counts[name]["tokens"] for name in tokens} == tokens
    assert counts["one"]["bytes"] == 500 and counts["one"]["licence"] == "CC0-1.0"
    assert (counts["b"]["documents"], counts["b"]["dropped"]) == (1, {"empty": 2})
    assert sum(c["chunks"] for c in counts.values()) == data.samples.sum()


def test_limit_ends_each_source_at_a_document(tmp_path: Path, corpus: Path, tokenizer_dir: Path,
                                              documents: list[str]) -> None:
    sizes = np.cumsum([len(text.encode()) for text in documents]).tolist()
    for limit, number in ((1, 1), (sizes[10] - 1, 11), (sizes[10], 11), (sizes[10] + 1, 12)):
        out = run(tmp_path / f"out{limit}", [corpus], tokenizer_dir, limit_bytes=limit)
        assert list(stored(out / "train")) == [f"doc-{i}" for i in range(number)]


def test_stdlib_is_real_text_with_licence_and_module_docstrings(tmp_path: Path, tokenizer_dir: Path) -> None:
    out = run(tmp_path / "out", ["python-stdlib"], tokenizer_dir, limit_bytes=60_000, validation=0.3)
    manifest = MDSSet(out / "train").manifest
    counts = manifest["sources"]["python-stdlib"]
    assert counts["licence"] == "PSF-2.0" and counts["revision"] == sys.version.split()[0]
    documents = dict(read("python-stdlib"))
    assert "class JSONDecoder" in documents["json/decoder.py"]
    assert "cos(x, /)" in documents["docstrings/math"].replace("($module, x, /)", "(x, /)")
    assert not [name for name in documents if "test" in Path(name).parts[:-1] or "site-packages" in name]
    assert 5e6 < sum(map(len, documents.values())) < 1e8


def test_hub_dataset_is_streamed_at_a_fixed_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(repo: str, config: str | None, **options: object) -> list[dict]:
        asked.append((repo, config, options))
        return [{"text": "x", "id": "a"}, {"text": "y"}]

    info = SimpleNamespace(sha="abc", card_data={"license": ["mit"]})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo: info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = find_source("some/set:english")
    assert (source.name, source.licence, source.revision) == ("some--set", "mit", "abc")
    assert [tuple(d) for d in read_source(source, Meter())] == [("x", "a"), ("y", "2")]
    assert asked == [("some/set", "english", {"split": "train", "streaming": True, "revision": "abc"})]


def test_out_must_be_free_and_stays_as_it_was(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    run(out, [corpus], tokenizer_dir)  # an empty folder may be filled
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="out: it exists and is not an empty folder.*Name another"):
        run(out, [corpus], tokenizer_dir)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("method", ["write_manifest", "finish", "write"])
@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_failure_at_any_stage_leaves_nothing(tmp_path: Path, corpus: Path, tokenizer_dir: Path, method: str,
                                             error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail_second_time(self: SplitWriter, *args: object, **options: object) -> None:
        calls.append(self.split)
        if len(calls) == 2:
            raise error
        original(self, *args, **options)

    original = getattr(SplitWriter, method)
    monkeypatch.setattr(SplitWriter, method, fail_second_time)
    with pytest.raises(type(error)):
        run(tmp_path / "out", [corpus], tokenizer_dir, validation=0.1)
    assert nothing_left(tmp_path / "out") and len(calls) == 2


def test_killed_conversion_leaves_no_manifest(tmp_path: Path, corpus: Path, tokenizer_dir: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process cleans nothing up: what it leaves must not look like a set."""
    finish = SplitWriter.finish

    def die_after_the_first_split(self: SplitWriter) -> None:
        if self.split == "validation":
            raise SystemExit(9)
        finish(self)

    monkeypatch.setattr("shutil.rmtree", lambda *args, **options: None)
    monkeypatch.setattr(SplitWriter, "finish", die_after_the_first_split)
    with pytest.raises(SystemExit):
        run(tmp_path / "out", [corpus], tokenizer_dir, validation=0.1)
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out*/train/*"))
    assert not list(tmp_path.rglob("manifest.json"))


def spoilt_corpus(folder: Path, name: str, data: bytes) -> Path:
    """A folder whose first file is good and whose second is not: the error comes after work was done."""
    folder.mkdir()
    (folder / "a.txt").write_text("kalo mi ter " * 50)
    (folder / name).write_bytes(data)
    return folder


GOOD = content(".jsonl", TEXTS * 50)
BAD_FILES = {
    "invalid UTF-8 in text": ("b.txt", b"ok \xff", r"b\.txt: invalid UTF-8 \(invalid start byte at byte 3"),
    "invalid UTF-8 in a line": ("b.jsonl", b'{"text": "ok"}\n{"text": "\xe4"}\n', r"b\.jsonl line 2: invalid UTF-8"),
    "UTF-16": ("b.json", '{"text": "x"}'.encode("utf-16"), r"b\.json: invalid UTF-8"),
    "truncated gz": ("b.jsonl.gz", gzip.compress(GOOD)[:-20], r"b\.jsonl\.gz: the file cannot be read to its end"),
    "no gz": ("b.jsonl.gz", GOOD, r"b\.jsonl\.gz: the file cannot be read to its end \(Not a gzipped"),
    "flipped gz": ("b.txt.gz", gzip.compress(GOOD)[:-8] + bytes(8), r"b\.txt\.gz: .*CRC"),
    "truncated zst": ("b.jsonl.zst", PACKERS[".zst"](GOOD)[:-20], r"b\.jsonl\.zst: .*Truncated"),
    "no zst": ("b.txt.zst", GOOD, r"b\.txt\.zst: the file cannot be read to its end"),
    "truncated parquet": ("b.parquet", content(".parquet", TEXTS)[:-20], r"b\.parquet: no readable Parquet"),
    "empty parquet": ("b.parquet", b"", r"b\.parquet: no readable Parquet"),
    "parquet without text": ("b.parquet", content(".parquet", TEXTS).replace(b"text", b"tixt"),
                             r"b\.parquet: no column 'text'; it has id, tixt, other.*--text-field"),
    "record without text": ("b.jsonl", b'{"text": "x"}\n{"id": 1}\n', r"b\.jsonl line 2: .*without text: no key"),
    "text null": ("b.jsonl", b'{"text": null}\n', r"b\.jsonl line 1: .*'text' is None; a string"),
    "text a number": ("b.json", b'[{"text": "x"}, {"text": 3}]', r"b\.json record 2: .*'text' is 3"),
    "no object": ("b.jsonl", b'["x"]\n', r"b\.jsonl line 1: a list; an object"),
    "no JSON": ("b.jsonl", b'{"text": "x"}\n{"text": \n', r"b\.jsonl line 2: no JSON"),
    "no JSON file": ("b.json", GOOD, r"b\.json: no JSON .*\.jsonl"),
    "nested JSON": ("b.jsonl", b"[" * 100_000, r"b\.jsonl line 1: no JSON"),
    "lone surrogate": ("b.jsonl", b'{"text": "ab\\ud800"}', r"b\.jsonl line 1: half of a surrogate pair at char"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_error_and_leaves_nothing(tmp_path: Path, tokenizer_dir: Path, case: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    name, data, message = BAD_FILES[case]
    folder = spoilt_corpus(tmp_path / "in", name, data)
    status = main([str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir), "--validation", "0"])
    error = capsys.readouterr().err
    pytest_match(message, error)
    assert status == 1 and "Traceback" not in error and error.count("error: ") == 1
    assert nothing_left(tmp_path / "out")


def pytest_match(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


BAD_CALLS: dict[str, tuple[list[str], str]] = {
    "missing": (["{tmp}/nowhere.jsonl"], r"nowhere\.jsonl: no such file or folder; .*Correct the path"),
    "unknown suffix": (["{tmp}/a.csv"], r"a\.csv: suffix \.csv is not read; \.jsonl, \.json, \.txt, \.parquet"),
    "empty folder": (["{tmp}/empty"], "empty: the folder holds 0 files, none of them readable"),
    "empty file": (["{tmp}/empty.jsonl"], r"empty\.jsonl: the corpus is empty"),
    "second source empty": (["{tmp}/good.txt", "{tmp}/empty.jsonl"], r"empty\.jsonl: the corpus is empty"),
    "offline dataset": (["owner/name"], "owner/name: no such file or folder, and the Hugging Face dataset"),
    "same name": (["{tmp}/good.txt", "{tmp}/empty/../good.txt"], "good is the name of more than one .*NAME=SOURCE"),
    "no id": (["{tmp}/good.jsonl", "--id-field", "nr"], r"good\.jsonl line 1: its 'nr' is None"),
    "chunk length": (["{tmp}/good.txt", "--chunk-length", "70000"], "--chunk-length: 70000 given; 1 to 65535"),
    "validation": (["{tmp}/good.txt", "--validation", "1"], "--validation: 1.0 given; .*below 1"),
    "one document": (["{tmp}/good.txt", "--validation", "0.5"], "--validation: 0.5 given; of 1 documents none fell to"),
    "limit": (["{tmp}/good.txt", "--limit-bytes", "0"], "--limit-bytes: 0 given"),
    "seed": (["{tmp}/good.txt", "--seed", "-1"], "--seed: -1 given"),
    "shard size": (["{tmp}/good.txt", "--shard-size", "300"], "--shard-size: 300 bytes given; one chunk of good alone"),
    "tokenizer": (["{tmp}/good.txt", "--tokenizer", "{tmp}/none"], "none: neither a folder nor"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_one_clear_error_and_leaves_nothing(tmp_path: Path, tokenizer_dir: Path, case: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "good.txt").write_text("kalo")
    (tmp_path / "good.jsonl").write_text('{"text": "kalo"}')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    arguments, message = BAD_CALLS[case]
    defaults = ["--out", str(tmp_path / "out"), "--validation", "0", "--tokenizer", str(tokenizer_dir)]
    status = main([*defaults, *(a.format(tmp=tmp_path) for a in arguments)])
    error = capsys.readouterr().err
    pytest_match(message, error)
    assert status == 1 and "Traceback" not in error and nothing_left(tmp_path / "out")


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    for both in ({}, {"tokenizer": "x", "train_tokenizer": 300}):
        with pytest.raises(ValueError, match="exactly one of the two is needed"):
            ConvertOptions(sources=["x"], out=tmp_path, **both)
    with pytest.raises(ValueError, match="sources: 'x' given; a list"):
        ConvertOptions(sources="x", out=tmp_path, tokenizer="x")


def test_program_converts_and_says_what_it_did(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    program = Path(__file__).resolve().parent.parent / "data_prep" / "convert.py"
    monkeypatch.setattr(sys, "argv", ["convert.py", str(corpus), "--out", str(tmp_path / "out"), "--train-tokenizer",
                                      "400", "--validation", "0.1", "--chunk-length", "30"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(program), run_name="__main__")
    line = capsys.readouterr().out
    assert status.value.code == 0 and line.count("\n") == 1
    manifests = [MDSSet(tmp_path / "out" / split).manifest for split in ("train", "validation")]
    assert f"corpus: 200 documents, {sum(m['totals']['tokens'] for m in manifests):,} tokens" in line
    assert f"{manifests[1]['totals']['documents']} documents for validation" in line and " tokens/s" in line
