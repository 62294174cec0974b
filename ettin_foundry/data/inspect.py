"""Finds a dataset, split or mixture that a user named and says what is in it: counts by source, lengths, samples.

Counts come from small files alone; only samples open shards. What must be fetched or expanded goes to another folder.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined, Undefined

from ettin_foundry.data import INDEX, MANIFEST
from ettin_foundry.data.mixture import open_split
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.storage import Storage, is_url, open_storage

_LENGTHS = "mean", "10%", "median", "90%", "full"  # heads of `length_cells`


class Found(NamedTuple):
    """Where a dataset lies: its folder, the splits that are meant, train first, and whether these are all."""

    storage: Storage
    splits: tuple[str, ...]
    whole: bool

    def open(self, split: str, scratch: Path) -> Any:
        """The `MDSSplit` or `MixtureSplit`; what is fetched or expanded lies in `scratch`."""
        if self.storage.is_local and not (data := open_split(Path(self.storage.url) / split)).fetches:
            return data
        return open_split(scratch / split, remote=self.storage.where(split))


def find_dataset(location: str | os.PathLike[str]) -> Found:
    """The dataset at a folder or URL, or the one split of it that was named; FileNotFoundError where none is."""
    storage = open_storage(location if is_url(location) else os.path.abspath(open_storage(location).url))
    files = (name.rpartition("/") for name, _ in storage.list())
    folders = {folder for folder, _, name in files if name in (MANIFEST, INDEX)}
    if "" in folders:  # the location is itself a split
        parent, _, name = storage.url.rpartition("/")
        return Found(open_storage(parent or "/"), (name,), whole=False)
    splits = sorted((folder for folder in folders if "/" not in folder), key=lambda split: (split != "train", split))
    if not splits:
        raise FileNotFoundError(f"{location} must be a dataset or a split, got no {MANIFEST} there or one folder down; "
                                "convert text with ettin convert, or correct the path")
    return Found(storage, tuple(splits), whole=True)


def load_decoder(storage: Storage) -> Any | None:
    """The `tokenizers.Tokenizer` of a dataset, None where it has none; ValueError where it cannot be read."""
    from tokenizers import Tokenizer

    name = "tokenizer/tokenizer.json"
    if not storage.exists(name):
        return None
    try:
        return Tokenizer.from_buffer(storage.read_bytes(name, at_most=64 << 20))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{storage.where(name)} must be a tokenizer, got {error!s:.200}") from None


def plain(text: str, limit: int = 10_000) -> str:
    """Foreign text for a terminal: one line, control characters as escapes, cut at `limit` characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def format_count(number: float) -> str:
    """1_700_002_529_280 as "1.7T"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.99995:
            return f"{number / size:.4g}{unit}"
    return f"{number:.0f}"


def length_cells(histogram: np.ndarray) -> tuple[str, ...]:
    """Mean, 10%, median, 90% and share of the full length, as texts, of (L + 1,) counts of chunks by length."""
    total, below = max(1, int(histogram.sum())), np.cumsum(histogram)
    mean = int(histogram @ np.arange(len(histogram))) / total
    quantiles = np.searchsorted(below, [share * int(below[-1]) for share in (0.1, 0.5, 0.9)])  # that many do not exceed
    return f"{mean:,.1f}", *(f"{value:,}" for value in quantiles), f"{int(histogram[-1]) / total:.1%}"


def source_rows(data: Any) -> list[dict[str, str]]:
    """What an open split holds of every source, the one of most tokens first, as texts by the heads of a table.

    Tokens are counted without BOS and EOS; fill is the share of packed rows of chunk_length + 2 that is used.
    """
    def text(value: Any, form: str = ",") -> str:
        return "?" if value is None else format(value, form)

    names, total, width = np.array(data.sources), max(1, int(data.tokens.sum())), data.chunk_length + SPECIALS_PER_PIECE
    counts, found = data.rows(width), list[tuple[int, dict[str, str]]]()
    for name in dict.fromkeys(data.sources):
        shards, stated = np.flatnonzero(names == name), data.manifest.get("sources", {}).get(name) or {}
        lengths = np.sum([data.lengths(int(shard)) for shard in shards], axis=0, dtype=np.int64)
        chunks, tokens = int(data.samples[shards].sum()), int(data.tokens[shards].sum())
        rows = None if counts is None else int(counts[shards].sum())
        fill = (tokens + SPECIALS_PER_PIECE * chunks) / (rows * width) if rows else None
        per_token = (stated.get("bytes") or 0) / max(1, tokens) or None
        found.append((tokens, {
            "source": plain(name), "documents": text(stated.get("documents")), "chunks": text(chunks),
            "tokens": text(tokens), "share": f"{tokens / total:.1%}", **dict(zip(_LENGTHS, length_cells(lengths))),
            "rows": text(rows), "fill": text(fill, ".1%"), "bytes/token": text(per_token, ".2f"),
            "licence": plain(stated.get("licence") or "unknown")}))
    return [row for _, row in sorted(found, key=lambda one: -one[0])]


def draw_samples(data: Any, *, per_source: int, seed: int = 0) -> list[dict[str, Any]]:
    """Chunks, as `data.sample` gives them, drawn from each source: each is equally probable, none comes twice."""
    names, samples = np.array(data.sources), []
    for number, name in enumerate(sorted(set(data.sources))):
        shards = np.flatnonzero(names == name)
        ends = data.samples[shards].cumsum()
        rng = np.random.default_rng([seed, number])
        drawn = rng.choice(int(ends[-1]), size=min(per_source, int(ends[-1])), replace=False)
        for place in sorted(drawn.tolist()):
            at = int(np.searchsorted(ends, place, side="right"))
            samples.append({**data.sample(int(shards[at]), place - int(ends[at - 1] if at else 0)), "source": name})
    return samples


def show_text(location: str | os.PathLike[str], *, samples: int = 1, seed: int = 0) -> str:
    """What lies at a folder or URL, with `samples` decoded chunks of each source, as show.txt.jinja lays it out."""
    found = find_dataset(location)
    with tempfile.TemporaryDirectory(prefix="ettin-") as scratch:
        return render(Path(__file__).with_name("show.txt.jinja"), source_rows=source_rows,
                      splits=[found.open(split, Path(scratch)) for split in found.splits],
                      draw=functools.partial(draw_samples, per_source=samples, seed=seed),
                      decoder=load_decoder(found.storage) if samples else None)


def render(template: Path, undefined: type[Undefined] = StrictUndefined, **facts: Any) -> str:
    """The text of a template, .txt or .html; its filters are `plain`, `table`, and of numbers `commas` and `count`."""
    jinja = Environment(undefined=undefined, autoescape=".html" in template.name, trim_blocks=True, lstrip_blocks=True)
    jinja.filters.update(plain=plain, commas="{:,}".format, count=format_count, table=table)
    return jinja.from_string(template.read_text(encoding="utf-8")).render(facts).rstrip("\n")


def table(rows: Sequence[Mapping[str, str]], left: int = 1) -> list[str]:
    """Lines of a head and of the rows' cells; `left` columns begin at the left, the others end right."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) if number < left else cell.rjust(width)
                      for number, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines]
