"""Text to a data set: nothing lost or doubled, what is kept and why, and clear words about bad input."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_documents
from converting import files_of, is_finished, run, stored, write_corpus
from text_files import TEXTS, content
from transformers import AutoTokenizer

from ettin_foundry.corpus.convert import ConvertOptions, main
from ettin_foundry.corpus.filters import FilterOptions
from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.shards import MDSSplit


def test_set_holds_exactly_the_tokens_of_the_corpus(data_set: Path, tokenizer_dir: Path, documents: list[str]) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer_dir)
    found = {**stored(data_set / "train"), **stored(data_set / "validation")}
    assert list(sorted(found)) == sorted(f"doc-{i}" for i in range(len(documents)))
    for index, text in enumerate(documents):
        assert found[f"doc-{index}"].tolist() == plain(text, add_special_tokens=False)["input_ids"]
    totals = [MDSSplit(data_set / split).manifest["totals"] for split in ("train", "validation")]
    assert sum(t["documents"] for t in totals) == len(documents)
    assert sum(t["tokens"] for t in totals) == sum(map(len, found.values()))


def test_training_order_is_the_corpus_order(data_set: Path) -> None:
    numbers = [int(name[4:]) for name in stored(data_set / "train")]
    assert numbers == sorted(numbers)


def test_saved_tokenizer_is_the_one_in_the_manifest(data_set: Path) -> None:
    for split in ("train", "validation"):
        tokenizers.check(tokenizers.load(data_set / "tokenizer"), MDSSplit(data_set / split).tokenizer)


def test_copies_of_a_document_are_on_one_side(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = make_documents(60, longest=10)
    for name in ("first", "second"):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": text, "id": f"{name}-{i}"}) + "\n" for i, text in enumerate(texts)))
    out = tmp_path / "out"
    run(out, [tmp_path / "first.jsonl", tmp_path / "second.jsonl"], tokenizer_dir, validation=0.3)
    sides = [{name.partition("-")[2] for name in stored(out / split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60 and 8 <= len(sides[1]) <= 28
    other = tmp_path / "other"
    run(other, [tmp_path / "first.jsonl"], tokenizer_dir, validation=0.3, seed=1)
    assert {name.partition("-")[2] for name in stored(other / "validation")} != sides[1]


def test_converting_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for out in (first, second):
        run(out, [corpus], None, train_tokenizer=400, validation=0.1)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path
    assert str(tmp_path) not in "".join(path.read_text() for path in first.rglob("*.json"))


def test_tokenizer_is_trained_on_the_training_documents_only(tmp_path: Path, corpus: Path,
                                                             documents: list[str]) -> None:
    out = tmp_path / "out"
    run(out, [corpus], None, train_tokenizer=400, validation=0.3)
    held_out = {int(name[4:]) for name in stored(out / "validation")}
    expected = tokenizers.train_bpe((text for i, text in enumerate(documents) if i not in held_out), 400)
    assert 20 < len(held_out) < 100
    assert tokenizers.load(out / "tokenizer").get_vocab() == expected.get_vocab() != \
        tokenizers.train_bpe(documents, 400).get_vocab()


def test_literal_special_tokens_in_a_corpus_stay_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    text = "kalo [MASK] and [CLS]x[SEP] [PAD]"
    (tmp_path / "a.txt").write_text(text)
    run(tmp_path / "out", [tmp_path / "a.txt"], tokenizer_dir)
    ids = stored(tmp_path / "out" / "train")["a.txt"].tolist()
    tok = tokenizers.load(tokenizer_dir)
    assert not set(ids) & set(tok.all_special_ids) and tok.decode(ids, clean_up_tokenization_spaces=False) == text


def test_sources_have_shards_and_counts_of_their_own(tmp_path: Path, tokenizer_dir: Path, corpus: Path) -> None:
    (tmp_path / "a.txt").write_text("kalo " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": " "}\n{"text": "mi"}\n{"text": ""}\n')
    out = tmp_path / "out"
    run(out, ["one=" + str(tmp_path / "a.txt"), tmp_path / "b.jsonl", corpus], tokenizer_dir,
              licence="CC0-1.0")
    data = MDSSplit(out / "train")
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
        out = tmp_path / f"out{limit}"
        run(out, [corpus], tokenizer_dir, limit_bytes=limit)
        assert list(stored(out / "train")) == [f"doc-{i}" for i in range(number)]


def test_stdlib_is_real_text_with_licence_and_module_docstrings(tmp_path: Path, tokenizer_dir: Path) -> None:
    out = tmp_path / "out"
    run(out, ["python-stdlib"], tokenizer_dir, limit_bytes=60_000, validation=0.3)
    manifest = MDSSplit(out / "train").manifest
    counts = manifest["sources"]["python-stdlib"]
    assert counts["licence"] == "PSF-2.0" and counts["revision"] == sys.version.split()[0]
    assert counts["tokens"] > 5_000 and "__hello__.py" in stored(out / "train")


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": f"{path.stem}-{i}"}) + "\n" for i, text in enumerate(texts)))
    return path


def test_duplicates_are_dropped_after_the_first_across_files_and_sources(tmp_path: Path, tokenizer_dir: Path) -> None:
    texts = make_documents(120, longest=20)
    rng = np.random.default_rng(3)
    lists = [[texts[i] for i in rng.integers(0, len(texts), 150)] for _ in range(3)]
    (tmp_path / "one").mkdir()
    write_jsonl(tmp_path / "one" / "a.jsonl", lists[0])
    write_jsonl(tmp_path / "one" / "b.jsonl", lists[1])
    write_jsonl(tmp_path / "two.jsonl", lists[2])
    run(tmp_path / "out", [tmp_path / "one", tmp_path / "two.jsonl"], tokenizer_dir,
        filters=FilterOptions(deduplicate=True))
    seen: set[str] = set()  # the reference: one pass over everything in order
    expected = []
    for name, found in zip(("a", "b", "two"), lists):
        for i, text in enumerate(found):
            if text not in seen:
                seen.add(text)
                expected.append(f"{name}-{i}")
    assert list(stored(tmp_path / "out" / "train")) == expected
    counts = MDSSplit(tmp_path / "out" / "train").manifest["sources"]
    assert sum(c["dropped"].get("duplicate", 0) for c in counts.values()) == 450 - len(expected) > 200


def test_each_filter_counts_what_it_drops(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = make_documents(100, longest=40)
    texts[10] = "\u4f60" * 4000
    texts[12] = "x" * 5000
    texts[14] = "mi"
    write_jsonl(tmp_path / "c.jsonl", texts)
    (tmp_path / "keeping.py").write_text("def even(text, id):\n    return int(id.partition('-')[2]) % 2 == 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run(tmp_path / "out", [tmp_path / "c.jsonl"], tokenizer_dir, validation=0.2, max_document_bytes=10_000,
        filters=FilterOptions(min_characters=3, max_characters=4000, predicates=("keeping:even",)))
    kept = {**stored(tmp_path / "out" / "train"), **stored(tmp_path / "out" / "validation")}
    assert sorted(int(name[2:]) for name in kept) == [i for i in range(0, 100, 2) if i not in (10, 12, 14)]
    dropped: dict[str, int] = {}
    for split in ("train", "validation"):
        for reason, number in MDSSplit(tmp_path / "out" / split).manifest["sources"]["c"]["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    assert dropped == {"oversized": 1, "long": 1, "short": 1, "predicate keeping:even": 50}


def test_both_engines_write_the_same_bytes(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_corpus(tmp_path / "in", longest=300)
    for engine in ("fast", "tokenizers"):
        run(tmp_path / engine, [tmp_path / "in"], tokenizer_dir, engine=engine)
    assert files_of(tmp_path / "fast") == files_of(tmp_path / "tokenizers")


def test_compressed_set_holds_the_same_chunks(tmp_path: Path, tokenizer_dir: Path) -> None:
    write_corpus(tmp_path / "in")
    for name, compression in (("plain", None), ("zstd", "zstd")):
        run(tmp_path / name, [tmp_path / "in"], tokenizer_dir, compression=compression)
    assert not list((tmp_path / "zstd" / "train").glob("*.mds")) and list((tmp_path / "zstd" / "train").glob("*.zstd"))
    plain, packed = stored(tmp_path / "plain" / "train"), stored(tmp_path / "zstd" / "train")
    assert list(plain) == list(packed) and all(np.array_equal(plain[name], packed[name]) for name in plain)


def spoilt_corpus(folder: Path, name: str, data: bytes) -> Path:
    """A folder whose first file is good and whose second is not: the error comes after work was done."""
    folder.mkdir()
    (folder / "a.txt").write_text("kalo mi ter " * 50)
    (folder / name).write_bytes(data)
    return folder


GOOD = content(".jsonl", TEXTS * 50)
BAD_FILES = {  # test_readers.py has many more
    "invalid UTF-8 in text": ("b.txt", b"ok \xff", r"b\.txt must be UTF-8"),
    "truncated gz": ("b.jsonl.gz", gzip.compress(GOOD)[:-20], r"b\.jsonl\.gz must be a whole"),
    "parquet without text": ("b.parquet", content(".parquet", TEXTS).replace(b"text", b"tixt"),
                             r"b\.parquet must have a column 'text'.*--text-field"),
    "record without text": ("b.jsonl", b'{"text": "x"}\n{"id": 1}\n', r"b\.jsonl line 2 .*whose 'text' is a string"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_error_and_leaves_no_set(tmp_path: Path, tokenizer_dir: Path, case: str,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    name, data, message = BAD_FILES[case]
    folder = spoilt_corpus(tmp_path / "in", name, data)
    status = main([str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_dir), "--validation", "0"])
    error = capsys.readouterr().err
    pytest_match(message, error)
    assert status == 1 and "Traceback" not in error and error.count("error: ") == 1
    assert not is_finished(tmp_path / "out")


def pytest_match(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


BAD_CALLS: dict[str, tuple[list[str], str]] = {
    "missing": (["{tmp}/nowhere.jsonl"], r"nowhere\.jsonl: no such file or folder"),
    "empty file": (["{tmp}/empty.jsonl"], "empty: the corpus is empty"),
    "second source empty": (["{tmp}/good.txt", "{tmp}/empty.jsonl"], "empty: the corpus is empty"),
    "offline dataset": (["owner/name"], "owner/name: no such file or folder, and the Hugging Face dataset"),
    "same name": (["{tmp}/good.txt", "{tmp}/empty/../good.txt"], "good is the name of more than one .*NAME=SOURCE"),
    "no id": (["{tmp}/good.jsonl", "--id-field", "nr"], r"good\.jsonl line 1 \(byte .*\): its 'nr' must be"),
    "chunk length": (["{tmp}/good.txt", "--chunk-length", "70000"], "--chunk-length: 70000 given; 1 to 65535"),
    "cut window": (["{tmp}/good.txt", "--cut-window", "0.6"], "--cut-window: 0.6 given; a share from 0"),
    "validation": (["{tmp}/good.txt", "--validation", "1"], "--validation: 1.0 given; .*below 1"),
    "one document": (["{tmp}/good.txt", "--validation", "0.5"], "--validation: 0.5 given; of 1 documents none fell to"),
    "limit": (["{tmp}/good.txt", "--limit-bytes", "0"], "--limit-bytes: 0 given"),
    "seed": (["{tmp}/good.txt", "--seed", "-1"], "--seed: -1 given"),
    "shard size": (["{tmp}/good.txt", "--shard-size", "300"], "--shard-size: 300 bytes given; one chunk of good alone"),
    "tokenizer": (["{tmp}/good.txt", "--tokenizer", "{tmp}/none"], "none must be a folder"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_is_one_clear_error_and_leaves_no_set(tmp_path: Path, tokenizer_dir: Path, case: str,
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
    assert status == 1 and "Traceback" not in error and not is_finished(tmp_path / "out")


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    for both in ({}, {"tokenizer": "x", "train_tokenizer": 300}):
        with pytest.raises(ValueError, match="exactly one of the two is needed"):
            ConvertOptions(sources=["x"], out=tmp_path, **both)
    with pytest.raises(ValueError, match="sources: 'x' given; a list"):
        ConvertOptions(sources="x", out=tmp_path, tokenizer="x")


def test_program_converts_and_says_what_it_did(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    program = Path(__file__).resolve().parents[2] / "data_prep" / "convert.py"
    monkeypatch.setattr(sys, "argv", ["convert.py", str(corpus), "--out", str(tmp_path / "out"), "--train-tokenizer",
                                      "400", "--validation", "0.1", "--chunk-length", "30"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(program), run_name="__main__")
    line = capsys.readouterr().out
    assert status.value.code == 0 and line.count("\n") == 1
    manifests = [MDSSplit(tmp_path / "out" / split).manifest for split in ("train", "validation")]
    assert f"corpus: 200 documents, {sum(m['totals']['tokens'] for m in manifests):,} tokens" in line
    assert f"{manifests[1]['totals']['documents']} documents for validation" in line and " tokens/s" in line
