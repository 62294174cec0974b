"""Pictures of a suite: losses of every chain over tokens, evaluation beside them; and the course of one run whose objective
changes. Drawn from what runs logged (steps.jsonl) and nothing else; matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Course", "draw_losses", "draw_run"]

OBJECTIVE_COLORS = {"mlm": "#2a6fbb", "clm": "#e07b24", "mntp": "#1f9e89"}
_MIXED = "#888888"
_TRACK_COLORS = ("#2a6fbb", "#e07b24", "#b5313c", "#1f9e89", "#8e5bbf", "#5c6670", "#c9a227", "#d65f9e")
_GREY = "#6b7280"
_FINE = {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa1a9", "axes.labelcolor": "#30363d",
         "xtick.color": "#30363d", "ytick.color": "#30363d", "axes.titleweight": "bold", "axes.titlesize": 10.5,
         "axes.titlelocation": "left", "font.size": 9.5, "legend.frameon": False, "axes.grid": True, "grid.color": "#e4e7eb",
         "grid.linewidth": 0.7, "axes.axisbelow": True}


@dataclass(frozen=True)
class Course:
    """What one stage logged, step by step."""

    name: str
    source: str | None
    """The stage it started from."""
    objective: str
    """At its end."""
    tokens: Sequence[int]
    """Real tokens before each step."""
    losses: Sequence[float]
    """Nats per target."""
    rates: Sequence[float]
    """Learning rates."""
    mask_rates: Sequence[float]
    objectives: Sequence[str]
    total: int
    """Real tokens of the whole run."""


def _smooth(values: Sequence[float]) -> list[float]:
    """Means of up to 25 values around each, so that lines can be told apart and do not lag.

    At the begin, where losses fall fast, of fewer on both sides; at the end of those before it only, for the last value
    alone would look like a jump.
    """
    half = min(12, len(values) // 16)
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(i - min(half, i), min(i + min(half, i) + 1, len(values))) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def _unit(tokens: int) -> tuple[float, str]:
    names = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))
    return next((pair for pair in names if tokens >= 2 * pair[0]), names[-1])


def _tracks(courses: Sequence[Course]) -> dict[str, list[Course]]:
    """{label: stages drawn as one line}: a line goes on as long as its objective stays."""
    places: dict[str, list[Course]] = {}
    for course in courses:
        before = next((track for track in places.values() if track[-1].name == course.source), None)
        if before is not None and before[-1].objective == course.objective:
            before.append(course)
        else:
            places[course.name] = [course]
    labels = {}
    for track in places.values():
        common = os.path.commonprefix([c.name for c in track]).rstrip("-_.") or track[0].name
        several = list(dict.fromkeys(name for c in track for name in c.objectives))
        labels[f"{common} ({', then '.join(several)})"] = track
    return labels


def draw_losses(courses: Sequence[Course], evaluation: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path,
                title: str) -> None:
    """Training losses over tokens since initialisation, a line a model, borders of phases; losses of exports beside them.

    Args:
        courses: in order. evaluation: {model: {objective: {loss, ...}}}, possibly empty. path: the .png to write.
    """
    plt = _pyplot()
    begins: dict[str, int] = {}
    for course in courses:
        before = next((c for c in courses if c.name == course.source), None)
        begins[course.name] = 0 if before is None else begins[before.name] + before.total
    factor, unit = _unit(max(begins[c.name] + c.total for c in courses))
    with plt.rc_context(_FINE):
        figure, axes = plt.subplots(1, 2 if evaluation else 1, figsize=(13 if evaluation else 8.5, 4.8), squeeze=False,
                                    width_ratios=(1.75, 1) if evaluation else None, layout="constrained")
        left = axes[0, 0]
        for i, (label, track) in enumerate(_tracks(courses).items()):
            color = _TRACK_COLORS[i % len(_TRACK_COLORS)]
            for part, course in enumerate(track):
                for begin, end, _ in _bands(course):  # the losses of two objectives have no common mean
                    steps = [i for i, tokens in enumerate(course.tokens) if begin <= tokens < end]
                    x = [(begins[course.name] + course.tokens[i]) / factor for i in steps]
                    losses = [course.losses[i] for i in steps]
                    left.plot(x, losses, color=color, linewidth=0.5, alpha=0.22)
                    left.plot(x, _smooth(losses), color=color, linewidth=1.6, solid_capstyle="round",
                              label=label if part == 0 and begin == 0 else None)
        borders = sorted({begin for begin in begins.values() if begin})
        for border in borders:
            left.axvline(border / factor, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        _name_phases(left, courses, begins, factor)
        left.set(xlabel=f"{unit} since initialisation", ylabel="training loss (nats per target)", xlim=(0, None))
        left.set_title(title, pad=22)
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, fontsize=8.5, handlelength=1.4)
        if evaluation:
            _bars(axes[0, 1], evaluation)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _name_phases(axis: Any, courses: Sequence[Course], begins: Mapping[str, int], factor: float) -> None:
    """The phase's name over each stretch; stages that begin at the same place share one."""
    named: dict[int, tuple[str, int]] = {}
    for course in courses:
        phase = "cross" if "-from-" in course.name else course.name.rpartition("-")[2]
        named.setdefault(begins[course.name], (phase, course.total))
    for begin, (phase, total) in named.items():
        axis.annotate(phase, ((begin + total / 2) / factor, 1.01), xycoords=("data", "axes fraction"), ha="center",
                      va="bottom", fontsize=8.5, color=_GREY)


def _bars(axis: Any, evaluation: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """A group of bars a model: its validation loss under each objective."""
    objectives = list(next(iter(evaluation.values())))
    height = 0.8 / len(objectives)
    for j, objective in enumerate(objectives):
        places = [i - 0.4 + (j + 0.5) * height for i in range(len(evaluation))]
        losses = [values[objective]["loss"] for values in evaluation.values()]
        axis.barh(places, losses, height=height * 0.9, color=OBJECTIVE_COLORS.get(objective, _MIXED), label=objective)
        for place, loss in zip(places, losses):
            axis.text(loss, place, f" {loss:.2f}", va="center", fontsize=7.5, color="#30363d")
    highest = max(v["loss"] for values in evaluation.values() for v in values.values())
    axis.set(yticks=range(len(evaluation)), xlabel="validation loss (nats per target)", xlim=(0, highest * 1.14))
    axis.set_yticklabels(list(evaluation))
    axis.set_title("each model under each objective", pad=22)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(objectives), fontsize=8.5, handlelength=1.0,
                borderaxespad=0.1)
    axis.tick_params(axis="y", length=0)


def draw_run(course: Course, path: Path) -> None:
    """One run whose objective changes: loss, mask rate and learning rate over tokens, on bands of the objectives.

    Args:
        path: the .png to write.
    """
    plt = _pyplot()
    factor, unit = _unit(course.total)
    x = [tokens / factor for tokens in course.tokens]
    with plt.rc_context(_FINE):
        figure, (loss, mask, rate) = plt.subplots(3, 1, figsize=(9, 6.2), sharex=True, height_ratios=(3.2, 1, 1),
                                                  layout="constrained")
        for begin, end, objective in _bands(course):
            color = OBJECTIVE_COLORS.get(objective, _MIXED)
            for axis in (loss, mask, rate):
                axis.axvspan(begin / factor, end / factor, color=color, alpha=0.10, linewidth=0)
            part = [i for i, tokens in enumerate(course.tokens) if begin <= tokens < end]
            own = [course.losses[i] for i in part]
            place = [x[i] for i in part]
            loss.plot(place, own, color=color, linewidth=0.6, alpha=0.35)
            loss.plot(place, _smooth(own), color=color, linewidth=2.0, solid_capstyle="round")
            if (end - begin) / course.total > 0.05:
                loss.annotate(objective, ((begin + end) / 2 / factor, 0.965), xycoords=("data", "axes fraction"),
                              ha="center", va="top", color=color, fontweight="bold", fontsize=11)
        mask.step([*x, course.total / factor], [*course.mask_rates, course.mask_rates[-1]], where="post", color=_GREY,
                  linewidth=1.6)
        rate.plot([*x, course.total / factor], [*course.rates, course.rates[-1]], color=_GREY, linewidth=1.6)
        mask.set(ylabel="mask rate", ylim=(-0.03, max(0.05, max(course.mask_rates)) * 1.25))
        rate.set(ylabel="learning rate", ylim=(0, max(course.rates) * 1.2 or 1))
        rate.set(xlabel=unit, xlim=(0, course.total / factor))
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        loss.set(ylabel="training loss (nats per target)")
        loss.set_title(f"{course.name}: one run, {' then '.join(dict.fromkeys(course.objectives))}")
        figure.align_ylabels()
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _bands(course: Course) -> list[tuple[int, int, str]]:
    """(first token, last token, objective) of each stretch of one objective."""
    found: list[tuple[int, int, str]] = []
    for tokens, objective in zip(course.tokens, course.objectives):
        if not found or found[-1][2] != objective:
            found.append((tokens, course.total, objective))
            if len(found) > 1:
                found[-2] = (found[-2][0], tokens, found[-2][2])
    return found


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
