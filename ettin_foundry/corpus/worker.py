"""Does one unit of a conversion: read, filter, split, tokenize, cut, write, and a completion record at the end.

Runs in worker processes, on one machine or many, and depends on nothing but the unit and the options: the same unit
gives the same shards and the same record. The record is written last, so a unit is done or it is not. Reading goes on
in one thread while another tokenizes and a third one writes shards.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.encoder import Engine, TextEncoder
from ettin_foundry.corpus.executors import Report, Tick
from ettin_foundry.corpus.filters import DUPLICATE, OVERSIZED, UNREADABLE, FilterOptions, read_drops, write_hashes
from ettin_foundry.corpus.plan import SPLITS, Unit, record_key, record_name
from ettin_foundry.corpus.readers import Document, ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data.storage import open_storage

T = TypeVar("T")

_MOST_UNKNOWN = 0.25  # share of tokens: more are no odd characters, but another script than the tokenizer's
_BATCH_BYTES = 1 << 20  # text tokenized at a time: enough to make calls cheap, little enough to hold a few of
_BATCH_DOCUMENTS = 4096
_READ_AHEAD = 2  # batches


class TokenizerSpec(NamedTuple):
    """A tokenizer as workers need it: without transformers, whose import takes seconds."""

    name: str
    json: str
    forbidden: tuple[int, ...]  # ids that no text may give: the special tokens
    engine: Engine


def work_name(kind: str, unit: Unit, base_key: str) -> str:
    """Where `hashes` of a unit's documents are, or `drops`, ordinals of those that repeat earlier ones."""
    return f"work/{kind}/{unit.number:05d}.{record_key(base_key, unit)}.npy"


@dataclass(frozen=True)
class HashUnit:
    """Writes a hash of every document of a unit, in reading order, from which `find_duplicates` finds the copies."""

    out: str  # the dataset's folder or URL
    options: Mapping[str, Any]  # the plan's
    sources: Mapping[str, Source]  # as found on this machine
    base_key: str  # the plan's

    def __call__(self, unit: Unit, report: Report) -> int:
        storage, meter, hashes = open_storage(self.out), Meter(), bytearray()
        for number, document in enumerate(self.documents(unit, meter), 1):
            hashes += xxhash.xxh3_128_digest(document.text.encode())
            if number % 256 == 0:
                report(Tick(number, file_bytes=meter.position()))
        path = storage.scratch() / f"hashes.{unit.number:05d}.{os.getpid()}.npy"
        write_hashes(path, hashes)
        storage.put_file(path, work_name("hashes", unit, self.base_key))
        return 0

    def documents(self, unit: Unit, meter: Meter) -> Iterator[Document]:
        """The documents of a unit in order, up to the one in which `limit_bytes` is reached."""
        num_bytes, limit = 0, self.options["limit_bytes"]
        for document in read_parts(self.sources[unit.source], unit.parts, meter, ReadOptions.of(self.options)):
            yield document
            if limit is not None and (num_bytes := num_bytes + len(document.text.encode())) >= limit:
                return


@dataclass(frozen=True)
class ConvertUnit(HashUnit):
    """Converts a unit and writes its record; returns the number of tokens."""

    tokenizer: TokenizerSpec
    filters: FilterOptions
    made_with: str  # the versions of the libraries that shape the bytes

    def __call__(self, unit: Unit, report: Report) -> int:
        record = _Conversion(self, unit, report).run()
        open_storage(self.out).write_bytes(record_name(unit.number), json.dumps(record).encode() + b"\n")
        return sum(counts["tokens"] for counts in record["splits"].values())


@functools.lru_cache(maxsize=1)
def _tools(spec: TokenizerSpec, chunk_length: int, cut_window: float) -> tuple[TextEncoder, Chunker]:
    """What takes time to make, kept for the next unit."""
    encoder = TextEncoder(spec.json, forbidden=spec.forbidden, engine=spec.engine, name=spec.name)
    return encoder, Chunker(spec.json, chunk_length, cut_window)


class _Batch:
    """Documents of one split, ready to be tokenized."""

    def __init__(self, split: str) -> None:
        self.split, self.num_bytes = split, 0
        self.texts, self.ids, self.sizes = list[str](), list[str](), list[int]()  # sizes: UTF-8 bytes

    def add(self, document: Document, size: int) -> bool:
        """Whether it is full now."""
        self.texts.append(document.text)
        self.ids.append(document.id)
        self.sizes.append(size)
        self.num_bytes += size
        return self.num_bytes >= _BATCH_BYTES or len(self.texts) >= _BATCH_DOCUMENTS


class _Conversion:
    def __init__(self, job: ConvertUnit, unit: Unit, report: Report) -> None:
        self.job, self.unit, self.options, self.storage = job, unit, job.options, open_storage(job.out)
        self.report, self.meter, self.read = report, Meter(), 0
        splits = SPLITS if self.options["validation"] else SPLITS[:1]
        # what is skipped is counted by the reading thread, which shares no counts
        self.counts, self.dropped, self.skipped = ({split: Counter[str]() for split in splits} for _ in range(3))
        self.encoder, chunker = _tools(job.tokenizer, self.options["chunk_length"], self.options["cut_window"])
        self.writers = {split: ShardGroupWriter(
            self.storage.scratch(), stem=f"shard.{unit.number:05d}", source=unit.source, chunker=chunker,
            shard_bytes=self.options["shard_size"], compression=self.options["compression"],
            place=lambda path, name, split=split: self.storage.put_file(path, f"{split}/{name}"))  # type: ignore[misc]
            for split in splits}

    def run(self) -> dict[str, Any]:
        try:
            for batch in _ahead(self._batches()):
                self._write(batch)
            shards = {split: writer.finish() for split, writer in self.writers.items()}
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise
        return self._record(shards)

    def _batches(self) -> Iterator[_Batch]:
        """Batches of documents to keep, in order within each split; runs in the reading thread."""
        batches, copies = {split: _Batch(split) for split in self.counts}, self._copies()
        for ordinal, document in enumerate(self.job.documents(self.unit, self.meter)):
            self.read += 1
            encoded = document.text.encode()
            # by the text alone, so that copies of a document are on one side, wherever they come from
            digest = xxhash.xxh64_intdigest(encoded, seed=self.options["seed"])
            split = "validation" if digest < self.options["validation"] * 2**64 else "train"
            if not document.text or document.text.isspace():
                self.skipped[split]["empty"] += 1
            elif ordinal in copies:
                self.skipped[split][DUPLICATE] += 1
            elif batches[split].add(document, len(encoded)):
                yield batches[split]
                batches[split] = _Batch(split)
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
        dropped, texts, ids, sizes = self.dropped[batch.split], batch.texts, batch.ids, batch.sizes
        reasons = [self.job.filters.reason(text, id) for text, id in zip(texts, ids)]
        if any(reasons):
            dropped.update(filter(None, reasons))
            keep = [reason is None for reason in reasons]
            texts, ids, sizes = (list[Any](itertools.compress(values, keep)) for values in (texts, ids, sizes))
        if not texts:
            return
        tokens, lengths = self.encoder.encode(texts)
        if not lengths.all():  # text of which the tokenizer's normalizer leaves nothing
            dropped["empty"] += int((lengths == 0).sum())
            ids, sizes = (list[Any](itertools.compress(values, lengths > 0)) for values in (ids, sizes))
            lengths = lengths[lengths > 0]
        if ids:
            self.writers[batch.split].write(ids, tokens, lengths)
        unknown = int(np.count_nonzero(tokens == self.encoder.unknown))
        self.counts[batch.split].update(documents=len(ids), tokens=len(tokens), bytes=sum(sizes), unknown=unknown)
        sums = [sum(of_split[key] for of_split in self.counts.values()) for key in ("documents", "tokens", "bytes")]
        self.report(Tick(sums[0], sums[1], sums[2], self.meter.position()))

    def _record(self, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The completion record; a RuntimeError where documents or tokens were lost or doubled, which is a bug."""
        left_out = {OVERSIZED: self.meter.oversized, UNREADABLE: self.meter.unreadable}
        splits, read = {}, self.read + sum(left_out.values())
        self.skipped["train"].update(left_out)
        unknown, tokens = (sum(counts[key] for counts in self.counts.values()) for key in ("unknown", "tokens"))
        if tokens >= 1000 and unknown > _MOST_UNKNOWN * tokens:
            raise ValueError(f"{self.unit.label}: tokenizer {self.job.tokenizer.name} must know its characters, got "
                             f"{unknown} unknown of {tokens} tokens; take another, or one of --train-tokenizer")
        for split, counts in self.counts.items():
            dropped = self.dropped[split] + self.skipped[split]
            held = {key: sum(entry[key] for entry in shards[split]) for key in ("documents", "samples", "tokens")}
            if (held["documents"], held["tokens"]) != (counts["documents"], counts["tokens"]):
                raise RuntimeError(f"{self.unit.label}: shards of {split} hold {held}, {counts} were given to them")
            splits[split] = {"documents": held["documents"], "chunks": held["samples"], "tokens": held["tokens"],
                             "bytes": counts["bytes"], "dropped": dict(sorted(dropped.items())),
                             **({"unknown": counts["unknown"]} if counts["unknown"] else {}), "shards": shards[split]}
        if (kept := sum(s["documents"] + sum(s["dropped"].values()) for s in splits.values())) != read:
            raise RuntimeError(f"{self.unit.label}: {read} documents read, {kept} written or dropped")
        return {"unit": self.unit.number, "key": record_key(self.job.base_key, self.unit),
                "source": self.unit.source, "made_with": self.job.made_with, "read": read, "splits": splits}


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
