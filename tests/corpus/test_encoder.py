"""Fast encoding: the ids of `tokenizers` on every text, which library is chosen, what is checked, long texts."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from converting import run, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from benchmarks.odd_texts import odd_texts
from ettin_foundry.corpus import encoder as encoders
from ettin_foundry.corpus.encoder import TextEncoder

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tok_json(tokenizer_dir):
    return (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")


def make(tokenizer_json: str, **options: Any) -> TextEncoder:
    content = json.loads(tokenizer_json)
    special = [token["id"] for token in content["added_tokens"] if token["special"]]
    return TextEncoder(tokenizer_json, **{"forbidden": special, **options})


def reference(tokenizer_json: str, texts: Sequence[str]) -> list[list[int]]:
    """What `tokenizers` gives when asked plainly, one text at a time."""
    backend: Any = Tokenizer.from_str(tokenizer_json)
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def as_lists(found: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(found[0], np.cumsum(found[1])[:-1])]


def make_backend(model: Any, splitter: Any = pre_tokenizers.WhitespaceSplit) -> Any:
    backend: Any = Tokenizer(model)
    backend.pre_tokenizer = splitter()
    return backend


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
@pytest.mark.parametrize("vocabulary", ["tokenizer_dir", "ettin_tokenizer_dir"])
def test_ids_equal_those_of_tokenizers_and_special_tokens_written_out_stay_text(request, vocabulary, engine):
    content = (request.getfixturevalue(vocabulary) / "tokenizer.json").read_text(encoding="utf-8")
    written = "ka [MASK]. \n\t [MASK] [CLS][SEP]a[PAD]\n[UNK]b[MASK][MASK"
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    texts = ["", *odd_texts(3000), code, *make_documents(30), "", written]
    encoder, backend = make(content, engine=engine), Tokenizer.from_str(content)
    assert encoder.engine.startswith("fastokens " if engine == "fast" else "tokenizers ")
    tokens, lengths = encoder.encode(texts)
    assert (tokens.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert as_lists((tokens, lengths)) == reference(content, texts)
    assert backend.decode(as_lists((tokens, lengths))[-1], skip_special_tokens=False) == written
    assert not {*tokens.tolist()} & {backend.token_to_id(token) for token in SPECIALS}
    assert [len(array) for array in encoder.encode([])] == [0, 0]


TRAINERS: dict[str, tuple[Any, Any]] = {
    "Unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIALS, unk_token="[UNK]")),
    "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=SPECIALS)),
    "WordLevel": (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=SPECIALS))}


@pytest.mark.parametrize("kind", TRAINERS)
def test_unknown_characters_are_told_and_special_tokens_in_text_are_spelled(kind):
    """These models may have "[MASK]" among their pieces, and give it for a text that holds it."""
    model, trainer = TRAINERS[kind]
    backend = make_backend(model, pre_tokenizers.Metaspace if kind == "Unigram" else pre_tokenizers.WhitespaceSplit)
    backend.train_from_iterator([*make_documents(300), "[ M A S K"], trainer)
    encoder = make(backend.to_str(), forbidden=range(5))
    texts = ["kalo miter", "kalo [MASK] miter \U0001f680", "[MASK][MASK]", "\U0001f680", "kalo"]
    expected = reference(backend.to_str(), texts)
    assert encoder.unknown == 0 and sum(ids.count(4) for ids in expected) >= 1 and expected[3][-1] == 0
    letters = [backend.token_to_id(letter) or 0 for letter in "[MASK]"]
    assert as_lists(encoder.encode(texts)) == \
        [[n for token in ids for n in (letters if token == 4 else [token])] for ids in expected]


@pytest.mark.parametrize("case, reason", [("missing", "ModuleNotFoundError"), ("disagreeing", "gives other ids than"),
                                          ("unreadable", "cannot be used with it")])
def test_where_the_fast_library_cannot_be_used_tokenizers_encodes(tok_json, monkeypatch, caplog, case, reason):
    content, text = tok_json, "\u1f00\u0345"
    if case == "unreadable":
        content = make_backend(models.WordLevel({"[UNK]": 0, text: 1}, unk_token="[UNK]")).to_str()
    if case == "missing":
        monkeypatch.setitem(sys.modules, "fastokens", None)
    if case == "disagreeing":  # on one id of one text
        encode, version = encoders._open_fastokens(tok_json)
        monkeypatch.setattr(encoders, "_open_fastokens", lambda _: (lambda texts: encode(
            [t.replace("\u0345", "a") for t in texts]), version))
    encoder = make(content, name="mine")
    assert encoder.engine.startswith("tokenizers ") and "mine" in caplog.text and reason in caplog.text
    assert as_lists(encoder.encode([text])) == reference(content, [text])
    with pytest.raises(ValueError, match=f"--engine must be auto or tokenizers .*{reason}"):
        make(content, engine="fast")


def test_what_the_fast_library_does_wrong_stops_the_run_or_is_left_to_tokenizers(tok_json, monkeypatch, caplog):
    encoder, texts = make(tok_json, check_share=1.0, name="mine"), ["miter", "caf\u00e9 miter"]
    wrong = make(tok_json).encode(texts)
    wrong[0][-1] = 3
    monkeypatch.setattr(encoder, "_fast", lambda texts: wrong)
    with pytest.raises(ValueError, match=r"mine: fastokens \S+ and tokenizers \S+ must agree, .* for 'caf\\xe9 miter'"):
        encoder.encode(texts)
    panic = type("PanicException", (BaseException,), {})("index out of bounds")  # as of a Rust library
    monkeypatch.setattr(encoder, "_fast", lambda texts: (_ for _ in ()).throw(panic))
    assert as_lists(encoder.encode(texts)) == reference(tok_json, texts)
    assert "PanicException('index out of bounds')" in caplog.text


def test_one_core_is_used(tok_json):
    """Threads of fastokens carry its name; on a machine with one core there would be none anyhow."""
    program = """if True:
        import pathlib, sys
        from ettin_foundry.corpus.encoder import TextEncoder
        TextEncoder(sys.stdin.read(), forbidden=()).encode(["kalo miter " * 10_000] * 8)
        assert not {"torch", "transformers", "streaming"} & set(sys.modules)
        print([task for task in pathlib.Path("/proc/self").glob("task/*/comm") if "fastok" in task.read_text()])"""
    env = {key: value for key, value in os.environ.items() if not key.endswith(("_THREADS", "PARALLELISM"))}
    done = subprocess.run([sys.executable, "-c", program], input=tok_json, cwd=ROOT, env=env, stdout=-1, text=True)
    assert done.stdout.strip() == "[]"


def test_a_conversion_counts_unknown_tokens_and_refuses_another_script(tmp_path):
    letters = sorted({*"".join(make_documents(300))})
    vocabulary = {word: i for i, word in enumerate([*SPECIALS, *letters, *("##" + letter for letter in letters)])}
    backend = make_backend(models.WordPiece(vocabulary, unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer)
    backend.save(str(tmp_path / "tokenizer.json"))
    texts = [text + " \u0e20\u0e32\u0e29\u0e32 [MASK]" for text in make_documents(40)]
    expected = sum(ids.count(0) for ids in reference(backend.to_str(), texts))
    summary = run(tmp_path / "set", [write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path)
    assert expected >= 40 and summary.manifests["train"]["sources"]["a"]["unknown"] == expected
    with pytest.raises(ValueError, match=r"unit \d+ .* must know its characters, got \d+ unknown of \d+ tokens"):
        run(tmp_path / "other", [write_jsonl(tmp_path / "b.jsonl", ["\u0e20\u0e32 " * 999 + "kalo"])], tmp_path)
