"""Which chunks form row n of the endless global stream: a pure function of (manifest, seed, epoch, row).

Nothing here is saved: a run resumes, on any number of ranks, by naming the row to go on from. A chunk is used exactly
once per epoch. Rows are packed inside one shard, so that a shard's rows and tokens follow from its histogram of
lengths; prefix sums over shards then lead to any row and to the real tokens before it. Shuffled, every source is a
stream of rows of its own (its shards permuted, rows permuted within windows of its shards), and the streams are merged
row by row (`interleave.py`), so that each source has its share of any stretch of rows. What is built at start is
O(shards), from the manifest; what is built later is one window of shards per source. Random numbers come from the raw
output of numpy's bit generators (whose streams numpy keeps fixed between versions), seeded by integers; no global
generator is touched.

Not here: ids, masks, labels (`objectives.py`), ranks and batches (`data.py`), reading files (`mds.py`).
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ettin_foundry.data.interleave import Interleave
from ettin_foundry.data.shard_rows import ChunkTable, Layout, ShardRows, raw_draws

__all__ = ["ORDER_VERSION", "ChunkTable", "Order"]

ORDER_VERSION = 2
"""Goes up whenever the same arguments give other rows; a checkpoint of another version cannot go on."""

Ints = npt.NDArray[np.int64]

# first word of every seed: what the numbers are for, so that no two uses share a stream
_SHARDS, _ROWS = 1, 2
# a reader goes forward; the last window is kept too, so that looking back across a border builds nothing again
_KEPT_WINDOWS = _KEPT_EPOCHS = 2


@dataclass
class _Window:
    """A run of a stream's shards whose rows are permuted together."""

    first_row: int  # of the stream's epoch
    tokens_before: Ints  # (R + 1,) real tokens of the stream's epoch before each row of the window
    permutation: Ints  # (R,) place in the window -> row in the concatenation of the layouts
    row_starts: list[int]  # first row of each layout in that concatenation
    layouts: list[Layout] = field(default_factory=list)


@dataclass
class _Epoch:
    """One stream's shards in the order of an epoch."""

    shards: Ints  # (S,)
    row_starts: Ints  # (S + 1,) rows before each shard in that order
    token_starts: Ints  # (S + 1,)
    phase: float  # see Interleave


def _starts(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


class _Stream:
    """The rows of one source, epoch after epoch.

    Args:
        shards: of the whole set.
        number: of the stream, for its seeds.
        members: (S,) its shards, in stored order.
        window: shards whose rows are permuted together.
        first_window: windows of the streams before it; a window's seed is its number among those of all streams.
    """

    def __init__(self, shards: ShardRows, number: int, members: Ints, *, window: int, first_window: int) -> None:
        self.window = min(window, len(members))
        self.num_windows = -(-len(members) // self.window)
        self.num_rows = int(shards.rows[members].sum())
        self.num_tokens = int(shards.tokens[members].sum())
        self._shards, self._number, self._members, self._first_window = shards, number, members, first_window
        passes = getattr(shards.table, "passes", None)
        self._passes = np.zeros(len(members), np.int64) if passes is None else np.asarray(passes, np.int64)[members]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()

    def epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            members, phase = self._members, 0.0
            if self._shards.shuffle:
                draws = raw_draws(len(members) + 1, _SHARDS, self._shards.seed, epoch, self._number)
                members = members[np.lexsort((draws[1:], self._passes))]
                phase = float(draws[0] >> np.uint64(44)) / 2.0**20
            self._epochs[epoch] = _Epoch(members, _starts(self._shards.rows[members]),
                                         _starts(self._shards.tokens[members]), phase)
            while len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def row(self, epoch: int, row: int) -> tuple[int, tuple[int, ...]]:
        """Shard and sample indices of a row of an epoch of this stream."""
        window = self._window_at(epoch, row)
        stored = int(window.permutation[row - window.first_row])
        at = bisect.bisect_right(window.row_starts, stored) - 1
        layout = window.layouts[at]
        if layout.samples is None:
            layout.samples = self._shards.assign(layout, epoch)
        begin, end = layout.offsets[stored - window.row_starts[at]:][:2]
        return layout.shard, tuple(layout.samples[begin:end].tolist())

    def tokens_before(self, epoch: int, row: int) -> int:
        """Real tokens of the first `row` rows of an epoch of this stream."""
        if row in (0, self.num_rows):
            return self.num_tokens if row else 0
        window = self._window_at(epoch, row)
        return int(window.tokens_before[row - window.first_row])

    def window_number(self, epoch: int, row: int) -> int:
        """Which window of the epoch holds a row."""
        return (int(np.searchsorted(self.epoch(epoch).row_starts, row, side="right")) - 1) // self.window

    def window_shards(self, epoch: int, number: int) -> list[int]:
        """The shards of a window."""
        return self.epoch(epoch).shards[number * self.window:][:self.window].tolist()

    def first_row(self, epoch: int, number: int) -> int:
        """The row of the epoch that a window begins with."""
        return int(self.epoch(epoch).row_starts[number * self.window])

    def _window_at(self, epoch: int, row: int) -> _Window:
        """The window that holds `row`; kept for the rows around it."""
        if self._windows:
            newest = next(reversed(self._windows))
            window = self._windows[newest]
            if newest[0] == epoch and 0 <= row - window.first_row < window.permutation.size:
                return window
        key = (epoch, self.window_number(epoch, row))
        if key not in self._windows:
            self._windows[key] = self._build(*key)
            while len(self._windows) > _KEPT_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]

    def _build(self, epoch: int, number: int) -> _Window:
        state, first, shards = self.epoch(epoch), number * self.window, self._shards
        layouts = [shards.layout(int(shard)) for shard in state.shards[first:first + self.window]]
        row_tokens = np.concatenate([layout.row_tokens for layout in layouts])
        if shards.shuffle:
            draws = raw_draws(row_tokens.size, _ROWS, shards.seed, epoch, self._first_window + number)
            permutation = np.argsort(draws, kind="stable")
        else:
            [layout] = layouts  # the window of a stored order is one shard
            layout.samples = shards.assign(layout, epoch)
            permutation = np.argsort(layout.samples[layout.offsets[:-1]], kind="stable")
        return _Window(
            first_row=int(state.row_starts[first]),
            tokens_before=int(state.token_starts[first]) + _starts(row_tokens[permutation]),
            permutation=permutation,
            row_starts=_starts(np.array([layout.offsets.size - 1 for layout in layouts])).tolist()[:-1],
            layouts=layouts,
        )


class Order:
    """Rows of the endless stream: epoch after epoch over all shards of one data set.

    Args:
        table: the data set's counts.
        max_seq_len: tokens of a row, T; only packing depends on it.
        packing: best-fit rows of several chunks, or one chunk a row.
        shuffle: permute each source's shards, rows within a window of shards, and chunks among places of their length,
            and mix the sources row by row. Otherwise shards in stored order, and a shard's rows by the stored place of
            their first (longest) chunk.
        seed: 0 to 2**32 - 1.
        window: shards whose rows are mixed at a time; a source has its share of them, at least one, and a batch mixes
            rows of all. Without shuffle: 1.

    Attributes:
        rows_per_epoch: rows of one epoch; row n is in epoch n // rows_per_epoch.
        tokens_per_epoch: real tokens of one epoch: chunks with BOS and EOS, no padding.
        shards_at_once: shards of which the rows around any place are taken, all sources' windows together.

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
        shards = ShardRows(table, max_seq_len, packing=packing, shuffle=shuffle, seed=seed)
        self.rows_per_epoch = int(shards.rows.sum())
        self.tokens_per_epoch = int(shards.tokens.sum())
        if self.rows_per_epoch == 0:
            raise ValueError("dataset: the split holds no chunk at all; at least one is needed. Convert the corpus "
                             "again, or name another split")
        self._streams = self._make_streams(shards)
        self.shards_at_once = sum(stream.window for stream in self._streams)
        self._merged: OrderedDict[int, Interleave] = OrderedDict()

    @property
    def fill(self) -> float:
        """Share of the places of an epoch's rows that hold real tokens."""
        return self.tokens_per_epoch / (self.rows_per_epoch * self.max_seq_len)

    def row(self, number: int, /) -> tuple[int, int, tuple[int, ...]]:
        """Epoch, shard and sample indices (in the order of their pieces in the row) of row `number` of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        stream, index = self._merge(epoch).at(row)
        return epoch, *self._streams[stream].row(epoch, index)

    def tokens_before(self, number: int, /) -> int:
        """Real tokens (BOS and EOS included, padding not) in rows 0 to number - 1 of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        counts = self._merge(epoch).counts(row).tolist() if row else [0] * len(self._streams)
        return epoch * self.tokens_per_epoch + sum(
            stream.tokens_before(epoch, count) for stream, count in zip(self._streams, counts))

    def shards_ahead(self, number: int, /) -> list[int]:
        """Shards that a reader at row `number` of the stream needs soon, for fetching them ahead; none twice.

        First the window that each source is in (or that it begins next), then each source's window after that; both in
        the order in which the stream comes to them.
        """
        epoch, row = divmod(number, self.rows_per_epoch)
        now, later = [], []
        for at, count in enumerate(self._merge(epoch).counts(row).tolist()):
            stream = self._streams[at]
            if not stream.num_rows:
                continue
            place = (epoch, count) if count < stream.num_rows else (epoch + 1, 0)
            number = stream.window_number(*place)
            now.append((place[0] + self._merge(place[0]).key(at, place[1]), stream.window_shards(place[0], number)))
            place = (place[0], number + 1) if number + 1 < stream.num_windows else (place[0] + 1, 0)
            first = stream.first_row(*place)
            later.append((place[0] + self._merge(place[0]).key(at, first), stream.window_shards(*place)))
        wanted = [shard for group in (now, later) for _, shards in sorted(group) for shard in shards]
        return list(dict.fromkeys(wanted))

    def _make_streams(self, shards: ShardRows) -> list[_Stream]:
        """One per source in the order of their names; stored order knows no sources."""
        total = len(shards.samples)
        if not self.shuffle:
            return [_Stream(shards, 0, np.arange(total), window=1, first_window=0)]
        _, source_of = np.unique(np.asarray(self.table.sources, dtype=str), return_inverse=True)
        grouped = np.split(np.argsort(source_of, kind="stable"), np.cumsum(np.bincount(source_of))[:-1])
        streams: list[_Stream] = []
        for number, members in enumerate(grouped):
            share = (2 * self.window * len(members) + total) // (2 * total)
            streams.append(_Stream(shards, number, members, window=max(1, share),
                                   first_window=sum(stream.num_windows for stream in streams)))
        return streams

    def _merge(self, epoch: int) -> Interleave:
        if epoch not in self._merged:
            self._merged[epoch] = Interleave([stream.num_rows for stream in self._streams],
                                             [stream.epoch(epoch).phase for stream in self._streams])
            while len(self._merged) > _KEPT_EPOCHS:
                self._merged.popitem(last=False)
        return self._merged[epoch]
