"""Best-fit packing of one shard's chunks into rows, computed on counts of lengths instead of on the chunks.

A piece is a chunk with its BOS and EOS: chunk length + `SPECIALS_PER_PIECE` tokens. Which lengths share a row follows
from the histogram of lengths alone, so a shard's row count is known from its manifest entry, and equal rows are
handled as one group: the work grows with the number of distinct lengths. `order.py` says which chunk takes which place.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pattern = tuple[tuple[int, int], ...]  # what is in a row: (piece length, how many), ...
SPECIALS_PER_PIECE = 2  # BOS before and EOS after every chunk, for encoders and decoders alike: both read the same rows


class Packing(NamedTuple):
    """Rows of one shard, as groups of identical rows."""

    patterns: tuple[Pattern, ...]  # of each group
    multiplicities: npt.NDArray[np.int64]  # (groups,) rows in each group

    @property
    def num_rows(self) -> int:
        return int(self.multiplicities.sum())

    def expand(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(P,) int64 piece lengths, row after row, and (R + 1,) int64 offsets of the rows in them."""
        rows = [np.repeat(*np.array(runs).T) for runs in self.patterns]
        lengths = np.concatenate([np.zeros(0), *(np.tile(row, times) for row, times in zip(rows, self.multiplicities))])
        per_row = np.repeat([len(row) for row in rows], self.multiplicities)
        return lengths.astype(np.int64), np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64)


def piece_counts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """(M + 3,) histogram of piece lengths, from an (M + 1,) histogram of chunk lengths."""
    return np.concatenate([np.zeros(SPECIALS_PER_PIECE, np.int64), np.asarray(lengths, np.int64)])


def pack_lengths(counts: npt.ArrayLike, capacity: int) -> Packing:
    """Packs pieces into rows of `capacity` tokens by best-fit decreasing.

    Longest pieces first; each goes into the row with the least space that still takes it, or into a new row. Rows with
    the same content so far are one group, and all pieces of one length are placed into a group at once: a row that
    took a piece has less space than before, hence is again the best fit as long as another one goes in, so that every
    row of the group takes space // length pieces before the next row is touched.

    counts: (M + 1,) integers: entry n is the number of pieces of n tokens, BOS and EOS included.
    """
    table = np.asarray(counts, np.int64)
    used = np.flatnonzero(table)
    if used.size and used[-1] > capacity:
        raise ValueError(f"max_seq_len must be at least {used[-1]}, got {capacity}")
    # space left -> groups of (pattern, rows) with that space, first opened first; `spaces` are its keys in order
    groups: dict[int, list[tuple[Pattern, int]]] = {}
    spaces: list[int] = []

    def put(space: int, pattern: Pattern, rows: int) -> None:
        if space not in groups:
            bisect.insort(spaces, space)
            groups[space] = []
        groups[space].append((pattern, rows))

    for length in used[::-1].tolist():
        left = int(table[length])
        while left:
            at = bisect.bisect_left(spaces, length)
            if at == len(spaces):
                put(capacity, (), -(-left // (capacity // length)))
                continue
            space = spaces[at]
            pattern, rows = groups[space].pop(0)
            if not groups[space]:
                del groups[space], spaces[at]
            per_row = space // length
            full = min(rows, left // per_row)
            if full:
                put(space - length * per_row, (*pattern, (length, per_row)), full)
                left -= full * per_row
            rest = rows - full
            if rest and left:  # fewer than per_row pieces remain: one row takes them all
                put(space - length * left, (*pattern, (length, left)), 1)
                left, rest = 0, rest - 1
            if rest:
                put(space, pattern, rest)
    closed = [group for space in spaces for group in groups[space]]
    return Packing(tuple(pattern for pattern, _ in closed), np.array([rows for _, rows in closed], np.int64))
