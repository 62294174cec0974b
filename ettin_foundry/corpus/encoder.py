"""Texts to plain tokens, fast: fastokens where it gives the ids of `tokenizers`, else `tokenizers` itself.

`tokenizers` makes 0.5 to 0.8 million tokens per second and core of Ettin's vocabulary, fastokens about 15 million, with
the same ids on every text of a wide test (benchmarks/tokenizer_libraries.py). `tokenizers` stays the referee: both must
agree on a probe when an encoder is made, and on a sampled share of the texts during the run.

A text longer than a million characters is encoded in stretches, because `tokenizers` needs some 120 bytes of memory a
character. Three rules name places that no token of a usual vocabulary reaches across. Which of them hold is tried once
for each tokenizer, and every single cut is tried on the text around it before it is made. A tokenizer for which no rule
holds (one that puts a space before whatever it is given, for instance) gets texts whole.

One encoder uses one core; work is spread by processes. Torch and transformers, which take seconds to import, are not used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xxhash
from tokenizers import Tokenizer

from ettin_foundry.data.tokenizer import MAX_VOCAB_SIZE

__all__ = ["CHECK_SHARE", "Engine", "TextEncoder"]

log = logging.getLogger(__name__)

Engine = Literal["auto", "fast", "tokenizers"]
Flat = tuple[np.ndarray, np.ndarray]
"""What encoding texts gives: ids (N,) of all of them, one after another, and lengths (texts,) int64."""

CHECK_SHARE = 1 / 512
"""Share of the texts that `tokenizers` encodes too. It is about 20 times slower, so this costs some 4% of the time."""

_STRETCH = 1 << 20  # characters after which a text is cut at the next safe place
_LONGEST_STRETCH = 1 << 22  # and after which it is cut all the same: prose, code or tables have a safe place before
_CONTEXT = 256  # characters on each side of a cut that it is tried on
_LOOK_AHEAD = 2  # characters after a cut that a rule looks at
_NOT_OF_THE_LIBRARY = (UnicodeEncodeError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)

# rule, end of a left part, begin of a right part, a character after it. Most usual first
_RULES = (
    (r"(?<=\S\n)(?=\w)", "\n", "", "b"),  # between two lines, when neither has white space there
    (r"(?<=[A-Za-z])(?= [A-Za-z])", "a", " ", "b"),  # between words: byte-level tokens keep a space with the second
    (r"(?<=[\u3002\uff01\uff1f])(?=[\u3040-\u30ff\u3400-\u9fff])", "\u3002", "", "\u4e00"),  # Chinese, Japanese sentences
)
# What tokenizer libraries differ on: white space of all kinds, what normalization composes and orders, scripts, digits
# that are not ASCII, contractions, code points beside the surrogates, and special tokens written out.
_FRAGMENTS = (
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


class TextEncoder:
    """Encodes texts with one tokenizer, on one core.

    A literal "[MASK]" in a text stays ordinary text: read as the special token it would teach the model that masks occur
    in prose, and any page could inject document ends.

    Args:
        tokenizer_json: content of tokenizer.json.
        forbidden: ids that no text may give: `tokenizer.forbidden_ids`.
        vocab_size: highest id plus one.
        engine: "tokenizers", or "fast" (fastokens, an error where it is missing or disagrees), or "auto" (fastokens where
            it can be used). It never changes the tokens.
        check_share: share of the texts that both encode during the run, chosen by a hash of the text.
        name: of the tokenizer, for messages.

    Attributes:
        engine: library and version that encodes, such as "fastokens 0.3.5".

    Raises:
        ValueError: an argument is out of range, tokenizer.json cannot be read, or `engine` "fast" cannot be had.
    """

    def __init__(self, tokenizer_json: str, *, forbidden: Collection[int], vocab_size: int, engine: Engine = "auto",
                 check_share: float = CHECK_SHARE, name: str = "unnamed") -> None:
        self.name = name
        if not 0 < vocab_size <= MAX_VOCAB_SIZE or not all(0 <= number < vocab_size for number in forbidden):
            raise ValueError(f"tokenizer {name}: vocab_size must be 1 to {MAX_VOCAB_SIZE} and above every special id, got "
                             f"{vocab_size} with special ids {sorted(forbidden)}; save the tokenizer again")
        self._check_below = int(check_share * 2**64)
        self._is_refused = np.ones(1 << 16, dtype=bool)  # by id; ids out of the vocabulary stay refused
        self._is_refused[:vocab_size] = False
        self._is_refused[sorted(forbidden)] = True
        self._referee = _Referee(tokenizer_json, name)
        added = [token["content"] for token in json.loads(tokenizer_json).get("added_tokens") or ()]
        self._fast, self.engine = _choose(engine, tokenizer_json, self._referee, _probe_texts(added), name)
        self._cut_pattern = self._safe_cuts(added)

    def encode(self, texts: Sequence[str]) -> Flat:
        """Encodes documents; a batch of some hundred kilobytes is fastest.

        Returns:
            tokens (N,) uint16 of all texts, one after another; lengths (len(texts),) int64, 0 for an empty text.

        Raises:
            ValueError: a text holds lone surrogates, gives a forbidden id, or the two libraries disagree on it.
        """
        found: list[Flat] = []
        for is_long, group in itertools.groupby(texts, key=lambda text: len(text) > _STRETCH):
            if not is_long:
                found.append(self._encode(list(group)))
                continue
            for text in group:
                parts = [self._encode([stretch])[0] for stretch in self._stretches(text)]
                found.append((np.concatenate(parts), np.array([sum(map(len, parts))])))
        if len(found) == 1:
            return found[0]
        found.append((np.zeros(0, np.uint16), np.zeros(0, np.int64)))
        return np.concatenate([ids for ids, _ in found]), np.concatenate([lengths for _, lengths in found])

    def _encode(self, texts: Sequence[str]) -> Flat:
        try:
            ids, lengths = self._raw(texts)
        except UnicodeEncodeError as error:
            raise ValueError(f"tokenizer {self.name}: text must be valid Unicode, got a lone surrogate in "
                             f"{_shown(error.object, error.start)}; repair or drop that document") from None
        ends = np.cumsum(lengths)
        if self._fast is not None:
            for number, text in enumerate(texts):
                if xxhash.xxh3_64_intdigest(text) < self._check_below:
                    self._check(text, ids[ends[number] - lengths[number]:ends[number]])
        tokens = ids.astype(np.uint16)
        wrong = (ids > MAX_VOCAB_SIZE) | self._is_refused[tokens]
        if wrong.any():
            at = int(np.argmax(wrong))
            number = int(np.searchsorted(ends, at, side="right"))
            place = self._referee.character(texts[number], at - int(ends[number] - lengths[number]))
            raise ValueError(f"tokenizer {self.name}: it turned ordinary text into its special token {int(ids[at])} "
                             f"({self._referee.token(int(ids[at]))!r}), in {_shown(texts[number], place)}; mark that token "
                             "special=True in tokenizer.json, or use another tokenizer")
        return tokens, lengths

    def _raw(self, texts: Sequence[str]) -> Flat:
        """Ids as the chosen library gives them."""
        if self._fast is None:
            return self._referee.encode(texts)
        try:
            return self._fast(texts)
        except BaseException as error:  # a panic of a Rust library derives from BaseException alone
            if isinstance(error, _NOT_OF_THE_LIBRARY):
                raise
            log.warning("tokenizer %s: %s failed on a batch of %d texts (%s: %s); `tokenizers` encodes it", self.name,
                        self.engine, len(texts), type(error).__name__, error)
            return self._referee.encode(texts)

    def _check(self, text: str, found: np.ndarray) -> None:
        """Compares the fast library's ids of a text with those of `tokenizers`."""
        expected = self._referee.encode([text])[0]
        if np.array_equal(found, expected):
            return
        size = min(len(found), len(expected))
        at = int(np.argmax(np.append(found[:size] != expected[:size], True)))
        raise ValueError(f"tokenizer {self.name}: {self.engine} and {self._referee.version} must agree, got different ids "
                         f"from token {at} on, in {_shown(text, self._referee.character(text, at))}; convert with --engine "
                         "tokenizers, and report the text to the faster library")

    def _stretches(self, text: str) -> Iterator[str]:
        """A text in stretches of `_STRETCH` to `_LONGEST_STRETCH` characters, cut where the tokens stay the same."""
        begin = 0
        while self._cut_pattern is not None and len(text) - begin > _STRETCH:
            last = min(begin + _LONGEST_STRETCH, len(text))
            end = last
            for match in self._cut_pattern.finditer(text, begin + _STRETCH, min(len(text), last + _LOOK_AHEAD)):
                cut = match.start()
                if cut <= last and self._agree([(text[cut - _CONTEXT:cut], text[cut:cut + _CONTEXT])]):
                    end = cut
                    break
            yield text[begin:end]
            begin = end
        if begin < len(text):
            yield text[begin:]

    def _safe_cuts(self, added_tokens: Sequence[str]) -> re.Pattern[str] | None:
        """The rules that hold for this tokenizer on texts made of `_FRAGMENTS` and added tokens."""
        rules = []
        for rule, end, begin, first in _RULES:
            pattern, rng = re.compile(rule), random.Random(0)
            lefts = ["".join(rng.choices(_FRAGMENTS, k=3)) for _ in range(40)]
            lefts += ["a", ".", "(", "\u4e00", " 12", "x  y", "''"]
            rights = ["".join(rng.choices(_FRAGMENTS, k=3)) for _ in range(20)] + ["b c", "7", "s", "\u3042", "\xe9t\xe9"]
            rights += [first + right for right in rights] + rng.sample(list(added_tokens), min(len(added_tokens), 20))
            pairs = [(left + end, begin + right) for left in lefts for right in rights]
            if self._agree([pair for pair in pairs if pattern.match("".join(pair), len(pair[0]))]):
                rules.append(rule)
        return re.compile("|".join(rules)) if rules else None

    def _agree(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether each pair gives the same ids as two texts and as one."""
        ids, lengths = self._raw([text for left, right in pairs for text in (left, right, left + right)])
        ends = np.cumsum(lengths)
        return all(np.array_equal(ids[ends[i] - lengths[i]:ends[i + 1]], ids[ends[i + 1]:ends[i + 2]])
                   for i in range(0, len(lengths), 3))


class _Referee:
    """`tokenizers`, set to read special tokens in a text as text."""

    def __init__(self, tokenizer_json: str, name: str) -> None:
        try:
            self._backend: Any = Tokenizer.from_str(tokenizer_json)  # Any: the stubs of tokenizers 0.21 lack setters
        except Exception as error:  # the library raises a plain Exception
            raise ValueError(f"tokenizer {name}: tokenizer.json must be saved by a fast tokenizer, got one that cannot be "
                             f"read ({error}); save it again") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.version = f"tokenizers {importlib.metadata.version('tokenizers')}"
        self.token: Callable[[int], str | None] = self._backend.id_to_token

    def encode(self, texts: Sequence[str]) -> Flat:
        for text in texts:
            text.encode()  # names a lone surrogate, which the library calls a wrong type
        with _one_thread():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        return np.concatenate([np.zeros(0, dtype=np.uint32), *arrays]), lengths

    def character(self, text: str, token: int) -> int:
        """Where in the text a token begins."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return offsets[token][0] if token < len(offsets) else len(text)


def _choose(engine: Engine, tokenizer_json: str, referee: _Referee, probe: Sequence[str],
            name: str) -> tuple[Callable[[Sequence[str]], Flat] | None, str]:
    """The fast library's function and name, or None and the referee's name; logs which and why."""
    if engine == "tokenizers":
        log.info("tokenizer %s: %s encodes, as asked", name, referee.version)
        return None, referee.version
    try:
        encode, version = _open_fastokens(tokenizer_json)
        if all(map(np.array_equal, encode(probe), referee.encode(probe))):
            log.info("tokenizer %s: %s encodes, about 20 times as fast as %s and equal to it on %d probe texts", name,
                     version, referee.version, len(probe))
            return encode, version
        reason = f"{version} gives other ids than {referee.version} on the probe texts"
    except ImportError:
        reason = "fastokens is not installed"
    except BaseException as error:  # a panic of a Rust library derives from BaseException alone
        if isinstance(error, _NOT_OF_THE_LIBRARY):
            raise
        reason = f"fastokens cannot be used with it ({type(error).__name__}: {str(error)[:200]})"
    if engine == "fast":
        raise ValueError(f"--engine must be auto or tokenizers for tokenizer {name}, got fast, but {reason}")
    log.warning("tokenizer %s: %s encodes, which is about 20 times slower: %s", name, referee.version, reason)
    return None, referee.version


def _open_fastokens(tokenizer_json: str) -> tuple[Callable[[Sequence[str]], Flat], str]:
    import fastokens

    with _one_thread():
        backend = fastokens.Tokenizer.from_json_str(tokenizer_json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_batch_flat(["a b " * 10_000] * 8)  # large enough to start its threads: one, and for good

    def encode(texts: Sequence[str]) -> Flat:
        ids, offsets = backend.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.diff(np.frombuffer(offsets, dtype="<u8").astype(np.int64))

    return encode, f"fastokens {importlib.metadata.version('fastokens')}"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Both libraries read their number of threads from the environment; a worker process has one core."""
    wanted = {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _shown(text: str, at: int) -> str:
    """The text around a character, escaped and shortened for a message."""
    begin, end = max(0, at - 30), min(len(text), at + 30)
    return f"{'...' if begin else ''}{ascii(text[begin:end])}{'...' if end < len(text) else ''} (character {at})"


def _probe_texts(added_tokens: Sequence[str]) -> list[str]:
    """Always the same texts for a tokenizer: its added tokens, and the fragments, in chance neighbourhoods."""
    rng = random.Random(0)
    parts = [*_FRAGMENTS, *rng.sample(list(added_tokens), min(len(added_tokens), 40))]
    texts = ["", *parts, "\n".join(parts), *("".join(rng.choices(parts, k=rng.randint(2, 14))) for _ in range(400))]
    return texts + ["".join(map(chr, range(begin, begin + 128))) for begin in
                    (*range(0, 0x600, 128), 0x900, 0xe00, 0x1100, 0x1e80, 0x2000, 0x3080, 0xac00, 0xfe80, 0x1f600)]
