"""Holds every byte of a set to what the set says of itself, and lists all that is wrong, not only the first.

Checked are: every shard's hash, layout, counts, lengths, packed rows and token range; lengths.npy, index.json and the
manifest's totals; files that nothing names; the tokenizer against its fingerprint; the manifests against plan and
completion records, where these are kept; every small file against the sha256 in the data card. What a person may rightly
have changed (the card's own text) or has still to finish (an appended source) is a note, not a problem. Nothing is
written into the set. (A mixture is opened as a loader opens it: packed shards of which it takes a part are
expanded beside themselves, and of sets at URLs the small files are fetched into it.) One split by itself is split_check.py's
work.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.corpus.card import CARD, card_text
from ettin_foundry.corpus.set_facts import (
    Facts,
    Units,
    card_block,
    expected_splits,
    facts_from_units,
    read_units,
    sha256,
)
from ettin_foundry.corpus.show import Sample, draw_samples
from ettin_foundry.corpus.split_check import SMALL_FILES, SplitCheck
from ettin_foundry.corpus.units import PLAN, record_name
from ettin_foundry.data.inspect import SetFolder, find_set, is_mix, load_decoder, shard_order
from ettin_foundry.data.manifest import MANIFEST, read_json
from ettin_foundry.data.mixture import MixtureSplit, expand_entries, place_of_set
from ettin_foundry.data.shards import SUBSTITUTIONS, MDSSplit
from ettin_foundry.data.storage import join

__all__ = ["Report", "verify_set"]

_SAMPLES = 16  # chunks of each source and split that are decoded


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: each names a file and says what is wrong with it. notes: worth knowing, not wrong.
        files, num_bytes: of the splits, read and held to their hashes. seconds: how long that took.
        counts: split -> (documents, chunks, tokens) as its manifest states them.
        samples: a decoded chunk of each source and split.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    counts: dict[str, tuple[int | None, int, int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        speed = self.num_bytes / 1e6 / max(self.seconds, 1e-9)
        splits = ""
        for split, (documents, chunks, tokens) in self.counts.items():
            stated = "" if documents is None else f"{documents:,} documents, "
            splits += f"; {split}: {stated}{chunks:,} chunks, {tokens:,} tokens"
        return f"{self.files:,} files, {self.num_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s, {speed:,.0f} MB/s{splits}"


def verify_set(location: str | os.PathLike[str], *, threads: int | None = None,
               tick: Callable[[int], None] | None = None) -> Report:
    """Checks a set, one split of it, or a mixture and all shards that it takes from.

    Args:
        location: folder or URL. Shards behind a URL are fetched one by one into a temporary folder.
        threads: shards checked at a time; None takes every core that this process may use.
        tick: called with the bytes of each shard when it is done, from any thread.

    Raises:
        FileNotFoundError: nothing of a set is there. ValueError: `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: {threads} given; at least 1 is needed. Leave it out for all cores")
    found = find_set(location)
    report = Report()
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        _Check(found, report, pool, tick or (lambda num_bytes: None)).run()
    report.problems = list(dict.fromkeys(report.problems))
    return report


class _Check:
    """One run over one set."""

    def __init__(self, found: SetFolder, report: Report, pool: ThreadPoolExecutor, tick: Callable[[int], None]) -> None:
        self.found, self.storage, self.report, self.pool, self.tick = found, found.storage, report, pool, tick
        self.manifests: dict[str, dict[str, Any]] = {}
        self.lengths: dict[str, np.ndarray] = {}

    def run(self) -> None:
        whole = self.found.whole
        units = read_units(self.storage) if whole else Units(None)
        self.report.problems += units.problems
        block = self._try(lambda: card_block(self.storage)) if whole else None
        expected = expected_splits(units, block) or list(self.found.splits)
        for split in set(expected) ^ set(self.found.splits) if whole else ():
            self._wrong(split, "missing, although the set has this split" if split in expected else
                        "is no split of this set; move it away")
        with tempfile.TemporaryDirectory(prefix="ettin-") as scratch:
            begin = time.perf_counter()
            for split in self.found.splits:
                self._check_split(split, Path(scratch))
            self.report.seconds = time.perf_counter() - begin
            if self.manifests:
                self._check_tokenizer(Path(scratch))
        if whole:
            self._check_units(units)
            self._check_card(block)

    def _wrong(self, name: str, text: str) -> None:
        self.report.problems.append(f"{self.storage.where(name)}: {text}")

    def _note(self, name: str, text: str) -> None:
        self.report.notes.append(f"{self.storage.where(name)}: {text}")

    def _try(self, work: Callable[[], Any]) -> Any:
        """The result; None and a problem more when it fails."""
        try:
            return work()
        except (ValueError, OSError) as error:
            self.report.problems.append(str(error))
            return None

    def _count(self, num_bytes: int) -> None:
        with self.report.lock:
            self.report.files += 1
            self.report.num_bytes += num_bytes

    # ---------------------------------------------------------------------- splits

    def _check_split(self, split: str, scratch: Path) -> None:
        sizes = {name.rpartition("/")[2]: size for name, size in self.storage.list(f"{split}/") if name.count("/") == 1}
        folder = Path(self.storage.url) / split
        if not self.storage.is_local:
            folder = scratch / split
            folder.mkdir()
            for name in sorted(SMALL_FILES & sizes.keys()):
                self._try(lambda name=name: self.storage.get_file(f"{split}/{name}", folder / name))
        if is_mix(folder):
            self._check_mix(split, folder)
            return
        if SUBSTITUTIONS in sizes:
            self._note(f"{split}/{SUBSTITUTIONS}", "a run went on with substitutes for bad shards; the file names them")
        checked = SplitCheck(self.storage, split, folder, sizes, self._count)
        for text in checked.run(self.pool, self.tick):
            self.report.problems.append(text.replace(str(folder), self.storage.where(split)))
        if checked.manifest is None:
            return
        self.manifests[split], totals = checked.manifest, checked.manifest["totals"]
        self.report.counts[split] = totals["documents"], totals["samples"], totals["tokens"]
        if checked.lengths is not None:
            self.lengths[split] = checked.lengths
        if self.storage.is_local:
            self._decode(MDSSplit(folder))

    def _check_mix(self, split: str, folder: Path) -> None:
        """A mixture: it must open (which holds every set to its fingerprint), and each shard that it takes from be whole."""
        remote = None if self.storage.is_local else self.storage.where(split)
        mix = self._try(lambda: MixtureSplit(folder, remote=remote))
        if mix is None:  # at least the sets that are on this machine
            sets = read_json(folder / MANIFEST).get("sets") if remote is None else None
            for entry in sets if isinstance(sets, list) else ():
                place = self._try(lambda entry=entry: join(place_of_set(folder, None, str(entry["path"])), split))
                if place is not None and os.path.isdir(place):
                    self.report.problems += verify_set(place).problems
            return
        self.manifests[split] = mix.manifest
        self.report.counts[split] = None, int(mix.samples.sum()), int(mix.tokens.sum())
        entries = expand_entries(mix.manifest)[0]
        _, firsts = np.unique(np.stack([entries.set, entries.shard, entries.part], axis=1), axis=0, return_index=True)
        stored, own = pickle.dumps(mix), threading.local()  # an open set is not for several threads at once

        def check(shard: int) -> str | None:
            own.mix = getattr(own, "mix", None) or pickle.loads(stored)
            try:
                num_bytes = own.mix.check_shard(shard)
            except (ValueError, OSError) as error:
                return str(error)
            self._count(num_bytes)
            self.tick(num_bytes)
            return None

        jobs = [self.pool.submit(check, shard) for shard in np.sort(firsts).tolist()]
        self.report.problems += [text for job in jobs if (text := job.result())]
        self._decode(mix)

    def _decode(self, data: Any) -> None:
        """A few chunks of each source as text, for a person to look at; and no special token may be in them."""
        try:
            decoder = load_decoder(self.storage)
            samples = draw_samples(data, decoder, per_source=_SAMPLES)
        except (ValueError, OSError):
            return  # whatever it is, it has been said
        special = {number for number in (data.tokenizer.get("special_ids") or {}).values() if isinstance(number, int)}
        for sample in samples:
            if found := special & set(sample.tokens.tolist()):
                self.report.problems.append(f"{data.local}: chunk {sample.part} of document {sample.doc!r:.100} holds the "
                                            f"special token {min(found)}; only plain ones are allowed. Convert it again")
        shown = {sample.source: sample for sample in reversed(samples)}  # the first of each
        self.report.samples += [shown[source] for source in sorted(shown)]

    # ------------------------------------------------------------ the rest of the set

    def _check_tokenizer(self, scratch: Path) -> None:
        """tokenizer/ against the manifests' fingerprints, and these against each other."""
        from ettin_foundry.data.tokenizer import check, load

        for key in ("tokenizer", "chunk_length", "compression", "options"):
            values = [manifest.get(key) for manifest in self.manifests.values()]
            if any(value != values[0] for value in values):
                self.report.problems.append(f"{self.storage.url}: {key} differs between the manifests of "
                                            f"{' and '.join(self.manifests)}; one set has one. Convert it again")
        names = [name for name, _ in self.storage.list("tokenizer/")]
        if not names:
            (self._wrong if self.found.whole else self._note)("tokenizer", "missing; nothing can be decoded. Put it back")
            return
        folder = Path(self.storage.url) / "tokenizer"
        if not self.storage.is_local:
            folder = scratch / "tokenizer"
            for name in names:
                self._try(lambda name=name: self.storage.get_file(name, scratch / name))
        try:
            loaded = load(folder)
            for manifest in self.manifests.values():
                self._try(lambda manifest=manifest: check(loaded, manifest["tokenizer"]))
        except Exception as error:  # the tokenizers library raises plain Exception
            self._wrong("tokenizer", f"cannot be used ({error!s:.300})")

    def _check_units(self, units: Units) -> None:
        """The manifests against plan and records."""
        if units.plan is None:
            return
        missing: set[int] = set()
        for split, manifest in self.manifests.items():
            names = {shard["raw"]["basename"] for shard in manifest["shards"]}
            missing |= {unit for unit in units.unfinished for name in names if shard_order(name)[:-1] == (unit,)}
            if units.whole and split in expected_splits(units, None):
                self._compare(split, manifest, facts_from_units(units, split))
        for unit in sorted(missing):
            self._wrong(record_name(unit), "missing, although shards of this unit are in use. Run the same conversion "
                        "again, which writes it anew")
        if units.unfinished and not missing:
            self._note(PLAN, f"{len(units.unfinished)} of {len(units.plan.units)} units are not done yet; run the same "
                       "conversion again")

    def _compare(self, split: str, manifest: Mapping[str, Any], facts: Facts) -> None:
        assert facts.shards is not None
        shards = [{key: value for key, value in shard.items() if key != "lengths"} for shard in facts.shards]
        for key, value in {**facts.head, "shards": shards}.items():
            if manifest.get(key) != value:
                self._wrong(f"{split}/{MANIFEST}", f"{key} differs from {facts.origin}"
                            f"{_first_difference(manifest.get(key), value)}. Convert it again")

    def _check_card(self, block: Mapping[str, Any] | None) -> None:
        if block is None:
            if not self.storage.exists(CARD) or self.report.ok:
                self._note(CARD, "no data card of ettin finalize; altered small files are found only where they contradict "
                           "others")
            return
        for name, stated in block["files"].items():
            found = self._try(lambda name=name: sha256(self.storage, name))
            if found is not None and found != stated:
                self._wrong(name, f"sha256 is {found}; {CARD} states {stated}. Convert it again")
        if self.report.ok and list(self.manifests) == list(self.lengths) == list(block["splits"]):
            text = self._try(lambda: card_text(self.storage, self.manifests, self.lengths))
            if text is not None and text.encode() != self.storage.read_bytes(CARD):
                self._note(CARD, "its text is not the one that ettin finalize writes; fine if someone edited it")


def _first_difference(found: Any, stated: Any) -> str:
    """Where two values part, for a message."""
    if isinstance(found, dict) and isinstance(stated, dict):
        key = next((key for key in {**stated, **found} if found.get(key) != stated.get(key)), None)
        return f": {key}{_first_difference(found.get(key), stated.get(key))}"
    if isinstance(found, list) and isinstance(stated, list):
        for at, pair in enumerate(zip(found, stated)):
            if pair[0] != pair[1]:
                return f"[{at}]{_first_difference(*pair)}"
        return f": {len(found)} entries, not {len(stated)}"
    return f" is {found!r:.100}, not {stated!r:.100}"
