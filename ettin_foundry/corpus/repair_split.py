"""Repairs one split: decides what it must be, holds every shard to that, and writes its small files again.

What the split must be is taken from the first of these that is whole: the completion records, the manifest that is there,
the manifest of a copy, the data card together with the shards, the shards alone. Whatever it is taken from is built in a
temporary folder and read back through the checks of every reader before the set is touched. Moving files and the report
are repair.py's work (`Workbench`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.corpus.card import HEAD_KEYS
from ettin_foundry.corpus.losses import describe_loss
from ettin_foundry.corpus.set_facts import (
    Facts,
    Units,
    build_split,
    facts_from_card,
    facts_from_units,
    settle_sources,
    without,
)
from ettin_foundry.corpus.split_check import SMALL_FILES, check_index, compare_entry
from ettin_foundry.corpus.workbench import Workbench
from ettin_foundry.data.inspect import SHARD_NAME, shard_order
from ettin_foundry.data.manifest import (
    INDEX,
    LENGTHS,
    MANIFEST,
    MAX_CHUNK_LENGTH,
    check_hash,
    expand_all,
    map_file,
    read_json,
    read_manifest,
)
from ettin_foundry.data.shards import parse_shard, scan_shard

__all__ = ["SplitRepair"]

log = logging.getLogger(__name__)

_SCANNED = 1 << 30  # a larger packed shard is held to its hashes, not scanned
_VOCABULARY = 1 << 16


class SplitRepair:
    """One run over one split of a set.

    Args:
        bench: the set and what may be done to it. split: name of the folder.
        units: plan and records. block: of the data card. siblings: manifests of the other splits, for facts that all share.
        pool: shards are read in it.
    """

    def __init__(self, bench: Workbench, split: str, *, units: Units, block: Mapping[str, Any] | None,
                 siblings: Sequence[Mapping[str, Any]], pool: ThreadPoolExecutor) -> None:
        self.bench, self.split, self.units, self.block, self.siblings, self.pool = bench, split, units, block, siblings, pool
        self.folder = bench.folder / split
        self.old: dict[str, Any] | None = None

    def run(self) -> tuple[dict[str, Any], np.ndarray] | None:
        """Repairs the split.

        Returns:
            Its manifest and (chunk_length + 1,) int64 chunks of each length; None when it could not be made whole, the
            reasons then being in the report.
        """
        facts = self._facts()
        if facts is None:
            return None
        expected = self._expected(facts)
        found, bad = self._read(facts, expected)
        self._fetch(facts, expected, found, bad)
        self._stray(expected)
        if not self._take_out(facts, expected, found, bad):
            return None
        kept = [entry for entry in expected if entry["raw"]["basename"] not in bad]
        if not kept:
            self.bench.open(f"{self.folder}: no good shard is left; a split holds at least one. Fetch or convert it again")
            return None
        return self._write(facts, kept, found)

    # ------------------------------------------------------------- what it must be

    def _facts(self) -> Facts | None:
        name, path = f"{self.split}/{MANIFEST}", self.folder / MANIFEST
        stated = (self.block or {"files": {}})["files"].get(name)
        try:
            self.old = read_manifest(self.folder)
        except (ValueError, OSError) as error:
            self.bench.say(str(error))
        old = None if self.old is None else _facts_of(self.old, name)
        card = facts_from_card(self.block, self.split)
        if self.units.whole:
            facts = facts_from_units(self.units, self.split)
            version = next((f.head["code_version"] for f in (old, card) if f is not None and "code_version" in f.head), None)
            return Facts({**facts.head, "code_version": version}, facts.shards, facts.origin)
        if old is not None and (stated is None or hashlib.sha256(path.read_bytes()).hexdigest() == stated):
            return old
        known = self._facts_of_copy(name, stated) or card or old
        if known is None and self.units.plan is not None:  # what is here may be half of a set
            self.bench.open(f"{path}: missing, and {len(self.units.plan.units) - len(self.units.records)} of "
                            f"{len(self.units.plan.units)} units have no completion record. Run the same conversion again")
            return None
        return known or self._facts_of_shards()

    def _facts_of_copy(self, name: str, stated: str | None) -> Facts | None:
        made = self.bench.fetch(name)
        if made is None or (stated is not None and hashlib.sha256(made.read_bytes()).hexdigest() != stated):
            return None
        try:
            return _facts_of(read_manifest(made.parent), self.bench.where_remote(name))
        except (ValueError, OSError) as error:
            self.bench.say(str(error))
            return None

    def _facts_of_shards(self) -> Facts | None:
        """The last resort: what the shards and the other splits tell. Some of the manifest is then lost for good."""
        entries = self._expected(Facts({"chunk_length": MAX_CHUNK_LENGTH}, None, ""))
        found, _ = self._read(Facts({"chunk_length": MAX_CHUNK_LENGTH, "tokenizer": {"vocab_size": _VOCABULARY}}, None, ""),
                              entries)
        tokenizer = self.siblings[0]["tokenizer"] if self.siblings else self._fingerprint()
        if tokenizer is None or not found:
            self.bench.open(f"{self.folder / MANIFEST}: nothing is left that it could be made from; completion records, a "
                            "data card, or the tokenizer/ folder is needed. Name a copy of the set with --remote")
            return None
        longest = max(at for entry in found.values() for at, number in enumerate(entry["lengths"]) if number)
        chunk_length = self.siblings[0]["chunk_length"] if self.siblings else self._stated_chunk_length() or longest
        head = {"chunk_length": chunk_length, "compression": "zstd" if next(iter(found.values()))["zip"] else None,
                "tokenizer": tokenizer, "options": self.siblings[0]["options"] if self.siblings else {}}
        known = self.siblings[0]["sources"] if self.siblings else {}
        head["sources"] = {
            name: {"licence": known.get(name, {}).get("licence"), "revision": known.get(name, {}).get("revision"),
                   **{key: sum(entry[of] for entry in found.values() if entry["source"] == name)
                      for key, of in (("documents", "documents"), ("chunks", "samples"), ("tokens", "tokens"))},
                   "bytes": None, "dropped": {}}
            for name in dict.fromkeys(found[key]["source"] for key in sorted(found, key=shard_order))}
        lost = "bytes of text and drops" if self.siblings else "options, licences, bytes of text and drops"
        self.bench.say(f"{self.folder / MANIFEST}: made from the shards alone; {lost} are not known any more")
        return Facts(head, None, "the shards")

    def _stated_chunk_length(self) -> int | None:
        """From the shape of lengths.npy."""
        try:
            table = np.load(self.folder / LENGTHS, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError):
            return None
        return table.shape[1] - 1 if table.ndim == 2 and 1 < table.shape[1] <= MAX_CHUNK_LENGTH + 1 else None

    def _fingerprint(self) -> dict[str, Any] | None:
        from ettin_foundry.data.tokenizer import fingerprint, load

        try:
            return fingerprint(load(self.bench.folder / "tokenizer"))
        except (ValueError, OSError) as error:
            self.bench.say(str(error))
            return None

    def _expected(self, facts: Facts) -> list[dict[str, Any]]:
        """Entries of all shards that should be there, in order; without a list, of those found and those in index.json."""
        if facts.shards is not None:
            taken = self._taken_out(facts)
            return [dict(shard) for shard in facts.shards if shard["raw"]["basename"] not in taken]
        names = [name for name in self.bench.sizes(self.split) if SHARD_NAME.fullmatch(name)]
        entries = {name.removesuffix(".zstd"): {"raw": {"basename": name.removesuffix(".zstd")},
                                                "zip": {"basename": name} if name.endswith(".zstd") else None}
                   for name in sorted(names)}  # NAME.mds.zstd comes after NAME.mds, which is then its expanded copy
        entries |= {entry["raw"]["basename"]: entry for entry in self._indexed()}
        return [entries[name] for name in sorted(entries, key=shard_order)]

    def _taken_out(self, facts: Facts) -> set[str]:
        """Shards that an earlier repair took out, and that no conversion has made again since; none with a copy at hand."""
        assert facts.shards is not None
        noted = self.bench.left_out.get(self.split, {}) if self.bench.remote is None else {}
        names = {shard["raw"]["basename"] for shard in facts.shards
                 if shard["raw"]["basename"] in noted and not self._path(shard).exists()}
        if self.old is not None:  # what it lists was whole again after that
            return names - {shard["raw"]["basename"] for shard in self.old["shards"]}
        card = facts_from_card(self.block, self.split)
        return names if card is None or without(facts, names).head["sources"] == card.head["sources"] else set()

    def _indexed(self) -> list[dict[str, Any]]:
        """What index.json states of shards, as partial entries; nothing when it is not there or not in order."""
        def file(data: Any) -> dict[str, Any] | None:
            return data and {"basename": data["basename"], "bytes": data["bytes"], "xxh64": data["hashes"]["xxh64"]}

        try:
            entries = [{"raw": file(shard["raw_data"]), "zip": file(shard["zip_data"]), "samples": shard["samples"]}
                       for shard in read_json(self.folder / INDEX)["shards"]]
            ok = all(SHARD_NAME.fullmatch(data["basename"]) and type(data["bytes"]) is int and isinstance(data["xxh64"], str)
                     for entry in entries for data in (entry["raw"], entry["zip"]) if data)
            return entries if ok and all(entry["raw"] and type(entry["samples"]) is int for entry in entries) else []
        except (ValueError, OSError, KeyError, TypeError):
            return []

    # ---------------------------------------------------------------------- shards

    def _path(self, entry: Mapping[str, Any]) -> Path:
        return self.folder / (entry["zip"] or entry["raw"])["basename"]

    def _read(self, facts: Facts, expected: Sequence[Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Raw name -> entry as the file has it, of good shards; raw name -> reason, of bad ones."""
        jobs = [(entry["raw"]["basename"], self.pool.submit(self._inspect, facts, entry, self._path(entry)))
                for entry in expected]
        found, bad = {}, {}
        for name, job in jobs:
            result = job.result()
            if isinstance(result, str):
                bad[name] = result
            else:
                found[name] = result
        return found, bad

    def _inspect(self, facts: Facts, entry: Mapping[str, Any], path: Path) -> dict[str, Any] | str:
        """The entry as the file has it, or why it is not the file that it should be."""
        raw, packed = entry["raw"], entry["zip"]
        try:
            bounds = {"chunk_length": facts.head["chunk_length"], "vocab_size": facts.head["tokenizer"]["vocab_size"]}
            if packed and raw.get("bytes", 0) > _SCANNED and "rows" in entry:
                content = expand_all(map_file(path, packed["bytes"], packed["xxh64"]), path, raw["bytes"])
                check_hash(content, path, raw["xxh64"])
                lengths = parse_shard(content, path, num_samples=entry["samples"], **bounds).lengths
                return {**entry, "lengths": np.bincount(lengths, minlength=bounds["chunk_length"] + 1).astype(np.uint32)}
            found = scan_shard(path, **bounds)
            found["lengths"] = np.array(found["lengths"], np.uint32)  # a tenth of the list
            self.bench.tick((found["zip"] or found["raw"])["bytes"])
        except FileNotFoundError:
            return "missing"
        except (ValueError, OSError) as error:
            return str(error).replace(f"{path}: ", "")
        return "; ".join(compare_entry(found, entry, entry.get("lengths"))) or found

    def _fetch(self, facts: Facts, expected: Sequence[Mapping[str, Any]], found: dict[str, dict[str, Any]],
               bad: dict[str, str]) -> None:
        """Puts copies in the place of bad shards, if they are what they should be."""
        for entry in expected:
            name = entry["raw"]["basename"]
            file = entry["zip"] or entry["raw"]
            if name not in bad or self.bench.remote is None or "xxh64" not in file:
                continue
            made = self.bench.fetch(f"{self.split}/{file['basename']}", num_bytes=file["bytes"])
            if made is None:
                continue
            result = self._inspect(facts, entry, made)
            if isinstance(result, str):
                self.bench.say(f"{self.bench.where_remote(f'{self.split}/{made.name}')}: is no better ({result})")
                continue
            self.bench.put(made, f"{self.split}/{made.name}", f"fetched again ({bad.pop(name)})")
            found[name] = result

    def _stray(self, expected: Sequence[Mapping[str, Any]]) -> None:
        """Files that belong to no entry, and expanded copies that are not what their shard expands to."""
        sizes = self.bench.sizes(self.split)
        known = {data["basename"] for entry in expected for data in (entry["raw"], entry["zip"]) if data}
        for name in sorted(sizes.keys() - known - SMALL_FILES - {"substitutions.jsonl"}):
            self.bench.take_out(f"{self.split}/{name}", "no manifest names it")
        for entry in expected:
            raw = entry["raw"]
            if entry["zip"] and raw["basename"] in sizes and "xxh64" in raw:
                try:
                    map_file(self.folder / raw["basename"], raw["bytes"], raw["xxh64"])
                except (ValueError, OSError):
                    self.bench.set_aside(f"{self.split}/{raw['basename']}", "an expanded copy that was altered")

    def _take_out(self, facts: Facts, expected: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]],
                  bad: Mapping[str, str]) -> bool:
        """Takes bad shards out of use, after noting what is lost; False where that was not asked for."""
        records = []
        for entry in expected:
            if (name := entry["raw"]["basename"]) in bad:
                full = {"samples": None, **entry}
                records.append(describe_loss(
                    self.folder, full, [found.get(e["raw"]["basename"], e) for e in expected], split=self.split,
                    reason=bad[name], chunk_length=facts.head["chunk_length"],
                    vocab_size=facts.head["tokenizer"]["vocab_size"], plan=self.units.plan))
        self.bench.lose(records, self.folder)
        return not records or self.bench.quarantine

    # ----------------------------------------------------------------- small files

    def _explain(self, facts: Facts, found: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all that the head counts is there, was noted as lost, or may be lost; and nothing else. For heads only."""
        sources = settle_sources(facts.head["sources"], found)
        for name in dict.fromkeys(entry["source"] for entry in found):
            chunks = facts.head["sources"].get(name, {"chunks": 0})["chunks"]
            if sum(entry["samples"] for entry in found if entry["source"] == name) > chunks:
                self.bench.open(f"{self.folder}: its shards hold more than the {chunks:,} chunks of source {name!r:.100} "
                                f"that {facts.origin} states; perhaps more is being added. Run the same conversion again")
                return False
        noted: dict[str, int] = {}
        for record in self.bench.left_out.get(self.split, {}).values():
            source = record["shard"].get("source")
            noted[source] = noted.get(source, 0) + int(record["chunks"] or 0)
        ok = True
        for name, stated in facts.head["sources"].items():
            gone = stated["chunks"] - sources[name]["chunks"]
            if gone > noted.get(name, 0):
                tokens, documents = (stated[key] - sources[name][key] for key in ("tokens", "documents"))
                text = (f"{self.folder}: {gone:,} chunks of source {name!r:.100}, {tokens:,} tokens, in which {documents:,} "
                        "documents end, are in no shard that is here")
                if self.bench.quarantine:
                    self.bench.say(text)
                else:
                    self.bench.open(f"{text}. Name a copy of the set with --remote, or pass --quarantine to do without them")
                    ok = False
        return ok

    def _write(self, facts: Facts, kept: Sequence[Mapping[str, Any]],
               found: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], np.ndarray] | None:
        full = [found[entry["raw"]["basename"]] for entry in kept]
        shards = [{**(entry if "rows" in entry else its), "lengths": its["lengths"]} for entry, its in zip(kept, full)]
        if facts.shards is None and not self._explain(facts, full):
            return None
        sources = settle_sources(facts.head["sources"], full)
        try:
            manifest = build_split(Facts({**facts.head, "sources": sources}, None, facts.origin), shards, self.split,
                                   self.bench.scratch)
        except ValueError as error:
            self.bench.open(str(error))
            return None
        made = self.bench.scratch / self.split
        origin = f"made from {facts.origin}" if facts.shards is not None else f"made from {facts.origin} and the shards"
        lengths = self.folder / LENGTHS
        if not lengths.is_file() or lengths.read_bytes() != (made / LENGTHS).read_bytes():
            self.bench.put(made / LENGTHS, f"{self.split}/{LENGTHS}", origin)
        if check_index(self.folder, manifest):
            self.bench.put(made / INDEX, f"{self.split}/{INDEX}", origin)
        if self.old is None or {"compression": None, **self.old} != manifest:
            self.bench.put(made / MANIFEST, f"{self.split}/{MANIFEST}", origin)
        return manifest, np.sum([shard["lengths"] for shard in shards], axis=0, dtype=np.int64)


def _facts_of(manifest: Mapping[str, Any], origin: str) -> Facts:
    head = {"compression": None, **{key: manifest[key] for key in HEAD_KEYS if key in manifest}}
    return Facts(head, tuple(manifest["shards"]), origin)
