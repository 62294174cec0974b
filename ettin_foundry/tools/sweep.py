"""A sweep: one run for each value of one setting and each line of a picture, trained as the stages of a suite.

A sweep file is a suite file (tools/suite.py) without exports, and with

    x: {name: peak learning rate, keys: ["variables.peak_lr={x}"], values: [1.0e-3, 3.0e-3]}
    lines:      # a run a value each; fields as of a stage, and the objective whose validation loss is drawn
      encoder: {yaml: [yamls/nano.yaml], objective: mlm}
      decoder: {yaml: [yamls/nano.yaml, yamls/options/decoder.yaml], objective: clm}

`stages`, where there are any, are trained first: lines may start `from` them. Each point is the loss of its newest
checkpoint on `evaluation.data`, kept in root/sweep.json: what is there is not measured again.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ettin_foundry.data.storage import atomic_file
from ettin_foundry.tools import suite as suites
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.tools.plan import plan_runs
from ettin_foundry.tools.plan import text as plan_text
from ettin_foundry.tools.suite_run import check_suite, run_suite, say, stage_state
from ettin_foundry.training.steps import read_steps


class _X(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    keys: list[str] = Field(min_length=1)
    values: list[float | int | str] = Field(min_length=2)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    yaml: list[str] = Field(min_length=1)
    overrides: list[str] = []
    source: str | None = Field(None, alias="from")
    objective: Literal["mlm", "clm", "mntp"]


class Point(NamedTuple):
    """One run of a sweep."""

    line: str
    x: float | int | str
    objective: str
    stage: suites.Stage


class Sweep(NamedTuple):
    """A sweep file, read and checked for itself."""

    name: str
    x: str
    suite: suites.Suite
    evaluation: suites.Evaluation
    points: list[Point]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file, then key=value of it, such as `scale=0.1`; errors name the key."""
    content = suites.read(str(path), overrides)
    try:
        x = _X.model_validate(content.pop("x", None))
        lines = {name: _Line.model_validate(block) for name, block in (content.pop("lines", None) or {}).items()}
        evaluation = suites.Evaluation.model_validate(content.pop("evaluation", None))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([error.title.strip("_").lower(), *map(str, first["loc"])])
        raise ValueError(f"{path}: {key}: {first['msg']}, got {first['input']!r}; "
                         "look at study/sweep-lr.yaml") from None
    if not lines:
        raise ValueError(f"{path}: lines must be given in a sweep, got none; look at study/sweep-lr.yaml")
    stages: dict[str, Any] = dict(content.get("stages") or {})
    names: dict[str, tuple[str, Any, str]] = {}
    for line, block in lines.items():
        for value in x.values:
            name = f"{line}-{value}"
            names[name] = (line, value, block.objective)
            stages[name] = {"yaml": block.yaml, "from": block.source,
                            "overrides": [*block.overrides, *(key.replace("{x}", str(value)) for key in x.keys)]}
    found = suites.build(str(path), {**content, "stages": stages})
    points = [Point(*what, stage) for stage in found.stages if (what := names.get(stage.name))]
    return Sweep(found.name, x.name, found, evaluation, points)


def run(sweep: Sweep, command: str) -> Path:
    """Says what it costs, trains what is not finished, measures what is not measured; returns the sweep's folder.

    Errors are those of `suite_run.run_suite` and `evaluate.evaluate`.
    """
    check_suite(sweep.suite)
    root, wanted = sweep.suite.root, sweep.evaluation
    say(plan_text(plan_runs([(stage.name, stage.config) for stage in sweep.suite.stages])))
    root.mkdir(parents=True, exist_ok=True)
    run_suite(sweep.suite)
    path = root / "sweep.json"
    known = {(each["line"], each["checkpoint"]): each for each in _read_points(path)}
    points: list[Mapping[str, Any]] = []
    for point in sweep.points:
        checkpoint = str(stage_state(point.stage).checkpoint)
        if (each := known.get((point.line, checkpoint))) is None:
            found = evaluate(checkpoint, wanted.data, [point.objective], mask_rate=wanted.mask_rate,
                             max_batches=wanted.max_batches)[point.objective]
            each = {"x": point.x, "line": point.line, "metric": f"{point.objective} loss", "value": found["loss"],
                    "n": found["targets"], "accuracy": found["accuracy"], "checkpoint": checkpoint,
                    "seconds": round(sum(step["seconds"] for step in read_steps(point.stage.folder)), 1)}
            say(f"{point.stage.name}: {each['metric']} {each['value']:.3f}")
        points.append(each)
        _write(path, sweep, points, command)
    return root


def _read_points(path: Path) -> list[Mapping[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["points"] if path.is_file() else []


def _write(path: Path, sweep: Sweep, points: Sequence[Mapping[str, Any]], command: str) -> None:
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    versions = {name: importlib.metadata.version(name) for name in ("ettin-foundry", "torch", "llm-foundry")}
    content = {"name": sweep.name, "created": now, "command": command, "versions": versions,
               "axes": {"x": sweep.x, "lines": "model"}, "points": list(points)}
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())

