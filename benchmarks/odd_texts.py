"""Texts that tokenizer libraries disagree on, seeded: what a fast library must get right to be trusted with a corpus.

Used by tests and by benchmarks/tokenizer_libraries.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from ettin_foundry.corpus.encoder import FRAGMENTS

_WRITTEN = ("[PAD] [UNK] <|padding|> |||IP_ADDRESS||| [unused0] [MASK ASK] <|endof text|> || 'm it''s 3.14 "
            "_ __ {} () # \\ /* */ ` ~ < > , ;").split()
_ALL = [*FRAGMENTS, *_WRITTEN, "\n [MASK] ", " " * 50, "\u0300" * 30, "\U0001d7ce", "\ufdd0"]
_BLOCKS = (0, 0x80, 0x300, 0x370, 0x590, 0x600, 0x900, 0x980, 0xe00, 0xf00, 0x1100, 0x1e00, 0x2000, 0x20d0, 0x2e80,
           0x3000, 0x4e00, 0xac00, 0xd700, 0xe000, 0xf900, 0xfb00, 0xfe00, 0xff00, 0x10000, 0x1d400, 0x1f300, 0xe0000)
_MARKS = "aeiou\u0301\u0308\u0323\u0327\u0345\u1161\u1100\u11a8\u0e31\u094d\u200d\ufe0f"


def _characters(numbers: Iterator[int]) -> str:
    return "".join(chr(number) for number in numbers if not 0xd800 <= number < 0xe000)


def _block(rng: Random) -> str:
    begin = rng.choice(_BLOCKS)
    return _characters(begin + rng.randrange(256) for _ in range(rng.randint(1, 80)))


_KINDS: tuple[tuple[int, Callable[[Random], str]], ...] = (
    (6, lambda rng: "".join(rng.choices(_ALL, k=rng.randint(1, 30)))),
    (1, lambda rng: _characters(rng.randrange(0x110000) for _ in range(rng.randint(1, 60)))),
    (1, _block),
    (1, lambda rng: rng.randbytes(rng.randint(1, 200)).decode("latin-1")),
    (1, lambda rng: rng.randbytes(rng.randint(1, 200)).decode("utf-8", "replace")),
    (1, lambda rng: "".join(rng.choices(" \t\n\r\xa0\u2003\x0b\u3000ab.1'", k=rng.randint(1, 120)))),
    (1, lambda rng: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 300)))),
    (1, lambda rng: "".join(rng.choices(_MARKS, k=rng.randint(1, 60)))),
)


def odd_texts(number: int, *, seed: int = 1) -> Iterator[str]:
    """`number` texts of 1 to about 300 characters, all kinds in turn."""
    rng = Random(seed)
    turn = [make for weight, make in _KINDS for _ in range(weight)]
    for i in range(number):
        yield turn[i % len(turn)](rng)
