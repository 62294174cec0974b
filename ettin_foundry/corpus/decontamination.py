"""Which documents repeat evaluation texts: an index of 13-grams of words, in which those of every document are looked up.

As in GPT-3's decontamination (Brown et al., 2020, appendix C), a document is hit by every run of 13 lower-cased words
that it shares with an evaluation text; what a word is, ngrams.py says. Texts of fewer than 13 words cannot be found (they
are counted and logged), and a script written without spaces has few words, so that only long copies are found in it.

N-grams are compared by 64-bit hashes only. Equal ones are always found; two different ones are taken for equal with
probability 2**-64, so N n-grams of a corpus against M of the evaluation texts give about N * M / 2**64 false hits: 0.8
for 1.5e12 (some 2e12 tokens) and 1e7. Every hit states its words, so that it can be looked at.

What is dropped and what only reported is decided in filters.py.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ettin_foundry.corpus.ngrams import NGRAM_WORDS, WordBlock, blocks_of_document, blocks_of_texts, hash_ngrams

__all__ = ["NGRAM_WORDS", "Hit", "NgramIndex", "index_sources"]

log = logging.getLogger(__name__)

_BITS_PER_NGRAM = 32  # of the bitmap, at least: one n-gram in 32 of a clean text is looked up in the sorted table
_UNIT_BYTES = 256 << 20  # of evaluation files read in one go

_FORMAT = {"format": "ettin-ngrams", "version": 1, "words": NGRAM_WORDS}
_DTYPES = {"ngrams": ("U64", "<u8"), "owners": ("U32", "<u4"), "bitmap": ("U8", "u1"), "names": ("U8", "u1"),
           "name_ends": ("U64", "<u8")}


class Hit(NamedTuple):
    """A document's overlap with one evaluation text."""

    evaluation: str
    """Name of the evaluation text; where several hold an n-gram, of the first."""
    ngram: str
    """The first shared n-gram: 13 lower-cased words, cut after 1,000 characters."""
    count: int
    """Places of the document at which a shared n-gram begins."""


class NgramIndex:
    """The n-grams of evaluation texts: sorted hashes, the text each is from, and a bitmap that most others miss.

    Made by `build` or `load`. A loaded one is mapped: the processes of a machine share its memory, and pickling it hands
    over its path.
    """

    def __init__(self, arrays: dict[str, np.ndarray], *, num_short: int, path: Path | None = None) -> None:
        self._arrays = arrays
        self._ngrams, self._owners, self._bitmap = arrays["ngrams"], arrays["owners"], arrays["bitmap"]
        self._shift = np.uint64(64 - (8 * len(self._bitmap) - 1).bit_length())
        self._path = path
        self.num_short = num_short
        """Evaluation texts of fewer than 13 words, which cannot be found."""
        self.fingerprint = _fingerprint(arrays)
        """xxh3_128 of everything in the index."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            raise TypeError("NgramIndex: one that is in no file cannot go to another process; save and load it")
        return NgramIndex.load, (self._path,)

    @property
    def num_ngrams(self) -> int:
        return len(self._ngrams)

    @property
    def num_texts(self) -> int:
        return len(self._arrays["name_ends"])

    def record(self) -> dict[str, Any]:
        """What a manifest states of it."""
        return {"words": NGRAM_WORDS, "texts": self.num_texts, "short": self.num_short, "ngrams": self.num_ngrams,
                "xxh3_128": self.fingerprint}

    @staticmethod
    def build(texts: Iterable[tuple[str, str]]) -> NgramIndex:
        """The index of evaluation texts; needs some 50 bytes of memory per word of them.

        Args:
            texts: (name, text). An n-gram of several texts counts as the first one's.

        Raises:
            ValueError: no text has 13 words.
        """
        names: list[str] = []

        def numbered() -> Iterator[tuple[int, str]]:
            for number, (name, text) in enumerate(texts):
                names.append(name)
                yield number, text

        hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
        for block in blocks_of_texts(numbered()):
            grams = hash_ngrams(block.hashes)
            begins = block.numbers(np.arange(len(grams)))
            inside = begins == block.numbers(np.arange(len(grams)) + NGRAM_WORDS - 1)
            hashes.append(grams[inside])
            owners.append(begins[inside].astype(np.uint32))
        ngrams, first = np.unique(np.concatenate(hashes), return_index=True)
        owner = np.concatenate(owners)
        if not len(ngrams):
            raise ValueError(f"{len(names)} evaluation texts given, none of {NGRAM_WORDS} words or more; "
                             "shorter ones cannot be found. Give each example as one text, question, passage and answer")
        is_short = np.bincount(owner, minlength=len(names)) == 0
        if is_short.any():
            log.warning("--decontaminate: %d of %d evaluation texts have fewer than %d words and cannot be found; the "
                        "first is %s", is_short.sum(), len(names), NGRAM_WORDS, names[int(is_short.argmax())])
        encoded = [name.encode(errors="replace") for name in names]
        return NgramIndex({
            "ngrams": ngrams, "owners": owner[first], "bitmap": _bitmap(ngrams),
            "names": np.frombuffer(b"".join(encoded), np.uint8),
            "name_ends": np.cumsum([len(name) for name in encoded]).astype(np.uint64)}, num_short=int(is_short.sum()))

    def save(self, path: Path) -> None:
        """Writes the index as one safetensors file, atomically: aligned arrays, which an .npz does not give."""
        from safetensors.numpy import save

        metadata = {**_FORMAT, "short": self.num_short, "xxh3_128": self.fingerprint}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as stream:
                stream.write(save(self._arrays, {"index": json.dumps(metadata)}))  # the order of several keys is random
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path) -> NgramIndex:
        """Maps a saved index.

        Raises:
            FileNotFoundError: no such file. ValueError: it is not, in every byte, what `save` wrote.
        """
        try:
            arrays, metadata = _map_arrays(path)
            if {key: metadata.get(key) for key in _FORMAT} != _FORMAT:
                raise ValueError(f"its metadata is {metadata!r:.200}")
            index = NgramIndex(arrays, num_short=int(metadata["short"]), path=path)
            if index.fingerprint != metadata["xxh3_128"]:
                raise ValueError(f"its content has xxh3_128 {index.fingerprint}, {metadata['xxh3_128']} was written")
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: missing; the index of the evaluation texts is needed. Start the "
                                    "conversion again to have it built") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path}: is no index of evaluation texts ({error}); the file that a conversion wrote is "
                             "needed. Remove it to have it built again") from None
        return index

    def hits(self, text: str) -> list[Hit]:
        """Evaluation texts that share an n-gram with this text, in order of their first one."""
        return self.hits_of_batch([text])[0]

    def hits_of_pieces(self, pieces: Iterable[str]) -> list[Hit]:
        """`hits` of one long document, given as consecutive strings; memory does not grow with its length."""
        return self._collect(blocks_of_document(0, pieces)).get(0, [])

    def hits_of_batch(self, texts: Sequence[str]) -> list[list[Hit]]:
        """`hits` of each text; many short ones at a time are far faster than one by one."""
        found = self._collect(blocks_of_texts(enumerate(texts)))
        return [found.get(number, []) for number in range(len(texts))]

    def _collect(self, blocks: Iterable[WordBlock]) -> dict[int, list[Hit]]:
        """Hits per number of a document."""
        found: dict[int, dict[int, Hit]] = {}
        for block in blocks:
            begins, places = self._look_up(hash_ngrams(block.hashes))
            numbers = block.numbers(begins)
            inside = numbers == block.numbers(begins + NGRAM_WORDS - 1)
            for begin, place, number in zip(begins[inside], places[inside], numbers[inside].tolist()):
                owner = int(self._owners[place])
                hits = found.setdefault(number, {})
                hit = hits.get(owner) or Hit(self._name(owner), " ".join(block.words(begin))[:1000], 0)
                hits[owner] = hit._replace(count=hit.count + 1)
        return {number: list(hits.values()) for number, hits in found.items()}

    def _look_up(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in (G,) uint64 hashes that the index holds, and their places in it; both (H,) int64."""
        bits = grams >> self._shift
        marks = self._bitmap[bits >> np.uint64(3)] >> (bits & np.uint64(7)).astype(np.uint8)
        begins = np.flatnonzero(marks & np.uint8(1))
        places = np.minimum(np.searchsorted(self._ngrams, grams[begins]), len(self._ngrams) - 1)
        same = self._ngrams[places] == grams[begins]
        return begins[same], places[same]

    def _name(self, owner: int) -> str:
        begin, end = (int(self._arrays["name_ends"][at]) if at >= 0 else 0 for at in (owner - 1, owner))
        return self._arrays["names"][begin:end].tobytes().decode(errors="replace")


def index_sources(sources: Sequence[str], *, text_field: str = "text") -> NgramIndex:
    """The index of all documents of sources as `sources.find_source` takes them; a text's name is `source/document id`.

    Raises:
        FileNotFoundError, ValueError: a source that is not there or cannot be read, or no text of 13 words.
    """
    from ettin_foundry.corpus.readers import Document, read_parts
    from ettin_foundry.corpus.sources import Meter, find_source, plan_parts

    def texts() -> Iterator[tuple[str, str]]:
        for text in sources:
            source = find_source(text, licence=None)
            for parts in plan_parts(source, _UNIT_BYTES):
                for document in read_parts(source, parts, Meter(), text_field=text_field, id_field=None):
                    yield (f"{source.name}/{document.id}",
                           document.text if isinstance(document, Document) else "".join(document.pieces()))

    try:
        return NgramIndex.build(texts())
    except (OSError, ValueError) as error:
        message = str(error).replace("--text-field", "--decontaminate-field")
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(
            f"--decontaminate: {message}") from error


def _bitmap(ngrams: np.ndarray) -> np.ndarray:
    """(B,) uint8: bit h of 8 * B is set where a hash begins with the bits of h; B is a power of two."""
    size = 1 << max(13, (_BITS_PER_NGRAM * len(ngrams) - 1).bit_length() - 3)
    bits = ngrams >> np.uint64(64 - (8 * size - 1).bit_length())
    bitmap = np.zeros(size, np.uint8)
    np.bitwise_or.at(bitmap, bits >> np.uint64(3), np.uint8(1) << (bits & np.uint64(7)).astype(np.uint8))
    return bitmap


def _fingerprint(arrays: dict[str, np.ndarray]) -> str:
    digest = xxhash.xxh3_128()
    for name in _DTYPES:
        digest.update(f"{name} {len(arrays[name])} ")
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def _map_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a safetensors file, mapped, and its metadata (the format is in safetensors' README).

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is not one with the arrays of an index.
    """
    with open(path, "rb") as stream:
        content = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    arrays = {}
    for name, (kind, dtype) in _DTYPES.items():
        entry = header[name]
        if entry["dtype"] != kind or len(entry["shape"]) != 1:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}")
        start, end = entry["data_offsets"]
        arrays[name] = content[begin + start:begin + end].view(dtype)
    return arrays, json.loads(header["__metadata__"]["index"])
