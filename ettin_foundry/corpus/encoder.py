"""Texts to plain tokens, fast: fastokens where it gives the ids of `tokenizers`, else `tokenizers` itself.

fastokens is about 20 times as fast (benchmarks/tokenizer_libraries.py). Both must agree on a probe when an encoder is
made, and on a share of the texts during the run.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import xxhash
from tokenizers import Tokenizer

log = logging.getLogger(__name__)

Engine = Literal["auto", "fast", "tokenizers"]
Flat = tuple[np.ndarray, np.ndarray]  # ids (N,) of all texts, one after another; lengths (texts,) int64

# where both libraries read their number of threads; a process that encodes has one core
_THREADS = {"FASTOKENS_BPE_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_NOT_OF_THE_LIBRARY = (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)

# What libraries differ on: white space, what normalization composes, scripts, digits, contractions, special tokens
FRAGMENTS: list[str] = orjson.loads(Path(__file__).with_name("probe_fragments.json").read_bytes())


class TextEncoder:
    """Encodes texts with one tokenizer, on one core, which it sets for the whole process.

    A literal "[MASK]" in a text stays ordinary text: else any page could inject masks and document ends. `engine` names
    the library and its version; `unknown` is the id of what the vocabulary lacks, or -1.

    Args:
        tokenizer_json: content of tokenizer.json. forbidden: ids that no text may give.
        engine: "tokenizers", "fast" (fastokens, or an error), "auto" (fastokens where it can be used): the same tokens.
        check_share: share of the texts that both encode, chosen by a hash of the text; 1/512 costs some 4% of the time.
    """

    def __init__(self, tokenizer_json: str, *, forbidden: Collection[int], engine: Engine = "auto",
                 check_share: float = 1 / 512, name: str = "unnamed") -> None:
        os.environ.update(_THREADS)
        self.name = name
        self._check_below = int(check_share * 2**64)
        self._reference: Any = Tokenizer.from_str(tokenizer_json)  # Any: its stubs lack setters
        self._reference.encode_special_tokens = True
        self._reference.no_truncation()
        self._reference.no_padding()
        self._version = self.engine = f"tokenizers {importlib.metadata.version('tokenizers')}"
        content = orjson.loads(tokenizer_json)
        unknown = content["model"].get("unk_token")
        found = self._reference.token_to_id(unknown) if unknown else content["model"].get("unk_id")
        self.unknown: int = -1 if found is None else found
        self._is_special = np.zeros(1 << 16, dtype=bool)  # by id
        self._is_special[sorted({*forbidden} - {self.unknown})] = True
        added = [token["content"] for token in content.get("added_tokens") or ()]
        self._fast: Callable[[Sequence[str]], Flat] | None = None
        if engine != "tokenizers":
            self._choose(engine, tokenizer_json, _probe_texts(added))

    def encode(self, texts: Sequence[str]) -> Flat:
        """Tokens (N,) uint16 of all texts, one after another; lengths (len(texts),) int64.

        Raises ValueError where the libraries disagree on a text, or a special token cannot be written as text.
        """
        try:
            ids, lengths = self._fast(texts) if self._fast else self._reference_ids(texts)
        except BaseException as error:  # a panic of a Rust library derives from BaseException alone
            if isinstance(error, _NOT_OF_THE_LIBRARY) or not self._fast:
                raise
            log.warning("%s failed on %d texts (%r); `tokenizers` encodes them", self.engine, len(texts), error)
            ids, lengths = self._reference_ids(texts)
        ends = np.cumsum(lengths)
        for number, text in enumerate(texts) if self._fast else ():
            if xxhash.xxh3_64_intdigest(text) < self._check_below and not np.array_equal(
                    ids[ends[number] - lengths[number]:ends[number]], self._reference_ids([text])[0]):
                raise ValueError(f"tokenizer {self.name}: {self.engine} and {self._version} must agree, got different "
                                 f"ids for {text[:60]!a}; convert with --engine tokenizers")
        for at in np.flatnonzero(self._is_special[ids])[::-1].tolist():  # which a model may have among its pieces
            token = self._reference.id_to_token(int(ids[at]))
            letters = [self._reference.token_to_id(letter) for letter in token]
            if self.unknown < 0 and None in letters:
                raise ValueError(f"tokenizer {self.name}: {token!r} in a text must be made of other tokens, got a "
                                 "vocabulary without its letters; give the model an unknown token")
            lengths[np.searchsorted(ends, at, side="right")] += len(letters) - 1
            ids = np.concatenate([ids[:at], [self.unknown if n is None else n for n in letters], ids[at + 1:]])
        return ids.astype(np.uint16), lengths

    def _reference_ids(self, texts: Sequence[str]) -> Flat:
        """Ids as `tokenizers` gives them, with 120 bytes of memory a character; special tokens are read as text."""
        arrays = [np.array(self._reference.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)
                  for text in texts]
        return np.concatenate([np.zeros(0, np.uint32), *arrays]), np.array([len(ids) for ids in arrays], np.int64)

    def _choose(self, engine: Engine, tokenizer_json: str, probe: Sequence[str]) -> None:
        """Takes fastokens if it gives the ids of `tokenizers` on the probe; logs which library encodes, and why."""
        try:
            fast, version = _open_fastokens(tokenizer_json)
            if all(map(np.array_equal, fast(probe), self._reference_ids(probe))):
                log.info("tokenizer %s: %s encodes, equal to %s on a probe", self.name, version, self._version)
                self._fast, self.engine = fast, version
                return
            reason = f"{version} gives other ids than {self._version} on the probe texts"
        except BaseException as error:  # a panic of a Rust library derives from BaseException alone
            if isinstance(error, _NOT_OF_THE_LIBRARY):
                raise
            reason = f"fastokens cannot be used with it ({type(error).__name__}: {error!s:.200})"
        if engine == "fast":
            raise ValueError(f"--engine must be auto or tokenizers with {self.name}, got fast, but {reason}")
        log.warning("tokenizer %s: %s encodes, about 20 times slower: %s", self.name, self._version, reason)


def _open_fastokens(tokenizer_json: str) -> tuple[Callable[[Sequence[str]], Flat], str]:
    """The function that encodes with fastokens, and its version."""
    import fastokens

    backend = fastokens.Tokenizer.from_json_str(tokenizer_json)
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: Sequence[str]) -> Flat:
        ids, offsets = backend.encode_batch_flat(list(texts), False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.diff(np.frombuffer(offsets, dtype="<u8").astype(np.int64))

    return encode, f"fastokens {importlib.metadata.version('fastokens')}"


def _probe_texts(added_tokens: Sequence[str]) -> list[str]:
    """Always the same texts for a tokenizer: its added tokens and the fragments, in chance neighbourhoods."""
    rng = random.Random(0)
    parts = [*FRAGMENTS, *rng.sample(list(added_tokens), min(len(added_tokens), 40))]
    texts = ["", *parts, *("".join(rng.choices(parts, k=rng.randint(2, 14))) for _ in range(400))]
    blocks = (*range(0, 0x600, 128), 0x900, 0xe00, 0x1100, 0x1e80, 0x2000, 0x3080, 0xac00, 0xfe80, 0x1f600)
    return texts + ["".join(map(chr, range(begin, begin + 128))) for begin in blocks]
