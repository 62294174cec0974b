"""A study: suites of several seeds are trained, every model is evaluated, each claim gets an interval and a verdict.

    name: nano
    root: runs/study                # seed-N/ (a suite), seed-N/eval/MODEL.json, study.json
    suite: study/suite.yaml         # trained once a seed, with variables.seed=N and root=ROOT/seed-N
    ettin: .venv/bin/ettin          # of the environment that trains
    settings: [scale=0.4]           # key=value of the suite file
    seeds: [21, 22, 23]
    workers: 2                      # suites, later models, at a time; each has its share of the cores
    models: [encoder, decoder]      # exports of the suite
    data: evaluation/data           # as `ettin-eval --data`
    limit: 500                      # items of a task
    tasks: {classification: [module_of_snippet_probe], generation: [sciq]}   # the first metric with items counts
    claims: [{claim: ..., source: ..., better: encoder, worse: decoder, kind: classification}]
    draws: 10000                    # of the bootstrap
    quick: {limit: 50}              # replaces keys with --quick; its folder is ROOT-quick

Finished suites, models and tasks are skipped, so that the same command goes on.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from ettin_eval.bootstrap import Bootstrap, Interval
from ettin_eval.results import Score, versions

_TOKENS_A_SECOND = 3000.0  # of nano on one core: what the first estimate goes by, before a run has been measured


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(_Block):
    """That model `better` is above model `worse` in the mean over the tasks of a kind."""

    claim: str
    source: str
    better: str
    worse: str
    kind: str


class Study(_Block):
    """A study file, checked for itself."""

    name: str = Field(min_length=1)
    root: Path
    suite: Path
    ettin: str = "ettin"
    settings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = Field(min_length=1)
    workers: int = Field(1, ge=1)
    models: tuple[str, ...] = Field(min_length=2)
    data: Path | None = None
    limit: int | None = Field(None, ge=1)
    tasks: dict[str, tuple[str, ...]] = Field(min_length=1)
    claims: tuple[Claim, ...] = ()
    draws: int = Field(10_000, ge=100)


def read_study(path: Path, quick: bool = False) -> Study:
    """Reads a study file.

    Raises:
        ValueError: no such file, an unknown or wrong key, a claim about a model or kind that the study does not have.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        small = content.pop("quick", None)
        if quick:
            content = {**content, "root": content["root"] + "-quick", **(small or {})}
        study = Study.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}; keys "
                         f"are {', '.join(Study.model_fields)}") from None
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a study file, such as study/nano.yaml: {error}") from error
    for claim in study.claims:
        for model in {claim.better, claim.worse} - {*study.models}:
            raise ValueError(f"{path}: claims must be about {', '.join(study.models)}, got {model}")
        if claim.kind not in study.tasks:
            raise ValueError(f"{path}: claims.kind must be one of {', '.join(study.tasks)}, got {claim.kind}")
    if len({*study.seeds}) < len(study.seeds):
        raise ValueError(f"{path}: seeds must differ, got {list(study.seeds)}")
    return study


def run_study(study: Study, command: str) -> Path:
    """Trains, evaluates, compares; returns the study's folder, which holds study.json.

    Raises:
        ValueError: a suite or an evaluation failed; its last lines are above.
    """
    stages = _stages(study)
    tokens = sum(stages.values()) * len(study.seeds)
    names = [task for tasks in study.tasks.values() for task in tasks]
    evaluations = len(study.seeds) * len(study.models) * len(names)
    hours = tokens / _TOKENS_A_SECOND / study.workers / 3600
    say(f"{study.name}: {len(study.seeds)} suites of {len(stages)} runs, {tokens / 1e6:.1f}M tokens in all "
        f"(about {hours * 60:.0f} minutes at {_TOKENS_A_SECOND:,.0f} tokens/s a worker), "
        f"then {evaluations} evaluations")
    begun = time.monotonic()
    _each(study, [(f"seed {seed}", _suite_words(study, seed)) for seed in study.seeds])
    trained = time.monotonic()
    _each(study, [(f"seed {seed} {model}", _eval_words(study, seed, model, names))
                  for seed in study.seeds for model in study.models])
    found = compare(study, _read_scores(study, names))
    ended = time.monotonic()
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    content = {"name": study.name, "created": now, "command": command,
               "suites": [{"seed": seed, "root": str(_root(study, seed))} for seed in study.seeds],
               "tokens": stages, "seconds": {"training": round(trained - begun), "evaluation": round(ended - trained)},
               "models": list(study.models), **found, "versions": versions()}
    path = study.root / "study.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    show(content)
    say(f"finished: {study.name} in {(ended - begun) / 60:.1f} minutes, {path}; `ettin report {study.root}` draws it")
    return study.root


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------ training and evaluation, as processes


def _root(study: Study, seed: int) -> Path:
    return study.root / f"seed-{seed}"


def _suite_words(study: Study, seed: int) -> list[str]:
    return [study.ettin, "suite", str(study.suite), *study.settings, f"variables.seed={seed}",
            f"root={_root(study, seed)}"]


def _eval_words(study: Study, seed: int, model: str, names: Sequence[str]) -> list[str]:
    root = _root(study, seed)
    words = [sys.executable, "-m", "ettin_eval.main", str(root / "models" / model), "--tasks", ",".join(names),
             "--out", str(root / "eval" / f"{model}.json")]  # one seed: the same items for all models
    words += ["--data", str(study.data)] if study.data else []
    return words + (["--limit", str(study.limit)] if study.limit else [])


def _stages(study: Study) -> dict[str, int]:
    """{run of a suite: its tokens}, as the training environment reads the suite file."""
    words = [*_suite_words(study, study.seeds[0]), "--json"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"ettin must be the program of the training environment, got {study.ettin} ({error}); "
                         "`make .venv/.installed` makes .venv/bin/ettin") from error
    if done.returncode:
        raise ValueError(f"{study.suite}: {done.stderr.strip().splitlines()[-1].removeprefix('error: ')}")
    stages = json.loads(done.stdout)["stages"]
    return {stage["name"]: int(stage["max_duration"].removesuffix("tok")) for stage in stages}


def _each(study: Study, jobs: Sequence[tuple[str, list[str]]]) -> None:
    """Runs the commands, `workers` at a time, each line of theirs with the job's name before it."""
    threads = max(1, (os.cpu_count() or 1) // study.workers)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    stopped = threading.Event()

    def run(name: str, words: list[str]) -> None:
        if stopped.is_set():
            return
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        for line in process.stderr:
            say(f"{name}: {line.rstrip()}")
        if process.wait():
            stopped.set()
            raise ValueError(f"{name} failed with exit code {process.returncode}: {shlex.join(words)}")

    with concurrent.futures.ThreadPoolExecutor(study.workers) as pool:
        for future in [pool.submit(run, *job) for job in jobs]:
            future.result()


# ------------------------------------------------------------------ comparison


def _read_scores(study: Study, names: Sequence[str]) -> dict[str, dict[str, list[Score]]]:
    """{model: {task: its first score with items, a seed each}}."""
    found: dict[str, dict[str, list[Score]]] = {model: {name: [] for name in names} for model in study.models}
    for seed in study.seeds:
        for model in study.models:
            content = json.loads((_root(study, seed) / "eval" / f"{model}.json").read_text(encoding="utf-8"))
            for name in names:
                scores = [Score.model_validate(each) for each in content["tasks"][name]["scores"]]
                if not (counted := [score for score in scores if score.items is not None]):
                    raise ValueError(f"tasks must give a figure for each item, got {name} without; leave it out")
                found[model][name].append(counted[0])
    return found


def compare(study: Study, scores: Mapping[str, Mapping[str, Sequence[Score]]]) -> dict[str, Any]:
    """The tables of study.json: `tasks` with each model's scores and interval, `claims` with their verdicts."""
    kinds = {task: kind for kind, tasks in study.tasks.items() for task in tasks}
    first = scores[study.models[0]]
    bootstrap = Bootstrap({task: first[task][0].n for task in kinds}, len(study.seeds), draws=study.draws)
    items = {model: {task: np.array([score.items for score in found]) for task, found in tasks.items()}
             for model, tasks in scores.items()}
    tables, claims = [], []
    for task, kind in kinds.items():
        metrics = {model: scores[model][task][0].metric for model in study.models}
        for metric in dict.fromkeys(metrics.values()):  # encoders' bits per byte are another figure than decoders'
            models = [model for model in study.models if metrics[model] == metric]
            tables.append({
                "task": task, "kind": kind, "metric": metric, "n": first[task][0].n,
                "scores": {model: [{"seed": seed, "value": score.value, "stderr": score.stderr}
                                   for seed, score in zip(study.seeds, scores[model][task], strict=True)]
                           for model in models},
                "mean": {model: _plain(bootstrap.mean(items[model], [task])) for model in models}})
    for claim in study.claims:
        tasks, pair = study.tasks[claim.kind], (claim.better, claim.worse)
        metrics = [{task: scores[model][task][0].metric for task in tasks} for model in pair]
        facts = {**claim.model_dump(), "tasks": list(tasks), "n": sum(first[task][0].n for task in tasks)}
        if metrics[0] != metrics[1]:
            claims.append({**facts, "verdict": "not comparable: the metrics differ"})
            continue
        signs = {task: -1 if _is_bits(metric) else 1 for task, metric in metrics[0].items()}  # of bits less is better
        better, worse = ({task: sign * items[model][task] for task, sign in signs.items()} for model in pair)
        found = bootstrap.difference(better, worse, tasks)
        claims.append({**facts, "unit": "bits" if -1 in signs.values() else "points", "difference": found.value,
                       "low": found.low, "high": found.high, "verdict": found.verdict})
    return {"tasks": tables, "claims": claims}


def _is_bits(metric: str) -> bool:
    return "bits" in metric


def _plain(interval: Interval) -> dict[str, float]:
    return interval._asdict()


def show(content: Mapping[str, Any], write: Callable[[Any], None] | None = None) -> None:
    """Prints a study's two tables: means with their intervals, and verdicts."""
    write = write or Console(width=None if Console().is_terminal else 160).print
    table = Table("task", "metric", "n", *content["models"], box=None, title_justify="left",
                  title="mean over seeds [95% interval], in percent, or in bits")
    for task in content["tasks"]:
        means = map(task["mean"].get, content["models"])
        cells = [_figures(each["value"], each, bits=_is_bits(task["metric"])) if each else "" for each in means]
        table.add_row(task["task"], task["metric"], str(task["n"]), *cells)
    write(table)
    table = Table("claim", "difference [95% interval]", "verdict", box=None, title_justify="left")
    for claim in content["claims"]:
        unit = claim.get("unit")
        text = f"{_figures(claim['difference'], claim, bits=unit == 'bits', sign='+')} {unit}" if unit else ""
        table.add_row(claim["claim"], text, claim["verdict"])
    write(table)


def _figures(value: float, interval: Mapping[str, float], *, bits: bool, sign: str = "") -> str:
    """A figure with its interval: bits as they are, shares in percent."""
    return "{} [{}, {}]".format(*(f"{each:{sign}.2f}" if bits else f"{100 * each:{sign}.1f}"
                                  for each in (value, interval["low"], interval["high"])))
