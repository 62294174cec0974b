"""Several streams of rows merged into one, evenly: which stream gives row n, and which of its rows that is.

Row j of a stream of R rows gets the key (j + phase) / R, and all rows are put in order of (key, stream). Each stream so
spreads its rows at even distances over the whole, and any stretch holds of each stream its share: between two keys a
stream has its share of rows to within one, hence in any run of rows its count is off by less than
(1 - p) + p * (streams - 1), p being its share. A phase per stream keeps a stream of few rows from always being in the
same place.

Nothing is written out. How many rows of a stream lie below a key follows from the key alone, so a place is found in
time that grows with the number of streams, not of rows; the rows around it are merged in blocks, the last of which are
kept. Keys are compared as float64: one addition and one division, each correctly rounded by IEEE 754, so the same
everywhere, and never decreasing in j, which is all that exactness needs. What a stream is, is order.py's work.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interleave"]

Ints = npt.NDArray[np.int64]

_BLOCK_ROWS = 8192  # about a millisecond to merge, and more than a batch
_KEPT_BLOCKS = 2  # a reader goes forward; looking back across a border merges nothing again


class _Block(NamedTuple):
    """The rows between two keys, merged. n rows, S streams."""

    first: int
    """Row of the whole that the block begins with."""
    starts: Ints
    """(S,) rows of each stream before the block."""
    streams: Ints
    """(n,) stream of each row."""
    indices: Ints
    """(n,) row within its stream."""


class Interleave:
    """The merged order of S streams.

    Args:
        rows: (S,) rows of each stream; may be 0.
        phases: (S,) numbers from 0 to below 1: how far into its first interval a stream begins.
    """

    def __init__(self, rows: npt.ArrayLike, phases: npt.ArrayLike) -> None:
        self._rows = np.asarray(rows, np.int64)
        self._phases = np.asarray(phases, np.float64)
        self._divisors = np.maximum(self._rows, 1).astype(np.float64)
        self.num_rows = int(self._rows.sum())
        self._num_blocks = max(1, -(-self.num_rows // _BLOCK_ROWS))
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._last: _Block | None = None

    def at(self, row: int, /) -> tuple[int, int]:
        """The stream that gives row `row` of the whole, and the row's number within that stream."""
        block = self._block_of(row)
        return int(block.streams[row - block.first]), int(block.indices[row - block.first])

    def counts(self, row: int, /) -> Ints:
        """(S,) rows of each stream among the first `row` rows of the whole, 0 <= row <= num_rows."""
        if row == self.num_rows:
            return self._rows
        block = self._block_of(row)
        return block.starts + np.bincount(block.streams[:row - block.first], minlength=len(self._rows))

    def key(self, stream: int, index: int, /) -> float:
        """Place, from 0 to 1, of row `index` of a stream."""
        return float((index + self._phases[stream]) / self._divisors[stream])

    def _block_of(self, row: int) -> _Block:
        last = self._last
        if last is None or not last.first <= row < last.first + len(last.streams):
            self._last = last = self._find(row)
        return last

    def _find(self, row: int) -> _Block:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row}: the streams have {self.num_rows} rows together")
        number = row * self._num_blocks // self.num_rows  # off by one at most: a block's rows are its share of the keys
        while int(self._below(number).sum()) > row:
            number -= 1
        while int(self._below(number + 1).sum()) <= row:
            number += 1
        if number not in self._blocks:
            self._blocks[number] = self._merge(self._below(number), self._below(number + 1))
            while len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _below(self, number: int) -> Ints:
        """(S,) rows of each stream with a key below the first of block `number`."""
        if number >= self._num_blocks:
            return self._rows
        key = number / self._num_blocks
        counts = np.clip((key * self._divisors - self._phases).astype(np.int64) - 1, 0, self._rows)
        for _ in range(3):  # the estimate is one or two too low; from there on the keys themselves decide
            counts = counts + ((counts < self._rows) & ((counts + self._phases) / self._divisors < key))
        return counts

    def _merge(self, begin: Ints, end: Ints) -> _Block:
        sizes = end - begin
        streams = np.repeat(np.arange(len(sizes)), sizes)
        ahead = np.cumsum(sizes) - sizes
        indices = np.arange(len(streams)) - np.repeat(ahead - begin, sizes)
        keys = (indices + self._phases[streams]) / self._divisors[streams]
        order = np.argsort(keys, kind="stable")  # equal keys stay in order of streams
        return _Block(int(begin.sum()), begin, streams[order], indices[order])
