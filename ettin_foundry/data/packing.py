"""Best-fit packing of one shard's chunks into rows, computed on counts of lengths instead of on the chunks.

A piece is a chunk with its BOS and EOS: chunk length + `SPECIALS_PER_PIECE` tokens. Which lengths share a row depends
on the histogram of lengths alone, so equal rows are handled as one group and the work follows the number of distinct
lengths, not of chunks: a shard's row count is known from its manifest entry without opening the shard. Which chunk
takes which place of its length is not decided here but in `order.py`. Numpy only; no randomness, no state.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SPECIALS_PER_PIECE", "Packing", "pack_lengths", "piece_counts"]

SPECIALS_PER_PIECE = 2
"""BOS before and EOS after every chunk, for encoders and decoders alike: a pair's rows and clocks are identical."""


@dataclass(frozen=True)
class Packing:
    """Rows of one shard, as groups of identical rows.

    Attributes:
        capacity: tokens that fit into a row, the T of the batch.
        patterns: one entry per group; each is a sequence of (piece length, how many of it), longest first.
        multiplicities: (groups,) int64, rows in each group.
        num_tokens: real tokens of all rows, BOS and EOS included.
    """

    capacity: int
    patterns: tuple[tuple[tuple[int, int], ...], ...]
    multiplicities: npt.NDArray[np.int64]
    num_tokens: int

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return int(self.multiplicities.sum())

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a real token; 1.0 without any row."""
        return self.num_tokens / (self.num_rows * self.capacity) if self.num_rows else 1.0

    def expand(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Writes every row out.

        Returns:
            (P,) int64 piece lengths, row after row, and (R + 1,) int64 offsets: row r holds pieces
            offsets[r] to offsets[r + 1].
        """
        rows = [np.repeat([length for length, _ in runs], [many for _, many in runs]) for runs in self.patterns]
        if not rows:
            return np.zeros(0, np.int64), np.zeros(1, np.int64)
        lengths = np.concatenate([np.tile(row, times) for row, times in zip(rows, self.multiplicities)])
        per_row = np.repeat([len(row) for row in rows], self.multiplicities)
        return lengths.astype(np.int64), np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64)


def piece_counts(lengths: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Histogram of piece lengths from a histogram of chunk lengths.

    Args:
        lengths: (M + 1,) integers; entry n is the number of chunks of n tokens.

    Returns:
        (M + 1 + SPECIALS_PER_PIECE,) int64; entry n is the number of pieces of n tokens.
    """
    return np.concatenate([np.zeros(SPECIALS_PER_PIECE, np.int64), np.asarray(lengths, np.int64)])


def _check_range(table: np.ndarray, used: np.ndarray, capacity: int) -> None:
    if used.size and (used[0] == 0 or table.min() < 0):
        raise ValueError(f"counts: {int(table[used[0]])} pieces of length {int(used[0])} given and smallest count "
                         f"{int(table.min())}; lengths start at 1 and counts at 0; check the histogram's origin")
    if used.size and used[-1] > capacity:
        raise ValueError(
            f"max_seq_len: {capacity} given, but the data has a chunk of {int(used[-1]) - SPECIALS_PER_PIECE} tokens; "
            f"a row holds chunks of at most {capacity - SPECIALS_PER_PIECE} (BOS and EOS take {SPECIALS_PER_PIECE}). "
            "Raise max_seq_len, or convert the corpus again with a smaller chunk length")


def pack_lengths(counts: npt.ArrayLike, capacity: int) -> Packing:
    """Packs pieces into rows by best-fit decreasing.

    Longest pieces first; each goes into the row with the least space that still takes it, or into a new row. Rows with
    the same content so far are one group, and all pieces of one length are placed into a group at once: a row that took
    a piece has less space than before, hence is again the best fit as long as another one goes in, so that every row of
    the group takes space // length pieces before the next row is touched. The result equals placing the pieces one by
    one (a test holds it to that).

    Args:
        counts: (M + 1,) integers; entry n is the number of pieces of n tokens, BOS and EOS included.
        capacity: tokens of a row.

    Returns:
        The groups of rows, in a fixed order.

    Raises:
        ValueError: a piece is longer than a row, a length of 0 is counted, or a count is negative.
    """
    table = np.asarray(counts, np.int64)
    used = np.flatnonzero(table)
    _check_range(table, used, capacity)
    # space left -> groups of (pattern, rows) with that space, first opened first; `spaces` are its keys in order
    groups: dict[int, list[tuple[tuple[tuple[int, int], ...], int]]] = {}
    spaces: list[int] = []

    def put(space: int, pattern: tuple[tuple[int, int], ...], rows: int) -> None:
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
    return Packing(
        capacity=capacity,
        patterns=tuple(pattern for pattern, _ in closed),
        multiplicities=np.array([rows for _, rows in closed], np.int64),
        num_tokens=int((table * np.arange(table.size)).sum()),
    )
