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
ends no sentence ("J. Smith"). The rules are regular expressions, which read backwards from a place.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson

# ! ? ellipsis, Greek and Arabic question marks, Urdu, Devanagari (2), Armenian, Ethiopic, Khmer, Burmese, Tibetan
_TERMINATORS = "!?\u2026\u037e\u061f\u06d4\u0964\u0965\u0589\u1362\u17d4\u104b\u0f0d"
_CJK_TERMINATORS = "\u3002\uff61\uff01\uff1f"
_CONTEXT = 16  # tokens before the window that are read with it

# Kinds of places, best first, by the text before a place, reversed, and by the character after it, which stands in
# front of a match; in the letters of `_kind`. A match takes one letter at most, so that one is found at every place.
_RULES = [re.compile(rule) for rule in (
    "N(?=S*N)",  # paragraph end
    r"(?=(?:NS*|S+|(?<=[SN]))C*(?:[TJ]|\.(?!A))|(?<![.TJC])C*J)",  # sentence end
    "N",  # line end
    "(?<=[SN])",  # before a space
    "")]  # between characters


@functools.cache
def _kind(character: str) -> str:
    """A letter: Newline, Space, Terminator, J for a Chinese or Japanese one, Closer, A for capitals and digits."""
    if character.isspace():
        return "N" if character in "\n\u2028\u2029" else "S"
    if character in _TERMINATORS or character in _CJK_TERMINATORS:
        return "T" if character in _TERMINATORS else "J"
    if character in "\"'" or unicodedata.category(character) in ("Pe", "Pf", "Pi"):
        return "C"  # Pi too: German closes with what English opens
    if character.isupper() or character.isdigit():
        return "A"
    # a byte inside a character, as "surrogateescape" decodes it
    return "." if character == "." else "-" if "\udc80" <= character < "\udcc0" else "x"


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
        texts = (piece.decode("utf-8", "surrogateescape") for piece in token_bytes(tokenizer_json))
        # of each id, reversed; a run of spaces is as good as one, and is passed faster
        self._kinds = [re.sub("S+", "S", "".join(map(_kind, reversed(text or "x")))) for text in texts]

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
        kinds = [self._kinds[token] for token in tokens[max(0, low - 1 - _CONTEXT):high + 1][::-1].tolist()]
        text = "".join(kinds)
        ends = list(itertools.accumulate(map(len, kinds[:high - low + 1])))  # where high, high - 1, ... are in the text
        for rule in _RULES:
            for start in map(re.Match.start, rule.finditer(text)):
                at = bisect.bisect_left(ends, start)
                if start in ends[at:at + 1] and text[start - 1] != "-":
                    return high - at
        return next((place for place in range(low - 1, begin, -1) if self._kinds[tokens[place]][-1] != "-"), high)


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
