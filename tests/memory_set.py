"""A data set in memory with mds.MDSSet's interface, which counts what is looked at. For tests of order and batches."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ettin_foundry.packing import pack_lengths, piece_counts

VOCAB_SIZE = 120
SPECIALS = {"cls": 115, "sep": 116, "pad": 117, "mask": 118}
UNREAL = 60  # an id below the vocabulary's size that is no entry


def realistic_lengths(rng: np.random.Generator, documents: int, chunk_length: int) -> np.ndarray:
    """Chunk lengths as real text gives them: log-normal documents, long ones cut into full chunks and a rest."""
    chunks: list[int] = []
    for tokens in np.exp(rng.normal(6.2, 1.1, documents)).astype(int) + 1:
        chunks += [chunk_length] * int(tokens // chunk_length)
        if tokens % chunk_length:
            chunks.append(int(tokens % chunk_length))
    return np.array(chunks)


class MemorySet:
    """Shards of random text tokens.

    Args:
        shards: chunk lengths of each shard, in stored order.
        sources: a name per shard; all the same if not given.
        rows_at: row lengths for which packed row counts are stated, as a manifest would.
    """

    def __init__(self, shards: list[np.ndarray], *, chunk_length: int, sources: list[str] | None = None,
                 rows_at: tuple[int, ...] = (), seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.chunk_length = chunk_length
        self._lengths = [np.asarray(shard, np.int32) for shard in shards]
        self.sources = sources or ["only"] * len(shards)
        text = np.setdiff1d(np.arange(VOCAB_SIZE - 5), [UNREAL])
        self._chunks = [[rng.choice(text, length).astype(np.uint16) for length in shard] for shard in shards]
        self._last = [rng.random(len(shard)) < 0.7 for shard in shards]
        self._rows = {T: np.array([pack_lengths(piece_counts(np.bincount(shard)), T).num_rows for shard in shards])
                      for T in rows_at}
        self.touched: Counter[str] = Counter()
        self.fingerprint = f"memory-{seed}-{len(shards)}"

    @property
    def num_shards(self) -> int:
        return len(self._lengths)

    @property
    def samples(self) -> np.ndarray:
        return np.array([len(shard) for shard in self._lengths])

    @property
    def tokens(self) -> np.ndarray:
        return np.array([int(shard.sum()) for shard in self._lengths])

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        return self._rows.get(max_seq_len)

    def lengths(self, shard: int) -> np.ndarray:
        self.touched["lengths"] += 1
        return np.bincount(self._lengths[shard], minlength=self.chunk_length + 1).astype(np.uint32)

    def sample_lengths(self, shard: int) -> np.ndarray:
        self.touched["sample_lengths"] += 1
        return self._lengths[shard]

    def last(self, shard: int) -> np.ndarray:
        return self._last[shard]

    def chunk(self, shard: int, sample: int) -> np.ndarray:
        return self._chunks[shard][sample]


def small_set(num_shards: int = 7, *, chunk_length: int = 62, rows_at: tuple[int, ...] = (64,), seed: int = 0,
              sources: list[str] | None = None) -> MemorySet:
    """A few shards of different sizes."""
    rng = np.random.default_rng(seed)
    shards = [rng.integers(1, chunk_length + 1, int(rng.integers(15, 60))) for _ in range(num_shards)]
    return MemorySet(shards, chunk_length=chunk_length, rows_at=rows_at, seed=seed, sources=sources)
