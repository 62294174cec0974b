"""Datasets for tests of order, batches and mixtures: in memory with the interface of `MDSSplit`, or written to disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import hand_made
import numpy as np

from ettin_foundry.data.packing import pack_lengths, piece_counts

VOCAB_SIZE = 120
SPECIALS = {"cls": 115, "sep": 116, "pad": 117, "mask": 118}
UNREAL = 60  # an id below the vocabulary's size that is no entry


class MemorySet:
    """Shards without text, with what an order asks of a split.

    `shards` are chunk lengths as they are stored, `sources` names of each shard, `passes` numbers of each, as datasets
    with repeated shards have them. Packed row counts are stated for the row lengths `rows_at`.
    """

    def __init__(self, shards: list[np.ndarray], *, sources: list[str] | None = None, rows_at: tuple[int, ...] = (64,),
                 passes: list[int] | None = None) -> None:
        self.stored = [np.asarray(shard, np.int32) for shard in shards]
        self.sources = sources or ["only"] * len(shards)
        self.samples, self.tokens = (np.array([int(of(shard)) for shard in shards]) for of in (len, np.sum))
        self.packed = {T: np.array([pack_lengths(piece_counts(np.bincount(shard)), T).num_rows for shard in shards])
                       for T in rows_at}
        if passes is not None:
            self.passes = np.array(passes)
        self.touched: Counter[str] = Counter()

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        return self.packed.get(max_seq_len)

    def lengths(self, shard: int) -> np.ndarray:
        self.touched["lengths"] += 1
        return np.bincount(self.stored[shard], minlength=63).astype(np.uint32)

    def sample_lengths(self, shard: int) -> np.ndarray:
        self.touched["sample_lengths"] += 1
        return self.stored[shard]


def small_set(num_shards: int = 7, **options: Any) -> MemorySet:
    """A few shards of different sizes, of chunks of up to 62 tokens."""
    rng = np.random.default_rng(0)
    return MemorySet([rng.integers(1, 63, int(rng.integers(15, 60))) for _ in range(num_shards)], **options)


def write_set(folder: Path, sources: dict[str, list[np.ndarray]], *, chunk_length: int = 62, split: str = "train",
              tokenizer: dict | None = None, tokens: np.ndarray | None = None, seed: int = 0) -> Path:
    """A converted dataset of one split, every chunk a document, with a tokenizer folder that is none.

    `sources` are chunk lengths of each shard of each source, `tokenizer` a block of the manifest, `tokens` ids to draw.
    """
    rng = np.random.default_rng([seed, len(sources)])
    ids = np.arange(VOCAB_SIZE - 5) if tokens is None else tokens
    shards: list[tuple[str, list[tuple[str, np.ndarray]]]] = []
    for source, of_source in sources.items():
        for lengths in of_source:
            name = f"{folder.name}-{split}-{len(shards)}-"
            shards.append((source, [(f"{name}{at}", rng.choice(ids, length)) for at, length in enumerate(lengths)]))
    hand_made.write_split(folder / split, shards, chunk_length=chunk_length)

    def describe(manifest: dict) -> None:
        manifest["tokenizer"] = tokenizer or {"name": "test", "vocab_size": VOCAB_SIZE}
        for name in sources:
            own = [shard for shard in manifest["shards"] if shard["source"] == name]
            manifest["sources"][name] = {key: sum(shard[of] for shard in own) for key, of in (
                ("documents", "documents"), ("chunks", "samples"), ("tokens", "tokens"))}
            manifest["sources"][name]["licence"] = f"licence of {name}"

    hand_made.edit(folder / split, describe)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder
