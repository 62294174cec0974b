"""Does one unit of a conversion: read, filter, split, tokenize, cut, write, and a completion record at the end.

Runs in worker processes, on one machine or many, and depends on nothing but the unit and the options: the same unit gives
the same shards and the same record. The record is written last, so a unit is done or it is not. Reading goes on in one
thread while another tokenizes and a third one writes shards.
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
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.encoder import Engine, TextEncoder
from ettin_foundry.corpus.executors import Report, Tick
from ettin_foundry.corpus.filters import DUPLICATE, OVERSIZED, FilterOptions, read_drops, write_hashes
from ettin_foundry.corpus.plan import Unit, record_key, record_name
from ettin_foundry.corpus.readers import Document, ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data.storage import open_storage

T = TypeVar("T")

_BATCH_BYTES = 1 << 20  # text tokenized at a time: enough to make calls cheap, little enough to hold a few of
_BATCH_DOCUMENTS = 4096
_READ_AHEAD = 2  # batches
_TICK_SECONDS = 0.5


class TokenizerSpec(NamedTuple):
    """A tokenizer as workers need it: without transformers, whose import takes seconds."""

    name: str
    json: str
    forbidden: tuple[int, ...]  # ids that no text may give: the special tokens
    vocab_size: int
    engine: Engine


def work_name(kind: str, unit: Unit, base_key: str) -> str:
    """`hashes` of a unit's documents, or `drops`, ordinals of those that repeat earlier ones; tells input and options."""
    return f"work/{kind}/{unit.number:05d}.{record_key(base_key, unit)}.npy"


@dataclass(frozen=True)
class HashUnit:
    """Writes a hash of every document of a unit, in reading order, from which `find_duplicates` finds the copies."""

    out: str  # the dataset's folder or URL
    options: Mapping[str, Any]  # the plan's
    sources: Mapping[str, Source]  # as found on this machine
    base_key: str  # the plan's

    def __call__(self, unit: Unit, report: Report) -> int:
        storage, reading = open_storage(self.out), _Reading(self, unit, report)
        hashes = bytearray()
        for document in reading.documents():
            hashes += xxhash.xxh3_128_digest(document.text.encode())
            reading.count(Tick(1))
        path = storage.scratch() / f"hashes.{unit.number:05d}.{os.getpid()}.npy"
        write_hashes(path, hashes)
        storage.put_file(path, work_name("hashes", unit, self.base_key))
        return 0


@dataclass(frozen=True)
class ConvertUnit(HashUnit):
    """Converts a unit and writes its record; returns the number of tokens."""

    tokenizer: TokenizerSpec
    filters: FilterOptions

    def __call__(self, unit: Unit, report: Report) -> int:
        record = _Conversion(self, unit, report).run()
        open_storage(self.out).write_bytes(record_name(unit.number), json.dumps(record).encode() + b"\n")
        return sum(counts["tokens"] for counts in record["splits"].values())


class _Reading:
    """The documents of a unit, and reports of how far it is."""

    def __init__(self, job: HashUnit, unit: Unit, report: Report) -> None:
        self.options, self.source, self.unit, self.report = job.options, job.sources[unit.source], unit, report
        self.meter = Meter()
        self.reported, self.position, self.waiting = 0.0, 0, Tick()

    def documents(self) -> Iterator[Document]:
        """The documents in order, up to the one in which `limit_bytes` is reached."""
        num_bytes, limit = 0, self.options["limit_bytes"]
        for document in read_parts(self.source, self.unit.parts, self.meter, ReadOptions.of(self.options)):
            yield document
            if limit is not None and (num_bytes := num_bytes + len(document.text.encode())) >= limit:
                return

    def count(self, tick: Tick, *, last: bool = False) -> None:
        """Reports about twice a second."""
        self.waiting = self.waiting.plus(tick)
        if last or time.monotonic() - self.reported > _TICK_SECONDS:
            position = self.meter.position()
            self.report(self.waiting._replace(file_bytes=position - self.position))
            self.reported, self.position, self.waiting = time.monotonic(), position, Tick()


@functools.lru_cache(maxsize=1)
def _tools(spec: TokenizerSpec, chunk_length: int, cut_window: float) -> tuple[TextEncoder, Chunker]:
    """What takes time to make, kept for the next unit."""
    encoder = TextEncoder(spec.json, forbidden=spec.forbidden, vocab_size=spec.vocab_size, engine=spec.engine,
                          name=spec.name)
    return encoder, Chunker(spec.json, chunk_length, cut_window)


class _Batch(NamedTuple):
    """Documents of one split, ready to be tokenized."""

    split: str
    texts: list[str]
    ids: list[str]
    sizes: list[int]  # UTF-8 bytes


class _Conversion:
    """The state of one unit being converted."""

    def __init__(self, job: ConvertUnit, unit: Unit, report: Report) -> None:
        self.job, self.unit, self.options, self.storage = job, unit, job.options, open_storage(job.out)
        self.reading, self.read = _Reading(job, unit, report), 0
        splits = ("train", "validation") if self.options["validation"] else ("train",)
        # what is skipped is counted by the reading thread, which shares no counts
        self.counts, self.dropped, self.skipped = ({split: Counter[str]() for split in splits} for _ in range(3))
        self.encoder, chunker = _tools(job.tokenizer, self.options["chunk_length"], self.options["cut_window"])
        self.writers = {split: ShardGroupWriter(
            self.storage.scratch(), stem=f"shard.{unit.number:05d}", source=unit.source, chunker=chunker,
            shard_bytes=self.options["shard_size"], compression=self.options["compression"],
            place=lambda path, name, split=split: self.storage.put_file(path, f"{split}/{name}"))  # type: ignore[misc]
            for split in splits}

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
        self.reading.count(Tick(), last=True)
        return self._record(shards)

    def _batches(self) -> Iterator[_Batch]:
        """Batches of documents to keep, in order within each split; runs in the reading thread."""
        batches, waiting = {split: _Batch(split, [], [], []) for split in self.counts}, Counter[str]()
        copies = self._copies()
        for ordinal, document in enumerate(self.reading.documents()):
            self.read += 1
            encoded = document.text.encode()
            # by the text alone, so that copies of a document are on one side, wherever they come from
            digest = xxhash.xxh64_intdigest(encoded, seed=self.options["seed"])
            split = "validation" if digest < self.options["validation"] * 2**64 else "train"
            if not document.text or document.text.isspace():
                self.skipped[split]["empty"] += 1
            elif ordinal in copies:
                self.skipped[split][DUPLICATE] += 1
            else:
                batch = batches[split]
                batch.texts.append(document.text)
                batch.ids.append(document.id)
                batch.sizes.append(len(encoded))
                waiting[split] += len(encoded)
                if waiting[split] >= _BATCH_BYTES or len(batch.texts) >= _BATCH_DOCUMENTS:
                    yield batch
                    batches[split], waiting[split] = _Batch(split, [], [], []), 0
        yield from (batch for batch in batches.values() if batch.texts)

    def _copies(self) -> frozenset[int]:
        """Ordinals of the unit's documents that repeat earlier ones."""
        if not self.job.filters.deduplicate:
            return frozenset()
        path = self.storage.scratch() / f"drops.{self.unit.number:05d}.{os.getpid()}.npy"
        self.storage.get_file(work_name("drops", self.unit, self.job.base_key), path)
        copies = frozenset(read_drops(path).tolist())
        path.unlink()
        return copies

    def _write(self, batch: _Batch) -> None:
        dropped = self.dropped[batch.split]
        reasons = [self.job.filters.reason(text, id) for text, id in zip(batch.texts, batch.ids)]
        dropped.update(reason for reason in reasons if reason is not None)
        keep = [reason is None for reason in reasons]
        texts, ids, sizes = (list[Any](itertools.compress(values, keep)) for values in batch[1:])
        if not texts:
            return
        tokens, lengths = self.encoder.encode(texts)
        if not lengths.all():  # text of which the tokenizer's normalizer leaves nothing
            dropped["empty"] += int((lengths == 0).sum())
            ids, sizes = (list[Any](itertools.compress(values, lengths > 0)) for values in (ids, sizes))
            lengths = lengths[lengths > 0]
        if ids:
            self.writers[batch.split].write(ids, tokens, lengths)
        self.counts[batch.split].update(documents=len(ids), tokens=len(tokens), bytes=sum(sizes))
        self.reading.count(Tick(len(ids), len(tokens), sum(sizes)))

    def _record(self, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The completion record; a RuntimeError where documents or tokens were lost or doubled, which is a bug."""
        splits, read = {}, self.read + self.reading.meter.oversized
        self.skipped["train"][OVERSIZED] = self.reading.meter.oversized
        for split, counts in self.counts.items():
            dropped = self.dropped[split] + self.skipped[split]
            held = {key: sum(entry[key] for entry in shards[split]) for key in ("documents", "samples", "tokens")}
            if (held["documents"], held["tokens"]) != (counts["documents"], counts["tokens"]):
                raise RuntimeError(f"{self.unit.label}: shards of {split} hold {held}, {counts} were given to them")
            splits[split] = {"documents": held["documents"], "chunks": held["samples"], "tokens": held["tokens"],
                             "bytes": counts["bytes"], "dropped": dict(sorted(dropped.items())),
                             "shards": shards[split]}
        if (kept := sum(s["documents"] + sum(s["dropped"].values()) for s in splits.values())) != read:
            raise RuntimeError(f"{self.unit.label}: {read} documents read, {kept} written or dropped")
        return {"unit": self.unit.number, "key": record_key(self.job.base_key, self.unit),
                "source": self.unit.source, "read": read, "splits": splits}


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
