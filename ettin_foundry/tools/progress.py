"""How far runs are, by their steps.jsonl: read while it is written, on any machine that sees the folder.

Neither torch nor the host is imported.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow.json import read_json
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ettin_foundry.data.inspect import format_count
from ettin_foundry.training.run_config import parse_time
from ettin_foundry.training.steps import RUN, STEPS

_STEPS = 100  # whose mean speed and loss are told
_QUIET = 120.0  # seconds: a run that lives touches its .lock every 30 (training/watch.py)
_EVERY = 2.0  # seconds between two looks


def read(folder: Path) -> dict[str, np.ndarray]:
    """{key: values} of a run's steps; an unfinished last line is left out. ValueError for a file of something else."""
    text = (folder / STEPS).read_bytes().replace(b"NaN", b"null")
    if not (whole := text[: text.rfind(b"\n") + 1]):
        return {}
    table = read_json(pa.BufferReader(whole))
    return {key: table[key].to_numpy() for key in ("step", "tokens", "loss", "lr", "objective", "seconds")}


def row(folder: Path, steps: dict[str, np.ndarray]) -> dict[str, str]:
    """{head: cell} of a run; loss and speed are means of its last steps."""
    facts = json.loads((folder / RUN).read_text(encoding="utf-8") or "{}") if (folder / RUN).is_file() else {}
    quiet = time.time() - max(path.stat().st_mtime for path in (folder / STEPS, folder / ".lock") if path.is_file())
    found = {"run": folder.name, "state": "running" if quiet < _QUIET else
             f"stopped {timedelta(seconds=round(quiet))} ago"}
    if not steps:
        return found
    last = {key: values[-_STEPS:] for key, values in steps.items()}
    tokens, seconds = int(last["tokens"][-1]), last["seconds"][:-1].sum()  # of a step: the next line tells its tokens
    speed = (tokens - int(last["tokens"][0])) / seconds if seconds else 0.0
    found |= {"tokens": format_count(tokens), "loss": f"{np.nanmean(last['loss']):.4f} {last['objective'][-1]}",
              "lr": f"{last['lr'][-1]:.2e}", "tokens/s": f"{speed:,.0f}"}
    if facts.get("finished"):
        found |= {"state": "finished", "done": "100%"}
    elif until := facts.get("max_duration"):
        amount, unit = parse_time(f"{folder / RUN}: max_duration", until)
        done = tokens if unit == "tok" else int(last["step"][-1]) + 1
        left = max(0.0, amount - done) * tokens / done / speed if done and speed else 0.0
        found |= {"done": f"{done / amount:.0%}", "left": str(timedelta(seconds=round(left)))}
    return found


def _plot(name: str, steps: dict[str, np.ndarray], width: int, height: int) -> Text:
    """Loss over tokens, a colour an objective; means of neighbours where there are more steps than columns."""
    import plotext  # for `watch` alone

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, height)
    plotext.title(f"loss of {name} over tokens")
    for objective in dict.fromkeys(steps["objective"]):
        chosen = steps["objective"] == objective
        parts = [np.array_split(steps[key][chosen], min(chosen.sum(), width)) for key in ("tokens", "loss")]
        plotext.plot(*([float(np.nanmean(part)) for part in each] for each in parts), label=objective)
    ticks = np.linspace(0, steps["tokens"][-1], 5)
    plotext.xticks(ticks.tolist(), [format_count(tick) for tick in ticks])
    return Text.from_ansi(plotext.build())


def _view(run: Path, console: Console) -> tuple[bool, Group]:
    """(whether one runs, the table of runs with the losses of the one that wrote last)."""
    folder = run.parent if run.is_file() else run
    folders = [folder] if (folder / STEPS).is_file() else [path.parent for path in folder.glob(f"*/{STEPS}")]
    if not folders:
        raise FileNotFoundError(f"{run}: no {STEPS} there or one folder down; give the save folder of a run with "
                                "callbacks.ettin_steps, or the root of a suite")
    table, steps, rows = Table(box=None, pad_edge=False), {}, []
    for head in ("run", "state", "tokens", "done", "loss", "lr", "tokens/s", "left"):
        table.add_column(head, overflow="fold")
    for folder in sorted(folders, key=lambda folder: (folder / STEPS).stat().st_mtime):
        rows.append(row(folder, steps := read(folder)))
        table.add_row(*(rows[-1].get(str(column.header), "") for column in table.columns))
    height = max(8, min(24, console.height - len(rows) - 4))
    plot = _plot(folder.name, steps, console.width, height) if steps else ""
    return any(each["state"] == "running" for each in rows), Group(table, "", plot)


def watch(run: Path, follow: bool) -> None:
    """Prints the run in a folder, or those of a suite in its root; with `follow`, again until all have ended."""
    console = Console()
    running, view = _view(run, console)
    if not follow:
        console.print(view)
        return
    with Live(view, console=console, auto_refresh=False) as live:
        while running:
            time.sleep(_EVERY)
            running, view = _view(run, console)
            live.update(view, refresh=True)
