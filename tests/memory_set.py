"""Sets for tests of order, batches and mixtures: in memory with mds.MDSSplit's interface, or written by hand to disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import xxhash

from ettin_foundry.data.packing import pack_lengths, piece_counts

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
        passes: a number per shard, as sets with repeated shards have it; no such attribute if not given.
    """

    def __init__(self, shards: list[np.ndarray], *, chunk_length: int, sources: list[str] | None = None,
                 rows_at: tuple[int, ...] = (), seed: int = 0, passes: list[int] | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.chunk_length = chunk_length
        self._lengths = [np.asarray(shard, np.int32) for shard in shards]
        self.sources = sources or ["only"] * len(shards)
        text = np.setdiff1d(np.arange(VOCAB_SIZE - 5), [UNREAL])
        self._chunks = [[rng.choice(text, length).astype(np.uint16) for length in shard] for shard in shards]
        self._last = [rng.random(len(shard)) < 0.7 for shard in shards]
        self._rows = {T: np.array([pack_lengths(piece_counts(np.bincount(shard)), T).num_rows for shard in shards])
                      for T in rows_at}
        if passes is not None:
            self.passes = np.array(passes)
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


class CountedSet:
    """Only what an order asks for, of sets too large to have text.

    Args:
        histograms: (K, M + 1) chunk counts by length; shard s has that of number `kinds[s]`.
        kinds: (S,) below K.
        sources: a name per shard.
        rows_at: as MemorySet.
    """

    def __init__(self, histograms: np.ndarray, kinds: np.ndarray, sources: list[str], *,
                 rows_at: tuple[int, ...] = ()) -> None:
        self._histograms, self._kinds, self.sources = np.asarray(histograms), np.asarray(kinds), sources
        self.num_shards = len(self._kinds)
        self.samples = self._histograms.sum(axis=1)[self._kinds]
        self.tokens = (self._histograms @ np.arange(self._histograms.shape[1]))[self._kinds]
        self._rows = {T: np.array([pack_lengths(piece_counts(row), T).num_rows for row in self._histograms])
                      for T in rows_at}
        self.touched: Counter[str] = Counter()

    def rows(self, max_seq_len: int) -> np.ndarray | None:
        return self._rows[max_seq_len][self._kinds] if max_seq_len in self._rows else None

    def lengths(self, shard: int) -> np.ndarray:
        self.touched["lengths"] += 1
        return self._histograms[self._kinds[shard]]

    def sample_lengths(self, shard: int) -> np.ndarray:
        """Stored in an order of their own, as real shards are."""
        self.touched["sample_lengths"] += 1
        histogram = self._histograms[self._kinds[shard]]
        return np.random.default_rng(shard).permutation(np.repeat(np.arange(histogram.size), histogram))


def small_set(num_shards: int = 7, *, chunk_length: int = 62, rows_at: tuple[int, ...] = (64,), seed: int = 0,
              sources: list[str] | None = None) -> MemorySet:
    """A few shards of different sizes."""
    rng = np.random.default_rng(seed)
    shards = [rng.integers(1, chunk_length + 1, int(rng.integers(15, 60))) for _ in range(num_shards)]
    return MemorySet(shards, chunk_length=chunk_length, rows_at=rows_at, seed=seed, sources=sources)


COLUMNS = {"tokens": "ndarray:uint16", "doc": "str", "part": "int", "last": "int", "source": "str"}


def shard_bytes(chunks: list[np.ndarray], source: str, prefix: str) -> bytes:
    """An MDS shard, byte by byte as its format says; chunk i is a document of its own called `prefix`i."""
    names = sorted(COLUMNS)
    config = json.dumps({"version": 2, "format": "mds", "compression": None, "hashes": ["xxh64"], "size_limit": None,
                         "column_names": names, "column_encodings": [COLUMNS[name] for name in names],
                         "column_sizes": [8 if COLUMNS[name] == "int" else None for name in names]}, sort_keys=True).encode()
    samples = []
    for number, tokens in enumerate(chunks):
        wide = len(tokens) > 255
        array = bytes([1 << 2 | wide]) + len(tokens).to_bytes(1 + wide, "little") + tokens.astype("<u2").tobytes()
        doc, name = f"{prefix}{number}".encode(), source.encode()
        sizes = np.array([len(doc), len(name), len(array)], "<u4").tobytes()
        samples.append(sizes + doc + np.array([1, 0], "<i8").tobytes() + name + array)
    first = 4 + 4 * (len(samples) + 1) + len(config)
    offsets = first + np.cumsum([0, *map(len, samples)])
    return np.array([len(samples), *offsets], "<u4").tobytes() + config + b"".join(samples)


def write_set(folder: Path, sources: dict[str, list[np.ndarray]], *, chunk_length: int = 62, split: str = "train",
              tokenizer: dict | None = None, tokens: np.ndarray | None = None, seed: int = 0) -> Path:
    """A converted set of one split, with a tokenizer folder that is none.

    Args:
        sources: chunk lengths of each shard of each source.
        tokenizer: block of the manifest. tokens: ids to draw text from.
    """
    rng = np.random.default_rng([seed, len(sources)])
    out = folder / split
    out.mkdir(parents=True)
    entries, index, histograms = [], [], []
    for source, shards in sources.items():
        for lengths in shards:
            name = f"shard.{len(entries):05d}.mds"
            chunks = [rng.choice(np.arange(VOCAB_SIZE - 5) if tokens is None else tokens, length) for length in lengths]
            data = shard_bytes(chunks, source, f"{folder.name}-{split}-{len(entries)}-")
            (out / name).write_bytes(data)
            histograms.append(np.bincount(lengths, minlength=chunk_length + 1))
            rows = pack_lengths(piece_counts(histograms[-1]), chunk_length + 2).num_rows
            raw = {"basename": name, "bytes": len(data), "xxh64": xxhash.xxh64(data).hexdigest()}
            entries.append({"raw": raw, "zip": None, "samples": len(lengths), "tokens": int(np.sum(lengths)),
                            "documents": len(lengths), "source": source, "rows": {str(chunk_length + 2): rows}})
            names = sorted(COLUMNS)
            index.append({"samples": len(lengths), "column_names": names, "format": "mds", "version": 2, "zip_data": None,
                          "column_encodings": [COLUMNS[name] for name in names], "compression": None,
                          "raw_data": {"basename": name, "bytes": len(data), "hashes": {"xxh64": raw["xxh64"]}}})
    np.save(out / "lengths.npy", np.array(histograms, "<u4"))
    (out / "index.json").write_text(json.dumps({"version": 2, "shards": index}))
    stored = (out / "lengths.npy").read_bytes()
    counts = {name: {key: sum(entry[of] for entry in entries if entry["source"] == name) for key, of in
                     (("documents", "documents"), ("chunks", "samples"), ("tokens", "tokens"))} for name in sources}
    manifest = {
        "format": "ettin-mds", "version": 1, "split": split, "chunk_length": chunk_length, "compression": None,
        "tokenizer": tokenizer or {"name": "test", "vocab_size": VOCAB_SIZE}, "columns": COLUMNS, "options": {},
        "code_version": "0", "sources": {name: {**counts[name], "licence": f"licence of {name}"} for name in sources},
        "lengths": {"basename": "lengths.npy", "bytes": len(stored), "xxh64": xxhash.xxh64(stored).hexdigest()},
        "shards": entries,
        "totals": {key: sum(entry[key] for entry in entries) for key in ("documents", "samples", "tokens")}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder
