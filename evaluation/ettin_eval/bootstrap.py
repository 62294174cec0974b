"""Paired bootstrap over items and seeds: how sure a difference of two models is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Items = Mapping[str, np.ndarray]
"""{task: values of shape (seeds, items), float64}; items of one task are the same for all models."""


class Interval(NamedTuple):
    """A figure with the percentile interval of its bootstrap distribution (Efron & Tibshirani 1993, chapter 13)."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Of the claim that the figure is above 0: `undecided` where the interval has 0 in it."""
        return "holds" if self.low > 0 else "does not" if self.high < 0 else "undecided"


class Bootstrap:
    """Draws of items and seeds, made once, so that every comparison of a study is made on the same draws.

    Items of each task and seeds are drawn with replacement, items independently from task to task, seeds once for all
    tasks; a mean over tasks weighs them alike. With few seeds the spread between seeds is known no better than few
    seeds can tell.
    """

    def __init__(self, items: Mapping[str, int], seeds: int, *, draws: int = 10_000, level: float = 0.95,
                 seed: int = 0) -> None:
        """items: {task: how many it has}. level: of the intervals, in (0, 1)."""
        generator = np.random.default_rng(seed)
        self.level = level
        self._seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds  # (draws, seeds)
        self._items = {task: generator.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32) / n
                       for task, n in items.items()}

    def mean(self, model: Items, tasks: Sequence[str]) -> Interval:
        """The model's mean over tasks."""
        return self._interval(*self._means(model, tasks))

    def difference(self, first: Items, second: Items, tasks: Sequence[str]) -> Interval:
        """first - second, paired by item and seed.

        Raises:
            ValueError: a task whose items or seeds differ in number.
        """
        for task in tasks:
            if first[task].shape != second[task].shape:
                raise ValueError(f"{task} must have the same seeds and items for both models, got "
                                 f"{first[task].shape} and {second[task].shape}")
        return self._interval(*self._means({task: first[task] - second[task] for task in tasks}, tasks))

    def _means(self, model: Items, tasks: Sequence[str]) -> tuple[float, np.ndarray]:
        value = float(np.mean([model[task].mean() for task in tasks]))
        drawn = [np.sum(self._seeds * (self._items[task] @ model[task].T), axis=1) for task in tasks]
        return value, np.mean(drawn, axis=0)

    def _interval(self, value: float, drawn: np.ndarray) -> Interval:
        low, high = np.quantile(drawn, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Interval(value, float(low), float(high))
