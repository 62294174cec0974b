"""What changes along a run's tokens, computed from its config: objective, mask rate and learning rate.

A schedule is a function of the tokens before a batch; here every token takes the value at its own place, which differs from
its batch's value by less than one step. Imports numpy, and neither torch nor the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.training.lr import one_minus_sqrt, warmup_stable_decay
from ettin_foundry.training.run_config import objective_schedule, parse_time, total_tokens

__all__ = ["Curves", "Piece", "learning_rates", "lr_breakpoints", "run_curves"]


class Piece(NamedTuple):
    """A range of tokens in which the objective does not change and the mask rate is linear."""

    begin: int
    end: int
    shares: dict[str, float]
    """{objective: share of the rows}."""
    first_rate: float
    last_rate: float
    """Mask rates at the tokens `begin` and `end - 1`."""

    def targets_per_token(self, rate: float, text_share: float, first_share: float) -> float:
        """clm predicts every token but the first of a document, masked objectives a share `rate` of the text tokens."""
        return math.fsum(share * (1 - first_share if name == "clm" else text_share * rate)
                         for name, share in self.shares.items())


@dataclass(frozen=True)
class Curves:
    """Objective and mask rate of a run of `pieces[-1].end` tokens."""

    pieces: Sequence[Piece]
    schedule: ObjectiveSchedule
    mask_rate: MaskRate

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.schedule.objectives

    def shares(self) -> dict[str, float]:
        """{objective: share of the run's tokens that have it}."""
        total = self.pieces[-1].end
        return {name: math.fsum((p.end - p.begin) * p.shares.get(name, 0.0) for p in self.pieces) / total
                for name in self.objectives}

    def targets_per_token(self, text_share: float, first_share: float) -> tuple[float, float]:
        """(mean over the run, maximum over its pieces) of the targets of a token.

        Args:
            text_share: share of the tokens that are neither BOS nor EOS, among which masks are drawn.
            first_share: share of the tokens that are the first of a document, which clm cannot predict.
        """
        mean = math.fsum((p.end - p.begin) * p.targets_per_token((p.first_rate + p.last_rate) / 2, text_share, first_share)
                         for p in self.pieces) / self.pieces[-1].end
        return mean, max(p.targets_per_token(max(p.first_rate, p.last_rate), text_share, first_share) for p in self.pieces)

    def shares_between(self, bounds: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """{objective: its mean share of the rows between two bounds}, one value less than there are bounds."""
        ends = np.array([0, *(p.end for p in self.pieces)], dtype=np.float64)
        result = {}
        for name in self.objectives:
            summed = np.concatenate([[0.0], np.cumsum([(p.end - p.begin) * p.shares.get(name, 0.0) for p in self.pieces])])
            result[name] = np.diff(np.interp(bounds, ends, summed)) / np.diff(bounds)
        return result


def run_curves(cfg: dict[str, Any], num_tokens: int) -> Curves:
    """Objective and mask rate of a config over a run of `num_tokens` tokens (at least 1).

    Raises:
        ValueError: a schedule that cannot be parsed.
    """
    objective = objective_schedule(cfg)
    rate = MaskRate.parse(cfg["train_loader"].get("mask_rate", 0.0), total=total_tokens(cfg), key="train_loader.mask_rate")
    plain = rate.plain()
    ends = [segment["until"] for segment in plain if "until" in segment] if isinstance(plain, list) else []
    begins = sorted({*objective.joints(num_tokens), *rate.joints(num_tokens), *(end for end in ends if end < num_tokens)})
    pieces = [Piece(begin, end, objective.at(begin), rate.at(begin), rate.at(end - 1))
              for begin, end in zip(begins, [*begins[1:], num_tokens])]
    return Curves(pieces, objective, rate)


def _lr_function(cfg: dict[str, Any]) -> tuple[Any, dict[str, float]] | None:
    """(function, its times as shares of the run) of a schedule of ours; None for a scheduler of the host."""
    block = cfg["scheduler"]
    total, unit = parse_time("max_duration", cfg["max_duration"])

    def share(name: str, default: str) -> float:
        value, own_unit = parse_time(f"scheduler.{name}", block.get(name, default))
        return value if own_unit == "dur" else value / total

    t_max = share("t_max", "1dur")
    if block["name"] == "warmup_stable_decay":
        return warmup_stable_decay, {"warmup": share("t_warmup", f"0{unit}"), "decay": share("t_decay", f"0{unit}"),
                                     "total": t_max}
    if block["name"] == "one_minus_sqrt":
        return one_minus_sqrt, {"decay": share("t_decay", "1dur"), "total": t_max}
    return None


def learning_rates(cfg: dict[str, Any], places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Learning rates at places from 0 to 1 of the run; None for a scheduler of the host, which is not evaluated here."""
    found = _lr_function(cfg)
    if found is None:
        return None
    function, times = found
    alpha_f = cfg["scheduler"].get("alpha_f", 0.0)
    return np.array([cfg["optimizer"]["lr"] * function(float(t), alpha_f=alpha_f, **times) for t in places])


def lr_breakpoints(cfg: dict[str, Any]) -> list[float]:
    """Places from 0 to 1 of the run where the slope of the learning rate changes."""
    found = _lr_function(cfg)
    if found is None:
        return []
    times = found[1]
    places = (times.get("warmup", 0.0), times["total"] - times["decay"], times["total"])
    return sorted({min(1.0, max(0.0, place)) for place in places})
