"""Batch-size warm-up: how many rows each step has, and with which row of the stream it begins.

Sizes go up by equal steps, min_size, 2 * min_size, ... to the global batch, and each holds for the same
number of steps, hence for tokens in proportion to it, as in ModernBERT's sequence packer. Step and row follow
from one another by arithmetic, so a ramp has no state. Without warm-up there is one size from the start.

In YAML: train_loader.batch_size_warmup: {min_size: 352, tokens: 50_000_000_000tok}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ettin_foundry.objectives.schedule import parse_tokens

__all__ = ["BatchRamp", "check_warmup"]

_KEY = "train_loader.batch_size_warmup"


@dataclass(frozen=True)
class BatchRamp:
    """Rows of each step: min_size in the first `steps_per_size` steps, then twice that, ..."""

    min_size: int  # rows of the first step; divides max_size
    max_size: int  # the global batch, of every step after the warm-up
    steps_per_size: int = 1  # steps of each size below max_size

    @classmethod
    def build(cls, warmup: Mapping[str, Any] | None, *, max_size: int, tokens_per_row: float) -> BatchRamp:
        """The ramp that a block of `check_warmup` asks for; of None, max_size rows in every step."""
        if warmup is None:
            return cls(max_size, max_size)
        tokens, smallest = check_warmup(warmup, max_size), warmup["min_size"]
        sizes = max_size // smallest
        rows_of_each_size_once = smallest * sizes * (sizes - 1) // 2  # sizes below the last
        return cls(smallest, max_size, max(1, round(tokens / (rows_of_each_size_once * tokens_per_row))))

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
        beyond = row - self._rows_before_size(done)
        return done * self.steps_per_size + beyond // (self.min_size * (done + 1))

    def step_of(self, row: int) -> int:
        """The step that begins with a row; an error where none does."""
        step = self.step_at(row)
        if self.first_row(step) != row:
            raise ValueError("global_train_batch_size must be what the checkpoint was trained with, got "
                             f"{self}: no step begins with its row {row}")
        return step

    def __str__(self) -> str:
        if self.min_size == self.max_size:
            return f"{self.max_size} rows"
        return f"{self.min_size} to {self.max_size} rows, {self.steps_per_size} steps of each size"

    def _rows_before_size(self, done: int) -> int:
        return self.steps_per_size * self.min_size * done * (done + 1) // 2


def check_warmup(warmup: Any, max_size: int, *, world_size: int = 1, microbatch: Any = 1,
                 total: int | None = None) -> int:
    """The tokens of a batch-size warm-up, which must be one that can be carried out as written.

    Args:
        warmup: the block {min_size: rows of the first step, tokens: of the warm-up, a number or a time}.
        max_size: global_train_batch_size. world_size: number of processes.
        microbatch: device_train_microbatch_size.
        total: tokens of the run, which a time in dur is a share of; without it only tok is possible.

    Raises:
        ValueError: naming the key and both values that do not fit.
    """
    if not isinstance(warmup, Mapping) or set(warmup) != {"min_size", "tokens"}:
        raise ValueError(f"{_KEY} must have the keys min_size (rows) and tokens, got {warmup!r}")
    smallest, key = warmup["min_size"], f"{_KEY}.min_size"
    tokens = parse_tokens(f"{_KEY}.tokens", warmup["tokens"], total)
    if type(smallest) is not int or not 1 <= smallest < max_size or max_size % smallest:
        raise ValueError(f"{key} must be below global_train_batch_size, {max_size}, and divide it, got "
                         f"{smallest!r}")
    if not 0 < tokens <= (tokens if total is None else total):
        raise ValueError(f"{_KEY}.tokens must be above 0 and within max_duration, got {warmup['tokens']!r}")
    if smallest % world_size:
        raise ValueError(f"{key} must be a multiple of the {world_size} processes, got {smallest}")
    if microbatch == "auto":
        raise ValueError(f"device_train_microbatch_size must be a number with {_KEY}, whose first batches "
                         "say nothing of the memory that the last ones take, got 'auto'")
    if (smallest // world_size) % microbatch:
        raise ValueError(f"device_train_microbatch_size must divide the {smallest // world_size} rows that "
                         f"each of {world_size} process(es) has of {key}, {smallest}, got {microbatch}")
    return tokens
