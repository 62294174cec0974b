"""How far runs are, by their steps.jsonl: read while it is written, on any machine that sees the folder.

Neither torch nor the host is imported.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import plotext
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ettin_foundry.data.inspect import format_count
from ettin_foundry.training.run_config import parse_time
from ettin_foundry.training.steps import RUN, STEPS, parse_step, read_steps

_STEPS = 100  # whose mean speed and loss are told
_QUIET = 120.0  # seconds: a run that lives touches its .lock every 30 (training/watch.py)
_EVERY = 2.0  # seconds between two looks


class Progress:
    """One run, read on at each `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self.curves = defaultdict[str, list[tuple[int, float]]](list)  # (tokens, loss) by objective
        self.last = deque[dict[str, Any]](maxlen=_STEPS)
        self.facts: dict[str, Any] = {}
        self._offset = 0

    def read(self) -> None:
        """Reads what was added; all of it again where a run that goes on has cut lines off."""
        path, facts, begin = self.folder / STEPS, self.folder / RUN, self._offset
        if facts.is_file():
            self.facts = json.loads(facts.read_text(encoding="utf-8") or "{}")  # empty while it is written
        with path.open("rb") as file:
            file.seek(begin)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                step = parse_step(line)
                if begin and (step is None or step["step"] <= self.last[-1]["step"]):
                    begin = path.stat().st_size + 1
                    break
                if step is None:
                    read_steps(path)  # it names the line
                    break
                self.last.append(step)
                self._offset += len(line)
                if step["loss"] is not None and math.isfinite(step["loss"]):
                    self.curves[step["objective"]].append((step["tokens"], step["loss"]))
        if begin > path.stat().st_size:
            self._forget()
            self.read()

    @property
    def speed(self) -> float | None:
        """Tokens a second of the last steps; those of a step are known once the next one is there."""
        seconds = sum(step["seconds"] for step in self.last) - (self.last[-1]["seconds"] if self.last else 0)
        return (self.last[-1]["tokens"] - self.last[0]["tokens"]) / seconds if seconds else None

    def state(self) -> str:
        """Whether it runs: finished, running, or for how long it has given no sign of life."""
        beats = [path.stat().st_mtime for name in (STEPS, ".lock") if (path := self.folder / name).is_file()]
        quiet = max(0.0, time.time() - max(beats))
        if self.facts.get("finished"):
            return "finished"
        return "running" if quiet < _QUIET else f"stopped {timedelta(seconds=round(quiet))} ago"

    def row(self) -> dict[str, str]:
        """{head: cell} of the table; loss and speed are means of the last steps."""
        last = self.last[-1] if self.last else {"tokens": 0, "step": -1}
        losses, speed = [step["loss"] for step in self.last if step["loss"] is not None], self.speed
        until = self.facts.get("max_duration")
        amount, unit = parse_time(f"{self.folder / RUN}: max_duration", until) if until else (0.0, "")
        done = last["tokens"] if unit == "tok" else last["step"] + 1
        left = (amount - done) * last["tokens"] / done / speed if amount and done and speed else None
        share = 1.0 if self.facts.get("finished") else done / amount if amount else None
        return {"run": self.folder.name, "state": self.state(), "tokens": format_count(last["tokens"]),
                "done": "" if share is None else f"{share:.0%}",
                "loss": f"{statistics.fmean(losses):.4f} {last['objective']}" if losses else "",
                "lr": f"{last['lr']:.2e}" if "lr" in last else "", "tokens/s": f"{speed:,.0f}" if speed else "",
                "left": "" if left is None or share == 1 else str(timedelta(seconds=round(max(0.0, left))))}


def find(run: Path) -> list[Progress]:
    """The run in a folder, or those in the folders of a suite, the one that wrote last at the end."""
    folder = run.parent if run.is_file() else run
    found = [folder] if (folder / STEPS).is_file() else [path.parent for path in folder.glob(f"*/{STEPS}")]
    if not found:
        raise FileNotFoundError(f"{run}: no {STEPS} there or one folder down; give the save folder of a run with "
                                "callbacks.ettin_steps, or the root of a suite")
    return [Progress(path) for path in sorted(found, key=lambda path: (path / STEPS).stat().st_mtime)]


def _plot(run: Progress, width: int, height: int) -> Text:
    """Loss over tokens, a colour an objective, a mean of neighbours where there are more steps than columns."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.title(f"loss of {run.folder.name} over tokens")
    for objective, points in run.curves.items():
        size = math.ceil(len(points) / width)
        means = [tuple(map(statistics.fmean, zip(*points[i:i + size]))) for i in range(0, len(points), size)]
        plotext.plot(*map(list, zip(*means)), label=objective)
    end = max(points[-1][0] for points in run.curves.values())
    ticks = [end * i / 4 for i in range(5)]
    plotext.xticks(ticks, [format_count(tick) for tick in ticks])
    return Text.from_ansi(plotext.build())


def _view(runs: Sequence[Progress], console: Console) -> RenderableType:
    for run in runs:
        run.read()
    rows = [run.row() for run in runs]
    table = Table(*rows[0], box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(*row.values())
    if not runs[-1].curves:
        return table
    return Group(table, "", _plot(runs[-1], console.width, max(8, min(24, console.height - len(rows) - 4))))


def watch(run: Path, follow: bool) -> None:
    """Prints runs as a table, and the losses of the one that wrote last; with `follow`, again until all have ended."""
    console, runs = Console(), find(run)
    if not follow:
        console.print(_view(runs, console))
        return
    with Live(_view(runs, console), console=console, auto_refresh=False) as live:
        while any(each.state() == "running" for each in runs):
            time.sleep(_EVERY)
            runs = sorted({each.folder: each for each in itertools.chain(find(run), runs)}.values(),
                          key=lambda each: (each.folder / STEPS).stat().st_mtime)
            live.update(_view(runs, console), refresh=True)
