"""Writes the order of a run in the format of jhu-clsp/ettin-data-order: Parquet files with input_ids and step.

One folder for what was read between two checkpoints (checkpoint_000001; ext_, decay_ and cross_ in the later phases), in it
a file for every 100 steps, in it a row group for each step. input_ids (list of uint16) are a row's real tokens, BOS and EOS
included, before masking and without padding; step (uint64) counts from 1 in each phase, as the original's does, so step n is
the one that steps.jsonl and `--step` call n - 1. A file gets its name when it is whole, so an export that was stopped goes
on with the next file.
"""

from __future__ import annotations

import bisect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.stream import RowStream
from ettin_foundry.tools.order import length_of_run, row_tokens, special_ids
from ettin_foundry.training.run_config import parse_time

__all__ = ["ORDER_FILE", "Part", "export_order", "parts_of"]

ORDER_FILE = "order.json"
STEPS_PER_FILE = 100

_PREFIXES = {"pretrain": "checkpoint", "extend": "ext"}  # the other phases are called by their name
_ZSTD_LEVEL = 3
_NAME = re.compile(r"[a-z0-9_]+_\d{6,}/steps_\d{6,}_to_\d{6,}\.parquet")
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Part:
    """One file: the steps from `begin` to `end` - 1, counted from 0, between the checkpoints number - 1 and number."""

    number: int
    begin: int
    end: int

    def path(self, prefix: str) -> str:
        """Relative to the export's folder."""
        return f"{prefix}_{self.number:06d}/steps_{self.begin + 1:06d}_to_{self.end:06d}.parquet"


def export_order(cfg: Mapping[str, Any], stream: RowStream, out: str | os.PathLike[str], *, first: int = 0,
                 last: int | None = None, tick: Callable[[int, int], None] = lambda done, total: None) -> tuple[int, int]:
    """Writes the steps `first` to `last` - 1 of a run (to its end if not given); whole files that are there are kept.

    Args:
        cfg: the run's resolved config. stream: its rows.
        out: a folder that is new, empty, or holds a part of this very export.
        tick: told the steps done and to do.

    Returns:
        (files of the export, files written now).

    Raises:
        ValueError: the range is empty or beyond the run, the checkpoints do not follow from the data, or `out` holds
            something else.
    """
    end = length_of_run(cfg, stream)
    last = end if last is None else last
    if not 0 <= first < last <= end:
        raise ValueError(f"--from, --to: {first} and {last} given; the run has the steps 0 to {end - 1}, and --to is the "
                         "first that is not written. Correct them")
    out, phase = Path(out), (cfg.get("variables") or {}).get("phase") or "pretrain"
    prefix, interval = _PREFIXES.get(phase, phase), cfg.get("save_interval") or "1000ba"  # the host's default
    _clock(stream, interval)  # refuses another kind of interval before anything is written
    _prepare(out, {"format": "ettin-order", "version": 1, "phase": phase, "save_interval": interval, "steps": [first, last],
                   "batches": str(stream.ramp), "special_ids": special_ids(stream), **stream.identity()})
    files = written = 0
    for part in parts_of(stream, interval, first, last):
        path = out / part.path(prefix)
        if not _is_whole(path, stream.ramp.first_row(part.end) - stream.ramp.first_row(part.begin)):
            _write(path, stream, part, lambda step: tick(step - first, last - first))
            written += 1
        files += 1
        tick(part.end - first, last - first)
    return files, written


def parts_of(stream: RowStream, interval: Any, first: int, last: int) -> Iterator[Part]:
    """The files of the steps `first` to `last` - 1: cut where a checkpoint is saved, and every 100 steps from there.

    A checkpoint is saved after the first step whose end has passed a multiple of the interval, as Composer does it.

    Raises:
        ValueError: the interval is not in tok, ba or sp.
    """
    clock, most, amount = _clock(stream, interval)

    def passed(step: int) -> int:
        return int(clock(step) // amount)

    def border(step: int, beyond: int) -> int:
        """The first step after `step` that begins with another checkpoint behind it; `beyond` if none up to there."""
        before = passed(step)
        return bisect.bisect_left(range(beyond), True, lo=step + 1, key=lambda s: passed(s) > before)

    # a step of less than an interval passes one multiple at most, so that multiples and checkpoints are the same number
    number = passed(first) if most <= amount else sum(passed(s + 1) > passed(s) for s in range(first))
    begin = bisect.bisect_left(range(first + 1), passed(first), key=passed)  # where its folder begins
    while begin < last:
        end = border(begin, begin + STEPS_PER_FILE)
        if end > first:
            yield Part(number + 1, max(begin, first), min(end, last))
        if end < last and passed(end) > passed(begin):
            number += 1
        begin = end


def _clock(stream: RowStream, interval: Any) -> tuple[Callable[[int], int], int, float]:
    """(what the interval's clock shows before a step, the most that one step adds, the interval)."""
    amount, unit = parse_time("save_interval", interval)
    clocks: dict[str, tuple[Callable[[int], int], int]] = {
        "tok": (stream.tokens_before, stream.ramp.max_size * stream.max_seq_len),
        "ba": (lambda step: step, 1), "sp": (stream.ramp.first_row, stream.ramp.max_size)}
    if unit not in clocks or amount < 1:
        raise ValueError(f"save_interval: {interval!r} given; folders are what lies between two checkpoints, and only in "
                         "tok, ba and sp do these follow from the data. Give the interval in one of them")
    return *clocks[unit], amount


def _prepare(out: Path, order: Mapping[str, Any]) -> None:
    """Refuses a folder that holds anything but this export; of a new one, writes down what it will hold."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--export: {str(out)!r} is a file; a folder is needed. Name another")
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()) if out.is_dir() else []
    if not names:
        out.mkdir(parents=True, exist_ok=True)
        (out / ORDER_FILE).write_text(json.dumps(order, indent=1) + "\n")
        return
    strange = [n for n in names if n != ORDER_FILE and not _NAME.fullmatch(n.removesuffix(_PARTIAL))]
    if strange or ORDER_FILE not in names:
        what = repr(strange[0]) if strange else f"no {ORDER_FILE}"
        raise ValueError(f"--export: {str(out)!r} holds {what}; a new or empty folder is needed, or one with a part of this "
                         "export and nothing else. Name another")
    try:
        found = dict(json.loads((out / ORDER_FILE).read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{out / ORDER_FILE}: not what an export wrote; it says whose order is there. Name another folder "
                         "with --export") from None
    for key in {**found, **order}:
        if found.get(key) != order.get(key):
            raise ValueError(f"--export: {str(out)!r} holds an order with {key} {found.get(key)!r}, and this one has "
                             f"{order.get(key)!r}; only the same can go on there. Name another folder")


def _is_whole(path: Path, rows: int) -> bool:
    """Whether a file of the export is there with all its rows; one cut short by a crash of the machine is not."""
    import pyarrow
    from pyarrow.parquet import read_metadata

    try:
        return path.is_file() and read_metadata(path).num_rows == rows
    except (pyarrow.ArrowException, OSError):
        return False


def _write(path: Path, stream: RowStream, part: Part, tick: Callable[[int], None]) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("step", pa.uint64())],
                       metadata={"sequence_length": str(stream.max_seq_len)})
    ids_of = special_ids(stream)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    with ParquetWriter(partial, schema, compression="zstd", compression_level=_ZSTD_LEVEL) as writer:
        for step in range(part.begin, part.end):
            rows = [row_tokens(row, ids_of) for row in stream.rows_of(step)]
            offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
            ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)))
            steps = pa.array(np.full(len(rows), step + 1, np.uint64))
            writer.write_table(pa.table([ids, steps], schema=schema))
            tick(step + 1)
    partial.replace(path)
