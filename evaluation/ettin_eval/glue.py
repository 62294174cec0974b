"""Classification: fine-tuning on GLUE, both kinds alike."""

from __future__ import annotations

from ettin_eval.tasks import Task

TASKS: list[Task] = []
QUICK: list[Task] = []
