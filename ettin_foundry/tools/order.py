"""`ettin order`: what any step of a run reads. Nothing is replayed: a late step takes as long as the first."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ettin_foundry.data.inspect import load_decoder, render
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.storage import open_storage
from ettin_foundry.data.stream import HASH_MODULUS, Row, RowStream, check_warmup, fill_row, hash_row, open_stream
from ettin_foundry.training.run_config import parse_time, total_tokens


def stream_of(cfg: Mapping[str, Any]) -> RowStream:
    """The rows that a run with this config reads."""
    loader, rows = cfg.get("train_loader") or {}, cfg.get("global_train_batch_size")
    if loader.get("name") != "ettin_text":
        raise ValueError(f"train_loader.name must be ettin_text, got {loader.get('name')!r}")
    if type(rows) is not int or rows < 1:
        raise ValueError(f"global_train_batch_size must be an integer >= 1, got {rows!r}")
    asked = inspect.signature(open_stream).parameters
    keys = {key: loader[key] for key in asked if loader.get(key) is not None}
    if "batch_size_warmup" in keys:
        keys["batch_size_warmup"] = check_warmup(keys["batch_size_warmup"], rows, total=total_tokens(cfg))
    return open_stream(**keys, global_batch_size=rows)


def next_step(checkpoint: Path) -> tuple[dict[str, Any], RowStream, int]:
    """Config, rows and next step of the run that saved a checkpoint: a .pt file, or the newest of a save folder."""
    from ettin_foundry.training.checkpoints import read_head  # torch

    head = read_head(checkpoint)
    if not head.record.get("run_config") or not head.data:
        raise ValueError(f"{head.path} must be of a run with ettin_text, got one without config or place in the data")
    cfg = json.loads(head.record["run_config"])
    stream = stream_of(cfg)
    stream.load_state_dict(head.data)
    return cfg, stream, stream.ramp.step_of(stream.start_row)


class StepView(NamedTuple):
    """A step of a stream, over all ranks."""

    rows: list[Row]
    num_tokens: int  # real tokens of the step, BOS and EOS included
    ids_hash: int  # as in steps.jsonl
    samples: list[list[dict[str, Any]]]  # all columns of the chunks of its first rows


def view_step(stream: RowStream, step: int, *, rows: int | None = None) -> StepView:
    """A step's rows and hash, and the stored chunks of its first `rows` rows (all if not given)."""
    first, special = stream.ramp.first_row(step), stream.data.tokenizer["special_ids"]
    read, num_tokens, ids_hash = stream.rows_of(step), 0, 0
    for row in read:
        ids, pieces = np.full((2, stream.max_seq_len), special["pad"], np.int64)
        fill_row(ids, pieces, row, cls=special["cls"], sep=special["sep"])
        ids_hash += hash_row(ids, row.place)
        num_tokens += sum(len(chunk) + SPECIALS_PER_PIECE for chunk in row.chunks)
    addresses = [stream.order.row(first + row.place)[1:] for row in read[:rows]]
    samples = [[stream.data.sample(shard, sample) for sample in samples] for shard, samples in addresses]
    return StepView(read, num_tokens, ids_hash % HASH_MODULUS, samples)


def text(cfg: Mapping[str, Any], stream: RowStream, step: int, *, rows: int, decode: bool) -> str:
    """What a step reads: of its first `rows` rows each chunk, and how it begins if `decode`."""
    folder = stream.data.local.parent
    decoder = load_decoder(open_storage(str(folder))) if decode else None
    if decode and decoder is None:
        raise ValueError(f"--decode needs the tokenizer/ of the dataset, got {folder} without one")
    view, (amount, unit) = view_step(stream, step, rows=rows), parse_time("max_duration", cfg["max_duration"])
    is_over = (view.rows[0].tokens_before if unit == "tok" else step) >= amount
    return render(Path(__file__).with_name("order.txt.jinja"), cfg=cfg, step=step, view=view, decoder=decoder,
                  is_over=is_over, specials=SPECIALS_PER_PIECE)
