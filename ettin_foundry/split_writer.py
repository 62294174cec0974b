"""Writes one split of a set: shards through streaming's MDSWriter, then the histogram of lengths and the manifest.

A shard holds chunks of one source only, so that mixtures can be chosen by shard. The manifest is built from what was
handed to the writer and written last; reading it back is manifest.py's and mds.py's work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from streaming import MDSWriter

from ettin_foundry.manifest import COLUMNS, FORMAT, MANIFEST, VERSION
from ettin_foundry.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts
from ettin_foundry.version import __version__

__all__ = ["SourceCounts", "SplitWriter"]


@dataclass
class SourceCounts:
    """What one source gave to one split, as its manifest states it. `bytes` are UTF-8 bytes of text."""

    licence: str | None = None
    revision: str | None = None
    documents: int = 0
    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


class SplitWriter:
    """Cuts documents into chunks and writes them.

    Args:
        folder: the split's folder; created.
        split: its name in the manifest.
        chunk_length: most tokens in a chunk.
        shard_size: bytes after which a shard ends, as streaming reads it ("64mb" or a number).
    """

    def __init__(self, folder: Path, split: str, *, chunk_length: int, shard_size: int | str) -> None:
        self.folder = folder
        self.split = split
        self.chunk_length = chunk_length
        self.sources: dict[str, SourceCounts] = {}
        self._writer = MDSWriter(columns=dict(COLUMNS), out=str(folder), hashes=["xxh64"], size_limit=shard_size)
        self._source = ""
        self._shard_sources: list[str] = []
        self._histograms: list[np.ndarray] = []
        self._histogram = self._empty_histogram()

    @property
    def num_documents(self) -> int:
        return sum(counts.documents for counts in self.sources.values())

    def begin_source(self, name: str, counts: SourceCounts) -> SourceCounts:
        """Ends the current shard; what follows belongs to this source, and is counted in `counts`."""
        self._flush()
        self._source = name
        self.sources[name] = counts
        return counts

    def write(self, doc: str, tokens: np.ndarray, *, num_bytes: int) -> None:
        """Writes one document as chunks: cut every `chunk_length` tokens, the last one marked.

        Args:
            doc: its id. tokens: (L,) uint16, L >= 1. num_bytes: UTF-8 bytes of its text.
        """
        counts = self.sources[self._source]
        num_parts = -(-len(tokens) // self.chunk_length)
        for part in range(num_parts):
            chunk = tokens[part * self.chunk_length:(part + 1) * self.chunk_length]
            num_closed = len(self._writer.shards)
            self._writer.write({"tokens": chunk, "doc": doc, "part": part, "last": int(part == num_parts - 1),
                                "source": self._source})
            if len(self._writer.shards) > num_closed:  # a shard ended before this chunk
                self._close_shard()
            self._histogram[len(chunk)] += 1
            counts.chunks += 1
        counts.documents += 1
        counts.tokens += len(tokens)
        counts.bytes += num_bytes

    def finish(self) -> None:
        """Ends the last shard and writes index.json and lengths.npy; `write_manifest` makes the split complete.

        Raises:
            RuntimeError: the shards do not hold exactly the tokens and chunks that were written; a bug, not an input.
        """
        self._flush()
        self._writer.finish()
        lengths = np.array(self._histograms, dtype="<u4").reshape(-1, self.chunk_length + 1)
        np.save(self.folder / "lengths.npy", lengths)
        held = int((lengths.astype(np.int64) @ np.arange(self.chunk_length + 1)).sum()), int(lengths.sum())
        given = (sum(c.tokens for c in self.sources.values()), sum(c.chunks for c in self.sources.values()))
        if held != given or int(lengths.sum()) != sum(shard["samples"] for shard in self._writer.shards):
            raise RuntimeError(f"{self.folder}: shards hold (tokens, chunks) {held}, {given} were written")

    def write_manifest(self, tokenizer: dict[str, Any], options: dict[str, Any]) -> None:
        """Writes manifest.json: from here on the split is complete.

        Args:
            tokenizer: from `tokenizer.fingerprint`. options: how the set was made, kept for the record.
        """
        lengths = (self.folder / "lengths.npy").read_bytes()
        shards = [self._shard_entry(*row) for row in zip(self._writer.shards, self._shard_sources, self._histograms)]
        manifest = {
            "format": FORMAT, "version": VERSION, "split": self.split, "chunk_length": self.chunk_length,
            "tokenizer": tokenizer, "columns": COLUMNS, "options": options, "code_version": __version__,
            "lengths": {"basename": "lengths.npy", "bytes": len(lengths), "xxh64": xxhash.xxh64(lengths).hexdigest()},
            "sources": {name: vars(c) for name, c in self.sources.items() if c.documents or c.dropped},
            "shards": shards,
            "totals": {"documents": self.num_documents, "samples": sum(shard["samples"] for shard in shards),
                       "tokens": sum(shard["tokens"] for shard in shards)},
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def abort(self) -> None:
        """Stops the writer's threads; the folder stays incomplete, for the caller to remove."""
        self._writer.cancel_future_jobs()

    def _empty_histogram(self) -> np.ndarray:
        return np.zeros(self.chunk_length + 1, dtype=np.int64)

    def _flush(self) -> None:
        if self._writer.new_samples:
            self._writer.flush_shard()
            self._writer._reset_cache()  # streaming 0.12 has no public way to end a shard early
            self._close_shard()

    def _close_shard(self) -> None:
        if not self._histogram.any():
            raise ValueError(f"--shard-size: {self._writer.size_limit} bytes given; one chunk of {self._source} alone "
                             "needs more. Choose a larger one; 64mb is the default")
        self._shard_sources.append(self._source)
        self._histograms.append(self._histogram)
        self._histogram = self._empty_histogram()

    def _shard_entry(self, shard: dict[str, Any], source: str, histogram: np.ndarray) -> dict[str, Any]:
        row_length = self.chunk_length + SPECIALS_PER_PIECE
        raw = shard["raw_data"]
        return {
            "raw": {"basename": raw["basename"], "bytes": raw["bytes"], "xxh64": raw["hashes"]["xxh64"]}, "zip": None,
            "samples": shard["samples"], "tokens": int(histogram @ np.arange(len(histogram))), "source": source,
            "rows": {str(row_length): pack_lengths(piece_counts(histogram), row_length).num_rows},
        }
