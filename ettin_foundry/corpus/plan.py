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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator

from ettin_foundry.corpus.encoder import Engine
from ettin_foundry.corpus.readers import ReadOptions
from ettin_foundry.corpus.sources import Part, Source, find_source, plan_parts
from ettin_foundry.data import MANIFEST, MAX_CHUNK_LENGTH
from ettin_foundry.data.manifest import Count, ShardEntry, check_record, parse_json
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.storage import Storage, is_url, parse_bytes

log = logging.getLogger(__name__)

PLAN = "plan.json"
SPLITS = ("train", "validation")
COUNTS = ("documents", "chunks", "tokens", "bytes")  # of a split of a unit, or of a source


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(ReadOptions):
    """What to convert, and how; cli/data.py says what each option means. Wrong ones raise ValueError."""

    sources: Sequence[str]
    out: str | os.PathLike[str]
    tokenizer: str | os.PathLike[str] | None = None
    train_tokenizer: int | None = None
    chunk_length: int = 1024 - SPECIALS_PER_PIECE
    cut_window: float = 0.01
    validation: float = 0.005
    shard_size: int | str = "64mb"
    unit_size: int | str = "256mb"
    compression: Literal["zstd"] | None = None
    seed: int = 0
    licence: str | None = None
    min_characters: int | None = None  # Unicode code points; empty documents are dropped anyway
    max_characters: int | None = None
    append: bool = False
    workers: int | None = None
    engine: Engine = "auto"
    task_index: int | None = None
    num_tasks: int | None = None

    def __post_init__(self) -> None:
        for key in ("shard_size", "unit_size", "max_document_bytes"):
            object.__setattr__(self, key, parse_bytes("--" + key.replace("_", "-"), getattr(self, key)))
        most = 2**31 - 1 if self.compression else 2**32 - 1  # what the zstd package takes; offsets are uint32
        task, tasks, trained = self.task_index, self.num_tasks, self.train_tokenizer is not None
        num_tokenizers = trained + (self.tokenizer is not None)
        rules = [  # option, what it must be, whether it is
            ("tokenizer", "given, or --train-tokenizer, exactly one of the two (neither with --append)",
             num_tokenizers == 1 or (self.append and not num_tokenizers)),
            ("train_tokenizer", "left out with --append, which keeps the dataset's, and with --task-index: train it on "
             "a sample first", not trained or (task is None and not self.append)),
            ("chunk_length", f"1 to {MAX_CHUNK_LENGTH} tokens", 1 <= self.chunk_length <= MAX_CHUNK_LENGTH),
            ("cut_window", "a share from 0 (cut as late as possible) to 0.5", 0 <= self.cut_window <= 0.5),
            ("validation", "a share of at least 0 and below 1", 0 <= self.validation < 1),
            ("shard_size", f"at most {most} bytes", int(self.shard_size) <= most),
            ("task_index", f"0 to --num-tasks - 1, with --num-tasks {tasks}",
             task == tasks if task is None or tasks is None else 0 <= task < tasks),
            ("min_characters", "2 or more, and at most --max-characters",
             2 <= (self.min_characters or 2) <= (self.max_characters or 2**62)),
        ]
        for key, allowed, fits in rules:
            if not fits:
                raise ValueError(f"--{key.replace('_', '-')} must be {allowed}, got {getattr(self, key)!r}")

    def record(self) -> dict[str, Any]:
        """The options that shape the data, without places on this machine."""
        keys = ["train_tokenizer", "chunk_length", "cut_window", "validation", "text_field", "id_field", "compression",
                "limit_bytes", "seed", "shard_size", "unit_size"]  # limit_bytes is null: no option, but in every plan
        # keys of filters that are gone stay, for datasets that are appended to
        filters = {"min_characters": self.min_characters, "max_characters": self.max_characters, "predicates": [],
                   "decontaminate": [], "decontaminate_field": "text", "decontaminate_drop": False, "ngrams": None,
                   "deduplicate": False}
        if self.max_document_bytes != ReadOptions.max_document_bytes:
            keys.append("max_document_bytes")
        return {**{key: getattr(self, key, None) for key in keys}, "filters": filters}


class Unit(BaseModel, frozen=True):
    """One unit of work: parts of one source, to be read in order."""

    source: str
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    number: int = Field(default=-1, exclude=True)  # its place in the plan

    @property
    def label(self) -> str:
        files = self.parts[0].file + (f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else "")
        return f"unit {self.number} ({self.source}: {files})"


class Plan(BaseModel, frozen=True, strict=True):
    """Everything that determines the bytes of a dataset, as plan.json holds it."""

    format: Literal["ettin-plan"] = "ettin-plan"
    version: Literal[1] = 1
    options: dict[str, Any]  # name -> value of each option that shapes the data
    tokenizer: dict[str, Any]  # its fingerprint
    sources: dict[str, dict[str, str | None]]  # name -> licence and revision
    units: list[Unit]

    @field_validator("units")
    @classmethod
    def _number(cls, units: list[Unit], info: ValidationInfo) -> list[Unit]:
        if unknown := {unit.source for unit in units}.difference(info.data.get("sources", ())):
            raise ValueError(f"{min(unknown)!r} must be one of its sources")
        return [unit.model_copy(update={"number": number}) for number, unit in enumerate(units)]

    @functools.cached_property
    def base_key(self) -> str:
        """Hash of all but the sources: what a unit's output depends on besides the unit."""
        tokenizer = {key: value for key, value in self.tokenizer.items() if key != "name"}
        return xxhash.xxh64(json.dumps([self.options, tokenizer], sort_keys=True).encode()).hexdigest()

    def with_sources(self, sources: Iterable[Source]) -> Plan:
        """The plan with the units of further sources behind its own."""
        names, units = dict(self.sources), list(self.units)
        for source in sources:
            names[source.name] = {"licence": source.licence, "revision": source.revision}
            for parts in plan_parts(source, self.options["unit_size"]):
                parts = tuple(part._replace(size=source.files.get(part.file, 0)) for part in parts)
                units.append(Unit(source=source.name, parts=parts))
        return Plan(options=self.options, tokenizer=self.tokenizer, sources=names, units=units)

    def to_bytes(self) -> bytes:
        """plan.json, with one unit a line."""
        units = ",\n".join("  " + json.dumps(unit.model_dump()) for unit in self.units)
        head = json.dumps(self.model_dump(exclude={"units"}), indent=1)[:-2]
        return f'{head},\n "units": [\n{units}\n ]\n}}\n'.encode()


class _Written(ShardEntry):
    lengths: list[Annotated[int, Field(ge=0, lt=2**32)]]


_COUNTS: dict[str, Any] = {**dict.fromkeys(COUNTS, Count), "unknown": (Count, 0), "dropped": dict[str, Count]}
_Split = create_model("_Split", __config__=ConfigDict(strict=True), **_COUNTS, shards=list[_Written])


class _Published(BaseModel):
    shards: list[ShardEntry]


class _Record(BaseModel, strict=True):
    key: str
    source: str
    splits: dict[Literal["train", "validation"], _Split]  # type: ignore[valid-type]


def read_plan(storage: Storage) -> Plan | None:
    """The plan of a dataset, or None where no conversion was started. Raises ValueError for what is not a plan."""
    return check_record(Plan, *_stored(storage, PLAN)) if storage.exists(PLAN) else None


def record_name(unit: int) -> str:
    """The completion record of a unit, relative to the dataset's folder."""
    return f"units/{unit:05d}.json"


def record_key(base_key: str, unit: Unit) -> str:
    """What a completion record must hold to count for this unit of this plan."""
    key = xxhash.xxh64(json.dumps(unit.model_dump(), separators=(",", ":")).encode()).hexdigest()
    return xxhash.xxh64(f"{base_key}{key}".encode()).hexdigest()


def read_record(storage: Storage, plan: Plan, unit: int) -> dict[str, Any]:
    """A unit's completion record. Raises ValueError if it is not one, or is of another unit."""
    (record, where), planned = _stored(storage, record_name(unit)), plan.units[unit]
    check_record(_Record, record, where)
    shards = [shard for counts in record["splits"].values() for shard in counts["shards"]]
    if (record["key"], record["source"]) != (record_key(plan.base_key, planned), planned.source) or any(
            len(shard["lengths"]) > plan.options["chunk_length"] + 1 for shard in shards):
        raise ValueError(f"{where}: must be of {planned.label} and these options, got another "
                         "unit's record; remove it and convert again")
    return record


def _stored(storage: Storage, name: str) -> tuple[Any, str]:
    """The JSON in a file, and how messages call the file."""
    return parse_json(storage.read_bytes(name), where := storage.where(name)), where


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
    """The sources; hub datasets at the plan's revision."""
    found, out = dict[str, Source](), os.fspath(options.out)
    for source in (find_source(text, licence=options.licence) for text in options.sources):
        name, place = source.name, source.location
        if name in found:
            raise ValueError(f"sources must have different names, got {name} twice; write NAME=SOURCE")
        if (out.rstrip("/") + "/").startswith(place.rstrip("/") + "/") if is_url(place) or is_url(out) else \
                Path(place).is_dir() and Path(out).resolve().is_relative_to(Path(place).resolve()):
            raise ValueError(f"--out must be outside of the sources, got {out} inside of {place}")
        if plan and name in plan.sources and not source.files:
            source = replace(source, revision=plan.sources[name]["revision"])
        found[name] = source
    return list(found.values())


def plan_conversion(options: ConvertOptions, before: Plan | None, sources: Sequence[Source], *,
                    tokenizer: dict[str, Any], storage: Storage) -> Plan:
    """What is to be done; a unit of `before` whose input changed is not finished any more.

    Raises ValueError where `before` differs in what shapes the data, or a finished dataset holds what changed.
    """
    wanted = Plan(options=options.record(), tokenizer=tokenizer, sources={}, units=[])
    finished, names = finished_units(storage), [source.name for source in sources]
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
    old = {"sources": {name: before.sources[name] for name in kept},
           "units": [unit for unit in before.units if unit.source in kept]}
    wanted = before.model_copy(update=old).with_sources(sources)
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
    shards = (shard for name in names for shard in check_record(_Published, *_stored(storage, name)).shards)
    return {int(shard.raw.basename.split(".")[1]) for shard in shards}


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
