"""Does one unit of a conversion: read, filter, split, tokenize, cut, write, and a completion record at the end.

It depends on unit and options alone: the same unit gives the same shards and record. The record is written
last. Reading goes on in one thread while another tokenizes, cuts and writes.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.encoder import TextEncoder
from ettin_foundry.corpus.executors import Report, Tick
from ettin_foundry.corpus.plan import SPLITS, ConvertOptions, Unit, record_key, record_name
from ettin_foundry.corpus.readers import read_parts
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data.storage import open_storage

log = logging.getLogger(__name__)
T = TypeVar("T")

_MOST_UNKNOWN = 0.25  # share of tokens: more are no odd characters, but another script than the tokenizer's
_BATCH_BYTES = 1 << 20  # text tokenized at a time: enough to make calls cheap, little enough to hold a few of
_BATCH_DOCUMENTS = 4096
_READ_AHEAD = 2  # batches
# what takes time to make, kept for the next unit
_encoder = functools.lru_cache(maxsize=1)(TextEncoder)
_chunker = functools.lru_cache(maxsize=1)(Chunker)


@dataclass(frozen=True)
class ConvertUnit:
    """Converts a unit and writes its record."""

    options: ConvertOptions
    sources: Mapping[str, Source]  # as found on this machine
    base_key: str  # the plan's
    tokenizer: str  # its name; it is made from its JSON, without transformers, whose import takes seconds
    tokenizer_json: str
    forbidden: tuple[int, ...]  # ids that no text may give: the special tokens
    made_with: str  # the versions of the libraries that shape the bytes

    def __call__(self, unit: Unit, report: Report) -> None:
        record = _Conversion(self, unit, report).run()
        open_storage(self.options.out).write_bytes(record_name(unit.number), json.dumps(record).encode() + b"\n")


class _Conversion:
    def __init__(self, job: ConvertUnit, unit: Unit, report: Report) -> None:
        self.job, self.unit, self.options = job, unit, job.options
        storage = open_storage(self.options.out)
        self.report, self.meter, self.read = report, Meter(), 0
        splits = SPLITS if self.options.validation else SPLITS[:1]
        self.counts = {split: Counter[str]() for split in splits}
        self.dropped = {split: Counter[str]() for split in splits}  # by the reading thread
        self.encoder = _encoder(job.tokenizer_json, forbidden=job.forbidden, engine=self.options.engine,
                                name=job.tokenizer)
        chunker = _chunker(job.tokenizer_json, self.options.chunk_length, self.options.cut_window)
        self.writers = {split: ShardGroupWriter(
            stem=f"shard.{unit.number:05d}", source=unit.source, chunker=chunker,
            shard_bytes=int(self.options.shard_size), compression=self.options.compression,
            place=lambda name, data, split=split: storage.write_bytes(f"{split}/{name}", data))  # type: ignore[misc]
            for split in splits}

    def run(self) -> dict[str, Any]:
        for split, batch in _ahead(self._batches()):
            self._write(split, batch)
        return self._record({split: writer.finish() for split, writer in self.writers.items()})

    def _batches(self) -> Iterator[tuple[str, list[tuple[str, str, int]]]]:
        """Text, id and UTF-8 bytes of documents to keep, of one split at a time; runs in the reading thread."""
        batches, held = {split: [] for split in self.counts}, Counter[str]()
        source = self.job.sources[self.unit.source]
        for text, name in read_parts(source, self.unit.parts, self.meter, self.options):
            self.read += 1
            encoded = text.encode()
            # by the text alone, so that copies of a document are on one side, wherever they come from
            digest = xxhash.xxh64_intdigest(encoded, seed=self.options.seed)
            split = "validation" if digest < self.options.validation * 2**64 else "train"
            if reason := self._why_dropped(text):
                self.dropped[split][reason] += 1
                continue
            batches[split].append((text, name, len(encoded)))
            held[split] += len(encoded)
            if held[split] >= _BATCH_BYTES or len(batches[split]) >= _BATCH_DOCUMENTS:
                yield split, batches[split]
                batches[split], held[split] = [], 0
        yield from ((split, batch) for split, batch in batches.items() if batch)

    def _why_dropped(self, text: str) -> str | None:
        least, most = self.options.min_characters, self.options.max_characters
        if not text.strip():
            return "empty"
        return "short" if len(text) < (least or 0) else "long" if most and len(text) > most else None

    def _write(self, split: str, batch: list[tuple[str, str, int]]) -> None:
        texts, ids, sizes = zip(*batch)
        tokens, lengths = self.encoder.encode(texts)
        kept = lengths > 0  # the tokenizer's normalizer may leave nothing of a text
        ids, sizes = (list[Any](itertools.compress(values, kept)) for values in (ids, sizes))
        if ids:
            self.writers[split].write(ids, tokens, lengths[kept])
        self.counts[split].update(documents=len(ids), tokens=len(tokens), bytes=sum(sizes), empty=len(texts) - len(ids),
                                  unknown=int(np.count_nonzero(tokens == self.encoder.unknown)))
        sums = [sum(of_split[key] for of_split in self.counts.values()) for key in ("documents", "tokens", "bytes")]
        self.report(Tick(sums[0], sums[1], sums[2], self.meter.position()))

    def _record(self, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The completion record; a RuntimeError where documents or tokens were lost or doubled, which is a bug."""
        left_out = {"oversized": self.meter.oversized, "unreadable": self.meter.unreadable}
        self.dropped["train"].update(left_out)
        splits, read = {}, self.read + sum(left_out.values())
        unknown, tokens = (sum(counts[key] for counts in self.counts.values()) for key in ("unknown", "tokens"))
        if tokens >= 1000 and unknown > _MOST_UNKNOWN * tokens:
            raise ValueError(f"{self.unit.label}: tokenizer {self.job.tokenizer} must know its characters, got "
                             f"{unknown} unknown of {tokens} tokens; take another, or one of --train-tokenizer")
        lost = {"documents": read, "tokens": tokens}
        for split, counts in self.counts.items():
            dropped = self.dropped[split] + Counter(empty=counts["empty"])
            held = {key: sum(entry[key] for entry in shards[split]) for key in ("documents", "samples", "tokens")}
            lost["documents"] -= held["documents"] + dropped.total()
            lost["tokens"] -= held["tokens"]
            splits[split] = {"documents": held["documents"], "chunks": held["samples"], "tokens": held["tokens"],
                             "bytes": counts["bytes"], "dropped": dict(sorted(dropped.items())),
                             **({"unknown": counts["unknown"]} if counts["unknown"] else {}), "shards": shards[split]}
        if self.meter.unreadable > 1:
            log.warning("%s: %d unreadable records were left out in all", self.unit.label, self.meter.unreadable)
        if any(lost.values()):
            raise RuntimeError(f"{self.unit.label}: more was read than written or dropped, by {lost}")
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
