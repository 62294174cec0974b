"""A slice of `make fuzz`: a few examples of every target, the same ones each time, find nothing."""

import subprocess
import sys
from pathlib import Path


def test_damaged_files_and_drawn_cases_find_nothing():
    program = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz"
    run = subprocess.run([sys.executable, program, "--examples", "8", "--seed", "3"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("; 0 kinds of failure") == 14, run.stdout + run.stderr
