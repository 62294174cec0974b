"""What a dataset says of itself beside its manifests: plan and completion records, and the comment of the data card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ettin_foundry.corpus.card import CARD, read_block
from ettin_foundry.corpus.finalize import add_up
from ettin_foundry.corpus.plan import Plan, read_plan, read_record, record_name
from ettin_foundry.data.inspect import SHARD_NAME
from ettin_foundry.data.storage import Storage

__all__ = ["Facts", "Units", "card_block", "expected_splits", "facts_from_units", "read_units", "sha256"]

_READERS = 16  # records of a remote set that are fetched at a time
_MAX_CARD_BYTES = 16 << 20
_COUNTS = {"documents": "documents", "chunks": "samples", "tokens": "tokens"}  # of a source: of a shard


@dataclass(frozen=True)
class Units:
    """The plan of the conversion and its completion records, as far as they can be read.

    Attributes:
        plan: None where none is kept. records: unit -> record. problems: what is wrong with any of them.
        unfinished: units without a record, which is right while something is being appended.
    """

    plan: Plan | None
    records: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unfinished: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether everything that the manifests are made of is there."""
        return self.plan is not None and len(self.records) == len(self.plan.units)


@dataclass(frozen=True)
class Facts:
    """What is known of one split.

    Attributes:
        head: the manifest's keys that are not counted in the shards (`set_card.HEAD_KEYS`); code_version may be missing.
        shards: entries, each with its `lengths`; None where the shards themselves have to be read.
        origin: where this comes from, for messages.
    """

    head: Mapping[str, Any]
    shards: tuple[Mapping[str, Any], ...] | None
    origin: str


def read_units(storage: Storage) -> Units:
    """Reads plan.json and units/; never raises for what they hold."""
    try:
        plan = read_plan(storage)
    except ValueError as error:
        return Units(None, problems=(str(error),))
    names = {name for name, _ in storage.list("units/")}
    if plan is None:
        lost = (f"{storage.where('plan.json')}: missing, but units/ holds {len(names)} records; both belong together. Put "
                "it back, or move units/ away",) if names else ()
        return Units(None, problems=lost)
    unfinished = tuple(unit.number for unit in plan.units if record_name(unit.number) not in names)
    numbers = [unit.number for unit in plan.units if record_name(unit.number) in names]
    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(numbers, pool.map(lambda number: _read_record(storage, plan, number), numbers)))
    records = {number: record for number, record in found.items() if not isinstance(record, str)}
    problems = [text for text in found.values() if isinstance(text, str)]
    known = {record_name(unit.number) for unit in plan.units}
    problems += [f"{storage.where(name)}: belongs to no unit of plan.json; move it away" for name in sorted(names - known)]
    return Units(plan, records, tuple(problems), unfinished)


def _read_record(storage: Storage, plan: Plan, unit: int) -> dict[str, Any] | str:
    """A record that is in order, or what is wrong with it."""
    try:
        record = read_record(storage, plan, unit)
        _check_record(record, unit, plan.units[unit].source)
        return record
    except (ValueError, OSError) as error:
        text, name = str(error), record_name(unit)
        return text if name in text else f"{storage.where(name)}: {text}"


def _check_record(record: Any, unit: int, source: str) -> None:
    """What the sums of a record must be.

    Raises:
        ValueError: a part is missing, of another kind, or contradicts another.
    """
    advice = "Move it away and run the same conversion again, which writes it anew"
    try:
        if (record["unit"], record["source"]) != (unit, source):
            raise ValueError(f"it is of unit {record['unit']!r:.50} and source {record['source']!r:.100}, not {unit} and "
                             f"{source!r:.100}")
        read = 0
        for split, counts in record["splits"].items():
            shards = counts["shards"]
            for key, name in _COUNTS.items():
                if counts[key] != sum(shard[name] for shard in shards):
                    raise ValueError(f"{split}: {counts[key]!r:.50} {key}, its shards sum to another number")
            if any(shard["source"] != source for shard in shards):
                raise ValueError(f"{split}: a shard is of another source")
            for shard in shards:
                raw, packed = shard["raw"]["basename"], shard["zip"] and shard["zip"]["basename"]
                if not SHARD_NAME.fullmatch(raw) or raw.endswith(".zstd") or packed not in (None, f"{raw}.zstd"):
                    raise ValueError(f"{split}: {raw!r:.200} and {packed!r:.200} are no names of a shard")
                chunks = sum(shard["lengths"])
                tokens = sum(length * number for length, number in enumerate(shard["lengths"]))
                if (chunks, tokens) != (shard["samples"], shard["tokens"]):
                    raise ValueError(f"{split}: the lengths of {shard['raw']['basename']!r:.100} count another number")
            read += counts["documents"] + sum(counts["dropped"].values())
        if read != record["read"]:
            raise ValueError(f"{record['read']!r:.50} documents read, {read} written or dropped")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is no completion record ({error!r:.100}). {advice}") from None
    except ValueError as error:
        raise ValueError(f"contradicts itself: {error}. {advice}") from None


def expected_splits(units: Units, block: Mapping[str, Any] | None) -> list[str]:
    """Names of the splits that plan and data card state."""
    found = list((block or {"splits": {}})["splits"])
    if units.plan is not None:
        found += ["train"] + (["validation"] if units.plan.options.get("validation") else [])
    return list(dict.fromkeys(found))


def facts_from_units(units: Units, split: str) -> Facts:
    """The split as plan and records state it; only of `units.whole`."""
    assert units.plan is not None and units.whole
    plan, records = units.plan, [units.records[unit.number] for unit in units.plan.units]
    head = {"chunk_length": plan.options["chunk_length"], "compression": plan.options["compression"],
            "tokenizer": dict(plan.tokenizer), "options": dict(plan.options), "sources": add_up(plan, records, split)}
    shards = tuple(shard for record in records for shard in record["splits"][split]["shards"])
    return Facts(head, shards, "plan.json and units/")


def card_block(storage: Storage) -> dict[str, Any] | None:
    """What the data card states (`set_card.read_block`); None where there is no card of ours.

    Raises:
        ValueError: there is one, but it cannot be read.
    """
    if not storage.exists(CARD) or storage.size(CARD) > _MAX_CARD_BYTES:
        return None
    return read_block(storage.read_bytes(CARD).decode(errors="replace"))


def sha256(storage: Storage, name: str) -> str:
    """Of a whole (small) file."""
    return hashlib.sha256(storage.read_bytes(name)).hexdigest()
