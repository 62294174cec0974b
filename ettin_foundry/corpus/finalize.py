"""Puts finished units together into a set that can be read: lengths.npy, index.json, manifest.json, data card.

Every unit left a completion record with the entries of its shards; here they are concatenated in the order of the plan,
so the result is the same whoever did which unit, and when. manifest.json is written last: a split that has one is
complete. Nothing is read from the shards themselves; verify.py does that.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from ettin_foundry.corpus.units import PLAN, Plan, record_key, record_name
from ettin_foundry.data.manifest import COLUMNS, FORMAT, MANIFEST, VERSION, bad_file
from ettin_foundry.data.storage import Storage, join, open_storage
from ettin_foundry.version import __version__

__all__ = ["add_up", "describe_splits", "done_units", "finalize", "read_plan", "read_record"]

log = logging.getLogger(__name__)

_COUNTS = ("documents", "chunks", "tokens", "bytes")
_READERS = 16  # records of a remote set that are fetched at a time


def read_plan(storage: Storage) -> Plan | None:
    """The set's plan, or None where no conversion was started."""
    return Plan.from_bytes(storage.read_bytes(PLAN), join(storage.url, PLAN)) if storage.exists(PLAN) else None


def read_record(storage: Storage, plan: Plan, unit: int) -> dict[str, Any]:
    """A unit's completion record.

    Raises:
        ValueError: it is of another unit, or none at all.
    """
    where = join(storage.url, record_name(unit))
    try:
        record = json.loads(storage.read_bytes(record_name(unit)))
        key = record["key"]
    except (ValueError, KeyError, TypeError) as error:
        raise bad_file(where, f"is no completion record ({error!r:.200})", "one written by convert.py is needed",
                     "Remove it and run the same conversion again") from None
    if key != (needed := record_key(plan.base_key, plan.units[unit])):
        raise bad_file(where, f"is of another unit than {plan.units[unit].label} (key {key})",
                     f"key {needed} is needed", "Remove it and run the same conversion again")
    return record


def done_units(storage: Storage, plan: Plan) -> dict[int, dict[str, Any]]:
    """Unit number -> completion record, for every unit that is finished and whose shards are all there.

    A unit whose shard is missing or of another size counts as not done, so that running the conversion again heals it.
    """
    known = {name for name, _ in storage.list("units/")}
    numbers = [unit.number for unit in plan.units if record_name(unit.number) in known]
    with ThreadPoolExecutor(_READERS) as pool:
        records = dict(zip(numbers, pool.map(lambda number: read_record(storage, plan, number), numbers)))
    splits = {split for record in records.values() for split in record["splits"]}
    found = {name: size for split in splits for name, size in storage.list(f"{split}/")}
    return {number: record for number, record in records.items() if not _missing(record, found, log_as=number)}


def _missing(record: Mapping[str, Any], found: Mapping[str, int], *, log_as: int) -> bool:
    for split, counts in record["splits"].items():
        for entry in counts["shards"]:
            file = entry["zip"] or entry["raw"]
            if found.get(f"{split}/{file['basename']}") != file["bytes"]:
                log.warning("unit %d: %s/%s is missing or not of %d bytes; the unit is done again", log_as, split,
                            file["basename"], file["bytes"])
                return True
    return False


def finalize(out: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Makes a readable set of the finished units of OUT; split -> manifest.

    Safe to repeat: the same records give the same bytes.

    Raises:
        FileNotFoundError: no conversion was started there, or units are missing; names them. ValueError: a source or a
            split holds no document.
    """
    storage = open_storage(out)
    plan = read_plan(storage)
    if plan is None:
        raise FileNotFoundError(f"{join(storage.url, PLAN)}: missing; a folder in which a conversion was started is needed. "
                                "Run data_prep/convert.py with --out first, or correct the folder")
    records = done_units(storage, plan)
    missing = [unit for unit in plan.units if unit.number not in records]
    if missing:
        raise FileNotFoundError(f"{storage.url}: {len(missing)} of {len(plan.units)} units are not finished, the first is "
                                f"{missing[0].label}; all are needed. Run the same conversion again (or the missing tasks "
                                "of the job array), it does only those")
    ordered = [records[unit.number] for unit in plan.units]
    _check_content(plan, ordered, storage)
    manifests = _write_splits(storage, plan, ordered)
    _write_card(storage, manifests, ordered)
    storage.clear_scratch()  # what killed processes left
    return manifests


def _describe(split: str, *, chunk_length: int, tokenizer: Mapping[str, Any], options: Mapping[str, Any],
              sources: Mapping[str, Mapping[str, Any]], shards: Sequence[Mapping[str, Any]],
              compression: str | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and name -> content of the three files, manifest.json last."""
    table = np.zeros((len(shards), chunk_length + 1), "<u4")
    for row, shard in zip(table, shards):
        row[:len(shard["lengths"])] = shard["lengths"]
    buffer = io.BytesIO()
    np.save(buffer, table)
    lengths = buffer.getvalue()
    entries = [{key: value for key, value in shard.items() if key != "lengths"} for shard in shards]
    index = {"version": 2, "shards": [_index_entry(entry, compression, options.get("shard_size")) for entry in entries]}
    manifest = {
        "format": FORMAT, "version": VERSION, "split": split, "chunk_length": chunk_length, "compression": compression,
        "tokenizer": dict(tokenizer), "columns": COLUMNS, "options": dict(options), "code_version": __version__,
        "lengths": {"basename": "lengths.npy", "bytes": len(lengths), "xxh64": xxhash.xxh64(lengths).hexdigest()},
        "sources": {name: dict(counts) for name, counts in sources.items()}, "shards": entries,
        "totals": {"documents": sum(counts["documents"] for counts in sources.values()),
                   "samples": sum(entry["samples"] for entry in entries),
                   "tokens": sum(entry["tokens"] for entry in entries)},
    }
    return manifest, {f"{split}/lengths.npy": lengths, f"{split}/index.json": json.dumps(index, sort_keys=True).encode(),
                      f"{split}/{MANIFEST}": _manifest_bytes(manifest)}


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """One shard a line: a manifest of 70,000 shards is still read by people and by `diff`."""
    head = json.dumps({key: value for key, value in manifest.items() if key != "shards"}, indent=1)
    shards = ",\n".join("  " + json.dumps(entry) for entry in manifest["shards"])
    return f'{head[:-2]},\n "shards": [\n{shards}\n ]\n}}\n'.encode()


def _index_entry(entry: Mapping[str, Any], compression: str | None, size_limit: int | None) -> dict[str, Any]:
    """What stock readers read (streaming 0.12, format/mds/writer.py `get_config` and `encode_joint_shard`)."""
    names = sorted(COLUMNS)

    def file(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if data is None:
            return None
        return {"basename": data["basename"], "bytes": data["bytes"], "hashes": {"xxh64": data["xxh64"]}}

    return {"version": 2, "format": "mds", "compression": compression, "hashes": ["xxh64"], "size_limit": size_limit,
            "column_names": names, "column_encodings": [COLUMNS[name] for name in names],
            "column_sizes": [8 if COLUMNS[name] == "int" else None for name in names], "samples": entry["samples"],
            "raw_data": file(entry["raw"]), "zip_data": file(entry["zip"])}


def _check_content(plan: Plan, records: Sequence[Mapping[str, Any]], storage: Storage) -> None:
    read = dict.fromkeys(plan.sources, 0)
    for record in records:
        read[record["source"]] += record["read"]
    for name, documents in read.items():
        if not documents:
            for unit in plan.units:  # so that the source can be mended, or left out, later
                if unit.source == name:
                    storage.delete(record_name(unit.number))
            raise ValueError(f"{name}: the corpus is empty, it holds no document; at least one is needed. Put "
                             f"text into it, or leave it out (with another --out, unless it is appended)")
    validation = plan.options["validation"]
    sides = {split: sum(record["splits"][split]["documents"] for record in records)
             for split in (("train", "validation") if validation else ("train",))}
    for split, documents in sides.items():
        if not documents and not validation:
            raise ValueError(f"{storage.url}: no document is left, all were dropped; at least one is needed. See the "
                             "reasons in units/, relax the filters, and convert into another folder")
        if not documents:
            raise ValueError(f"--validation: {validation} given; of {sum(sides.values())} documents none fell to {split}, "
                             "and both sides need one. Give more text, another share (say 0.1 for a hundred documents), or "
                             "0 for no validation split, and another --out (or remove this one)")


def describe_splits(plan: Plan, records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
    """Split -> manifest, and name -> content of every split's tables and manifest, as plan and all records state them."""
    manifests, files = {}, {}
    for split in ("train", "validation") if plan.options["validation"] else ("train",):
        shards = [entry for record in records for entry in record["splits"][split]["shards"]]
        manifests[split], found = _describe(
            split, chunk_length=plan.options["chunk_length"], tokenizer=plan.tokenizer, options=plan.options,
            sources=add_up(plan, records, split), shards=shards, compression=plan.options["compression"])
        files |= found
    return manifests, files


def _write_splits(storage: Storage, plan: Plan, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All splits: the tables of each, then the manifests, so that until then none looks complete.

    A set that grows loses its old manifests first: between old and new tables it says that it is unfinished.
    """
    manifests, files = describe_splits(plan, records)
    last = [f"{split}/{MANIFEST}" for split in manifests]
    if any(storage.exists(name) and storage.read_bytes(name) != files[name] for name in last):
        for name in last:
            storage.delete(name)
    for name in [*(name for name in files if name not in last), *last]:
        storage.write_bytes(name, files[name])
    return manifests


def add_up(plan: Plan, records: Sequence[Mapping[str, Any]], split: str) -> dict[str, dict[str, Any]]:
    """Source name -> counts of one split over all records, as its manifest states them."""
    totals: dict[str, dict[str, Any]] = {name: {**facts, **dict.fromkeys(_COUNTS, 0), "dropped": {}}
                                         for name, facts in plan.sources.items()}
    for record in records:
        total, counts = totals[record["source"]], record["splits"][split]
        for key in _COUNTS:
            total[key] += counts[key]
        for reason, number in counts["dropped"].items():
            total["dropped"][reason] = total["dropped"].get(reason, 0) + number
    return {name: {**total, "dropped": dict(sorted(total["dropped"].items()))} for name, total in totals.items()
            if total["documents"] or total["dropped"]}


def _write_card(storage: Storage, manifests: Mapping[str, dict[str, Any]], records: Sequence[Mapping[str, Any]]) -> None:
    from ettin_foundry.corpus.card import write_card

    summed = {}
    for split, manifest in manifests.items():
        total = np.zeros(manifest["chunk_length"] + 1, np.int64)
        for record in records:
            for entry in record["splits"][split]["shards"]:
                total[:len(entry["lengths"])] += np.asarray(entry["lengths"], np.int64)
        summed[split] = total
    write_card(storage, dict(manifests), summed)
