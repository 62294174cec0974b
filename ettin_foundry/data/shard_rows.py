"""Rows of one shard: how its chunks share rows, and which chunk takes which place.

A shard's rows follow from its histogram of lengths (`packing.py`), so its row and token counts are known without
opening it; which chunk of a length goes where is drawn when the shard's first row is wanted. Everything that a shard
says is held against the manifest's counts, for the sums over shards in `order.py` rest on them. Random numbers come
from the raw output of numpy's bit generators, whose streams numpy keeps fixed between versions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts

__all__ = ["ChunkTable", "Layout", "ShardRows", "raw_draws"]

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

_PLACES = 3  # first word of the seed: what the numbers are for; order.py uses 1 and 2, so that no two uses share a stream


class ChunkTable(Protocol):
    """What an order needs to know of a data set; `mds.MDSSplit` and `mix.MixtureSplit` have it.

    S shards, M tokens in the longest chunk. A set that holds shards several times may also have `passes`, (S,) integers:
    a source's shards of pass 0 then all come before those of pass 1, so that a chunk's repeats are far apart.
    """

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
class Layout:
    """Rows of one shard: places of given length, and (filled when first needed) the chunk that takes each place."""

    shard: int
    lengths: Ints  # (P,) piece lengths, row after row
    offsets: Ints  # (R + 1,) row r has places offsets[r] to offsets[r + 1]
    samples: Ints | None = None  # (P,) index of the chunk in the shard

    @property
    def row_tokens(self) -> Ints:
        """(R,) real tokens per row."""
        return np.add.reduceat(self.lengths, self.offsets[:-1]) if self.offsets.size > 1 else np.zeros(0, np.int64)


def raw_draws(count: int, *words: int) -> npt.NDArray[np.uint64]:
    """(count,) numbers of the generator that these words seed, the same on every machine."""
    return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count)


class ShardRows:
    """Rows of each shard, checked against the manifest's counts."""

    def __init__(self, table: ChunkTable, max_seq_len: int, *, packing: bool, shuffle: bool, seed: int) -> None:
        self.table, self.max_seq_len, self.packing, self.shuffle, self.seed = table, max_seq_len, packing, shuffle, seed
        self.samples = np.asarray(table.samples, np.int64)
        self.tokens = np.asarray(table.tokens, np.int64) + SPECIALS_PER_PIECE * self.samples
        self.rows = self._count_rows() if packing else self.samples

    def _count_rows(self) -> Ints:
        known = self.table.rows(self.max_seq_len)
        if known is not None:
            return np.asarray(known, np.int64)
        log.info("The manifest has no packed row counts for max_seq_len=%d: packing the length histograms of %d shards",
                 self.max_seq_len, len(self.samples))
        return np.array([pack_lengths(piece_counts(self.table.lengths(shard)), self.max_seq_len).num_rows
                         for shard in range(len(self.samples))], np.int64)

    def layout(self, shard: int) -> Layout:
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
        stated = (self.samples[shard], self.tokens[shard], self.rows[shard])
        for (what, number), manifest in zip(found.items(), stated):
            if number != manifest:
                raise ValueError(
                    f"shard {shard} (counted from 0 in index.json): its histogram of lengths gives {number} {what} at "
                    f"max_seq_len={self.max_seq_len}, its manifest says {manifest}; they must agree, or rows would be "
                    "skipped or repeated. The data set was altered or only partly copied: copy or convert it again")
        return Layout(shard, lengths, offsets)

    def assign(self, layout: Layout, epoch: int) -> Ints:
        """Gives every place a chunk of its length: in stored order, or permuted by (seed, epoch, shard).

        Raises:
            ValueError: the stored chunks' lengths are not those of the histogram.
        """
        chunks = np.asarray(self.table.sample_lengths(layout.shard), np.int64) + SPECIALS_PER_PIECE
        dealt = np.arange(chunks.size)
        if self.shuffle:
            dealt = np.argsort(raw_draws(chunks.size, _PLACES, self.seed, epoch, layout.shard), kind="stable")
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
