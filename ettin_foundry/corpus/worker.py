"""Does one unit of a conversion: read, filter, split, tokenize, cut, write, and a completion record at the end.

Runs in worker processes, on one machine or many, and depends on nothing but the unit and the options: the same unit gives
the same shards and the same record. The record is written last, so a unit is done or it is not. Reading goes on in a
thread while the unit's own thread tokenizes, and shards are hashed, synced and uploaded in another.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.duplicates import hash_text, read_drops, write_hashes
from ettin_foundry.corpus.encoder import Engine, TextEncoder
from ettin_foundry.corpus.executors import Report
from ettin_foundry.corpus.filters import DUPLICATE, OVERSIZED, FilterChain, FilterOptions
from ettin_foundry.corpus.plan import Unit, record_key, record_name
from ettin_foundry.corpus.progress import Tick
from ettin_foundry.corpus.readers import Document, ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data.storage import Storage, open_storage

__all__ = ["ConvertUnit", "HashUnit", "TokenizerSpec", "drops_name", "hashes_name"]

T = TypeVar("T")

_BATCH_BYTES = 1 << 20  # text tokenized at a time: enough to make calls cheap, little enough to hold a few of
_BATCH_DOCUMENTS = 4096
_READ_AHEAD = 2  # batches
_TICK_SECONDS = 0.5


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as workers need it: without transformers, whose import takes seconds."""

    name: str
    json: str
    forbidden: tuple[int, ...]
    """Ids that no text may give: the special tokens."""
    vocab_size: int
    engine: Engine = "auto"


def hashes_name(unit: Unit, base_key: str) -> str:
    """Hashes of all documents of a unit, relative to the dataset's folder; the name tells input and options."""
    return f"work/hashes/{unit.number:05d}.{record_key(base_key, unit)}.npy"


def drops_name(unit: Unit, base_key: str) -> str:
    """Ordinals of a unit's documents that repeat earlier ones."""
    return f"work/drops/{unit.number:05d}.{record_key(base_key, unit)}.npy"


@dataclass(frozen=True)
class HashUnit:
    """Writes a hash of every document of a unit, in reading order, from which duplicates.py finds the copies.

    Attributes:
        out: the dataset's folder or URL. options: the plan's. sources: name -> source, as found on this machine.
        base_key: the plan's.
    """

    out: str
    options: Mapping[str, Any]
    sources: Mapping[str, Source]
    base_key: str

    def __call__(self, unit: Unit, report: Report) -> int:
        storage, reading = open_storage(self.out), _Reading(self, unit, report)
        hashes = bytearray()
        for document in reading.documents():
            hashes += hash_text(document.text)
            reading.count(1, 0, 0)
        path = storage.scratch() / f"hashes.{unit.number:05d}.{os.getpid()}.npy"
        write_hashes(path, hashes)
        storage.put_file(path, hashes_name(unit, self.base_key))
        return 0


@dataclass(frozen=True)
class ConvertUnit(HashUnit):
    """Converts a unit and writes its record; called with a unit it returns the number of tokens.

    Raises:
        ValueError, OSError: the input cannot be converted; names file and record.
    """

    tokenizer: TokenizerSpec
    filters: FilterOptions

    def __call__(self, unit: Unit, report: Report) -> int:
        record = _Conversion(self, unit, report).run()
        open_storage(self.out).write_bytes(record_name(unit.number), json.dumps(record).encode() + b"\n")
        return sum(counts["tokens"] for counts in record["splits"].values())


class _Reading:
    """The documents of a unit, and telling the board how far it is."""

    def __init__(self, job: HashUnit, unit: Unit, report: Report) -> None:
        self.options, self.source, self.unit, self.report = job.options, job.sources[unit.source], unit, report
        self.meter = Meter()
        self.reported, self.position, self.counts = 0.0, 0, Tick()

    def documents(self) -> Iterator[Document]:
        """The documents in order, up to the one in which `limit_bytes` is reached."""
        num_bytes, limit = 0, self.options["limit_bytes"]
        for document in read_parts(self.source, self.unit.parts, self.meter, ReadOptions.of(self.options)):
            yield document
            if limit is not None:
                num_bytes += len(document.text.encode())
                if num_bytes >= limit:
                    return

    def count(self, documents: int, tokens: int, text_bytes: int, *, last: bool = False) -> None:
        """Adds to the counts, and reports them about twice a second."""
        self.counts = self.counts.plus(Tick(documents, tokens, text_bytes))
        if last or time.monotonic() - self.reported > _TICK_SECONDS:
            position = self.meter.position()
            self.report(self.counts._replace(file_bytes=position - self.position))
            self.reported, self.position, self.counts = time.monotonic(), position, Tick()


@functools.lru_cache(maxsize=1)
def _tools(spec: TokenizerSpec, filters: FilterOptions, chunk_length: int,
           cut_window: float) -> tuple[TextEncoder, FilterChain, Chunker]:
    """What takes time to make, kept for the next unit."""
    encoder = TextEncoder(spec.json, forbidden=spec.forbidden, vocab_size=spec.vocab_size, engine=spec.engine,
                          name=spec.name)
    return encoder, FilterChain(filters), Chunker(spec.json, chunk_length, cut_window)


class _Batch(NamedTuple):
    """Documents of one split, ready to be tokenized."""

    split: str
    texts: list[str]
    ids: list[str]
    sizes: list[int]  # UTF-8 bytes


@dataclass
class _Counts:
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class _Conversion:
    """The state of one unit being converted."""

    def __init__(self, job: ConvertUnit, unit: Unit, report: Report) -> None:
        self.job, self.unit, self.options = job, unit, job.options
        self.storage, self.reading = open_storage(job.out), _Reading(job, unit, report)
        self.encoder, self.filters, self.chunker = _tools(job.tokenizer, job.filters, self.options["chunk_length"],
                                                          self.options["cut_window"])
        self.counts = {split: _Counts() for split in (("train", "validation") if self.options["validation"] else ("train",))}
        self.skipped = {split: Counter[str]() for split in self.counts}  # by the reading thread, which shares no counts
        self.writers = {split: ShardGroupWriter(
            self.storage.scratch(), stem=f"shard.{unit.number:05d}", source=unit.source, chunker=self.chunker,
            shard_bytes=self.options["shard_size"], compression=self.options["compression"],
            place=functools.partial(_place, self.storage, split)) for split in self.counts}
        self.read = 0

    def run(self) -> dict[str, Any]:
        """The completion record."""
        try:
            for batch in _ahead(self._batches()):
                self._write(batch)
            shards = {split: writer.finish() for split, writer in self.writers.items()}
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise
        self.reading.count(0, 0, 0, last=True)
        return self._record(shards)

    def _batches(self) -> Iterator[_Batch]:
        """Batches of documents to keep, in order within each split; runs in the reading thread."""
        batches, waiting = {split: _Batch(split, [], [], []) for split in self.counts}, dict.fromkeys(self.counts, 0)
        copies = self._copies()
        for document in self.reading.documents():
            ordinal, self.read = self.read, self.read + 1
            encoded = document.text.encode()
            # by the text alone, so that copies of a document are on one side, wherever they come from
            is_validation = xxhash.xxh64_intdigest(encoded, seed=self.options["seed"]) < self.options["validation"] * 2**64
            batch = batches["validation" if is_validation else "train"]
            if not document.text or document.text.isspace():
                self.skipped[batch.split]["empty"] += 1
                continue
            if ordinal in copies:
                self.skipped[batch.split][DUPLICATE] += 1
                continue
            batch.texts.append(document.text)
            batch.ids.append(document.id)
            batch.sizes.append(len(encoded))
            waiting[batch.split] += len(encoded)
            if waiting[batch.split] >= _BATCH_BYTES or len(batch.texts) >= _BATCH_DOCUMENTS:
                yield batch
                batches[batch.split], waiting[batch.split] = _Batch(batch.split, [], [], []), 0
        yield from (batch for batch in batches.values() if batch.texts)

    def _copies(self) -> frozenset[int]:
        """Ordinals of the unit's documents that repeat earlier ones."""
        if not self.job.filters.deduplicate:
            return frozenset()
        path = self.storage.scratch() / f"drops.{self.unit.number:05d}.{os.getpid()}.npy"
        self.storage.get_file(drops_name(self.unit, self.job.base_key), path)
        try:
            return frozenset(read_drops(path).tolist())
        finally:
            path.unlink()

    def _write(self, batch: _Batch) -> None:
        counts = self.counts[batch.split]
        reasons = [self.filters.reason(text, id) for text, id in zip(batch.texts, batch.ids)]
        counts.dropped.update(reason for reason in reasons if reason is not None)
        keep = [reason is None for reason in reasons]
        texts, ids, sizes = (list(itertools.compress(values, keep)) for values in batch[1:])
        if not texts:
            return
        tokens, lengths = self.encoder.encode(texts)
        if not lengths.all():  # text of which the tokenizer's normalizer leaves nothing
            counts.dropped["empty"] += int((lengths == 0).sum())
            ids, sizes = (list(itertools.compress(values, lengths > 0)) for values in (ids, sizes))
            lengths = lengths[lengths > 0]
        if ids:
            self.writers[batch.split].write(ids, tokens, lengths)
        counts.documents += len(ids)
        counts.tokens += len(tokens)
        counts.bytes += sum(sizes)
        self.reading.count(len(ids), len(tokens), sum(sizes))

    def _record(self, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The completion record.

        Raises:
            RuntimeError: documents or tokens were lost or doubled; a bug, not an input.
        """
        splits = {}
        self.skipped["train"] += Counter({OVERSIZED: self.reading.meter.oversized})
        for split, counts in self.counts.items():
            counts.dropped += self.skipped[split]
            held = [sum(entry[key] for entry in shards[split]) for key in ("documents", "tokens")]
            if held != [counts.documents, counts.tokens]:
                raise RuntimeError(f"{self.unit.label}: shards of {split} hold (documents, tokens) {held}, "
                                   f"{[counts.documents, counts.tokens]} were given to them")
            splits[split] = {"documents": counts.documents, "chunks": sum(entry["samples"] for entry in shards[split]),
                             "tokens": counts.tokens, "bytes": counts.bytes,
                             "dropped": dict(sorted(counts.dropped.items())), "shards": shards[split]}
        read = self.read + self.reading.meter.oversized
        kept = sum(counts.documents + counts.dropped.total() for counts in self.counts.values())
        if kept != read:
            raise RuntimeError(f"{self.unit.label}: {read} documents read, {kept} written or dropped")
        return {"unit": self.unit.number, "key": record_key(self.job.base_key, self.unit), "source": self.unit.source,
                "read": read, "splits": splits}


def _place(storage: Storage, split: str, path: Path, basename: str) -> None:
    storage.put_file(path, f"{split}/{basename}")


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, made in a thread up to `_READ_AHEAD` before they are asked for."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="reading")
    try:
        ready = deque(thread.submit(next, items, None) for _ in range(_READ_AHEAD))
        while (item := ready.popleft().result()) is not None:
            ready.append(thread.submit(next, items, None))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
