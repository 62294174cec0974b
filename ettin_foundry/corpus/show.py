"""What is in a set, for people: counts by source, lengths of chunks, how full rows will be, decoded samples.

All counts come from the manifest and from lengths.npy, so a set of terabytes is shown at once; only the samples open
shards. Foreign text reaches the terminal with its control characters escaped. Checking a set is verify.py's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.inspect import find_set, load_decoder, open_splits, peek_shard, plain
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.shards import MDSSplit, read_columns

__all__ = ["Sample", "SourceStatistics", "draw_samples", "histogram_lines", "sample_lines", "show_set", "source_statistics"]

_QUANTILES = (0.1, 0.5, 0.9)
_BAR = 40  # characters of the longest bar
_SHOWN = 400  # characters of a sample


@dataclass(frozen=True)
class SourceStatistics:
    """One source in one split. Token counts are without BOS and EOS.

    Attributes:
        name: of the source. shards: files that hold it.
        documents, text_bytes: as the manifest states them; None where it does not.
        chunks, tokens: counted from the shards' entries.
        share: of the split's tokens, in [0, 1].
        mean, quantiles: tokens in a chunk; the quantiles are the smallest lengths that 10%, 50% and 90% of the chunks do
            not exceed.
        full: share of the chunks that have the full chunk length.
        rows: packed rows of chunk_length + 2 tokens in an epoch; None where the manifest does not count them.
        fill: share of those rows' places that hold a token, BOS and EOS included.
        licence: of the text. dropped: documents left out when it was converted, by reason.
        lengths: (chunk_length + 1,) int64, chunks of each length.
    """

    name: str
    shards: int
    documents: int | None
    text_bytes: int | None
    chunks: int
    tokens: int
    share: float
    mean: float
    quantiles: tuple[int, ...]
    full: float
    rows: int | None
    fill: float | None
    licence: str | None
    dropped: Mapping[str, int]
    lengths: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One chunk. `text` is None without a tokenizer."""

    source: str
    doc: str
    part: int
    last: bool
    tokens: np.ndarray
    text: str | None


def source_statistics(data: Any) -> list[SourceStatistics]:
    """Statistics of every source of an open split, in order of their tokens, largest first.

    Args:
        data: `mds.MDSSplit` or `mix_set.MixtureSplit`.

    Raises:
        ValueError: lengths.npy was altered.
    """
    names = np.array(data.sources)
    total = int(np.sum(data.tokens))
    width = data.chunk_length + SPECIALS_PER_PIECE
    rows = data.rows(width)
    stated = data.manifest.get("sources", {})
    result = []
    for name in dict.fromkeys(data.sources):
        shards = np.flatnonzero(names == name)
        lengths = np.zeros(data.chunk_length + 1, np.int64)
        for shard in shards:
            lengths += data.lengths(int(shard)).astype(np.int64)
        chunks, tokens = int(data.samples[shards].sum()), int(data.tokens[shards].sum())
        below = lengths.cumsum()
        num_rows = None if rows is None else int(rows[shards].sum())
        facts = stated.get(name) or {}
        result.append(SourceStatistics(
            name=name, shards=len(shards), documents=facts.get("documents"), text_bytes=facts.get("bytes"), chunks=chunks,
            tokens=tokens, share=tokens / max(1, total), mean=tokens / max(1, chunks),
            quantiles=tuple(int(np.searchsorted(below, share * chunks)) for share in _QUANTILES),
            full=int(lengths[-1]) / max(1, chunks), rows=num_rows,
            fill=(tokens + SPECIALS_PER_PIECE * chunks) / (num_rows * width) if num_rows else None,
            licence=facts.get("licence"), dropped=facts.get("dropped") or {}, lengths=lengths))
    return sorted(result, key=lambda source: -source.tokens)


def histogram_lines(lengths: np.ndarray, *, bins: int = 16) -> list[str]:
    """A histogram in characters: one line a bin, with its share of the chunks (bar and number) and of the tokens.

    Args:
        lengths: (M + 1,) chunks of each length. bins: lines, fewer when M is smaller.
    """
    counts = np.asarray(lengths, np.int64)
    longest = len(counts) - 1
    edges = np.unique(np.linspace(1, longest + 1, min(bins, longest) + 1).round().astype(np.int64))
    chunks = np.add.reduceat(counts, edges[:-1])
    tokens = np.add.reduceat(counts * np.arange(longest + 1), edges[:-1])
    width = len(f"{longest:,}")
    lines = []
    for begin, end, chunk, token in zip(edges[:-1], edges[1:], chunks, tokens):
        bar = "#" * round(_BAR * int(chunk) / max(1, int(chunks.max())))
        lines.append(f"{begin:>{width},} - {end - 1:>{width},} |{bar:<{_BAR}}| {chunk / max(1, chunks.sum()):6.1%} of "
                     f"chunks {token / max(1, tokens.sum()):6.1%} of tokens")
    return lines


def draw_samples(data: Any, decoder: Any | None, *, per_source: int, seed: int = 0) -> list[Sample]:
    """Chunks drawn at random from each source: every chunk of a source is equally probable, none comes twice.

    Args:
        data: `mds.MDSSplit` or `mix_set.MixtureSplit`. decoder: a `tokenizers.Tokenizer`, or None.

    Raises:
        ValueError: a shard is not what the manifest says.
    """
    names = np.array(data.sources)
    samples = []
    for number, name in enumerate(sorted(set(data.sources))):
        shards = np.flatnonzero(names == name)
        ends = np.asarray(data.samples, np.int64)[shards].cumsum()
        rng = np.random.default_rng([seed, number])
        drawn = rng.choice(int(ends[-1]), size=min(per_source, int(ends[-1])), replace=False)
        for place in sorted(int(value) for value in drawn):
            at = int(np.searchsorted(ends, place, side="right"))
            found = _read_sample(data, int(shards[at]), place - int(ends[at - 1] if at else 0))
            text = decoder.decode(found["tokens"].tolist(), skip_special_tokens=False) if decoder else None
            samples.append(Sample(name, found["doc"], found["part"], bool(found["last"]), found["tokens"], text))
    return samples


def _read_sample(data: Any, shard: int, index: int) -> dict[str, Any]:
    """As `data.sample`; but a packed shard that lies here is expanded in memory, so that looking leaves nothing behind."""
    entry: dict[str, Any] = data.manifest["shards"][shard] if isinstance(data, MDSSplit) else {"zip": None}
    if entry["zip"] is None or not (data.local / entry["zip"]["basename"]).is_file():
        return data.sample(shard, index)
    opened = peek_shard(data.local, entry, chunk_length=data.chunk_length, vocab_size=data.tokenizer["vocab_size"])
    doc, part, _ = read_columns(opened, index, data.local / entry["raw"]["basename"])
    tokens = np.frombuffer(opened.buffer, "<u2", int(opened.lengths[index]), int(opened.token_starts[index])).copy()
    return {"tokens": tokens, "doc": doc, "part": part, "last": bool(opened.last[index])}


def show_set(location: str | Path, *, samples: int = 1, seed: int = 0, picture: str | Path | None = None) -> Iterator[str]:
    """Lines that describe a SET.

    Args:
        location: folder or URL of a set, of a split, or of a mixture.
        samples: decoded chunks of each source and split. seed: chooses them.
        picture: an .svg file to write the histogram of lengths to.

    Raises:
        FileNotFoundError, ValueError: no set, or one whose small files contradict each other.
    """
    if picture is not None and Path(picture).suffix != ".svg":
        raise ValueError(f"--picture: {picture} given; a file name that ends in .svg is needed. Correct it")
    with open_splits(location) as splits:
        statistics = {split: source_statistics(data) for split, data in splits.items()}
        decoder = load_decoder(find_set(location).storage) if samples else None
        for split, data in splits.items():
            yield from _describe(split, data, statistics[split])
            if samples:
                yield ""
                yield from sample_lines(draw_samples(data, decoder, per_source=samples, seed=seed))
            yield ""
    if picture is not None:
        from ettin_foundry.corpus.card import picture as draw

        summed = {split: np.sum([source.lengths for source in sources], axis=0) for split, sources in statistics.items()}
        Path(picture).write_bytes(draw(summed))
        yield f"wrote {picture}"


def _describe(split: str, data: Any, sources: Sequence[SourceStatistics]) -> Iterator[str]:
    tokenizer = data.tokenizer
    yield (f"{plain(split)}: {sum(s.chunks for s in sources):,} chunks of at most {data.chunk_length:,} tokens, "
           f"{sum(s.tokens for s in sources):,} tokens, {data.num_shards:,} shards; tokenizer "
           f"{plain(str(tokenizer.get('name', 'unnamed')))} ({tokenizer['vocab_size']:,} entries)")
    header = ("source", "documents", "chunks", "tokens", "share", "mean", "10%", "median", "90%", "full", "rows", "fill",
              "bytes/token", "licence")
    rows: list[tuple[str, ...]] = [header]
    for s in sources:
        rows.append((plain(s.name), _number(s.documents), f"{s.chunks:,}", f"{s.tokens:,}", f"{s.share:.1%}",
                     f"{s.mean:,.1f}", *(f"{value:,}" for value in s.quantiles), f"{s.full:.1%}", _number(s.rows),
                     "?" if s.fill is None else f"{s.fill:.1%}",
                     "?" if not s.text_bytes else f"{s.text_bytes / max(1, s.tokens):.2f}", plain(s.licence or "unknown")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [cell.ljust(width) if column in (0, len(header) - 1) else cell.rjust(width)
                 for column, (cell, width) in enumerate(zip(row, widths))]
        yield "  " + "  ".join(cells).rstrip()
    for s in sources:
        if s.dropped:
            yield f"  {plain(s.name)}: dropped " + ", ".join(f"{number:,} {plain(why)}" for why, number in s.dropped.items())
    yield ""
    yield from ("  " + line for line in histogram_lines(np.sum([s.lengths for s in sources], axis=0)))


def sample_lines(samples: Sequence[Sample]) -> Iterator[str]:
    """Two lines for each sample."""
    for sample in samples:
        end = ", ends its document" if sample.last else ""
        yield f"  [{plain(sample.source)}] {plain(sample.doc, 100)}, part {sample.part}, {len(sample.tokens):,} tokens{end}"
        yield "    " + (f"no tokenizer/ beside the set; ids {sample.tokens[:32].tolist()}" if sample.text is None
                        else plain(sample.text, _SHOWN))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"
