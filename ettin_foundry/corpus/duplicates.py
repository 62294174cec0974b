"""Exact duplicate documents among any number of them: a 128-bit hash of each, compared on disk in bounded memory.

Workers hash the documents of their units, in order; `merge` finds which documents repeat an earlier one and writes,
per unit, the ordinals to drop. The first occurrence in the order of (unit, ordinal) stays, whoever hashed what when.
Documents are taken for equal when their xxh3_128 agree: for 1e9 documents the chance that any two different ones do is
(1e9)**2 / 2**129 = 1.5e-21. The hash has no key, so a text can be made to collide with another on purpose, which drops
one of the two.

`merge` parts the hashes by their leading bits into files, sorts one of these at a time, and collects what it drops by
unit. Near-duplicates are not looked for, see filters.py. Where the files of a conversion lie is convert.py's matter.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import xxhash

__all__ = ["HASH_BYTES", "Hasher", "MergeCounts", "hash_text", "merge", "read_drops", "write_hashes"]

log = logging.getLogger(__name__)

HASH_BYTES = 16
_RECORD = 3  # uint64 per document in the files of merge: its hash in two halves, its number among all documents
_SORT_BYTES = 128  # of memory at most per document while a file is sorted: records, keys, copies of what is dropped
_MARK_BYTES = 4  # and while drops are put in order, of which the mark is one
_BASE_BYTES = 16 << 20  # and of all that does not grow with the documents
_LEAST_BYTES = 64 << 20
_SCRATCH_PREFIX = ".merge."


def hash_text(text: str) -> bytes:
    """16 bytes: xxh3_128 of the text in UTF-8.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair, which no reader lets through.
    """
    return xxhash.xxh3_128_digest(text.encode())


class Hasher:
    """`hash_text` of a text that comes in pieces."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, piece: str) -> None:
        self._state.update(piece.encode())

    def digest(self) -> bytes:
        """16 bytes: the hash of the pieces so far, joined."""
        return self._state.digest()


class MergeCounts(NamedTuple):
    """What `merge` found."""

    documents: int
    duplicates: int
    """Documents to drop."""
    per_unit: tuple[int, ...]
    """Documents to drop in each unit."""


def write_hashes(path: Path, hashes: bytes | bytearray) -> None:
    """Writes the hashes of a unit's documents, atomically.

    Args:
        path: an .npy file of (documents, 2) uint64.
        hashes: 16 bytes per document, in the order of reading.
    """
    _save(path, np.frombuffer(hashes, "<u8").reshape(-1, 2))


def read_drops(path: Path) -> np.ndarray:
    """(K,) uint64: ordinals of a unit's documents to drop, increasing.

    Raises:
        FileNotFoundError, ValueError: no file written by `merge`.
    """
    with _opened(path, 1) as (stream, (number,)):
        drops = np.fromfile(stream, "<u8", number)
    if (drops[1:] <= drops[:-1]).any():
        raise _refused(path, "its numbers do not increase")
    return drops


def merge(hash_files: Sequence[Path], out_folder: Path, *, memory_bytes: int = 1 << 30) -> MergeCounts:
    """Finds the documents that repeat an earlier one.

    Writes `out_folder/NAME` for every hash file of that name, in the form of `read_drops`. Meanwhile `out_folder` holds
    24 bytes per document, and 8 more per dropped one. The same files give the same result whatever the memory; a killed
    run leaves nothing that harms the next one.

    Args:
        hash_files: of all units, in their order; names differ.
        memory_bytes: what the arrays of this function may take; at least 64 MiB.

    Raises:
        FileNotFoundError, ValueError: a file that `write_hashes` did not write, or too little memory.
    """
    if memory_bytes < _LEAST_BYTES:
        raise ValueError(f"memory_bytes: {memory_bytes} given; at least {_LEAST_BYTES} is needed. Give more")
    if len({path.name for path in hash_files}) < len(hash_files):
        raise ValueError("hash_files: two have the same name; what is dropped of a unit goes to a file named after its "
                         "hashes. Name them after their units")
    begins = np.cumsum([0, *map(_num_hashes, hash_files)])
    most = (memory_bytes - _BASE_BYTES) // _SORT_BYTES
    bits = max(0, int(begins[-1] - 1) // most).bit_length()
    if bits > 16:
        raise ValueError(f"memory_bytes: {memory_bytes} given for {begins[-1]} documents; at least "
                         f"{(begins[-1] >> 16) * _SORT_BYTES + _BASE_BYTES} is needed. Give more")
    out_folder.mkdir(parents=True, exist_ok=True)
    for left in out_folder.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH_PREFIX, dir=out_folder) as scratch:
        groups = _group_units(begins, memory_bytes // _MARK_BYTES, Path(scratch))
        for path in _part(hash_files, begins, bits, most, Path(scratch)):
            for numbers in _copies(path, most):
                _append_by(np.searchsorted([group.begin for group in groups], numbers, side="right") - 1, numbers,
                           [group.path for group in groups])
            path.unlink()
        per_unit: list[int] = []
        for group in groups:
            per_unit += _write_drops(group, [out_folder / path.name for path in hash_files], begins, most)
    log.info("duplicates: %d of %d documents", sum(per_unit), begins[-1])
    return MergeCounts(int(begins[-1]), sum(per_unit), tuple(per_unit))


class _Group(NamedTuple):
    """Units whose drops are put in order together."""

    units: range
    begin: int
    """Number of the first document."""
    end: int
    path: Path
    """Numbers of the documents to drop, in any order."""


def _group_units(begins: np.ndarray, most: int, scratch: Path) -> list[_Group]:
    """Consecutive units, as many as hold at most `most` documents, at least one."""
    groups: list[_Group] = []
    first = 0
    while first < len(begins) - 1:
        end = max(first + 1, int(np.searchsorted(begins, begins[first] + most, side="right")) - 1)
        groups.append(_Group(range(first, end), int(begins[first]), int(begins[end]), scratch / f"drops.{len(groups)}"))
        first = end
    return groups


def _part(hash_files: Sequence[Path], begins: np.ndarray, bits: int, most: int, scratch: Path) -> list[Path]:
    """Files of (documents, 3) uint64 records, one for each value of the hashes' first `bits`, in order of documents."""
    paths = [scratch / f"hashes.{prefix}" for prefix in range(1 << bits)]
    for path, begin in zip(hash_files, begins.tolist()):
        with _opened(path, 2) as (stream, (number, _)):
            for done in range(0, number, most):
                block = np.fromfile(stream, "<u8", 2 * min(most, number - done)).reshape(-1, 2)
                records = np.empty((len(block), 3), np.uint64)
                records[:, :2] = block
                records[:, 2] = np.arange(begin + done, begin + done + len(block), dtype=np.uint64)
                _append_by(block[:, 0] >> np.uint64(64 - bits) if bits else np.zeros(len(block)), records, paths)
    return [path for path in paths if path.exists()]


def _append_by(keys: np.ndarray, values: np.ndarray, paths: Sequence[Path]) -> None:
    """Appends each of (N, ...) values to the path that its (N,) key numbers; they keep their order."""
    keys = keys.astype(np.uint16)  # sorted by radix
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(np.bincount(keys, minlength=len(paths)))
    for path, begin, end in zip(paths, [0, *ends[:-1].tolist()], ends.tolist()):
        if end > begin:
            with open(path, "ab") as stream:
                stream.write(values[order[begin:end]].data)


def _copies(path: Path, most: int) -> Iterator[np.ndarray]:
    """Numbers of the documents in a file of records whose hash an earlier one has, in several arrays.

    A file that is larger than memory allows, as one text that is repeated without end makes it, is read in parts, and
    only the different hashes before a part are kept.
    """
    seen = np.zeros((0, 2), np.uint64)
    left = path.stat().st_size // (8 * _RECORD)
    with open(path, "rb") as stream:
        while left:
            number = min(left, max(most - len(seen), most // 4))
            left -= number
            records = np.fromfile(stream, np.uint64, _RECORD * number).reshape(-1, _RECORD)
            hashes = np.concatenate([seen, records[:, :2]])
            repeats = _repeats(hashes)
            yield records[repeats - len(seen), 2]  # those seen differ from each other
            if left:
                seen = np.delete(hashes, repeats, axis=0)


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """Positions of (N, 2) uint64 rows that equal an earlier row.

    One sort of single numbers finds the rows that may: the leading bits of a hash, and the position behind them. Only
    these few are compared in full.
    """
    position_bits = np.uint64(len(hashes).bit_length())
    keys = hashes[:, 1] >> position_bits
    keys <<= position_bits
    keys |= np.arange(len(hashes), dtype=np.uint64)
    keys.sort()
    like_next = (keys[1:] ^ keys[:-1]) >> position_bits == 0
    alike = np.zeros(len(hashes), bool)
    alike[1:] |= like_next
    alike[:-1] |= like_next
    rows = (keys[alike] & ((np.uint64(1) << position_bits) - np.uint64(1))).astype(np.int64)
    del keys, alike, like_next
    rows = rows[np.lexsort((hashes[rows, 1], hashes[rows, 0]))]  # stable: equal hashes stay in order of position
    equal = (hashes[rows[1:], 0] == hashes[rows[:-1], 0]) & (hashes[rows[1:], 1] == hashes[rows[:-1], 1])
    return rows[1:][equal]


def _write_drops(group: _Group, paths: Sequence[Path], begins: np.ndarray, most: int) -> list[int]:
    """Writes the ordinals to drop of each unit of a group; how many they are."""
    marks = np.zeros(group.end - group.begin, bool)
    if group.path.exists():
        with open(group.path, "rb") as stream:
            while len(numbers := np.fromfile(stream, np.uint64, most)):
                marks[numbers - np.uint64(group.begin)] = True
    counts = []
    for unit in group.units:
        drops = np.flatnonzero(marks[begins[unit] - group.begin:begins[unit + 1] - group.begin])
        _save(paths[unit], drops.astype("<u8"))
        counts.append(len(drops))
    return counts


def _num_hashes(path: Path) -> int:
    with _opened(path, 2) as (_, shape):
        return shape[0]


@contextlib.contextmanager
def _opened(path: Path, axes: int) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """An .npy file of uint64, (N,) or (N, 2), standing behind its header, and its shape; np.load would take any other."""
    try:
        stream = open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; the file of every unit is needed. Start the conversion again, it makes "
                                "those that are not there") from None
    with stream:
        try:
            version = np.lib.format.read_magic(stream)
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        except ValueError as error:
            raise _refused(path, f"is no NumPy array ({error})") from None
        right = version == (1, 0) and not by_columns and dtype == np.dtype("<u8") and len(shape) == axes
        if not right or shape[1:] != (2,) * (axes - 1):
            raise _refused(path, f"holds {dtype} {shape}")
        if os.fstat(stream.fileno()).st_size - stream.tell() != 8 * math.prod(shape):
            raise _refused(path, f"has {os.fstat(stream.fileno()).st_size} bytes, too many or too few for {shape}")
        yield stream, shape


def _refused(path: Path, found: str) -> ValueError:
    return ValueError(f"{path}: {found}; an array that a conversion wrote is needed, whole. Remove the file and start the "
                      "conversion again")


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
