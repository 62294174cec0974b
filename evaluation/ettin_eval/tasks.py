"""What a task is, and the one table of suites."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_eval.results import Score
from ettin_eval.subject import Subject


@dataclass(frozen=True)
class Settings:
    """What holds for all tasks of one call.

    data: folder with the evaluation sets on disk (`ettin_eval.data`); None reads them from the hub.
    limit: the most items of a task. seed: of fine-tuning, subsets and shots. batch_tokens: most positions in one pass.
    protocol: how an encoder scores a continuation (`ettin_eval.pseudo_likelihood`).
    lr: of fine-tuning, in place of the task's own. grid: settings that `glue` searches (`ettin_eval.glue.read_grid`).
    work: folder beside the result file, for what tasks keep: fine-tuned models, caches.
    """

    data: Path | None = None
    limit: int | None = None
    seed: int = 0
    device: str = "cpu"
    batch_tokens: int = 8192
    protocol: str = "pseudo"
    lr: float | None = None
    grid: Mapping[str, Sequence[Any]] | None = None
    work: Path = Path("eval", "work")


@dataclass(frozen=True)
class Task:
    """One task. run: gives its scores. about: one line for the list.

    missing: why it cannot be run with these settings (data that the folder does not hold), None where it can.
    """

    name: str
    run: Callable[[Subject, Settings], Sequence[Score]]
    about: str
    missing: Callable[[Settings], str | None] = lambda settings: None


def chosen(tables: Mapping[str, Sequence[Task]], suite: str | None, names: Sequence[str]) -> list[Task]:
    """The tasks of a suite, or those named.

    Raises:
        ValueError: an unknown suite or task, with the known ones.
    """
    if suite is not None and suite not in tables:
        raise ValueError(f"--suite must be one of {', '.join(tables)}, got {suite}")
    known = {task.name: task for tasks in tables.values() for task in tasks}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"--tasks must name known tasks, got {name}; {hint}")
    return [known[name] for name in names] if names else list(tables[suite or "quick"])
