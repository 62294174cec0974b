"""A slice of `make fuzz`: some examples of every target, the same ones each time, find nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz"
READERS = ("shard", "mixture", "conversion", "config", "hf", "checkpoint")
PROPERTIES = ("order", "packing", "warmup", "chunking", "objectives", "schedules", "merge", "resume")


@pytest.mark.parametrize(("targets", "examples"), [(READERS, 8), (PROPERTIES, 100)], ids=["readers", "properties"])
def test_damaged_files_and_drawn_cases_find_nothing(targets, examples):
    command = [sys.executable, PROGRAM, *targets, "--examples", str(examples), "--seed", "3"]
    run = subprocess.run(command, capture_output=True, text=True)
    found = run.stdout + run.stderr
    assert run.returncode == 0 and run.stdout.count("; 0 kinds of failure") == len(targets), found
