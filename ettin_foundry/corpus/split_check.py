"""Checks one split folder in full: every shard against its entry in the manifest, the small files against each other.

Used by verify.py, which adds what several splits and the rest of the set say. Problems are texts, each
beginning with the file; all are collected, none stops the check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.inspect import SHARD_NAME
from ettin_foundry.data.manifest import (
    COLUMNS,
    INDEX,
    LENGTHS,
    MANIFEST,
    MAX_CHUNK_LENGTH,
    bad_file,
    read_json,
    read_manifest,
)
from ettin_foundry.data.packing import pack_lengths, piece_counts
from ettin_foundry.data.shards import SUBSTITUTIONS, MDSSplit, scan_shard
from ettin_foundry.data.storage import Storage

__all__ = ["SMALL_FILES", "SplitCheck", "check_index", "check_totals", "compare_entry"]

SMALL_FILES = frozenset((MANIFEST, INDEX, LENGTHS))
_VOCABULARY = 1 << 16  # where no manifest states it: any uint16
_COUNTS = ("documents", "chunks", "tokens")


class SplitCheck:
    """One run over one split.

    Args:
        storage: of the set. split: its folder.
        folder: where its small files lie on this machine: the split itself, or a copy. Shards of a remote set are fetched
            into it one by one and removed again.
        sizes: name -> bytes of every file in the split.
        count: called with the bytes of every file that was read in full.

    Attributes:
        manifest: after `run`, if it can be read.
        lengths: (chunk_length + 1,) int64, chunks of each length in all shards, if lengths.npy is right.
    """

    def __init__(self, storage: Storage, split: str, folder: Path, sizes: Mapping[str, int],
                 count: Callable[[int], None]) -> None:
        self.storage, self.split, self.folder, self.sizes, self.count = storage, split, folder, sizes, count
        self.manifest: dict[str, Any] | None = None
        self.lengths: np.ndarray | None = None

    def run(self, pool: ThreadPoolExecutor, tick: Callable[[int], None]) -> list[str]:
        """Checks everything; the problems."""
        problems: list[str] = []
        data = None
        try:
            self.manifest = read_manifest(self.folder)
            data = MDSSplit(self.folder)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        for name in sorted(SMALL_FILES & self.sizes.keys()):
            self.count(self.sizes[name])
        if data is None:
            names = [name for name in self.sizes if SHARD_NAME.fullmatch(name) and name + ".zstd" not in self.sizes]
            jobs = [pool.submit(self._scan, name, tick) for name in sorted(names)]
            return problems + [text for job in jobs for text in job.result()]
        assert self.manifest is not None
        problems += check_index(self.folder, self.manifest)
        problems += check_totals(self.folder, self.manifest)
        problems += self._check_lengths(data)
        problems += self._check_names()
        jobs = [pool.submit(self._check_shard, data, shard, tick) for shard in range(data.num_shards)]
        return problems + [text for job in jobs for text in job.result()]

    def _check_lengths(self, data: MDSSplit) -> list[str]:
        problems = []
        summed = np.zeros(data.chunk_length + 1, np.int64)
        for shard in range(data.num_shards):
            try:
                summed += data.lengths(shard)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        self.lengths = None if problems else summed
        return list(dict.fromkeys(problems))

    def _check_names(self) -> list[str]:
        """Files that nothing names: stock readers do not see them, and nobody knows what they are."""
        assert self.manifest is not None
        known = {*SMALL_FILES, SUBSTITUTIONS}
        for shard in self.manifest["shards"]:
            known |= {file["basename"] for file in (shard["raw"], shard["zip"]) if file}
        return [f"{self.folder / name}: {MANIFEST} does not name it; only the files of the split belong here. Move it away "
                "or delete it" for name in sorted(self.sizes.keys() - known)]

    def _check_shard(self, data: MDSSplit, shard: int, tick: Callable[[int], None]) -> list[str]:
        entry = data.manifest["shards"][shard]
        file = entry["zip"] or entry["raw"]
        path = self.folder / file["basename"]
        fetched = False
        try:
            if not self.storage.is_local:
                self.storage.get_file(f"{self.split}/{path.name}", path, num_bytes=file["bytes"])
                fetched = True
            if self.lengths is None:  # without the histograms a shard can still be held to its entry
                return self._compare(path, entry, None)
            data.check_shard(shard)
            return []
        except FileNotFoundError as error:
            return [str(error)]
        except (ValueError, OSError) as error:
            more = self._compare(path, entry, None if self.lengths is None else data.lengths(shard))
            return [str(error), *(text for text in more if not str(error).startswith(text))]
        finally:
            self.count(file["bytes"])
            tick(file["bytes"])
            if fetched:
                path.unlink()

    def _compare(self, path: Path, entry: Mapping[str, Any], lengths: np.ndarray | None) -> list[str]:
        assert self.manifest is not None
        try:
            found = scan_shard(path, chunk_length=self.manifest["chunk_length"],
                               vocab_size=self.manifest["tokenizer"]["vocab_size"])
        except (ValueError, OSError) as error:
            return [str(error)]
        return [f"{path}: {text}" for text in compare_entry(found, entry, lengths)]

    def _scan(self, name: str, tick: Callable[[int], None]) -> list[str]:
        """A shard of which nothing is stated."""
        path = self.folder / name
        try:
            if not self.storage.is_local:
                self.storage.get_file(f"{self.split}/{name}", path)
            scan_shard(path, chunk_length=MAX_CHUNK_LENGTH, vocab_size=_VOCABULARY)
            return []
        except (ValueError, OSError) as error:
            return [str(error)]
        finally:
            self.count(self.sizes[name])
            tick(self.sizes[name])
            if not self.storage.is_local:
                path.unlink(missing_ok=True)


def compare_entry(found: Mapping[str, Any], stated: Mapping[str, Any],
                  lengths: Sequence[int] | np.ndarray | None) -> list[str]:
    """What differs between a shard as it is (`shard_format.scan_shard`) and its entry in the manifest.

    Args:
        found: of the file. stated: the entry; what it does not state is not compared. lengths: the stated histogram; None
            leaves it out.
    """
    texts = []
    for kind in ("zip", "raw"):
        mine, its = found[kind] or {}, stated.get(kind) or {}
        which = "packed " if kind == "zip" else ""
        texts += [f"{which}{key} is {mine.get(key)}; the manifest states {its[key]}" for key in its
                  if mine.get(key) != its[key]]
    texts += [f"{key} is {found[key]!r:.100}; the manifest states {stated[key]!r:.100}"
              for key in ("samples", "tokens", "documents", "source") if key in stated and found[key] != stated[key]]
    for length, number in stated.get("rows", {}).items():
        try:
            rows = pack_lengths(piece_counts(found["lengths"]), int(length)).num_rows
        except ValueError as error:
            texts.append(str(error))
            continue
        if rows != number:
            texts.append(f"its chunks fill {rows} rows of {length}; the manifest states {number}")
    if lengths is not None and list(found["lengths"]) != [int(number) for number in lengths]:
        texts.append(f"its chunk lengths differ from its row of {LENGTHS}")
    return texts


def check_index(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """index.json is what stock readers trust; it must say what the manifest says."""
    path = folder / INDEX
    names = sorted(COLUMNS)

    def file(entry: Any, hashes: str) -> tuple[Any, ...] | None:
        return entry and (entry["basename"], entry["bytes"], entry[hashes]["xxh64"] if hashes == "hashes" else entry[hashes])

    try:
        index = read_json(path)
        found = [(s["samples"], s["column_names"], s["column_encodings"], s["format"], s["version"],
                  file(s["raw_data"], "hashes"), file(s["zip_data"], "hashes")) for s in index["shards"]]
        version = index["version"]
    except (ValueError, OSError) as error:
        return [str(error)]
    except (KeyError, TypeError) as error:
        return [str(bad_file(path, f"is not an MDS index ({error!r:.100})", "ours is needed", "Convert it again"))]
    expected = [(s["samples"], names, [COLUMNS[name] for name in names], "mds", 2, file(s["raw"], "xxh64"),
                 file(s["zip"], "xxh64")) for s in manifest["shards"]]
    if version != 2:
        return [str(bad_file(path, f"version is {version!r:.50}", "2 is needed", "Convert it again"))]
    if found == expected:
        return []
    at = next((at for at, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), min(len(found), len(expected)))
    return [str(bad_file(path, f"its shard {at} differs from {MANIFEST}", "both must list the same shards",
                       "Convert it again"))]


def check_totals(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """The manifest's sums: of its sources, and of its shards by source."""
    where = folder / MANIFEST
    try:
        for number, key in enumerate(_COUNTS):
            total = manifest["totals"][("documents", "samples", "tokens")[number]]
            stated = {name: source[key] for name, source in manifest["sources"].items()}
            if sum(stated.values()) != total:
                yield f"{where}: totals state {total} {key}; its sources sum to {sum(stated.values())}. Convert it again"
            if key == "documents" and not all("documents" in shard for shard in manifest["shards"]):
                continue  # of an older version
            held = dict.fromkeys(stated, 0)
            for shard in manifest["shards"]:
                held[shard["source"]] = held.get(shard["source"], 0) \
                    + shard["samples" if key == "chunks" else key]
            for name in held:
                if held[name] != stated.get(name):
                    yield (f"{where}: source {name!r:.100} states {stated.get(name)} {key}; its shards hold {held[name]}. "
                           "Convert it again")
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{where}: sources cannot be read ({error!r:.100}); counts by source are needed. Convert it again"
