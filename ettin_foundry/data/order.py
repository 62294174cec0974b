"""Which chunks form row n of the endless global stream: a pure function of (manifest, seed, epoch, row).

A run resumes, on any number of ranks, by naming the row to go on from. A chunk is used exactly once per epoch. Rows are
packed inside one shard, so that a shard's rows and tokens follow from its histogram of lengths; prefix sums over shards
lead to any row and to the real tokens before it. Random numbers are the raw output of numpy's bit generators, whose
streams numpy keeps fixed between versions.
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts

log = logging.getLogger(__name__)

ORDER_VERSION = 2  # goes up whenever the same arguments give other rows; a checkpoint of another version cannot go on
_BLOCK_ROWS = 8192  # about a millisecond to merge, and more than a batch

Ints = npt.NDArray[np.int64]
T = TypeVar("T")

# first word of every seed: what the numbers are for, so that no two uses share them; objectives have 4 and 5
_SHARDS, _ROWS, _CHUNKS = 1, 2, 3


def _keep(kept: list[T], made: T) -> T:
    """Keeps what was made and the one before, so that looking back across a border makes nothing again."""
    kept[:] = [*kept[-1:], made]
    return made


class _Block(NamedTuple):
    """The rows between two keys, merged. n rows, S streams."""

    rows: range  # of the whole
    starts: Ints  # (S,) rows of each stream before the block
    streams: Ints  # (n,) stream of each row
    indices: Ints  # (n,) row within its stream


class Interleave:
    """The merged order of S streams, from the rows of each and its phase, from 0 to below 1.

    Row j of a stream of R rows gets the key (j + phase) / R, and all rows are put in order of (key, stream): in any
    run of rows the count of a stream with share p is off by less than (1 - p) + p * (S - 1). A phase per stream keeps
    a stream of few rows from always being in the same place. Rows are merged in blocks, each found in time that grows
    with S. Keys are float64, of one addition and one division, which IEEE 754 rounds alike.
    """

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
        return int(block.streams[row - block.rows.start]), int(block.indices[row - block.rows.start])

    def counts(self, row: int, /) -> Ints:
        """(S,) rows of each stream among the first `row` rows of the whole, 0 <= row <= num_rows."""
        if row == self.num_rows:
            return self._rows
        block = self._block_of(row)
        return block.starts + np.bincount(block.streams[:row - block.rows.start], minlength=len(self._rows))

    def key(self, stream: int, index: int, /) -> float:
        """Place, from 0 to 1, of row `index` of a stream."""
        return float((index + self._phases[stream]) / self._divisors[stream])

    def _block_of(self, row: int) -> _Block:
        for block in self._blocks:
            if row in block.rows:
                return block
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row must be 0 to {self.num_rows - 1}, got {row}")
        number = bisect.bisect_right(range(self._num_blocks), row, key=lambda block: int(self._below(block).sum())) - 1
        return _keep(self._blocks, self._merge(number))

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
        first = int(begin.sum())
        return _Block(range(first, first + len(order)), begin, streams[order], indices[order])


def raw_draws(count: int, *words: int) -> npt.NDArray[np.uint64]:
    """(count,) numbers of the generator that these words seed, the same on every machine."""
    return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)


def _starts(counts: npt.ArrayLike) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


class _Source(NamedTuple):
    members: Ints  # (S,) in stored order
    window: int  # shards whose rows are permuted together
    first_window: int  # windows of the sources before it: a window's seed is its number among those of all sources
    num_rows: int


class _Epoch(NamedTuple):
    """The order of an epoch: each source's shards, and how the sources' rows are merged."""

    number: int
    shards: list[Ints]  # (S,) of each source
    row_starts: list[Ints]  # (S + 1,) of each source: rows before each shard in that order
    merged: Interleave


@dataclass
class _Layout:
    """Rows of one shard: places of given length, and, once it is needed, the chunk that takes each place."""

    shard: int
    lengths: Ints  # (P,) piece lengths, row after row
    offsets: Ints  # (R + 1,) row r has places offsets[r] to offsets[r + 1]
    samples: Ints | None = None  # (P,) index of the chunk in the shard


class _Window(NamedTuple):
    """Consecutive shards of a source whose rows are permuted together."""

    epoch: int
    rows: range  # of the source's epoch
    tokens_before: Ints  # (R + 1,) real tokens of the source's epoch before each row of the window
    permutation: Ints  # (R,) place in the window -> row in the concatenation of the layouts
    row_starts: list[int]  # first row of each layout in that concatenation
    layouts: list[_Layout]


class Order:
    """Rows of the endless stream: epoch after epoch over all shards of one dataset.

    Args:
        table: an `MDSSplit` or `MixtureSplit`, or what has their `samples`, `tokens` and `sources` by shard, `rows()`,
            `lengths()` and `sample_lengths()`. With `passes`, (S,) integers, it may hold shards several times: those of
            pass 0 then all come before those of pass 1, so that a chunk's repeats are far apart.
        max_seq_len: tokens of a row. packing: several chunks a row, or one.
        shuffle: permute each source's shards, rows within a window of shards, and chunks among places of their length,
            and mix the sources row by row. Otherwise shards as they are stored, and a shard's rows by the stored place
            of their first (longest) chunk.
        window: shards whose rows are mixed at a time; a source has its share, at least one. Without shuffle: 1.
    """

    def __init__(self, table: Any, max_seq_len: int, *, packing: bool, shuffle: bool, seed: int, window: int) -> None:
        self.table, self.max_seq_len, self.packing = table, max_seq_len, packing
        self.shuffle, self.seed, self.window = shuffle, seed, window if shuffle else 1
        self._samples = np.asarray(table.samples, np.int64)
        self._tokens = np.asarray(table.tokens, np.int64) + SPECIALS_PER_PIECE * self._samples
        rows = table.rows(max_seq_len) if packing else self._samples
        if rows is None:
            log.info("no packed row counts in the manifest for max_seq_len=%d: packing here", max_seq_len)
            counts = (piece_counts(table.lengths(shard)) for shard in range(len(self._samples)))
            rows = [pack_lengths(each, max_seq_len).num_rows for each in counts]
        self._rows = np.asarray(rows, np.int64)
        self.rows_per_epoch = int(self._rows.sum())  # row n is in epoch n // rows_per_epoch
        self.tokens_per_epoch = int(self._tokens.sum())  # chunks with BOS and EOS, no padding
        if self.rows_per_epoch == 0:
            raise ValueError("dataset must hold at least one chunk, got an empty split; name another split")
        self._sources = self._make_sources()
        self._epochs: list[_Epoch] = []
        self._windows: list[list[_Window]] = [[] for _ in self._sources]

    def row(self, number: int, /) -> tuple[int, int, tuple[int, ...]]:
        """Epoch, shard and sample indices, in the order of their pieces, of row `number` of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        source, index = self._epoch(epoch).merged.at(row)
        window = self._window(epoch, source, index)
        stored = int(window.permutation[index - window.rows.start])
        at = bisect.bisect_right(window.row_starts, stored) - 1
        layout = window.layouts[at]
        if layout.samples is None:
            layout.samples = self._assign(layout, epoch)
        begin, end = layout.offsets[stored - window.row_starts[at]:][:2]
        return epoch, layout.shard, tuple(layout.samples[begin:end].tolist())

    def tokens_before(self, number: int, /) -> int:
        """Real tokens (BOS and EOS included, padding not) in rows 0 to number - 1 of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        tokens = epoch * self.tokens_per_epoch
        counts = self._epoch(epoch).merged.counts(row).tolist() if row else ()
        for at, count in enumerate(counts):
            if count:
                window = self._window(epoch, at, count - 1)
                tokens += int(window.tokens_before[count - window.rows.start])
        return tokens

    def shards_ahead(self, number: int, /) -> list[int]:
        """Shards that a reader at row `number` of the stream needs soon, for fetching them ahead; none twice.

        First the window that each source is in (or begins next), then the one after that; both in the stream's order.
        """
        epoch, row = divmod(number, self.rows_per_epoch)
        now, later = list[tuple[float, list[int]]](), list[tuple[float, list[int]]]()
        for at, (source, count) in enumerate(zip(self._sources, self._epoch(epoch).merged.counts(row).tolist())):
            if not source.num_rows:
                continue
            then, first = (epoch, count) if count < source.num_rows else (epoch + 1, 0)
            begin = self._window_start(then, at, first)
            for group in (now, later):
                order = self._epoch(then)
                key = order.merged.key(at, max(first, int(order.row_starts[at][begin])))
                group.append((then + key, order.shards[at][begin:][:source.window].tolist()))
                first, begin = 0, begin + source.window
                if begin >= len(source.members):
                    then, begin = then + 1, 0
        return list(dict.fromkeys(shard for group in (now, later) for _, shards in sorted(group) for shard in shards))

    def _make_sources(self) -> list[_Source]:
        """In the order of their names; without shuffle all shards are one."""
        total, names = len(self._samples), np.asarray(self.table.sources, dtype=str)
        _, source_of = np.unique(names if self.shuffle else np.zeros(total), return_inverse=True)
        sources, first_window = list[_Source](), 0
        for members in np.split(np.argsort(source_of, kind="stable"), np.cumsum(np.bincount(source_of))[:-1]):
            share = (2 * self.window * len(members) + total) // (2 * total)
            window = min(max(1, share), len(members))
            sources.append(_Source(members, window, first_window, int(self._rows[members].sum())))
            first_window += -(-len(members) // window)
        return sources

    def _epoch(self, number: int) -> _Epoch:
        for epoch in self._epochs:
            if epoch.number == number:
                return epoch
        passes = np.asarray(getattr(self.table, "passes", np.zeros(len(self._rows))))
        shards, phases = [source.members for source in self._sources], [0.0] * len(self._sources)
        for at, members in enumerate(shards if self.shuffle else ()):
            draws = raw_draws(len(members) + 1, _SHARDS, self.seed, number, at)
            shards[at] = members[np.lexsort((draws[1:], passes[members]))]
            phases[at] = float(draws[0] >> np.uint64(44)) / 2.0**20
        merged = Interleave([source.num_rows for source in self._sources], phases)
        return _keep(self._epochs, _Epoch(number, shards, [_starts(self._rows[members]) for members in shards], merged))

    def _window_start(self, epoch: int, source: int, row: int) -> int:
        """The first shard, in an epoch's order of a source, of the window that holds a row."""
        shard = int(np.searchsorted(self._epoch(epoch).row_starts[source], row, side="right")) - 1
        return shard // self._sources[source].window * self._sources[source].window

    def _window(self, epoch: int, source: int, row: int) -> _Window:
        for window in self._windows[source]:
            if window.epoch == epoch and row in window.rows:
                return window
        window = self._build_window(epoch, source, self._window_start(epoch, source, row))
        return _keep(self._windows[source], window)

    def _build_window(self, number: int, at: int, begin: int) -> _Window:
        """Of source `at`, its shards from `begin` in the order of an epoch."""
        epoch, source = self._epoch(number), self._sources[at]
        layouts = [self._layout(shard) for shard in epoch.shards[at][begin:][:source.window].tolist()]
        row_tokens = np.concatenate([np.diff(_starts(layout.lengths)[layout.offsets]) for layout in layouts])
        if self.shuffle:
            seed = _ROWS, self.seed, number, source.first_window + begin // source.window
            permutation = np.argsort(raw_draws(row_tokens.size, *seed), kind="stable")
        else:
            [layout] = layouts  # without shuffle, a window is one shard
            layout.samples = self._assign(layout, number)
            permutation = np.argsort(layout.samples[layout.offsets[:-1]], kind="stable")
        first = int(epoch.row_starts[at][begin])
        tokens_before = int(self._tokens[epoch.shards[at][:begin]].sum()) + _starts(row_tokens[permutation])
        row_starts = _starts([len(layout.offsets) - 1 for layout in layouts]).tolist()[:-1]
        return _Window(number, range(first, first + row_tokens.size), tokens_before, permutation, row_starts, layouts)

    def _layout(self, shard: int) -> _Layout:
        """Places of one shard's rows, from its histogram."""
        counts = piece_counts(self.table.lengths(shard))
        if self.packing:
            lengths, offsets = pack_lengths(counts, self.max_seq_len).expand()
        else:
            lengths = np.repeat(np.arange(counts.size)[::-1], counts[::-1])
            offsets = np.arange(lengths.size + 1)
        if (found := offsets.size - 1) != self._rows[shard]:
            where, stated = getattr(self.table, "local", "dataset"), self._rows[shard]
            raise ValueError(f"{where}: shard {shard} must fill the {stated} rows of {self.max_seq_len} tokens that "
                             f"its manifest states, got {found} by its lengths; copy or convert the dataset again")
        return _Layout(shard, lengths, offsets)

    def _assign(self, layout: _Layout, epoch: int) -> Ints:
        """The chunk of each place, of its length: as they are stored, or permuted by (seed, epoch, shard)."""
        chunks = np.asarray(self.table.sample_lengths(layout.shard), np.int64) + SPECIALS_PER_PIECE
        dealt = np.arange(chunks.size)
        if self.shuffle:
            dealt = np.argsort(raw_draws(chunks.size, _CHUNKS, self.seed, epoch, layout.shard), kind="stable")
        dealt = dealt[np.argsort(chunks[dealt], kind="stable")]
        samples = np.empty(dealt.size, np.int64)
        samples[np.argsort(layout.lengths, kind="stable")] = dealt
        return samples
