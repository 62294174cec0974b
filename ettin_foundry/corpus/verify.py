"""Compares every byte of a dataset with what the dataset states of itself, and lists all that is wrong.

Checked are every shard's hash, layout, counts, lengths, packed rows and token range; index.json; files that nothing
names; the tokenizer; the small files against the data card. What is fetched or expanded lies in a temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich import filesize

from ettin_foundry.corpus.card import CARD, read_hashes
from ettin_foundry.data import INDEX, LENGTHS, MANIFEST
from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.cache import fetch_tokenizer
from ettin_foundry.data.inspect import Found, find_dataset
from ettin_foundry.data.mixture import MixtureSplit
from ettin_foundry.data.shards import MDSSplit

T = TypeVar("T")


@dataclass
class Report:
    """What was found: problems, each beginning with a file; notes on what is worth knowing and not wrong."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shards: int = 0
    num_bytes: int = 0
    counts: dict[str, tuple[int | None, int, int]] = field(default_factory=dict)  # split -> documents, chunks, tokens

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        text = f"{self.shards:,} shards, {filesize.decimal(self.num_bytes)}"
        for split, (documents, chunks, tokens) in self.counts.items():
            stated = "" if documents is None else f"{documents:,} documents, "
            text += f"; {split}: {stated}{chunks:,} chunks, {tokens:,} tokens"
        return text


def verify_dataset(location: str | os.PathLike[str], *, threads: int | None = None,
                   tick: Callable[[int], None] = lambda num_bytes: None) -> Report:
    """Checks a dataset, one split of it, or a mixture and all shards that it takes from, in a folder or behind a URL.

    `threads` shards at a time, as many as cores if None; `tick` gets the bytes of each that is done, from any thread.
    """
    found = find_dataset(location)
    check = _Check(found, tick)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool, \
            tempfile.TemporaryDirectory(prefix="ettin-") as scratch:
        for split in found.splits:
            check.check_split(split, Path(scratch), pool)
        check.check_tokenizer(Path(scratch))
    if found.whole:
        expected = check.check_card()
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

    def attempt(self, work: Callable[..., T], *arguments: Any) -> T | None:
        """The result; None, and a problem more, when it fails."""
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            self.report.problems.append(str(error))
            return None

    def check_split(self, split: str, scratch: Path, pool: ThreadPoolExecutor) -> None:
        first = len(self.report.problems)
        if (data := self.attempt(self.found.open, split, scratch)) is not None:
            self.manifests[split], totals = data.manifest, data.manifest["totals"]
            self.report.counts[split] = totals.get("documents"), totals["samples"], totals["tokens"]
            if isinstance(data, MDSSplit):
                self.attempt(data.check_index)
                files = [shard[key] for shard in data.manifest["shards"] for key in ("raw", "zip") if shard[key]]
                names = MANIFEST, INDEX, LENGTHS, *(file["basename"] for file in files)
                known = {f"{split}/{name}" for name in names}
                for name in sorted({name for name, _ in self.storage.list(f"{split}/")} - known):
                    self.wrong(name, f"is not named by {MANIFEST}; move it away")
            self._check_shards(data, pool)
        here, there = str(scratch / split), self.storage.where(split)
        self.report.problems[first:] = [text.replace(here, there) for text in self.report.problems[first:]]

    def _check_shards(self, data: Any, pool: ThreadPoolExecutor) -> None:
        def check(shard: int) -> int:
            num_bytes = self.attempt(data.check_shard, shard) or 0
            self.tick(num_bytes)
            return num_bytes

        shards = list(range(data.num_shards))
        if isinstance(data, MixtureSplit):  # each shard that it takes from once
            shards = np.unique(data.stored, axis=1, return_index=True)[1].tolist()
        sizes = [*pool.map(check, shards)]
        self.report.shards += len(sizes)
        self.report.num_bytes += sum(sizes)

    def check_tokenizer(self, scratch: Path) -> None:
        """tokenizer/ against the manifests' fingerprints."""
        if not self.found.whole and not self.storage.list("tokenizer/"):
            return
        try:
            fetch_tokenizer(scratch, self.storage.url)
            loaded = tokenizers.load(scratch / "tokenizer")
            for manifest in self.manifests.values():
                self.attempt(tokenizers.check, loaded, manifest["tokenizer"])
        except Exception as error:  # the tokenizers library raises plain Exception
            self.wrong("tokenizer", f"cannot be used ({error!s:.300})")

    def check_card(self) -> set[str]:
        """Every small file against the sha256 in the data card; the splits that the card states."""
        if not (hashes := self.attempt(read_hashes, self.storage)):
            self.report.notes.append(f"{self.storage.where(CARD)}: is no data card of ettin finalize; changes of small "
                                     "files may go unseen")
            return set()
        for name, stated in hashes.items():
            data = self.attempt(self.storage.read_bytes, name)
            if data is not None and (found := hashlib.sha256(data).hexdigest()) != stated:
                self.wrong(name, f"sha256 is {found}; {CARD} states {stated!r:.100}")
        return {name.removesuffix(f"/{MANIFEST}") for name in hashes if name.endswith(MANIFEST)}
