"""Several streams of rows merged into one, evenly: which stream gives row n, and which of its rows that is.

Row j of a stream of R rows gets the key (j + phase) / R, and all rows are put in order of (key, stream). Each
stream so spreads its rows at even distances over the whole: in any run of rows the count of a stream with
share p is off by less than (1 - p) + p * (streams - 1). A phase per stream keeps a stream of few rows from
always being in the same place.

Nothing is written out: how many rows of a stream lie below a key follows from the key, so a place is found in
time that grows with the number of streams, and the rows around it are merged in blocks. Keys are float64: one
addition and one division, each correctly rounded by IEEE 754, so the same everywhere, and never decreasing in
j.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Interleave"]

Ints = npt.NDArray[np.int64]

_BLOCK_ROWS = 8192  # about a millisecond to merge, and more than a batch


class _Block(NamedTuple):
    """The rows between two keys, merged. n rows, S streams."""

    first: int  # of the whole
    starts: Ints  # (S,) rows of each stream before the block
    streams: Ints  # (n,) stream of each row
    indices: Ints  # (n,) row within its stream


class Interleave:
    """The merged order of S streams, from the rows of each and its phase, from 0 to below 1."""

    def __init__(self, rows: npt.ArrayLike, phases: npt.ArrayLike) -> None:
        self._rows = np.asarray(rows, np.int64)
        self._phases = np.asarray(phases, np.float64)
        self._divisors = np.maximum(self._rows, 1).astype(np.float64)
        self.num_rows = int(self._rows.sum())
        self._num_blocks = max(1, -(-self.num_rows // _BLOCK_ROWS))
        self._blocks: list[_Block] = []

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
        for block in self._blocks:
            if block.first <= row < block.first + len(block.streams):
                return block
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row must be 0 to {self.num_rows - 1}, got {row}")
        number = row * self._num_blocks // self.num_rows  # off by one at most
        while int(self._below(number).sum()) > row:
            number -= 1
        while int(self._below(number + 1).sum()) <= row:
            number += 1
        self._blocks = [*self._blocks[-1:], self._merge(number)]  # two, for looking back across a border
        return self._blocks[-1]

    def _below(self, number: int) -> Ints:
        """(S,) rows of each stream with a key below the first of block `number`."""
        if number >= self._num_blocks:
            return self._rows
        key = number / self._num_blocks
        counts = np.clip((key * self._divisors - self._phases).astype(np.int64) - 1, 0, self._rows)
        for _ in range(3):  # the estimate is one or two too low; from there on the keys themselves decide
            counts = counts + ((counts < self._rows) & ((counts + self._phases) / self._divisors < key))
        return counts

    def _merge(self, number: int) -> _Block:
        begin = self._below(number)
        sizes = self._below(number + 1) - begin
        streams = np.repeat(np.arange(len(sizes)), sizes)
        ahead = np.cumsum(sizes) - sizes
        indices = np.arange(len(streams)) - np.repeat(ahead - begin, sizes)
        keys = (indices + self._phases[streams]) / self._divisors[streams]
        order = np.argsort(keys, kind="stable")  # equal keys stay in order of streams
        return _Block(int(begin.sum()), begin, streams[order], indices[order])
