"""Fast encoding: the ids of `tokenizers` on every text, who decides, what is checked, and texts of any length."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastokens
import numpy as np
import pytest
from conftest import make_documents
from odd_texts import odd_texts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ettin_foundry.corpus import text_cuts
from ettin_foundry.corpus.encoder import TextEncoder
from ettin_foundry.data import tokenizer as tokenizers

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tok_json(tokenizer_dir: Path) -> str:
    return (tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def encoder(tok_json: str) -> TextEncoder:
    return make(tok_json)


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are cut after 300 characters, and must be after 3000: rules and trials stay as they are."""
    monkeypatch.setattr(text_cuts, "STRETCH", 300)
    monkeypatch.setattr(text_cuts, "LONGEST_STRETCH", 3000)


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


def word_level(**change: Any) -> str:
    """A tokenizer without rules against special tokens in text, of a kind that fastokens does not read."""
    backend: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIALS, "a", "b"])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return json.dumps({**json.loads(backend.to_str()), **change})


def test_ids_equal_those_of_tokenizers_on_odd_texts(encoder: TextEncoder, tok_json: str) -> None:
    assert encoder.engine.startswith("fastokens ")
    texts = list(odd_texts(3000)) + make_documents(30)
    assert as_lists(encoder.encode(texts)) == reference(tok_json, texts)


def test_ids_of_ettins_vocabulary_equal_those_of_tokenizers_on_odd_texts_and_code(ettin_tokenizer_dir: Path) -> None:
    content = (ettin_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8")
    texts = list(odd_texts(2000, seed=2)) + [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_c*.py")]
    encoder = make(content)
    assert encoder.engine.startswith("fastokens ") and as_lists(encoder.encode(texts)) == reference(content, texts)


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
def test_tokens_come_flat_with_one_length_per_text(tok_json: str, engine: str) -> None:
    texts = ["", "kalo miter", "", "\u4f60\u597d", ""]
    tokens, lengths = make(tok_json, engine=engine).encode(texts)
    assert (tokens.dtype, lengths.dtype) == (np.uint16, np.int64)
    assert as_lists((tokens, lengths)) == reference(tok_json, texts) and lengths.tolist()[::2] == [0, 0, 0]
    tokens, lengths = make(tok_json, engine=engine).encode([])
    assert (len(tokens), len(lengths), tokens.dtype, lengths.dtype) == (0, 0, np.uint16, np.int64)


def test_engine_does_not_change_tokens(tok_json: str, encoder: TextEncoder) -> None:
    texts = list(odd_texts(300, seed=3))
    other = make(tok_json, engine="tokenizers")
    assert other.engine.startswith("tokenizers ")
    assert as_lists(encoder.encode(texts)) == as_lists(other.encode(texts))


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
def test_special_tokens_written_out_stay_ordinary_text(tokenizer_dir: Path, engine: Any) -> None:
    tok = tokenizers.load(tokenizer_dir)
    encoder = TextEncoder(tok.backend_tokenizer.to_str(), forbidden=tokenizers.forbidden_ids(tok), engine=engine,
                          vocab_size=tokenizers.vocab_size(tok))
    for text in ("ka [MASK].", " \n\t [MASK] ", "[CLS][SEP]", "a[PAD]\n[UNK]b", "[MASK][MASK"):
        ids = encoder.encode([text])[0].tolist()
        assert not set(ids) & set(tok.all_special_ids)
        assert tok.decode(ids, clean_up_tokenization_spaces=False) == text


def test_special_token_out_of_text_is_an_error_that_shows_the_place() -> None:
    encoder = make(word_level(), forbidden=range(5), name="words")
    assert encoder.encode(["a b", "b"])[0].tolist() == [5, 6, 6]
    with pytest.raises(ValueError, match=r"tokenizer words: .* special token 4 \('\[MASK\]'\), in 'b \[MASK\] a' .*=True"):
        encoder.encode(["a b", "b [MASK] a"])


def test_tokenizer_that_fastokens_cannot_read_is_encoded_by_tokenizers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder = make(word_level(), forbidden=range(5), name="words")
    assert encoder.engine.startswith("tokenizers ")
    assert "tokenizer words" in caplog.text and "fastokens cannot be used" in caplog.text
    with pytest.raises(ValueError, match="'fast' given for tokenizer words, but fastokens cannot be used .* or use 'auto'"):
        make(word_level(), forbidden=range(5), name="words", engine="fast")


fastokens_tokenizer = fastokens.Tokenizer


class Disagreeing:
    """fastokens, except that a text with U+0345 in it gets another first id."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @classmethod
    def from_json_str(cls, content: str) -> Disagreeing:
        return cls(fastokens_tokenizer.from_json_str(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch_flat(self, texts: list[str], **options: Any) -> tuple[bytes, bytes]:
        ids, offsets = self.backend.encode_batch_flat(texts, **options)
        changed, begins = np.frombuffer(ids, "<u4").copy(), np.frombuffer(offsets, "<u8").astype(int)
        changed[[begins[i] for i, text in enumerate(texts) if "\u0345" in text]] = 7
        return changed.tobytes(), offsets


def test_disagreement_on_the_probe_means_tokenizers(tok_json: str, monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fastokens, "Tokenizer", Disagreeing)
    with caplog.at_level(logging.WARNING):
        encoder = make(tok_json)
    assert encoder.engine.startswith("tokenizers ") and "gives other ids than tokenizers" in caplog.text
    assert as_lists(encoder.encode(["\u1f00\u0345"])) == reference(tok_json, ["\u1f00\u0345"])
    with pytest.raises(ValueError, match="engine: 'fast' given .* gives other ids"):
        make(tok_json, engine="fast")


def test_missing_fastokens_means_tokenizers(tok_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert make(tok_json).engine.startswith("tokenizers ")
    with pytest.raises(ValueError, match="fastokens is not installed"):
        make(tok_json, engine="fast")


def test_disagreement_during_the_run_stops_it_and_names_the_text(tok_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make(tok_json, check_share=1.0, name="mine")
    fast = encoder._fast
    assert fast is not None

    def broken(texts: Sequence[str]) -> Any:
        ids, lengths = fast(texts)
        return np.where(np.arange(len(ids)) == len(ids) - 1, 3, ids), lengths

    monkeypatch.setattr(encoder, "_fast", broken)
    text = "kalo miter " * 20 + "caf\u00e9"
    with pytest.raises(ValueError, match=r"mine: fastokens \S+ and tokenizers \S+ give different ids from token \d+ on, in "
                                         r"a text of 224 characters, \.\.\.'.*caf\\xe9' .* must agree\. .*--engine "
                                         "tokenizers"):
        encoder.encode(["miter", text])
    assert make(tok_json, check_share=0.0)._fast is not None


def test_share_that_is_checked_is_chosen_by_the_text_alone(tok_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = make_documents(400, seed=5, longest=20)
    seen: list[list[str]] = []
    for size in (400, 7):
        encoder = make(tok_json, check_share=0.25)
        asked: list[str] = []
        encode = encoder._referee.encode

        def note(texts: Sequence[str], encode: Any = encode, asked: list[str] = asked) -> Any:
            asked.extend(texts)
            return encode(texts)

        monkeypatch.setattr(encoder._referee, "encode", note)
        for begin in range(0, len(texts), size):
            encoder.encode(texts[begin:begin + size])
        seen.append(asked)
    assert seen[0] == seen[1] and set(seen[0]) <= set(texts)
    assert 70 <= len(seen[0]) <= 130  # 100 of 400 expected; 3.5 standard deviations


def test_failure_of_the_fast_library_leaves_the_batch_to_tokenizers(tok_json: str, monkeypatch: pytest.MonkeyPatch,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    class PanicException(BaseException):
        """What a panic of a Rust library arrives as."""

    def panic(texts: Sequence[str]) -> Any:
        raise PanicException("index out of bounds")

    encoder = make(tok_json)
    monkeypatch.setattr(encoder, "_fast", panic)
    with caplog.at_level(logging.WARNING):
        assert as_lists(encoder.encode(["kalo", "miter"])) == reference(tok_json, ["kalo", "miter"])
    assert "PanicException: index out of bounds" in caplog.text


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
def test_lone_surrogates_are_refused(tok_json: str, engine: str, short_stretches: None) -> None:
    encoder = make(tok_json, engine=engine)
    with pytest.raises(ValueError, match=r"lone surrogates at character 4, 'kalo\\ud800 miter'.*Repair or drop"):
        encoder.encode(["a", "kalo\ud800 miter"])
    with pytest.raises(ValueError, match=r"lone surrogates at character \d+, '.*ka\\udfff lo.*Repair or drop"):
        encoder.encode(["miter " * 51 + "ka\udfff lo"])


@pytest.mark.parametrize("engine", ["fast", "tokenizers"])
def test_text_in_pieces_gives_the_tokens_of_the_whole(tok_json: str, short_stretches: None, engine: str) -> None:
    encoder = make(tok_json, engine=engine)
    prose = "\n".join(make_documents(40, seed=9))
    texts = [prose, "".join(odd_texts(300, seed=4)), prose.replace("\n", " "), "\r\n".join(make_documents(9, seed=3)),
             "\u4f60\u597d\u3002" * 2000, "a\n" * 1500 + "\u0301" + "\nb" * 800, "", "kalo"]
    for text in texts:
        expected = reference(tok_json, [text])[0]
        lengths = set()
        for size in (1, 97, 1000, 10**9):
            parts = list(encoder.encode_pieces(text[i:i + size] for i in range(0, len(text), size)))
            assert np.concatenate([np.zeros(0, np.uint16), *parts]).tolist() == expected
            lengths.add(tuple(map(len, parts)))
        assert len(lengths) == 1  # cut at the same places however it came
        assert len(text) < 1000 or len(parts) >= 3
    assert as_lists(encoder.encode(texts)) == reference(tok_json, texts)


def test_text_without_any_safe_place_is_cut_all_the_same(tok_json: str, short_stretches: None) -> None:
    encoder = make(tok_json)
    text = "kalo1" * 2000
    parts = list(encoder.encode_pieces(text[i:i + 700] for i in range(0, len(text), 700)))
    assert [Tokenizer.from_str(tok_json).decode(part.tolist()) for part in parts] == \
        [text[i:i + 3000] for i in range(0, len(text), 3000)]
    assert np.concatenate(parts).tolist() == encoder.encode([text])[0].tolist()


def test_tokenizer_that_cannot_be_given_parts_gets_the_text_whole(tok_json: str, short_stretches: None,
                                                                  caplog: pytest.LogCaptureFixture) -> None:
    """One that puts a space before all it is given: every part would begin with a space of its own."""
    prefixed: Any = Tokenizer.from_str(tok_json)
    prefixed.normalizer = normalizers.Prepend(" ")
    encoder = make(prefixed.to_str(), name="prefixed")
    text = "\n".join(make_documents(20, seed=9))
    parts = list(encoder.encode_pieces(text[i:i + 100] for i in range(0, len(text), 100)))
    assert len(parts) == 1 and parts[0].tolist() == reference(prefixed.to_str(), [text])[0]
    assert "tokenizer prefixed: it cannot be given a text in stretches" in caplog.text


@pytest.mark.parametrize("added", [dict(content="kalo\nmiter"), dict(content="volq", lstrip=True), dict(content="ka mi")],
                         ids=["over-a-line-end", "swallowing-it", "over-a-space"])
def test_added_tokens_are_not_cut_in_two(tok_json: str, short_stretches: None, added: dict[str, Any]) -> None:
    content = json.loads(tok_json)
    token = {**content["added_tokens"][0], "id": 512, "special": False, **added}
    changed = json.dumps({**content, "added_tokens": [*content["added_tokens"], token]})
    assert 512 in reference(changed, ["ka\nvolq kalo\nmiter ka mi"])[0]
    for text in ("kalo\nmiter\nge quo\n" * 300, "ka\nvolq ka volq ka mi\nter\n" * 300):
        expected = reference(changed, [text])[0]
        parts = list(make(changed).encode_pieces([text]))
        assert len(parts) > 1 and np.concatenate(parts).tolist() == expected


def test_a_place_where_the_tokens_differ_is_passed_over(tok_json: str, short_stretches: None,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is wrong for this tokenizer, as if the trial at the start had not seen it: each cut is tried."""
    encoder = make(tok_json)
    monkeypatch.setattr(encoder._cuts, "_pattern", re.compile(r"(?<=t)(?=e)|(?<=\S\n)(?=\w)"))
    text = "kalo miter\n" * 600
    parts = list(encoder.encode_pieces([text]))
    assert len(parts) > 10 and np.concatenate(parts).tolist() == reference(tok_json, [text])[0]


def test_long_document_needs_little_memory(tok_json: str, tmp_path: Path) -> None:
    """100 MB in pieces, in a process of its own: its peak is held to 200 MB above what it began with."""
    (tmp_path / "tokenizer.json").write_text(tok_json, encoding="utf-8")
    program = """
import resource, sys
from ettin_foundry.corpus.encoder import TextEncoder
encoder = TextEncoder(open(sys.argv[1], encoding="utf-8").read(), forbidden=(), vocab_size=512, check_share=0)
piece = "\\n".join("kalo miter %d vol" % (i * 7919) for i in range(200_000))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = sum(len(tokens) for tokens in encoder.encode_pieces(piece for _ in range(100_000_000 // len(piece))))
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    size, grown = map(int, run(program, str(tmp_path / "tokenizer.json")).split())
    assert size > 20_000_000 and grown < 200


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
    assert run(program, str(tmp_path / "tokenizer.json")).strip() == "0"


def run(program: str, *arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.endswith(("_THREADS", "PARALLELISM"))}
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pickled_copy_encodes_alike(encoder: TextEncoder) -> None:
    copy = pickle.loads(pickle.dumps(encoder))
    texts = list(odd_texts(100, seed=6))
    assert copy.engine == encoder.engine and as_lists(copy.encode(texts)) == as_lists(encoder.encode(texts))


@pytest.mark.parametrize("options,message", [
    (dict(engine="rust"), "engine: 'rust' given; 'auto', 'fast' or 'tokenizers'"),
    (dict(check_share=1.5), "check_share: 1.5 given; a share of the texts, 0 to 1"),
    (dict(vocab_size=70_000), "tokenizer t: 70000 entries; 1 to 65535"),
    (dict(vocab_size=510), r"tokenizer t: special ids \[510, 511\] of 510 entries"),
], ids=["engine", "share", "vocabulary", "special"])
def test_arguments_out_of_range_are_refused(tok_json: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tok_json, name="t", **options)


def test_unreadable_tokenizer_json_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer t: its tokenizer.json cannot be read .* Save it again"):
        TextEncoder("{", forbidden=(), vocab_size=9, name="t")


def test_id_out_of_the_vocabulary_is_refused(tok_json: str) -> None:
    ids = reference(tok_json, ["kalo miter"])[0]
    with pytest.raises(ValueError, match="special token"):
        make(tok_json, forbidden=(), vocab_size=max(ids)).encode(["kalo miter"])
