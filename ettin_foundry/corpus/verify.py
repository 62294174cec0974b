"""Compares every byte of a dataset with what the dataset states of itself, and lists all that is wrong.

Checked are: every shard's hash, layout, counts, lengths, packed rows and token range; index.json and the manifest's totals;
files that nothing names; the tokenizer against its fingerprint; the small files against plan and completion records, where
these are kept, and against the sha256 in the data card. What a person may still have to finish (an appended source) is a
note, not a problem. Nothing is written into the dataset. (A mixture is opened as a loader opens it, which may expand
compressed shards beside themselves.)
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.corpus.card import CARD, read_block
from ettin_foundry.corpus.finalize import describe_splits, read_plan, read_record
from ettin_foundry.corpus.units import PLAN, Plan, record_name
from ettin_foundry.data.inspect import Found, Sample, draw_samples, find_dataset, load_decoder
from ettin_foundry.data.manifest import COLUMNS, INDEX, LENGTHS, MANIFEST, read_json
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.mixture import expand_entries
from ettin_foundry.data.mixture import MixtureSplit

_SAMPLES = 16  # chunks of each source and split that are decoded
_MAX_CARD_BYTES = 16 << 20
_READERS = 16  # records of a remote dataset that are fetched at a time
_COUNTS = {"documents": "documents", "chunks": "samples", "tokens": "tokens"}  # of a source: of a shard


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: each names a file and says what is wrong with it. notes: worth knowing, not wrong.
        files, num_bytes: shards read and hashed. seconds: how long that took.
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
        return (f"{self.files:,} shards, {self.num_bytes / 1e6:,.1f} MB in {self.seconds:.1f} s, {speed:,.0f} MB/s"
                f"{splits}")


def verify_dataset(location: str | os.PathLike[str], *, threads: int | None = None,
                   tick: Callable[[int], None] = lambda num_bytes: None) -> Report:
    """Checks a dataset, one split of it, or a mixture and all shards that it takes from.

    Args:
        location: folder or URL. Shards behind a URL are read into memory, `threads` at a time.
        threads: shards checked at a time; None takes every core that this process may use.
        tick: called with the bytes of each shard when it is done, from any thread.

    Raises:
        FileNotFoundError: no dataset is there.
    """
    check = _Check(find_dataset(location), tick)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool, \
            tempfile.TemporaryDirectory(prefix="ettin-") as scratch:
        begin = time.perf_counter()
        for split in check.found.splits:
            check.check_split(split, Path(scratch), pool)
        check.report.seconds = time.perf_counter() - begin
        check.check_tokenizer(Path(scratch))
    if check.found.whole:
        expected = check.check_records() | check.check_card()
        for split in sorted(expected ^ set(check.found.splits) if expected else ()):
            check.wrong(split, "missing, although the dataset has this split" if split in expected else
                        "is no split of this dataset; move it away")
    check.report.problems = list(dict.fromkeys(check.report.problems))
    return check.report


class _Check:
    """One run over one dataset; the manifests of the splits that could be opened."""

    def __init__(self, found: Found, tick: Callable[[int], None]) -> None:
        self.found, self.storage, self.tick, self.report = found, found.storage, tick, Report()
        self.manifests: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()

    def wrong(self, name: str, text: str) -> None:
        self.report.problems.append(f"{self.storage.where(name)}: {text}")

    def note(self, name: str, text: str) -> None:
        self.report.notes.append(f"{self.storage.where(name)}: {text}")

    def attempt(self, work: Callable[[], Any]) -> Any:
        """The result; None, and a problem more, when it fails."""
        try:
            return work()
        except (ValueError, OSError) as error:
            self.report.problems.append(str(error))
            return None

    def check_split(self, split: str, scratch: Path, pool: ThreadPoolExecutor) -> None:
        first_problem = len(self.report.problems)
        data = self.attempt(lambda: self.found.open(split, scratch))
        if data is not None:
            self.manifests[split] = data.manifest
            totals = data.manifest["totals"]
            self.report.counts[split] = totals.get("documents"), totals["samples"], totals["tokens"]
            shards = range(data.num_shards)
            if isinstance(data, MixtureSplit):  # each shard that it takes from once
                entries = expand_entries(data.manifest)[0]
                shards = np.unique(np.stack([entries.set, entries.shard, entries.part]), axis=1, return_index=True)[1]
            else:
                self.report.problems += [*_index_problems(data), *_total_problems(data)]
                self._check_names(split, data)
            self._check_shards(data, shards, pool)
            if self.storage.is_local:
                self._decode(data)
        for at in range(first_problem, len(self.report.problems)):  # files of a remote split are named by their URLs
            self.report.problems[at] = self.report.problems[at].replace(str(scratch / split), self.storage.where(split))

    def _check_shards(self, data: Any, shards: Iterable[int], pool: ThreadPoolExecutor) -> None:
        stored, own = pickle.dumps(data), threading.local()

        def check(shard: int) -> None:
            if isinstance(data, MixtureSplit) and not hasattr(own, "data"):
                own.data = pickle.loads(stored)  # an open mixture is not for several threads at once
            reader = getattr(own, "data", data)
            num_bytes = self.attempt(lambda: reader.check_shard(int(shard))) or 0
            with self.lock:
                self.report.files += 1
                self.report.num_bytes += num_bytes
            self.tick(num_bytes)

        list(pool.map(check, shards))

    def _check_names(self, split: str, data: MDSSplit) -> None:
        known = {MANIFEST, INDEX, LENGTHS, *(file["basename"] for shard in data.manifest["shards"]
                                             for file in (shard["raw"], shard["zip"]) if file)}
        for name, _ in self.storage.list(f"{split}/"):
            if name.removeprefix(f"{split}/") not in known:
                self.wrong(name, f"is not named by {MANIFEST}; only the files of the split belong here. Move it away")

    def _decode(self, data: Any) -> None:
        """A few chunks of each source as text, for a person to look at; and no special token may be in them."""
        try:
            samples = draw_samples(data, load_decoder(self.storage), per_source=_SAMPLES)
        except (ValueError, OSError):
            return  # whatever it is, it is listed already
        special = {number for number in (data.tokenizer.get("special_ids") or {}).values() if isinstance(number, int)}
        for sample in samples:
            if inside := special & set(sample.tokens.tolist()):
                self.report.problems.append(
                    f"{data.local}: chunk {sample.part} of document {sample.doc!r:.100} holds the special token "
                    f"{min(inside)}; chunks hold plain ones only. Convert it again")
        shown = {sample.source: sample for sample in reversed(samples)}  # the first of each
        self.report.samples += [shown[source] for source in sorted(shown)]

    def check_tokenizer(self, scratch: Path) -> None:
        """tokenizer/ against the manifests' fingerprints, and the manifests against each other."""
        from ettin_foundry.data.cache import fetch_tokenizer
        from ettin_foundry.data.tokenizer import check, load

        for key in ("tokenizer", "chunk_length", "compression", "options"):
            values = [manifest.get(key) for manifest in self.manifests.values()]
            if any(value != values[0] for value in values):
                self.wrong("", f"{key} differs between the manifests of {' and '.join(self.manifests)}; convert again")
        if not self.storage.list("tokenizer/"):
            (self.wrong if self.found.whole else self.note)("tokenizer", "missing; put the dataset's own back")
            return
        try:
            folder = Path(self.storage.url)
            if not self.storage.is_local:
                fetch_tokenizer(folder := scratch, self.storage.url)
            loaded = load(folder / "tokenizer")
            for manifest in self.manifests.values():
                self.attempt(lambda manifest=manifest: check(loaded, manifest["tokenizer"]))
        except Exception as error:  # the tokenizers library raises plain Exception
            self.wrong("tokenizer", f"cannot be used ({error!s:.300})")

    def check_records(self) -> set[str]:
        """The small files against those that plan and completion records make; the splits that the plan states."""
        plan = self.attempt(lambda: read_plan(self.storage))
        present = {name for name, _ in self.storage.list("units/")}
        units = plan.units if plan is not None else ()
        for name in sorted(present - {record_name(unit.number) for unit in units}):
            self.wrong(name, f"belongs to no unit of {PLAN}; move it away, or put the plan back")
        if plan is None:
            return set()
        done = [unit.number for unit in units if record_name(unit.number) in present]
        with ThreadPoolExecutor(_READERS) as pool:
            records = list(pool.map(lambda unit: self.attempt(lambda: read_record(self.storage, plan, unit)), done))
        if len(done) < len(units):
            unfinished = {unit.number for unit in units} - set(done)
            used = {int(shard["raw"]["basename"].split(".")[1]) for manifest in self.manifests.values()
                    for shard in manifest.get("shards", ())}
            for unit in sorted(unfinished & used):
                self.wrong(record_name(unit), "missing, although shards of this unit are in use; run the same conversion "
                           "again")
            if not unfinished & used:
                self.note(PLAN, f"{len(unfinished)} of {len(units)} units are not done yet; run the same conversion again")
        elif None not in records:
            self._compare(plan, records)
        return {"train", "validation"} if plan.options.get("validation") else {"train"}

    def _compare(self, plan: Plan, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            for unit, record in zip(plan.units, records):
                read = sum(counts["documents"] + sum(counts["dropped"].values()) for counts in record["splits"].values())
                if (record["unit"], record["read"]) != (unit.number, read):
                    self.wrong(record_name(unit.number), f"states unit {record['unit']!r:.50} and {record['read']!r:.50} "
                               f"documents, not {unit.number} and {read}; move it away and convert again")
            manifests, files = describe_splits(plan, records)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            self.wrong("units/", f"a record is not what the converter writes ({error!r:.200}); convert again")
            return
        for name, data in files.items():
            split, _, base = name.partition("/")
            if base == MANIFEST and split in self.manifests:  # the version of the code may be another
                keys = [key for key, value in manifests[split].items()
                        if key != "code_version" and self.manifests[split].get(key) != value]
            else:
                keys = [base] if self.storage.exists(name) and self.storage.read_bytes(name) != data else []
            if keys:
                self.wrong(name, f"{', '.join(keys)} differs from {PLAN} and units/; run ettin finalize")

    def check_card(self) -> set[str]:
        """Every small file against the sha256 in the data card; the splits that the card states."""
        block = None
        if self.storage.exists(CARD) and self.storage.size(CARD) <= _MAX_CARD_BYTES:
            text = self.storage.read_bytes(CARD).decode(errors="replace")
            block = self.attempt(lambda: read_block(text))
        if block is None:
            self.note(CARD, "is no data card of ettin finalize; altered small files show only where they contradict others")
            return set()
        for name, stated in block["files"].items():
            found = self.attempt(lambda name=name: hashlib.sha256(self.storage.read_bytes(name)).hexdigest())
            if found not in (None, stated):
                self.wrong(name, f"sha256 is {found}; {CARD} states {stated}. Copy it from the store, or convert again")
        return set(block["splits"])


def _total_problems(data: MDSSplit) -> Iterator[str]:
    """The manifest's counts by source, against its totals and its shards."""
    where, manifest = data.local / MANIFEST, data.manifest
    try:
        for key, of_shard in _COUNTS.items():
            stated = {name: source[key] for name, source in manifest["sources"].items()}
            if sum(stated.values()) != manifest["totals"][of_shard]:
                yield f"{where}: its sources sum to {sum(stated.values())} {key}, totals state another number; convert again"
            if not all(of_shard in shard for shard in manifest["shards"]):
                continue  # documents are missing in an older version
            held = dict.fromkeys(stated, 0)
            for shard in manifest["shards"]:
                held[shard["source"]] = held.get(shard["source"], 0) + shard[of_shard]
            for name in held:
                if held[name] != stated.get(name):
                    yield f"{where}: source {name!r:.100} states {stated.get(name)} {key}, its shards hold {held[name]}"
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{where}: sources cannot be read ({error!r:.100}); convert again"


def _index_problems(data: MDSSplit) -> Iterator[str]:
    """index.json is what stock readers trust; it must say what the manifest says."""
    path, names = data.local / INDEX, sorted(COLUMNS)

    def file(entry: Any, hashes: Any) -> tuple[Any, ...] | None:
        return entry and (entry["basename"], entry["bytes"], hashes(entry)["xxh64"])

    expected = [(2, "mds", names, [COLUMNS[name] for name in names], s["samples"], file(s["raw"], dict), file(s["zip"], dict))
                for s in data.manifest["shards"]]
    try:
        index = read_json(path)
        found = [(s["version"], s["format"], s["column_names"], s["column_encodings"], s["samples"],
                  *(file(s[key], lambda entry: entry["hashes"]) for key in ("raw_data", "zip_data")))
                 for s in index["shards"]]
        if index["version"] != 2 or len(found) != len(expected):
            yield f"{path}: version {index['version']!r:.50} with {len(found)} shards; 2 with {len(expected)} is right"
        elif found != expected:
            at = next(at for at, pair in enumerate(zip(found, expected)) if pair[0] != pair[1])
            yield f"{path}: its shard {at} differs from {MANIFEST}; run ettin finalize, or convert again"
    except (ValueError, OSError) as error:
        yield str(error)
    except (KeyError, TypeError) as error:
        yield f"{path}: is not an MDS index ({error!r:.100}); run ettin finalize, or convert again"
