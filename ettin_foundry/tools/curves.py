"""What changes along a run's tokens, computed from its config: objective, mask rate and learning rate.

A schedule is a function of the tokens before a batch; here every token takes the value at its own place, which differs
from its batch's value by less than one step. Imports numpy, and neither torch nor the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.training import run_config
from ettin_foundry.training.run_config import parse_time, total_tokens

# scheduler -> its function, and defaults of its times
_SCHEDULERS: dict[str, tuple[Any, dict[str, str]]] = {
    "warmup_stable_decay": (run_config.warmup_stable_decay, {"total": "1dur", "warmup": "0ba", "decay": "0ba"}),
    "one_minus_sqrt": (run_config.one_minus_sqrt, {"total": "1dur", "decay": "1dur"})}


class Piece(NamedTuple):
    """A range of tokens in which the objective does not change and the mask rate is linear."""

    begin: int
    end: int
    shares: dict[str, float]  # {objective: share of the rows}
    first_rate: float  # mask rate at the token `begin`
    last_rate: float  # at the token `end - 1`


@dataclass(frozen=True)
class Curves:
    """Objective and mask rate of a run of `pieces[-1].end` tokens."""

    pieces: Sequence[Piece]
    schedule: ObjectiveSchedule
    mask_rate: MaskRate

    def shares_between(self, bounds: Sequence[float] | npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float64]]:
        """{objective: its mean share of the rows between two bounds (tokens)}, one value less than there are bounds."""
        ends, result = [0, *(p.end for p in self.pieces)], {}
        for name in self.schedule.objectives:
            summed = np.cumsum([0.0, *((p.end - p.begin) * p.shares.get(name, 0.0) for p in self.pieces)])
            result[name] = np.diff(np.interp(bounds, ends, summed)) / np.diff(bounds)
        return result

    def targets_per_token(self, text_share: float, first_share: float) -> tuple[float, float]:
        """(mean over the run, maximum over its pieces) of the targets of a token.

        Args:
            text_share: share of the tokens that are neither BOS nor EOS, among which masks are drawn.
            first_share: share of the tokens that are the first of a document, which clm cannot predict.
        """
        def targets(p: Piece, rate: float) -> float:
            return sum(share * (1 - first_share if name == "clm" else text_share * rate)
                       for name, share in p.shares.items())

        total = math.fsum((p.end - p.begin) * targets(p, (p.first_rate + p.last_rate) / 2) for p in self.pieces)
        return total / self.pieces[-1].end, max(targets(p, max(p.first_rate, p.last_rate)) for p in self.pieces)


def run_curves(cfg: dict[str, Any], num_tokens: int) -> Curves:
    """Objective and mask rate of a config over a run of `num_tokens` tokens (at least 1)."""
    objective, total = run_config.objective_schedule(cfg), total_tokens(cfg)
    rate = MaskRate.parse(cfg["train_loader"].get("mask_rate", 0.0), total=total)
    # a slope ends with the run's budget, which its last step may pass
    ends = {total} if total is not None and total < num_tokens else set()
    begins = sorted({*objective.breakpoints(num_tokens), *rate.breakpoints(num_tokens), *ends})
    return Curves([Piece(begin, end, objective.at(begin), rate.at(begin), rate.at(end - 1))
                   for begin, end in zip(begins, [*begins[1:], num_tokens])], objective, rate)


def learning_rates(cfg: dict[str, Any], places: Sequence[float] = ()) -> tuple[list[float], list[float]] | None:
    """(places, learning rates) at places from 0 to 1 of the run; those where the slope changes are added to `places`.

    None for a scheduler of the host, which is not evaluated here, and for times in another unit than the run's length:
    how many batches its tokens make is not known here.
    """
    block = cfg["scheduler"]
    if block["name"] not in _SCHEDULERS:
        return None
    function, defaults = _SCHEDULERS[block["name"]]
    total, unit = parse_time("max_duration", cfg["max_duration"])
    times = {}
    for name, default in defaults.items():
        key = "t_max" if name == "total" else f"t_{name}"
        value, own_unit = parse_time(f"scheduler.{key}", block.get(key, default))
        if value and own_unit not in ("dur", unit):
            return None
        times[name] = value if own_unit == "dur" else value / total
    breakpoints = (0.0, 1.0, times.get("warmup", 0.0), times["total"] - times["decay"], times["total"])
    at = sorted({*map(float, places), *(p for p in breakpoints if 0 <= p <= 1)})
    return at, [cfg["optimizer"]["lr"] * function(place, alpha_f=block.get("alpha_f", 0.0), **times) for place in at]
