"""Writes what each step of a run reads as Parquet files of 100 steps, with the columns of jhu-clsp/ettin-data-order.

    python examples/data_order.py OUT STEPS RECIPE.yaml [OVERLAY.yaml ...] [KEY=VALUE ...]

input_ids (list of uint16) are a row's real tokens before masking. step (uint64) counts from 1, where steps.jsonl and
`ettin order --step` count from 0. A file gets its name when it is complete: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ettin_foundry.tools.order import stream_of
from ettin_foundry.training.run_config import resolved

STEPS_PER_FILE = 100


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what each step of a run reads, as Parquet")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("steps", type=int, help="number of steps, from the first on")
    parser.add_argument("recipe", nargs="+", help="YAML files and KEY=VALUE, as for train.py")
    given = parser.parse_args(arguments)

    stream = stream_of(resolved(given.recipe))
    begin, end = ([stream.data.tokenizer["special_ids"][key]] for key in ("cls", "sep"))
    schema = pa.schema([("input_ids", pa.list_(pa.uint16())), ("step", pa.uint64())])
    given.out.mkdir(parents=True, exist_ok=True)
    for first in range(0, given.steps, STEPS_PER_FILE):
        last = min(first + STEPS_PER_FILE, given.steps)
        path = given.out / f"steps_{first + 1:06d}_to_{last:06d}.parquet"
        if path.exists():
            continue
        with pq.ParquetWriter(path.with_suffix(".partial"), schema, compression="zstd") as writer:
            for step in range(first, last):
                rows = [np.concatenate([part for chunk in row.chunks for part in (begin, chunk, end)], dtype=np.uint16,
                                       casting="unsafe") for row in stream.rows_of(step)]
                writer.write_table(pa.table([rows, [step + 1] * len(rows)], schema=schema))
        path.with_suffix(".partial").rename(path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
