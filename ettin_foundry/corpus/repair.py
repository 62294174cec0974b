"""Makes a damaged set whole again, from what is left of it or from a copy, and says exactly what cannot be.

Lost or altered manifest.json, index.json and lengths.npy are written again, byte for byte, from the completion records,
or from the shards and the data card. A bad or missing shard is fetched from a copy of the set; without one it can be taken
out of use, and what it held is stated, in the report and in quarantine/missing.jsonl. Nothing is ever deleted: what is
replaced or taken out moves to quarantine/ (to undo, move it back). A repair that was interrupted is repeated. Shards
belong to repair_split.py, moving files to workbench.py; finding out whether a set is whole is verify.py's work.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.corpus.card import CARD, PICTURE, card_text, picture
from ettin_foundry.corpus.finalize import read_plan, read_record
from ettin_foundry.corpus.repair_split import SplitRepair
from ettin_foundry.corpus.set_facts import Units, card_block, expected_splits, read_units, sha256
from ettin_foundry.corpus.units import PLAN, record_name
from ettin_foundry.corpus.workbench import RepairReport, Workbench
from ettin_foundry.data.inspect import find_set, is_mix
from ettin_foundry.data.manifest import read_manifest
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import is_url, open_storage

__all__ = ["RepairReport", "repair_set"]


def repair_set(location: str | os.PathLike[str], *, remote: str | os.PathLike[str] | None = None, quarantine: bool = False,
               threads: int | None = None, tick: Callable[[int], None] | None = None) -> RepairReport:
    """Repairs a set, or one split of it.

    Args:
        location: the folder. remote: folder or URL of a copy of the same, for what is bad or lost here.
        quarantine: take shards that stay bad out of use, and files that belong to nothing out of the way; without it they
            are reported and left.
        threads: shards read at a time; None takes every core that this process may use.
        tick: called with the bytes of each shard when it was read, from any thread.

    Raises:
        FileNotFoundError: nothing of a set is there. ValueError: a URL, a mixture, or `threads` below 1.
    """
    if is_url(location):
        raise ValueError(f"SET: {location} given; repair works on a folder of this machine. Copy the set here, repair it, "
                         "and copy it back")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads: {threads} given; at least 1 is needed. Leave it out for all cores")
    found = find_set(location)
    for split in found.splits:
        if is_mix(Path(found.storage.url) / split):
            raise ValueError(f"SET: {location} given, a mixture; a set with shards of its own is needed. Repair the sets "
                             "that it points at, or build it again")
    scratch = found.storage.scratch()
    with tempfile.TemporaryDirectory(dir=scratch, prefix="repair-") as folder, \
            ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        bench = Workbench(found.storage, whole=found.whole, remote=None if remote is None else os.fspath(remote),
                          quarantine=quarantine, scratch=Path(folder), tick=tick or (lambda num_bytes: None))
        _Repair(bench, found.splits, pool).run()
    if not any(scratch.iterdir()):
        scratch.rmdir()
    return bench.report


class _Repair:
    """One run over one set."""

    def __init__(self, bench: Workbench, splits: tuple[str, ...], pool: ThreadPoolExecutor) -> None:
        self.bench, self.splits, self.pool = bench, splits, pool

    def run(self) -> None:
        block, broken = None, False
        try:
            block = card_block(self.bench.storage)
        except ValueError as error:
            self.bench.say(str(error))
            broken = True
        splits = self.splits
        if self.bench.whole:
            self._repair_files(block)
        units = self._repair_records()
        if self.bench.whole and (stated := expected_splits(units, block)):
            for split in sorted(set(splits) - set(stated)):
                self.bench.take_out(split, "is no split of this set")
            splits = tuple(stated)
        done: dict[str, tuple[Mapping[str, Any], np.ndarray]] = {}
        for split in splits:
            siblings = [manifest for other in splits if other != split and (manifest := self._manifest(other))]
            result = SplitRepair(self.bench, split, units=units, block=block, siblings=siblings, pool=self.pool).run()
            if result is not None:
                done[split] = result
        if len(done) == len(splits) and (units.plan is not None or block is not None or broken):
            self._write_card(done, block, by_hand=block is None and not broken)

    def _manifest(self, split: str) -> dict[str, Any] | None:
        try:
            return read_manifest(self.bench.folder / split)
        except (ValueError, OSError):
            return None

    def _repair_files(self, block: Mapping[str, Any] | None) -> None:
        """tokenizer/, which nothing here can be made from: from the copy, held to the card's sha256."""
        for name, stated in (block or {"files": {}})["files"].items():
            if name.startswith("tokenizer/"):
                found = sha256(self.bench.storage, name) if self.bench.storage.exists(name) else None
                if found == stated:
                    continue
                made = self.bench.fetch(name)
                if made is not None and sha256(open_storage(self.bench.scratch / "fetched"), name) == stated:
                    self.bench.put(made, name, "fetched again")
                else:
                    self.bench.open(f"{self.bench.folder / name}: sha256 is {found}; {CARD} states {stated}. Put the set's "
                                    "own file back, or name a copy of the set with --remote")

    def _repair_records(self) -> Units:
        """Plan and records; those that are bad are fetched from the copy."""
        units = read_units(self.bench.storage)
        if not self.bench.whole:
            return units
        if units.plan is None and units.problems and (made := self.bench.fetch(PLAN)) is not None:
            try:
                read_plan(open_storage(self.bench.scratch / "fetched"))
                self.bench.put(made, PLAN, "fetched again")
                units = read_units(self.bench.storage)
            except ValueError as error:
                self.bench.say(str(error))
        for unit in units.plan.units if units.plan is not None and self.bench.remote is not None else ():
            name = record_name(unit.number)
            if unit.number in units.records or (made := self.bench.fetch(name)) is None:
                continue
            try:
                assert units.plan is not None
                read_record(open_storage(self.bench.scratch / "fetched"), units.plan, unit.number)
            except ValueError as error:
                self.bench.say(str(error))
                continue
            self.bench.put(made, name, "fetched again")
        units = read_units(self.bench.storage)
        for text in units.problems:
            self.bench.open(text)
        return units

    def _write_card(self, done: Mapping[str, tuple[Mapping[str, Any], np.ndarray]], block: Mapping[str, Any] | None, *,
                    by_hand: bool) -> None:
        """README.md and lengths.svg again, where they do not say what the set now is."""
        storage = self.bench.storage
        if block is not None and all(storage.exists(name) and sha256(storage, name) == stated
                                     for name, stated in block["files"].items()):
            return
        if by_hand and storage.exists(CARD):
            self.bench.say(f"{storage.where(CARD)}: was written by hand and stays as it is")
            return
        done = dict(done)
        for split in (block or {"splits": {}})["splits"]:  # where one split was named, the others are taken as they are
            if split not in done:
                try:
                    data = MDSSplit(self.bench.folder / split)
                    done[split] = data.manifest, np.sum([data.lengths(shard) for shard in range(data.num_shards)], axis=0)
                except (ValueError, OSError) as error:
                    self.bench.open(f"{storage.where(CARD)}: cannot be written again before all splits are whole ({error})")
                    return
        order = sorted(done, key=lambda split: (split != "train", split))
        manifests, lengths = {split: done[split][0] for split in order}, {split: done[split][1] for split in order}
        for name, make in ((PICTURE, lambda: picture(lengths)),
                           (CARD, lambda: card_text(storage, manifests, lengths).encode())):
            data = make()
            if not storage.exists(name) or storage.read_bytes(name) != data:
                (self.bench.scratch / name).write_bytes(data)
                self.bench.put(self.bench.scratch / name, name, "written again")
