"""Which documents are kept: by length, and of exact duplicates the first. Both are off by default.

Near-duplicates, language, quality, rules of one's own and decontamination are datatrove's work, done before this.

For exact duplicates workers hash the documents of their units; `find_duplicates` then finds which have the xxh3_128 of
an earlier one in the order of (unit, ordinal). The chance that any two of 1e9 different documents do is 1.5e-21.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

log = logging.getLogger(__name__)

_BLOCK = 16 << 20  # documents sorted at a time: about 100 bytes of memory each

SHORT, LONG, DUPLICATE, OVERSIZED, UNREADABLE = "short", "long", "duplicate", "oversized", "unreadable"  # why dropped


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which filters are on."""

    min_characters: int | None = None  # Unicode code points; empty documents are dropped anyway
    max_characters: int | None = None
    deduplicate: bool = False  # drop documents that equal an earlier one

    def __post_init__(self) -> None:
        least, most = self.min_characters, self.max_characters
        if (least is not None and least < 2) or (most is not None and most < max(least or 0, 1)):
            raise ValueError(f"--min-characters must be 2 or more and at most --max-characters, got {least} and {most}")

    def reason(self, text: str) -> str | None:
        """Why a document is dropped by its length; None keeps it."""
        if len(text) < (self.min_characters or 0):
            return SHORT
        return LONG if len(text) > (self.max_characters or sys.maxsize) else None

    def record(self) -> dict[str, Any]:
        """All that shapes the data, as JSON; keys of filters that are gone stay, for datasets that are appended to."""
        return {"min_characters": self.min_characters, "max_characters": self.max_characters, "predicates": [],
                "decontaminate": [], "decontaminate_field": "text", "decontaminate_drop": False,
                "ngrams": None, "deduplicate": self.deduplicate}


def write_hashes(path: Path | IO[bytes], hashes: bytes | bytearray) -> None:
    """Writes xxh3_128 (16 bytes) of each document, in the order of reading, as .npy: (documents, 2) uint64."""
    np.save(path, np.frombuffer(hashes, "<u8").reshape(-1, 2), allow_pickle=False)


def find_duplicates(hash_files: Sequence[Path], out_folder: Path) -> int:
    """Finds the documents that repeat an earlier one; how many there are.

    Writes `out_folder/NAME` for the hash file NAME of every unit: (K,) uint64, increasing ordinals of the documents to
    drop. Copies inside a unit are put aside first; then each pass takes about `_BLOCK` hashes that begin alike.
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
