"""What any step of a run reads: from its config, or from a checkpoint alone, which also gives the exact next batch.

The order is a function of (set, settings), so nothing is replayed: a step late in a run takes as long as the first. Only
`next_batch` needs torch. Writing the order into files is in order_export.py, the command in cli_order.py.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ettin_foundry.data.manifest import MANIFEST
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.ramp import check_warmup
from ettin_foundry.data.storage import is_url
from ettin_foundry.data.stream import HASH_MODULUS, STREAM_KEYS, Row, RowStream, fill_row, hash_row, open_stream
from ettin_foundry.training.run_config import parse_time, total_tokens

if TYPE_CHECKING:
    from ettin_foundry.data.batch import Batch

__all__ = ["Piece", "StepView", "is_past_end", "length_of_run", "next_batch", "next_step", "row_tokens", "special_ids",
           "stream_of", "view_step"]


@dataclass(frozen=True)
class Piece:
    """A chunk in a row. `tokens` counts its BOS and EOS."""

    row: int
    """Place of the row in the global batch."""
    tokens: int
    doc: str
    part: int
    last: bool
    source: str
    chunk: np.ndarray
    """(tokens - 2,) uint16."""


@dataclass(frozen=True)
class StepView:
    """A step of a stream, over all ranks."""

    step: int
    epoch: int
    """Of its first row."""
    rows: int
    tokens: int
    """Real tokens of the step, BOS and EOS included."""
    tokens_before: int
    ids_hash: int
    """As in steps.jsonl."""
    pieces: list[Piece]
    """Of its first rows, in order."""


def stream_of(cfg: Mapping[str, Any], location: str | os.PathLike[str] | None = None) -> RowStream:
    """The rows that a run with this config reads.

    Args:
        cfg: plain containers, interpolations resolved.
        location: folder or URL of the set, or of the split, instead of train_loader.dataset.

    Raises:
        ValueError, FileNotFoundError: as the loader raises them, or the loader is not ours.
    """
    loader, rows = cfg.get("train_loader") or {}, cfg.get("global_train_batch_size")
    if loader.get("name") != "ettin_text":
        raise ValueError(f"train_loader.name: {loader.get('name')!r} given; the order of ettin_text is known only. Give a "
                         "recipe of this project")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"global_train_batch_size: {rows!r} given; a whole number of at least 1 row is needed. Correct it")
    keys = {key: loader[key] for key in STREAM_KEYS if loader.get(key) is not None}
    if "batch_size_warmup" in keys:
        tokens = check_warmup(keys["batch_size_warmup"], rows, total=total_tokens(dict(cfg)))
        keys["batch_size_warmup"] = {**keys["batch_size_warmup"], "tokens": tokens}
    if location is not None:
        keys["dataset"] = _elsewhere(keys.get("dataset") or {}, os.fspath(location))
    return open_stream(**keys, global_batch_size=rows)


def next_step(checkpoint: str | os.PathLike[str], location: str | os.PathLike[str] | None = None
              ) -> tuple[dict[str, Any], RowStream, int]:
    """What the run of a checkpoint reads next, from the checkpoint alone and the set.

    Args:
        checkpoint: a .pt file, a sharded folder or a save folder (its newest).
        location: where the set lies, if not where the run had it.

    Returns:
        (the run's config, its stream, number of the next step).

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, one without the run's config or place in the data, or the set is
            another one than it was trained on.
    """
    from ettin_foundry.training.checkpoints import read_head

    head = read_head(Path(checkpoint))
    if not head.record.get("run_config") or not head.data:
        what = "place in the data" if head.record.get("run_config") else "record of its config"
        raise ValueError(f"{head.path}: holds no {what}, as every checkpoint of a training run with ettin_text does. Give "
                         "one of those")
    cfg = json.loads(head.record["run_config"])
    stream = stream_of(cfg, location)
    stream.load_state_dict(head.data)
    return cfg, stream, stream.start_step


def next_batch(checkpoint: str | os.PathLike[str], location: str | os.PathLike[str] | None = None, *, rank: int = 0,
               world_size: int = 1) -> Batch:
    """The batch that a run resumed from a checkpoint reads first, masks and labels included, bit for bit.

    Args:
        checkpoint, location: as for `next_step`.
        rank, world_size: whose share of the global batch; any number of ranks that divides it.

    Raises:
        FileNotFoundError, ValueError: as `next_step`, or the set's tokenizer is missing or another one.
    """
    from ettin_foundry.data.batch import Collator
    from ettin_foundry.data.tokenizer import check, load
    from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
    from ettin_foundry.objectives.targets import TextVocab

    cfg, stream, step = next_step(checkpoint, location)
    if stream.ramp.min_size % world_size or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}: the number of ranks must divide {stream.ramp.min_size} rows")
    name = Path(cfg["tokenizer"]["name"])
    tokenizer = load(name if name.is_dir() else stream.data.local.parent / "tokenizer")
    check(tokenizer, stream.data.tokenizer)
    loader, total = cfg["train_loader"], total_tokens(cfg)
    collate = Collator(ObjectiveSchedule.parse(loader["objective"], total=total), TextVocab.from_tokenizer(tokenizer),
                       max_seq_len=stream.max_seq_len, seed=stream.order.seed,
                       mask_rate=MaskRate.parse(loader.get("mask_rate", 0.0), total=total))
    return collate(stream.rows_of(step, rank=rank, world_size=world_size))


def view_step(stream: RowStream, step: int, *, rows: int | None = None) -> StepView:
    """A step's counts and hash, and the documents of its first `rows` rows (all if not given)."""
    ids, first = special_ids(stream), stream.ramp.first_row(step)
    _open_shards(stream, first)
    read = stream.rows_of(step)
    ids_hash, tokens, filler = 0, 0, np.empty(stream.max_seq_len, np.int64)
    sequence_id = np.empty_like(filler)
    for row in read:
        filler.fill(ids["pad"])
        tokens += fill_row(filler, sequence_id, row.chunks, cls=ids["cls"], sep=ids["sep"])
        ids_hash += hash_row(filler, row.place)
    pieces = []
    for row in read[:rows]:
        _, shard, samples = stream.order.row(first + row.place)
        for sample, chunk in zip(samples, row.chunks):
            stored = stream.data.sample(shard, sample)
            pieces.append(Piece(row.place, len(chunk) + SPECIALS_PER_PIECE, stored["doc"], stored["part"],
                                bool(stored["last"]), stored["source"], chunk))
    return StepView(step, read[0].epoch, len(read), tokens, read[0].tokens_before, ids_hash % HASH_MODULUS, pieces)


def _open_shards(stream: RowStream, row: int) -> None:
    """Opens the shards that the rows around `row` are drawn from, several at a time: all of a shard is hashed and checked
    when it is opened, which would take most of the time of looking at one step, and does not hold Python's lock.
    """
    if stream.data.fetches:
        return  # rows_of has them fetched in the background
    shards = stream.order.shards_ahead(row)[:stream.order.shards_at_once]
    stream.data.prefetch(shards)  # so that none is closed before it is used
    stream.data.lengths(shards[0])
    with ThreadPoolExecutor() as pool:
        list(pool.map(stream.data.sample_lengths, shards))


def special_ids(stream: RowStream) -> dict[str, int]:
    """cls, sep and pad of the tokenizer that the set was made with, as its manifest states them.

    Raises:
        ValueError: it does not.
    """
    found = stream.data.tokenizer.get("special_ids") or {}
    if not all(isinstance(found.get(key), int) for key in ("cls", "sep", "pad")):
        raise ValueError(f"{stream.data.local / MANIFEST}: tokenizer.special_ids is {found!r}; cls, sep and pad are needed. "
                         "Fetch or convert the set again")
    return {key: found[key] for key in ("cls", "sep", "pad")}


def row_tokens(row: Row, ids: Mapping[str, int]) -> np.ndarray:
    """(n,) uint16: a row's real tokens, each piece BOS + chunk + EOS, before masking and without padding.

    Args:
        ids: from `special_ids`.
    """
    tokens = np.empty(sum(map(len, row.chunks)) + SPECIALS_PER_PIECE * len(row.chunks), np.uint16)
    fill_row(tokens, np.empty(tokens.shape, np.int64), row.chunks, cls=ids["cls"], sep=ids["sep"])
    return tokens


def is_past_end(cfg: Mapping[str, Any], view: StepView) -> bool:
    """Whether a run is over before it comes to a step."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    return (view.tokens_before if unit == "tok" else view.step) >= amount


def length_of_run(cfg: Mapping[str, Any], stream: RowStream) -> int:
    """Steps of a run: it ends with the first that reaches max_duration."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    if unit == "ba":
        return int(amount)
    if unit != "tok":
        raise ValueError(f"max_duration: {cfg['max_duration']!r} given; only tok and ba are possible. Give it in tokens")
    order = stream.order
    beyond = stream.ramp.step_at((int(amount) // order.tokens_per_epoch + 1) * order.rows_per_epoch) + 1
    return bisect.bisect_left(range(beyond), amount, key=stream.tokens_before)


def _elsewhere(dataset: Mapping[str, Any], location: str) -> dict[str, Any]:
    """A loader's dataset block with the set at another place; options of fetching go where nothing is fetched."""
    if is_url(location):
        return {**dataset, "remote": location}
    kept = {key: value for key, value in dataset.items() if key not in ("local", "remote", "cache_limit")}
    folder = Path(location)
    if (folder / MANIFEST).is_file():
        return {**kept, "local": str(folder.parent), "split": folder.name}
    return {**kept, "local": location}
