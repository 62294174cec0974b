"""One HTML page about a run, a suite or a study, for any browser and without anything from elsewhere: report.html.

Everything is read from what lies in the folder: of runs their steps.jsonl, evals.jsonl and newest checkpoint; of a
finished suite report.json, which `write_report` makes; of a sweep sweep.json, which `measure` makes; of a study
study.json, which ettin-eval writes. So a page may be made again at any time. Its template lies beside this file.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import yaml
from jinja2 import ChainableUndefined

from ettin_foundry.data.inspect import render
from ettin_foundry.data.storage import atomic_file
from ettin_foundry.hub.folder import export_checkpoint
from ettin_foundry.hub.load import LoadedModel
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.tools import progress
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.tools.pictures import COLORS, Line, binned, draw_lines, standalone
from ettin_foundry.tools.suite import Samples, Stage, Suite
from ettin_foundry.tools.suite_run import compare_pair, say, stage_state
from ettin_foundry.training import checkpoints
from ettin_foundry.training.steps import EVALS, STEPS, read_steps
from ettin_foundry.version import __version__

PAGE, FACTS, SWEEP = "report.html", "report.json", "sweep.json"
_EVALS = ["step", "tokens", "data", "TargetCrossEntropy", "TargetAccuracy"]
_OWN = ("log", "evals", "record", "data", "files")  # of a stage, what a page shows and report.json leaves where it is


def write_page(folder: Path) -> Path:
    """Writes report.html into a run's save folder, a suite's root or a study's folder, and returns its path.

    A sweep's pictures also become files of their own: sweep.svg and, of further metrics, sweep-METRIC.svg.
    """
    study, sweep = _read(folder / "study.json"), _read(folder / SWEEP)
    if study or sweep:
        facts = {"name": folder.resolve().name, **sweep, **study, "study": study, "sweep": sweep}
        facts["pictures"] = _sweep_pictures(sweep)
        for number, (metric, svg) in enumerate(facts["pictures"].items()):
            name = f"sweep-{re.sub('[^a-z0-9]+', '-', metric.lower())}.svg" if number else "sweep.svg"
            (folder / name).write_text(standalone(svg), encoding="utf-8")
    else:
        facts = _read_runs(folder)
        facts["pictures"] = _curves(facts["stages"])
    facts |= {"folder": folder, "version": __version__, "colors": COLORS, "now": time.strftime("%Y-%m-%d %H:%M"),
              "took": lambda seconds: timedelta(seconds=round(seconds)),
              "yaml": lambda text: yaml.safe_dump(json.loads(text), width=96, allow_unicode=True)}
    with atomic_file(folder / PAGE) as file:
        file.write(render(Path(__file__).with_name("report.html.jinja"), ChainableUndefined, **facts).encode())
    return folder / PAGE


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got {error}; write it again") from error


def _read_runs(folder: Path) -> dict[str, Any]:
    """What report.json says and the stages' folders hold, or, without it, what the runs in the folder have come to."""
    if facts := _read(folder / FACTS):
        facts["stages"] = [read_stage(folder / stage["stage"], stage) for stage in facts["stages"]]
        return facts
    places = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    runs = [path for path in places if (path / STEPS).is_file() or checkpoints.newest_complete(path)]
    if not runs:
        raise ValueError(f"FOLDER must be a run's save folder, a suite's root, or a folder with study.json or "
                         f"sweep.json, got {folder}")
    stages = [read_stage(path) for path in (runs if runs[0] != folder else runs[:1])]
    stages.sort(key=lambda stage: len(stage["record"].get("lineage", ())))
    for stage in stages:
        source = next(reversed(stage["record"].get("lineage", ())), {"source": ""})["source"].split("/")[0]
        stage["from"] = source if source in (each["stage"] for each in stages) else None
    return {"name": folder.resolve().name, "stages": stages, "run": runs[0] == folder}


def read_stage(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run's row of the report by its newest checkpoint and its log, with the log itself; `known` is of its suite."""
    if known and not folder.is_dir():
        return {**known, "log": None}
    newest = checkpoints.newest_complete(folder)
    record, data = checkpoints.read_head(newest)[1:3] if newest else ({}, {})
    schedule = record.get("objective_schedule") or record.get("objective")
    facts = {"stage": folder.resolve().name, "from": None, "pair": None, **(known or {}),
             "objective": " and ".join(ObjectiveSchedule.parse(schedule).objectives) if schedule else "",
             "tokens": int(record.get("tokens") or 0), "folder": str(folder), "checkpoint": str(newest),
             "run_hash": record.get("run_hash"), "record": record, "data": data, "log": None, "evals": None,
             "files": sorted(path for path in folder.glob("[!.]*") if not path.is_symlink() and path.name != PAGE),
             **dict.fromkeys(("steps", "seconds", "tokens_per_second", "first_loss", "last_loss", "validation",
                              "missing"))}
    try:
        if (log := progress.read(folder)).empty:
            raise ValueError(f"the log in {folder} is empty")
        evals = pandas.DataFrame(read_steps(folder / EVALS) if (folder / EVALS).is_file() else [],
                                 columns=pandas.Index(_EVALS))
    except (OSError, ValueError, LookupError, TypeError) as error:  # no log, or one of something else
        return {**facts, "missing": f"no losses and times: {error}"}
    if len(lost := log.step[~np.isfinite(log.loss)]):
        facts["missing"] = (f"the loss is not finite at {len(lost):,} of {len(log):,} steps, first at step "
                            f"{lost.iloc[0]:,}")
    tokens, seconds = facts["tokens"] or int(log.tokens.iloc[-1]), log.seconds.sum()
    first, last = (float(part[np.isfinite(part)].mean()) for part in (log.loss[:1], log.loss[-20:]))
    return facts | {"steps": len(log), "seconds": round(seconds, 1), "tokens": tokens, "log": log, "evals": evals,
                    "tokens_per_second": round(tokens / seconds) if seconds else None,
                    "objective": facts["objective"] or " and ".join(log.objective.unique()),
                    "first_loss": first if np.isfinite(first) else None,
                    "last_loss": last if np.isfinite(last) else None,
                    "validation": evals.loc[evals.step == evals.step.max()].to_dict("records")}


# ------------------------------------------------------------------ pictures


def _curves(stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Training and validation loss, learning rate and speed over tokens since initialisation, a colour a stage."""
    units = {"training loss": "nats a target", "validation loss": "nats a target", "learning rate": "",
             "speed": "tokens a second"}
    drawn, ends = {name: list[Line]() for name in units}, dict[str | None, int]()
    for stage, color in zip(stages, itertools.cycle(COLORS)):
        begin, log = ends.get(stage["from"], 0), stage["log"]
        name, ends[stage["stage"]] = stage["stage"], begin + stage["tokens"]
        if log is None:
            continue
        for _, part in log.groupby((log.objective != log.objective.shift()).cumsum()):
            drawn["training loss"].append(Line(name, color, *binned(begin + part.tokens, part.loss)))
        drawn["learning rate"].append(Line(name, color, *binned(begin + log.tokens, log.lr)))
        x, *pace = binned(begin + log.tokens, log.seconds / log.tokens.diff().shift(-1))
        drawn["speed"].append(Line(name, color, x, *(1 / each for each in pace)))
        for data, part in stage["evals"].groupby("data"):
            losses = binned(begin + part.tokens, part.TargetCrossEntropy)
            drawn["validation loss"].append(Line(f"{name}, {data}", color, *losses))
    starts = sorted({ends[stage["from"]] for stage in stages if stage["from"] in ends})
    return {name: draw_lines(lines, name, x="tokens since initialisation", y=units[name], starts=starts)
            for name, lines in drawn.items() if lines}


def _sweep_pictures(sweep: Mapping[str, Any]) -> dict[str, str]:
    """A picture a metric, a line of each value of the second axis; bars are the standard errors."""
    points = pandas.DataFrame(sweep.get("points", [])).reindex(columns=["x", "line", "metric", "value", "stderr"])
    pictures, color = {}, dict(zip(points.line.unique(), itertools.cycle(COLORS)))
    for metric, found in points.sort_values("x").groupby("metric", sort=False):
        lines = []
        for line, own in found.groupby("line", sort=False):
            error = own.stderr.astype(float).fillna(0)
            lines.append(Line(str(line), color[line], own.x, own.value, own.value - error, own.value + error))
        axis = sweep.get("axes", {}).get("x", "")
        pictures[str(metric)] = draw_lines(lines, f"sweep {metric}", x=axis, y=str(metric), points=True)
    return pictures


# ------------------------------------------------------------------ the end of a suite or sweep


def measure(suite: Suite, command: str) -> None:
    """Writes sweep.json of a sweep: the loss of each finished point, whose newest checkpoint is measured once."""
    path, wanted = suite.file.root / SWEEP, suite.file.evaluation
    known = {(each["line"], each["checkpoint"]): each for each in _read(path).get("points", ())}
    points: list[dict[str, Any]] = []
    facts = {"name": suite.file.name, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": command,
             "versions": {name: metadata.version(name) for name in ("ettin-foundry", "torch", "llm-foundry")},
             "axes": {"x": suite.file.x and suite.file.x.name, "lines": "model"}, "points": points}
    for stage in suite.stages:
        state, point = stage_state(stage), stage.point
        if point is None or wanted is None or not state.finished:
            continue
        checkpoint = str(state.checkpoint)
        if (each := known.get((point.line, checkpoint))) is None:
            found = evaluate(checkpoint, wanted.data, [point.objective], mask_rate=wanted.mask_rate,
                             max_batches=wanted.max_batches)[point.objective]
            each = {"x": point.x, "line": point.line, "metric": f"{point.objective} loss", "value": found["loss"],
                    "n": found["targets"], "accuracy": found["accuracy"], "checkpoint": checkpoint,
                    "seconds": round(progress.read(stage.folder).seconds.sum(), 1)}
            say(f"{stage.name}: {each['metric']} {each['value']:.3f}")
        points.append(each)
        with atomic_file(path) as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
    say(f"finished: {len(points)} points in {path}; `ettin report {path.parent}` draws them")


def write_report(suite: Suite, fairness: Mapping[str, Mapping[str, Any]]) -> None:
    """Exports, evaluates and writes report.json and report.html; `fairness` is what `suite_run.check_suite` found."""
    if unfinished := [stage.name for stage in suite.stages if not stage_state(stage).finished]:
        raise ValueError(f"--report: {', '.join(unfinished)} not finished; run the suite without it")
    suite.file.root.mkdir(parents=True, exist_ok=True)
    stages = [read_stage(stage.folder, {"stage": stage.name, "from": stage.source, "pair": stage.pair})
              for stage in suite.stages]
    pairs: dict[str, dict[str, Any]] = {}
    for pair, members in suite.pairs().items():
        found = compare_pair(members)
        pairs[pair] = {"members": [member.name for member in members],
                       "missing" if isinstance(found, str) else "steps_with_equal_rows": found}
    models = [_make_model(suite, name, suite.stage(stage), stages) for name, stage in suite.file.exports.items()]
    report = {"name": suite.file.name, "suite": suite.path, "pairs": pairs, "fairness": fairness, "models": models,
              "stages": [{key: value for key, value in facts.items() if key not in _OWN} for facts in stages],
              "allowed_unfair": [key for key, entry in fairness.items() if not entry["fair"]],
              "training_seconds": sum(facts["seconds"] or 0 for facts in stages),
              "evaluation": suite.file.evaluation and suite.file.evaluation.model_dump()}
    (suite.file.root / FACTS).write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(render(Path(__file__).with_name("report.txt.jinja"), ChainableUndefined, **report))
    say(f"{suite.file.name}: models in {suite.file.root / 'models'}, report in {write_page(suite.file.root)}")


def _make_model(suite: Suite, name: str, stage: Stage, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One export with its evaluation and samples."""
    folder = suite.file.root / "models" / name
    loaded = export_checkpoint(stage.folder, folder, overwrite=True)
    say(f"{name}: wrote {folder}")
    names = [each.name for each in suite.chain(stage)]
    chain = [{key: facts[key] for key in ("stage", "objective", "tokens")}
             for facts in stages if facts["stage"] in names]
    found = {"model": name, "stage": stage.name, "objective": chain[-1]["objective"], "chain": chain,
             "tokens": loaded.facts["tokens"], "parameters": loaded.config.num_parameters, "folder": str(folder),
             "evaluation": {}, "samples": []}
    try:
        found["samples"] = _samples(loaded, suite.file.samples)
        if (wanted := suite.file.evaluation) is not None:
            found["evaluation"] = evaluate(folder, wanted.data, wanted.objectives, mask_rate=wanted.mask_rate,
                                           max_batches=wanted.max_batches)
            say(f"{name}: " + ", ".join(f"{key} {value['loss']:.3f}" for key, value in found["evaluation"].items()))
    except (OSError, ValueError) as error:
        found["missing"] = f"not evaluated: {error}"
    return found


def _samples(loaded: LoadedModel, wanted: Samples) -> list[dict[str, Any]]:
    """Prompts continued by a decoder, masks filled by an encoder: {prompt, text} or {prompt, tokens: with shares}."""
    if not (texts := list(wanted.prompts if loaded.config.causal else wanted.masked)):
        return []
    predictor = loaded.predictor(loaded.tokenizer())
    if loaded.config.causal:
        return [{"prompt": text, "text": rest}
                for text, rest in zip(texts, predictor.generate(texts, max_new_tokens=24))]
    return [{"prompt": text, "tokens": best[:4]} for text, best in zip(texts, predictor.fill_mask(texts))]
