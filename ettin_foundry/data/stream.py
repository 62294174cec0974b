"""Which rows a step reads, and a row before it is masked: its chunks, its ids, its hash.

`order.py` says which chunks form row n of the stream, `BatchRamp` which rows form a step; here both meet the data.
Every step is a pure function of (data, seed, batch sizes): the only state is the rows consumed. No torch.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ettin_foundry.data.mixture import MixtureSplit, open_split
from ettin_foundry.data.order import ORDER_VERSION, Order
from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import join
from ettin_foundry.objectives.schedule import parse_tokens

HASH_MODULUS = 2**48  # a float64, as loggers take, holds it exactly
DATASET_KEYS = ("local", "split", "remote", "cache_limit")  # the first two are needed
DEFAULT_WINDOW = 16  # shards whose rows are mixed; of the usual 64 MB, about half a billion tokens
_WARMUP = "train_loader.batch_size_warmup"


@dataclass(frozen=True)
class BatchRamp:
    """Batch-size warm-up: how many rows each step has, and with which row of the stream it begins.

    Sizes go up by equal steps, min_size, 2 * min_size, ... to the global batch, each for as many steps, hence
    for tokens in proportion to it, as in ModernBERT's sequence packer. Without warm-up, min_size is max_size.
    """

    min_size: int  # rows of the first step; divides max_size
    max_size: int  # the global batch, of every step after the warm-up
    steps_per_size: int = 1  # steps of each size below max_size

    @classmethod
    def build(cls, warmup: Mapping[str, Any] | None, *, max_size: int, tokens_per_row: float) -> BatchRamp:
        """The ramp that a block of `check_warmup` asks for; of None, max_size rows in every step."""
        if warmup is None:
            return cls(max_size, max_size)
        smallest, tokens = check_warmup(warmup, max_size).values()
        sizes = max_size // smallest
        rows_of_each_size_once = smallest * sizes * (sizes - 1) // 2  # sizes below the last
        return cls(smallest, max_size, max(1, round(tokens / (rows_of_each_size_once * tokens_per_row))))

    @property
    def num_steps(self) -> int:
        """Steps of the warm-up: all later ones have max_size rows."""
        return (self.max_size // self.min_size - 1) * self.steps_per_size

    def rows(self, step: int) -> int:
        return self.min_size * min(step // self.steps_per_size + 1, self.max_size // self.min_size)

    def first_row(self, step: int) -> int:
        """The row of the stream that a step begins with: the rows of all steps before it."""
        done = min(step // self.steps_per_size, self.max_size // self.min_size - 1)  # sizes left behind
        steps = self.steps_per_size * done * (done + 1) // 2 + (step - done * self.steps_per_size) * (done + 1)
        return self.min_size * steps

    def step_of(self, row: int) -> int:
        """The step that begins with a row of the stream; ValueError where none does."""
        step = bisect.bisect_right(range(row + 1), row, key=self.first_row) - 1  # a step has at least one row
        if self.first_row(step) != row:
            raise ValueError(f"global_train_batch_size must be the checkpoint's, got {self}: row {row} begins no step")
        return step

    def __str__(self) -> str:
        if self.min_size == self.max_size:
            return f"{self.max_size} rows"
        return f"{self.min_size} to {self.max_size} rows, {self.steps_per_size} steps of each size"


def check_warmup(warmup: Any, max_size: int, *, world_size: int = 1, microbatch: Any = 1,
                 total: int | None = None) -> dict[str, Any]:
    """A batch-size warm-up with its tokens as a number; ValueError for one that cannot be carried out as written.

    It is {min_size: rows of the first step, tokens: a number or a time such as 50_000_000tok}; one in dur is a share of
    `total`, the run's tokens. max_size is global_train_batch_size, microbatch device_train_microbatch_size.
    """
    if not isinstance(warmup, Mapping) or set(warmup) != {"min_size", "tokens"}:
        raise ValueError(f"{_WARMUP} must have the keys min_size (rows) and tokens, got {warmup!r}")
    smallest, key = warmup["min_size"], f"{_WARMUP}.min_size"
    tokens = parse_tokens(f"{_WARMUP}.tokens", warmup["tokens"], total)
    if type(smallest) is not int or not 1 <= smallest < max_size or max_size % smallest:
        raise ValueError(f"{key} must be below global_train_batch_size, {max_size}, and divide it, got {smallest!r}")
    if not 0 < tokens <= (tokens if total is None else total):
        raise ValueError(f"{_WARMUP}.tokens must be above 0 and within max_duration, got {warmup['tokens']!r}")
    if smallest % world_size:
        raise ValueError(f"{key} must be a multiple of the {world_size} processes, got {smallest}")
    if microbatch == "auto":  # the first batches say nothing of the memory that the last ones take
        raise ValueError(f"device_train_microbatch_size must be a number with {_WARMUP}, got 'auto'")
    if (smallest // world_size) % microbatch:
        raise ValueError(f"device_train_microbatch_size must divide the {smallest // world_size} rows that each of "
                         f"{world_size} process(es) has of {key}, {smallest}, got {microbatch}")
    return {"min_size": smallest, "tokens": tokens}


class Row(NamedTuple):
    """One row before its tensors are made; one without chunks fills the last batch of an evaluation."""

    epoch: int
    number: int  # of the row in its epoch; with seed and epoch it seeds the row's masks
    step: int
    tokens_before: int  # real tokens of the stream before the global batch
    place: int  # of the row in the global batch
    chunks: Sequence[np.ndarray]  # P arrays (L,) uint16, no special ids
    ends_document: np.ndarray  # (P,) bool


def fill_row(ids: np.ndarray, sequence_id: np.ndarray, row: Row, *, cls: int, sep: int) -> None:
    """Writes pieces, each BOS + chunk + EOS, into (T,) ids, and their numbers into (T,) sequence_id."""
    begin = 0
    for piece, chunk in enumerate(row.chunks):
        end = begin + len(chunk) + SPECIALS_PER_PIECE
        ids[begin] = cls
        ids[begin + 1:end - 1] = chunk
        ids[end - 1] = sep
        sequence_id[begin:end] = piece
        begin = end


def hash_row(ids: np.ndarray, place: int) -> int:
    """48 bits of a row's (T,) int64 ids before masking, and of its place in the global batch."""
    content = np.ascontiguousarray(ids, "<i8").data
    digest = hashlib.blake2b(content, digest_size=6, salt=place.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little")


class RowStream:
    """The rows of a split, step by step: endless where the order is shuffled, else one epoch."""

    def __init__(self, data: MDSSplit | MixtureSplit, order: Order, ramp: BatchRamp) -> None:
        self.data, self.order, self.ramp = data, order, ramp
        self.max_seq_len, self.start_row = order.max_seq_len, 0  # reading begins there; a resume moves it

    @property
    def num_steps(self) -> int | None:
        """Steps of the one epoch without shuffle, empty rows at its end included; None with shuffle."""
        return None if self.order.shuffle else -(-self.order.rows_per_epoch // self.ramp.max_size)

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
        """What a checkpoint holds: the rows read, as Composer counts them over all ranks, and what they are rows of."""
        return {"rows": num_samples if from_beginning else self.start_row + num_samples, **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's row, on any number of ranks; ValueError: of other data, order or batch sizes."""
        rows = state.get("rows") if isinstance(state, Mapping) else None
        if not isinstance(rows, int) or rows < 0:
            raise ValueError(f"checkpoint must hold a dataset state written by ettin_text, got {state!r}")
        for key, mine in self.identity().items():
            if state.get(key) != mine:
                names = {"fingerprint": "dataset (its fingerprint)", "order": "order (its version)"}
                raise ValueError(f"train_loader.{names.get(key, key)} must be what the checkpoint was trained with, "
                                 f"{state.get(key)!r}, got {mine!r}; restore it, or set load_weights_only: true")
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
    """Opens a split and its order; keys and errors are those of `loader.build_ettin_loader`, described there."""
    window = DEFAULT_WINDOW if shuffle_window is None else shuffle_window
    for key, value, least in (("max_seq_len", max_seq_len, SPECIALS_PER_PIECE + 1), ("shuffle_window", window, 1),
                              ("shuffle_seed", shuffle_seed, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{key} must be an integer >= {least}, got {value!r}")
    for key, value in (("packing", packing), ("shuffle", shuffle)):
        if type(value) is not bool:
            raise ValueError(f"{key} must be true or false, got {value!r}")
    for key, value in (("shuffle_window", shuffle_window), ("batch_size_warmup", batch_size_warmup)):
        if not shuffle and value is not None:
            raise ValueError(f"{key} must be left out with shuffle: false, got {value}")
    data = _open(dataset)
    if data.chunk_length + SPECIALS_PER_PIECE > max_seq_len:  # an upper bound only; the histograms tell
        longest = max((int(np.flatnonzero(data.lengths(shard))[-1]) for shard in range(data.num_shards)), default=0)
        if (least := longest + SPECIALS_PER_PIECE) > max_seq_len:
            raise ValueError(f"max_seq_len must be at least {least}, the longest chunk, BOS and EOS, got {max_seq_len}")
    order = Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=shuffle_seed, window=window)
    data.check_room(order.shards_ahead(0))  # nowhere are they more
    ramp = BatchRamp.build(batch_size_warmup, max_size=global_batch_size,
                           tokens_per_row=order.tokens_per_epoch / order.rows_per_epoch)
    return RowStream(data, order, ramp)


def _open(dataset: Any) -> MDSSplit | MixtureSplit:
    if not isinstance(dataset, Mapping) or not {"local", "split"} <= set(dataset) <= set(DATASET_KEYS):
        raise ValueError("dataset must have the keys local (folder of the dataset) and split, and may have "
                         f"{' and '.join(DATASET_KEYS[2:])}, got {dataset!r}")
    local, split, remote, limit = list[Any](dataset.get(key) for key in DATASET_KEYS)
    if remote:
        remote = join(remote, split)
    elif split not in (splits := sorted(path.parent.name for path in Path(local).glob("*/manifest.json"))):
        raise FileNotFoundError(f"dataset.split must be one of the complete splits in {local!r}, "
                                f"{splits or 'which holds none'}, got {split!r}; make it with ettin convert")
    return open_split(Path(local, split), remote=remote or None, cache_limit=limit or None)
