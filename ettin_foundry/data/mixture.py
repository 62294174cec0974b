"""One split of a mixture, which points at shards of converted datasets and holds no text itself.

It says which shards of which datasets belong to which source, and how often: a repeat is an entry of its own, in the
next pass. Every dataset is pinned by its fingerprint. Where it lies is a path relative to the mixture, or a URL; what
is fetched is kept in MIX/SPLIT/sets/. corpus/mix.py makes mixtures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from ettin_foundry.data import MANIFEST, MAX_CHUNK_LENGTH
from ettin_foundry.data.cache import Room, fetch_manifest
from ettin_foundry.data.manifest import Count, bad_file, check_record, read_json
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import is_url, join, open_storage

MIX_FORMAT = "ettin-mix"
MIX_VERSION = 1
_REBUILD = "build the mixture again"


def shared_identity(data: MDSSplit | MixtureSplit) -> tuple[Any, ...]:
    """What all datasets of a mixture must have in common: chunk length and tokenizer (but not its name)."""
    return data.chunk_length, {key: value for key, value in data.tokenizer.items() if key != "name"}


class _Set(BaseModel, strict=True):
    path: str = Field(pattern=r"^[^/\x00][^\x00]*$")  # relative to the mixture, or a URL
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Run(BaseModel, strict=True):
    source: str
    set: Count
    passed: Count = Field(alias="pass")
    shards: list[Count]


class _Mixture(BaseModel, strict=True):
    format: Literal["ettin-mix"]
    version: Literal[1]
    split: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    chunk_length: int = Field(ge=1, le=MAX_CHUNK_LENGTH)
    tokenizer: dict[str, Any]  # held to those of the datasets
    seed: int = Field(ge=0, lt=2**32)
    totals: dict[str, Any]
    sets: list[_Set] = Field(min_length=1)
    sources: dict[str, dict[str, Any]]
    runs: list[_Run]
    parts: list[Any] = Field(max_length=0)  # of shards: earlier versions took some chunks alone

    @model_validator(mode="after")
    def _agree(self) -> _Mixture:
        taken = [(c.source, c.set, c.passed, shard) for c in self.runs for shard in c.shards]
        if len(set(taken)) != len(taken) or not taken:
            raise ValueError("a pass of a source must take a shard once, and the mixture at least one")
        if not {choice[0] for choice in taken} <= set(self.sources):
            raise ValueError("source of runs must be one of sources")
        if max(choice[1] for choice in taken) >= len(self.sets):
            raise ValueError(f"set of runs must be below {len(self.sets)}")
        return self


def open_split(local: str | os.PathLike[str], **options: Any) -> MDSSplit | MixtureSplit:
    """Opens a split folder, of a converted dataset or of a mixture, with options of both."""
    if options.get("remote") is not None:
        fetch_manifest(Path(local), options["remote"])
    found = read_json(Path(local) / MANIFEST)
    is_mixture = isinstance(found, dict) and found.get("format") == MIX_FORMAT
    return MixtureSplit(local, **options) if is_mixture else MDSSplit(local, **options)


class MixtureSplit:
    """One split folder of a mixture, with the methods of an `MDSSplit`; S shards, over all entries of all sources.

    With `remote` its datasets are fetched too, seen from there; `cache_limit` is one for all of them together. Raises
    FileNotFoundError or ValueError, naming the dataset, where one is missing or not the one that it was built from.
    """

    def __init__(self, local: str | os.PathLike[str], *, remote: str | None = None,
                 cache_limit: int | str | None = None) -> None:
        self.local = Path(local)
        where = self.local / MANIFEST
        self.manifest = manifest = read_json(where)
        check_record(_Mixture, manifest, where)
        self.split, self.tokenizer = manifest["split"], manifest["tokenizer"]
        self.chunk_length: int = manifest["chunk_length"]
        rows = [(run["set"], shard, run["pass"], run["source"]) for run in manifest["runs"] for shard in run["shards"]]
        *columns, self.sources = map(list, zip(*rows))
        self.num_shards = len(self.sources)
        self.stored = np.array(columns[:2], np.int64)  # (2, S): dataset, its shard
        self._set, self._shard = self.stored
        self.passes = np.array(columns[2], np.int64)  # (S,): how often the shard's source was gone through before it
        self._sets = [self._open_set(number, remote) for number in range(len(manifest["sets"]))]
        known = np.array([data.num_shards for data in self._sets])[self._set]
        if (beyond := np.flatnonzero(self._shard >= known)).size:
            at = beyond[0]
            raise bad_file(where, f"it names shard {self._shard[at]} of a dataset", f"that has {known[at]}", _REBUILD)
        self.fetches = any(data.fetches for data in self._sets)
        self._room = None if cache_limit is None else Room(cache_limit, self.local, [data.files for data in self._sets])
        self.samples = self._gather([data.samples for data in self._sets])
        self.tokens = self._gather([data.tokens for data in self._sets])
        for key, values in (("samples", self.samples), ("tokens", self.tokens)):
            if int(values.sum()) != (stated := manifest["totals"].get(key)):
                raise bad_file(where, f"totals.{key} is {stated}", f"its shards sum to {values.sum()}", _REBUILD)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over what determines the data: the datasets' fingerprints, and which of their shards are taken."""
        parts = [self.manifest[key] for key in ("format", "version", "split", "seed", "runs", "parts")]
        sets = [entry["fingerprint"] for entry in self.manifest["sets"]]
        return hashlib.sha256(json.dumps([parts, sets], sort_keys=True).encode()).hexdigest()

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        of_sets = [data.rows(max_seq_len) for data in self._sets]
        return None if any(rows is None for rows in of_sets) else self._gather(of_sets)

    def _ask(self, method: str, shard: int, *index: int) -> Any:
        """What the shard's dataset answers."""
        return getattr(self._sets[self._set[shard]], method)(int(self._shard[shard]), *index)

    lengths = functools.partialmethod(_ask, "lengths")
    sample_lengths = functools.partialmethod(_ask, "sample_lengths")
    last = functools.partialmethod(_ask, "last")
    chunk = functools.partialmethod(_ask, "chunk")
    sample = functools.partialmethod(_ask, "sample")
    check_shard = functools.partialmethod(_ask, "check_shard")

    def prefetch(self, shards: Sequence[int]) -> None:
        for data, stored in self._by_set(shards):
            data.prefetch(stored)

    def check_room(self, shards: Sequence[int]) -> None:
        if self._room:
            self._room.check((data.files, len(stored)) for data, stored in self._by_set(shards))

    def _open_set(self, number: int, remote: str | None) -> MDSSplit:
        entry = self.manifest["sets"][number]
        path, mixture = entry["path"], os.path.dirname(join(self.local if remote is None else remote).rstrip("/"))
        if not is_url(path):
            scheme, mark, rest = (mixture if is_url(mixture) else os.path.realpath(mixture)).rpartition("://")
            path = scheme + mark + os.path.normpath(os.path.join(rest, path))
        origin = join(path, self.split)
        sources = {self.sources[at] for at in np.flatnonzero(self._set == number)}
        where = f"{self.local / MANIFEST}: its dataset {entry['path']!r} (for {', '.join(sorted(sources))})"
        if not open_storage(origin).exists(MANIFEST):
            raise FileNotFoundError(f"{where}: {origin} holds no {MANIFEST}; put the dataset back there, or {_REBUILD}")
        fetched = is_url(path) or remote is not None
        local = self.local / "sets" / entry["fingerprint"][:16] if fetched else origin
        data = MDSSplit(local, max_open=4, remote=origin if fetched else None)  # `prefetch` raises it to what is needed
        if data.fingerprint != entry["fingerprint"]:
            raise bad_file(where, f"{path} has fingerprint {data.fingerprint}", "it was altered or replaced",
                           f"put the dataset of fingerprint {entry['fingerprint']} back, or {_REBUILD}")
        if shared_identity(data) != shared_identity(self):
            raise bad_file(where, f"has chunk_length {data.chunk_length} and tokenizer {data.tokenizer!r:.200}",
                           f"the mixture states {self.chunk_length} and {self.tokenizer!r:.200}", _REBUILD)
        return data

    def _by_set(self, shards: Sequence[int]) -> Iterator[tuple[MDSSplit, list[int]]]:
        """The datasets that shards belong to, each with their numbers there in order of need, none twice."""
        for number in dict.fromkeys(self._set[list(shards)].tolist()):
            yield self._sets[number], list(dict.fromkeys(int(self._shard[s]) for s in shards if self._set[s] == number))

    def _gather(self, of_sets: Sequence[Any]) -> np.ndarray:
        """(S,) int64 from (shards of the dataset,) per dataset."""
        starts = np.cumsum([0, *(len(values) for values in of_sets)])
        return np.concatenate(of_sets).astype(np.int64)[starts[self._set] + self._shard]
