"""Batch-size warm-up: how many rows each step has, and which row of the stream it begins with, in closed form.

Sizes go up by equal steps, min_size, 2 * min_size, ... to the global batch, and each holds for the same number of steps,
hence for tokens in proportion to it, as in ModernBERT's sequence packer. Step and row follow from one another by
arithmetic, so a ramp has no state: it is a function of (manifest, settings), the same for encoder and decoder, packed or
not, on any number of ranks, and after a resume. Without warm-up there is one size from the start. Nothing here imports
numpy or torch; the rows themselves are those of rows.py.

In YAML: train_loader.batch_size_warmup: {min_size: 352, tokens: 50_000_000_000tok}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ettin_foundry.objectives.schedule import parse_tokens

__all__ = ["WARMUP_KEYS", "BatchRamp", "check_warmup"]

WARMUP_KEYS = ("min_size", "tokens")
_KEY = "train_loader.batch_size_warmup"


@dataclass(frozen=True)
class BatchRamp:
    """Rows of each step, over all ranks: min_size in the first `steps_per_size` steps, then twice that, and so on.

    Attributes:
        min_size: rows of the first step; divides max_size.
        max_size: the global batch, of every step after the warm-up.
        steps_per_size: steps of each size below max_size.
    """

    min_size: int
    max_size: int
    steps_per_size: int = 1

    def __post_init__(self) -> None:
        if self.min_size < 1 or self.max_size % self.min_size or self.steps_per_size < 1:
            raise ValueError(f"batch sizes {self}: the first must divide the last, and each size needs at least one step")

    @classmethod
    def build(cls, warmup: Mapping[str, Any] | None, *, max_size: int, tokens_per_row: float,
              total: int | None = None) -> BatchRamp:
        """The ramp that `train_loader.batch_size_warmup` asks for.

        Args:
            warmup: {min_size: rows, tokens: a time in tok, or a number of tokens}; None: every step has max_size rows.
            max_size: global_train_batch_size.
            tokens_per_row: real tokens of a row of the data, on average over an epoch.
            total: as for `check_warmup`.

        Raises:
            ValueError: as `check_warmup`.
        """
        if warmup is None:
            return cls(max_size, max_size)
        tokens, smallest = check_warmup(warmup, max_size, total=total), warmup["min_size"]
        sizes = max_size // smallest
        rows_of_a_step_of_each = smallest * sizes * (sizes - 1) // 2  # all sizes below the last
        return cls(smallest, max_size, max(1, round(tokens / (rows_of_a_step_of_each * tokens_per_row))))

    @property
    def num_steps(self) -> int:
        """Steps of the warm-up: all later ones have max_size rows."""
        return (self.max_size // self.min_size - 1) * self.steps_per_size

    def rows(self, step: int) -> int:
        """Rows of a step."""
        return self.min_size * min(step // self.steps_per_size + 1, self.max_size // self.min_size)

    def first_row(self, step: int) -> int:
        """The row of the stream that a step begins with: the rows of all steps before it."""
        done = min(step // self.steps_per_size, self.max_size // self.min_size - 1)  # sizes left behind
        return self._rows_before_size(done) + (step - done * self.steps_per_size) * self.min_size * (done + 1)

    def step_at(self, row: int) -> int:
        """The step that reads a row of the stream."""
        turns = row // (self.min_size * self.steps_per_size)
        done = min((math.isqrt(8 * turns + 1) - 1) // 2, self.max_size // self.min_size - 1)
        return done * self.steps_per_size + (row - self._rows_before_size(done)) // (self.min_size * (done + 1))

    def step_of(self, row: int) -> int:
        """The step that begins with a row.

        Raises:
            ValueError: no step begins there.
        """
        step = self.step_at(row)
        if (first := self.first_row(step)) != row:
            raise ValueError(f"global_train_batch_size: {self} given, so that no step begins with row {row} of the stream, "
                             f"where the checkpoint stands; the nearest begin with rows {first} and "
                             f"{self.first_row(step + 1)}. Restore the batch sizes that it was trained with")
        return step

    def __str__(self) -> str:
        if self.min_size == self.max_size:
            return f"{self.max_size} rows"
        return f"{self.min_size} to {self.max_size} rows, {self.steps_per_size} steps of each size"

    def _rows_before_size(self, done: int) -> int:
        return self.steps_per_size * self.min_size * done * (done + 1) // 2


def check_warmup(warmup: Any, max_size: int, *, world_size: int = 1, microbatch: Any = 1, total: int | None = None) -> int:
    """Refuses a warm-up that could not be carried out as written.

    Args:
        warmup: the block train_loader.batch_size_warmup.
        max_size: global_train_batch_size.
        world_size: number of processes.
        microbatch: device_train_microbatch_size.
        total: tokens of the run, which a time in dur is a share of; without it only tok is possible.

    Returns:
        Tokens of the warm-up.

    Raises:
        ValueError: naming the key and both values that do not fit.
    """
    if not isinstance(warmup, Mapping) or set(warmup) != set(WARMUP_KEYS):
        given = dict(warmup) if isinstance(warmup, Mapping) else warmup
        raise ValueError(f"{_KEY}: {given!r} given; the keys min_size (rows of the first step) and tokens (of the whole "
                         "warm-up) are needed. Correct the block, or remove it")
    smallest = warmup["min_size"]
    if isinstance(smallest, bool) or not isinstance(smallest, int) or smallest < 1:
        raise ValueError(f"{_KEY}.min_size: {smallest!r} given; a whole number of rows, at least 1, is needed. Correct it")
    if not (tokens := parse_tokens(f"{_KEY}.tokens", warmup["tokens"], total)):
        raise ValueError(f"{_KEY}.tokens: {warmup['tokens']!r} given; more than 0 are needed. Give the tokens of the "
                         "warm-up, or remove the block where there is none")
    if total is not None and tokens > total:
        raise ValueError(f"{_KEY}.tokens: {warmup['tokens']!r} given, max_duration is {total:,} tokens; the warm-up must "
                         "end within the run. Shorten it, or lengthen the run")
    if smallest >= max_size or max_size % smallest:
        raise ValueError(f"{_KEY}.min_size: {smallest} given, global_train_batch_size is {max_size}; a smaller number that "
                         "divides it is needed, for sizes go up in equal steps. Change one of the two")
    if smallest % world_size:
        raise ValueError(f"{_KEY}.min_size: {smallest} given on {world_size} processes; a multiple of their number is "
                         "needed. Change it or the number of processes")
    if microbatch == "auto":
        raise ValueError(f"device_train_microbatch_size: 'auto' given with {_KEY}, whose first batches would say nothing of "
                         "the memory that the last ones take. Give a number of rows")
    if (smallest // world_size) % microbatch:
        raise ValueError(f"device_train_microbatch_size: {microbatch} given, {_KEY}.min_size is {smallest}, which is "
                         f"{smallest // world_size} rows for each of {world_size} process(es); the first must divide that, "
                         "and so every size. Lower it, or change min_size")
    return tokens
