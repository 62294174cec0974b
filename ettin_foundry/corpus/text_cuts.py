"""Where a long text can be cut so that its parts, encoded alone, give the tokens of the whole.

A tokenizer is a black box here. Three rules name places that no token of a usual vocabulary reaches across; which of them
hold is tried once for each tokenizer, and every single cut is tried again on the text around it before it is made. A
tokenizer for which no rule holds (one that puts a space before whatever it is given, for instance) gets texts whole.

Also here: the fragments of text that tokenizer libraries were seen to disagree on. text_encoder.py compares libraries on
them, and the rules are tried on them.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

__all__ = ["FRAGMENTS", "Flat", "LONGEST_STRETCH", "STRETCH", "SafeCuts"]

log = logging.getLogger(__name__)

Flat = tuple[np.ndarray, np.ndarray]
"""What encoding texts gives: ids (N,) of all of them, one after another, and lengths (texts,) int64."""

STRETCH = 1 << 20
"""Characters after which a text is cut at the next safe place."""
LONGEST_STRETCH = 1 << 22
"""Characters after which it is cut all the same: no prose, code or table goes on for so long without a safe place."""

_CONTEXT = 256  # characters on each side of a cut that it is tried on; less than STRETCH
_LOOK_AHEAD = 2  # characters after a cut that a rule looks at

# rule, end of a left part, begin of a right part, a character after it. Most usual first
_RULES = (
    (r"(?<=\S\n)(?=\w)", "\n", "", "b"),  # between two lines, when neither has white space there
    (r"(?<=[A-Za-z])(?= [A-Za-z])", "a", " ", "b"),  # between words: byte-level vocabularies keep a space with the second
    (r"(?<=[\u3002\uff01\uff1f])(?=[\u3040-\u30ff\u3400-\u9fff])", "\u3002", "", "\u4e00"),  # sentences, Chinese or Japanese
)

FRAGMENTS = (
    " ", "  ", "\t", "\n", "\r\n", "\n\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u200b",
    "\ufeff", "\0", "\x7f", " " * 7, " " * 24, " " * 31, "a", "b", "Word", "WORD", " the", " of", "ing", "12", "1234567890",
    "3.14", "0x1F", "'s", "'LL", "'\u017f", "\u2019s", "don't", "'", "...", "!!", "--", "({", "})", "://", "@", "#", "\\n",
    "\"", "_", "$x^{2}$", "e\u0301", "\xe9", "\u0301", "A\u030a", "\u212b", "\u1e9b\u0323", "q\u0307\u0323", "\u0344",
    "\u0958", "\u1100\u1161\u11a8", "\uac00\u11a8", "\u2126", "\ufb01", "\U0002f800", "\u0300" * 9, "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f1e9\U0001f1ea", "\ud7ff",
    "\ue000", "\ufffd", "\uffff", "\U00010000", "\U0010ffff", "\u4f60\u597d", "\u3002", "\u65e5\u672c\u8a9e\u30c6",
    "\ud55c\uad6d", "\u041f\u0440\u0438", "\u0645\u0631\u062d", "\u0939\u093f\u0928\u094d", "\u05e9\u05c1", "\u0e20\u0e32",
    "\u0e33", "\u10e5", "\u1f00\u0345", "\u0130", "\xdf", "\u01c5", "\u02b0", "\xaa", "\u2160", "\xb2", "\u0663", "\u0967",
    "\u2460", "\U0001d7ce", "\U0001d400", "\xbd", "\u203f", "[MASK]", " [MASK]", "[CLS]", "[SEP", "<|endoftext|>", "<|endof")
"""Parts of text on which tokenizer libraries differ: white space of all kinds, what normalization composes and orders,
scripts, digits that are not ASCII, contractions, code points beside the surrogates, and special tokens written out."""


class SafeCuts:
    """Divides texts of any length into stretches for one tokenizer.

    Args:
        encode: texts to ids, without any special token.
        added_tokens: what the tokenizer looks for in a text before all else.
        name: of the tokenizer, for messages.

    Attributes:
        rules: patterns that hold for this tokenizer; empty when it must be given texts whole.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Flat], added_tokens: Sequence[str], *, name: str) -> None:
        self._encode = encode
        self._name = name
        self.rules = tuple(rule[0] for rule in _RULES if self._holds(*rule, added_tokens))
        self._pattern = re.compile("|".join(self.rules))

    def stretches(self, pieces: Iterable[str]) -> Iterator[str]:
        """One text, given as consecutive strings of any sizes, in stretches of `STRETCH` to `LONGEST_STRETCH` characters.

        Where it is cut depends on the text alone, not on how it was divided before.
        """
        if not self.rules:
            whole = "".join(pieces)
            if len(whole) > LONGEST_STRETCH:
                log.warning("tokenizer %s: it cannot be given a text in stretches; %d characters are encoded at once",
                            self._name, len(whole))
            yield whole
            return
        buffer, begin, searched = "", 0, 0  # no safe cut from begin + STRETCH to searched
        for piece in itertools.chain(_merged(pieces), [None]):
            buffer, begin, searched = buffer[begin:] + (piece or ""), 0, searched - begin
            ahead = 0 if piece is None else _CONTEXT  # so that a cut is tried on the same text, however much has been read
            while len(buffer) - begin > STRETCH + ahead:
                last = min(begin + LONGEST_STRETCH, len(buffer) - ahead)
                cut = self._next_cut(buffer, max(begin + STRETCH, searched), last)
                if cut is None and last < begin + LONGEST_STRETCH:
                    searched = last + 1
                    break
                yield buffer[begin:cut or last]
                begin = searched = cut or last
        if begin < len(buffer):
            yield buffer[begin:]

    def _next_cut(self, text: str, begin: int, last: int) -> int | None:
        """The first safe place from `begin` to `last`; None if there is none."""
        for match in self._pattern.finditer(text, begin, min(len(text), last + _LOOK_AHEAD)):
            cut = match.start()
            if cut > last:
                return None
            left, right = text[cut - _CONTEXT:cut], text[cut:cut + _CONTEXT]
            if self._agree([(left, right)]):
                return cut
        return None

    def _holds(self, rule: str, end: str, begin: str, first: str, added_tokens: Sequence[str]) -> bool:
        """Whether a rule holds for this tokenizer on parts made of `FRAGMENTS` and added tokens."""
        pattern, rng = re.compile(rule), random.Random(0)
        lefts = ["".join(rng.choices(FRAGMENTS, k=3)) for _ in range(40)] + ["a", ".", "(", "\u4e00", " 12", "x  y", "''"]
        rights = ["".join(rng.choices(FRAGMENTS, k=3)) for _ in range(20)] + ["b c", "7", "s", "\u3042", "\u00e9t\u00e9"]
        rights += [first + right for right in rights] + rng.sample(list(added_tokens), min(len(added_tokens), 20))
        pairs = [(left + end, begin + right) for left in lefts for right in rights]
        return self._agree([pair for pair in pairs if pattern.match("".join(pair), len(pair[0]))])

    def _agree(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether each pair gives the same ids as two texts and as one."""
        ids, lengths = self._encode([text for left, right in pairs for text in (left, right, left + right)])
        ends = np.cumsum(lengths)
        return all(np.array_equal(ids[ends[i] - lengths[i]:ends[i + 1]], ids[ends[i + 1]:ends[i + 2]])
                   for i in range(0, len(lengths), 3))


def _merged(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in strings of at least `STRETCH` characters, so that many small ones are not copied again and again."""
    parts: list[str] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size >= STRETCH:
            yield "".join(parts)
            parts, size = [], 0
    yield "".join(parts)
