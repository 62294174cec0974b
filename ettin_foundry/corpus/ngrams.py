"""Text to hashes of its 13-grams of words, by numpy, many times faster than a tokenizer reads.

A word is a run of letters and digits of the lower-cased text: `[^\\W_]+` of `text.lower()`, whatever stands between
words. Text becomes lower-cased UTF-8 in which every byte either belongs to a word or does not; a word's hash is made of
its bytes eight at a time, an n-gram's of its words' hashes. Many short texts are handled at once, a long one in blocks
that overlap. The one departure from the definition: a stretch of 256 Ki characters without a space or line end is cut
behind its last character that is in no word, and a longer word within.

What the hashes are compared with is decontamination.py's work.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

__all__ = ["NGRAM_WORDS", "WordBlock", "blocks_of_document", "blocks_of_texts", "hash_ngrams"]

NGRAM_WORDS = 13
_BLOCK = 1 << 18  # characters handled at a time: the arrays of a block stay in the processor's cache
_LONG_WORD = 64  # bytes; longer words are hashed one by one
_PADDING = bytes(8)  # after the text, so that eight bytes can be read from any place in it

_IS_WORD = bytes(byte >= 0x80 or chr(byte).isalnum() for byte in range(256))
_PARTING = re.compile(r"[\W_]")
_MASKS = np.array([(1 << 8 * number) - 1 for number in range(9)], dtype=np.uint64)
_ODD, _ODD2 = (np.array(number, dtype=np.uint64) for number in (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93))
_HALF = np.uint64(32)
_PARTS, _HAS_LOWER = 1, 2  # flags of a character: no letter or digit; changed by lower()


class WordBlock(NamedTuple):
    """The words of some text. W words, D documents."""

    data: bytearray
    """UTF-8, lower-cased, what is no word outside ASCII blanked, padded."""
    starts: np.ndarray
    """(W,) int64: byte at which each word begins."""
    ends: np.ndarray
    """(W,) int64: and ends."""
    hashes: np.ndarray
    """(W,) uint64."""
    document_numbers: np.ndarray
    """(D,) int64, in order."""
    document_ends: np.ndarray
    """(D,) int64: byte at which each ends."""

    def numbers(self, words: np.ndarray) -> np.ndarray:
        """The documents' numbers of words given by their position."""
        return self.document_numbers[np.searchsorted(self.document_ends, self.starts[words], side="right")]

    def words(self, begin: int, number: int = NGRAM_WORDS) -> list[str]:
        """Consecutive words from one on."""
        return [self.data[start:end].decode(errors="surrogatepass")
                for start, end in zip(self.starts[begin:begin + number], self.ends[begin:begin + number])]


def blocks_of_texts(texts: Iterable[tuple[int, str]]) -> Iterator[WordBlock]:
    """Short texts put together, long ones cut, in order; texts that cannot hold an n-gram are left out."""
    batch: list[tuple[int, str]] = []
    size = 0
    for number, text in texts:
        if len(text) < NGRAM_WORDS:  # a character is at most one word: lower() makes two of some
            continue
        if batch and size + len(text) > _BLOCK:
            yield _split(batch)
            batch, size = [], 0
        if len(text) > _BLOCK:
            yield from blocks_of_document(number, [text])
        else:
            batch.append((number, text))
            size += len(text)
    if batch:
        yield _split(batch)


def blocks_of_document(number: int, pieces: Iterable[str]) -> Iterator[WordBlock]:
    """One document as blocks; each begins with the last 12 words before it, so that every n-gram is in one block."""
    carried = ""
    for part in _cut(pieces):
        block = _split([(number, f"{carried} {part}")])
        yield block
        carried = " ".join(block.words(max(0, len(block.starts) - NGRAM_WORDS + 1)))


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces joined and parted anew, after a space or line end, into strings of about a block."""
    pending = ""
    for piece in pieces:
        for begin in range(0, len(piece), _BLOCK):
            pending += piece[begin:begin + _BLOCK]
            while len(pending) >= _BLOCK:
                end = max(pending.rfind(" "), pending.rfind("\n")) + 1
                if not end:
                    last = _PARTING.search(pending[::-1])
                    end = len(pending) - (last.start() if last else 0)
                yield pending[:end]
                pending = pending[end:]
    if pending:
        yield pending


def _split(texts: Sequence[tuple[int, str]]) -> WordBlock:
    """The words of (number, text) and their hashes."""
    encoded = [text.encode(errors="surrogatepass") for _, text in texts]
    if not all(map(bytes.isascii, encoded)) and _changes_in_lower_case(b"".join(encoded)):
        encoded = [text.lower().encode(errors="surrogatepass") for _, text in texts]
    data = bytearray(b"\n".join([*encoded, _PADDING])).lower()  # changes ASCII only
    _blank(data)
    is_word = np.frombuffer(b"\0" + data.translate(_IS_WORD), np.bool_)
    edges = np.flatnonzero(is_word[1:] ^ is_word[:-1])
    starts, ends = edges[::2].copy(), edges[1::2].copy()
    return WordBlock(data, starts, ends, _hash_words(data, starts, ends), np.array([number for number, _ in texts]),
                  np.cumsum([len(text) + 1 for text in encoded]))


@functools.cache
def _character_flags() -> np.ndarray:
    """(0x110000,) uint8 per Unicode character; made on first use, some 0.2 s."""
    characters = map(chr, range(0x110000))
    return np.fromiter((_PARTS * (not c.isalnum()) | _HAS_LOWER * (c.lower() != c) for c in characters), np.uint8, 0x110000)


def _beyond_ascii(data: bytes | bytearray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where in UTF-8 text the characters outside ASCII begin, their bytes, their flags; (K,) each."""
    raw = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(raw >= 0xC0)
    first = raw[at].astype(np.uint32)
    second, third, fourth = (np.take(raw, at + ahead, mode="clip") & np.uint32(0x3F) for ahead in (1, 2, 3))
    two, three = (first & 0x1F) << 6 | second, (first & 0xF) << 12 | second << 6 | third
    four = (first & 7) << 18 | second << 12 | third << 6 | fourth
    sizes = 2 + (first >= 0xE0) + (first >= 0xF0).astype(np.int64)
    return at, sizes, _character_flags()[np.select([sizes == 2, sizes == 3], [two, three], four)]


def _changes_in_lower_case(data: bytes) -> bool:
    return bool((_beyond_ascii(data)[2] & _HAS_LOWER).any())


def _blank(data: bytearray) -> None:
    """Puts spaces in the place of characters outside ASCII that are no letters or digits."""
    if data.isascii():
        return
    at, sizes, flags = _beyond_ascii(data)
    parts = (flags & _PARTS).astype(bool)
    raw = np.frombuffer(data, np.uint8)
    for ahead in range(4):
        raw[at[parts & (sizes > ahead)] + ahead] = ord(" ")


def _hash_words(data: bytearray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(W,) uint64: a word of at most 8 bytes is one number, mixed reversibly; longer ones take in 8 bytes at a time."""
    eights = np.ndarray(len(data) - len(_PADDING) + 1, "<u8", data, strides=(1,))
    lengths = ends - starts
    hashes = _mixed(eights[starts] & _MASKS[np.minimum(lengths, 8)])
    longer = np.flatnonzero(lengths > 8)
    for done in range(8, _LONG_WORD, 8):
        longer = longer[lengths[longer] > done]
        following = eights[starts[longer] + done] & _MASKS[np.minimum(lengths[longer] - done, 8)]
        hashes[longer] = _joined(hashes[longer], _mixed(following))
    for word in longer[lengths[longer] > _LONG_WORD]:
        hashes[word] = xxhash.xxh3_64_intdigest(bytes(data[starts[word]:ends[word]]))
    return hashes


def hash_ngrams(words: np.ndarray) -> np.ndarray:
    """(W - 12,) uint64 from (W,): 13 consecutive words are 8 and 4 and 1, each of them made of halves."""
    number = len(words) - NGRAM_WORDS + 1
    if number < 1:
        return np.zeros(0, np.uint64)
    two = _joined(words[:-1], words[1:])
    four = _joined(two[:-2], two[2:])
    eight = _joined(four[:-4], four[4:])
    return _mixed(_joined(_joined(eight[:number], four[8:8 + number]), words[12:]))


def _mixed(values: np.ndarray) -> np.ndarray:
    """A bijection of (K,) uint64 in which every bit depends on every bit."""
    values = values * _ODD
    values ^= values >> _HALF
    values *= _ODD2
    values ^= values >> _HALF
    return values


def _joined(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One (K,) uint64 of two, in which their order counts."""
    joined = left * _ODD
    joined += right
    joined ^= joined >> _HALF
    joined *= _ODD2
    return joined
