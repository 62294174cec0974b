"""Which chunks form row n of the endless global stream: a pure function of (manifest, seed, epoch, row).

Nothing here is saved: a run resumes, on any number of ranks, by naming the row to go on from. A chunk is used exactly
once per epoch. Rows are packed inside one shard, so that a shard's rows and tokens follow from its histogram of
lengths; prefix sums over shards then lead to any row and to the real tokens before it. What is built at start is
O(shards), from the manifest; what is built later is one window of shards at a time. Random numbers come from the raw
output of numpy's bit generators (whose streams numpy keeps fixed between versions), seeded by integers; no global
generator is touched.

Not here: ids, masks, labels (`objectives.py`), ranks and batches (`data.py`), reading files (`mds.py`).
"""

from __future__ import annotations

import bisect
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ettin_foundry.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts

__all__ = ["ChunkTable", "Order", "interleave"]

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

# first word of every seed: what the numbers are for, so that no two uses share a stream
_SHARDS, _ROWS, _PLACES = 1, 2, 3
# a reader goes forward; the last window is kept too, so that looking back across a border builds nothing again
_KEPT_WINDOWS = _KEPT_EPOCHS = 2


class ChunkTable(Protocol):
    """What an order needs to know of a data set; `mds.MDSSet` has it. S shards, M tokens in the longest chunk."""

    @property
    def samples(self) -> Ints:
        """(S,) chunks per shard."""
        ...

    @property
    def tokens(self) -> Ints:
        """(S,) tokens per shard, BOS and EOS not counted."""
        ...

    @property
    def sources(self) -> Sequence[str]:
        """S names: where the shard's text came from."""
        ...

    def rows(self, max_seq_len: int, /) -> Ints | None:
        """(S,) packed rows per shard at this row length, or None when the manifest does not have them."""
        ...

    def lengths(self, shard: int, /) -> npt.NDArray[np.integer]:
        """(M + 1,) histogram of the shard's chunk lengths."""
        ...

    def sample_lengths(self, shard: int, /) -> npt.NDArray[np.integer]:
        """(samples of the shard,) length of each chunk in stored order."""
        ...


@dataclass
class _Layout:
    """Rows of one shard: places of given length, and (filled when first needed) the chunk that takes each place."""

    shard: int
    lengths: Ints  # (P,) piece lengths, row after row
    offsets: Ints  # (R + 1,) row r has places offsets[r] to offsets[r + 1]
    samples: Ints | None = None  # (P,) index of the chunk in the shard

    @property
    def row_tokens(self) -> Ints:
        """(R,) real tokens per row."""
        return np.add.reduceat(self.lengths, self.offsets[:-1]) if self.offsets.size > 1 else np.zeros(0, np.int64)


@dataclass
class _Window:
    """A run of shards whose rows are permuted together."""

    first_row: int  # of the epoch
    tokens_before: Ints  # (R + 1,) real tokens of the epoch before each row of the window
    permutation: Ints  # (R,) place in the window -> row in the concatenation of the layouts
    row_starts: list[int]  # first row of each layout in that concatenation
    layouts: list[_Layout] = field(default_factory=list)


@dataclass
class _Epoch:
    shards: Ints  # (S,) the epoch's order of shards
    row_starts: Ints  # (S + 1,) rows before each shard in that order
    token_starts: Ints  # (S + 1,)


def _raw(count: int, *words: int) -> npt.NDArray[np.uint64]:
    return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)


def _starts(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def interleave(tokens: Ints, sources: Sequence[str], seed: int, epoch: int) -> Ints:
    """Order of shards for one epoch: shuffled within each source, sources spread evenly over the epoch.

    A shard's place is the share of its source's tokens that lie before it (plus one random phase per source, so that a
    source of a single shard is not always in the middle). Up to any place, every source has therefore given the same
    share of its tokens, to within one shard.

    Args:
        tokens: (S,) tokens per shard.
        sources: S source names.
        seed, epoch: determine the order.

    Returns:
        (S,) a permutation of the shards.
    """
    names, source_of = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    place = np.zeros(len(tokens), np.float64)
    grouped = np.split(np.argsort(source_of, kind="stable"), np.cumsum(np.bincount(source_of))[:-1])
    for number, (_, shards) in enumerate(zip(names, grouped)):
        draws = _raw(len(shards) + 1, _SHARDS, seed, epoch, number)
        shards = shards[np.argsort(draws[1:], kind="stable")]
        phase = float(draws[0]) / 2.0**64
        sizes = np.maximum(tokens[shards], 1).astype(np.float64)
        place[shards] = (np.cumsum(sizes) - sizes + phase * sizes) / sizes.sum()
    return np.argsort(place, kind="stable").astype(np.int64)


class Order:
    """Rows of the endless stream: epoch after epoch over all shards of one data set.

    Args:
        table: the data set's counts.
        max_seq_len: tokens of a row, T; only packing depends on it.
        packing: best-fit rows of several chunks, or one chunk a row.
        shuffle: permute shards, rows within a window of shards, and chunks among places of their length. Otherwise
            shards in stored order, and a shard's rows by the stored place of their first (longest) chunk.
        seed: 0 to 2**32 - 1.
        window: shards whose rows are permuted together; a batch mixes rows of the whole window. Without shuffle: 1.

    Attributes:
        rows_per_epoch: rows of one epoch; row n is in epoch n // rows_per_epoch.
        tokens_per_epoch: real tokens of one epoch: chunks with BOS and EOS, no padding.

    Raises:
        ValueError: an argument is out of range, the set has no chunk, or a shard contradicts the manifest.
    """

    def __init__(self, table: ChunkTable, max_seq_len: int, *, packing: bool, shuffle: bool, seed: int,
                 window: int) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"shuffle_seed: {seed!r} given; a whole number from 0 to 2**32 - 1 is needed")
        if window < 1:
            raise ValueError(f"shuffle_window: {window!r} given; a whole number of shards, at least 1, is needed")
        self.table, self.max_seq_len, self.packing, self.shuffle, self.seed = table, max_seq_len, packing, shuffle, seed
        self.window = window if shuffle else 1
        self._samples = np.asarray(table.samples, np.int64)
        self._tokens = np.asarray(table.tokens, np.int64) + SPECIALS_PER_PIECE * self._samples
        self._rows = self._rows_of_shards()
        self.rows_per_epoch = int(self._rows.sum())
        self.tokens_per_epoch = int(self._tokens.sum())
        if self.rows_per_epoch == 0:
            raise ValueError("dataset: the split holds no chunk at all; at least one is needed. Convert the corpus "
                             "again, or name another split")
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    @property
    def fill(self) -> float:
        """Share of the places of an epoch's rows that hold real tokens."""
        return self.tokens_per_epoch / (self.rows_per_epoch * self.max_seq_len)

    def row(self, number: int, /) -> tuple[int, int, tuple[int, ...]]:
        """Epoch, shard and sample indices (in the order of their pieces in the row) of row `number` of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        window = self._window_at(epoch, row)
        stored = int(window.permutation[row - window.first_row])
        at = bisect.bisect_right(window.row_starts, stored) - 1
        layout = window.layouts[at]
        if layout.samples is None:
            layout.samples = self._assign(layout, epoch)
        begin, end = layout.offsets[stored - window.row_starts[at]:][:2]
        return epoch, layout.shard, tuple(layout.samples[begin:end].tolist())

    def tokens_before(self, number: int, /) -> int:
        """Real tokens (BOS and EOS included, padding not) in rows 0 to number - 1 of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        if row == 0:
            return epoch * self.tokens_per_epoch
        window = self._window_at(epoch, row)
        return epoch * self.tokens_per_epoch + int(window.tokens_before[row - window.first_row])

    def _rows_of_shards(self) -> Ints:
        if not self.packing:
            return self._samples
        known = self.table.rows(self.max_seq_len)
        if known is not None:
            return np.asarray(known, np.int64)
        log.info("The manifest has no packed row counts for max_seq_len=%d: packing the length histograms of %d shards",
                 self.max_seq_len, len(self._samples))
        return np.array([pack_lengths(piece_counts(self.table.lengths(shard)), self.max_seq_len).num_rows
                         for shard in range(len(self._samples))], np.int64)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = np.arange(len(self._samples))
            if self.shuffle:
                shards = interleave(self._tokens, self.table.sources, self.seed, epoch)
            self._epochs[epoch] = _Epoch(shards, _starts(self._rows[shards]), _starts(self._tokens[shards]))
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window_at(self, epoch: int, row: int) -> _Window:
        """The window that holds `row` of `epoch`; kept for the rows around it."""
        state = self._epoch(epoch)
        number = (int(np.searchsorted(state.row_starts, row, side="right")) - 1) // self.window
        key = (epoch, number)
        if key not in self._windows:
            self._windows[key] = self._build(epoch, number, state)
            while len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _build(self, epoch: int, number: int, state: _Epoch) -> _Window:
        first = number * self.window
        layouts = [self._layout(int(shard)) for shard in state.shards[first:first + self.window]]
        row_tokens = np.concatenate([layout.row_tokens for layout in layouts])
        if self.shuffle:
            permutation = np.argsort(_raw(row_tokens.size, _ROWS, self.seed, epoch, number), kind="stable")
        else:
            [layout] = layouts  # the window of a stored order is one shard
            layout.samples = self._assign(layout, epoch)
            permutation = np.argsort(layout.samples[layout.offsets[:-1]], kind="stable")
        return _Window(
            first_row=int(state.row_starts[first]),
            tokens_before=int(state.token_starts[first]) + _starts(row_tokens[permutation]),
            permutation=permutation,
            row_starts=_starts(np.array([layout.offsets.size - 1 for layout in layouts])).tolist()[:-1],
            layouts=layouts,
        )

    def _layout(self, shard: int) -> _Layout:
        """Places of one shard's rows, from its histogram.

        Raises:
            ValueError: the histogram contradicts the manifest, so prefix sums over shards would be wrong.
        """
        counts = piece_counts(self.table.lengths(shard))
        if self.packing:
            lengths, offsets = pack_lengths(counts, self.max_seq_len).expand()
        else:
            lengths = np.repeat(np.arange(counts.size)[::-1], counts[::-1])
            offsets = np.arange(lengths.size + 1)
        found = {"chunks": lengths.size, "tokens with BOS and EOS": int(lengths.sum()), "rows": offsets.size - 1}
        stated = (self._samples[shard], self._tokens[shard], self._rows[shard])
        for (what, number), manifest in zip(found.items(), stated):
            if number != manifest:
                raise ValueError(
                    f"shard {shard} (counted from 0 in index.json): its histogram of lengths gives {number} {what} at "
                    f"max_seq_len={self.max_seq_len}, its manifest says {manifest}; they must agree, or rows would be "
                    "skipped or repeated. The data set was altered or only partly copied: copy or convert it again")
        return _Layout(shard, lengths, offsets)

    def _assign(self, layout: _Layout, epoch: int) -> Ints:
        """Gives every place a chunk of its length: in stored order, or permuted by (seed, epoch, shard).

        Raises:
            ValueError: the stored chunks' lengths are not those of the histogram.
        """
        chunks = np.asarray(self.table.sample_lengths(layout.shard), np.int64) + SPECIALS_PER_PIECE
        dealt = np.arange(chunks.size)
        if self.shuffle:
            dealt = np.argsort(_raw(chunks.size, _PLACES, self.seed, epoch, layout.shard), kind="stable")
        dealt = dealt[np.argsort(chunks[dealt], kind="stable")]
        places = np.argsort(layout.lengths, kind="stable")
        if chunks.size != places.size or not np.array_equal(chunks[dealt], layout.lengths[places]):
            raise ValueError(
                f"shard {layout.shard} (counted from 0 in index.json): the lengths of its {chunks.size} stored chunks "
                f"are not those of its histogram in lengths.npy ({places.size} chunks); they must agree. The data set was "
                "altered or only partly copied: copy or convert it again")
        samples = np.empty(places.size, np.int64)
        samples[places] = dealt
        return samples
