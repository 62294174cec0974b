"""Retrieval: fine-tuning on MS MARCO, then MTEB, CodeSearchNet and MLDR by mteb."""

from __future__ import annotations

from ettin_eval.tasks import Task

TASKS: list[Task] = []
QUICK: list[Task] = []
