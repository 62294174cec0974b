"""Puts finished units together into a dataset that can be read: lengths.npy, index.json, manifest.json, data card.

Every unit left a completion record with the entries of its shards. They are concatenated in the order of the plan, so
it does not matter who did which unit when. manifest.json is written last: a split that has one is complete.

The data card, README.md as the Hugging Face Hub reads it, is a pure function of the dataset's small files. Its table of
their sha256 is what `ettin verify` compares them with. dataset_card.md beside this file is its template.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jinja2 import Environment, StrictUndefined

from ettin_foundry.corpus import plan as plans
from ettin_foundry.corpus.plan import COUNTS, PLAN, SPLITS, Plan
from ettin_foundry.corpus.writer import shard_config
from ettin_foundry.data import COLUMNS, FORMAT, INDEX, LENGTHS, MANIFEST, VERSION
from ettin_foundry.data.cache import locked
from ettin_foundry.data.inspect import length_cells
from ettin_foundry.data.shards import index_entry
from ettin_foundry.data.storage import Storage, check_name, is_url, join, open_storage
from ettin_foundry.version import __version__

log = logging.getLogger(__name__)

Record = Mapping[str, Any]
Manifests = Mapping[str, Mapping[str, Any]]
Lengths = Mapping[str, np.ndarray]

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("dataset_card.md")
_MARK = "<!-- ettin-set "  # a card without it was written by hand, and is never replaced
_HASH = re.compile(r"^\| `(.*)` \| `(.*)` \|$", re.MULTILINE)
# of https://huggingface.co/docs/hub/repositories-licenses those that text has; the Hub refuses words out of its list
_LICENCES = re.compile(r"apache-2\.0|mit|bsd-[23]-clause|mpl-2\.0|a?gpl-3\.0|gpl-2\.0|gfdl|unlicense|pddl|"
                       r"odc-by|odbl|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-4\.0|cc-by(-sa)?-3\.0|cdla-permissive-[12]\.0|unknown")


def done_units(storage: Storage, plan: Plan, made_with: str | None = None) -> dict[int, Record]:
    """Unit number -> completion record, of every finished unit whose shards are all there, of the right size.

    Until they are in a finished dataset, units that other libraries than `made_with` made lose their records.
    """
    numbers = sorted(plans.finished_units(storage).intersection(range(len(plan.units))))
    with ThreadPoolExecutor(16) as pool:  # a remote dataset answers slowly
        records = dict(zip(numbers, pool.map(lambda number: plans.read_record(storage, plan, number), numbers)))
    sizes = {name: size for split in SPLITS for name, size in storage.list(f"{split}/")}
    kept, done = plans.published_units(storage) if made_with else records, {}
    for number, record in records.items():
        files = [(f"{split}/{file['basename']}", file["bytes"]) for split, counts in record["splits"].items()
                 for entry in counts["shards"] for file in [entry["zip"] or entry["raw"]]]
        if lost := [(name, size) for name, size in files if sizes.get(name) != size]:
            log.warning("unit %d is done again: %s is missing or not of %d bytes", number, *lost[0])
        elif number not in kept and record.get("made_with", made_with) != made_with:
            log.warning("unit %d is done again: made with %s, here is %s", number, record["made_with"], made_with)
            storage.delete(plans.record_name(number))
        else:
            done[number] = record
    return done


@contextlib.contextmanager
def sole_writer(out: str, *, shared: bool = False) -> Iterator[None]:
    """Refuses a folder that another conversion writes to; tasks of an array share it.

    Without locks (object stores, some NFS) equal conversions write equal bytes; of others one fails, or a reader does.
    """
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as tidy:
        if not is_url(out):
            (folder := Path(join(out)).resolve()).mkdir(parents=True, exist_ok=True)
            tidy.callback(lambda: folder.is_dir() and not any(folder.iterdir()) and folder.rmdir())  # it made nothing
            with contextlib.suppress(OSError):
                if not stack.enter_context(locked(folder, wait=False, shared=shared)):
                    raise ValueError(f"--out must be used by one conversion at a time, got {out}, which another one "
                                     "writes to; wait for it, or name another folder")
        yield


def finalize(out: str | os.PathLike[str], *, max_bad_records: int | None = None) -> dict[str, dict[str, Any]]:
    """Makes a readable dataset of the finished units of OUT; split -> manifest. Again gives the same bytes.

    Raises FileNotFoundError where units are missing, ValueError where no document is there to train on, or more than
    `max_bad_records` were unreadable.
    """
    storage = open_storage(out)
    if (plan := plans.read_plan(storage)) is None:
        raise FileNotFoundError(f"{storage.where(PLAN)} is missing; run ettin convert with this --out first")
    found = done_units(storage, plan)
    if missing := [unit for unit in plan.units if unit.number not in found]:
        raise FileNotFoundError(f"{storage.url}: {len(missing)} of {len(plan.units)} units are not finished, the first "
                                f"is {missing[0].label}; run the same conversion (or tasks of the job array) again")
    manifests, files, lengths = _describe_splits(plan, [found[unit.number] for unit in plan.units])
    _check_content(plan, manifests, storage, max_bad_records)
    old = [name for name in files if name.endswith(MANIFEST) and storage.exists(name)]
    if any(storage.read_bytes(name) != files[name] for name in old):
        for name in old:  # between old and new tables a dataset that grows is unfinished
            storage.delete(name)
    for name, data in files.items():
        storage.write_bytes(name, data)
    write_card(storage, manifests, lengths)
    ours = files.keys() | {f"{split}/{file['basename']}" for split, manifest in manifests.items()
                           for shard in manifest["shards"] for file in (shard["raw"], shard["zip"]) if file}
    for name, _ in [entry for split in SPLITS for entry in storage.list(f"{split}/")]:
        if name.partition("/")[2].startswith(("shard.", MANIFEST, INDEX, LENGTHS)) and name not in ours:
            storage.delete(name)  # what tries with other options or another input left
    shutil.rmtree(storage.scratch(), ignore_errors=True)  # what killed processes left
    return manifests


def _check_content(plan: Plan, manifests: Mapping[str, Any], storage: Storage, max_bad_records: int | None) -> None:
    """Warns of sources and splits without a document; ValueError where there is none to train on."""
    documents, dropped = Counter[str](), Counter[str]()
    for manifest in manifests.values():
        for name, counts in manifest["sources"].items():
            documents[name] += counts["documents"]
            dropped.update(counts["dropped"])
    if not manifests["train"]["shards"]:
        for unit in plan.units:  # so that everything may be changed
            storage.delete(plans.record_name(unit.number))
        raise ValueError(f"sources must hold a document for training, got {documents.total()} for validation and "
                         f"{dict(dropped) or 'none'} dropped; give other text, --text-field, filters or --validation")
    if max_bad_records is not None and dropped["unreadable"] > max_bad_records:
        raise ValueError(f"--max-bad-records must be at least the {dropped['unreadable']} records that could not be "
                         f"read, got {max_bad_records}; with more the same command reads nothing again")
    for name in plan.sources:
        if not documents[name]:
            log.warning("%s: no document of it is in the dataset", name)
    if plan.options["validation"] and "validation" not in manifests:
        log.warning("--validation %s: no document fell to validation; the dataset has the split train alone, which "
                    "trains with eval_loader=null", plan.options["validation"])


def _describe_splits(plan: Plan, records: Sequence[Record]) -> tuple[
        dict[str, dict[str, Any]], dict[str, bytes], dict[str, np.ndarray]]:
    """What plan and all records state of train, and of validation where that holds a document.

    Returns split -> manifest; name -> content of the files, manifests last; split -> (chunk_length + 1,) number of
    chunks of each length.
    """
    manifests, tables, texts, lengths = {}, dict[str, bytes](), dict[str, bytes](), {}
    for split in SPLITS:
        mine = [(record["source"], record["splits"][split]) for record in records if split in record["splits"]]
        shards = [entry for _, counts in mine for entry in counts["shards"]]
        if not shards and split != "train":
            continue
        table = np.zeros((len(shards), plan.options["chunk_length"] + 1), "<u4")
        for row, shard in zip(table, shards):
            row[:len(shard["lengths"])] = shard["lengths"]
        lengths[split], buffer = table.sum(0, dtype=np.int64), io.BytesIO()
        np.save(buffer, table)
        tables[f"{split}/{LENGTHS}"] = content = buffer.getvalue()
        config = shard_config(plan.options["shard_size"], plan.options["compression"])
        index = {"version": 2, "shards": [{**config, **index_entry(shard)} for shard in shards]}
        tables[f"{split}/{INDEX}"] = json.dumps(index, sort_keys=True).encode()  # as stock readers read it
        sources = _add_up(plan, mine)
        head = {
            "format": FORMAT, "version": VERSION, "split": split, "chunk_length": plan.options["chunk_length"],
            "compression": plan.options["compression"], "tokenizer": dict(plan.tokenizer), "columns": COLUMNS,
            "options": dict(plan.options), "code_version": __version__,
            "lengths": {"basename": LENGTHS, "bytes": len(content), "xxh64": xxhash.xxh64(content).hexdigest()},
            "sources": sources,
            "totals": {"documents": sum(counts["documents"] for counts in sources.values()),
                       **{key: sum(shard[key] for shard in shards) for key in ("samples", "tokens")}},
        }
        entries = [{key: value for key, value in shard.items() if key != "lengths"} for shard in shards]
        manifests[split] = {**head, "shards": entries}
        # one shard a line: a manifest of 70,000 shards is still read by people and by `diff`
        lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
        texts[f"{split}/{MANIFEST}"] = f'{json.dumps(head, indent=1)[:-2]},\n "shards": [\n{lines}\n ]\n}}\n'.encode()
    return manifests, tables | texts, lengths


def _add_up(plan: Plan, counted: Sequence[tuple[str, Record]]) -> dict[str, dict[str, Any]]:
    """Source name -> counts of one split over all its units, as its manifest states them."""
    totals = {}
    for name, facts in plan.sources.items():
        mine = [counts for source, counts in counted if source == name]
        dropped = sum((Counter(counts["dropped"]) for counts in mine), Counter())
        unknown = sum(counts.get("unknown", 0) for counts in mine)  # tokens, for characters out of the vocabulary
        total = {**facts, **{key: sum(counts[key] for counts in mine) for key in COUNTS},
                 "dropped": dict(sorted(dropped.items())), **({"unknown": unknown} if unknown else {})}
        if total["documents"] or dropped:
            totals[name] = total
    return totals


# ------------------------------------------------------------------ the data card


def write_card(storage: Storage, manifests: Manifests, lengths: Lengths) -> None:
    """Writes README.md of splits whose manifests are in the storage already; one written by hand stays, with a warning.

    `lengths` are (chunk_length + 1,) chunks of each length, by split.
    """
    if storage.exists(CARD) and _MARK.encode() not in storage.read_bytes(CARD):
        log.warning("%s was written by hand and stays; move it away and run ettin finalize", storage.where(CARD))
    else:
        storage.write_bytes(CARD, card_text(storage, manifests, lengths).encode())


def card_text(storage: Storage, manifests: Manifests, lengths: Lengths) -> str:
    """The text of README.md; arguments as of `write_card`."""
    # named after its sources, not its folder: the same conversion gives the same bytes wherever it is done
    names = list(dict.fromkeys(name for manifest in manifests.values() for name in manifest["sources"]))
    name = ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    small = sorted([file for file, _ in storage.list("tokenizer/")] + [f"{split}/{MANIFEST}" for split in manifests])
    hashes = {file: hashlib.sha256(storage.read_bytes(file)).hexdigest() for file in small}
    jinja = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    jinja.filters.update(clean=_clean, commas="{:,}".format, json=json.dumps)
    return jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        licence=_licence(manifests), name=name, manifests=manifests, first=next(iter(manifests.values())),
        lengths={split: length_cells(lengths[split]) for split in manifests}, hashes=hashes, mark=_MARK)


def read_hashes(storage: Storage) -> dict[str, str]:
    """Name -> sha256 of the small files, as a dataset's card states them; nothing without a card of `write_card`.

    Raises ValueError for a name outside of the dataset.
    """
    text = storage.read_bytes(CARD, at_most=16 << 20).decode(errors="replace") if storage.exists(CARD) else ""
    return {check_name(name): digest for name, digest in _HASH.findall(text)} if _MARK in text else {}


def _licence(manifests: Manifests) -> dict[str, Any]:
    """`license` of the front matter, and `license_name` where the Hub has no word for one."""
    licences = sorted({str(source.get("licence") or "unknown") for manifest in manifests.values()
                       for source in manifest["sources"].values()})
    others = [licence for licence in licences if not _LICENCES.fullmatch(licence.lower())]
    known = sorted({"other" if licence in others else licence.lower() for licence in licences})
    slug = re.sub(r"[^a-z0-9.]+", "-", " ".join(others).lower()).strip("-.")[:96] or "other"
    return {"license": known if len(known) > 1 else known[0], **({"license_name": slug} if others else {})}


def _clean(text: str) -> str:
    """Foreign text as one line of Markdown: no markup of its own, no control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\|`*_<>\[\]#!])", r"\\\1", text)
