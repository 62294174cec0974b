"""`ettin order`: what any step of a run reads, and the order of a run as Parquet files.

Nothing is replayed: a step late in a run takes as long as the first.

The files have the format of jhu-clsp/ettin-data-order: a folder for what was read between two checkpoints
(checkpoint_000001; ext_, decay_ and cross_ in the later phases), in it a file for every 100 steps, in it a row group
for each step. input_ids (list of uint16) are a row's real tokens before masking; step (uint64) counts from 1, where
steps.jsonl and `--step` count from 0. A file gets its name when it is complete: a stopped export goes on with the next.
"""

from __future__ import annotations

import bisect
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ettin_foundry.data import MANIFEST
from ettin_foundry.data.storage import is_url
from ettin_foundry.data.stream import HASH_MODULUS, Row, RowStream, check_warmup, hash_row, open_stream
from ettin_foundry.training.run_config import parse_time, total_tokens

STEPS_PER_FILE = 100
_PREFIXES = {"pretrain": "checkpoint", "extend": "ext"}  # the other phases are called by their name


def stream_of(cfg: Mapping[str, Any], location: str | None = None) -> RowStream:
    """The rows that a run with this config reads; `location`: another folder or URL of its dataset or split."""
    loader, rows = cfg.get("train_loader") or {}, cfg.get("global_train_batch_size")
    if loader.get("name") != "ettin_text":
        raise ValueError(f"train_loader.name must be ettin_text, got {loader.get('name')!r}")
    if type(rows) is not int or rows < 1:
        raise ValueError(f"global_train_batch_size must be an integer >= 1, got {rows!r}")
    asked = inspect.signature(open_stream).parameters
    keys = {key: loader[key] for key in asked if loader.get(key) is not None}
    if "batch_size_warmup" in keys:
        tokens = check_warmup(keys["batch_size_warmup"], rows, total=total_tokens(dict(cfg)))
        keys["batch_size_warmup"] = {**keys["batch_size_warmup"], "tokens": tokens}
    if location is not None and is_url(location):
        keys["dataset"] = {**keys["dataset"], "remote": location}
    elif location is not None:
        folder, is_split = Path(location), (Path(location) / MANIFEST).is_file()
        split = folder.name if is_split else keys["dataset"]["split"]
        keys["dataset"] = {"local": str(folder.parent if is_split else folder), "split": split}
    return open_stream(**keys, global_batch_size=rows)


def next_step(checkpoint: Path, location: str | None = None) -> tuple[dict[str, Any], RowStream, int]:
    """Config, rows and next step of the run that saved a checkpoint: a .pt file, or the newest of a save folder."""
    from ettin_foundry.training.checkpoints import read_head  # torch

    head = read_head(checkpoint)
    if not head.record.get("run_config") or not head.data:
        raise ValueError(f"{head.path} must be of a run with ettin_text, got one without config or place in the data")
    cfg = json.loads(head.record["run_config"])
    stream = stream_of(cfg, location)
    stream.load_state_dict(head.data)
    return cfg, stream, stream.start_step


class StepView(NamedTuple):
    """A step of a stream, over all ranks."""

    rows: list[Row]
    num_tokens: int  # real tokens of the step, BOS and EOS included
    ids_hash: int  # as in steps.jsonl
    samples: list[list[dict[str, Any]]]  # all columns of the chunks of its first rows


def view_step(stream: RowStream, step: int, *, rows: int | None = None) -> StepView:
    """A step's rows and hash, and the stored chunks of its first `rows` rows (all if not given)."""
    first = stream.ramp.first_row(step)
    if not stream.data.fetches:
        # opening a shard, which hashes it, takes most of the time: several at a time
        shards = stream.order.shards_ahead(first)[:stream.order.shards_at_once]
        stream.data.prefetch(shards)  # so that none is closed before it is used
        stream.data.lengths(shards[0])  # the one file of all shards
        with ThreadPoolExecutor() as pool:
            list(pool.map(stream.data.sample_lengths, shards))
    read, num_tokens, ids_hash = stream.rows_of(step), 0, 0
    for row in read:
        tokens = _row_tokens(row, stream)
        num_tokens += len(tokens)
        padding = (0, stream.max_seq_len - len(tokens))
        ids_hash += hash_row(np.pad(tokens, padding, constant_values=_special_ids(stream)["pad"]), row.place)
    addresses = [stream.order.row(first + row.place)[1:] for row in read[:rows]]
    samples = [[stream.data.sample(shard, sample) for sample in samples] for shard, samples in addresses]
    return StepView(read, num_tokens, ids_hash % HASH_MODULUS, samples)


def _special_ids(stream: RowStream) -> dict[str, int]:
    """cls, sep and pad of the tokenizer that the dataset was made with."""
    return {key: stream.data.tokenizer["special_ids"][key] for key in ("cls", "sep", "pad")}


def _row_tokens(row: Row, stream: RowStream) -> np.ndarray:
    """(n,) uint16: a row's real tokens, each piece BOS + chunk + EOS, before masking and without padding."""
    special = _special_ids(stream)
    parts = [part for chunk in row.chunks for part in ([special["cls"]], chunk, [special["sep"]])]
    return np.concatenate(parts, dtype=np.uint16, casting="unsafe")


def steps_of_run(cfg: Mapping[str, Any], stream: RowStream, first: int = 0, last: int | None = None) -> range:
    """The steps `first` to `last` - 1 of a run, or to its end: the first step that reaches max_duration."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    if unit not in ("tok", "ba"):
        raise ValueError(f"max_duration must be in tok or ba, got {cfg['max_duration']!r}")
    beyond = (int(amount) // stream.order.tokens_per_epoch + 1) * stream.order.rows_per_epoch
    steps = range(stream.ramp.step_at(beyond) + 1)
    end = int(amount) if unit == "ba" else bisect.bisect_left(steps, amount, key=stream.tokens_before)
    last = end if last is None else last
    if not 0 <= first < last <= end:
        raise ValueError(f"--from must be below --to, and --to at most {end}, got {first} and {last}")
    return range(first, last)


def export_order(cfg: Mapping[str, Any], stream: RowStream, out: Path, steps: range) -> Iterator[int]:
    """Writes steps of a run, yielding each, into a folder that is new or holds a part of this very export."""
    phase = (cfg.get("variables") or {}).get("phase") or "pretrain"
    prefix, interval = _PREFIXES.get(phase, phase), cfg.get("save_interval") or "1000ba"  # Composer's default
    files = files_of(stream, interval, steps)
    order = {"format": "ettin-order", "version": 1, "phase": phase, "save_interval": interval,
             "steps": [steps.start, steps.stop], "batches": str(stream.ramp), "special_ids": _special_ids(stream),
             **stream.identity()}
    if not any(out.glob("*")):
        out.mkdir(parents=True, exist_ok=True)
        (out / "order.json").write_text(json.dumps(order, indent=1) + "\n")
    elif not (out / "order.json").is_file() or json.loads((out / "order.json").read_text()) != order:
        raise ValueError(f"--export must be a new folder or hold a part of this export, got {str(out)!r}")
    for number, part in files:
        path = out / f"{prefix}_{number:06d}" / f"steps_{part.start + 1:06d}_to_{part.stop:06d}.parquet"
        complete = _is_complete(path, stream.ramp.first_row(part.stop) - stream.ramp.first_row(part.start))
        yield from part if complete else _write(path, stream, part)


def files_of(stream: RowStream, interval: Any, steps: range) -> Iterator[tuple[int, range]]:
    """(number of the checkpoint that comes after them, steps) of each file.

    Cut where a checkpoint is saved, and every 100 steps from there. A checkpoint is saved after the first step whose
    end has passed a multiple of the interval, as Composer does it.
    """
    (amount, unit), rows = parse_time("save_interval", interval), stream.ramp.max_size
    clocks: dict[str, tuple[Callable[[int], int], int]] = {  # by unit; with the most that one step adds
        "tok": (stream.tokens_before, rows * stream.max_seq_len), "ba": (int, 1), "sp": (stream.ramp.first_row, rows)}
    if unit not in clocks or amount < 1:
        raise ValueError(f"save_interval must be in tok, ba or sp, got {interval!r}")
    clock, most = clocks[unit]
    return _cut(lambda step: int(clock(step) // amount), most <= amount, steps)


def _cut(passed: Callable[[int], int], one_at_most: bool, steps: range) -> Iterator[tuple[int, range]]:
    """`files_of`, by the multiples of the interval that are passed before a step."""
    first, last = steps.start, steps.stop
    number = passed(first) if one_at_most else sum(passed(s + 1) > passed(s) for s in range(first))
    begin = bisect.bisect_left(range(first + 1), passed(first), key=passed)  # where its folder begins
    while begin < last:
        # up to the first step that begins with another checkpoint behind it
        end = bisect.bisect_right(range(begin + STEPS_PER_FILE), passed(begin), lo=begin + 1, key=passed)
        if end > first:
            yield number + 1, range(max(begin, first), min(end, last))
        number += passed(end) > passed(begin)
        begin = end


def _is_complete(path: Path, rows: int) -> bool:
    """Whether a file is there with all its rows; one cut short by a crash of the machine is not."""
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        return path.is_file() and read_metadata(path).num_rows == rows
    except (pyarrow.ArrowException, OSError):
        return False


def _write(path: Path, stream: RowStream, steps: range) -> Iterator[int]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("step", pa.uint64())],
                       metadata={"sequence_length": str(stream.max_seq_len)})
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with ParquetWriter(partial, schema, compression="zstd", compression_level=3) as writer:
        for step in steps:
            rows = [_row_tokens(row, stream) for row in stream.rows_of(step)]
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
            ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
            numbers = pa.array(np.full(len(rows), step + 1, np.uint64))
            writer.write_table(pa.table([ids, numbers], schema=schema))
            yield step
    partial.replace(path)
