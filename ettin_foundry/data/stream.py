"""Which rows a step reads, and a row before it is masked: its chunks, its ids, its hash.

`order.py` says which chunks form row n of the stream, `ramp.py` which rows form a step; here both meet the data. Every step
is a pure function of (data, seed, batch sizes), so there is no state but the number of rows consumed. Numpy only: what
tells of the order (order_view.py, order_export.py) waits for neither torch nor the host. The training loader, which puts
ranks and workers on top, is in data.py; masks, labels and tensors are made in batches.py.
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
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.ramp import BatchRamp
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import join
from ettin_foundry.training.keys import DATASET_KEYS

__all__ = ["HASH_MODULUS", "STREAM_KEYS", "Row", "RowStream", "check_choices", "check_numbers", "fill_row", "hash_row",
           "open_stream"]

HASH_MODULUS = 2**48  # a float64, as loggers take, holds it exactly
STREAM_KEYS = ("dataset", "max_seq_len", "packing", "shuffle", "shuffle_seed", "shuffle_window", "batch_size_warmup")
"""The loader's keys that decide which rows a step has, and what is in them before masking."""

_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
DEFAULT_WINDOW = 16
"""Shards whose rows are mixed; with the usual 64 MB shards about half a billion tokens."""


class Row(NamedTuple):
    """One row before its tensors are made. An empty row (no chunks) fills the last batch of an evaluation."""

    epoch: int
    number: int  # of the row in its epoch; with seed and epoch it seeds the row's masks
    step: int
    tokens_before: int  # real tokens of the stream before the global batch
    place: int  # of the row in the global batch
    chunks: Sequence[np.ndarray]  # P arrays (L,) uint16, no special ids
    ends_document: np.ndarray  # (P,) bool


def fill_row(ids: np.ndarray, sequence_id: np.ndarray, chunks: Sequence[np.ndarray], *, cls: int, sep: int) -> int:
    """Writes a row's pieces, each BOS + chunk + EOS, into (T,) ids, and their numbers into (T,) sequence_id.

    Returns:
        The row's real tokens; what lies behind them in both arrays is left as it was.
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
    """48 bits of a row: (T,) int64 ids before masking, padding included, and its place in the global batch."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").data, digest_size=6, salt=place.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


class RowStream:
    """The rows of a stream, step by step, of all ranks or of one: endless where the order is shuffled, else one epoch.

    Args:
        data: the opened split.
        order: its order; the two are kept together so that a row's address and its chunks match.
        ramp: the rows of each step.

    Attributes:
        start_row: the row of the stream that reading begins with; after a resume, the checkpoint's.
    """

    def __init__(self, data: MDSSplit | MixtureSplit, order: Order, ramp: BatchRamp) -> None:
        self.data, self.order, self.ramp = data, order, ramp
        self.start_row = 0

    @property
    def max_seq_len(self) -> int:
        return self.order.max_seq_len

    @property
    def num_steps(self) -> int | None:
        """Steps of one epoch in stored order, empty rows at the end included; None where the stream is endless."""
        return None if self.order.shuffle else -(-self.order.rows_per_epoch // self.ramp.max_size)

    @property
    def start_step(self) -> int:
        """The step that begins with `start_row`."""
        return self.ramp.step_of(self.start_row)

    def tokens_before(self, step: int) -> int:
        """Real tokens (BOS and EOS included, padding not) of all steps before this one."""
        return self.order.tokens_before(self.ramp.first_row(step))

    def rows_of(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[Row]:
        """A step's rows: the rank's contiguous share of them, in order. Also announces the shards that come next."""
        first, number = self.ramp.first_row(step), self.ramp.rows(step) // world_size
        begin = first + rank * number
        tokens_before = self.order.tokens_before(first)
        self.data.prefetch(self.order.shards_ahead(begin))
        return [self._row(row, step, tokens_before, row - first) for row in range(begin, begin + number)]

    def _row(self, number: int, step: int, tokens_before: int, place: int) -> Row:
        of_epoch = number % self.order.rows_per_epoch
        if not self.order.shuffle and number >= self.order.rows_per_epoch:
            return Row(0, of_epoch, step, tokens_before, place, (), np.zeros(0, bool))
        epoch, shard, samples = self.order.row(number)
        chunks = [self.data.chunk(shard, sample) for sample in samples]
        return Row(epoch, of_epoch, step, tokens_before, place, chunks, self.data.last(shard)[list(samples)])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint holds of the data: where the stream is, and what it is a stream of.

        Args:
            num_samples: rows consumed by all ranks, as the host counts them.
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
            raise ValueError(f"checkpoint: its dataset state is {state!r}; one written by ettin_text is needed. Load "
                             "only the weights (load_weights_only: true) to start on new data")
        for key, mine in self.identity().items():
            if state.get(key) != mine:
                where = {"fingerprint": "dataset (fingerprint of its manifest)",
                         "order": "order (its version in this program)"}.get(key, key)
                raise ValueError(f"train_loader.{where}: {mine!r} given, the checkpoint was trained with "
                                 f"{state.get(key)!r}; they must be equal, or rows would be skipped or repeated. Restore "
                                 "the setting, or load only the weights (load_weights_only: true) to start anew")
        self.ramp.step_of(rows)  # refuses a row that no step of these sizes begins with
        self.start_row = rows

    def identity(self) -> dict[str, Any]:
        """What decides the rows, as plain values; the same in two runs whose steps read the same rows."""
        return {"fingerprint": self.data.fingerprint, "order": ORDER_VERSION, "max_seq_len": self.order.max_seq_len,
                "packing": self.order.packing, "shuffle": self.order.shuffle, "shuffle_seed": self.order.seed,
                "shuffle_window": self.order.window,
                # a plain text: sharded checkpoints would flatten a block into keys of its own
                "batch_size_warmup": None if self.ramp.min_size == self.ramp.max_size else str(self.ramp)}


def open_stream(*, dataset: Mapping[str, Any], max_seq_len: int, global_batch_size: int, packing: bool = True,
                shuffle: bool = True, shuffle_seed: int = 21, shuffle_window: int | None = None,
                batch_size_warmup: Mapping[str, Any] | None = None) -> RowStream:
    """Opens a split and its order as the keys of a loader say; they are described at `data.build_ettin_loader`.

    Raises:
        ValueError, FileNotFoundError: a key is out of range or without effect, or the data does not fit.
    """
    _check_dataset(dataset)
    check_numbers(max_seq_len=max_seq_len, shuffle_seed=shuffle_seed)
    check_choices(packing=packing, shuffle=shuffle)
    if shuffle_window is not None:
        check_numbers(shuffle_window=shuffle_window)
    for key, value in (("shuffle_window", shuffle_window), ("batch_size_warmup", batch_size_warmup)):
        if not shuffle and value is not None:
            raise ValueError(f"{key}: {value} given with shuffle: false, where it has no effect; it is allowed with "
                             "shuffle: true. Remove it")
    window = DEFAULT_WINDOW if shuffle_window is None else shuffle_window
    data = _open(dataset, max_open=2 * window)
    _check_row_length(data, max_seq_len)
    order = Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=shuffle_seed, window=window)
    data.check_room(order.shards_ahead(0))  # nowhere are they more
    ramp = BatchRamp.build(batch_size_warmup, max_size=global_batch_size,
                           tokens_per_row=order.tokens_per_epoch / order.rows_per_epoch)
    return RowStream(data, order, ramp)


def check_numbers(**values: Any) -> None:
    """Refuses a key of the loader whose value is no whole number (timeout: no number) or too small."""
    smallest = {"device_batch_size": 1, "max_seq_len": SPECIALS_PER_PIECE + 1, "shuffle_window": 1, "prefetch_factor": 1}
    for key, value in values.items():
        least = smallest.get(key, 0)
        # the host computes device_batch_size by a division, which may leave 8.0
        kinds = (int, float) if key in ("device_batch_size", "timeout") else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf") \
                or (key != "timeout" and int(value) != value):
            raise ValueError(f"{key}: {value!r} given; a {'number' if key == 'timeout' else 'whole number'} of at least "
                             f"{least} is needed. Correct the key")


def check_choices(**values: Any) -> None:
    """Refuses a key of the loader whose value is not true or false."""
    for key, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{key}: {value!r} given; true or false is needed. Correct the key")


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Mapping) or not {"local", "split"} <= set(dataset) <= set(DATASET_KEYS):
        given = sorted(dataset) if isinstance(dataset, Mapping) else repr(dataset)
        raise ValueError(f"dataset: {given} given; the keys local (folder of the converted corpus) and split (train or "
                         f"validation) are needed, and {', '.join(DATASET_KEYS[2:])} are possible. Correct the block")
    for key in ("local", "split", "remote"):
        if key in dataset and dataset[key] is not None and not (isinstance(dataset[key], str) and dataset[key]):
            raise ValueError(f"dataset.{key}: {dataset[key]!r} given; a text is needed. Correct it")
    if not _SPLIT.fullmatch(dataset["split"]):
        raise ValueError(f"dataset.split: {dataset['split']!r} given; the name of a folder in dataset.local is needed, "
                         "such as train. Correct it")


def _open(dataset: Mapping[str, Any], max_open: int) -> MDSSplit | MixtureSplit:
    local, split, remote = Path(dataset["local"]), dataset["split"], dataset.get("remote")
    options = {key: dataset[key] for key in ("cache_limit",) if dataset.get(key) is not None}
    if remote is not None:
        return open_split(local / split, max_open=max(32, max_open), remote=join(remote, split), **options)
    splits = sorted(folder.parent.name for folder in local.glob("*/manifest.json"))
    if split not in splits:
        what = f"its complete splits are: {', '.join(splits)}" if splits else "that folder holds no complete split"
        raise FileNotFoundError(f"dataset: local: {str(local)!r}, split: {split!r} given; {what}. A split is a folder "
                                "with a manifest.json, made by data_prep/convert.py: run it, or correct the keys")
    return open_split(local / split, max_open=max(32, max_open), **options)


def _check_row_length(data: MDSSplit | MixtureSplit, max_seq_len: int) -> None:
    if data.chunk_length + SPECIALS_PER_PIECE <= max_seq_len:
        return
    # chunk_length only bounds the chunks; the histograms tell
    longest = max(int(np.flatnonzero(data.lengths(shard))[-1]) for shard in range(data.num_shards))
    if longest + SPECIALS_PER_PIECE > max_seq_len:
        raise ValueError(f"max_seq_len: {max_seq_len} given, but the data has a chunk of {longest} tokens; a row holds "
                         f"chunks of at most {max_seq_len - SPECIALS_PER_PIECE} (BOS and EOS take {SPECIALS_PER_PIECE}). "
                         "Raise max_seq_len, or convert the corpus again with a smaller chunk length")
