"""Compares every byte of a dataset with what the dataset states of itself, and lists all that is wrong.

Checked are every shard's hash, layout, counts, lengths, packed rows and token range; index.json; files that nothing
names; the tokenizer; the small files against plan, records and data card, where these are kept. Nothing is written, but
a mixture is opened as a loader opens it, which may expand compressed shards.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.corpus.card import CARD, read_block
from ettin_foundry.corpus.finalize import describe_splits
from ettin_foundry.corpus.plan import PLAN, Plan, read_plan, read_record, record_name
from ettin_foundry.data import INDEX, LENGTHS, MANIFEST
from ettin_foundry.data.cache import fetch_tokenizer
from ettin_foundry.data.inspect import Found, draw_samples, find_dataset
from ettin_foundry.data.mixture import MixtureSplit
from ettin_foundry.data.quantities import format_bytes
from ettin_foundry.data.shards import MDSSplit

_SAMPLES = 16  # chunks of each source and split that are searched for special tokens
_READERS = 16  # records of a remote dataset that are fetched at a time


@dataclass
class Report:
    """What was found: problems, each beginning with a file; notes on what is worth knowing and not wrong."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shards: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    counts: dict[str, tuple[int | None, int, int]] = field(default_factory=dict)  # split -> documents, chunks, tokens

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        text = (f"{self.shards:,} shards, {format_bytes(self.num_bytes)} in {self.seconds:.1f} s, "
                f"{self.num_bytes / 1e6 / max(self.seconds, 1e-9):,.0f} MB/s")
        for split, (documents, chunks, tokens) in self.counts.items():
            stated = "" if documents is None else f"{documents:,} documents, "
            text += f"; {split}: {stated}{chunks:,} chunks, {tokens:,} tokens"
        return text


def verify_dataset(location: str | os.PathLike[str], *, threads: int | None = None,
                   tick: Callable[[int], None] = lambda num_bytes: None) -> Report:
    """Checks a dataset, one split of it, or a mixture and all shards that it takes from.

    Args:
        location: folder or URL. Shards behind a URL are read into memory.
        threads: shards checked at a time; None takes every core that this process may use.
        tick: called with the bytes of each shard when it is done, from any thread.
    """
    found, begin = find_dataset(location), time.perf_counter()
    check = _Check(found, tick)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool, \
            tempfile.TemporaryDirectory(prefix="ettin-") as scratch:
        for split in found.splits:
            check.check_split(split, Path(scratch), pool)
        check.report.seconds = time.perf_counter() - begin
        check.check_tokenizer(Path(scratch))
    if found.whole:
        expected = check.check_records() | check.check_card()
        for split in sorted(expected ^ set(found.splits) if expected else ()):
            check.wrong(split, "the dataset has this split, but it is missing" if split in expected else
                        "is no split of this dataset; move it away")
    check.report.problems = list(dict.fromkeys(check.report.problems))
    return check.report


class _Check:
    """One run over one dataset: the report, and the manifests of the splits that could be opened."""

    def __init__(self, found: Found, tick: Callable[[int], None]) -> None:
        self.found, self.storage, self.tick, self.report = found, found.storage, tick, Report()
        self.manifests: dict[str, dict[str, Any]] = {}

    def wrong(self, name: str, text: str) -> None:
        self.report.problems.append(f"{self.storage.where(name)}: {text}")

    def note(self, name: str, text: str) -> None:
        self.report.notes.append(f"{self.storage.where(name)}: {text}")

    def attempt(self, work: Callable[[], Any]) -> Any:
        """The result; None, and a problem more, when it fails."""
        try:
            return work()
        except (ValueError, OSError) as error:
            self.report.problems.append(str(error))
            return None

    def check_split(self, split: str, scratch: Path, pool: ThreadPoolExecutor) -> None:
        first = len(self.report.problems)
        data = self.attempt(lambda: self.found.open(split, scratch))
        if data is not None:
            self.manifests[split], totals = data.manifest, data.manifest["totals"]
            self.report.counts[split] = totals.get("documents"), totals["samples"], totals["tokens"]
            if isinstance(data, MDSSplit):
                self.attempt(data.check_index)
                files = [file for shard in data.manifest["shards"] for file in (shard["raw"], shard["zip"]) if file]
                known = {f"{split}/{name}" for name in (MANIFEST, INDEX, LENGTHS, *(file["basename"] for file in files))}
                for name in sorted({name for name, _ in self.storage.list(f"{split}/")} - known):
                    self.wrong(name, f"is not named by {MANIFEST}; move it away")
            self._check_shards(data, pool)
            if self.storage.is_local:
                self._check_special_tokens(data)
        here, there = str(scratch / split), self.storage.where(split)
        self.report.problems[first:] = [text.replace(here, there) for text in self.report.problems[first:]]

    def _check_shards(self, data: Any, pool: ThreadPoolExecutor) -> None:
        def check(shard: int) -> int:
            num_bytes = self.attempt(lambda: data.check_shard(shard)) or 0
            self.tick(num_bytes)
            return num_bytes

        shards, partial = list(range(data.num_shards)), list[int]()
        if isinstance(data, MixtureSplit):  # each shard that it takes from once; partial ones by one thread, which they need
            once = np.unique(data.stored, axis=1, return_index=True)[1]
            part = data.stored[2, once]
            shards, partial = once[part < 0].tolist(), once[part >= 0].tolist()
        sizes = [*pool.map(check, shards), *map(check, partial)]
        self.report.shards += len(sizes)
        self.report.num_bytes += sum(sizes)

    def _check_special_tokens(self, data: Any) -> None:
        """Chunks hold plain tokens only; a few of each source are looked at."""
        special = {n for n in (data.tokenizer.get("special_ids") or {}).values() if isinstance(n, int)}
        for sample in self.attempt(lambda: draw_samples(data, per_source=_SAMPLES)) or ():
            if inside := special & set(sample["tokens"].tolist()):
                self.report.problems.append(f"{data.local}: part {sample['part']} of {sample['doc']!r:.100} holds the "
                                            f"special token {min(inside)}; convert again")

    def check_tokenizer(self, scratch: Path) -> None:
        """tokenizer/ against the manifests' fingerprints."""
        from ettin_foundry.data.tokenizer import check, load

        if not self.storage.list("tokenizer/"):
            (self.wrong if self.found.whole else self.note)("tokenizer", "missing; put the original there")
            return
        try:
            if not self.storage.is_local:
                fetch_tokenizer(scratch, self.storage.url)
            loaded = load((Path(self.storage.url) if self.storage.is_local else scratch) / "tokenizer")
            for manifest in self.manifests.values():
                self.attempt(lambda manifest=manifest: check(loaded, manifest["tokenizer"]))
        except Exception as error:  # the tokenizers library raises plain Exception
            self.wrong("tokenizer", f"cannot be used ({error!s:.300})")

    def check_records(self) -> set[str]:
        """The small files against what plan and completion records make; the splits that the plan states."""
        plan, present = self.attempt(lambda: read_plan(self.storage)), {name for name, _ in self.storage.list("units/")}
        units = plan.units if plan is not None else ()
        for name in sorted(present - {record_name(unit.number) for unit in units}):
            self.wrong(name, f"belongs to no unit of {PLAN}; move it away, or put the plan back")
        if plan is None:
            return set()
        done = [unit.number for unit in units if record_name(unit.number) in present]
        with ThreadPoolExecutor(_READERS) as pool:
            records = list(pool.map(lambda n: self.attempt(lambda: read_record(self.storage, plan, n)), done))
        if len(done) < len(units):
            self.note(PLAN, f"{len(units) - len(done)} of {len(units)} units are not done yet; convert again")
        elif None not in records:
            self._compare(plan, records)
        return {"train", "validation"} if plan.options.get("validation") else {"train"}

    def _compare(self, plan: Plan, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            manifests, files = describe_splits(plan, records)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            return self.wrong("units", f"a record is not what the converter writes ({error!r:.200}); convert again")
        for name, data in files.items():
            split, _, base = name.partition("/")
            if base == MANIFEST:
                found = self.manifests.get(split, manifests[split])
                keys = [key for key, value in manifests[split].items() if key != "code_version" and found.get(key) != value]
            else:
                keys = [base] if self.storage.exists(name) and self.storage.read_bytes(name) != data else []
            if keys:
                self.wrong(name, f"{', '.join(keys)} differs from {PLAN} and units/; run ettin finalize")

    def check_card(self) -> set[str]:
        """Every small file against the sha256 in the data card; the splits that the card states."""
        block = self.attempt(lambda: read_block(self.storage))
        if block is None:
            self.note(CARD, "is no data card of ettin finalize; not every change of a small file is found")
            return set()
        for name, stated in block["files"].items():
            data = self.attempt(lambda name=name: self.storage.read_bytes(name))
            if data is not None and (found := hashlib.sha256(data).hexdigest()) != stated:
                self.wrong(name, f"sha256 is {found}; {CARD} states {stated!r:.100}")
        return set(block["splits"])
