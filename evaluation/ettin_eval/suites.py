"""The one table of suites: which tasks each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ettin_eval import bias, code_tasks, generative, glue, retrieval
from ettin_eval.tasks import Task

SUITES: Mapping[str, Sequence[Task]] = {
    "quick": [*generative.QUICK, *glue.QUICK, *code_tasks.QUICK],   # minutes on a CPU, sets of `make eval-data`
    "code": code_tasks.TASKS,
    "glue": glue.TASKS,
    "retrieval": retrieval.TASKS,
    "generative": generative.TASKS,
    "bias": bias.TASKS,
}
