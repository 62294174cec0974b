"""Text to a dataset: nothing lost or doubled, what is kept and why, and clear words about bad input."""

from __future__ import annotations

import gzip
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import make_documents
from converting import files_of, run, stored, write_corpus, write_jsonl
from transformers import AutoTokenizer

from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.shards import MDSSplit

DOCUMENTS = make_documents(200)  # those of the fixture `corpus`


def test_a_dataset_holds_exactly_the_tokens_of_the_corpus_in_its_order(data_set, tokenizer_dir):
    plain = AutoTokenizer.from_pretrained(tokenizer_dir)
    sides = [stored(data_set / split) for split in ("train", "validation")]
    found = {**sides[0], **sides[1]}
    assert sorted(found) == sorted(f"doc-{i}" for i in range(len(DOCUMENTS)))
    for index, text in enumerate(DOCUMENTS):
        assert found[f"doc-{index}"].tolist() == plain(text, add_special_tokens=False)["input_ids"]
    numbers = [int(name[4:]) for name in sides[0]]
    assert numbers == sorted(numbers)
    splits = [MDSSplit(data_set / split) for split in ("train", "validation")]
    assert sum(split.manifest["totals"]["documents"] for split in splits) == len(DOCUMENTS)
    assert sum(split.manifest["totals"]["tokens"] for split in splits) == sum(map(len, found.values()))
    for split in splits:
        tokenizers.check(tokenizers.load(data_set / "tokenizer"), split.tokenizer)


def test_copies_of_a_document_are_on_one_side(tmp_path, tokenizer_dir):
    texts = make_documents(60, longest=10)
    files = [write_jsonl(tmp_path / f"{name}.jsonl", texts) for name in ("first", "second")]
    run(tmp_path / "out", files, tokenizer_dir, validation=0.3)
    run(tmp_path / "other", files, tokenizer_dir, validation=0.3, seed=1)
    sides = [{name.partition("-")[2] for name in stored(tmp_path / "out" / split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60 and 8 <= len(sides[1]) <= 28
    assert {name.partition("-")[2] for name in stored(tmp_path / "other" / "validation")} != sides[1]


def test_a_tokenizer_is_trained_on_the_training_documents_only_and_names_no_place(tmp_path, corpus):
    out = tmp_path / "out"
    run(out, [corpus], None, train_tokenizer=400, validation=0.3)
    held_out = {int(name[4:]) for name in stored(out / "validation")}
    expected = tokenizers.train_bpe((text for i, text in enumerate(DOCUMENTS) if i not in held_out), 400)
    assert 20 < len(held_out) < 100
    assert tokenizers.load(out / "tokenizer").get_vocab() == expected.get_vocab() != \
        tokenizers.train_bpe(DOCUMENTS, 400).get_vocab()
    assert str(tmp_path) not in "".join(path.read_text() for path in out.rglob("*.json"))


def test_each_source_has_shards_and_counts_of_its_own_also_of_what_is_dropped(
        tmp_path, tokenizer_dir, corpus, caplog):
    (tmp_path / "a.txt").write_text("kalo " * 100)
    with write_jsonl(tmp_path / "b.jsonl", [" ", "mi", "kalo", "", "x" * 9999, "y" * 700]).open("a") as file:
        file.write('{"text": 3}\n' * 9)
    run(tmp_path / "out", ["one=" + str(tmp_path / "a.txt"), tmp_path / "b.jsonl", corpus], tokenizer_dir,
        licence="CC0-1.0", max_document_bytes=9000, min_characters=3, max_characters=600)
    data = MDSSplit(tmp_path / "out" / "train")
    tokens = {name: data.tokens[np.array(data.sources) == name].sum() for name in dict.fromkeys(data.sources)}
    counts = data.manifest["sources"]
    assert list(tokens) == ["one", "b", "corpus"] and {name: counts[name]["tokens"] for name in tokens} == tokens
    assert counts["one"]["bytes"] == 500 and counts["one"]["licence"] == "CC0-1.0"
    reasons = Counter("long" if len(text) > 600 else "" for text in DOCUMENTS)
    assert [counts[name]["documents"] for name in tokens] == [1, 1, reasons.pop("")]
    assert [counts[name]["dropped"] for name in tokens] == [
        {}, {"empty": 2, "long": 1, "oversized": 1, "short": 1, "unreadable": 9}, reasons]
    assert caplog.text.count("b.jsonl byte ") == 1 and "9 unreadable records were left out in all" in caplog.text
    assert sum(c["chunks"] for c in counts.values()) == data.samples.sum()


def test_a_text_that_lies_twice_in_a_folder_is_read_once(tmp_path, tokenizer_dir, caplog):
    """As `gzip -k` and `zstd` leave it, or a link to it; a file of the same name in another folder is another text."""
    folder = tmp_path / "in"
    data = write_jsonl(folder / "a.jsonl", make_documents(30)).read_bytes()
    for name in ("a.jsonl.gz", "c.jsonl.gz", "c.jsonl.zst"):
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else b"not read")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    write_jsonl(folder / "deeper" / "a.jsonl", ["kalo mi ter"])
    assert run(tmp_path / "out", [folder], tokenizer_dir).manifests["train"]["totals"]["documents"] == 61
    for name, first in (("a.jsonl.gz", "a.jsonl"), ("b.jsonl", "a.jsonl"), ("c.jsonl.zst", "c.jsonl.gz")):
        assert f"{name} is not read, as it is the text of {first};" in caplog.text


@pytest.mark.parametrize("option, values", [("engine", ("fast", "tokenizers")), ("compression", (None, "zstd"))])
def test_the_chunks_are_the_same_whatever_tokenizes_and_compresses(tmp_path, tokenizer_dir, option, values):
    write_corpus(tmp_path / "in", longest=300)
    for value in values:
        run(tmp_path / str(value), [tmp_path / "in"], tokenizer_dir, **{option: value})
    one, two = (stored(tmp_path / str(value) / "train") for value in values)
    assert list(one) == list(two) and all(np.array_equal(one[name], two[name]) for name in one)
    assert option == "compression" or files_of(tmp_path / "fast") == files_of(tmp_path / "tokenizers")


BAD_CALLS: dict[str, tuple[list[str], str]] = {
    "bad record": (["{tmp}/two", "--max-bad-records", "0"], r"b\.jsonl line 1 .*'text'.*--max-bad-records \(0\)"),
    "missing": (["{tmp}/nowhere.jsonl"], r"nowhere\.jsonl"),
    "empty file": (["{tmp}/empty.jsonl"], "sources must hold a document for training"),
    "same name": (["{tmp}/good.txt", "{tmp}/two/../good.txt"], "got good twice; write NAME=SOURCE"),
    "chunk length": (["{tmp}/good.txt", "--chunk-length", "70000"], "--chunk-length must be 1 to 65535 .*got 70000"),
    "validation": (["{tmp}/good.txt", "--validation", "1"], "--validation must be .*, got 1.0"),
    "small shard": (["{tmp}/good.txt", "--shard-size", "300"], "--shard-size must hold any chunk, got 300"),
    "two tokenizers": (["{tmp}/good.txt", "--train-tokenizer", "300"], "exactly one of the two"),
    "half an array": (["{tmp}/good.txt", "--task-index", "0"], "--task-index must be .*, got 0"),
    "lengths": (["{tmp}/good.txt", "--min-characters", "9", "--max-characters", "8"], "--min-characters must.* 9"),
    "compression": (["{tmp}/good.txt", "--compression", "gzip"], "'--compression': 'gzip' is not one of 'zstd'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_one_clear_error_and_leaves_no_dataset(tmp_path, tokenizer_dir, case, ettin):
    write_jsonl(tmp_path / "two" / "a.jsonl", ["kalo mi ter " * 50])
    (tmp_path / "two" / "b.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "good.txt").write_text("kalo")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    arguments, message = BAD_CALLS[case]
    defaults = ["--out", str(tmp_path / "out"), "--validation", "0", "--tokenizer", str(tokenizer_dir)]
    code, _, error = ettin("convert", *defaults, *(a.format(tmp=tmp_path) for a in arguments))
    assert code in (1, 2) and error.lower().count("error: ") == 1 and re.search(message, error)
    assert not list((tmp_path / "out").rglob("manifest.json"))


def test_the_program_converts_and_says_what_it_did(tmp_path, corpus, monkeypatch, capsys):
    program = Path(__file__).resolve().parents[2] / "data_prep" / "convert.py"
    monkeypatch.setattr(sys, "argv", ["convert.py", str(corpus), "--out", str(tmp_path / "out"), "--train-tokenizer",
                                      "400", "--validation", "0.1", "--chunk-length", "30"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(program), run_name="__main__")
    text = capsys.readouterr().out
    assert status.value.code == 0 and text.startswith(f"{tmp_path / 'out'}: 1 of 1 units done by this call\n")
    manifests = {split: MDSSplit(tmp_path / "out" / split).manifest["totals"] for split in ("train", "validation")}
    assert sum(totals["documents"] for totals in manifests.values()) == 200
    for split, totals in manifests.items():
        assert f"{split}: {totals['samples']:,} chunks of at most 30 tokens, {totals['tokens']:,} tokens" in text
