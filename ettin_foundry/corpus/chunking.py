"""Where a document's tokens are cut into chunks: at a paragraph or sentence end near the limit, outside of characters.

A document of at most `chunk_length` tokens is one chunk. A longer one is cut from its beginning (window: a hundredth):

1. While at least 1.01 chunks remain, the next chunk ends at the best place of the last hundredth of `chunk_length`: the
   latest paragraph end, else sentence end, else line end, else place before a space, else place between characters.
2. When more than one but less than 1.01 chunks remain, they become two chunks of similar size, cut at the best place of
   the hundredth around their middle. So every chunk of a longer document holds at least a hundredth of `chunk_length`.
3. Where the whole window lies inside characters (a token may end one and begin the next), the latest place before it
   that lies between two characters is taken; where the chunk has none, the cut is made all the same.

Paragraph end: after a blank line. Sentence end: after a terminator and its closing quotes or brackets, if a space
follows (none need follow a Chinese or Japanese one), or after that space. A full stop after a digit or a capital
ends no sentence ("J. Smith"). The rule is tables with one entry per id, and a state machine over tokens.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson

_NUM_IDS = 1 << 16  # tokens are uint16: with a table entry for each, no id can be outside

# Kinds of characters.
_OTHER, _CAPITAL, _STOP, _TERMINATOR, _CJK_TERMINATOR, _CLOSER, _BLANK, _NEWLINE = range(8)
_KINDS = {
    ".": _STOP, **dict.fromkeys("\n\u2028\u2029", _NEWLINE),
    **dict.fromkeys("\u3002\uff61\uff01\uff1f", _CJK_TERMINATOR),
    # ! ? ellipsis, Greek and Arabic question marks, Urdu, Devanagari (2), Armenian, Ethiopic, Khmer, Burmese, Tibetan
    **dict.fromkeys("!?\u2026\u037e\u061f\u06d4\u0964\u0965\u0589\u1362\u17d4\u104b\u0f0d", _TERMINATOR)}

# States of the machine: what the text before a place ends with.
(_WORD,  # anything else
 _INITIAL,  # a capital or a digit
 _ENDED,  # a terminator and its closers
 _CJK_ENDED,  # the same, Chinese or Japanese
 _SPACED,  # a sentence end, then blanks
 _LINE,  # a newline
 _ENDED_LINE,  # a sentence end, blanks, a newline
 _INDENT,  # a newline, then blanks
 _PARAGRAPH) = range(9)  # a blank line
_NUM_STATES = 9
_STEPS: dict[int, Sequence[int]] = {  # kind of the next character -> state after it, per state before it
    _OTHER: [_WORD] * 9,
    _CAPITAL: [_INITIAL] * 9,
    _STOP: [_ENDED, _WORD] + [_ENDED] * 7,
    _TERMINATOR: [_ENDED] * 9,
    _CJK_TERMINATOR: [_CJK_ENDED] * 9,
    _CLOSER: [_WORD, _WORD, _ENDED, _CJK_ENDED] + [_WORD] * 5,
    _BLANK: [_WORD, _WORD, _SPACED, _SPACED, _SPACED, _INDENT, _INDENT, _INDENT, _INDENT],
    _NEWLINE: [_LINE, _LINE, _ENDED_LINE, _ENDED_LINE, _ENDED_LINE] + [_PARAGRAPH] * 4,
}

# How a token begins, as far as the place before it is concerned.
_BEGINS_WORD, _BEGINS_SPACE, _BEGINS_CLOSER, _BEGINS_INSIDE = range(4)
_BEGINS = {_BLANK: _BEGINS_SPACE, _NEWLINE: _BEGINS_SPACE,
           **dict.fromkeys((_STOP, _TERMINATOR, _CJK_TERMINATOR, _CLOSER), _BEGINS_CLOSER)}

# Ranks of a place, worst first, by the state before it and by how the token after it begins.
_INSIDE, _BETWEEN, _BEFORE_SPACE, _LINE_END, _SENTENCE_END, _PARAGRAPH_END = range(6)
_RANKS = np.full((_NUM_STATES, 4), _BETWEEN, np.uint8)
_RANKS[:, _BEGINS_SPACE] = _BEFORE_SPACE
_RANKS[_LINE] = _LINE_END
_RANKS[_ENDED, _BEGINS_SPACE] = _SENTENCE_END
_RANKS[_CJK_ENDED, [_BEGINS_WORD, _BEGINS_SPACE]] = _SENTENCE_END
_RANKS[[_SPACED, _ENDED_LINE]] = _SENTENCE_END
_RANKS[_PARAGRAPH] = _PARAGRAPH_END
_RANKS[:, _BEGINS_INSIDE] = _INSIDE

_CONTEXT = 16  # tokens before the window that the machine runs over first, to know the state at its beginning


@functools.cache
def _kind(character: str) -> int:
    if character in _KINDS:
        return _KINDS[character]
    if character.isspace():
        return _BLANK
    if character in "\"'" or unicodedata.category(character) in ("Pe", "Pf", "Pi"):
        return _CLOSER  # Pi too: German closes with what English opens
    return _CAPITAL if character.isupper() or character.isdigit() else _OTHER


@functools.cache
def _steps(text: str) -> tuple[int, ...]:
    """State after `text`, per state before it."""
    states = tuple(range(_NUM_STATES))
    for character in text:
        states = tuple(_STEPS[_kind(character)][state] for state in states)
    return states


class Chunker:
    """Cuts documents of one tokenizer into chunks, as the module says.

    Args:
        tokenizer_json: content of tokenizer.json. chunk_length: most tokens in a chunk, 1 to 65,535.
        window: share of `chunk_length`, 0 to 0.5, in which the best place is looked for. With 0 a chunk is as long as
            characters allow, and what remains at the end may be short.
    """

    def __init__(self, tokenizer_json: str, chunk_length: int, window: float) -> None:
        self.chunk_length, self.window = chunk_length, window
        self._places = int(chunk_length * window + 1e-9)
        self._after, self._begins, self._rows = _tables(token_bytes(tokenizer_json))

    def cuts(self, tokens: np.ndarray) -> list[int]:
        """Ends of the chunks of a document's (L,) tokens: chunk k is tokens[ends[k - 1]:ends[k]]."""
        limit, places = self.chunk_length, self._places
        ends = [0]
        while (left := len(tokens) - ends[-1]) > limit:
            high = limit if left >= limit * (1 + self.window) - 1e-6 else left // 2 + places // 2
            ends.append(self._best(tokens, ends[-1], ends[-1] + high - places, ends[-1] + high))
        return [*ends[1:], len(tokens)]

    def _best(self, tokens: np.ndarray, begin: int, low: int, high: int) -> int:
        """The best place in [low, high] to end the chunk from `begin` on; begin < low, high < len(tokens)."""
        first = max(0, low - 1 - _CONTEXT)
        window = tokens[first:high + 1]  # one more than the places: what follows a place counts too
        after = self._after.take(window)
        states = bytearray(after)
        for at in (after >= _NUM_STATES).nonzero()[0].tolist():
            states[at] = self._rows[states[at]][states[at - 1] if at else _WORD]
        before = np.frombuffer(states, np.uint8)[low - 1 - first:-1]
        ranks = _RANKS.take(4 * before + self._begins.take(window[low - first:])).tobytes()
        for rank in (_PARAGRAPH_END, _SENTENCE_END, _LINE_END, _BEFORE_SPACE, _BETWEEN):
            if (at := ranks.rfind(rank)) >= 0:
                return low + at
        between = np.flatnonzero(self._begins[tokens[begin + 1:low]] != _BEGINS_INSIDE)
        return begin + 1 + int(between[-1]) if len(between) else high


def _tables(pieces: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, ...]]]:
    """(65536,) uint8 state after each token; (65536,) uint8 how it begins; rows of states.

    The state after a token of nothing but punctuation and spaces may depend on the one before it: then the first table
    holds 9 + the number of a row of states after, one for each before. There are fewer than 247 such rows.
    """
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    passing = "".join(c for c in set("".join(texts)) if _kind(c) not in (_OTHER, _CAPITAL))
    rows: dict[tuple[int, ...], int] = {}
    after, begins = np.full(_NUM_IDS, _WORD, np.uint8), np.full(_NUM_IDS, _BEGINS_WORD, np.uint8)
    for token, (piece, text) in enumerate(zip(pieces, texts)):
        if not piece:
            continue
        word = text.rstrip(passing)
        steps = _steps(text[len(word):])
        if word:
            after[token] = steps[_INITIAL if _kind(word[-1]) == _CAPITAL else _WORD]
        else:
            after[token] = steps[0] if len({*steps}) == 1 else _NUM_STATES + rows.setdefault(steps, len(rows))
        begins[token] = _BEGINS_INSIDE if 0x80 <= piece[0] < 0xC0 else _BEGINS.get(_kind(text[0]), _BEGINS_WORD)
    return after, begins, [()] * _NUM_STATES + list(rows)


def token_bytes(tokenizer_json: str) -> list[bytes]:
    """The bytes that each id stands for, b"" for ids that are not given.

    Byte-level vocabularies exactly. Others as their decoders read them: a word mark U+2581 is a space, <0x0A> a byte;
    where pieces inside a word are marked (WordPiece), or none are (WordLevel), a piece that begins a word has a space
    before it. Added tokens are found in a text as they are.
    """
    content = orjson.loads(tokenizer_json)
    vocab = content["model"]["vocab"]
    ids = vocab if isinstance(vocab, dict) else {entry[0]: number for number, entry in enumerate(vocab)}
    pieces = dict(zip(ids.values(), _model_bytes(content, list(ids))))
    pieces |= {entry["id"]: entry["content"].encode() for entry in content.get("added_tokens") or []}
    return [pieces.get(number, b"") for number in range(1 + max(pieces, default=0))]


def _model_bytes(content: dict[str, Any], tokens: Sequence[str]) -> Iterator[bytes]:
    """The bytes of each of the model's own tokens, in order."""
    if b'"ByteLevel"' in orjson.dumps([content.get("pre_tokenizer"), content.get("decoder")]):
        # GPT-2's alphabet: printable Latin-1 is itself, the other bytes are characters from U+0100 on, in order
        itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        moved = [byte for byte in range(256) if byte not in itself]
        alphabet = {0x100 + number: byte for number, byte in enumerate(moved)}
        yield from (token.translate(alphabet).encode("latin-1", "replace") for token in tokens)
        return
    model = content["model"]
    inside, end_of_word = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    spaced = bool(inside) or model.get("type") == "WordLevel"
    for token in tokens:
        if model.get("byte_fallback") and (match := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            yield bytes([int(match[1], 16)])
            continue
        text = token.replace("\u2581", " ")
        if end_of_word and text.endswith(end_of_word):
            text = text.removesuffix(end_of_word) + " "
        if inside and text.startswith(inside):
            text = text.removeprefix(inside)
        elif spaced and text[:1].isalnum():  # punctuation is a word of its own there, with a space or without
            text = " " + text
        yield text.encode()
