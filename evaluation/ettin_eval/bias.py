"""Bias: which gender a model's pronouns take (WinoGender)."""

from __future__ import annotations

from ettin_eval.tasks import Task

TASKS: list[Task] = []
QUICK: list[Task] = []
