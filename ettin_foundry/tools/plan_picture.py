"""The picture of a plan: learning rate, batch size, mask rate, objective and row length over the tokens of a run or a chain.

Drawn from recipes alone. A chain is a model's way through several runs; chains stand side by side, each with a token axis of
its own. A chain of several runs is drawn with widths that grow as the square root of a run's tokens, or short phases would
be too thin to see; the ticks say how many tokens lie behind. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.quantities import format_count
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.tools.plan import batch_ramp
from ettin_foundry.tools.plan_course import learning_rates, lr_joints
from ettin_foundry.tools.plan_report import PlannedRun
from ettin_foundry.tools.suite_picture import OBJECTIVE_COLORS

__all__ = ["draw"]

_COLORS = OBJECTIVE_COLORS
_LINE, _PALE = "#30363d", "#9aa1a9"
_STYLE = {"font.size": 9.0, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
          "axes.edgecolor": _PALE, "axes.labelcolor": _LINE, "xtick.color": _LINE, "ytick.color": _LINE, "axes.grid": True,
          "axes.grid.axis": "y", "grid.color": "#e4e7eb", "grid.linewidth": 0.7, "axes.axisbelow": True,
          "svg.fonttype": "none", "svg.hashsalt": "ettin"}
_FORMATS = (".png", ".svg", ".pdf")
_POINTS = 400
_GAP, _LEAST = 0.07, 0.07
"""Of a chain's width: the space between chains, and what the shortest run gets at least."""


@dataclass(frozen=True)
class _Place:
    """Where a run lies on the axis."""

    run: PlannedRun
    left: float
    width: float
    before: int
    """Tokens of its chain before it."""

    def x(self, tokens: Any) -> Any:
        return self.left + self.width * np.asarray(tokens, dtype=np.float64) / self.run.plan.num_tokens


def _chains(runs: Sequence[PlannedRun], sources: Mapping[str, str | None] | None) -> list[list[PlannedRun]]:
    """Runs in the order in which one starts from the other; a second run from the same source begins a chain anew.

    Without sources, all are one chain.
    """
    if sources is None:
        return [list(runs)]
    found: list[list[PlannedRun]] = []
    for run in runs:
        at = next((chain for chain in found if chain[-1].name == sources.get(run.name)), None)
        if at is None:
            found.append([run])
        else:
            at.append(run)
    return found


def _places(chains: Sequence[Sequence[PlannedRun]], sources: Mapping[str, str | None]) -> list[list[_Place]]:
    ends: dict[str, int] = {}
    found: list[list[_Place]] = []
    left = 0.0
    for chain in chains:
        widths = np.sqrt([run.plan.num_tokens for run in chain])
        widths = np.maximum(widths / widths.sum(), _LEAST if len(chain) > 1 else 0)
        places = []
        for run, width in zip(chain, widths / widths.sum() * math.sqrt(len(chain))):
            before = ends.get(sources.get(run.name) or "", 0)
            ends[run.name] = before + run.plan.num_tokens
            places.append(_Place(run, left, float(width), before))
            left += float(width)
        found.append(places)
        left += _GAP * math.sqrt(len(chain))
    return found


def _rates(axes: Any, place: _Place) -> None:
    grid = np.linspace(0, 1, _POINTS + 1)
    at = np.unique([*grid, *grid**3, *lr_joints(place.run.cfg)])  # denser at the begin, where a root is steep
    values = learning_rates(place.run.cfg, at)
    if values is not None:
        axes.plot(place.x(at * place.run.plan.num_tokens), values, color=_LINE, linewidth=1.6)
        return
    axes.plot(place.x([0, place.run.plan.num_tokens]), [place.run.cfg["optimizer"]["lr"]] * 2, color=_PALE, linestyle="--")
    axes.text(place.left + place.width / 2, place.run.cfg["optimizer"]["lr"], place.run.cfg["scheduler"]["name"],
              ha="center", va="bottom", fontsize=7.5)


def _batch(axes: Any, place: _Place) -> None:
    plan = place.run.plan
    per_row = plan.tokens_per_step / plan.rows_per_step
    ramp = batch_ramp(place.run.cfg, per_row)
    steps = [*range(0, plan.warmup_steps, ramp.steps_per_size), plan.warmup_steps]
    edges = [min(plan.num_tokens, ramp.first_row(step) * per_row) for step in steps] + [plan.num_tokens]
    axes.stairs([ramp.rows(step) for step in steps], place.x(edges), baseline=None, color=_LINE, linewidth=1.6)


def _mask(axes: Any, place: _Place) -> None:
    pieces = place.run.along.pieces
    if len(pieces) > _POINTS:  # blocks that alternate faster than could be seen: gaps between masked ones are left out
        pieces = [piece for piece in pieces if piece.shares.keys() & set(MASKED_OBJECTIVES)]
        pieces = [pieces[i] for i in np.linspace(0, len(pieces) - 1, _POINTS).astype(int)] if pieces else []
    x, y = [], []
    for piece in pieces:
        masks = piece.shares.keys() & set(MASKED_OBJECTIVES)
        x += [piece.begin, piece.end]
        y += [piece.first_rate, piece.last_rate] if masks else [np.nan, np.nan]
    axes.plot(place.x(x), y, color=_LINE, linewidth=1.6)
    if not set(place.run.along.objectives) & set(MASKED_OBJECTIVES):
        axes.text(place.left + place.width / 2, 0.5, "none", transform=axes.get_xaxis_transform(), ha="center", va="center",
                  color=_PALE)


def _objective(axes: Any, place: _Place) -> None:
    along, total = place.run.along, place.run.plan.num_tokens
    joints = [piece.begin for piece in along.pieces] if len(along.pieces) <= _POINTS else []
    bounds = np.unique([*np.linspace(0, total, _POINTS + 1), *joints])
    base = np.zeros(len(bounds) - 1)
    for name, shares in along.shares_between(bounds).items():
        axes.stairs(base + shares, place.x(bounds), baseline=base, fill=True, color=_COLORS[name], linewidth=0)
        base = base + shares
    if len(along.objectives) == 1:
        axes.text(place.left + place.width / 2, 0.5, along.objectives[0], ha="center", va="center", color="white",
                  fontweight="bold", fontsize=8.5)


def _length(axes: Any, place: _Place) -> None:
    axes.plot([place.left, place.left + place.width], [place.run.plan.max_seq_len] * 2, color=_LINE, linewidth=1.6)


def _finish(panels: Sequence[Any], runs: Sequence[PlannedRun]) -> None:
    """Labels, limits and ticks of the panels."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

    rate, batch, mask, objective, length = panels
    for axes, label in zip(panels, ("learning rate", "rows a step", "mask rate", "objective\n(share of rows)",
                                    "row length\n(tokens)")):
        axes.set_ylabel(label)
    rate.set_ylim(0, max(run.cfg["optimizer"]["lr"] for run in runs) * 1.12)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda v, _: "0" if v == 0 else f"{v:.1e}".replace("e-0", "e-")
                                                 .replace(".0e", "e")))
    batch.set_ylim(0, max(run.plan.rows_per_step for run in runs) * 1.15)
    batch.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    batch.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    masked = [max(piece.first_rate, piece.last_rate) for run in runs for piece in run.along.pieces
              if piece.shares.keys() & set(MASKED_OBJECTIVES)]
    mask.set_ylim(0, max(masked, default=1.0) * 1.2)
    mask.yaxis.set_major_locator(MaxNLocator(4))
    if not masked:
        mask.set_yticks([])
    objective.set(ylim=(0, 1), yticks=[0, 0.5, 1])
    objective.grid(False)
    names = list(dict.fromkeys(name for run in runs for name in run.along.objectives))
    handles = [Patch(color=_COLORS[name], label=name) for name in names]
    if any(len(run.along.objectives) > 1 for run in runs):
        objective.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(handles), frameon=False,
                         fontsize=8, handlelength=1.0, borderaxespad=0.1)
    lengths = sorted({run.plan.max_seq_len for run in runs})
    length.set_yscale("log", base=2)
    length.set(ylim=(lengths[0] / 2, lengths[-1] * 2))
    length.set_yticks(lengths, [f"{tokens:,}" for tokens in lengths])
    length.set_yticks([], minor=True)


def _mark(panels: Sequence[Any], chains: Sequence[Sequence[_Place]]) -> None:
    """Borders and names of runs, and the tokens behind each border."""
    several = sum(map(len, chains)) > 1
    ticks, labels = [], []
    for chain in chains:
        if several:
            ticks += [chain[0].left, *(place.left + place.width for place in chain)]
            ends = [place.before + place.run.plan.num_tokens for place in chain]
            labels += [format_count(tokens) for tokens in (chain[0].before, *ends)]
        else:
            total = chain[0].run.plan.num_tokens
            step = 10 ** math.floor(math.log10(total))
            step = next(step * part for part in (0.1, 0.2, 0.25, 0.5, 1) if total / (step * part) <= 10)
            at = np.arange(0, total * 1.0001, step)
            ticks, labels = chain[0].x(at).tolist(), [format_count(t) for t in at]
        for place in chain if several else ():
            panels[0].text(place.left + place.width / 2, 1.03, place.run.name, transform=panels[0].get_xaxis_transform(),
                           rotation=25, ha="left", va="bottom", fontsize=8, rotation_mode="anchor")
            for axes in panels:
                for x in (place.left, place.left + place.width):
                    axes.axvline(x, color=_PALE, linewidth=0.6, zorder=0)
    last = chains[-1][-1]
    for axes in panels:
        axes.set_xlim(0, last.left + last.width)
        axes.set_xticks(ticks, labels if axes is panels[-1] else [""] * len(labels))
        axes.tick_params(axis="x", length=2)
    panels[-1].set_xlabel("tokens so far on the model's way (widths: square root of a run's tokens)" if several
                          else "tokens")


def draw(runs: Sequence[PlannedRun], path: Path, sources: Mapping[str, str | None] | None = None) -> None:
    """Writes the picture of a run or of several.

    Args:
        path: ends in .png, .svg or .pdf.
        sources: {run: the run that it starts from, or None}; left out: each starts from the one before.

    Raises:
        ValueError: another ending.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"--picture: {path} given; a name that ends in {', '.join(_FORMATS)} is needed. Rename it")
    import matplotlib
    from matplotlib.figure import Figure

    if sources is None:
        sources = {run.name: before.name for run, before in zip(runs[1:], runs)}
    chains = _places(_chains(runs, sources), sources)
    style: Any = {**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"}  # whatever this machine's settings are
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(min(16.0, 8.0 + 0.6 * len(runs)), 7.4), layout="constrained")
        panels = figure.subplots(5, 1, sharex=True, gridspec_kw={"height_ratios": (2.2, 1.3, 1.3, 0.8, 1)})
        for place in (place for chain in chains for place in chain):
            for axes, paint in zip(panels, (_rates, _batch, _mask, _objective, _length)):
                paint(axes, place)
        _finish(panels, runs)
        _mark(panels, chains)
        if len(runs) == 1:
            plan = runs[0].plan
            panels[0].set_title(f"{runs[0].name}: {format_count(plan.num_tokens)} tokens, {plan.num_steps:,} steps",
                                loc="left", fontweight="bold", fontsize=10.5)
        figure.align_ylabels(panels)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
