"""Reads and cuts the log of a run's steps, steps.jsonl in its save folder: one JSON object a line.

    {"step": 41, "tokens": 352140, "rows": 32, "objective": "mlm", "mask_rate": 0.3, "lr": 0.003, "loss": 5.114,
     "ids_hash": "09f1c2aa7730", "seconds": 0.21}

step is the host's batch number before the step, tokens are those before it, rows and ids_hash are the global batch's:
two runs whose lines agree in both read the same documents in the same order. run.json holds `run_name`,
`max_duration`, and `finished`: whether the run has come to that. Neither torch nor the host is imported.

evals.jsonl beside it has a line for each evaluation of a dataset: the last step done, tokens after it, metrics by name.

    {"step": 121, "tokens": 1000448, "data": "eval", "TargetCrossEntropy": 4.87, "TargetAccuracy": 0.21, ...}
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

STEPS, EVALS, RUN = "steps.jsonl", "evals.jsonl", "run.json"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def read_steps(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every step of a log (a file, or the save folder that holds it); a ValueError names a line that is none.

    A last line that a killed run left unfinished is passed over.
    """
    path = Path(path, STEPS) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the folder of a run with callbacks.ettin_steps")
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
    steps = [_parse(line) for line in lines]
    if None in steps:
        number = steps.index(None)
        raise ValueError(f"{path} line {number + 1} must be a JSON object with a step, got {lines[number][:100]!r}")
    return steps  # type: ignore[return-value]


def cut_steps(path: Path, step: int) -> None:
    """Removes, from the end of a log, an unfinished line and all from `step` on, which will be done again."""
    if path.is_file():
        lines = path.read_bytes().split(b"\n")[:-1]
        while lines and ((entry := _parse(lines[-1])) is None or entry["step"] >= step):
            lines.pop()
        os.truncate(path, sum(len(line) + 1 for line in lines))
