"""Which chunks form row n of the endless global stream: a pure function of (manifest, seed, epoch, row).

Nothing here is saved: a run resumes, on any number of ranks, by naming the row to go on from. A chunk is used exactly
once per epoch. Rows are packed inside one shard, so that a shard's rows and tokens follow from its histogram of
lengths; prefix sums over shards lead to any row and to the real tokens before it. Shuffled, every source is a stream
of rows of its own (its shards permuted, rows permuted within windows of its shards), and the streams are merged row by
row (`Interleave`). What is built at start is O(shards), later one window of shards per source. Random numbers are the
raw output of numpy's bit generators, whose streams numpy keeps fixed between versions.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts

log = logging.getLogger(__name__)

ORDER_VERSION = 2  # goes up whenever the same arguments give other rows; a checkpoint of another version cannot go on
_BLOCK_ROWS = 8192  # about a millisecond to merge, and more than a batch

Ints = npt.NDArray[np.int64]

# first word of every seed: what the numbers are for, so that no two uses share them; objectives have 4 and 5
_SHARDS, _ROWS, _CHUNKS = 1, 2, 3


class ChunkTable(Protocol):
    """What an order needs to know of a dataset: S shards, M tokens in the longest chunk.

    One that holds shards several times also has `passes`, (S,) integers: a source's shards of pass 0 then all come
    before those of pass 1, so that a chunk's repeats are far apart.
    """

    @property
    def samples(self) -> Ints: ...  # (S,) chunks per shard
    @property
    def tokens(self) -> Ints: ...  # (S,) without BOS and EOS
    @property
    def sources(self) -> Sequence[str]: ...  # S names: where the shard's text came from
    def rows(self, max_seq_len: int, /) -> Ints | None: ...  # (S,) packed rows; None: not in the manifest
    def lengths(self, shard: int, /) -> npt.NDArray[np.integer]: ...  # (M + 1,) histogram of chunk lengths
    def sample_lengths(self, shard: int, /) -> npt.NDArray[np.integer]: ...  # of each chunk as it is stored


class _Block(NamedTuple):
    """The rows between two keys, merged. n rows, S streams."""

    first: int  # of the whole
    starts: Ints  # (S,) rows of each stream before the block
    streams: Ints  # (n,) stream of each row
    indices: Ints  # (n,) row within its stream


class Interleave:
    """The merged order of S streams, from the rows of each and its phase, from 0 to below 1.

    Row j of a stream of R rows gets the key (j + phase) / R, and all rows are put in order of (key, stream): in any
    run of rows the count of a stream with share p is off by less than (1 - p) + p * (S - 1). A phase per stream keeps
    a stream of few rows from always being in the same place. Nothing is written out: how many rows of a stream lie
    below a key follows from the key, so a place is found in time that grows with S, and the rows around it are merged
    in blocks. Keys are float64, of one addition and one division, which IEEE 754 rounds alike everywhere.
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


def raw_draws(count: int, *words: int) -> npt.NDArray[np.uint64]:
    """(count,) numbers of the generator that these words seed, the same on every machine."""
    return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)


def _starts(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _last(kept: dict[int, Any]) -> dict[int, Any]:
    """The newest entry: two are kept, so that looking back across a border builds nothing again."""
    return dict([*kept.items()][-1:])


@dataclass
class _Layout:
    """Rows of one shard: places of given length, and, once it is needed, the chunk that takes each place."""

    shard: int
    lengths: Ints  # (P,) piece lengths, row after row
    offsets: Ints  # (R + 1,) row r has places offsets[r] to offsets[r + 1]
    samples: Ints | None = None  # (P,) index of the chunk in the shard


class _Shards:
    """Rows of each shard; an error where histogram, stored chunks and manifest contradict each other."""

    def __init__(self, table: ChunkTable, max_seq_len: int, packing: bool, shuffle: bool, seed: int) -> None:
        self.table, self.max_seq_len = table, max_seq_len
        self.packing, self.shuffle, self.seed = packing, shuffle, seed
        self.samples = np.asarray(table.samples, np.int64)
        self.tokens = np.asarray(table.tokens, np.int64) + SPECIALS_PER_PIECE * self.samples
        rows = table.rows(max_seq_len) if packing else self.samples
        if rows is None:
            log.info("no packed row counts in the manifest for max_seq_len=%d: packing here", max_seq_len)
            counts = (piece_counts(table.lengths(shard)) for shard in range(len(self.samples)))
            rows = [pack_lengths(each, max_seq_len).num_rows for each in counts]
        self.rows = np.asarray(rows, np.int64)

    def layout(self, shard: int) -> _Layout:
        """Places of one shard's rows, from its histogram."""
        counts = piece_counts(self.table.lengths(shard))
        if self.packing:
            lengths, offsets = pack_lengths(counts, self.max_seq_len).expand()
        else:
            lengths = np.repeat(np.arange(counts.size)[::-1], counts[::-1])
            offsets = np.arange(lengths.size + 1)
        found = (lengths.size, int(lengths.sum()), offsets.size - 1)
        if found != (stated := tuple(int(each[shard]) for each in (self.samples, self.tokens, self.rows))):
            raise ValueError(f"shard {shard} of index.json must have the chunks, tokens and rows of its manifest, "
                             f"{stated}, got {found} by its histogram; copy or convert the dataset again")
        return _Layout(shard, lengths, offsets)

    def assign(self, layout: _Layout, epoch: int) -> Ints:
        """The chunk of each place, of its length: as they are stored, or permuted by (seed, epoch, shard)."""
        chunks = np.asarray(self.table.sample_lengths(layout.shard), np.int64) + SPECIALS_PER_PIECE
        dealt = np.arange(chunks.size)
        if self.shuffle:
            dealt = np.argsort(raw_draws(chunks.size, _CHUNKS, self.seed, epoch, layout.shard), kind="stable")
        dealt = dealt[np.argsort(chunks[dealt], kind="stable")]
        places = np.argsort(layout.lengths, kind="stable")
        if not np.array_equal(chunks[dealt], layout.lengths[places]):
            raise ValueError(f"shard {layout.shard} of index.json must hold chunks of the lengths in lengths.npy, got "
                             "others; copy or convert the dataset again")
        samples = np.empty(places.size, np.int64)
        samples[places] = dealt
        return samples


@dataclass
class _Epoch:
    """One source's shards in the order of an epoch."""

    shards: Ints  # (S,)
    row_starts: Ints  # (S + 1,) rows before each shard in that order
    token_starts: Ints  # (S + 1,)
    phase: float  # see Interleave


@dataclass
class _Window:
    """Consecutive shards of a source whose rows are permuted together."""

    epoch: int
    first_row: int  # of the source's epoch
    tokens_before: Ints  # (R + 1,) real tokens of the source's epoch before each row of the window
    permutation: Ints  # (R,) place in the window -> row in the concatenation of the layouts
    row_starts: list[int]  # first row of each layout in that concatenation
    layouts: list[_Layout]


class _Source:
    """The rows of one source, epoch after epoch.

    members: (S,) the source's shards, as they are stored. window: shards whose rows are permuted together.
    first_window: windows of the sources before it; a window's seed is its number among those of all sources.
    """

    def __init__(self, shards: _Shards, number: int, members: Ints, window: int, first_window: int) -> None:
        self.window = min(window, len(members))
        self.num_windows = -(-len(members) // self.window)
        self.num_rows = int(shards.rows[members].sum())
        self.num_tokens = int(shards.tokens[members].sum())
        self._shards, self._number, self._members, self._first_window = shards, number, members, first_window
        self._passes = np.asarray(getattr(shards.table, "passes", np.zeros(len(shards.rows))))[members]
        self._epochs: dict[int, _Epoch] = {}
        self._windows: list[_Window] = []

    def epoch(self, epoch: int) -> _Epoch:
        """The source's shards in the order of an epoch."""
        if epoch not in self._epochs:
            shards, members, phase = self._shards, self._members, 0.0
            if shards.shuffle:
                draws = raw_draws(len(members) + 1, _SHARDS, shards.seed, epoch, self._number)
                members = members[np.lexsort((draws[1:], self._passes))]
                phase = float(draws[0] >> np.uint64(44)) / 2.0**20
            starts = _starts(shards.rows[members]), _starts(shards.tokens[members])
            self._epochs = _last(self._epochs) | {epoch: _Epoch(members, *starts, phase)}
        return self._epochs[epoch]

    def row(self, epoch: int, row: int) -> tuple[int, tuple[int, ...]]:
        """Shard and sample indices of a row of an epoch of this source."""
        window = self._window_at(epoch, row)
        stored = int(window.permutation[row - window.first_row])
        at = bisect.bisect_right(window.row_starts, stored) - 1
        layout = window.layouts[at]
        if layout.samples is None:
            layout.samples = self._shards.assign(layout, epoch)
        begin, end = layout.offsets[stored - window.row_starts[at]:][:2]
        return layout.shard, tuple(layout.samples[begin:end].tolist())

    def tokens_before(self, epoch: int, row: int) -> int:
        """Real tokens of the first `row` rows of an epoch of this source."""
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

    def _window_at(self, epoch: int, row: int) -> _Window:
        for window in self._windows:
            if window.epoch == epoch and 0 <= row - window.first_row < window.permutation.size:
                return window
        window = self._build_window(epoch, self.window_number(epoch, row))
        self._windows = [*self._windows[-1:], window]
        return window

    def _build_window(self, epoch: int, number: int) -> _Window:
        shards, first = self._shards, number * self.window
        layouts = [shards.layout(shard) for shard in self.window_shards(epoch, number)]
        row_tokens = np.concatenate([np.diff(_starts(layout.lengths)[layout.offsets]) for layout in layouts])
        if shards.shuffle:
            draws = raw_draws(row_tokens.size, _ROWS, shards.seed, epoch, self._first_window + number)
            permutation = np.argsort(draws, kind="stable")
        else:
            [layout] = layouts  # without shuffle, a window is one shard
            layout.samples = shards.assign(layout, epoch)
            permutation = np.argsort(layout.samples[layout.offsets[:-1]], kind="stable")
        order = self.epoch(epoch)
        tokens_before = int(order.token_starts[first]) + _starts(row_tokens[permutation])
        row_starts = _starts(np.array([len(layout.offsets) - 1 for layout in layouts])).tolist()[:-1]
        return _Window(epoch, int(order.row_starts[first]), tokens_before, permutation, row_starts, layouts)


class Order:
    """Rows of the endless stream: epoch after epoch over all shards of one dataset.

    Args:
        table: the dataset's counts. max_seq_len: tokens of a row. packing: several chunks a row, or one.
        shuffle: permute each source's shards, rows within a window of shards, and chunks among places of their length,
            and mix the sources row by row. Otherwise shards as they are stored, and a shard's rows by the stored place
            of their first (longest) chunk.
        window: shards whose rows are mixed at a time; a source has its share, at least one. Without shuffle: 1.
    """

    def __init__(self, table: ChunkTable, max_seq_len: int, *, packing: bool, shuffle: bool, seed: int,
                 window: int) -> None:
        self.table, self.max_seq_len, self.packing = table, max_seq_len, packing
        self.shuffle, self.seed, self.window = shuffle, seed, window if shuffle else 1
        shards = _Shards(table, max_seq_len, packing, shuffle, seed)
        self.rows_per_epoch = int(shards.rows.sum())  # row n is in epoch n // rows_per_epoch
        self.tokens_per_epoch = int(shards.tokens.sum())  # chunks with BOS and EOS, no padding
        if self.rows_per_epoch == 0:
            raise ValueError("dataset must hold at least one chunk, got an empty split; name another split")
        self._sources = self._make_sources(shards)
        # of so many shards, all sources' windows together, are the rows around any place
        self.shards_at_once = sum(source.window for source in self._sources)
        self._merged: dict[int, Interleave] = {}

    def row(self, number: int, /) -> tuple[int, int, tuple[int, ...]]:
        """Epoch, shard and sample indices, in the order of their pieces, of row `number` of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        source, index = self._merge(epoch).at(row)
        return epoch, *self._sources[source].row(epoch, index)

    def tokens_before(self, number: int, /) -> int:
        """Real tokens (BOS and EOS included, padding not) in rows 0 to number - 1 of the stream."""
        epoch, row = divmod(number, self.rows_per_epoch)
        counts = self._merge(epoch).counts(row).tolist() if row else [0] * len(self._sources)
        return epoch * self.tokens_per_epoch + sum(
            source.tokens_before(epoch, count) for source, count in zip(self._sources, counts))

    def shards_ahead(self, number: int, /) -> list[int]:
        """Shards that a reader at row `number` of the stream needs soon, for fetching them ahead; none twice.

        First the window that each source is in (or that it begins next), then each source's window after that; both in
        the order in which the stream comes to them.
        """
        epoch, row = divmod(number, self.rows_per_epoch)
        now, later = [], []
        for at, count in enumerate(self._merge(epoch).counts(row).tolist()):
            source = self._sources[at]
            if not source.num_rows:
                continue
            then, first = (epoch, count) if count < source.num_rows else (epoch + 1, 0)
            window = source.window_number(then, first)
            now.append((then + self._merge(then).key(at, first), source.window_shards(then, window)))
            then, window = (then, window + 1) if window + 1 < source.num_windows else (then + 1, 0)
            first = int(source.epoch(then).row_starts[window * source.window])
            later.append((then + self._merge(then).key(at, first), source.window_shards(then, window)))
        wanted = [shard for group in (now, later) for _, shards in sorted(group) for shard in shards]
        return list(dict.fromkeys(wanted))

    def _make_sources(self, shards: _Shards) -> list[_Source]:
        """In the order of their names; without shuffle all shards are one."""
        total = len(shards.samples)
        if not self.shuffle:
            return [_Source(shards, 0, np.arange(total), 1, 0)]
        _, source_of = np.unique(np.asarray(self.table.sources, dtype=str), return_inverse=True)
        grouped = np.split(np.argsort(source_of, kind="stable"), np.cumsum(np.bincount(source_of))[:-1])
        sources: list[_Source] = []
        for number, members in enumerate(grouped):
            share = (2 * self.window * len(members) + total) // (2 * total)
            first_window = sum(source.num_windows for source in sources)
            sources.append(_Source(shards, number, members, max(1, share), first_window))
        return sources

    def _merge(self, epoch: int) -> Interleave:
        if epoch not in self._merged:
            phases = [source.epoch(epoch).phase for source in self._sources]
            merged = Interleave([source.num_rows for source in self._sources], phases)
            self._merged = _last(self._merged) | {epoch: merged}
        return self._merged[epoch]
