"""Pictures with matplotlib: the curves of planned runs, and the losses of a suite's runs.

Plans are drawn from recipes, losses from what runs logged (steps.jsonl).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ettin_foundry.data.quantities import format_count
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.tools.plan import Plan, batch_ramp, learning_rates

_COLORS = {"mlm": "#2a6fbb", "clm": "#e07b24", "mntp": "#1f9e89"}
_LINE, _GREY = "#30363d", "#6b7280"
_STYLE: Any = {
    **matplotlib.rcParamsDefault, "backend": "agg", "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 9.0, "legend.frameon": False, "axes.grid": True, "grid.color": "#e4e7eb", "axes.axisbelow": True,
    "axes.titleweight": "bold", "axes.titlesize": 10.5, "axes.titlelocation": "left"}
_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 400


def _tokens(number: float, _: float) -> str:
    return format_count(number) if number > 0 else "0"


def draw_plans(plans: Sequence[Plan], path: Path, sources: Mapping[str, str | None]) -> None:
    """Draws what changes along runs over their tokens, a column a chain; `sources` names what each run starts from."""
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--picture must end in {', '.join(_FORMATS)}, got {path}")
    chains: list[list[Plan]] = []
    for plan in plans:  # a second run from the same source begins another chain
        chain = next((c for c in chains if c[-1].name == sources.get(plan.name)), None)
        chain.append(plan) if chain else chains.append([plan])
    ends: dict[str | None, int] = {}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3 + 5 * len(chains), 7.4), layout="constrained")
        panels = figure.subplots(5, len(chains), sharex="col", sharey="row", squeeze=False,
                                 gridspec_kw={"height_ratios": (2.2, 1.3, 1.3, 0.8, 1)})
        for column, chain in zip(panels.T, chains):
            for plan in chain:
                begin = ends.get(sources.get(plan.name), 0)
                ends[plan.name] = begin + plan.num_tokens
                _draw_plan(column, plan, begin)
            column[0].set_title(", ".join(plan.name for plan in chain), fontsize=8)
            column[-1].set_xlabel("tokens since initialisation")
            column[-1].xaxis.set_major_formatter(_tokens)
        for axes, label in zip(panels[:, 0], ("learning rate", "rows a step", "mask rate", "objective", "row length")):
            axes.set_ylabel(label)
        labels = {label: handle for axes in panels[3] for handle, label in zip(*axes.get_legend_handles_labels())}
        panels[3, -1].legend(labels.values(), labels, loc="upper right", bbox_to_anchor=(1, 1.35), ncols=3, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _draw_plan(panels: Sequence[Any], plan: Plan, begin: int) -> None:
    """Adds a run to the five panels of its chain."""
    rate, batch, mask, objective, length = panels
    total, curves = plan.num_tokens, plan.curves
    grid = np.linspace(0, 1, _POINTS + 1)
    found = learning_rates(plan.cfg, [*grid, *grid**3])  # denser at the begin, where a square root is steep
    if found is not None:
        rate.plot(begin + np.array(found[0]) * total, found[1], color=_LINE)
    else:
        peak = plan.cfg["optimizer"]["lr"]
        rate.plot([begin, begin + total], [peak, peak], color=_GREY, linestyle="--")
        rate.text(begin + total / 2, peak, plan.cfg["scheduler"]["name"], ha="center", va="bottom")
    per_row = plan.tokens_per_step / plan.rows_per_step
    ramp = batch_ramp(plan.cfg, per_row)
    steps = [*range(0, plan.warmup_steps, ramp.steps_per_size), plan.warmup_steps]
    edges = [min(total, ramp.first_row(step) * per_row) for step in steps] + [total]
    batch.stairs([ramp.rows(step) for step in steps], begin + np.array(edges), baseline=None, color=_LINE)
    masked = [piece for piece in curves.pieces if piece.shares.keys() & set(MASKED_OBJECTIVES)]
    points = [(begin + at, y) for p in masked
              for at, y in ((p.begin, p.first_rate), (p.end, p.last_rate), (p.end, np.nan))]
    mask.plot(*zip(*points), color=_LINE)
    borders = [piece.begin for piece in curves.pieces] if len(curves.pieces) <= _POINTS else []
    bounds = np.unique([*grid * total, *borders])
    base = np.zeros(len(bounds) - 1)
    for name, shares in curves.shares_between(bounds).items():
        objective.stairs(base + shares, begin + bounds, baseline=base, fill=True, color=_COLORS[name],
                         label=name)
        base = base + shares
    length.plot([begin, begin + total], [plan.max_seq_len] * 2, color=_LINE)
    length.set_ylim(bottom=0)


# ------------------------------------------------------------------ what runs logged


class LoggedRun(NamedTuple):
    """What one stage, which started from `source`, logged: lines of steps.jsonl with tokens, loss and objective."""

    name: str
    source: str | None
    steps: Sequence[Mapping[str, Any]]
    num_tokens: int


def smooth(values: np.ndarray) -> np.ndarray:
    """Means of the up to 25 values around each that are finite, NaN where none is."""
    finite, window = np.isfinite(values), np.ones(2 * min(12, len(values) // 16) + 1)
    sums, counts = (np.convolve(part, window, "same") for part in (np.where(finite, values, 0.0), finite))
    return np.where(counts > 0.5, sums / np.maximum(counts, 1), np.nan)


def draw_losses(runs: Sequence[LoggedRun], path: Path, title: str) -> None:
    """Training losses over tokens since initialisation, a colour a run; losses that are not finite leave a gap."""
    ends: dict[str | None, int] = {}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.5, 4.8), layout="constrained")
        axes = figure.subplots()
        for i, run in enumerate(runs):
            begin = ends.get(run.source, 0)
            ends[run.name] = begin + run.num_tokens
            label: str | None = run.name
            for _, group in itertools.groupby(run.steps, key=lambda step: step["objective"]):
                part = list(group)
                x, losses = [begin + step["tokens"] for step in part], np.array([step["loss"] for step in part], float)
                axes.plot(x, losses, color=f"C{i}", linewidth=0.5, alpha=0.22)
                axes.plot(x, smooth(losses), color=f"C{i}", label=label)
                label = None
            axes.axvline(begin, color=_GREY, linewidth=0.8, linestyle="--")
        axes.set(xlabel="tokens since initialisation", ylabel="training loss (nats per target)", title=title)
        axes.xaxis.set_major_formatter(_tokens)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, fontsize=8.5)
        figure.savefig(path, dpi=150)
