"""What a finished suite has made: Hugging Face folders, losses under every objective, samples, a table, a picture.

Everything is read from the stages' newest checkpoints and from what their runs logged (steps.jsonl), so the report may
be made again at any time. Written into the suite's root: models/NAME, report.json, report.md, losses.png. What is
missing (the log of a run, a loss, an evaluation that is refused) is replaced by the reason.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import pandas
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from ettin_foundry.data.inspect import format_count
from ettin_foundry.hub.folder import export_checkpoint
from ettin_foundry.hub.load import LoadedModel
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.tools.suite import Samples, Stage, Suite
from ettin_foundry.tools.suite_run import compare_pair, say, stage_state
from ettin_foundry.training.steps import read_steps


def write_report(suite: Suite, fairness: Mapping[str, Mapping[str, Any]]) -> None:
    """Exports, evaluates, draws and writes; `fairness` is what `suite_run.check_suite` found."""
    if unfinished := [stage.name for stage in suite.stages if not stage_state(stage).finished]:
        raise ValueError(f"--report: {', '.join(unfinished)} not finished; run the suite without it")
    suite.root.mkdir(parents=True, exist_ok=True)
    logs: dict[str, list[dict[str, Any]]] = {}
    stages = [_read_stage(stage, logs) for stage in suite.stages]
    pairs: dict[str, dict[str, Any]] = {}
    for pair, members in suite.pairs().items():
        found = compare_pair(members)
        pairs[pair] = {"members": [member.name for member in members],
                       "missing" if isinstance(found, str) else "steps_with_equal_rows": found}
    models = [_make_model(suite, name, suite.stage(stage)) for name, stage in suite.exports.items()]
    if logs:
        _draw_losses(stages, logs, suite.root / "losses.png")
    trained = sum(facts["seconds"] or 0 for facts in stages)
    report = {"name": suite.name, "suite": suite.path, "stages": stages, "pairs": pairs, "fairness": fairness,
              "allowed_unfair": [key for key, entry in fairness.items() if not entry["fair"]], "models": models,
              "pictures": ["losses.png"] if logs else [], "training_seconds": trained}
    (suite.root / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (suite.root / "report.md").write_text("\n".join(_markdown(suite, report)) + "\n", encoding="utf-8")
    Console(width=None if Console().is_terminal else 160).print(Markdown("\n".join(_models(suite, report))))
    say(f"{suite.name}: {len(stages)} stages, {sum(facts['tokens'] for facts in stages):,} tokens in "
        f"{timedelta(seconds=round(trained))} of training; {len(models)} models in {suite.root / 'models'}, report in "
        f"{suite.root / 'report.md'}")


def _read_stage(stage: Stage, logs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A finished stage's row of the report; the steps that it logged are added to `logs`."""
    state = stage_state(stage)
    facts = {"stage": stage.name, "from": stage.source, "pair": stage.pair, "objective": _objective(state.record),
             "tokens": state.tokens, "folder": str(stage.folder), "checkpoint": str(state.checkpoint),
             "run_hash": state.record.get("run_hash"),
             **dict.fromkeys(("steps", "seconds", "tokens_per_second", "first_loss", "last_loss"))}
    try:
        if not (steps := read_steps(stage.folder)):
            raise ValueError(f"the log in {stage.folder} is empty")
        seconds, losses = sum(step["seconds"] for step in steps), [step["loss"] for step in steps]
    except (OSError, ValueError, LookupError, TypeError) as error:  # no log, or one of something else
        return {**facts, "missing": f"no losses and times: {error}"}
    logs[stage.name] = steps
    if lost := [step["step"] for step in steps if step["loss"] is None]:
        facts["missing"] = f"the loss is not finite at {len(lost):,} of {len(steps):,} steps, first at step {lost[0]:,}"
    last = [loss for loss in losses[-20:] if loss is not None]
    return facts | {"steps": len(steps), "seconds": round(seconds, 1), "first_loss": losses[0],
                    "tokens_per_second": round(state.tokens / seconds) if seconds else None,
                    "last_loss": statistics.fmean(last) if last else None}


def _draw_losses(stages: Sequence[Mapping[str, Any]], logs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Training losses over tokens since initialisation, a colour a stage; losses that are not finite leave a gap."""
    ends: dict[str | None, int] = {}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "agg", "axes.grid": True}):
        figure = Figure(figsize=(8.5, 4.8), layout="constrained")
        axes = figure.subplots()
        for i, facts in enumerate(stages):
            begin = ends.get(facts["from"], 0)
            ends[facts["stage"]] = begin + facts["tokens"]
            axes.axvline(begin, color="grey", linewidth=0.8, linestyle="--")
            label: str | None = facts["stage"]
            for _, group in itertools.groupby(logs.get(facts["stage"], ()), key=lambda step: step["objective"]):
                part = list(group)
                x = [begin + step["tokens"] for step in part]
                losses = pandas.Series([step["loss"] for step in part], dtype=float)
                axes.plot(x, losses, color=f"C{i}", linewidth=0.5, alpha=0.22)
                smooth = losses.rolling(1 + 2 * min(12, len(part) // 16), center=True, min_periods=1).mean()
                axes.plot(x, smooth, color=f"C{i}", label=label)
                label = None
        axes.set(xlabel="tokens since initialisation", ylabel="training loss (nats per target)")
        axes.xaxis.set_major_formatter(lambda number, _: format_count(number) if number > 0 else "0")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3, fontsize=8.5)
        figure.savefig(path, dpi=150)


def _objective(record: Mapping[str, Any]) -> str:
    return " and ".join(ObjectiveSchedule.parse(record.get("objective_schedule") or record["objective"]).objectives)


def _make_model(suite: Suite, name: str, stage: Stage) -> dict[str, Any]:
    """One export with its evaluation and samples."""
    folder = suite.root / "models" / name
    loaded = export_checkpoint(stage.folder, folder, overwrite=True)
    say(f"{name}: wrote {folder}")
    states = [(each.name, stage_state(each)) for each in suite.chain(stage)]
    chain = [{"stage": each, "objective": _objective(state.record), "tokens": state.tokens} for each, state in states]
    found = {"model": name, "stage": stage.name, "objective": chain[-1]["objective"], "chain": chain,
             "tokens": loaded.facts["tokens"], "parameters": loaded.config.num_parameters, "folder": str(folder),
             "evaluation": {}, "samples": []}
    try:
        found["samples"] = _samples(loaded, suite.samples)
        if (wanted := suite.evaluation) is not None:
            found["evaluation"] = evaluate(folder, wanted.data, wanted.objectives, mask_rate=wanted.mask_rate,
                                           max_batches=wanted.max_batches)
            say(f"{name}: " + ", ".join(f"{key} {value['loss']:.3f}" for key, value in found["evaluation"].items()))
    except (OSError, ValueError) as error:
        found["missing"] = f"not evaluated: {error}"
    return found


def _samples(loaded: LoadedModel, wanted: Samples) -> list[str]:
    """Prompts continued by a decoder, masks filled by an encoder."""
    if not (texts := list(wanted.prompts if loaded.config.causal else wanted.masked)):
        return []
    predictor = loaded.predictor(loaded.tokenizer())
    if loaded.config.causal:
        return [prompt + rest for prompt, rest in zip(texts, predictor.generate(texts, max_new_tokens=24))]
    return [f"{text} -> {', '.join(repr(token) for token, _ in best[:4])}"
            for text, best in zip(texts, predictor.fill_mask(texts))]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [header, "|" + "---|" * len(rows[0]), *rest, ""]


def _models(suite: Suite, report: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a model and a column an objective, then samples, and what is missing with its reason."""
    wanted, lines = suite.evaluation, []
    names = [] if wanted is None else list(wanted.objectives)
    titles = [f"{name} {wanted.mask_rate:.0%}" if wanted and name in MASKED_OBJECTIVES else name for name in names]
    rows = [["model", "trained with", "tokens", *(f"{title}: loss (accuracy)" for title in titles)]]
    for model in report["models"]:
        objectives = [name for name, _ in itertools.groupby(part["objective"] for part in model["chain"])]
        losses = [f"{value['loss']:.3f} ({value['accuracy']:.1%})" for value in model["evaluation"].values()]
        tokens = " + ".join(format_count(part["tokens"]) for part in model["chain"])
        rows.append([model["model"], ", then ".join(objectives), tokens, *(losses or ["-"] * len(names))])
        if model["samples"]:
            lines += [f"**{model['model']}**", "", *(f"- `{sample!r}`" for sample in model["samples"]), ""]
    entries = [(entry["stage"], entry) for entry in report["stages"]] + [(m["model"], m) for m in report["models"]]
    entries += [(f"pair {name}", entry) for name, entry in report["pairs"].items()]
    missing = [f"- {name}: {entry['missing']}" for name, entry in entries if "missing" in entry]
    return [*(_table(rows) if report["models"] else []), *lines, *missing]


def _markdown(suite: Suite, report: Mapping[str, Any]) -> list[str]:
    lines = [f"# {suite.name}", ""]
    if report["allowed_unfair"]:
        lines += ["**Not a fair comparison**, allowed by --allow-unfair; what differs is at the end.", ""]
    lines += _models(suite, report)
    if (wanted := suite.evaluation) is not None:
        part = "whole" if wanted.max_batches is None else f"its first {wanted.max_batches} batches"
        lines += ["", f"Losses in nats per target on the validation split of {wanted.data} ({part}), the same targets "
                  "for every model. Under clm a model sees the past only, under the others both sides.", ""]
    lines += [f"![{name}]({name})" for name in report["pictures"]] + [""]
    columns = {"stage": "", "from": "", "objective": "", "tokens": ",", "steps": ",", "tokens_per_second": ",",
               "first_loss": ".3f", "last_loss": ".3f"}
    lines += _table([[key.replace("_", " ") for key in columns], *(
        ["-" if facts[key] is None else format(facts[key], form) for key, form in columns.items()]
        for facts in report["stages"])])
    lines += ["Last loss: the mean of the last 20 steps.", ""]
    lines += [f"- pair {pair}: {', '.join(entry['members'])} read the same rows at each of "
              f"{entry['steps_with_equal_rows']:,} steps."
              for pair, entry in report["pairs"].items() if "steps_with_equal_rows" in entry]
    for key, entry in report["fairness"].items():
        lines += ["", f"{key}:", "```", entry["findings"], "```"]
    return [*lines, "", f"{timedelta(seconds=round(report['training_seconds']))} of training."]
