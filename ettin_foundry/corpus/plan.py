"""What a conversion will do: its units of work, and the plan that every later start goes on with.

A unit is a run of small input files, one file, or a range of a large one. The units follow from the listing of the
inputs and the options alone, and what a unit writes follows from the unit alone, so that a dataset does not depend on
workers, machines or interruptions. Until the first unit is finished everything may change. After that options never do,
and sources are added by append alone; a unit whose input changed is done again, unless a finished dataset holds it.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, create_model

from ettin_foundry.corpus.sources import Part, Source, find_source, plan_parts
from ettin_foundry.data import MANIFEST
from ettin_foundry.data.manifest import Count, ShardEntry, bad_file, check_record
from ettin_foundry.data.storage import Storage, is_url

if TYPE_CHECKING:
    from ettin_foundry.corpus.convert import ConvertOptions

log = logging.getLogger(__name__)

PLAN = "plan.json"
SPLITS = ("train", "validation")
COUNTS = ("documents", "chunks", "tokens", "bytes")  # of a split of a unit, or of a source


@dataclass(frozen=True)
class Unit:
    """One unit of work: parts of one source, to be read in order."""

    number: int
    source: str
    parts: tuple[Part, ...]

    @property
    def label(self) -> str:
        files = self.parts[0].file + (f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else "")
        return f"unit {self.number} ({self.source}: {files})"

    def to_json(self) -> dict[str, Any]:
        return {"source": self.source, "parts": self.parts}


@dataclass(frozen=True)
class Plan:
    """Everything that determines the bytes of a dataset."""

    options: Mapping[str, Any]  # name -> value of each option that shapes the data
    tokenizer: Mapping[str, Any]  # its fingerprint
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name -> licence and revision
    units: Sequence[Unit] = ()

    @functools.cached_property
    def base_key(self) -> str:
        """Hash of all but the sources: what a unit's output depends on besides the unit."""
        tokenizer = {key: value for key, value in self.tokenizer.items() if key != "name"}
        return xxhash.xxh64(json.dumps([self.options, tokenizer], sort_keys=True).encode()).hexdigest()

    def with_sources(self, sources: Iterable[Source]) -> Plan:
        """The plan with the units of further sources behind its own."""
        names, units = {name: dict(facts) for name, facts in self.sources.items()}, list(self.units)
        for source in sources:
            names[source.name] = {"licence": source.licence, "revision": source.revision}
            for parts in plan_parts(source, self.options["unit_size"]):
                parts = tuple(part._replace(size=source.files.get(part.file, 0)) for part in parts)
                units.append(Unit(len(units), source.name, parts))
        return replace(self, sources=names, units=tuple(units))

    def to_bytes(self) -> bytes:
        """plan.json, with one unit a line."""
        head = {"format": "ettin-plan", "version": 1, "options": self.options, "tokenizer": self.tokenizer,
                "sources": self.sources}
        units = ",\n".join("  " + json.dumps(unit.to_json()) for unit in self.units)
        return (json.dumps(head, indent=1)[:-2] + f',\n "units": [\n{units}\n ]\n}}\n').encode()


_Unit = create_model("_Unit", source=str, parts=Annotated[list[Part], Field(min_length=1)])


class _Plan(BaseModel, strict=True):
    format: Literal["ettin-plan"]
    version: Literal[1]
    options: dict[str, Any]
    tokenizer: dict[str, Any]  # it and the options count for the keys of records
    sources: dict[str, dict[str, str | None]]
    units: list[_Unit]  # type: ignore[valid-type]


class _Written(ShardEntry):
    lengths: list[Annotated[int, Field(ge=0, lt=2**32)]]


_COUNTS: dict[str, Any] = {**dict.fromkeys(COUNTS, Count), "unknown": (Count, 0), "dropped": dict[str, Count]}
_Split = create_model("_Split", __config__=ConfigDict(strict=True), **_COUNTS, shards=list[_Written])
_Published = create_model("_Published", shards=list[ShardEntry])


class _Record(BaseModel, strict=True):
    key: str
    source: str
    splits: dict[Literal["train", "validation"], _Split]  # type: ignore[valid-type]


def read_plan(storage: Storage) -> Plan | None:
    """The plan of a dataset, or None where no conversion was started. Raises ValueError for what is not a plan."""
    if not storage.exists(PLAN):
        return None
    stored = _read(storage, PLAN, _Plan)
    if unknown := {unit["source"] for unit in stored["units"]}.difference(stored["sources"]):
        raise bad_file(storage.where(PLAN), f"has units of {min(unknown)!r}", "it must be one of its sources")
    units = [Unit(number, unit["source"], tuple(Part(*part) for part in unit["parts"]))
             for number, unit in enumerate(stored["units"])]
    return Plan(stored["options"], stored["tokenizer"], stored["sources"], tuple(units))


def record_name(unit: int) -> str:
    """The completion record of a unit, relative to the dataset's folder."""
    return f"units/{unit:05d}.json"


def record_key(base_key: str, unit: Unit) -> str:
    """What a completion record must hold to count for this unit of this plan."""
    key = xxhash.xxh64(json.dumps(unit.to_json(), separators=(",", ":")).encode()).hexdigest()
    return xxhash.xxh64(f"{base_key}{key}".encode()).hexdigest()


def read_record(storage: Storage, plan: Plan, unit: int) -> dict[str, Any]:
    """A unit's completion record. Raises ValueError if it is not one, or is of another unit."""
    record, planned = _read(storage, name := record_name(unit), _Record), plan.units[unit]
    shards = [shard for counts in record["splits"].values() for shard in counts["shards"]]
    if (record["key"], record["source"]) != (record_key(plan.base_key, planned), planned.source) or any(
            len(shard["lengths"]) > plan.options["chunk_length"] + 1 for shard in shards):
        raise ValueError(f"{storage.where(name)}: must be of {planned.label} and these options, got another "
                         "unit's record; remove it and convert again")
    return record


def _read(storage: Storage, name: str, model: type[BaseModel]) -> Any:
    where = storage.where(name)
    try:
        stored = json.loads(storage.read_bytes(name))  # names of files may hold what orjson refuses
    except (ValueError, RecursionError) as error:
        raise bad_file(where, f"is not JSON ({error!s:.200})", "it must be as a conversion wrote it") from None
    check_record(model, stored, where)
    return stored


def finished_units(storage: Storage) -> set[int]:
    """Numbers of the units that have a completion record."""
    return {int(stem) for name, _ in storage.list("units/") if (stem := Path(name).stem).isdigit()}


def check_place(storage: Storage, append: bool) -> None:
    """Refuses a place without a plan that holds something, or that `append` finds empty."""
    if found := [name for name, _ in storage.list() if not name.startswith("tokenizer/")]:  # written before the plan
        raise FileExistsError(f"--out must be new, or where a conversion was begun, got {storage.url}, which holds "
                              f"{found[0]} and no {PLAN}; name another folder")
    if append:
        raise FileNotFoundError(f"--append needs a finished dataset, got {storage.url}, which holds none")


def find_sources(options: ConvertOptions, plan: Plan | None) -> list[Source]:
    """The sources, with absolute places for workers elsewhere; hub datasets at the plan's revision."""
    found, out = dict[str, Source](), os.fspath(options.out)
    for source in (find_source(text, licence=options.licence) for text in options.sources):
        name, place = source.name, source.location
        if name in found:
            raise ValueError(f"sources must have different names, got {name} twice; write NAME=SOURCE")
        if (out.rstrip("/") + "/").startswith(place.rstrip("/") + "/") if is_url(place) or is_url(out) else \
                Path(place).is_dir() and Path(out).resolve().is_relative_to(Path(place).resolve()):
            raise ValueError(f"--out must be outside of the sources, got {out} inside of {place}")
        if source.files and not any(source.files.values()):
            log.warning("%s: every file of it is empty", name)
        if plan and name in plan.sources and not source.files:
            source = replace(source, revision=plan.sources[name]["revision"])
        found[name] = replace(source, root=source.root if is_url(source.root) else os.path.abspath(source.root))
    return list(found.values())


def plan_conversion(options: ConvertOptions, before: Plan | None, sources: Sequence[Source], *,
                    tokenizer: Mapping[str, Any], storage: Storage) -> Plan:
    """What is to be done; a unit of `before` whose input changed is not finished any more.

    Raises ValueError where `before` differs in what shapes the data, or a finished dataset holds what changed.
    """
    wanted, finished, names = Plan(options.record(), tokenizer), finished_units(storage), [s.name for s in sources]
    if before is None or not (finished or options.append):
        return wanted.with_sources(sources)
    _check_options(before, wanted, sources, append=options.append)
    earlier, kept = list(before.sources), []
    if options.append:  # a later source of which nothing was finished may be left out again
        begun = {unit.source for unit in before.units if unit.number in finished}
        kept = [name for name in earlier if name in begun.difference(names)]
        if kept != earlier[:len(kept)]:
            raise ValueError(f"--append must name new sources or the last of {', '.join(earlier)}, got {names}")
    elif names != earlier:
        raise ValueError(f"sources must be those that --out was begun with, {', '.join(earlier)}, got "
                         f"{', '.join(names)}; use --append with new sources alone, or another --out")
    wanted = replace(before, sources={name: before.sources[name] for name in kept},
                     units=[unit for unit in before.units if unit.source in kept]).with_sources(sources)
    pairs = enumerate(itertools.zip_longest(before.units, wanted.units))
    changed = {number for number, (then, now) in pairs if then != now}
    again = [unit for unit in before.units if unit.number in finished & changed]
    if held := [unit for unit in again if unit.number in published_units(storage)]:
        raise ValueError(f"{held[0].label}: files of a finished dataset must stay as they were, got others; undo it")
    for unit in again:
        log.warning("%s is done again: its input has changed", unit.label)
        storage.delete(record_name(unit.number))
    return wanted


def published_units(storage: Storage) -> set[int]:
    """Numbers of the units whose shards a finished dataset holds."""
    names = [name for split in SPLITS if storage.exists(name := f"{split}/{MANIFEST}")]
    shards = (shard for name in names for shard in _read(storage, name, _Published)["shards"])
    return {int(shard["raw"]["basename"].split(".")[1]) for shard in shards}


def check_append(todo: Sequence[Unit], plan: Plan, sources: Sequence[Source]) -> None:
    """Refuses units to do whose source was not given: `append` needs the others to be finished."""
    names = {source.name for source in sources}
    if others := [unit for unit in todo if unit.source not in names]:
        missing = ", ".join(name for name in plan.sources if name not in names)
        raise ValueError(f"--append needs a finished dataset, got one with {len(others)} units not done: first "
                         f"{others[0].label}; run that of {missing} again before, without --append")


def _check_options(before: Plan, wanted: Plan, sources: Sequence[Source], *, append: bool) -> None:
    keys = ("vocab_size", "special_ids", "vocab_sha256", "probe_sha256")
    then, now = ({**plan.options, **{f"tokenizer {key}": plan.tokenizer.get(key) for key in keys}}
                 for plan in (before, wanted))
    for source in sources:
        for key, value in before.sources.get(source.name, {}).items():
            then[f"{key} of {source.name}"], now[f"{key} of {source.name}"] = value, getattr(source, key)
    differing = [f"{key} ({then.get(key)!r} then, {now.get(key)!r} now)" for key in then | now
                 if then.get(key) != now.get(key) and not (append and key == "train_tokenizer")]
    if differing:
        raise ValueError(f"--out was begun with other options: {'; '.join(differing)}; they never change: give those")
