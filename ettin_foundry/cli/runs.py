"""The commands of `ettin` for training runs seen as a whole: recipes, plan, lint, suite, watch, report, order."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_Settings = Annotated[list[str] | None, typer.Argument(
    metavar="KEY=VALUE", help="Keys of the file: scale=0.01, root=runs/mine, command='composer -n 4 train.py'.")]


def recipes(copy: Annotated[Path | None, typer.Option(
        help="Folder to copy train.py, yamls/ and data_prep/ into.")] = None) -> None:
    """List the recipes, or copy them into a folder of your own.

    Example: ettin recipes --copy my-runs
    """
    from ettin_foundry import program_folder

    here, parts = program_folder(), ("train.py", "yamls", "data_prep")
    if copy is None:
        print(*sorted(path.relative_to(here).as_posix() for path in (here / "yamls").rglob("*.yaml")), sep="\n")
        return
    if taken := [name for name in parts if (copy / name).exists()]:
        raise ValueError(f"--copy must be a folder without {', '.join(taken)}, got {copy}; choose another")
    copy.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / parts[0], copy)
    for name in parts[1:]:
        shutil.copytree(here / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"wrote {', '.join(parts)} in {copy}")


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or a suite file.")],
    more: Annotated[list[str] | None, typer.Argument(
        metavar="OVERLAY|KEY=VALUE", help="As for train.py, or keys of the suite.")] = None,
    gpus: Annotated[str | None, typer.Option(
        help="Such as 4xH100, which is taken if left out (for runs in fp32: one CPU process).")] = None,
    mfu: Annotated[float | None, typer.Option(
        help="Share of the peak, at 6 operations per parameter and token; the original's if left out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a run or suite takes: steps, memory, hours, storage.

    Example: ettin plan yamls/ettin-dec-150m.yaml --gpus 4xH100
    """
    from ettin_foundry.tools import plan as planning
    from ettin_foundry.tools.suite import load
    from ettin_foundry.training import run_config

    if {"stages", "lines", "extends"} & set(run_config.read(recipe)):
        stages = [(stage.name, stage.config) for stage in load(recipe, more or []).stages]
    else:
        config = run_config.resolved([recipe, *(more or [])])
        stages = [(config.get("run_name") or recipe, config)]
    runs = planning.plan_runs(stages, gpus=gpus, mfu=mfu)
    facts = {"stages": [run._asdict() for run in runs], "totals": planning.totals(runs)}
    print(json.dumps(facts, indent=1) if as_json else planning.text(runs), flush=True)  # before what a sweep says


def lint(
    words: Annotated[list[str], typer.Argument(
        metavar="RUN|KEY=VALUE", help="Two runs, each YAML files and key=value joined by +; then key=value for both.")],
) -> None:
    """Say whether two runs are a fair pair, and why.

    The exit code is 1 when they are not.

    Example: ettin lint yamls/ettin-enc-150m.yaml yamls/ettin-dec-150m.yaml
    """
    from ettin_foundry.tools.pair import lint_pair

    runs = [word for word in words if "=" not in word.split("+")[0]]
    if len(runs) != 2:
        raise typer.BadParameter(f"two runs are compared; {len(runs)} given: {runs}")
    configs = [_config(run, [word for word in words if word not in runs]) for run in runs]
    first, second = (str(config.get("run_name") or run) for run, config in zip(runs, configs))
    report = lint_pair(*configs, names=(first, second))
    print(report)
    raise typer.Exit(int(not report.fair))


def _config(text: str, overrides: list[str]) -> dict[str, Any]:
    """The checked config of `recipe.yaml+overlay.yaml+key=value` and overrides after it."""
    from ettin_foundry.training import run_config
    from ettin_foundry.training.checks import check_settings

    parts = re.split(r"\+(?=[^+=]*(?:=|\.ya?ml(?:\+|$)))", text)  # at + before a file or a key, not in 1e+3
    try:
        config = {key: value for key, value in run_config.resolved([*parts, *overrides]).items() if value is not None}
        check_settings(config)
    except (ValueError, OSError) as error:
        raise type(error)(f"{text}: {error}") from error
    return config


def suite(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Suite file, such as yamls/suite/ettin-150m.yaml.")],
    settings: _Settings = None,
    list_: Annotated[bool, typer.Option(
        "--list", help="Train nothing: check all, print each stage, its source and its exact command.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="As --list, as JSON.")] = False,
    stage: Annotated[list[str] | None, typer.Option(
        help="Only this stage; may be repeated. No export, no report.")] = None,
    report: Annotated[bool, typer.Option(
        "--report", help="Train nothing: export, evaluate and report what is finished.")] = False,
    allow_unfair: Annotated[bool, typer.Option(
        "--allow-unfair", help="Train pairs that differ in more than their objective; the report says so.")] = False,
) -> None:
    """Train the stages of a suite in order, then export and report.

    Finished stages are skipped, an interrupted one continues.

    Example: ettin suite yamls/suite/nano.yaml scale=0.02 root=runs/suite-short
    """
    from ettin_foundry.tools.suite import load

    if report and stage:
        raise ValueError("--report trains nothing; leave out --stage")
    found = load(file, settings or [])
    stages = [found.stage(name) for name in stage or []] or found.stages
    from ettin_foundry.tools.suite_run import StageFailed, check_suite, run_suite, signals

    fairness = check_suite(found, allow_unfair=allow_unfair)
    if list_ or json_:
        _list(found, stages, json_)
        return
    try:
        with signals():
            if not report:
                run_suite(found, stages)
            if not stage:
                from ettin_foundry.tools.report import measure, write_report

                if found.file.x is None:
                    write_report(found, fairness)
                else:
                    measure(found, shlex.join(["ettin", "sweep", str(file), *(settings or [])]))
    except StageFailed as error:
        print(f"error: {error}\nNothing after it was started. The same command continues.", file=sys.stderr)
        raise typer.Exit(3) from None
    except KeyboardInterrupt as error:
        print("stopped. The same command continues.", file=sys.stderr)
        raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from None


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Sweep file, such as study/sweep-lr.yaml.")],
    settings: _Settings = None,
) -> None:
    """Train a run for each value of a setting, and draw the losses.

    The cost is said first. What is trained and measured already is left as it is: the same command continues.

    Example: ettin sweep study/sweep-lr.yaml scale=0.05
    """
    from ettin_foundry.tools.suite import load

    if load(file, settings or []).file.x is None:
        raise ValueError(f"{file}: x and lines must be given in a sweep, got none; look at study/sweep-lr.yaml")
    plan(str(file), settings)
    suite(file, settings)


def _list(found: Any, stages: Any, as_json: bool) -> None:
    listed = [{"name": stage.name, "from": stage.source, "pair": stage.pair, "folder": str(stage.folder),
               "max_duration": stage.config["max_duration"], "command": stage.words} for stage in stages]
    if as_json:
        print(json.dumps({"name": found.file.name, "root": str(found.file.root), "stages": listed}, indent=1))
        return
    for stage in listed:
        pair = f", pair {stage['pair']}" if stage["pair"] else ""
        print(f"{stage['name']}: {stage['max_duration']} from {stage['from'] or 'initialisation'}{pair}\n"
              f"    {shlex.join(stage['command'])}")


def watch(
    run: Annotated[Path, typer.Argument(
        metavar="RUN", help="Save folder of a run, its steps.jsonl, or the root of a suite.")],
    follow: Annotated[bool, typer.Option("--follow", help="Go on showing it until all its runs have ended.")] = False,
) -> None:
    """Show how far a run is: loss over tokens, speed, time left.

    Example: ettin watch runs/nano-mlm-pretrain --follow
    """
    from ettin_foundry.tools import progress

    progress.watch(run, follow)


def report(folder: Annotated[Path, typer.Argument(
        metavar="FOLDER", help="Save folder of a run, root of a suite, folder of a study or sweep.")]) -> None:
    """Write an HTML report of a run, a suite or a study.

    Example: ettin report runs/nano-mlm-pretrain
    """
    from ettin_foundry.tools.report import write_page

    print(f"wrote {write_page(folder)}")


def order(
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As for train.py.")] = None,
    yaml: Annotated[list[str] | None, typer.Option(help="The recipe; again for each overlay.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(
        help="In place of a recipe: a checkpoint or save folder, and the step that follows it.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Counted from 0, as in steps.jsonl.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows whose documents are printed.")] = 8,
    decode: Annotated[bool, typer.Option("--decode", help="Print how each chunk begins.")] = False,
) -> None:
    """Show what a step of a run reads.

    Example: ettin order --yaml yamls/nano.yaml --step 100
    """
    from ettin_foundry.tools.order import next_step, stream_of, text
    from ettin_foundry.training.run_config import resolved

    if checkpoint is not None and not (yaml or words):
        cfg, stream, following = next_step(checkpoint)
        step = following if step is None else step
    elif yaml and step is not None and checkpoint is None:
        cfg = resolved([*yaml, *(words or [])])
        stream = stream_of(cfg)
    else:
        raise ValueError("either --checkpoint must be given alone, or --yaml and --step")
    print(text(cfg, stream, step, rows=rows, decode=decode))
