"""The pictures of every report: drawn by matplotlib, as SVG that stands in a page and takes its font and text colour.

They are 440 px wide, so that a phone shows their letters large enough; a page puts them side by side.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import pandas
from matplotlib.figure import Figure

from ettin_foundry.data.inspect import format_count

# of lines and of the names beside them: each can be seen on white and on black
COLORS = ("#4269d0", "#e08a00", "#3ca951", "#e0523f", "#a463f2", "#2ba8a0", "#d6639a", "#9c6b4e", "#8a929e", "#7f9b1e")
_INK = "#010203"  # becomes the page's text colour
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_STYLE: Any = {**matplotlib.rcParamsDefault, **dict.fromkeys(_INKED, _INK), "backend": "agg", "font.size": 12.5,
               "svg.fonttype": "none", "svg.hashsalt": "ettin", "axes.grid": True, "grid.alpha": 0.13,
               "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
               "ytick.major.size": 0, "xtick.major.size": 3}
_STANDALONE = "svg{color:#1c2128;font-family:sans-serif}@media(prefers-color-scheme:dark){svg{color:#dce3ea}}"
_POINTS = 240  # of a line at most: more are not seen


class Line(NamedTuple):
    """A line with the range around its values; NaN leaves a gap."""

    label: str
    color: str
    x: Any
    y: Any
    low: Any
    high: Any


def binned(x: Any, y: Any) -> list[Any]:
    """[x, mean, 10% and 90% quantiles of y] of stretches of a long line, as series; NaN in y is left out."""
    frame = pandas.DataFrame({"x": x, "y": y}, dtype=float).reset_index(drop=True)
    groups = frame.groupby(frame.index // (1 + (len(frame) - 1) // _POINTS))
    return [groups.x.mean(), groups.y.mean(), groups.y.quantile(0.1), groups.y.quantile(0.9)]


def draw_lines(lines: Sequence[Line], title: str, *, x: str, y: str, starts: Sequence[float] = (),
               points: bool = False) -> str:
    """Lines over a common axis; `starts` are marked. `points` are few, numbers or names, each shown with its error."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(440 / 72, 250 / 72), layout="constrained")  # the units of SVG are points
        axes = figure.subplots()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        for start in starts:
            axes.axvline(start, color=_INK, alpha=0.35, linewidth=0.8, linestyle=(0, (3, 3)))
        for line in lines:
            axes.plot(line.x, line.y, color=line.color, linewidth=1.7, markersize=4.5, gid=f"title {line.label}",
                      marker="o" if points or len(line.x) < 12 else "")
            if points:
                axes.vlines(line.x, line.low, line.high, color=line.color, linewidth=5, alpha=0.28)
            else:
                axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.16, linewidth=0)
        axes.set(xlabel=x, ylabel=y)
        axes.yaxis.set_major_formatter(lambda value, _: _number(value))
        places = sorted({place for line in lines for place in line.x if points and not isinstance(place, str)})
        if places:
            axes.set_xscale("log" if 0 < 8 * places[0] <= places[-1] else "linear")
            axes.set_xticks(places, [*map(_number, places)])
            axes.set_xticks([], minor=True)
        elif not points:
            axes.locator_params(nbins=5)
            axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        return _svg(figure, title)


def standalone(svg: str) -> str:
    """A picture as a file of its own, whose text is dark or light as its reader's settings are."""
    return svg.replace(">", f' xmlns="http://www.w3.org/2000/svg"><style>{_STANDALONE}</style>', 1) + "\n"


def _number(value: float) -> str:
    return format_count(value) if value >= 1000 else f"{value:.3g}".replace("e-0", "e-")


def _svg(figure: Figure, title: str) -> str:
    """The figure as <svg> for the inside of a page: ids that no other picture has, short numbers, the page's font."""
    figure.savefig(buffer := io.StringIO(), format="svg")
    text, own = buffer.getvalue(), re.sub(r"\W+", "-", title)
    box, used = re.findall(r'viewBox="[^"]*"', text)[0], set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text))
    for pattern, new in (
            (r"(?s)^.*?<svg[^>]*>|<(metadata|style).*?</\1>|<!--.*?-->| transform=\"rotate\(-0[^\"]*\"", ""),
            (r"font: ([\d.]+px) [^;\"]*", r"font-size: \1"), (_INK, "currentColor"),
            (r'<g id="title ([^"]*)">', r"<g><title>\1</title>"),
            (r' id="([^"]*)"', lambda found: f' id="{own}-{found[1]}"' if found[1] in used else ""),
            (r'(?:xlink:)?(href="|url\()#', rf"\1#{own}-"), (r"\s*\n\s*", " "),
            (r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]))):
        text = re.sub(pattern, new, text)
    return f'<svg {box} role="img" aria-label="{html.escape(title)}">{text.strip()}'
