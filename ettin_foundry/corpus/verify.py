"""Compares every byte of a dataset with what the dataset states of itself, and lists all that is wrong.

Checked are every shard's hash, layout, counts, lengths, packed rows and token range; index.json; files that nothing
names; the tokenizer; the small files against the data card. What is fetched or expanded lies in a temporary folder.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from rich import filesize

from ettin_foundry.corpus.finalize import CARD, read_hashes
from ettin_foundry.data import INDEX, LENGTHS, MANIFEST
from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.cache import fetch_tokenizer
from ettin_foundry.data.inspect import Found, find_dataset
from ettin_foundry.data.mixture import MixtureSplit
from ettin_foundry.data.storage import Storage

T = TypeVar("T")


class Report:
    """What was found: problems, each beginning with a file; notes on what is worth knowing and not wrong."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.problems, self.notes = storage, list[str](), list[str]()
        self.shards = self.num_bytes = 0
        self.counts = dict[str, tuple[int | None, int, int]]()  # split -> documents, chunks, tokens

    @property
    def ok(self) -> bool:
        return not self.problems

    def wrong(self, name: str, text: str) -> None:
        self.problems.append(f"{self.storage.where(name)}: {text}")

    def attempt(self, work: Callable[..., T], *arguments: Any) -> T | None:
        """The result; None, and a problem more, when it fails."""
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
            return None

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
    report = Report(found.storage)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool, \
            tempfile.TemporaryDirectory(prefix="ettin-") as scratch:
        opened = [_check_split(report, found, split, Path(scratch), pool, tick) for split in found.splits]
        _check_tokenizer(report, found, Path(scratch), [data.tokenizer for data in opened if data is not None])
    if found.whole:
        expected = _check_card(report)
        for split in sorted(expected ^ set(found.splits) if expected else ()):
            report.wrong(split, "the dataset has this split, but it is missing" if split in expected else
                         "is no split of this dataset; move it away")
    report.problems = list(dict.fromkeys(report.problems))
    return report


def _check_split(report: Report, found: Found, split: str, scratch: Path, pool: ThreadPoolExecutor,
                 tick: Callable[[int], None]) -> Any:
    """Checks all shards of a split; what it opened, or None."""
    def check(shard: int) -> int:
        num_bytes = report.attempt(data.check_shard, shard) or 0
        tick(num_bytes)
        return num_bytes

    first, data = len(report.problems), cast(Any, report.attempt(found.open, split, scratch))
    if data is not None:
        totals, shards = data.manifest["totals"], list(range(data.num_shards))
        report.counts[split] = totals.get("documents"), totals["samples"], totals["tokens"]
        if isinstance(data, MixtureSplit):  # each shard that it takes from once
            shards = np.unique(data.stored, axis=1, return_index=True)[1].tolist()
        else:
            report.attempt(data.check_index)
            files = [shard[key] for shard in data.manifest["shards"] for key in ("raw", "zip") if shard[key]]
            known = {f"{split}/{name}" for name in (MANIFEST, INDEX, LENGTHS, *(file["basename"] for file in files))}
            for name in sorted({name for name, _ in found.storage.list(f"{split}/")} - known):
                report.wrong(name, f"is not named by {MANIFEST}; move it away")
        report.shards += len(shards)
        report.num_bytes += sum(pool.map(check, shards))
    here, there = str(scratch / split), found.storage.where(split)
    report.problems[first:] = [text.replace(here, there) for text in report.problems[first:]]
    return data


def _check_tokenizer(report: Report, found: Found, scratch: Path, stated: Sequence[dict[str, Any]]) -> None:
    """tokenizer/ against the manifests' fingerprints."""
    if not found.whole and not found.storage.list("tokenizer/"):
        return
    try:
        fetch_tokenizer(scratch, found.storage.url)
        loaded = tokenizers.load(scratch / "tokenizer")
        for fingerprint in stated:
            report.attempt(tokenizers.check, loaded, fingerprint)
    except Exception as error:  # the tokenizers library raises plain Exception
        report.wrong("tokenizer", f"cannot be used ({error!s:.300})")


def _check_card(report: Report) -> set[str]:
    """Every small file against the sha256 in the data card; the splits that the card states."""
    if not (hashes := report.attempt(read_hashes, report.storage)):
        report.notes.append(f"{report.storage.where(CARD)}: is no data card of ettin finalize; changes of small files "
                            "may go unseen")
        return set()
    for name, stated in hashes.items():
        data = report.attempt(report.storage.read_bytes, name)
        if data is not None and (digest := hashlib.sha256(data).hexdigest()) != stated:
            report.wrong(name, f"sha256 is {digest}; {CARD} states {stated!r:.100}")
    return {name.removesuffix(f"/{MANIFEST}") for name in hashes if name.endswith(MANIFEST)}
