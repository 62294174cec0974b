"""Does one unit of a conversion: read, filter, split, tokenize, cut, write, and say so in a completion record.

Runs in worker processes, on one machine or many, and depends on nothing but the unit and the options: the same unit
gives the same shards and the same record. The record is written last and at once, so a unit is done or it is not.
Reading goes on in a thread while the unit's own thread tokenizes, and shards are hashed, synced and uploaded in another.
Which units there are is units.py's work; running them is pool.py's, ray_pool.py's or an array job's.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ettin_foundry.corpus.chunking import Chunker
from ettin_foundry.corpus.encoder import Engine, TextEncoder
from ettin_foundry.corpus.filters import DUPLICATE, OVERSIZED, FilterChain, FilterOptions
from ettin_foundry.corpus.progress import Tick
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.unit_hashes import load_drops
from ettin_foundry.corpus.unit_io import Ticker, ahead, documents_of
from ettin_foundry.corpus.units import Unit, record_key, record_name
from ettin_foundry.corpus.writer import ShardGroupWriter
from ettin_foundry.data.storage import Storage, open_storage

__all__ = ["ConvertUnit", "TokenizerSpec"]

Report = Callable[[Tick], None]
_BATCH_BYTES = 1 << 20  # text tokenized at a time: enough to make calls cheap, little enough to hold a few of
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as workers need it: without transformers, whose import takes seconds."""

    name: str
    json: str
    forbidden: tuple[int, ...]
    """Ids that no text may give: the special tokens."""
    vocab_size: int
    engine: Engine = "auto"


class _Texts(NamedTuple):
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
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, number: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + number


@functools.lru_cache(maxsize=1)
def _encoder(spec: TokenizerSpec) -> TextEncoder:
    return TextEncoder(spec.json, forbidden=spec.forbidden, vocab_size=spec.vocab_size, engine=spec.engine,
                       name=spec.name)


@functools.lru_cache(maxsize=1)
def _chunker(spec: TokenizerSpec, chunk_length: int, cut_window: float) -> Chunker:
    return Chunker(spec.json, chunk_length, cut_window)


@functools.lru_cache(maxsize=1)
def _filters(options: FilterOptions) -> FilterChain:
    return FilterChain(options)


def _place(storage: Storage, split: str, path: Path, basename: str) -> None:
    storage.put_file(path, f"{split}/{basename}")


@dataclass(frozen=True)
class ConvertUnit:
    """Picklable; called with a unit by whoever runs it.

    Attributes:
        out: the set's folder or URL.
        options: the plan's options.
        sources: name -> source, as found on this machine.
        tokenizer: what tokenizes.
        filters: which documents are kept.
        base_key: the plan's.
    """

    out: str
    options: Mapping[str, Any]
    sources: Mapping[str, Source]
    tokenizer: TokenizerSpec
    filters: FilterOptions
    base_key: str

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Does the unit and writes its record.

        Raises:
            ValueError, OSError: the input cannot be converted; names file and record.
        """
        record = _Conversion(self, unit, report).run()
        open_storage(self.out).write_bytes(record_name(unit.number), json.dumps(record).encode() + b"\n")
        return {"tokens": sum(counts["tokens"] for counts in record["splits"].values())}

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "validation") if self.options["validation"] else ("train",)


class _Conversion:
    """The state of one unit being done."""

    def __init__(self, job: ConvertUnit, unit: Unit, report: Report) -> None:
        self.job, self.unit = job, unit
        self.storage = open_storage(job.out)
        self.meter = Meter()
        self.ticker = Ticker(report, self.meter, unit)
        self.counts = {split: _Counts() for split in job.splits}
        self.encoder = _encoder(job.tokenizer)
        self.chain = _filters(job.filters)
        self.drops, self.hashed = load_drops(self.storage, unit, job.base_key) if job.filters.deduplicate else (None, 0)
        self.skipped = {split: _Counts() for split in job.splits}  # by the reading thread, which shares nothing it writes
        self.threshold = job.options["validation"] * 2**64
        self.read = 0

    def run(self) -> dict[str, Any]:
        options = self.job.options
        scratch = self.storage.scratch()
        self.writers = {split: ShardGroupWriter(
            scratch, stem=f"shard.{self.unit.number:05d}", source=self.unit.source,
            chunker=_chunker(self.job.tokenizer, options["chunk_length"], options["cut_window"]),
            shard_bytes=options["shard_size"],
            compression=options["compression"], place=functools.partial(_place, self.storage, split))
            for split in self.job.splits}
        try:
            for item in ahead(self._prepared()):
                self._write(item)
            shards = {split: writer.finish() for split, writer in self.writers.items()}
        except BaseException:
            for writer in self.writers.values():
                writer.abort()
            raise
        self.ticker.flush()
        return self._record(shards)

    def _prepared(self) -> Iterator[_Texts]:
        """Batches of documents to keep, in order within each split; runs in the reading thread."""
        open_batches = {split: _Texts(split, [], [], []) for split in self.counts}
        waiting = dict.fromkeys(self.counts, 0)
        for document in documents_of(self.unit, self.job.sources[self.unit.source], self.job.options, self.meter):
            ordinal, self.read = self.read, self.read + 1
            text = document.text
            encoded = text.encode()
            split = self._split(xxhash.xxh64_intdigest(encoded, seed=self.job.options["seed"]))
            if not text or text.isspace():
                self.skipped[split].drop("empty")
                continue
            if self._is_duplicate(ordinal):
                self.skipped[split].drop(DUPLICATE)
                continue
            batch = open_batches[split]
            batch.texts.append(text)
            batch.ids.append(document.id)
            batch.sizes.append(len(encoded))
            waiting[split] += len(encoded)
            if waiting[split] >= _BATCH_BYTES or len(batch.texts) >= _BATCH_DOCUMENTS:
                yield batch
                open_batches[split], waiting[split] = _Texts(split, [], [], []), 0
        yield from (batch for batch in open_batches.values() if batch.texts)

    def _split(self, digest: int) -> str:
        """By the text alone, so that copies of a document are on one side, wherever they come from."""
        return "validation" if digest < self.threshold else "train"

    def _is_duplicate(self, ordinal: int) -> bool:
        if self.drops is None:
            return False
        at = int(np.searchsorted(self.drops, ordinal))
        return at < len(self.drops) and int(self.drops[at]) == ordinal

    def _filtered(self, batch: _Texts) -> _Texts:
        """The documents of a batch that the filters keep; the others are counted."""
        reasons = [self.chain.reason(text, id) for text, id in zip(batch.texts, batch.ids)]
        for reason in reasons:
            if reason is not None:
                self.counts[batch.split].drop(reason)
        keep = [reason is None for reason in reasons]
        return _Texts(batch.split, list(itertools.compress(batch.texts, keep)), list(itertools.compress(batch.ids, keep)),
                      list(itertools.compress(batch.sizes, keep)))

    def _write(self, batch: _Texts) -> None:
        batch = self._filtered(batch)
        if not batch.texts:
            return
        tokens, lengths = self.encoder.encode(batch.texts)
        counts, ids, sizes = self.counts[batch.split], batch.ids, np.array(batch.sizes)
        if not lengths.all():  # text of which the tokenizer's normalizer leaves nothing
            kept = lengths > 0
            counts.drop("empty", int((~kept).sum()))
            ids = [doc for doc, keep in zip(ids, kept) if keep]
            lengths, sizes = lengths[kept], sizes[kept]
        self._count(batch.split, ids, tokens, lengths, int(sizes.sum()))

    def _count(self, split: str, ids: list[str], tokens: np.ndarray, lengths: np.ndarray, num_bytes: int) -> None:
        if ids:
            self.writers[split].write(ids, tokens, lengths)
        counts = self.counts[split]
        counts.documents += len(ids)
        counts.tokens += len(tokens)
        counts.bytes += num_bytes
        self.ticker.add(documents=len(ids), tokens=len(tokens), text_bytes=num_bytes)

    def _record(self, shards: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """The completion record.

        Raises:
            RuntimeError: documents or tokens were lost or doubled; a bug, not an input.
        """
        splits = {}
        if self.meter.oversized:
            self.skipped["train"].drop(OVERSIZED, self.meter.oversized)
        for split, counts in self.counts.items():
            for reason, number in self.skipped[split].dropped.items():
                counts.drop(reason, number)
            held = sum(entry["tokens"] for entry in shards[split]), sum(entry["documents"] for entry in shards[split])
            if held != (counts.tokens, counts.documents):
                raise RuntimeError(f"{self.unit.label}: shards of {split} hold (tokens, documents) {held}, "
                                   f"{(counts.tokens, counts.documents)} were given to them")
            splits[split] = {"documents": counts.documents, "chunks": sum(entry["samples"] for entry in shards[split]),
                             "tokens": counts.tokens, "bytes": counts.bytes,
                             "dropped": dict(sorted(counts.dropped.items())), "shards": shards[split]}
        if self.drops is not None and self.read != self.hashed:
            raise ValueError(f"{self.unit.label}: {self.read} documents read, {self.hashed} when copies were looked for; "
                             "the input was changed meanwhile. Restore it, or convert into another --out")
        kept = sum(counts.documents + sum(counts.dropped.values()) for counts in self.counts.values())
        read = self.read + self.meter.oversized
        if kept != read:
            raise RuntimeError(f"{self.unit.label}: {read} documents read, {kept} written or dropped")
        return {"unit": self.unit.number, "key": record_key(self.job.base_key, self.unit),
                "source": self.unit.source, "read": read, "splits": splits}
