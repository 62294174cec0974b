"""What a finished suite has made: Hugging Face folders, losses of each under every objective, a table and pictures.

Everything is read from the stages' newest checkpoints and from what their runs logged (steps.jsonl), so the report may be
made again at any time. Written into the suite's root: models/NAME, report.json, report.md, losses.png, and a picture of
each run whose objective changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ettin_foundry.hub.folder import export_model
from ettin_foundry.hub.load import facts_of
from ettin_foundry.model.config import MASKED_OBJECTIVES, EttinConfig
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.tools.suite import Stage, Suite
from ettin_foundry.tools.suite_picture import Course, draw_losses, draw_run
from ettin_foundry.tools.suite_process import say, time_text
from ettin_foundry.tools.suite_run import compare_pair, inspect
from ettin_foundry.training import checkpoints as checkpoint
from ettin_foundry.training.steps import read_steps

__all__ = ["write_report"]


def write_report(suite: Suite, fairness: Mapping[str, Mapping[str, Any]], *, seconds: float) -> str:
    """Exports, evaluates, draws and writes.

    Args:
        fairness: what `suite_run.check_suite` found. seconds: since the suite was started this time.

    Returns:
        One line that says what was made, where, and how long it took.

    Raises:
        ValueError: a stage is not finished, members of a pair read different rows, or an export is refused.
    """
    courses, stages = [], []
    for stage in suite.stages:
        course, facts = _read_stage(stage)
        courses.append(course)
        stages.append(facts)
    pairs = {pair: {"members": [m.name for m in members], "steps_with_equal_rows": compare_pair(members)}
             for pair, members in suite.pairs().items()}
    models = [_make_model(suite, name, suite.stage(stage)) for name, stage in suite.exports.items()]
    suite.root.mkdir(parents=True, exist_ok=True)
    pictures = [suite.root / "losses.png"]
    draw_losses(courses, {m["model"]: m["evaluation"] for m in models if m["evaluation"]}, pictures[0],
                f"{suite.name}: the same rows in the same order" if pairs else suite.name)
    for course in courses:
        if len(set(course.objectives)) > 1:
            pictures.append(suite.root / f"{course.name}.png")
            draw_run(course, pictures[-1])
    trained = sum(facts["seconds"] for facts in stages)
    report = {"name": suite.name, "suite": suite.path, "root": str(suite.root), "stages": stages, "pairs": pairs,
              "fairness": fairness, "allowed_unfair": [key for key, entry in fairness.items() if not entry["fair"]],
              "models": models, "pictures": [path.name for path in pictures], "training_seconds": trained,
              "seconds": round(seconds, 1)}
    (suite.root / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (suite.root / "report.md").write_text("\n".join(_markdown(suite, report)) + "\n", encoding="utf-8")
    _print_table(suite, report)
    tokens = sum(facts["tokens"] for facts in stages)
    return (f"{suite.name}: {len(stages)} stages, {tokens:,} tokens in {time_text(trained)} of training; {len(models)} "
            f"models in {suite.root / 'models'}, report in {suite.root / 'report.md'}; this call took {time_text(seconds)}")


def _read_stage(stage: Stage) -> tuple[Course, dict[str, Any]]:
    """What a finished stage logged, for pictures, and its row of the report."""
    state = inspect(stage)
    if not state.finished:
        raise ValueError(f"stages.{stage.name}: not finished, and a report is about finished stages. Run it first")
    lines = read_steps(stage.folder)
    columns = {key: [line[key] for line in lines] for key in ("tokens", "loss", "lr", "mask_rate", "objective", "seconds")}
    course = Course(stage.name, stage.source, state.record["objective"], columns["tokens"], columns["loss"], columns["lr"],
                    columns["mask_rate"], columns["objective"], state.tokens)
    seconds = sum(columns["seconds"])
    facts = {"stage": stage.name, "from": stage.source, "pair": stage.pair, "objective": _objective(state.record),
             "tokens": state.tokens, "steps": len(lines), "seconds": round(seconds, 1),
             "tokens_per_second": round(state.tokens / seconds) if seconds else None,
             "first_loss": round(columns["loss"][0], 4), "last_loss": round(_mean(columns["loss"][-20:]), 4),
             "folder": str(stage.folder), "checkpoint": str(state.checkpoint), "run_hash": state.record.get("run_hash")}
    return course, facts


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _objective(record: Mapping[str, Any]) -> str:
    return str(ObjectiveSchedule.parse(record.get("objective_schedule") or record["objective"]))


def _make_model(suite: Suite, name: str, stage: Stage) -> dict[str, Any]:
    """One export with its evaluation: a row of the table."""
    state, record = checkpoint.load_model_state(stage.folder)
    chain = [{"stage": each.name, "objective": _objective(inspect(each).record), "tokens": inspect(each).tokens}
             for each in suite.chain(stage)]
    facts = facts_of(record)
    folder = export_model(state, EttinConfig(**record["config"]), record["tokenizer"], suite.root / "models" / name,
                          objective=record["objective"], facts=facts, overwrite=True)
    say(f"{name}: wrote {folder}")
    found: dict[str, dict[str, float]] = {}
    if suite.evaluation is not None:
        wanted = suite.evaluation
        found = evaluate(folder, wanted.data, wanted.objectives, mask_rate=wanted.mask_rate,
                         max_batches=wanted.max_batches)
        say(f"{name}: " + ", ".join(f"{key} {value['loss']:.3f}" for key, value in found.items()))
    return {"model": name, "stage": stage.name, "objective": chain[-1]["objective"], "chain": chain,
            "tokens": facts["tokens"], "parameters": EttinConfig(**record["config"]).num_parameters, "folder": str(folder),
            "evaluation": found}


# ------------------------------------------------------------------ text


def _tokens(number: int) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def _rows(suite: Suite, report: Mapping[str, Any]) -> list[list[str]]:
    """The suite's table, its header first: a row a model, a column an objective."""
    wanted = suite.evaluation
    names = [] if wanted is None else [f"{name} {wanted.mask_rate:.0%}" if name in MASKED_OBJECTIVES else name
                                       for name in wanted.objectives]
    rows = [["model", "objective", "tokens", *(f"{name}: loss (accuracy)" for name in names)]]
    for model in report["models"]:
        rows.append([model["model"], _kinds(model["chain"]), " + ".join(_tokens(part["tokens"]) for part in model["chain"]),
                     *(f"{value['loss']:.3f} ({value['accuracy']:.1%})" for value in model["evaluation"].values())])
    return rows


def _kinds(chain: list[dict[str, Any]]) -> str:
    """The objectives of a chain in order, each once in a row."""
    names = [part["objective"] for part in chain]
    return ", then ".join(name for i, name in enumerate(names) if i == 0 or name != names[i - 1])


def _markdown(suite: Suite, report: Mapping[str, Any]) -> list[str]:
    def table(rows: list[list[str]]) -> list[str]:
        header, *rest = [f"| {' | '.join(row)} |" for row in rows]
        return [header, "|" + "---|" * len(rows[0]), *rest, ""]

    lines = [f"# {suite.name}", ""]
    if report["allowed_unfair"]:
        lines += ["**Not a fair comparison**, and allowed by hand (--allow-unfair); what differs is at the end.", ""]
    if report["models"]:
        lines += table(_rows(suite, report))
        if suite.evaluation is not None:
            most = suite.evaluation.max_batches
            part = "whole" if most is None else f"its first {most} batches"
            lines += [f"Losses in nats per target on the validation split of {suite.evaluation.data} ({part}), the same "
                      "targets for every model. Under clm a model sees the past only, under the others both sides, whatever "
                      "it was trained on.", ""]
    lines += [f"![{name}]({name})" for name in report["pictures"]] + [""]
    stages = [["stage", "from", "objective", "tokens", "steps", "tokens/s", "first loss", "last loss"]]
    stages += [[f["stage"], f["from"] or "initialisation", f["objective"], f"{f['tokens']:,}", f"{f['steps']:,}",
                f"{f['tokens_per_second'] or 0:,}", f"{f['first_loss']:.3f}", f"{f['last_loss']:.3f}"]
               for f in report["stages"]]
    lines += table(stages)
    for pair, entry in report["pairs"].items():
        lines.append(f"- {pair}: {', '.join(entry['members'])} read the same rows at each of "
                     f"{entry['steps_with_equal_rows']:,} steps.")
    for key, entry in report["fairness"].items():
        lines += ["", f"{key}:", "```", entry["findings"], "```"]
    lines += ["", f"{time_text(report['training_seconds'])} of training."]
    return lines


def _print_table(suite: Suite, report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not report["models"]:
        return
    header, *rows = _rows(suite, report)
    table = Table(*header, title=suite.name)
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160).print(table)
