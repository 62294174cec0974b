"""Scores, and the file that keeps them: one task after another, whole at any moment."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

PACKAGES = ("ettin-eval", "transformers", "torch", "lm-eval", "mteb", "sentence-transformers", "datasets")


class Score(BaseModel):
    """One figure. n: the items it is a mean of; stderr: its standard error over those items, None where unknown.

    items: the n values themselves, in the order of the data, for paired comparisons of models.
    settings: what else decides the figure (shots, protocol, learning rate, ...).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str
    value: float
    n: int
    stderr: float | None = None
    settings: dict[str, Any] = {}
    items: tuple[float, ...] | None = None


def mean_score(task: str, metric: str, items: Sequence[float], **settings: Any) -> Score:
    """The mean of `items` with its standard error, std(items) / sqrt(n), std with n - 1; no error for one item."""
    n = len(items)
    if not n:
        raise ValueError(f"{task} must have at least one item, got none; look at its data")
    mean = sum(items) / n
    stderr = (sum((item - mean) ** 2 for item in items) / (n - 1) / n) ** 0.5 if n > 1 else None
    return Score(task=task, metric=metric, value=mean, n=n, stderr=stderr, settings=settings, items=tuple(items))


class Results:
    """The JSON file of one model's scores. A task that is in it is not run again.

    The file: {"model", "revision", "kind", "objective", "command", "created", "machine", "versions", "settings",
    "tasks": {task: {"seconds", "scores": [Score, ...]}}}.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Opens or begins the file.

        facts: model, revision, kind, objective, settings: whatever must not differ between the tasks of one file.

        Raises:
            ValueError: the file holds scores of another model, or made with other settings.
        """
        self.path, facts = path, json.loads(json.dumps(facts))
        self.content: dict[str, Any] = {
            **facts, "command": shlex.join(["ettin-eval", *sys.argv[1:]]),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(), "tasks": {}}
        if not path.exists():
            return
        there = json.loads(path.read_text(encoding="utf-8"))
        for key, value in facts.items():
            if there.get(key) != value:
                raise ValueError(f"{path}: {key} must be {value!r} as asked for, got {there.get(key)!r}; "
                                 "give another --out")
        self.content = {**self.content, "created": there["created"], "tasks": there["tasks"]}

    def has(self, task: str) -> bool:
        """Whether the task has been run to its end."""
        return task in self.content["tasks"]

    def scores(self, task: str) -> list[Score]:
        """What the task gave."""
        return [Score.model_validate(each) for each in self.content["tasks"][task]["scores"]]

    def add(self, task: str, scores: Sequence[Score], seconds: float) -> None:
        """Keeps the task's scores; the file is replaced by one rename."""
        self.content["tasks"][task] = {"seconds": round(seconds, 1),
                                       "scores": [score.model_dump(exclude_none=True) for score in scores]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def versions() -> dict[str, str]:
    """The packages that decide a figure."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
