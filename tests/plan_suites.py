"""The plan of the suite at 150m, made once for the tests that look at it: reading a suite takes a second."""

from __future__ import annotations

import functools
from pathlib import Path

from ettin_foundry.tools import suite
from ettin_foundry.tools.plan_report import PlannedRun, plan_chain

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def planned_150m() -> tuple[list[PlannedRun], dict[str, str | None]]:
    """(runs on 4x H100, what each starts from)"""
    stages = suite.load(ROOT / "yamls/suite/ettin-150m.yaml").stages
    runs = plan_chain([(stage.name, stage.config()) for stage in stages])
    return runs, {stage.name: stage.source for stage in stages}
