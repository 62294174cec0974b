"""The pass over a unit that comes first when duplicates are dropped: a hash of every document, in reading order.

From the hashes of all units duplicates.py finds which documents repeat earlier ones; unit_worker.py leaves those out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ettin_foundry.corpus.duplicates import hash_text, read_drops, write_hashes
from ettin_foundry.corpus.progress import Tick
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.unit_io import Ticker, documents_of, local_copy
from ettin_foundry.corpus.units import Unit, record_key
from ettin_foundry.data.storage import Storage, open_storage

__all__ = ["HashUnit", "drops_name", "hashes_name", "load_drops"]


def hashes_name(unit: Unit, base_key: str) -> str:
    """Hashes of all documents of a unit, relative to the set's folder; of another input or option they have another name."""
    return f"work/hashes/{unit.number:05d}.{record_key(base_key, unit)}.npy"


def drops_name(unit: Unit, base_key: str) -> str:
    """Ordinals of a unit's documents that repeat earlier ones."""
    return f"work/drops/{unit.number:05d}.{record_key(base_key, unit)}.npy"


def load_drops(storage: Storage, unit: Unit, base_key: str) -> tuple[np.ndarray, int]:
    """(K,) uint64, increasing ordinals of the unit's documents to drop; and of how many documents."""
    hashes = np.load(local_copy(storage, hashes_name(unit, base_key)), mmap_mode="r", allow_pickle=False)
    return read_drops(local_copy(storage, drops_name(unit, base_key))), len(hashes)


@dataclass(frozen=True)
class HashUnit:
    """Picklable; called with a unit. Attributes as of `unit_worker.ConvertUnit`."""

    out: str
    options: Mapping[str, Any]
    sources: Mapping[str, Source]
    base_key: str

    def __call__(self, unit: Unit, report: Callable[[Tick], None]) -> None:
        storage, meter = open_storage(self.out), Meter()
        ticker = Ticker(report, meter, unit)
        hashes = bytearray()
        for document in documents_of(unit, self.sources[unit.source], self.options, meter):
            hashes += hash_text(document.text)
            ticker.add(documents=1, tokens=0, text_bytes=0)
        path = storage.scratch() / f"hashes.{unit.number:05d}.{os.getpid()}.npy"
        write_hashes(path, hashes)
        storage.put_file(path, hashes_name(unit, self.base_key))
        ticker.flush()
