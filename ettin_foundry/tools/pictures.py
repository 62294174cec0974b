"""Pictures with matplotlib: the curves of planned runs, and the losses of a suite's runs.

Plans are drawn from recipes, losses from what runs logged (steps.jsonl).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ettin_foundry.data.quantities import format_count
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.tools.curves import learning_rates
from ettin_foundry.tools.plan import Plan, batch_ramp

OBJECTIVE_COLORS = {"mlm": "#2a6fbb", "clm": "#e07b24", "mntp": "#1f9e89"}
_COLORS = ("#2a6fbb", "#e07b24", "#b5313c", "#1f9e89", "#8e5bbf", "#5c6670", "#c9a227", "#d65f9e")
_LINE, _GREY = "#30363d", "#6b7280"
_STYLE: Any = {
    **matplotlib.rcParamsDefault, "backend": "agg", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0,
    "legend.frameon": False, "axes.grid": True, "grid.color": "#e4e7eb", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "axes.titleweight": "bold", "axes.titlesize": 10.5, "axes.titlelocation": "left", "svg.fonttype": "none",
    "svg.hashsalt": "ettin"}
_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 400


def draw_plans(plans: Sequence[Plan], path: Path, sources: Mapping[str, str | None]) -> None:
    """Draws learning rate, batch size, mask rate, objective and row length of runs over their tokens, a column a chain.

    Args:
        path: ends in .png, .svg or .pdf, else a ValueError. sources: {run: the run that it starts from, or None}.
    """
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
            column[-1].xaxis.set_major_formatter(lambda tokens, _: format_count(tokens) if tokens > 0 else "0")
        for axes, label in zip(panels[:, 0], ("learning rate", "rows a step", "mask rate", "objective", "row length")):
            axes.set_ylabel(label)
        labels = {label: handle for axes in panels[3] for handle, label in zip(*axes.get_legend_handles_labels())}
        panels[3, -1].legend(labels.values(), labels, loc="upper right", bbox_to_anchor=(1, 1.35), ncols=3, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw_plan(panels: Sequence[Any], plan: Plan, begin: int) -> None:
    """Adds a run to the five panels of its chain."""
    rate, batch, mask, objective, length = panels
    total, curves = plan.num_tokens, plan.curves
    grid = np.linspace(0, 1, _POINTS + 1)
    found = learning_rates(plan.cfg, [*grid, *grid**3])  # denser at the begin, where a square root is steep
    if found is not None:
        rate.plot(begin + np.array(found[0]) * total, found[1], color=_LINE)
    else:
        rate.plot([begin, begin + total], [plan.cfg["optimizer"]["lr"]] * 2, color=_GREY, linestyle="--")
        rate.text(begin + total / 2, plan.cfg["optimizer"]["lr"], plan.cfg["scheduler"]["name"], ha="center", va="bottom")
    per_row = plan.tokens_per_step / plan.rows_per_step
    ramp = batch_ramp(plan.cfg, per_row)
    steps = [*range(0, plan.warmup_steps, ramp.steps_per_size), plan.warmup_steps]
    edges = [min(total, ramp.first_row(step) * per_row) for step in steps] + [total]
    batch.stairs([ramp.rows(step) for step in steps], begin + np.array(edges), baseline=None, color=_LINE)
    masked = [piece for piece in curves.pieces if piece.shares.keys() & set(MASKED_OBJECTIVES)]
    points = [(begin + at, y) for p in masked for at, y in ((p.begin, p.first_rate), (p.end, p.last_rate), (p.end, np.nan))]
    mask.plot(*zip(*points or [(begin, np.nan)]), color=_LINE)
    borders = [piece.begin for piece in curves.pieces] if len(curves.pieces) <= _POINTS else []
    bounds = np.unique([*np.linspace(0, total, _POINTS + 1), *borders])
    base = np.zeros(len(bounds) - 1)
    for name, shares in curves.shares_between(bounds).items():
        objective.stairs(base + shares, begin + bounds, baseline=base, fill=True, color=OBJECTIVE_COLORS[name], label=name)
        base = base + shares
    length.plot([begin, begin + total], [plan.max_seq_len] * 2, color=_LINE)
    length.set_ylim(bottom=0)


# ------------------------------------------------------------------ what runs logged


@dataclass(frozen=True)
class LoggedRun:
    """What one stage, which started from `source`, logged: lines of steps.jsonl with tokens, loss and objective."""

    name: str
    source: str | None
    steps: Sequence[Mapping[str, Any]]
    num_tokens: int

    def parts(self) -> Iterator[tuple[str, list[int], list[float]]]:
        """(objective, tokens before each step, losses) of consecutive steps with one objective."""
        for objective, group in itertools.groupby(self.steps, key=lambda step: step["objective"]):
            part = list(group)
            yield objective, [step["tokens"] for step in part], [step["loss"] for step in part]


def smooth(values: Sequence[float]) -> list[float]:
    """Means of up to 25 values around each; fewer at both ends, and at the end not the last value alone."""
    half = min(12, len(values) // 16)
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(i - min(half, i), min(i + min(half, i) + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def draw_losses(runs: Sequence[LoggedRun], evaluation: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path,
                title: str) -> None:
    """Training losses over tokens since initialisation, a colour a model; losses of exports beside them.

    A colour goes on from a run to the one that starts from it as long as the objective stays.

    Args:
        evaluation: {model: {objective: {loss, ...}}}, possibly empty.
    """
    begins: dict[str | None, int] = {}
    lines: list[list[LoggedRun]] = []
    for run in runs:
        before = next((other for other in runs if other.name == run.source), None)
        begins[run.name] = 0 if before is None else begins[before.name] + before.num_tokens
        line = next((line for line in lines if line[-1].name == run.source), None)
        if line and line[-1].steps[-1]["objective"] == run.steps[-1]["objective"]:
            line.append(run)
        else:
            lines.append([run])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13 if evaluation else 8.5, 4.8), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(1.75, 1)) if evaluation else [figure.subplots()]
        for color, line in zip(itertools.cycle(_COLORS), lines):
            names = dict.fromkeys(objective for run in line for objective, _, _ in run.parts())
            common = os.path.commonprefix([run.name for run in line]).rstrip("-_.") or line[0].name
            label: str | None = f"{common} ({', then '.join(names)})"
            for run in line:
                for _, tokens, losses in run.parts():
                    x = begins[run.name] + np.array(tokens)
                    axes[0].plot(x, losses, color=color, linewidth=0.5, alpha=0.22)
                    axes[0].plot(x, smooth(losses), color=color, label=label)
                    label = None
                axes[0].axvline(begins[run.name], color=_GREY, linewidth=0.8, linestyle="--")
        axes[0].set(xlabel="tokens since initialisation", ylabel="training loss (nats per target)", title=title)
        axes[0].xaxis.set_major_formatter(lambda tokens, _: format_count(tokens) if tokens > 0 else "0")
        axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, fontsize=8.5)
        if evaluation:
            _draw_bars(axes[1], evaluation)
        figure.savefig(path, dpi=150)


def _draw_bars(axes: Any, evaluation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A group of bars a model: its validation loss under each objective."""
    objectives = list(next(iter(evaluation.values())))
    height = 0.8 / len(objectives)
    for j, objective in enumerate(objectives):
        losses = [values[objective]["loss"] for values in evaluation.values()]
        bars = axes.barh(np.arange(len(losses)) - 0.4 + (j + 0.5) * height, losses, height=height * 0.9,
                         color=OBJECTIVE_COLORS[objective], label=objective)
        axes.bar_label(bars, fmt=" {:.2f}", fontsize=7.5)
    axes.set_yticks(range(len(evaluation)), list(evaluation))
    axes.set(xlabel="validation loss (nats per target)", title="each model under each objective")
    axes.margins(x=0.14)
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=len(objectives), fontsize=8.5)
