"""The manifest of a mixture's split: what it states, and reading it without trusting it.

It lists sets (where each lies, and its fingerprint), and for each source the shards of those sets that are taken whole
(`runs`) and those of which only some chunks are taken (`parts`); a repeat is the same shard in another pass. It holds no
name of a file: which files a set has is said by the set's own manifest, and checked there. Opening what it points at is
mix_set.py's work, choosing shards and writing it mix.py's.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import xxhash

from ettin_foundry.data.manifest import MANIFEST, MAX_CHUNK_LENGTH, read_json, refuse
from ettin_foundry.data.order import raw_draws
from ettin_foundry.data.storage import is_url, open_storage

__all__ = ["MIX_FORMAT", "MIX_VERSION", "REBUILD", "Entries", "Part", "chunk_permutation", "expand_entries", "name_word",
           "place_of_set", "read_mix"]

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
        raise refuse(where, f"{key} is {value!r:.200}", f"{kind.__name__} is needed", REBUILD)
    return value


def _check_head(where: str, manifest: Any) -> None:
    found = [manifest.get(key) for key in ("format", "version")] if isinstance(manifest, dict) else manifest
    if found != [MIX_FORMAT, MIX_VERSION]:
        raise refuse(where, f"format and version are {found!r:.80}", f"{[MIX_FORMAT, MIX_VERSION]} is read here", REBUILD)
    if not 1 <= _need(where, manifest, "chunk_length", int) <= MAX_CHUNK_LENGTH:
        raise refuse(where, f"chunk_length is {manifest['chunk_length']}", f"1 to {MAX_CHUNK_LENGTH} is possible", REBUILD)
    split = _need(where, manifest, "split", str)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise refuse(where, f"split is {split!r:.80}", "a plain name such as train is needed", REBUILD)
    _need(where + " tokenizer", _need(where, manifest, "tokenizer", dict), "vocab_size", int)
    if _need(where, manifest, "seed", int) >= 2**32:
        raise refuse(where, f"seed is {manifest['seed']}", "0 to 2**32 - 1 is possible", REBUILD)
    for key in ("samples", "tokens"):
        _need(where + " totals", manifest.get("totals"), key, int)


def _check_sets(where: str, manifest: dict[str, Any]) -> None:
    for number, entry in enumerate(_need(where, manifest, "sets", list)):
        place = f"{where} sets[{number}]"
        path = _need(place, entry, "path", str)
        if not path or "\0" in path or os.path.isabs(path):
            raise refuse(place, f"path is {path!r:.200}", "a path relative to the mixture, or a URL, is needed",
                         "Correct it; building the mixture again writes it so")
        if not _FINGERPRINT.fullmatch(_need(place, entry, "fingerprint", str)):
            raise refuse(place, f"fingerprint is {entry['fingerprint']!r:.80}", "64 hexadecimal digits are needed", REBUILD)
    if not manifest["sets"]:
        raise refuse(where, "it lists no set", "at least one is needed", REBUILD)


def _check_choice(place: str, choice: Any, manifest: dict[str, Any]) -> None:
    """What runs and parts have in common: source, set and pass."""
    if _need(place, choice, "source", str) not in manifest["sources"]:
        raise refuse(place, f"source is {choice['source']!r:.80}", "it must be one of `sources`", REBUILD)
    if _need(place, choice, "set", int) >= len(manifest["sets"]):
        raise refuse(place, f"set is {choice['set']}", f"there are {len(manifest['sets'])} sets", REBUILD)
    _need(place, choice, "pass", int)


def _check_numbers(place: str, mapping: Any, key: str) -> list[int]:
    numbers = _need(place, mapping, key, list)
    if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
        raise refuse(place, f"{key} has an entry that is no whole number of at least 0", "only those are possible", REBUILD)
    return numbers


def _check_part(place: str, part: Any, chunk_length: int) -> None:
    _need(place, part, "shard", int)
    number = _need(place, part, "first", int) + len(_check_numbers(place, part, "extra"))
    for length, count in _need(place, part, "lengths", dict).items():
        known = _LENGTH.fullmatch(length) and int(length) <= chunk_length
        if not known or type(count) is not int or not 1 <= count < 2**32:
            raise refuse(place, f"{count!r:.40} chunks of length {length!r:.40}",
                         f"lengths of 1 to {chunk_length} are possible", REBUILD)
    if sum(part["lengths"].values()) != number or not number:
        raise refuse(place, f"it takes {number} chunks", "its lengths must count as many, and at least one", REBUILD)


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
        raise refuse(where, "it takes no shard", "at least one is needed", REBUILD)
    rows = np.stack(entries[:4], axis=1)
    if len(np.unique(rows, axis=0)) != len(rows):
        raise refuse(where, "a shard is taken twice in one pass of a source", "a repeat is a pass of its own", REBUILD)
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
