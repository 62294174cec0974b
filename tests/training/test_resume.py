"""Runs that kill themselves and go on are those that nothing interrupts: a slice of benchmarks/resume_matrix.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "resume_matrix.py"
sys.path.append(str(PROGRAM.parent))
import resume_matrix  # noqa: E402

SLICE = ["clm-packed-rising-w2-across-one", "schedule-packed-rising-w0-inside-ddp",
         "mlm-unpacked-rising-w0-inside-sharded", "elastic-rising"]


@pytest.fixture(scope="module")
def matrix(data_set):
    """{cell: what the program says of it}."""
    command = [sys.executable, PROGRAM, "--data", data_set, "--kills", "1", *SLICE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    return dict(line.split(" -> ") for line in done.stdout.splitlines() if " -> " in line) or done.stderr[-3000:]


@pytest.mark.parametrize("cell", SLICE)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(cell, matrix):
    assert matrix[cell].startswith("rows identical, losses within" if "elastic" in cell else "bitwise"), matrix[cell]


@pytest.mark.parametrize(("key", "value"), [("loss", 1 + 1e-7), ("moments", "x"), ("masks", ["b", "a"]), ("lr", 0.1)])
def test_the_program_tells_a_difference_of_any_kind(key, value, tmp_path):
    entry = {"step": 0, "tokens": 0, "lr": 0.0, "objective": "mlm", "masks": ["a", "b"], "loss": 1.0, "moments": "m"}
    for name, change in (("whole.0", {}), ("parts.0", {key: value})):
        (tmp_path / name).write_text(json.dumps({**entry, **change}) + "\n")
    assert resume_matrix.difference(tmp_path / "whole", tmp_path / "whole", 1) == "bitwise"
    assert f"step 0: {key} " in resume_matrix.difference(tmp_path / "whole", tmp_path / "parts", 1)
