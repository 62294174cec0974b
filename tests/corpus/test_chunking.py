"""Claims of chunking.py, against the same rule written on text: every place is tried, as a reader would."""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import make_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ettin_foundry.corpus.chunking import Chunker, token_bytes
from ettin_foundry.corpus.convert import ConvertOptions
from ettin_foundry.data.packing import pack_lengths, piece_counts

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
MIXED = (
    "He said: \"Stop! Now.\" (Really?) Then J. Smith left at 3.14 p.m. in the U.S.\n\n1. Item one.\n2. Item two\n"
    "    def f(x):\n        return x  # why?\n\n\nAb\u4ed6\u8bf4\uff1a\u300c\u4f60\u597d\u3002\u300d\u7136\u540e\u8d70"
    "\u3002\u771f\u7684\uff1f\u662f\u3002\n\u0915\u0941\u091b \u0932\u094b\u0917\u0964 \u0914\u0930\u0964\n\r\n\r\n"
    "\u00abBonjour.\u00bb Et \u201eHallo.\u201c Ja\u2026 so \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600!"
    " https://example.org/a.b?c=d\t\ttabs   \n   \n  end.  Two  spaces...\u3000\u6c49\u5b57\u00a0x\u2029y\u2028z\n")
CJK_TERMINATORS = tuple("\u3002\uff61\uff01\uff1f")
TERMINATORS = (*".!?\u2026\u037e\u061f\u06d4\u0964\u0965\u0589\u1362\u17d4\u104b\u0f0d", *CJK_TERMINATORS)
SPECIAL = ".!?\u2026\u3002\uff1f\u0964\"'\u300d)\u00bb\u201c \t\n\n\r\u00a0\u3000"


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def trained():
    """Byte-level BPE of 700 entries on prose, code and four scripts, with added tokens for runs of spaces."""
    tokenizer = byte_level({}, [])
    tokenizer.train_from_iterator([MIXED * 3, *make_documents(40)], trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=ALPHABET, show_progress=False))
    tokenizer.add_tokens(["   ", "    "])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint16)


def is_closer(character: str) -> bool:
    return character in "\"'" or unicodedata.category(character) in ("Pe", "Pf", "Pi")


def ends_sentence(text: str) -> str:
    """"" or the terminator with which `text` ends; closing quotes and brackets may follow it."""
    while text and is_closer(text[-1]):
        text = text[:-1]
    if text[-1:] not in TERMINATORS:
        return ""
    return "" if text[-1] == "." and (text[-2:-1].isupper() or text[-2:-1].isdigit()) else text[-1]


def rank(before: str, after: str, inside: bool) -> int:
    """A place between two texts: 5 paragraph end, 4 sentence end, 3 line end, 2 before a space, 1 other, 0 none."""
    if inside:
        return 0
    lines = before.translate({0x2028: "\n", 0x2029: "\n"}).split("\n")
    if len(lines) > 2 and lines[-1] == "" and not lines[-2].strip():
        return 5
    if len(lines) > 1 and lines[-1] == "":
        return 4 if ends_sentence(lines[-2].rstrip()) else 3
    line = lines[-1]
    if line.strip() and line != line.rstrip() and ends_sentence(line.rstrip()):
        return 4
    terminator, following = ends_sentence(line), after[:1]
    if terminator and following.isspace():
        return 4
    if terminator in CJK_TERMINATORS and following not in TERMINATORS and not is_closer(following):
        return 4
    return 2 if following.isspace() else 1


def cuts_by_reading(pieces: list[bytes], limit: int, percent: int) -> list[int]:
    """The rule of the module's docstring, every place of the window ranked on its own, on text."""
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    inside = [0x80 <= piece[0] < 0xC0 for piece in pieces]
    ends, begin = [], 0
    while len(pieces) - begin > limit:
        left, window = len(pieces) - begin, limit * percent // 100
        high = begin + (limit if 100 * left >= (100 + percent) * limit else left // 2 + window // 2)
        low = high - window
        context = max(0, low - 1 - 16)  # what is further back is taken for a word
        places = [(rank("x" + "".join(texts[context:place]), texts[place], inside[place]), place)
                  for place in range(low, high + 1)]
        best, place = max(places)
        if not best:
            place = max((place for place in range(begin + 1, low) if not inside[place]), default=high)
        ends.append(place)
        begin = place
    return [*ends, len(pieces)]


def check_same(tokenizer: Tokenizer, tokens: np.ndarray, limit: int, percent: int) -> int:
    """Holds the cuts to the rule, and those of a text to what it promises: whole characters, no scraps."""
    pieces = token_bytes(tokenizer.to_str())
    ends = Chunker(tokenizer.to_str(), limit, percent / 100).cuts(tokens)
    assert ends == cuts_by_reading([pieces[token] for token in tokens.tolist()], limit, percent)
    sizes = np.diff([0, *ends])
    assert sizes.min() >= 1 and sizes.max() <= limit and sizes.sum() == len(tokens)
    if len(ends) > 1:
        assert 100 * sizes.min() >= percent * limit
        for chunk in np.split(tokens, ends[:-1]):
            b"".join(pieces[token] for token in chunk.tolist()).decode()
    return len(ends)


@pytest.mark.parametrize("limit, percent", [(10, 10), (37, 10), (62, 10), (200, 10), (510, 10), (7, 0), (333, 0)])
def test_cuts_are_those_of_the_rule_read_on_text(trained, limit, percent):
    rng = np.random.default_rng(limit)
    prose, ends = [*MIXED.split(" "), *make_documents(6, seed=limit)], [" ", " ", " ", ". ", "\n", "\n\n", "\u3002"]
    texts = ["".join(rng.choice(prose) + rng.choice(ends) for _ in range(900))]
    for share in (0.0, 0.1, 0.5):  # nearly nothing but punctuation and spaces
        texts.append("".join(rng.choice(list("aB3\u6c49" if rng.random() < share else SPECIAL)) for _ in range(2500)))
    assert all(check_same(trained, encode(trained, text), limit, percent) > 1 for text in texts)


def test_cuts_are_those_of_the_rule_with_the_real_vocabulary(ettin_tokenizer_dir):
    tokenizer = Tokenizer.from_file(str(ettin_tokenizer_dir / "tokenizer.json"))
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    for limit, percent in ((24, 10), (510, 10), (1022, 10), (1022, 1)):
        assert check_same(tokenizer, encode(tokenizer, code[:60_000] + MIXED * 20), limit, percent) > 10


@pytest.mark.parametrize(("length", "goal"), [(1024, 0.995), (8192, 0.99)])
def test_packed_rows_of_long_documents_are_full_with_the_default_window(length, goal):
    """The standard library with a token a byte: most files are longer than a row, so few fill the gaps."""
    tokenizer = byte_level({token: number for number, token in enumerate(ALPHABET)}, []).to_str()
    ids, chunker = np.argsort(token_bytes(tokenizer)), Chunker(tokenizer, length - 2, ConvertOptions.cut_window)
    paths = [path for path in Path(argparse.__file__).parent.glob("*/*.py") if path.parent.name != "site-packages"]
    ends = [chunker.cuts(ids[np.frombuffer(path.read_bytes(), np.uint8)]) for path in paths if path.stat().st_size]
    counts = piece_counts(np.bincount(np.concatenate([np.diff([0, *each]) for each in ends])))
    assert counts @ np.arange(len(counts)) / (pack_lengths(counts, length).num_rows * length) >= goal


def test_characters_are_whole_also_where_tokens_straddle_them():
    """A vocabulary whose tokens end one character and begin the next: the whole tenth may lie inside characters."""
    tokens = ["a", "\u00e3", "\u0123", "\u0124", "\u0124\u00e3\u0123"]  # a, bytes e3 81 82, and 82 e3 81
    tokenizer = byte_level({token: number for number, token in enumerate(tokens)}, []).to_str()
    chunker = Chunker(tokenizer, 50, 0.1)
    kana = np.array([0] * 20 + [1, 2] + [4] * 39 + [3] + [0] * 60, np.uint16)  # a * 20, 40 kana, a * 60
    assert b"".join(np.array(token_bytes(tokenizer), object)[kana]).decode() == "a" * 20 + "\u3042" * 40 + "a" * 60
    assert chunker.cuts(kana) == [20, 70, 98, 122]  # back to the last place between characters
    assert chunker.cuts(np.full(120, 4, np.uint16)) == [50, 100, 120]  # no such place at all


def test_bytes_of_byte_level_tokens(trained):
    """Added tokens stand in the text as they are, though their characters may mean bytes elsewhere."""
    trained.add_tokens(["\u0120\u00e9"])
    pieces = token_bytes(trained.to_str())
    assert len(pieces) == trained.get_vocab_size()
    for text in [*make_documents(10), MIXED, "".join(map(chr, range(1, 0x2000))), "a   b    c \u0120\u00e9 \u00e9"]:
        assert b"".join(pieces[token] for token in encode(trained, text)).decode() == text


def test_bytes_of_word_pieces_and_their_sentences():
    words = ["[UNK]", "the", "cat", "sat", "##s", ".", "3", "14", "!", "\"", "na", "##ive"]
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = token_bytes(tokenizer.to_str())
    assert [pieces[words.index(word)] for word in ("the", "##s", ".", "14")] == [b" the", b"s", b".", b" 14"]
    for text, place in ("sat. " + "the cats " * 20, 38), ("3.14 " + "naive " * 20, 39):  # not "3." or "na|ive"
        assert Chunker(tokenizer.to_str(), 40, 0.1).cuts(encode(tokenizer, "the cats " * 12 + text))[0] == place
    ends_marked = models.BPE(vocab={"a": 0, "a</w>": 1, ".</w>": 2}, merges=[], end_of_word_suffix="</w>")
    assert token_bytes(Tokenizer(ends_marked).to_str()) == [b"a", b"a ", b". "]


def test_bytes_of_unigram_pieces_with_byte_fallback():
    vocab = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256)), ("\u2581the", -1.0),
             ("\u2581", -2.0), (".", -2.0), ("a", -3.0), ("<0xZZ>", -3.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = token_bytes(tokenizer.to_str())
    assert pieces[1:] == [*(bytes([byte]) for byte in range(256)), b" the", b" ", b".", b"a", b"<0xZZ>"]
    ends = Chunker(tokenizer.to_str(), 10, 0.1).cuts(encode(tokenizer, "\u6c49" * 20))
    assert [end % 3 for end in ends[:-1]] == [1] * (len(ends) - 1)  # the leading word mark, then 3 bytes a character
