"""Texts that tokenizer libraries disagree on, seeded: what a fast library must get right to be trusted with a corpus.

Used by tests and by benchmarks/tokenizer_libraries.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_WRITTEN = ("[MASK] [CLS] [SEP] [PAD] [UNK] <|endoftext|> <|padding|> |||IP_ADDRESS||| |||EMAIL_ADDRESS||| [unused0] "
            "[unused82] [MASK ASK] <|endof text|> ||").split() + [" [MASK]", "\n [MASK] "]
_SPACES = ["  ", "   ", "\t", "\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\xa0", "\u2003", "\u2028", "\u2029",
           "\u3000", "\u200b", "\ufeff", "\u180e", "\x1c", "\x1d", "\x1f", "\0", "\x7f", " " * 23, " " * 24, " " * 25,
           " " * 50, "\t\t", "\n\n\n"]
_CONTRACTIONS = ("'s 'S 'll 'LL '\u017f \u2019s 't 're 've 'd 'm don't it''s").split() + ["' s", " 's"]
_NORMALIZED = ("e\u0301 \u00e9 \u0301 A\u030a \u212b \u1e9b\u0323 q\u0307\u0323 \u0344 \u1100\u1161\u11a8 "
               "\uac00\u11a8 \u110b\u1175 \u0f73\u0f75 \u2126 \ufb01 \uf900 \u0308\u0301").split() + ["\u0300" * 30]
_CODE_POINTS = ("\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 "
                "\U0001f1e9\U0001f1ea \ud7ff \ue000 \ufffd \uffff \U00010000 \U0010ffff \ufdd0").split()
_SCRIPTS = ("\u4f60\u597d \u65e5\u672c\u8a9e\u30c6 \ud55c\uad6d\uc5b4 \u041f\u0440\u0438 "
            "\u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940 \u05e9\u05c1\u05bc "
            "\u0e20\u0e32\u0e29\u0e32 \u10e5\u10d0 \u0c24\u0c46 \u1f00\u0345 \u0130 \u00df \u01c5 \u02b0 \u00aa "
            "\u2160 \u00b2 \u0663 \u0967 \u2460 \U0001d7ce \U0001d400 \u00bd \u3002 \u203f").split()
_ASCII = ("_ __ a b word Word WORD 12 1234567890 3.14 0x1F ... !!! -- === {} (); :// @ # $ % ^ & * \\n \\ /* */ \" ` "
          "~ < > | , ;").split() + [" the", " of"]
_ALL = _WRITTEN + _SPACES + _CONTRACTIONS + _NORMALIZED + _CODE_POINTS + _SCRIPTS + _ASCII
_BLOCKS = (0, 0x80, 0x300, 0x370, 0x590, 0x600, 0x900, 0x980, 0xe00, 0xf00, 0x1100, 0x1e00, 0x2000, 0x20d0, 0x2e80,
           0x3000, 0x4e00, 0xac00, 0xd700, 0xe000, 0xf900, 0xfb00, 0xfe00, 0xff00, 0x10000, 0x1d400, 0x1f300, 0xe0000)
_MARKS = "aeiou\u0301\u0308\u0323\u0327\u0345\u1161\u1100\u11a8\u0e31\u094d\u200d\ufe0f"

Random = random.Random


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
