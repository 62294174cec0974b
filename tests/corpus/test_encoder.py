"""Fast encoding: the ids of `tokenizers` on every text, which library is chosen, what is checked, long texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from odd_texts import odd_texts
from tokenizers import Tokenizer, models, pre_tokenizers

from ettin_foundry.corpus import encoder as encoders
from ettin_foundry.corpus.encoder import TextEncoder

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
ROOT, OPEN = Path(__file__).resolve().parents[2], encoders._open_fastokens


@pytest.fixture(scope="module")
def tok_json(tokenizer_dir: Path) -> str:
    return (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")


def make(tokenizer_json: str, **options: Any) -> TextEncoder:
    content = json.loads(tokenizer_json)
    vocab = Tokenizer.from_str(tokenizer_json).get_vocab()
    special = [token["id"] for token in content["added_tokens"] if token["special"]]
    return TextEncoder(tokenizer_json, **{"forbidden": special, "vocab_size": max(vocab.values()) + 1, **options})


def reference(tokenizer_json: str, texts: Sequence[str]) -> list[list[int]]:
    """What `tokenizers` gives when asked plainly, one text at a time."""
    backend: Any = Tokenizer.from_str(tokenizer_json)
    backend.encode_special_tokens = True
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def as_lists(found: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(found[0], np.cumsum(found[1])[:-1])]


def word_level() -> str:
    """A tokenizer without rules against special tokens in text, of a kind that fastokens does not read."""
    backend: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIALS, "a", "b"])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend.to_str()


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
def test_ids_equal_those_of_tokenizers(tok_json: str, engine: Any) -> None:
    texts = ["", *odd_texts(3000), "", *make_documents(30), ""]
    encoder = make(tok_json, engine=engine)
    assert encoder.engine.startswith("fastokens " if engine == "fast" else "tokenizers ")
    tokens, lengths = encoder.encode(texts)
    assert (tokens.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert as_lists((tokens, lengths)) == reference(tok_json, texts)
    assert [len(array) for array in encoder.encode([])] == [0, 0]


def test_ids_of_ettins_vocabulary_equal_those_of_tokenizers(ettin_tokenizer_dir: Path) -> None:
    content = (ettin_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    code = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("tests/corpus/test_c*.py"))]
    texts = [*odd_texts(2000, seed=2), *code]
    encoder = make(content)
    assert encoder.engine.startswith("fastokens ")
    assert as_lists(encoder.encode(texts)) == reference(content, texts)


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
def test_special_tokens_written_out_stay_ordinary_text(tok_json: str, engine: Any) -> None:
    backend, text = Tokenizer.from_str(tok_json), "ka [MASK]. \n\t [MASK] [CLS][SEP]a[PAD]\n[UNK]b[MASK][MASK"
    ids = make(tok_json, engine=engine).encode([text])[0].tolist()
    assert not set(ids) & {backend.token_to_id(token) for token in SPECIALS}
    assert backend.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_surrogates_and_ids_out_of_the_vocabulary_are_errors(tok_json: str) -> None:
    encoder = make(word_level(), forbidden=range(5), name="words")
    assert encoder.encode(["a b", "b"])[0].tolist() == [5, 6, 6]
    with pytest.raises(ValueError, match=r"words: .* special token, got 4 \('\[MASK\]'\) for 'b \[MASK\] a'"):
        encoder.encode(["a b", "b [MASK] a"])
    with pytest.raises(ValueError, match=r"lone surrogate at character 4 of 'kalo\\ud800 miter'"):
        make(tok_json).encode(["a", "kalo\ud800 miter"])
    highest = max(reference(tok_json, ["kalo miter"])[0])
    with pytest.raises(ValueError, match=f"special token, got {highest}"):
        make(tok_json, forbidden=(), vocab_size=highest).encode(["kalo miter"])


def disagreeing(content: str) -> Any:
    """fastokens, except that the last id of a text with U+0345 in it is another."""
    encode, version = OPEN(content)

    def wrong(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = encode(texts)
        ids = ids.copy()
        ids[[end - 1 for end, text in zip(np.cumsum(lengths), texts) if "\u0345" in text]] = 7
        return ids, lengths
    return wrong, version


@pytest.mark.parametrize("case, reason", [("missing", "not installed"), ("disagreeing", "gives other ids than"),
                                          ("unreadable", "cannot be used with it")])
def test_where_the_fast_library_cannot_be_used_tokenizers_encodes(
        tok_json: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str, reason: str) -> None:
    content, text = (word_level(), "a b") if case == "unreadable" else (tok_json, "\u1f00\u0345")
    if case == "missing":
        monkeypatch.setitem(sys.modules, "fastokens", None)
    if case == "disagreeing":
        monkeypatch.setattr(encoders, "_open_fastokens", disagreeing)
    encoder = make(content, name="mine")
    assert encoder.engine.startswith("tokenizers ") and "mine" in caplog.text and reason in caplog.text
    assert as_lists(encoder.encode([text])) == reference(content, [text])
    with pytest.raises(ValueError, match=f"--engine must be auto or tokenizers .*{reason}"):
        make(content, engine="fast")


def test_disagreement_during_the_run_stops_it_and_names_the_text(tok_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make(tok_json, check_share=1.0, name="mine")
    wrong = make(tok_json).encode(["miter", "caf\u00e9 miter"])
    wrong[0][-1] = 3
    monkeypatch.setattr(encoder, "_fast", lambda texts: wrong)
    with pytest.raises(ValueError, match=r"mine: fastokens \S+ and tokenizers \S+ must agree, .* for 'caf\\xe9 miter'"):
        encoder.encode(["miter", "caf\u00e9 miter"])


def test_failure_of_the_fast_library_leaves_the_batch_to_tokenizers(
        tok_json: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class PanicException(BaseException):
        """What a panic of a Rust library arrives as."""

    def panic(texts: Sequence[str]) -> Any:
        raise PanicException("index out of bounds")

    encoder = make(tok_json)
    monkeypatch.setattr(encoder, "_fast", panic)
    assert as_lists(encoder.encode(["kalo", "miter"])) == reference(tok_json, ["kalo", "miter"])
    assert "PanicException('index out of bounds')" in caplog.text


def added_token(tok_json: str, **token: Any) -> str:
    content = json.loads(tok_json)
    token = {**content["added_tokens"][0], "id": 512, "special": False, **token}
    return json.dumps({**content, "added_tokens": [*content["added_tokens"], token]})


LONG: dict[str, tuple[Callable[[str], str], bool]] = {
    "plain": (lambda content: content, True),
    "prepends a space": (lambda content: json.dumps({**json.loads(content),
                                                     "normalizer": {"type": "Prepend", "prepend": " "}}), False),
    "token over a line end": (lambda content: added_token(content, content="kalo\nmiter"), False),
    "token that takes it": (lambda content: added_token(content, content="volq", lstrip=True), False)}


@pytest.mark.parametrize("case", LONG)
def test_a_long_text_is_cut_only_where_its_tokens_stay(tok_json: str, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(encoders, "_STRETCH", 300)
    change, is_cut = LONG[case]
    content = change(tok_json)
    encoder = make(content, engine="tokenizers")
    texts = ["\n".join(make_documents(40, seed=9)), "".join(odd_texts(300, seed=4)), "kalo\nmiter\nge quo\n" * 300,
             "ka\nvolq ka volq ka mi\nter\n" * 300, "a\n" * 1500 + "\u0301" + "\nb" * 800, "", "kalo"]
    assert as_lists(encoder.encode(texts)) == reference(content, texts)
    stretches = list(encoder._stretches(texts[0]))
    assert (len(stretches) > 10) == is_cut and "".join(stretches) == texts[0]


def test_one_core_is_used_and_the_environment_left_alone(tok_json: str, tmp_path: Path) -> None:
    """Threads of fastokens carry its name; on a machine with one core there would be none anyhow."""
    (tmp_path / "tokenizer.json").write_text(tok_json, encoding="utf-8")
    program = """
import os, sys
from pathlib import Path
before = dict(os.environ)
from ettin_foundry.corpus.encoder import TextEncoder
encoder = TextEncoder(open(sys.argv[1], encoding="utf-8").read(), forbidden=(), vocab_size=512)
encoder.encode(["kalo miter " * 10_000] * 8)
assert dict(os.environ) == before, "environment"
assert not {"torch", "transformers", "streaming"} & set(sys.modules), "slow imports"
tasks = Path("/proc/self/task")
print(sum((task / "comm").read_text().startswith("fastokens") for task in tasks.iterdir()) if tasks.is_dir() else 0)
"""
    env = {key: value for key, value in os.environ.items() if not key.endswith(("_THREADS", "PARALLELISM"))}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "tokenizer.json")], cwd=ROOT, env=env,
                          capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr
