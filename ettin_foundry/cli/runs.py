"""The commands of `ettin` for training runs seen as a whole: recipes, plan, lint, suite, evaluate."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def add_commands(app: typer.Typer) -> None:
    for command in (recipes, plan, lint, suite, evaluate):
        app.command()(command)


def recipes(copy: Annotated[Path | None, typer.Option(help="Folder to copy train.py, yamls/ and data_prep/ into.")] = None
            ) -> None:
    """List the recipes, or copy them with train.py and data_prep/ into a folder of your own."""
    import shutil

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


def plan(recipe: Annotated[list[str], typer.Argument(metavar="RECIPE [OVERLAY | KEY=VALUE]...", help="As for train.py; or a "
                                                     "suite file and keys of it.")],
         gpus: Annotated[str | None, typer.Option(help="Such as 4xH100, which is taken if left out (for runs in fp32: one "
                                                  "CPU process).")] = None,
         mfu: Annotated[float | None, typer.Option(help="Share of the peak to assume, counting 6 operations per parameter "
                                                   "and token. If left out, the original's for the six sizes.")] = None,
         picture: Annotated[Path | None, typer.Option(help="Draw learning rate, batch size, mask rate, objective and row "
                                                      "length over tokens into this file (png, svg or pdf).")] = None,
         as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    """Say what a run, or every stage of a suite, will take: steps, tokens, memory, hours, storage."""
    from ettin_foundry.tools import plan as planning
    from ettin_foundry.training import recipes as files

    if recipe[0].endswith((".yaml", ".yml")) and {"stages", "extends"} & set(files.read(recipe[0])):
        from ettin_foundry.tools.suite import load

        found = load(recipe[0], recipe[1:]).stages
        stages, sources = [(s.name, s.config()) for s in found], {s.name: s.source for s in found}
    else:
        config = files.resolved(recipe)
        name = config.get("run_name") or recipe[0]
        stages, sources = [(name, config)], {name: None}
    runs = planning.plan_runs(stages, gpus=gpus, mfu=mfu)
    if picture is not None:
        from ettin_foundry.tools.pictures import draw_plans

        draw_plans(runs, picture, sources)
    print(json.dumps(planning.as_json(runs), indent=1) if as_json else planning.text(runs))


def lint(words: Annotated[list[str], typer.Argument(metavar="A B [KEY=VALUE]...", help="Two runs, each YAML files and "
                                                    "key=value joined by '+'; then key=value for both.")],
         chain: Annotated[bool, typer.Option("--chain", help="The runs are one model's phases, in order.")] = False) -> None:
    """Say whether two runs are a fair pair, and each difference with its reason."""
    from ettin_foundry.tools.pair import lint_chain, lint_pair

    runs = [word for word in words if "=" not in word.split("+")[0]]
    if len(runs) != 2 and not (chain and len(runs) > 2):
        raise typer.BadParameter(f"two runs are compared, --chain takes two or more phases; {len(runs)} given: {runs}")
    configs = [_config(run, [word for word in words if word not in runs]) for run in runs]
    names = [str(config.get("run_name") or run) for run, config in zip(runs, configs)]
    report = lint_chain([*zip(names, configs)]) if chain else lint_pair(*configs, names=(names[0], names[1]))
    print(report)
    if not report.fair:
        raise typer.Exit(1)


def _config(text: str, overrides: list[str]) -> dict[str, Any]:
    """The checked config of `recipe.yaml+overlay.yaml+key=value` and overrides after it."""
    from ettin_foundry.training import recipes
    from ettin_foundry.training.checks import check_settings

    parts = re.split(r"\+(?=[^+=]*(?:=|\.ya?ml(?:\+|$)))", text)  # at + before a file or a key, not in 1e+3
    try:
        config = {key: value for key, value in recipes.resolved([*parts, *overrides]).items() if value is not None}
        check_settings(config)
    except (ValueError, OSError) as error:
        raise type(error)(f"{text}: {error}") from error
    return config


def suite(file: Annotated[Path, typer.Argument(metavar="FILE", help="Suite file, such as yamls/suite/ettin-150m.yaml.")],
          settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the file, such as "
                                                               "scale=0.01 or root=runs/mine.")] = None,
          list_: Annotated[bool, typer.Option("--list", help="Check all, print each stage, what it starts from and its "
                                              "exact command; train nothing.")] = False,
          json_: Annotated[bool, typer.Option("--json", help="As --list, as JSON.")] = False,
          stage: Annotated[list[str] | None, typer.Option(help="Run this stage only; may be repeated. No export, no "
                                                          "report.")] = None,
          report: Annotated[bool, typer.Option("--report", help="Train nothing: export, evaluate and report what is "
                                               "finished.")] = False,
          command: Annotated[str | None, typer.Option(help="What starts a run, instead of the file's command.")] = None,
          allow_unfair: Annotated[bool, typer.Option("--allow-unfair", help="Train pairs that differ in more than their "
                                                     "objective; the report says so.")] = False) -> None:
    """Run a suite file: train its stages in order, compare pairs, export, evaluate, report.

    Finished stages are skipped, an interrupted one continues.
    """
    from ettin_foundry.tools.suite import load

    if report and (stage or command):
        raise ValueError("--report trains nothing; leave out --stage and --command")
    found = load(file, [*(settings or []), *([f"command={command}"] if command is not None else [])])
    from ettin_foundry.tools.suite_run import StageFailed, check_suite, run_suite, signals

    if list_ or json_:
        check_suite(found, allow_unfair=allow_unfair)
        _list(found, json_)
        return
    try:
        with signals():
            run_suite(found, only=stage or [], report_only=report, allow_unfair=allow_unfair)
    except StageFailed as error:
        print(f"error: {error}\nNothing after it was started. The same command continues.", file=sys.stderr)
        raise typer.Exit(3) from None
    except KeyboardInterrupt as error:
        print("stopped. The same command continues.", file=sys.stderr)
        raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from None


def _list(found: Any, as_json: bool) -> None:
    stages = [{"name": stage.name, "from": stage.source, "pair": stage.pair, "folder": str(stage.folder),
               "max_duration": stage.config()["max_duration"], "command": found.words(stage)} for stage in found.stages]
    if as_json:
        print(json.dumps({"name": found.name, "root": str(found.root), "stages": stages}, indent=1))
        return
    for stage in found.stages:
        pair = f", pair {stage.pair}" if stage.pair else ""
        print(f"{stage.name}: {stage.config()['max_duration']} from {stage.source or 'initialisation'}{pair}")
        print(f"    {shlex.join(found.words(stage))}")


def evaluate(source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Composer checkpoint, folder of checkpoints, or "
                                                    "Hugging Face folder.")],
             data: Annotated[Path, typer.Option(help="Folder of a dataset.")],
             objective: Annotated[list[str] | None, typer.Option(help="clm, mlm or mntp; may be repeated. All three if left "
                                                                 "out.")] = None,
             mask_rate: Annotated[float, typer.Option(help="Of mlm and mntp.")] = 0.15,
             max_batches: Annotated[int | None, typer.Option(help="Of 16,384 token positions; the whole split if left "
                                                             "out.")] = None,
             split: Annotated[str, typer.Option(help="Split of the dataset.")] = "validation",
             max_seq_len: Annotated[int | None, typer.Option(help="Length of a row; the model's own if left out.")] = None,
             device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
             json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Losses of a model on a dataset's validation split, under any objective."""
    from ettin_foundry.tools.evaluate import DEFAULT_OBJECTIVES
    from ettin_foundry.tools.evaluate import evaluate as measure

    found = measure(source, data, objective or DEFAULT_OBJECTIVES, mask_rate=mask_rate, max_batches=max_batches, split=split,
                    max_seq_len=max_seq_len, device=device)
    if json_:
        print(json.dumps(found, indent=1))
        return
    print(f"{'objective':10} {'loss':>8} {'accuracy':>9} {'perplexity':>11} {'targets':>11}")
    for name, values in found.items():
        print(f"{name:10} {values['loss']:8.4f} {values['accuracy']:9.4f} {values['perplexity']:11.4g} "
              f"{values['targets']:11,.0f}")
