"""Exact duplicate documents among any number of them: a 128-bit hash of each, compared on disk in bounded memory.

Workers hash the documents of their units, in order. `find_duplicates` then finds which documents repeat an earlier one;
the first in the order of (unit, ordinal) stays, whoever hashed what when. Documents are taken for equal when their
xxh3_128 agree: for 1e9 documents the chance that any two different ones do is 1.5e-21. The hash has no key, so a text can
be made to collide with another on purpose, which drops one of the two.
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
    """(K,) uint64: increasing ordinals of a unit's documents to drop, as `find_duplicates` wrote them.

    Raises:
        FileNotFoundError, ValueError: no such file.
    """
    drops = np.array(_load(path, 1))
    if (drops[1:] <= drops[:-1]).any():
        raise ValueError(f"{path} must hold increasing numbers; remove the file and start the conversion again")
    return drops


def find_duplicates(hash_files: Sequence[Path], out_folder: Path) -> int:
    """Finds the documents that repeat an earlier one; how many there are.

    Writes `out_folder/NAME` for every hash file of that name, in the form of `read_drops`. The hashes are divided by
    their leading bits into files of `_BLOCK` documents, of which one at a time is sorted. A hash is passed on once a
    block, so that a text repeated without end does not fill one file. Meanwhile `out_folder` holds 25 bytes a document.

    Args:
        hash_files: of all units, in their order, with different names.

    Raises:
        FileNotFoundError, ValueError: a file that `write_hashes` did not write.
    """
    begins = np.cumsum([0, *(len(_load(path, 2)) for path in hash_files)])
    out_folder.mkdir(parents=True, exist_ok=True)
    bits = int(begins[-1] // _BLOCK).bit_length()
    with tempfile.TemporaryDirectory(dir=out_folder) as scratch:
        paths = [Path(scratch, f"hashes.{prefix}") for prefix in range(1 << bits)]
        is_copy = np.memmap(Path(scratch, "copies"), bool, "w+", shape=max(1, int(begins[-1])))
        for file, first in zip(hash_files, begins.tolist()):
            hashes = _load(file, 2)
            for begin in range(0, len(hashes), _BLOCK):
                records = np.empty((min(_BLOCK, len(hashes) - begin), 3), np.uint64)  # a hash in two halves, its number
                records[:, :2] = hashes[begin:begin + _BLOCK]
                records[:, 2] = np.arange(first + begin, first + begin + len(records), dtype=np.uint64)
                repeats = _repeats(records[:, :2])
                is_copy[first + begin + repeats] = True
                _append_by_prefix(np.delete(records, repeats, axis=0), bits, paths)
        for path in filter(Path.exists, paths):
            records = np.fromfile(path, np.uint64).reshape(-1, 3)
            is_copy[records[_repeats(records[:, :2]), 2].astype(np.int64)] = True
            path.unlink()
        for file, begin, end in zip(hash_files, begins.tolist(), begins[1:].tolist()):
            np.save(out_folder / file.name, np.flatnonzero(is_copy[begin:end]).astype("<u8"), allow_pickle=False)
        found = int(np.count_nonzero(is_copy))
    log.info("duplicates: %d of %d documents", found, begins[-1])
    return found


def _append_by_prefix(records: np.ndarray, bits: int, paths: Sequence[Path]) -> None:
    """Appends each (3,) record to the path numbered by the leading bits of its hash; records keep their order."""
    prefixes = (records[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(records))).astype(np.uint32)
    order = np.argsort(prefixes, kind="stable")
    ends = np.cumsum(np.bincount(prefixes, minlength=len(paths))).tolist()
    for path, begin, end in zip(paths, [0, *ends], ends):
        if end > begin:
            with open(path, "ab") as stream:
                stream.write(records[order[begin:end]].data)


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """Positions of (N, 2) uint64 rows that equal an earlier row.

    One sort of single numbers finds the rows that may: the leading bits of a hash, and the position behind them. Only
    these few are compared in full.
    """
    position_bits = np.uint64(len(hashes).bit_length())
    keys = hashes[:, 1] >> position_bits << position_bits | np.arange(len(hashes), dtype=np.uint64)
    keys.sort()
    like_next = (keys[1:] ^ keys[:-1]) >> position_bits == 0
    alike = np.append(like_next, False) | np.append(False, like_next)
    rows = (keys[alike] & ((np.uint64(1) << position_bits) - np.uint64(1))).astype(np.int64)
    rows = rows[np.lexsort((hashes[rows, 1], hashes[rows, 0]))]  # stable: equal hashes stay in order of position
    equal = (hashes[rows[1:]] == hashes[rows[:-1]]).all(axis=1)
    return rows[1:][equal]


def _load(path: Path, axes: int) -> np.ndarray:
    """An .npy file of uint64, (N,) or (N, 2), mapped into memory."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; start the conversion again, which makes the file again") from None
    except (ValueError, EOFError, OverflowError, OSError) as error:
        raise ValueError(f"{path} must be a whole array of a conversion, got {error}; remove the file and start the "
                         "conversion again") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.dtype("<u8") or array.shape[1:] != (2,) * (axes - 1):
        raise ValueError(f"{path} must be an array of uint64 that a conversion wrote, got another; remove it and "
                         "start the conversion again")
    return array

