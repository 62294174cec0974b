"""How far runs are, by their steps.jsonl: read while it is written, on any machine that sees the folder.

Neither torch nor the host is imported.
"""

from __future__ import annotations

import itertools
import json
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas
import pyarrow as pa
from pyarrow.json import read_json
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ettin_foundry.data.inspect import format_count
from ettin_foundry.training.run_config import parse_time
from ettin_foundry.training.steps import RUN, STEPS

_KEYS = ["step", "tokens", "objective", "lr", "loss", "seconds"]  # that are read
_STEPS = 100  # whose mean speed and loss are told
_QUIET = 120.0  # seconds: a run that lives touches its .lock every 30 (training/watch.py)
_EVERY = 2.0  # seconds between two looks


def read(folder: Path) -> pandas.DataFrame:
    """A run's steps; an unfinished last line is left out. A ValueError or KeyError for a file of something else."""
    text = (folder / STEPS).read_bytes().replace(b"NaN", b"null")
    if not (whole := text[: text.rfind(b"\n") + 1]):
        return pandas.DataFrame(columns=pandas.Index(_KEYS))
    return read_json(pa.BufferReader(whole)).select(_KEYS).to_pandas().astype({"loss": float})


def row(folder: Path, steps: pandas.DataFrame) -> dict[str, str]:
    """{head: cell} of a run; loss and speed are means of its last steps."""
    facts = json.loads((folder / RUN).read_text(encoding="utf-8") or "{}") if (folder / RUN).is_file() else {}
    quiet = time.time() - max(path.stat().st_mtime for path in (folder / STEPS, folder / ".lock") if path.is_file())
    found = {"run": folder.name, "state": "running" if quiet < _QUIET else
             f"stopped {timedelta(seconds=round(quiet))} ago"}
    if steps.empty:
        return found
    first, last = steps.iloc[max(0, len(steps) - _STEPS)], steps.iloc[-1]
    seconds = steps.seconds[-_STEPS:-1].sum()  # of a step: the next line tells its tokens
    speed = (last.tokens - first.tokens) / seconds if seconds else 0.0
    found |= {"tokens": format_count(last.tokens), "loss": f"{steps.loss[-_STEPS:].mean():.4f} {last.objective}",
              "lr": f"{last.lr:.2e}", "tokens/s": f"{speed:,.0f}"}
    if facts.get("finished"):
        found |= {"state": "finished", "done": "100%"}
    elif until := facts.get("max_duration"):
        amount, unit = parse_time(f"{folder / RUN}: max_duration", until)
        done = last.tokens if unit == "tok" else last.step + 1
        left = max(0.0, amount - done) * last.tokens / done / speed if done and speed else 0.0
        found |= {"done": f"{done / amount:.0%}", "left": str(timedelta(seconds=round(left)))}
    return found


def _plot(name: str, steps: pandas.DataFrame, width: int, height: int) -> Text:
    """Loss over tokens, a sign an objective: means of the steps that share a column."""
    end, signs = steps.tokens.iloc[-1], dict(zip(steps.objective.unique(), itertools.cycle("•×+")))
    columns = (steps.tokens / max(1, end) * (width - 1)).astype(int)
    losses = steps.loss.groupby([columns, steps.objective]).mean().dropna()
    high, low = losses.max(), losses.min()
    canvas = np.full((height, width), " ")
    for (column, objective), loss in losses.items():
        canvas[round((high - loss) / max(1e-9, high - low) * (height - 1)), column] = signs[objective]
    lines = [f"{loss:9.3f} {''.join(line)}" for loss, line in zip(np.linspace(high, low, height), canvas)]
    legend = ", ".join(f"{sign} {objective}" for objective, sign in signs.items())
    head, foot = f"loss of {name} over tokens: {legend}", f"{0:>11}{format_count(end):>{width - 1}}"
    return Text("\n".join([head, *lines, foot]))


def _view(run: Path, console: Console) -> tuple[bool, Group]:
    """(whether one runs, the table of runs with the losses of the one that wrote last)."""
    folder = run.parent if run.is_file() else run
    folders = [folder] if (folder / STEPS).is_file() else [path.parent for path in folder.glob(f"*/{STEPS}")]
    if not folders:
        raise FileNotFoundError(f"{run}: no {STEPS} there or one folder down; give the save folder of a run with "
                                "callbacks.ettin_steps, or the root of a suite")
    table, steps, rows = Table(box=None, pad_edge=False), pandas.DataFrame(), []
    for head in ("run", "state", "tokens", "done", "loss", "lr", "tokens/s", "left"):
        table.add_column(head, overflow="fold")
    for folder in sorted(folders, key=lambda folder: (folder / STEPS).stat().st_mtime):
        rows.append(row(folder, steps := read(folder)))
        table.add_row(*(rows[-1].get(str(column.header), "") for column in table.columns))
    height = max(8, min(24, console.height - len(rows) - 4))
    plot = "" if steps.empty else _plot(folder.name, steps, max(8, console.width - 10), height)
    return any(each["state"] == "running" for each in rows), Group(table, "", plot)


def watch(run: Path, follow: bool) -> None:
    """Prints the run in a folder, or those of a suite in its root; with `follow`, again until all have ended."""
    console = Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            running, view = _view(run, console)
            live.update(view, refresh=True)
            if not (follow and running):
                break
            time.sleep(_EVERY)
