"""Exact duplicate documents among any number of them: a 128-bit hash of each, compared on disk in bounded
memory.

Workers hash the documents of their units, in order. `find_duplicates` then finds which documents repeat an
earlier one; the first in the order of (unit, ordinal) stays, whoever hashed what when. Documents are taken
for equal when their xxh3_128 agree: for 1e9 documents the chance that any two different ones do is 1.5e-21.
The hash has no key, so a text can be made to collide with another on purpose, which drops one of the two.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

__all__ = ["find_duplicates", "hash_text", "read_drops", "write_hashes"]

log = logging.getLogger(__name__)

_BLOCK = 4 << 20  # documents sorted at a time: about 100 bytes of memory each


def hash_text(text: str) -> bytes:
    """16 bytes: xxh3_128 of the text in UTF-8."""
    return xxhash.xxh3_128_digest(text.encode())


def write_hashes(path: Path, hashes: bytes | bytearray) -> None:
    """Writes 16 bytes per document, in the order of reading, as an .npy file of (documents, 2) uint64."""
    np.save(path, np.frombuffer(hashes, "<u8").reshape(-1, 2), allow_pickle=False)


def read_drops(path: Path) -> np.ndarray:
    """(K,) uint64: increasing ordinals of a unit's documents to drop, as `find_duplicates` wrote them."""
    return _load(path, 1)


def find_duplicates(hash_files: Sequence[Path], out_folder: Path) -> int:
    """Finds the documents that repeat an earlier one; how many there are.

    Writes `out_folder/NAME` for the hash file of that name of every unit, in the form of `read_drops`. The
    hashes are divided by their leading bits into files of `_BLOCK` documents, of which one at a time is
    sorted. A hash is passed on once a block, so that a text repeated without end does not fill one file.
    Meanwhile `out_folder` holds 25 bytes a document.
    """
    begins = np.cumsum([0, *(len(_load(path, 2)) for path in hash_files)]).tolist()
    bits = (begins[-1] // _BLOCK).bit_length()
    out_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_folder) as scratch:
        paths = [Path(scratch, f"hashes.{prefix}") for prefix in range(1 << bits)]
        is_copy = np.memmap(Path(scratch, "copies"), bool, "w+", shape=max(1, begins[-1]))
        for file, first in zip(hash_files, begins):
            hashes = _load(file, 2)
            for begin in range(0, len(hashes), _BLOCK):
                block = hashes[begin:begin + _BLOCK]
                numbers = np.arange(first + begin, first + begin + len(block), dtype=np.uint64)
                records = np.column_stack([block, numbers])
                repeats = _repeats(block)
                is_copy[first + begin + repeats] = True
                _append_by_prefix(np.delete(records, repeats, axis=0), bits, paths)
        for path in filter(Path.exists, paths):
            records = np.fromfile(path, np.uint64).reshape(-1, 3)
            is_copy[records[_repeats(records[:, :2]), 2].astype(np.int64)] = True
            path.unlink()
        for file, begin, end in zip(hash_files, begins, begins[1:]):
            drops = np.flatnonzero(is_copy[begin:end]).astype("<u8")
            np.save(out_folder / file.name, drops, allow_pickle=False)
        found = int(np.count_nonzero(is_copy))
    log.info("duplicates: %d of %d documents", found, begins[-1])
    return found


def _append_by_prefix(records: np.ndarray, bits: int, paths: Sequence[Path]) -> None:
    """Appends each (3,) record to the path numbered by the leading bits of its hash, in order."""
    prefixes = records[:, 0].astype(np.uint64) >> np.uint64(64 - bits) if bits else np.zeros(len(records))
    order = np.argsort(prefixes, kind="stable")
    ends = np.cumsum(np.bincount(prefixes.astype(np.int64), minlength=len(paths))).tolist()
    for path, begin, end in zip(paths, [0, *ends], ends):
        if end > begin:
            with open(path, "ab") as stream:
                stream.write(records[order[begin:end]].data)


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """Positions of (N, 2) uint64 rows that equal an earlier row.

    One sort of single numbers, the leading bits of a hash and the position behind them, finds the few rows to
    compare.
    """
    position_bits = np.uint64(len(hashes).bit_length())
    keys = hashes[:, 1] >> position_bits << position_bits | np.arange(len(hashes), dtype=np.uint64)
    keys.sort()
    like_next = (keys[1:] ^ keys[:-1]) >> position_bits == 0
    alike = np.append(like_next, False) | np.append(False, like_next)
    rows = (keys[alike[:len(keys)]] & ((np.uint64(1) << position_bits) - np.uint64(1))).astype(np.int64)
    rows = rows[np.lexsort((hashes[rows, 1], hashes[rows, 0]))]  # stable: equal hashes stay in order
    equal = (hashes[rows[1:]] == hashes[rows[:-1]]).all(axis=1)
    return rows[1:][equal]


def _load(path: Path, axes: int) -> np.ndarray:
    """An .npy file of uint64, (N,) or (N, 2), mapped into memory."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype != np.dtype("<u8") or array.shape[1:] != (2,) * (axes - 1):
            raise ValueError(f"{array.dtype} {array.shape}")
    except (ValueError, EOFError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path} must be a whole array that a conversion wrote, got {error}; remove the "
                         "file and start the conversion again") from None
    return array
