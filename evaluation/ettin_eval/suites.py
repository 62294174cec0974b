"""The one table of suites: which tasks each holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ettin_eval import bias, generative, glue, retrieval
from ettin_eval.tasks import Task

SUITES: Mapping[str, Sequence[Task]] = {
    "quick": [*generative.QUICK, *glue.QUICK, *retrieval.QUICK],   # minutes on a CPU, with the sets of `make eval-data`
    "glue": glue.TASKS,
    "retrieval": retrieval.TASKS,
    "generative": generative.TASKS,
    "bias": bias.TASKS,
}
