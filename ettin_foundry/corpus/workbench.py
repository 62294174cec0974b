"""What every part of a repair shares: the set, a copy of it, how files are moved, and the report.

Two rules are kept here. Nothing is deleted: a file that is replaced or taken out moves to quarantine/ under its own name,
with a number behind it if that is taken. And what a shard held is written down, synced, before the shard moves, so that a
repair may be interrupted anywhere and repeated.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ettin_foundry.corpus.losses import loss_lines
from ettin_foundry.corpus.set_facts import MISSING, left_out
from ettin_foundry.data.inspect import QUARANTINE
from ettin_foundry.data.storage import Storage, open_storage

__all__ = ["RepairReport", "Workbench"]


@dataclass
class RepairReport:
    """What was done.

    Attributes:
        actions: what was found and changed, in order.
        lost: lines of missing.jsonl, one per shard that was taken out of use.
        problems: what is still wrong, with what to do about it.
    """

    actions: list[str] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is left to do."""
        return not self.problems


class Workbench:
    """The set under repair.

    Args:
        storage: of the set, local. whole: the set was named, not one split. remote: folder or URL of a copy of the same.
        quarantine: bad shards may be taken out of use. scratch: for temporary files, on the set's own file system.
        tick: called with the bytes of each shard that was read.
    """

    def __init__(self, storage: Storage, *, whole: bool, remote: str | None, quarantine: bool, scratch: Path,
                 tick: Callable[[int], None]) -> None:
        self.storage, self.folder, self.whole = storage, Path(storage.url), whole
        self.remote = None if remote is None else open_storage(remote)
        self.quarantine, self.scratch, self.tick = quarantine, scratch, tick
        self.report = RepairReport()
        self.left_out = left_out(storage)

    def say(self, text: str) -> None:
        """Adds to the report."""
        if text not in self.report.actions:
            self.report.actions.append(text)

    def open(self, text: str) -> None:
        """Adds what is still wrong to the report."""
        if text not in self.report.problems:
            self.report.problems.append(text)

    def sizes(self, split: str) -> dict[str, int]:
        """Name -> bytes of the files in a split's folder; links and whatever else is there count too."""
        folder = self.folder / split
        found = os.scandir(folder) if folder.is_dir() else ()
        return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in found if not entry.name.startswith(".")
                and not entry.is_dir(follow_symlinks=False)}

    def where_remote(self, name: str) -> str:
        """How a file of the copy is called in messages."""
        return "" if self.remote is None else self.remote.where(self._remote_name(name))

    def fetch(self, name: str, *, num_bytes: int | None = None) -> Path | None:
        """A file of the copy, in the scratch folder under its own name; None, and a line in the report, if not to be had."""
        if self.remote is None:
            return None
        target = self.scratch / "fetched" / name
        try:
            self.remote.get_file(self._remote_name(name), target, num_bytes=num_bytes)
        except (ValueError, OSError) as error:
            self.say(f"{self.where_remote(name)}: not fetched ({error})")
            return None
        return target

    def put(self, made: Path, name: str, why: str) -> None:
        """Puts a file in place of another at one stroke; what was there before is kept in quarantine/."""
        old = self.folder / name
        if os.path.lexists(old):
            target = self._free(name)
            try:
                os.link(old, target, follow_symlinks=False)
            except OSError:  # a file system without hard links
                shutil.copy2(old, target, follow_symlinks=False)
        self.storage.put_file(made, name)
        self.say(f"{old}: {why}")

    def set_aside(self, name: str, why: str) -> None:
        """Moves a file of the set to quarantine/."""
        target = self._free(name)
        os.rename(self.folder / name, target)
        self.say(f"{self.folder / name}: moved to {target} ({why})")

    def take_out(self, name: str, why: str) -> None:
        """Moves a file that does not belong to the set to quarantine/, or says that this was not asked for."""
        if self.quarantine:
            self.set_aside(name, why)
        else:
            self.open(f"{self.folder / name}: {why}; only the set's own files may be there. Pass --quarantine to move it "
                      "away, or do so by hand")

    def lose(self, records: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """Takes shards out of use: notes what they held, then moves what is left of them.

        Args:
            records: from `losses.describe_loss`. folder: of the split.
        """
        if not records:
            return
        if not self.quarantine:
            for record in records:
                lines = loss_lines(record)
                self.open("\n".join([f"{self.folder}/{lines[0]}", *lines[1:], f"  {self._advice(record)}"]))
            return
        known = self.left_out.get(folder.name, {})
        new = [record for record in records if not _same(known.get(record["shard"]["raw"]["basename"]), record)]
        if new:
            before = self.storage.read_bytes(MISSING) if self.storage.exists(MISSING) else b""
            self.storage.write_bytes(MISSING, before + b"".join(json.dumps(record).encode() + b"\n" for record in new))
        for record in records:
            shard = record["shard"]
            self.report.lost.append(dict(record if record in new else known[shard["raw"]["basename"]]))
            for file in (shard["zip"], shard["raw"]):
                if file and os.path.lexists(folder / file["basename"]):
                    self.set_aside(f"{folder.name}/{file['basename']}", str(record["reason"]))

    def _free(self, name: str) -> Path:
        """A name in quarantine/ that is not taken."""
        first = target = self.folder / QUARANTINE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            if not os.path.lexists(target):
                break
            target = first.with_name(f"{first.name}.{number}")
        return target

    def _advice(self, record: Mapping[str, Any]) -> str:
        ways = ["Name a copy of the set with --remote" if self.remote is None else "Name another copy with --remote",
                "or pass --quarantine to do without it"]
        if record["unit"]:
            ways.append("(the same conversion run again after that makes its unit again)")
        return " ".join(ways)

    def _remote_name(self, name: str) -> str:
        return name if self.whole else name.partition("/")[2]


def _same(known: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
    """Whether a shard was noted before, by a repair that did not come to its end."""
    return known is not None and known["shard"] == record["shard"] and record["reason"] in ("missing", known["reason"])
