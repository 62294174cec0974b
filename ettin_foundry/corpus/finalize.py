"""Puts finished units together into a dataset that can be read: lengths.npy, index.json, manifest.json, data card.

Every unit left a completion record with the entries of its shards. They are concatenated in the order of the plan, so it
does not matter who did which unit when. manifest.json is written last: a split that has one is complete.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from ettin_foundry.corpus.plan import COUNTS, PLAN, Plan, read_plan, read_record, record_name
from ettin_foundry.corpus.writer import shard_config
from ettin_foundry.data import COLUMNS, FORMAT, INDEX, LENGTHS, MANIFEST, VERSION
from ettin_foundry.data.storage import Storage, open_storage
from ettin_foundry.version import __version__

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
_READERS = 16  # records of a remote dataset that are fetched at a time


def done_units(storage: Storage, plan: Plan) -> dict[int, Record]:
    """Unit number -> completion record, of every finished unit whose shards are all there, of the right size."""
    known = {name for name, _ in storage.list("units/")}
    numbers = [unit.number for unit in plan.units if record_name(unit.number) in known]
    with ThreadPoolExecutor(_READERS) as pool:
        records = dict(zip(numbers, pool.map(lambda number: read_record(storage, plan, number), numbers)))
    splits = {split for record in records.values() for split in record["splits"]}
    found = {name: size for split in splits for name, size in storage.list(f"{split}/")}
    done = {}
    for number, record in records.items():
        files = {f"{split}/{file['basename']}": file["bytes"] for split, counts in record["splits"].items()
                 for entry in counts["shards"] for file in [entry["zip"] or entry["raw"]]}
        if bad := next((name for name, size in files.items() if found.get(name) != size), None):
            log.warning("unit %d: %s is missing or not of %d bytes; it is done again", number, bad, files[bad])
        else:
            done[number] = record
    return done


def finalize(out: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Makes a readable dataset of the finished units of OUT; split -> manifest. Again gives the same bytes.

    Raises FileNotFoundError where units are missing, ValueError where a source or a split holds no document.
    """
    from ettin_foundry.corpus.card import write_card  # draws with matplotlib

    storage = open_storage(out)
    if (plan := read_plan(storage)) is None:
        raise FileNotFoundError(f"{storage.where(PLAN)} is missing; run data_prep/convert.py with this --out first")
    found = done_units(storage, plan)
    if missing := [unit for unit in plan.units if unit.number not in found]:
        raise FileNotFoundError(f"{storage.url}: {len(missing)} of {len(plan.units)} units are not finished, the first is "
                                f"{missing[0].label}; run the same conversion (or tasks of the job array) again")
    records = [found[unit.number] for unit in plan.units]
    _check_content(plan, records, storage)
    manifests, files = describe_splits(plan, records)
    old = [name for name in files if name.endswith(MANIFEST) and storage.exists(name)]
    if any(storage.read_bytes(name) != files[name] for name in old):
        for name in old:  # between old and new tables a dataset that grows is unfinished
            storage.delete(name)
    for name, data in files.items():
        storage.write_bytes(name, data)
    write_card(storage, dict(manifests), {split: _table(plan, shards).sum(0, dtype=np.int64)
                                          for split, shards in _shards(plan, records).items()})
    shutil.rmtree(storage.scratch(), ignore_errors=True)  # what killed processes left
    return manifests


def _shards(plan: Plan, records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """Split -> entries of its shards in order, each with its histogram `lengths`."""
    return {split: [entry for record in records for entry in record["splits"][split]["shards"]]
            for split in (("train", "validation") if plan.options["validation"] else ("train",))}


def _table(plan: Plan, shards: Sequence[Record]) -> np.ndarray:
    """(shards, chunk_length + 1): number of chunks of each length."""
    table = np.zeros((len(shards), plan.options["chunk_length"] + 1), "<u4")
    for row, shard in zip(table, shards):
        row[:len(shard["lengths"])] = shard["lengths"]
    return table


def _check_content(plan: Plan, records: Sequence[Record], storage: Storage) -> None:
    for name in plan.sources:
        if not sum(record["read"] for record in records if record["source"] == name):
            for unit in plan.units:  # so that the source can be mended, or left out, later
                if unit.source == name:
                    storage.delete(record_name(unit.number))
            raise ValueError(f"{name}: the corpus is empty; put text into it, or leave it out (with another --out, unless "
                             "it is appended)")
    counts = {split: sum(record["splits"][split]["documents"] for record in records) for split in _shards(plan, records)}
    if empty := [split for split, documents in counts.items() if not documents]:
        raise ValueError(f"--validation must leave documents on both sides, got {plan.options['validation']}: of "
                         f"{sum(counts.values())} documents none fell to {empty[0]}; change it or the filters, and --out")


def describe_splits(plan: Plan, records: Sequence[Record]) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
    """What plan and all records state: split -> manifest; name -> content of the files, manifests last."""
    manifests, tables, texts = {}, dict[str, bytes](), dict[str, bytes]()
    for split, shards in _shards(plan, records).items():
        buffer = io.BytesIO()
        np.save(buffer, _table(plan, shards))
        tables[f"{split}/{LENGTHS}"] = lengths = buffer.getvalue()
        tables[f"{split}/{INDEX}"] = _index(plan, shards)
        sources = _add_up(plan, records, split)
        manifest = manifests[split] = {
            "format": FORMAT, "version": VERSION, "split": split, "chunk_length": plan.options["chunk_length"],
            "compression": plan.options["compression"], "tokenizer": dict(plan.tokenizer), "columns": COLUMNS,
            "options": dict(plan.options), "code_version": __version__,
            "lengths": {"basename": LENGTHS, "bytes": len(lengths), "xxh64": xxhash.xxh64(lengths).hexdigest()},
            "sources": sources,
            "shards": [{key: value for key, value in shard.items() if key != "lengths"} for shard in shards],
            "totals": {"documents": sum(counts["documents"] for counts in sources.values()),
                       **{key: sum(shard[key] for shard in shards) for key in ("samples", "tokens")}},
        }
        # one shard a line: a manifest of 70,000 shards is still read by people and by `diff`
        head = json.dumps({key: value for key, value in manifest.items() if key != "shards"}, indent=1)
        lines = ",\n".join("  " + json.dumps(entry) for entry in manifest["shards"])
        texts[f"{split}/{MANIFEST}"] = f'{head[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'.encode()
    return manifests, tables | texts


def _add_up(plan: Plan, records: Sequence[Record], split: str) -> dict[str, dict[str, Any]]:
    """Source name -> counts of one split over all records, as its manifest states them."""
    totals: dict[str, dict[str, Any]] = {name: {**facts, **dict.fromkeys(COUNTS, 0), "dropped": {}}
                                         for name, facts in plan.sources.items()}
    for record in records:
        total, counts = totals[record["source"]], record["splits"][split]
        for key in COUNTS:
            total[key] += counts[key]
        for reason, number in counts["dropped"].items():
            total["dropped"][reason] = total["dropped"].get(reason, 0) + number
    return {name: {**total, "dropped": dict(sorted(total["dropped"].items()))} for name, total in totals.items()
            if total["documents"] or total["dropped"]}


def _index(plan: Plan, shards: Sequence[Record]) -> bytes:
    """index.json as stock readers read it (streaming 0.12, format/mds/writer.py `encode_joint_shard`)."""
    def file(data: dict[str, Any] | None) -> dict[str, Any] | None:
        return data and {"basename": data["basename"], "bytes": data["bytes"], "hashes": {"xxh64": data["xxh64"]}}

    config = shard_config(plan.options["shard_size"], plan.options["compression"])
    entries = [{**config, "samples": entry["samples"], "raw_data": file(entry["raw"]),
                "zip_data": file(entry["zip"])} for entry in shards]
    return json.dumps({"version": 2, "shards": entries}, sort_keys=True).encode()
