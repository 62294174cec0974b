"""What a conversion will do, before it does it: units of work, and the plan that every start is held to.

A unit is a run of small input files, one file, or a stretch of a large one. The units follow from the listing of the
inputs and the options alone, and what a unit writes follows from the unit alone; so a set does not depend on how many
workers, machines or interruptions there were. `plan.json` is written before the first unit and compared at every later
start: an option that differs is refused by name. Reading text is readers.py's work, doing a unit unit_worker.py's.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from ettin_foundry.corpus.sources import Part, Source, plan_parts
from ettin_foundry.data.manifest import bad_file

__all__ = ["PLAN", "Plan", "Unit", "add_sources", "make_plan", "parse_size", "record_key", "record_name"]

PLAN = "plan.json"
_FORMAT, _VERSION = "ettin-plan", 1
_SIZE = re.compile(r"(\d+)\s*(b|kb|mb|gb|tb)?", re.IGNORECASE)
_UNITS_OF_SIZE = {"b": 0, "kb": 1, "mb": 2, "gb": 3, "tb": 4}


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    Attributes:
        number: its place in the plan, and in the names of its shards and of its completion record.
        source: the name of its source.
        parts: what to read, in order.
        sizes: bytes on disk of each part's file when the plan was made; 0 where a part is no file.
    """

    number: int
    source: str
    parts: tuple[Part, ...]
    sizes: tuple[int, ...]

    @property
    def label(self) -> str:
        """For people: progress lines and errors."""
        files = self.parts[0].file + (f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else "")
        return f"unit {self.number} ({self.source}: {files})"

    @property
    def key(self) -> str:
        """Hash of what the unit reads."""
        return xxhash.xxh64(json.dumps(self.to_json(), separators=(",", ":")).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes on disk to read; a part that is no file counts 0."""
        return sum(max(0, (size if part.end is None else min(part.end, size)) - part.begin)
                   for part, size in zip(self.parts, self.sizes))

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "parts": [[*part, size] for part, size in zip(self.parts, self.sizes)]}


def record_key(base_key: str, unit: Unit) -> str:
    """What a completion record must hold to count for this unit of this plan."""
    return xxhash.xxh64(f"{base_key}{unit.key}".encode()).hexdigest()


def record_name(unit: int) -> str:
    """The completion record of a unit, relative to the set's folder."""
    return f"units/{unit:05d}.json"


@dataclass(frozen=True)
class Plan:
    """Everything that determines the bytes of a set.

    Attributes:
        options: name -> value of each option that shapes the data.
        tokenizer: its fingerprint.
        sources: name -> {"licence", "revision"}, in order.
        units: in order; `units[n].number` is n.
    """

    options: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    units: Sequence[Unit] = ()

    @functools.cached_property
    def base_key(self) -> str:
        """Hash of all but the sources: what a unit's output depends on besides the unit."""
        tokenizer = {key: value for key, value in self.tokenizer.items() if key != "name"}
        return xxhash.xxh64(json.dumps([dict(self.options), tokenizer], sort_keys=True).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """plan.json: one unit a line, so that people can read it and tools can compare it."""
        head = {"format": _FORMAT, "version": _VERSION, "options": dict(self.options), "tokenizer": dict(self.tokenizer),
                "sources": {name: dict(facts) for name, facts in self.sources.items()}}
        units = ",\n".join("  " + json.dumps(unit.to_json()) for unit in self.units)
        return (json.dumps(head, indent=1)[:-2] + f',\n "units": [\n{units}\n ]\n}}\n').encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Plan:
        """Reads plan.json.

        Raises:
            ValueError: it is not one.
        """
        try:
            stored = json.loads(data)
            if (stored["format"], stored["version"]) != (_FORMAT, _VERSION):
                raise ValueError(f"format and version are {stored['format']!r}, {stored['version']!r}")
            units = tuple(_unit(number, entry) for number, entry in enumerate(stored["units"]))
            return cls(stored["options"], stored["tokenizer"], stored["sources"], units)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise bad_file(where, f"is no plan of a conversion ({error!r:.200})", f"{_FORMAT} version {_VERSION} is read",
                         "Name another folder, or remove this one and convert again") from None


def _unit(number: int, entry: Mapping[str, Any]) -> Unit:
    parts = tuple(Part(str(file), int(begin), None if end is None else int(end)) for file, begin, end, _ in entry["parts"])
    return Unit(number, str(entry["source"]), parts, tuple(int(size) for *_, size in entry["parts"]))


def make_plan(sources: Iterable[Source], *, options: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Plan:
    """The plan of a conversion that starts anew."""
    return add_sources(Plan(options, tokenizer), sources)


def add_sources(plan: Plan, sources: Iterable[Source]) -> Plan:
    """The plan with the units of further sources after its own.

    A source with `limit_bytes` is one unit: where the limit falls is known only by reading up to it.
    """
    names, units = {name: dict(facts) for name, facts in plan.sources.items()}, list(plan.units)
    for source in sources:
        names[source.name] = {"licence": source.licence, "revision": source.revision}
        sizes = {file.name: file.size for file in source.files}
        groups = plan_parts(source, plan.options["unit_size"])
        if plan.options["limit_bytes"] is not None:
            groups = [tuple(part for group in groups for part in group)]
        for parts in groups:
            units.append(Unit(len(units), source.name, tuple(parts), tuple(sizes.get(part.file, 0) for part in parts)))
    return Plan(plan.options, plan.tokenizer, names, tuple(units))


def parse_size(key: str, value: int | str) -> int:
    """Bytes of a size such as 64mb, 1gb or 1000 (1 kb = 1,024 bytes, as streaming reads it).

    Raises:
        ValueError: no size, or below 1.
    """
    match = _SIZE.fullmatch(str(value).strip())
    size = int(match[1]) * 1024 ** _UNITS_OF_SIZE[(match[2] or "b").lower()] if match else 0
    if size < 1:
        raise ValueError(f"{key}: {value!r} given; a number of bytes such as 64mb is needed")
    return size
