"""Generation: what a model gives to continuations of a text, by lm-evaluation-harness."""

from __future__ import annotations

from ettin_eval.tasks import Task

TASKS: list[Task] = []
QUICK: list[Task] = []
