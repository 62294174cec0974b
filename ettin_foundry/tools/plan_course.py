"""How a run goes along its token clock: objective, mask rate and learning rate, as exact means and as curves.

The sums are over single tokens: a schedule is a function of the tokens before a batch, and here every token takes the value
at its own place, which differs from what its batch takes by less than one step. Numpy only; nothing of torch or the host.
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

__all__ = ["Course", "Piece", "course", "learning_rates", "lr_joints", "predicted_share"]


class Piece(NamedTuple):
    """A stretch of tokens in which the objective does not change and the mask rate is linear."""

    begin: int
    end: int
    shares: dict[str, float]
    """{objective: share of the rows}."""
    first_rate: float
    last_rate: float
    """Mask rates at the tokens `begin` and `end - 1`."""


@dataclass(frozen=True)
class Course:
    """Objective and mask rate of a run of `pieces[-1].end` tokens."""

    pieces: Sequence[Piece]
    schedule: ObjectiveSchedule
    mask_rate: MaskRate

    @property
    def objectives(self) -> tuple[str, ...]:
        """In order of first occurrence."""
        return self.schedule.objectives

    def shares(self) -> dict[str, float]:
        """{objective: share of the run's tokens that have it}."""
        total = self.pieces[-1].end
        return {name: math.fsum((p.end - p.begin) * p.shares.get(name, 0.0) for p in self.pieces) / total
                for name in self.objectives}

    def predicted(self, text_share: float, first_share: float) -> float:
        """Mean number of targets of a token of the run.

        Args:
            text_share: share of the tokens that are neither BOS nor EOS, among which masks are drawn.
            first_share: share of the tokens that are the first of a document, which clm has nothing to predict from.
        """
        total = self.pieces[-1].end
        return math.fsum((p.end - p.begin) * share * predicted_share(name, (p.first_rate + p.last_rate) / 2, text_share,
                                                                     first_share)
                         for p in self.pieces for name, share in p.shares.items()) / total

    def most_predicted(self, text_share: float, first_share: float) -> float:
        """Targets of a token where the run has most of them: what memory must hold."""
        return max(sum(share * predicted_share(name, max(p.first_rate, p.last_rate), text_share, first_share)
                       for name, share in p.shares.items()) for p in self.pieces)

    def shares_between(self, bounds: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """{objective: its mean share of the rows between two bounds}, one number less than bounds.

        For pictures: blocks that alternate faster than a pixel is wide become a mixture.
        """
        ends = np.array([0, *(p.end for p in self.pieces)], dtype=np.float64)
        result = {}
        for name in self.objectives:
            grown = np.concatenate([[0.0], np.cumsum([(p.end - p.begin) * p.shares.get(name, 0.0) for p in self.pieces])])
            result[name] = np.diff(np.interp(bounds, ends, grown)) / np.diff(bounds)
        return result


def predicted_share(objective: str, rate: float, text_share: float, first_share: float) -> float:
    """Targets of a token under one objective; see `Course.predicted`."""
    if objective == "clm":
        return 1.0 - first_share
    return text_share * rate


def course(cfg: dict[str, Any], num_tokens: int) -> Course:
    """Objective and mask rate of a config over a run of `num_tokens` tokens (at least 1).

    Raises:
        ValueError: a schedule that `schedules.py` refuses.
    """
    objective = objective_schedule(cfg)
    rate = MaskRate.parse(cfg["train_loader"].get("mask_rate", 0.0), total=total_tokens(cfg), key="train_loader.mask_rate")
    plain = rate.plain()
    ends = [segment["until"] for segment in plain if "until" in segment] if isinstance(plain, list) else []
    joints = {*objective.breakpoints(num_tokens), *rate.breakpoints(num_tokens), *(end for end in ends if end < num_tokens)}
    begins = sorted(joints)
    pieces = [Piece(begin, end, objective.at(begin), rate.at(begin), rate.at(end - 1))
              for begin, end in zip(begins, [*begins[1:], num_tokens])]
    return Course(pieces, objective, rate)


def _lr_function(cfg: dict[str, Any]) -> tuple[Any, dict[str, float], float] | None:
    """(function, its times as shares of the run, alpha_f) of one of our schedules; None for another scheduler."""
    block = cfg["scheduler"]
    total, unit = parse_time("max_duration", cfg["max_duration"])

    def share(name: str, default: str) -> float:
        value, its_unit = parse_time(f"scheduler.{name}", block.get(name, default))
        return value if its_unit == "dur" else value / total

    alpha_f, t_max = block.get("alpha_f", 0.0), share("t_max", "1dur")
    if block["name"] == "warmup_stable_decay":
        times = {"warmup": share("t_warmup", f"0{unit}"), "decay": share("t_decay", f"0{unit}"), "total": t_max}
        return warmup_stable_decay, times, alpha_f
    if block["name"] == "one_minus_sqrt":
        return one_minus_sqrt, {"decay": share("t_decay", "1dur"), "total": t_max}, alpha_f
    return None


def learning_rates(cfg: dict[str, Any], places: npt.NDArray[np.float64]) -> npt.NDArray[np.float64] | None:
    """Learning rates at places from 0 to 1 of the run; None for a scheduler of the host, which is not evaluated here."""
    found = _lr_function(cfg)
    if found is None:
        return None
    function, times, alpha_f = found
    peak = cfg["optimizer"]["lr"]
    return np.array([peak * function(float(t), alpha_f=alpha_f, **times) for t in places])


def lr_joints(cfg: dict[str, Any]) -> list[float]:
    """Places from 0 to 1 of the run where the learning rate has a corner, so that a curve drawn through points shows it."""
    found = _lr_function(cfg)
    if found is None:
        return []
    _, times, _ = found
    corners = (times.get("warmup", 0.0), times["total"] - times["decay"], times["total"])
    return sorted({min(1.0, max(0.0, place)) for place in corners})
