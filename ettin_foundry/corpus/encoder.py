"""Texts to plain tokens, fast: fastokens where it gives the ids of `tokenizers`, else `tokenizers` itself.

Tokenizing is the slowest step of a conversion. `tokenizers` makes 0.5 to 0.8 million tokens per second and core of Ettin's
vocabulary, fastokens about 15 million, with the same ids on every text of a wide test (benchmarks/tokenizer_libraries.py,
which also compares others). `tokenizers` stays the referee: both must agree on a probe when an encoder is made, and on a
sampled share of the texts during the run, chosen by a hash of the text and hence the same for any number of workers.

A text longer than a million characters is encoded in stretches, so that memory does not grow with it; text_cuts.py finds
places to cut where the tokens stay those of the whole. A literal "[MASK]" in a text stays ordinary text. One encoder uses
one core; work is spread by processes, each with an encoder of its own, so torch and transformers, which take seconds to
import, are not used here.

Loading, training and describing a tokenizer is in tokenizer.py, cutting tokens into chunks in chunking.py.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xxhash
from tokenizers import Tokenizer

from ettin_foundry.corpus import text_cuts
from ettin_foundry.corpus.text_cuts import Flat, SafeCuts

__all__ = ["CHECK_SHARE", "Engine", "TextEncoder"]

log = logging.getLogger(__name__)

Engine = Literal["auto", "fast", "tokenizers"]

CHECK_SHARE = 1 / 512
"""Share of the texts that `tokenizers` encodes too. It is about 20 times slower, so this costs some 4% of the time."""

_MAX_IDS = 65_535
_NOT_OF_THE_LIBRARY = (UnicodeEncodeError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)


class TextEncoder:
    """Encodes texts with one tokenizer, on one core. Picklable: a copy is built anew from the arguments.

    Args:
        tokenizer_json: content of tokenizer.json.
        forbidden: ids that no text may give: `tokenizer.forbidden_ids`.
        vocab_size: highest id plus one.
        engine: "tokenizers", or "fast" (fastokens, an error where it is missing or disagrees), or "auto" (fastokens where
            it can be used). It never changes the tokens.
        check_share: share of the texts, 0 to 1, that both encode during the run.
        name: of the tokenizer, for messages.

    Attributes:
        engine: library and version that encodes, such as "fastokens 0.3.5".

    Raises:
        ValueError: an argument is out of range, tokenizer.json cannot be read, or `engine` "fast" cannot be had.
    """

    def __init__(self, tokenizer_json: str, *, forbidden: Collection[int], vocab_size: int, engine: Engine = "auto",
                 check_share: float = CHECK_SHARE, name: str = "") -> None:
        self.name = name or "unnamed"
        self._arguments = (tokenizer_json, dict(forbidden=tuple(forbidden), vocab_size=vocab_size, engine=engine,
                                                check_share=check_share, name=name))
        if engine not in ("auto", "fast", "tokenizers"):
            raise ValueError(f"engine: {engine!r} given; 'auto', 'fast' or 'tokenizers' is possible. Leave it out for auto")
        if not 0 <= check_share <= 1:
            raise ValueError(f"check_share: {check_share} given; a share of the texts, 0 to 1, is needed. The default is "
                             f"{CHECK_SHARE:.4f}")
        if not 0 < vocab_size <= _MAX_IDS:
            raise ValueError(f"tokenizer {self.name}: {vocab_size} entries; 1 to {_MAX_IDS} are possible, tokens are "
                             "stored as uint16. Choose or train a smaller one")
        if outside := [i for i in forbidden if not 0 <= i < vocab_size]:
            raise ValueError(f"tokenizer {self.name}: special ids {outside} of {vocab_size} entries; each must be one of "
                             "them. Save the tokenizer again")
        self._check_below = int(check_share * 2**64)
        self._is_refused = np.ones(1 << 16, dtype=bool)  # by id; ids out of the vocabulary stay refused
        self._is_refused[:vocab_size] = False
        self._is_refused[sorted(forbidden)] = True
        self._referee = _Referee(tokenizer_json, self.name)
        added = [token["content"] for token in json.loads(tokenizer_json).get("added_tokens") or ()]
        self._fast, self.engine = _choose(engine, tokenizer_json, self._referee, _probe_texts(added), self.name)
        self._cuts = SafeCuts(self._by_fast if self._fast else self._referee.encode, added, name=self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._arguments

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes documents; a batch of some hundred kilobytes is fastest, a single long text needs little more memory.

        Returns:
            tokens (N,) uint16 of all texts, one after another; lengths (len(texts),) int64, 0 for an empty text.

        Raises:
            ValueError: a text holds lone surrogates, gives a forbidden id, or the two libraries disagree on it.
        """
        tokens, lengths = [np.zeros(0, dtype=np.uint16)], [np.zeros(0, dtype=np.int64)]
        for is_long, group in itertools.groupby(texts, key=lambda text: len(text) > text_cuts.STRETCH):
            if not is_long:
                found, numbers = self._encode(list(group))
                tokens.append(found)
                lengths.append(numbers)
                continue
            for text in group:
                parts = list(self.encode_pieces([text]))
                tokens += parts
                lengths.append(np.array([sum(map(len, parts))]))
        return (tokens[1], lengths[1]) if len(tokens) == 2 else (np.concatenate(tokens), np.concatenate(lengths))

    def encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """Encodes one document that comes as consecutive strings, of any sizes, in bounded memory.

        Put together, the arrays equal `encode([whole])` however the text was divided. They equal what `tokenizers` gives
        for the whole, except around a cut made after `text_cuts.LONGEST_STRETCH` characters without a safe place. A
        tokenizer without any kind of safe cut gets the document whole.

        Yields:
            (L,) uint16 arrays, in order.

        Raises:
            ValueError: as `encode`.
        """
        try:
            for stretch in self._cuts.stretches(pieces):
                yield self._encode([stretch])[0]
        except UnicodeEncodeError as error:  # where a cut was tried
            raise self._lone_surrogates(error) from None

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        checked: list[int] = []
        try:
            if self._fast is None:
                ids, lengths = self._referee.encode(texts)
            else:
                ids, lengths = self._by_fast(texts)
                checked = [i for i, text in enumerate(texts) if xxhash.xxh3_64_intdigest(text) < self._check_below]
        except UnicodeEncodeError as error:
            raise self._lone_surrogates(error) from None
        if checked:
            self._check([texts[i] for i in checked], ids, lengths, np.array(checked))
        tokens = ids.astype(np.uint16)
        if len(ids) and (int(ids.max()) > _MAX_IDS or self._is_refused[tokens].any()):
            at = int(np.flatnonzero((ids > _MAX_IDS) | self._is_refused[tokens])[0])
            number = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            place = self._referee.character(texts[number], at - int(lengths[:number].sum()))
            raise ValueError(f"tokenizer {self.name}: it turned ordinary text into its special token {int(ids[at])} "
                             f"({self._referee.token(int(ids[at]))!r}), in {_shown(texts[number], place)}; text must never "
                             "give one. Mark that token special=True in tokenizer.json, or use another tokenizer")
        return tokens, lengths

    def _by_fast(self, texts: Sequence[str]) -> Flat:
        assert self._fast is not None
        try:
            return self._fast(texts)
        except BaseException as error:  # a panic of a Rust library derives from BaseException alone
            if isinstance(error, _NOT_OF_THE_LIBRARY):
                raise
            log.warning("tokenizer %s: %s failed on a batch of %d texts (%s: %s); `tokenizers` encodes it", self.name,
                        self.engine, len(texts), type(error).__name__, error)
            return self._referee.encode(texts)

    def _lone_surrogates(self, error: UnicodeEncodeError) -> ValueError:
        return ValueError(f"tokenizer {self.name}: a text holds lone surrogates at character {error.start}, "
                          f"{_shown(error.object, error.start)}; text must be valid Unicode. Repair or drop that document")

    def _check(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, numbers: np.ndarray) -> None:
        """Holds the fast library to `tokenizers` on `texts`, which are the `numbers`-th of the batch."""
        ends = np.cumsum(lengths)
        for text, number in zip(texts, numbers):
            found, expected = ids[ends[number] - lengths[number]:ends[number]], self._referee.encode([text])[0]
            if not np.array_equal(found, expected):
                at = _first_difference(found, expected)
                raise ValueError(
                    f"tokenizer {self.name}: {self.engine} and {self._referee.version} give different ids from token {at} "
                    f"on, in a text of {len(text)} characters, {_shown(text, self._referee.character(text, at))}; they "
                    "must agree. Convert with --engine tokenizers, and report the text to the faster library")


class _Referee:
    """`tokenizers`, set to read special tokens in a text as text."""

    def __init__(self, tokenizer_json: str, name: str) -> None:
        try:
            self._backend: Any = Tokenizer.from_str(tokenizer_json)  # Any: the stubs of tokenizers 0.21 lack setters
        except Exception as error:  # the library raises a plain Exception
            raise ValueError(f"tokenizer {name}: its tokenizer.json cannot be read ({error}); the content of a file "
                             "saved by a fast tokenizer is needed. Save it again") from error
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.version = f"tokenizers {importlib.metadata.version('tokenizers')}"

    def encode(self, texts: Sequence[str]) -> Flat:
        try:
            with _one_thread():
                encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # names a lone surrogate, which the library calls a wrong type
            raise
        arrays = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        lengths = np.array([len(array) for array in arrays], dtype=np.int64)
        return np.concatenate([np.zeros(0, dtype=np.uint32), *arrays]), lengths

    def token(self, number: int) -> str | None:
        return self._backend.id_to_token(number)

    def character(self, text: str, token: int) -> int:
        """Where in the text a token begins."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return offsets[token][0] if token < len(offsets) else len(text)


def _rebuild(tokenizer_json: str, arguments: dict[str, Any]) -> TextEncoder:
    return TextEncoder(tokenizer_json, **arguments)


def _choose(engine: Engine, tokenizer_json: str, referee: _Referee, probe: Sequence[str],
            name: str) -> tuple[Callable[[Sequence[str]], Flat] | None, str]:
    """The fast library's function and name, or None and the referee's; says which and why."""
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
        raise ValueError(f"engine: 'fast' given for tokenizer {name}, but {reason}; a tokenizer that both read alike is "
                         "needed. Install fastokens, or use 'auto' or 'tokenizers'")
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
    if before == wanted:
        yield
        return
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    return int(np.argmax(np.append(a[:size] != b[:size], True)))


def _shown(text: str, at: int) -> str:
    """The text around a character, escaped and shortened for a message."""
    begin, end = max(0, at - 30), min(len(text), at + 30)
    before, after = "..." if begin else "", "..." if end < len(text) else ""
    return f"{before}{ascii(text[begin:end])}{after} (characters {begin} to {end})"


def _probe_texts(added_tokens: Sequence[str]) -> list[str]:
    """Always the same texts for a tokenizer: its added tokens, and the fragments, in chance neighbourhoods."""
    rng = random.Random(0)
    parts = [*text_cuts.FRAGMENTS, *rng.sample(list(added_tokens), min(len(added_tokens), 40))]
    texts = ["", *parts, "\n".join(parts), *("".join(rng.choices(parts, k=rng.randint(2, 14))) for _ in range(400))]
    return texts + ["".join(map(chr, range(begin, begin + 128))) for begin in
                    (*range(0, 0x600, 128), 0x900, 0xe00, 0x1100, 0x1e80, 0x2000, 0x3080, 0xac00, 0xfe80, 0x1f600)]
