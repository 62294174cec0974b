"""The commands of `ettin` for trained models together: suite, evaluate. cli.py adds them to the program.

Everything heavy is imported inside the command that needs it. Exit codes: 0, 1 for bad input or a pair that is none, 2 for a
wrong command line, 3 when a stage failed, 128 + the signal when stopped.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(help="Run a suite file: train its stages in order, compare pairs, export, evaluate, report. Finished stages "
                     "are skipped, an interrupted one continues.")(suite)
    app.command(help="Losses of a model on a set's validation split, under any objective.")(evaluate)


def suite(file: Annotated[Path, typer.Argument(metavar="FILE", help="Suite file, such as yamls/suite/ettin-150m.yaml.")],
          settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the file, such as "
                                                               "scale=0.01 or root=runs/mine.")] = None,
          list_: Annotated[bool, typer.Option("--list", help="Check all, print each stage, what it starts from and its "
                                              "exact command; train nothing.")] = False,
          json_: Annotated[bool, typer.Option("--json", help="With --list: as JSON.")] = False,
          stage: Annotated[list[str] | None, typer.Option(help="Run this stage only; may be repeated. No export, no "
                                                          "report.")] = None,
          report: Annotated[bool, typer.Option("--report", help="Train nothing: export, evaluate and report what is "
                                               "finished.")] = False,
          command: Annotated[str | None, typer.Option(help="What starts a run, instead of the file's command.")] = None,
          allow_unfair: Annotated[bool, typer.Option("--allow-unfair", help="Train pairs that differ in more than their "
                                                     "objective; the report says so.")] = False) -> None:
    from ettin_foundry.tools.suite import load

    for wrong, text in ((json_ and not list_, "--json: given without --list, where it has no effect. Remove it"),
                        (list_ and (report or bool(stage)),
                         "--list: given with --report or --stage; it runs nothing. Remove one"),
                        (report and bool(stage), "--report: given with --stage; it trains nothing. Remove one"),
                        (command is not None and report, "--command: given with --report, which starts no run. Remove one")):
        if wrong:
            raise ValueError(text)
    found = load(file, [*(settings or []), *([f"command={command}"] if command is not None else [])])
    from ettin_foundry.tools.suite_process import signals
    from ettin_foundry.tools.suite_run import StageFailed, check_suite, run_suite

    if list_:
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
        raise typer.Exit(128 + getattr(error, "signum", signal.SIGINT)) from None


def _list(found, as_json: bool) -> None:  # noqa: ANN001 (a Suite, whose module is imported late)
    stages = [{"name": stage.name, "from": stage.source, "pair": stage.pair, "folder": str(stage.folder),
               "max_duration": stage.config()["max_duration"], "command": found.words(stage)} for stage in found.stages]
    if as_json:
        print(json.dumps({"name": found.name, "root": str(found.root), "stages": stages}, indent=1))
        return
    for entry in stages:
        pair = "" if entry["pair"] is None else f", pair {entry['pair']}"
        print(f"{entry['name']}: {entry['max_duration']} from {entry['from'] or 'initialisation'}{pair}")
        print(f"    {shlex.join(entry['command'])}")


def evaluate(source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Composer checkpoint, folder of checkpoints, or "
                                                    "Hugging Face folder.")],
             data: Annotated[Path, typer.Option(help="Folder of a converted set.")],
             objective: Annotated[list[str] | None, typer.Option(help="clm, mlm or mntp; may be repeated. All "
                                                                 "three if left out.")] = None,
             mask_rate: Annotated[float, typer.Option(help="Of mlm and mntp.")] = 0.15,
             max_batches: Annotated[int | None, typer.Option(help="Of 16,384 token positions; the whole split if left "
                                                             "out.")] = None,
             split: Annotated[str, typer.Option(help="Split of the set.")] = "validation",
             max_seq_len: Annotated[int | None, typer.Option(help="Length of a row; the model's own if left out.")] = None,
             device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
             json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
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
