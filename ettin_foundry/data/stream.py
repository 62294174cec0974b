"""Which rows a step reads, and a row before it is masked: its chunks, its ids, its hash.

`order.py` says which chunks form row n of the stream, `ramp.py` which rows form a step; here both meet the
data. Every step is a pure function of (data, seed, batch sizes), so the only state is the number of rows
consumed. Numpy
only: what tells of the order (tools/order.py) waits for neither torch nor LLM-Foundry. Ranks and workers are
put on top in loader.py; masks, labels and tensors are made in batch.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ettin_foundry.data.mixture import MixtureSplit, open_split
from ettin_foundry.data.order import ORDER_VERSION, Order
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, too_long
from ettin_foundry.data.ramp import BatchRamp
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import join

__all__ = ["DATASET_KEYS", "DEFAULT_WINDOW", "HASH_MODULUS", "STREAM_KEYS", "Row", "RowStream",
           "check_values", "fill_row", "hash_row", "open_stream"]

HASH_MODULUS = 2**48  # a float64, as loggers take, holds it exactly
STREAM_KEYS = ("dataset", "max_seq_len", "packing", "shuffle", "shuffle_seed", "shuffle_window",
               "batch_size_warmup")
"""The loader's keys that decide which rows a step has, and what is in them before masking."""
DATASET_KEYS = ("local", "split", "remote", "cache_limit")
"""Keys of a loader's dataset block; the first two are needed."""
DEFAULT_WINDOW = 16
"""Shards whose rows are mixed; with the usual 64 MB shards about half a billion tokens."""

_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# of the loader's numbers; its other keys are switches
_LEAST = {"device_batch_size": 1, "max_seq_len": SPECIALS_PER_PIECE + 1, "shuffle_seed": 0,
          "shuffle_window": 1, "num_workers": 0, "prefetch_factor": 1, "timeout": 0}


class Row(NamedTuple):
    """One row before its tensors are made. An empty row (no chunks) fills the last batch of an evaluation."""

    epoch: int
    number: int  # of the row in its epoch; with seed and epoch it seeds the row's masks
    step: int
    tokens_before: int  # real tokens of the stream before the global batch
    place: int  # of the row in the global batch
    chunks: Sequence[np.ndarray]  # P arrays (L,) uint16, no special ids
    ends_document: np.ndarray  # (P,) bool


def fill_row(ids: np.ndarray, sequence_id: np.ndarray, chunks: Sequence[np.ndarray], *, cls: int,
             sep: int) -> int:
    """Writes a row's pieces, each BOS + chunk + EOS, into (T,) ids, and their numbers into (T,) sequence_id.

    Returns the row's real tokens; what lies behind them in both arrays is left as it was.
    """
    begin = 0
    for piece, chunk in enumerate(chunks):
        end = begin + len(chunk) + SPECIALS_PER_PIECE
        ids[begin] = cls
        ids[begin + 1:end - 1] = chunk
        ids[end - 1] = sep
        sequence_id[begin:end] = piece
        begin = end
    return begin


def hash_row(ids: np.ndarray, place: int) -> int:
    """48 bits of a row's (T,) int64 ids before masking, padding included, and its place in the global
    batch."""
    content = np.ascontiguousarray(ids, "<i8").data
    digest = hashlib.blake2b(content, digest_size=6, salt=place.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


class RowStream:
    """The rows of a split, step by step: endless where the order is shuffled, else one epoch.

    Args:
        data: the opened split. order: of it. ramp: the rows of each step.

    Attributes:
        start_row: the row of the stream that reading begins with; after a resume, the checkpoint's.
    """

    def __init__(self, data: MDSSplit | MixtureSplit, order: Order, ramp: BatchRamp) -> None:
        self.data, self.order, self.ramp = data, order, ramp
        self.max_seq_len, self.start_row = order.max_seq_len, 0

    @property
    def num_steps(self) -> int | None:
        """Steps of the one epoch without shuffle, empty rows at its end included; None of an endless
        stream."""
        return None if self.order.shuffle else -(-self.order.rows_per_epoch // self.ramp.max_size)

    @property
    def start_step(self) -> int:
        """The step that begins with `start_row`."""
        return self.ramp.step_of(self.start_row)

    def tokens_before(self, step: int) -> int:
        """Real tokens (BOS and EOS included, padding not) of all steps before this one."""
        return self.order.tokens_before(self.ramp.first_row(step))

    def rows_of(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[Row]:
        """The rank's contiguous share of a step's rows; also announces the shards that come next."""
        first, number = self.ramp.first_row(step), self.ramp.rows(step) // world_size
        begin = first + rank * number
        tokens_before = self.order.tokens_before(first)
        self.data.prefetch(self.order.shards_ahead(begin))
        return [self._row(row, step, tokens_before, row - first) for row in range(begin, begin + number)]

    def _row(self, number: int, step: int, tokens_before: int, place: int) -> Row:
        in_epoch = number % self.order.rows_per_epoch
        if not self.order.shuffle and number >= self.order.rows_per_epoch:
            return Row(0, in_epoch, step, tokens_before, place, (), np.zeros(0, bool))
        epoch, shard, samples = self.order.row(number)
        chunks = [self.data.chunk(shard, sample) for sample in samples]
        return Row(epoch, in_epoch, step, tokens_before, place, chunks, self.data.last(shard)[list(samples)])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint holds of the data: where the stream is, and what it is a stream of.

        Args:
            num_samples: rows consumed by all ranks, as Composer counts them.
            from_beginning: counted from row 0, not from where this process resumed.
        """
        return {"rows": num_samples if from_beginning else self.start_row + num_samples, **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's row, with any number of ranks and workers.

        Raises:
            ValueError: the checkpoint's rows are of other data, another order or other batch sizes.
        """
        rows = state.get("rows") if isinstance(state, Mapping) else None
        if not isinstance(rows, int) or rows < 0:
            raise ValueError(f"checkpoint must hold a dataset state written by ettin_text, got {state!r}; "
                             "load only the weights (load_weights_only: true)")
        for key, mine in self.identity().items():
            if state.get(key) != mine:
                names = {"fingerprint": "dataset (its fingerprint)", "order": "order (its version)"}
                raise ValueError(f"train_loader.{names.get(key, key)} must be what the checkpoint was "
                                 f"trained with, {state.get(key)!r}, got {mine!r}; restore it, or load only "
                                 "the weights (load_weights_only: true)")
        self.ramp.step_of(rows)  # refuses a row that no step of these sizes begins with
        self.start_row = rows

    def identity(self) -> dict[str, Any]:
        """What decides the rows, as plain values; the same in two runs whose steps read the same rows."""
        return {"fingerprint": self.data.fingerprint, "order": ORDER_VERSION, "max_seq_len": self.max_seq_len,
                "packing": self.order.packing, "shuffle": self.order.shuffle, "shuffle_seed": self.order.seed,
                "shuffle_window": self.order.window,
                # a plain text: sharded checkpoints would flatten a block into keys of its own
                "batch_size_warmup": None if self.ramp.min_size == self.ramp.max_size else str(self.ramp)}


def open_stream(*, dataset: Mapping[str, Any], max_seq_len: int, global_batch_size: int, packing: bool = True,
                shuffle: bool = True, shuffle_seed: int = 21, shuffle_window: int | None = None,
                batch_size_warmup: Mapping[str, Any] | None = None) -> RowStream:
    """Opens a split and its order; the keys are those of `loader.build_ettin_loader`, described there.

    Raises:
        ValueError, FileNotFoundError: a key is out of range or without effect, or the data does not fit.
    """
    check_values(max_seq_len=max_seq_len, shuffle_seed=shuffle_seed, packing=packing, shuffle=shuffle)
    if shuffle_window is not None:
        check_values(shuffle_window=shuffle_window)
    for key, value in (("shuffle_window", shuffle_window), ("batch_size_warmup", batch_size_warmup)):
        if not shuffle and value is not None:
            raise ValueError(f"{key} must be left out with shuffle: false, where it does nothing, got "
                             f"{value}")
    window = DEFAULT_WINDOW if shuffle_window is None else shuffle_window
    data = _open(dataset, max_open=max(32, 2 * window))
    if data.chunk_length + SPECIALS_PER_PIECE > max_seq_len:  # an upper bound only; the histograms tell
        longest = max(int(np.flatnonzero(data.lengths(shard))[-1]) for shard in range(data.num_shards))
        if longest + SPECIALS_PER_PIECE > max_seq_len:
            raise too_long(longest, max_seq_len)
    order = Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=shuffle_seed, window=window)
    data.check_room(order.shards_ahead(0))  # nowhere are they more
    ramp = BatchRamp.build(batch_size_warmup, max_size=global_batch_size,
                           tokens_per_row=order.tokens_per_epoch / order.rows_per_epoch)
    return RowStream(data, order, ramp)


def check_values(**values: Any) -> None:
    """Checks keys of the loader that are numbers or switches.

    Raises:
        ValueError: a value is not true or false, not an integer (of timeout: a number), or too small.
    """
    for key, value in values.items():
        if key not in _LEAST:
            right, kind = isinstance(value, bool), "true or false"
        else:
            # LLM-Foundry computes device_batch_size by a division, which may leave 8.0
            number = (int, float) if key in ("device_batch_size", "timeout") else int
            right = isinstance(value, number) and not isinstance(value, bool) and value >= _LEAST[key]
            right = right and (key == "timeout" or value % 1 == 0)
            kind = f"{'a number' if key == 'timeout' else 'an integer'} >= {_LEAST[key]}"
        if not right:
            raise ValueError(f"{key} must be {kind}, got {value!r}")


def _open(dataset: Any, max_open: int) -> MDSSplit | MixtureSplit:
    """The split that a loader's dataset block names."""
    if not isinstance(dataset, Mapping) or not {"local", "split"} <= set(dataset) <= set(DATASET_KEYS):
        given = sorted(dataset) if isinstance(dataset, Mapping) else repr(dataset)
        raise ValueError("dataset must have the keys local (folder of the dataset) and split (train or "
                         f"validation), and may have {' and '.join(DATASET_KEYS[2:])}, got {given}")
    local, split, remote = dataset["local"], dataset["split"], dataset.get("remote")
    for key, value in (("local", local), ("split", split), ("remote", remote)):
        if not (isinstance(value, str) and value or key == "remote" and value is None):
            raise ValueError(f"dataset.{key} must be a text, got {value!r}")
    if not _SPLIT.fullmatch(split):
        raise ValueError(f"dataset.split must be the name of a folder in dataset.local, got {split!r}")
    options = {} if dataset.get("cache_limit") is None else {"cache_limit": dataset["cache_limit"]}
    if remote is not None:
        return open_split(Path(local, split), max_open=max_open, remote=join(remote, split), **options)
    splits = sorted(folder.parent.name for folder in Path(local).glob("*/manifest.json"))
    if split not in splits:
        raise FileNotFoundError("dataset.split must be one of the complete splits in dataset.local, "
                                f"{local!r} ({', '.join(splits) or 'there is none'}), got {split!r}; make it "
                                "with data_prep/convert.py, or correct the keys")
    return open_split(Path(local, split), max_open=max_open, **options)
