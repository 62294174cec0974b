"""Pictures with matplotlib: the curves of planned runs, the losses of a suite, and one run whose objective changes.

Plans are drawn from recipes, suites from what their runs logged (steps.jsonl).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ettin_foundry.data.quantities import format_count
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.tools.curves import learning_rates, lr_breakpoints
from ettin_foundry.tools.plan import Plan, batch_ramp

__all__ = ["LoggedRun", "draw_losses", "draw_plans", "draw_run", "smooth"]

OBJECTIVE_COLORS = {"mlm": "#2a6fbb", "clm": "#e07b24", "mntp": "#1f9e89"}
_COLORS = ("#2a6fbb", "#e07b24", "#b5313c", "#1f9e89", "#8e5bbf", "#5c6670", "#c9a227", "#d65f9e")
_LINE, _PALE, _GREY = "#30363d", "#9aa1a9", "#6b7280"
_STYLE: dict[str, Any] = {
    **matplotlib.rcParamsDefault, "backend": "agg", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9.0,
    "axes.edgecolor": _PALE, "axes.labelcolor": _LINE, "xtick.color": _LINE, "ytick.color": _LINE, "legend.frameon": False,
    "axes.titleweight": "bold", "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": "#e4e7eb", "grid.linewidth": 0.7, "axes.axisbelow": True, "svg.fonttype": "none", "svg.hashsalt": "ettin"}
_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 400


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


# ------------------------------------------------------------------ plans


@dataclass(frozen=True)
class _Span:
    """The range of the axis that a run covers."""

    plan: Plan
    left: float
    width: float
    before: int
    """Tokens of its chain before it."""

    def x(self, tokens: Any) -> Any:
        return self.left + self.width * np.asarray(tokens, dtype=np.float64) / self.plan.num_tokens


def _chains(plans: Sequence[Plan], sources: Mapping[str, str | None]) -> list[list[_Span]]:
    """Runs that start from one another, side by side; a second run from the same source begins another chain.

    Widths grow as the square root of a run's tokens, at least 7% of the chain, so that short phases can be seen.
    """
    chains: list[list[Plan]] = []
    for plan in plans:
        chain = next((c for c in chains if c[-1].name == sources.get(plan.name)), None)
        chain.append(plan) if chain else chains.append([plan])
    ends: dict[str, int] = {}
    spans, left = [], 0.0
    for chain in chains:
        widths = np.sqrt([plan.num_tokens for plan in chain])
        widths = np.maximum(widths / widths.sum(), 0.07 if len(chain) > 1 else 0)
        widths *= math.sqrt(len(chain)) / widths.sum()
        spans.append([])
        for plan, width in zip(chain, widths):
            before = ends.get(sources.get(plan.name) or "", 0)
            ends[plan.name] = before + plan.num_tokens
            spans[-1].append(_Span(plan, left, float(width), before))
            left += float(width)
        left += 0.07 * math.sqrt(len(chain))
    return spans


def _draw_span(panels: Sequence[Any], span: _Span) -> None:
    """One run's learning rate, rows a step, mask rate, objective and row length."""
    rate, batch, mask, objective, length = panels
    plan, total, middle = span.plan, span.plan.num_tokens, span.left + span.width / 2
    grid = np.linspace(0, 1, _POINTS + 1)
    places = np.unique([*grid, *grid**3, *lr_breakpoints(plan.cfg)])  # denser at the begin, where a square root is steep
    if (rates := learning_rates(plan.cfg, places)) is not None:
        rate.plot(span.x(places * total), rates, color=_LINE, linewidth=1.6)
    else:
        rate.plot(span.x([0, total]), [plan.cfg["optimizer"]["lr"]] * 2, color=_PALE, linestyle="--")
        rate.text(middle, plan.cfg["optimizer"]["lr"], plan.cfg["scheduler"]["name"], ha="center", va="bottom", fontsize=7.5)

    per_row = plan.tokens_per_step / plan.rows_per_step
    ramp = batch_ramp(plan.cfg, per_row)
    steps = [*range(0, plan.warmup_steps, ramp.steps_per_size), plan.warmup_steps]
    edges = [min(total, ramp.first_row(step) * per_row) for step in steps] + [total]
    batch.stairs([ramp.rows(step) for step in steps], span.x(edges), baseline=None, color=_LINE, linewidth=1.6)

    masked = [p for p in plan.curves.pieces if p.shares.keys() & set(MASKED_OBJECTIVES)]
    if len(masked) > _POINTS:  # blocks that alternate faster than could be seen
        masked = [masked[i] for i in np.linspace(0, len(masked) - 1, _POINTS).astype(int)]
    points = [point for p in masked for point in ((p.begin, p.first_rate), (p.end, p.last_rate), (p.end, np.nan))]
    if points:
        x, y = zip(*points)
        mask.plot(span.x(x), y, color=_LINE, linewidth=1.6)
    else:
        mask.text(middle, 0.5, "none", transform=mask.get_xaxis_transform(), ha="center", va="center", color=_PALE)

    pieces = plan.curves.pieces
    bounds = np.unique([*np.linspace(0, total, _POINTS + 1), *([p.begin for p in pieces] if len(pieces) <= _POINTS else [])])
    base = np.zeros(len(bounds) - 1)
    for name, shares in plan.curves.shares_between(bounds).items():
        objective.stairs(base + shares, span.x(bounds), baseline=base, fill=True, color=OBJECTIVE_COLORS[name], linewidth=0)
        base = base + shares
    if len(plan.curves.objectives) == 1:
        objective.text(middle, 0.5, plan.curves.objectives[0], ha="center", va="center", color="white", fontweight="bold",
                       fontsize=8.5)
    length.plot(span.x([0, total]), [plan.max_seq_len] * 2, color=_LINE, linewidth=1.6)


def _label(panels: Sequence[Any], chains: Sequence[Sequence[_Span]]) -> None:
    """Axis labels and limits, names and borders of runs, and the tokens before each border."""
    rate, batch, mask, objective, length = panels
    plans = [span.plan for chain in chains for span in chain]
    for axes, label in zip(panels, ("learning rate", "rows a step", "mask rate", "objective", "row length")):
        axes.set_ylabel(label)
        axes.grid(False, axis="x")
        axes.tick_params(axis="x", length=2)
    for axes in (rate, batch, mask):
        axes.set_ylim(0, max(1e-9, axes.dataLim.y1) * 1.2)
        axes.locator_params(axis="y", nbins=4)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    batch.yaxis.set_major_formatter("{x:,.0f}")
    objective.set(ylim=(0, 1), yticks=[0, 0.5, 1])
    names = list(dict.fromkeys(name for plan in plans for name in plan.curves.objectives))
    if any(len(plan.curves.objectives) > 1 for plan in plans):
        objective.legend(handles=[Patch(color=OBJECTIVE_COLORS[name], label=name) for name in names], loc="lower right",
                         bbox_to_anchor=(1, 1.0), ncols=len(names), fontsize=8, handlelength=1.0, borderaxespad=0.1)
    lengths = sorted({plan.max_seq_len for plan in plans})
    length.set_yscale("log", base=2)
    length.set(ylim=(lengths[0] / 2, lengths[-1] * 2))
    length.set_yticks(lengths, [f"{tokens:,}" for tokens in lengths])
    length.set_yticks([], minor=True)
    ticks, labels = [], []
    for chain in chains:
        ticks += [chain[0].left, *(span.left + span.width for span in chain)]
        labels += [format_count(n) for n in (chain[0].before, *(span.before + span.plan.num_tokens for span in chain))]
        for span in chain if len(plans) > 1 else ():
            rate.text(span.left + span.width / 2, 1.03, span.plan.name, transform=rate.get_xaxis_transform(), rotation=25,
                      ha="left", va="bottom", fontsize=8, rotation_mode="anchor")
            for axes, x in itertools.product(panels, (span.left, span.left + span.width)):
                axes.axvline(x, color=_PALE, linewidth=0.6, zorder=0)
    if len(plans) == 1:
        [[span]] = chains
        tokens = np.linspace(0, span.plan.num_tokens, 6)
        ticks, labels = span.x(tokens).tolist(), [format_count(n) for n in tokens]
        rate.set_title(f"{span.plan.name}: {format_count(span.plan.num_tokens)} tokens, {span.plan.num_steps:,} steps")
    for axes in panels:
        axes.set_xlim(0, chains[-1][-1].left + chains[-1][-1].width)
        axes.set_xticks(ticks, labels if axes is panels[-1] else [""] * len(labels))
    length.set_xlabel("tokens" if len(plans) == 1 else
                      "tokens since initialisation (widths: square root of a run's tokens)")


def draw_plans(plans: Sequence[Plan], path: Path, sources: Mapping[str, str | None]) -> None:
    """Learning rate, batch size, mask rate, objective and row length of runs over their tokens.

    Args:
        path: ends in .png, .svg or .pdf. sources: {run: the run that it starts from, or None}.

    Raises:
        ValueError: another ending.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--picture must end in {', '.join(_FORMATS)}, got {path}")
    chains = _chains(plans, sources)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(min(16.0, 8.0 + 0.6 * len(plans)), 7.4), layout="constrained")
        panels = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": (2.2, 1.3, 1.3, 0.8, 1)})
        for span in itertools.chain(*chains):
            _draw_span(panels, span)
        _label(panels, chains)
        figure.align_ylabels(panels)
        _save(figure, path)


# ------------------------------------------------------------------ what runs logged


@dataclass(frozen=True)
class LoggedRun:
    """What one stage logged, step by step."""

    name: str
    source: str | None
    """The stage it started from."""
    objective: str
    """At its end."""
    steps: Sequence[Mapping[str, Any]]
    """Lines of steps.jsonl: tokens before the step, loss in nats per target, lr, mask_rate, objective."""
    num_tokens: int

    @property
    def objectives(self) -> list[str]:
        return list(dict.fromkeys(step["objective"] for step in self.steps))

    def stretches_of_objective(self) -> list[tuple[str, list[int], list[float]]]:
        """(objective, tokens before each step, losses) of every run of steps with one objective."""
        groups = itertools.groupby(self.steps, key=lambda step: step["objective"])
        found = [(name, [(step["tokens"], step["loss"]) for step in group]) for name, group in groups]
        return [(name, [t for t, _ in pairs], [loss for _, loss in pairs]) for name, pairs in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Means of up to 25 values around each; fewer at both ends, and at the end not the last value alone."""
    half = min(12, len(values) // 16)
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(i - min(half, i), min(i + min(half, i) + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def _unit(tokens: int) -> tuple[float, str]:
    units = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))
    return next((unit for unit in units if tokens >= 2 * unit[0]), units[-1])


def draw_losses(runs: Sequence[LoggedRun], evaluation: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path,
                title: str) -> None:
    """Training losses over tokens since initialisation, a colour a model; losses of exports beside them.

    Args:
        evaluation: {model: {objective: {loss, ...}}}, possibly empty.
    """
    begins: dict[str, int] = {}
    lines: dict[str, list[LoggedRun]] = {}  # a line goes on as long as its objective stays
    for run in runs:
        before = next((other for other in runs if other.name == run.source), None)
        begins[run.name] = 0 if before is None else begins[before.name] + before.num_tokens
        line = next((line for line in lines.values() if line[-1].name == run.source), None)
        line.append(run) if line and line[-1].objective == run.objective else lines.update({run.name: [run]})
    factor, unit = _unit(max(begins[run.name] + run.num_tokens for run in runs))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13 if evaluation else 8.5, 4.8), layout="constrained")
        left, *rest = np.atleast_1d(figure.subplots(1, 1 + bool(evaluation), width_ratios=(1.75, 1)[:1 + bool(evaluation)]))
        for color, line in zip(itertools.cycle(_COLORS), lines.values()):
            names = dict.fromkeys(name for run in line for name in run.objectives)
            label = f"{os.path.commonprefix([run.name for run in line]).rstrip('-_.')} ({', then '.join(names)})"
            for run in line:
                for _, tokens, losses in run.stretches_of_objective():
                    x = (begins[run.name] + np.array(tokens)) / factor
                    left.plot(x, losses, color=color, linewidth=0.5, alpha=0.22)
                    left.plot(x, smooth(losses), color=color, linewidth=1.6, label=label)
                    label = None
        phases = {begins[run.name]: ("cross" if "-from-" in run.name else run.name.rpartition("-")[2], run.num_tokens)
                  for run in reversed(runs)}
        for begin, (phase, tokens) in phases.items():
            left.annotate(phase, ((begin + tokens / 2) / factor, 1.01), xycoords=("data", "axes fraction"), ha="center",
                          va="bottom", fontsize=8.5, color=_GREY)
            if begin:
                left.axvline(begin / factor, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        left.set(xlabel=f"{unit} since initialisation", ylabel="training loss (nats per target)", xlim=(0, None))
        left.set_title(title, pad=22)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, fontsize=8.5, handlelength=1.4)
        if rest:
            _bars(rest[0], evaluation)
        _save(figure, path)


def _bars(axes: Any, evaluation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A group of bars a model: its validation loss under each objective."""
    objectives = list(next(iter(evaluation.values())))
    height = 0.8 / len(objectives)
    for j, objective in enumerate(objectives):
        losses = [values[objective]["loss"] for values in evaluation.values()]
        bars = axes.barh(np.arange(len(losses)) - 0.4 + (j + 0.5) * height, losses, height=height * 0.9,
                         color=OBJECTIVE_COLORS[objective], label=objective)
        axes.bar_label(bars, fmt=" {:.2f}", fontsize=7.5, color=_LINE)
    axes.set_yticks(range(len(evaluation)), list(evaluation))
    axes.set(xlabel="validation loss (nats per target)")
    axes.margins(x=0.14)
    axes.set_title("each model under each objective", pad=22)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(objectives), fontsize=8.5, handlelength=1.0,
                borderaxespad=0.1)
    axes.tick_params(axis="y", length=0)


def draw_run(run: LoggedRun, path: Path) -> None:
    """One run whose objective changes: loss, mask rate and learning rate over tokens, on bands of the objectives."""
    factor, unit = _unit(run.num_tokens)
    x = [step["tokens"] / factor for step in run.steps] + [run.num_tokens / factor]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 6.2), layout="constrained")
        panels = loss, mask, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1, 1))
        parts = run.stretches_of_objective()
        ends = [tokens[0] for _, tokens, _ in parts[1:]] + [run.num_tokens]
        for (objective, tokens, losses), end in zip(parts, ends):
            color, places = OBJECTIVE_COLORS.get(objective, _GREY), np.array(tokens) / factor
            for axes in panels:
                axes.axvspan(places[0], end / factor, color=color, alpha=0.10, linewidth=0)
            loss.plot(places, losses, color=color, linewidth=0.6, alpha=0.35)
            loss.plot(places, smooth(losses), color=color, linewidth=2.0)
            if (end - tokens[0]) / run.num_tokens > 0.05:
                loss.annotate(objective, ((tokens[0] + end) / 2 / factor, 0.965), xycoords=("data", "axes fraction"),
                              ha="center", va="top", color=color, fontweight="bold", fontsize=11)
        for axes, key in ((mask, "mask_rate"), (rate, "lr")):
            values = [step[key] for step in run.steps]
            axes.step(x, [*values, values[-1]], where="post", color=_GREY, linewidth=1.6)
            axes.set_ylim(0, max(1e-9, *values) * 1.2)
        loss.set(ylabel="training loss (nats per target)")
        loss.set_title(f"{run.name}: one run, {' then '.join(run.objectives)}")
        mask.set(ylabel="mask rate")
        rate.set(ylabel="learning rate", xlabel=unit, xlim=(0, run.num_tokens / factor))
        figure.align_ylabels()
        _save(figure, path)
