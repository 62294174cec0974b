"""The manifest of a mixture's split: what it states, and reading it without trusting it.

It lists sets (where each lies, and its fingerprint), and for each source the shards of those sets that are taken whole
(`runs`) and those of which only some chunks are taken (`parts`); a repeat is the same shard in another pass. It holds no
name of a file: which files a set has is said by the set's own manifest, and checked there. Opening what it points at is
mix_set.py's work, choosing shards and writing it mix.py's.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import xxhash

from ettin_foundry.data.manifest import MANIFEST, MAX_CHUNK_LENGTH, SplitFacts, bad_file, read_json
from ettin_foundry.data.order import raw_draws
from ettin_foundry.data.packing import pack_lengths, piece_counts
from ettin_foundry.data.quantities import parse_bytes
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import is_url, join, open_storage

MIX_FORMAT = "ettin-mix"
MIX_VERSION = 1
REBUILD = "Build the mixture again"
_CHUNKS = 6  # first word of the seed: what the numbers are for, so that no two uses share a stream; mix.py has 5
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_LENGTH = re.compile(r"[1-9][0-9]{0,4}")
_MAX_NUMBER = 2**53


class Part(NamedTuple):
    """Some chunks of one shard: the first of a permutation, see `chunk_permutation`, and a few more."""

    first: int
    extra: tuple[int, ...]
    lengths: np.ndarray
    """(chunk_length + 1,) uint32 histogram of the chunks taken."""


class Entries(NamedTuple):
    """The mixture's shards, one row per entry: V entries, runs before parts. All (V,) int64."""

    source: np.ndarray
    set: np.ndarray
    passed: np.ndarray
    """How many times the source has been gone through before."""
    shard: np.ndarray
    """Number within the set."""
    part: np.ndarray
    """Number of the part, -1 for whole shards."""


def name_word(source: str) -> int:
    """A source's number in seeds: its choice of shards does not depend on which other sources there are."""
    return xxhash.xxh32(source.encode()).intdigest()


def chunk_permutation(seed: int, source: str, shard: int, samples: int) -> np.ndarray:
    """(samples,) int64: the order in which a source takes chunks from a shard of which it takes only some."""
    return np.argsort(raw_draws(samples, _CHUNKS, seed, name_word(source), shard), kind="stable")


def place_of_set(local: Path, remote: str | None, path: str) -> str:
    """Folder or URL of a set, from what the manifest says.

    Args:
        local: the mixture's split folder. remote: URL of the same, where it was fetched from.
        path: relative to the mixture (the folder above the split), or a URL.
    """
    if is_url(path):
        return path
    if remote is None or not is_url(remote):
        split = local if remote is None else open_storage(remote).local_path() or local
        return os.path.normpath(os.path.join(os.path.realpath(split.parent), path))
    parts = urlsplit(remote)
    joined = posixpath.normpath(posixpath.join(parts.path.rstrip("/"), "..", path))
    return parts._replace(path=joined).geturl()


def _need(where: str, mapping: Any, key: str, kind: type) -> Any:
    """The value of a key, of the given type; numbers must be 0 to 2**53."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value <= _MAX_NUMBER):
        raise bad_file(where, f"{key} is {value!r:.200}", f"{kind.__name__} is needed", REBUILD)
    return value


def _check_head(where: str, manifest: Any) -> None:
    found = [manifest.get(key) for key in ("format", "version")] if isinstance(manifest, dict) else manifest
    if found != [MIX_FORMAT, MIX_VERSION]:
        raise bad_file(where, f"format and version are {found!r:.80}", f"{[MIX_FORMAT, MIX_VERSION]} is read here", REBUILD)
    if not 1 <= _need(where, manifest, "chunk_length", int) <= MAX_CHUNK_LENGTH:
        raise bad_file(where, f"chunk_length is {manifest['chunk_length']}", f"1 to {MAX_CHUNK_LENGTH} is possible", REBUILD)
    split = _need(where, manifest, "split", str)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise bad_file(where, f"split is {split!r:.80}", "a plain name such as train is needed", REBUILD)
    _need(where + " tokenizer", _need(where, manifest, "tokenizer", dict), "vocab_size", int)
    if _need(where, manifest, "seed", int) >= 2**32:
        raise bad_file(where, f"seed is {manifest['seed']}", "0 to 2**32 - 1 is possible", REBUILD)
    for key in ("samples", "tokens"):
        _need(where + " totals", manifest.get("totals"), key, int)


def _check_sets(where: str, manifest: dict[str, Any]) -> None:
    for number, entry in enumerate(_need(where, manifest, "sets", list)):
        place = f"{where} sets[{number}]"
        path = _need(place, entry, "path", str)
        if not path or "\0" in path or os.path.isabs(path):
            raise bad_file(place, f"path is {path!r:.200}", "a path relative to the mixture, or a URL, is needed",
                         "Correct it; building the mixture again writes it so")
        if not _FINGERPRINT.fullmatch(_need(place, entry, "fingerprint", str)):
            raise bad_file(place, f"fingerprint is {entry['fingerprint']!r:.80}", "64 hexadecimal digits needed", REBUILD)
    if not manifest["sets"]:
        raise bad_file(where, "it lists no set", "at least one is needed", REBUILD)


def _check_choice(place: str, choice: Any, manifest: dict[str, Any]) -> None:
    """What runs and parts have in common: source, set and pass."""
    if _need(place, choice, "source", str) not in manifest["sources"]:
        raise bad_file(place, f"source is {choice['source']!r:.80}", "it must be one of `sources`", REBUILD)
    if _need(place, choice, "set", int) >= len(manifest["sets"]):
        raise bad_file(place, f"set is {choice['set']}", f"there are {len(manifest['sets'])} sets", REBUILD)
    _need(place, choice, "pass", int)


def _check_numbers(place: str, mapping: Any, key: str) -> list[int]:
    numbers = _need(place, mapping, key, list)
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
        raise bad_file(place, f"{key} has an entry that is no whole number of at least 0", "no other is possible", REBUILD)
    return numbers


def _check_part(place: str, part: Any, chunk_length: int) -> None:
    _need(place, part, "shard", int)
    number = _need(place, part, "first", int) + len(_check_numbers(place, part, "extra"))
    for length, count in _need(place, part, "lengths", dict).items():
        known = _LENGTH.fullmatch(length) and int(length) <= chunk_length
        if not known or type(count) is not int or not 1 <= count < 2**32:
            raise bad_file(place, f"{count!r:.40} chunks of length {length!r:.40}",
                         f"lengths of 1 to {chunk_length} are possible", REBUILD)
    if sum(part["lengths"].values()) != number or not number:
        raise bad_file(place, f"it takes {number} chunks", "its lengths must count as many, and at least one", REBUILD)


def read_mix(local: Path) -> dict[str, Any]:
    """The manifest of a mixture's split folder, every field that anything relies on checked.

    Raises:
        FileNotFoundError: there is none. ValueError: it states what cannot be; the message names the field.
    """
    where, manifest = str(local / MANIFEST), read_json(local / MANIFEST)
    _check_head(where, manifest)
    _check_sets(where, manifest)
    for name, facts in _need(where, manifest, "sources", dict).items():
        _need(where + " sources", {name: facts}, name, dict)
    for number, run in enumerate(_need(where, manifest, "runs", list)):
        place = f"{where} runs[{number}]"
        _check_choice(place, run, manifest)
        _check_numbers(place, run, "shards")
    for number, part in enumerate(_need(where, manifest, "parts", list)):
        place = f"{where} parts[{number}]"
        _check_choice(place, part, manifest)
        _check_part(place, part, manifest["chunk_length"])
    entries = expand_entries(manifest)[0]
    if not len(entries.set):
        raise bad_file(where, "it takes no shard", "at least one is needed", REBUILD)
    rows = np.stack(entries[:4], axis=1)
    if len(np.unique(rows, axis=0)) != len(rows):
        raise bad_file(where, "a shard is taken twice in one pass of a source", "a repeat is a pass of its own", REBUILD)
    return manifest


def expand_entries(manifest: dict[str, Any]) -> tuple[Entries, list[Part]]:
    """The mixture's shards, in the order in which they are counted, and its parts.

    Args:
        manifest: a checked one.
    """
    number = {name: at for at, name in enumerate(manifest["sources"])}
    rows = [np.array([[number[run["source"]], run["set"], run["pass"], shard, -1] for shard in run["shards"]], np.int64)
            .reshape(-1, 5) for run in manifest["runs"]]
    rows += [np.array([[number[part["source"]], part["set"], part["pass"], part["shard"], at]], np.int64)
             for at, part in enumerate(manifest["parts"])]
    parts = []
    for part in manifest["parts"]:
        lengths = np.zeros(manifest["chunk_length"] + 1, np.uint32)
        for length, count in part["lengths"].items():
            lengths[int(length)] = count
        parts.append(Part(part["first"], tuple(part["extra"]), lengths))
    return Entries(*np.concatenate([np.zeros((0, 5), np.int64), *rows]).T), parts


def shared_identity(data: SplitFacts) -> tuple[Any, ...]:
    """What all sets of a mixture must have in common: chunk length and tokenizer (but not its name)."""
    return data.chunk_length, {key: value for key, value in data.tokenizer.items() if key != "name"}


def open_split(local: str | os.PathLike[str], verify_hashes: bool = True, **options: Any) -> MDSSplit | MixtureSplit:
    """Opens a split folder, of a converted set or of a mixture; the manifest says which.

    Args:
        local: the split's folder; for a remote split, where its files are kept.
        verify_hashes, options: as `mds.MDSSplit` has them.

    Raises:
        FileNotFoundError, ValueError, OSError: as MDSSplit and MixtureSplit.
    """
    path = Path(local) / MANIFEST
    if options.get("remote") is not None:
        _fetch_mix(path, options["remote"])
    if path.is_file():
        found = read_json(path)
        if isinstance(found, dict) and found.get("format") == MIX_FORMAT:
            return MixtureSplit(local, verify_hashes, **options)
    return MDSSplit(local, verify_hashes, **options)


def _fetch_mix(path: Path, remote: str) -> None:
    """Puts the manifest of a remote mixture into its local folder; of another split it does nothing."""
    storage = open_storage(remote)
    if not storage.exists(MANIFEST):
        return
    head = storage.read_range(MANIFEST, 0, min(100, storage.size(MANIFEST)))
    is_mix = f'"{MIX_FORMAT}"'.encode() in head  # the format is the first key that is written
    if not os.path.lexists(path):
        if is_mix:
            open_storage(path.parent).write_bytes(MANIFEST, storage.read_bytes(MANIFEST))
    elif not path.is_file() or is_mix and path.read_bytes() != storage.read_bytes(MANIFEST) \
            or not is_mix and f'"{MIX_FORMAT}"'.encode() in path.read_bytes()[:100]:
        raise ValueError(f"dataset.local: {str(path.parent)!r} holds another set than dataset.remote {remote!r} (their "
                         "manifests differ); both must be the same. Name another folder, or empty this one")


class MixtureSplit(SplitFacts):
    """One split of a mixture, with random access to its chunks; shards are counted over all entries of all sources.

    Args:
        local: the split's folder, e.g. `mix/train`.
        verify_hashes: as `mds.MDSSplit`.
        max_open: shards kept mapped at a time, shared out among the sets by their shards in the mixture.
        remote: folder or URL that the split was fetched from; the sets are then fetched too, and their paths are relative
            to the folder above it.
        cache_limit: most bytes that fetched or expanded shards may take, shared out among the sets that have such by the
            bytes that the mixture takes from them.
        options: as `mds.MDSSplit` has them, for every set.

    Attributes:
        passes: (num_shards,) int64, how many times the shard's source has been gone through before it.
        fetches: whether shards of some set are fetched or expanded before they are read.

    Raises:
        FileNotFoundError: no such folder, or a set of the mixture is missing; names the set.
        ValueError: the manifest states what cannot be, or a set is not the one the mixture was built from.
    """

    def __init__(self, local: str | os.PathLike[str], verify_hashes: bool = True, *, max_open: int = 32,
                 remote: str | None = None, cache_limit: int | str | None = None, **options: Any) -> None:
        self.local, self.verify_hashes = Path(local), verify_hashes
        self.manifest = read_mix(self.local)
        self._names: list[str] = list(self.manifest["sources"])
        entries, self._parts = expand_entries(self.manifest)
        self._source, self._set, self.passes, self._shard, self._part = entries
        shares = np.bincount(self._set, minlength=len(self.manifest["sets"])) / len(self._set)
        arguments = [{**options, "max_open": 4 + round(max_open * share)} for share in shares]
        self._sets = [self._open_set(entry, remote, keys) for entry, keys in zip(self.manifest["sets"], arguments)]
        self._check_ranges()
        self.fetches = any(data.fetches for data in self._sets)
        self._cache_limit = parse_bytes("dataset.cache_limit", cache_limit)
        if cache_limit is not None:
            self._limit(parse_bytes("dataset.cache_limit", cache_limit) or 0, remote, arguments)
        self._samples = self._gather([data.samples for data in self._sets],
                                     [int(part.lengths.sum()) for part in self._parts])
        self._tokens = self._gather([data.tokens for data in self._sets],
                                    [int(part.lengths.astype(np.int64) @ np.arange(part.lengths.size))
                                     for part in self._parts])
        self._fingerprint: str | None = None
        self._chosen: dict[int, np.ndarray] = {}
        for key, values in (("samples", self._samples), ("tokens", self._tokens)):
            if int(values.sum()) != self.manifest["totals"][key]:
                raise bad_file(self.local / MANIFEST, f"totals.{key} is {self.manifest['totals'][key]}",
                             f"its shards sum to {int(values.sum())}", REBUILD)

    @property
    def sources(self) -> list[str]:
        """The mixture's source name per shard."""
        return [self._names[number] for number in self._source]

    @property
    def fingerprint(self) -> str:
        """sha256 over what determines the data: the sets' fingerprints, and which of their chunks are taken."""
        if self._fingerprint is None:
            parts = [self.manifest[key] for key in ("format", "version", "split", "seed", "runs", "parts")]
            sets = [entry["fingerprint"] for entry in self.manifest["sets"]]
            self._fingerprint = hashlib.sha256(json.dumps([parts, sets], sort_keys=True).encode()).hexdigest()
        return self._fingerprint

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        """(num_shards,) int64: best-fit packed rows per shard at this row length, or None where not counted."""
        of_sets = [data.rows(max_seq_len) for data in self._sets]
        if any(rows is None for rows in of_sets):
            return None
        return self._gather(of_sets, [pack_lengths(piece_counts(part.lengths), max_seq_len).num_rows
                                      for part in self._parts])

    def lengths(self, shard: int) -> np.ndarray:
        """(chunk_length + 1,) uint32: number of chunks of each length in this shard.

        Raises:
            ValueError: the set's lengths.npy is altered, or contradicts its manifest.
        """
        if self._part[shard] >= 0:
            return self._parts[self._part[shard]].lengths
        return self._of(shard).lengths(int(self._shard[shard]))

    def sample_lengths(self, shard: int) -> np.ndarray:
        """(samples,) int32: tokens of each chunk of this shard, in stored order."""
        lengths = self._of(shard).sample_lengths(int(self._shard[shard]))
        return lengths if self._part[shard] < 0 else lengths[self._chunks(shard)]

    def last(self, shard: int) -> np.ndarray:
        """(samples,) bool: whether each chunk ends its document."""
        last = self._of(shard).last(int(self._shard[shard]))
        return last if self._part[shard] < 0 else last[self._chunks(shard)]

    def chunk(self, shard: int, index: int) -> np.ndarray:
        """(L,) uint16: the plain tokens of one chunk, a copy."""
        return self._of(shard).chunk(int(self._shard[shard]), self._stored(shard, index))

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """All columns of one chunk as they are stored; `source` is the name in its set."""
        return self._of(shard).sample(int(self._shard[shard]), self._stored(shard, index))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Announces the shards of the next rows, in order of need; every set gets its own."""
        for data, stored in self._by_set(shards):
            data.prefetch(stored)

    def check_room(self, shards: Sequence[int]) -> None:
        """Shares a cache limit out by what each set needs at a time, the rest by its size.

        Raises:
            ValueError: the limit is too small for these shards at a time; names the bytes needed.
        """
        limits = {id(data): data.files.cache_limit for data in self._sets if data.files.cache_limit is not None}
        if not limits:
            return
        total = self._cache_limit or 0
        needs = {id(data): data.files.room_needed(len(stored)) for data, stored in self._by_set(shards)
                 if id(data) in limits}
        if (need := sum(needs.values())) > total:
            raise ValueError(f"dataset.cache_limit: {total} bytes given; the sets of this mixture have {len(set(shards))} "
                             f"shards in use at a time, which take up to {need} bytes. Raise it, or lower "
                             "train_loader.shuffle_window")
        for data in self._sets:
            if id(data) in limits:
                share = (total - need) * limits[id(data)] // sum(limits.values())
                data.files.set_limit(needs.get(id(data), 0) + share)

    def check_shard(self, shard: int) -> int:
        """Checks a shard in full, see `mds.MDSSplit.check_shard`; a part also that its chunks have the stated lengths.

        Returns:
            Bytes read.

        Raises:
            ValueError, FileNotFoundError: the first lie found, naming its file.
        """
        num_bytes = self._of(shard).check_shard(int(self._shard[shard]))
        if self._part[shard] >= 0:
            self._chunks(shard)
        return num_bytes

    def verify(self) -> None:
        """Checks every shard that the mixture takes from, once each.

        Raises:
            ValueError, FileNotFoundError: the first lie found, naming its file.
        """
        _, firsts = np.unique(np.stack([self._set, self._shard, self._part], axis=1), axis=0, return_index=True)
        for shard in np.sort(firsts).tolist():
            self.check_shard(shard)

    def _open_set(self, entry: dict[str, Any], remote: str | None, options: dict[str, Any]) -> MDSSplit:
        place = place_of_set(self.local, remote, entry["path"])
        where = f"{self.local / MANIFEST}: its set {entry['path']!r} (for {', '.join(self._sources_of(entry))})"
        origin = join(place, self.split)
        if not open_storage(origin).exists(MANIFEST):
            raise FileNotFoundError(f"{where}: {origin} holds no {MANIFEST}; the set that the mixture was built from is "
                                    "needed. Put it back where it was, seen from the mixture, or build the mixture again")
        local = Path(origin)
        if is_url(place) or remote is not None:
            local = self.local / "sets" / entry["fingerprint"][:16]
            options["remote"] = origin
        data = MDSSplit(local, self.verify_hashes, **options)
        if data.fingerprint != entry["fingerprint"]:
            raise bad_file(where, f"{place} has fingerprint {data.fingerprint}", f"the mixture was built from "
                         f"{entry['fingerprint']}: the set was altered or replaced", f"Put it back, or {REBUILD.lower()}")
        if shared_identity(data) != shared_identity(self):
            raise bad_file(where, f"has chunk_length {data.chunk_length} and tokenizer {data.tokenizer!r:.200}",
                         f"the mixture states {self.chunk_length} and {self.tokenizer!r:.200}", REBUILD)
        return data

    def _limit(self, limit: int, remote: str | None, arguments: list[dict[str, Any]]) -> None:
        """Opens the sets that fetch or expand shards once more, each with its share of a cache limit."""
        taken = np.zeros(len(self._sets))
        for number, data in enumerate(self._sets):
            if data.fetches:
                stored = np.unique(self._shard[self._set == number])
                taken[number] = sum(data.manifest["shards"][shard]["raw"]["bytes"] for shard in stored)
        if not taken.any():
            raise ValueError(f"dataset.cache_limit: {limit} given, but no set of this mixture is remote or compressed, so "
                             "that it would do nothing; one that is is needed. Remove it")
        for number in np.flatnonzero(taken):
            keys = {**arguments[number], "cache_limit": int(limit * taken[number] / taken.sum())}
            self._sets[number] = self._open_set(self.manifest["sets"][number], remote, keys)

    def _by_set(self, shards: Sequence[int]) -> Iterator[tuple[MDSSplit, list[int]]]:
        """The sets that shards belong to, each with their numbers there, none twice."""
        stored: dict[int, dict[int, None]] = {}
        for shard in shards:
            stored.setdefault(int(self._set[shard]), {})[int(self._shard[shard])] = None
        for number, wanted in stored.items():
            yield self._sets[number], list(wanted)

    def _sources_of(self, entry: dict[str, Any]) -> list[str]:
        number = self.manifest["sets"].index(entry)
        return [self._names[source] for source in np.unique(self._source[self._set == number])]

    def _check_ranges(self) -> None:
        """Shard numbers and counts of parts against the opened sets."""
        where = self.local / MANIFEST
        shards = np.array([data.num_shards for data in self._sets])[self._set]
        if (beyond := np.flatnonzero(self._shard >= shards)).size:
            at = int(beyond[0])
            raise bad_file(where, f"it names shard {self._shard[at]} of set {self._set[at]}", f"that set has {shards[at]}",
                         REBUILD)
        for at in np.flatnonzero(self._part >= 0):
            part, samples = self._parts[self._part[at]], int(self._of(int(at)).samples[self._shard[at]])
            if part.first > samples or max(part.extra, default=0) >= samples:
                raise bad_file(where, f"it takes {part.first} chunks and numbers {part.extra!s:.200} of shard "
                             f"{self._shard[at]} of set {self._set[at]}", f"that shard has {samples} chunks", REBUILD)

    def _of(self, shard: int) -> MDSSplit:
        return self._sets[self._set[shard]]

    def _gather(self, of_sets: Sequence[Any], of_parts: Sequence[int]) -> np.ndarray:
        """(num_shards,) int64 from (shards of the set,) per set, and one number per part."""
        starts = np.cumsum([0, *(len(values) for values in of_sets)])
        values = np.concatenate(of_sets).astype(np.int64)[starts[self._set] + self._shard]
        parts = np.flatnonzero(self._part >= 0)
        values[parts] = np.array(of_parts, np.int64)[self._part[parts]]
        return values

    def _stored(self, shard: int, index: int) -> int:
        if self._part[shard] < 0:
            return index
        if not 0 <= index < self._samples[shard]:
            raise IndexError(f"chunk {index} of shard {shard}: the mixture takes {self._samples[shard]} chunks of it")
        return int(self._chunks(shard)[index])

    def _chunks(self, shard: int) -> np.ndarray:
        """(samples,) int64: the chunks taken of a shard that is taken in part, in stored order."""
        number = int(self._part[shard])
        if number not in self._chosen:
            part, stored = self._parts[number], self._of(shard).sample_lengths(int(self._shard[shard]))
            order = chunk_permutation(self.manifest["seed"], self._names[self._source[shard]], int(self._shard[shard]),
                                      len(stored))
            chosen = np.append(order[:part.first], part.extra).astype(np.int64)
            if not _are(chosen, stored, part.lengths):
                raise bad_file(self.local / MANIFEST, f"the chunks that it takes of shard {self._shard[shard]} of set "
                             f"{self._set[shard]} are not of the lengths that it states", "they must be", REBUILD)
            self._chosen[number] = np.sort(chosen)
        return self._chosen[number]


def _are(chosen: np.ndarray, stored: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether these are chunks of exactly these lengths, none twice."""
    counts = np.bincount(stored[chosen], minlength=lengths.size)
    return len(np.unique(chosen)) == len(chosen) and np.array_equal(counts, lengths)
