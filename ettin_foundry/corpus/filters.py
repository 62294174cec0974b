"""Which documents are kept: length, predicates of the user's own, exact duplicates. Each is off by default.

A predicate is any function f(text, id) -> bool, written as `package.module:function`. It must answer by its arguments
alone, or two conversions will differ. Near-duplicates, language and quality filters and decontamination are datatrove's
work: run it first and convert what it writes (.jsonl.gz).

For exact duplicates workers hash the documents of their units; `find_duplicates` then finds which have the xxh3_128 of
an earlier one in the order of (unit, ordinal). The chance that any two of 1e9 different documents do is 1.5e-21.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

log = logging.getLogger(__name__)

_BLOCK = 16 << 20  # documents sorted at a time: about 100 bytes of memory each

SHORT, LONG, DUPLICATE, OVERSIZED, UNREADABLE = "short", "long", "duplicate", "oversized", "unreadable"
"""Reasons to drop a document; a predicate's is `predicate package.module:function`."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which filters are on. Picklable, as predicates are known by their names."""

    min_characters: int | None = None  # Unicode code points; empty documents are dropped anyway
    max_characters: int | None = None
    predicates: Sequence[str] = ()  # `package.module:function` each; True keeps the document
    deduplicate: bool = False  # drop documents that equal an earlier one

    def __post_init__(self) -> None:
        least, most = self.min_characters, self.max_characters
        if (least is not None and least < 2) or (most is not None and most < max(least or 0, 1)):
            raise ValueError(f"--min-characters must be 2 or more and at most --max-characters, got {least} and {most}")
        for function, file, source in map(_load_predicate, self.predicates):
            if file.read_bytes() != source:  # edited since another conversion of this process
                importlib.reload(sys.modules[function.__module__])
                _load_predicate.cache_clear()

    def reason(self, text: str, id: str) -> str | None:
        """Why a document is dropped, None keeps it; ValueError where a predicate fails or gives no truth value."""
        if len(text) < (self.min_characters or 0):
            return SHORT
        if len(text) > (self.max_characters or sys.maxsize):
            return LONG
        for name in self.predicates:
            try:
                keep = _load_predicate(name)[0](text, id)
                if not isinstance(keep, (bool, np.bool_)):
                    raise TypeError(f"{keep!r:.100}")
            except Exception as error:
                raise ValueError(f"--filter {name} must give True or False, got {type(error).__name__} "
                                 f"({error!s:.300}) for the document {id!r:.200}") from error
            if not keep:
                return f"predicate {name}"
        return None

    def record(self) -> dict[str, Any]:
        """All that shapes the data, as JSON, without places on this machine; of a predicate the hash of its file.

        The keys of decontamination stay, so that datasets made with them can be appended to.
        """
        hashes = {name: hashlib.sha256(_load_predicate(name)[2]).hexdigest() for name in self.predicates}
        return {"min_characters": self.min_characters, "max_characters": self.max_characters,
                "predicates": [{"name": name, "sha256": value} for name, value in hashes.items()],
                "decontaminate": [], "decontaminate_field": "text", "decontaminate_drop": False,
                "ngrams": None, "deduplicate": self.deduplicate}


@functools.cache
def _load_predicate(name: str) -> tuple[Callable[[str, str], bool], Path, bytes]:
    """The function of a dotted path, the file that defines it, and what the file holds."""
    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        inspect.signature(function).bind("text", "id")
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
        if not file.is_file():
            raise TypeError("it has no source file")
    except Exception as error:  # a module of the user's: whatever it raises
        raise ValueError("--filter must be package.module:function of a function f(text, id) -> bool on PYTHONPATH, "
                         f"got {name!r} ({type(error).__name__}: {error!s:.300})") from error
    return function, file, file.read_bytes()


def write_hashes(path: Path | IO[bytes], hashes: bytes | bytearray) -> None:
    """Writes xxh3_128 (16 bytes) of each document, in the order of reading, as .npy: (documents, 2) uint64."""
    np.save(path, np.frombuffer(hashes, "<u8").reshape(-1, 2), allow_pickle=False)


def find_duplicates(hash_files: Sequence[Path], out_folder: Path) -> int:
    """Finds the documents that repeat an earlier one; how many there are.

    Writes `out_folder/NAME` for the hash file NAME of every unit: (K,) uint64, increasing ordinals of the documents to
    drop. Copies inside a unit are put aside first, then the files are gone through once for each `_BLOCK` documents,
    for the hashes that begin alike.
    """
    units = [np.load(path, mmap_mode="r", allow_pickle=False) for path in hash_files]
    begins = np.cumsum([0, *map(len, units)]).tolist()
    is_copy, bits = np.zeros(begins[-1], bool), (begins[-1] // _BLOCK).bit_length()
    of_units = [is_copy[begin:end] for begin, end in zip(begins, begins[1:])]  # views
    for unit, copies in zip(units, of_units):
        copies[_repeats(unit)] = True
    for prefix in range(1 << bits):  # where bits is 0, the shift leaves 0
        mine = [np.flatnonzero((unit[:, 0] >> np.uint64(64 - bits) == prefix) & ~copies)
                for unit, copies in zip(units, of_units)]
        hashes = np.concatenate([unit[ordinals] for unit, ordinals in zip(units, mine)])
        places = np.concatenate([begin + ordinals for begin, ordinals in zip(begins, mine)])
        is_copy[places[_repeats(hashes)]] = True
    out_folder.mkdir(parents=True, exist_ok=True)
    for file, copies in zip(hash_files, of_units):
        np.save(out_folder / file.name, np.flatnonzero(copies).astype("<u8"), allow_pickle=False)
    log.info("duplicates: %d of %d documents", found := int(np.count_nonzero(is_copy)), begins[-1])
    return found


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """Positions of (N, 2) uint64 rows that equal an earlier row."""
    rows = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal hashes stay in order
    return rows[1:][(hashes[rows[1:]] == hashes[rows[:-1]]).all(axis=1)]
