"""The command `ettin-eval`.

Exit codes: 0; 1 for bad input, with one line on standard error; 2 for a wrong command line.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ettin_eval import __version__


class _Group(TyperGroup):
    """A word that is no command is a model: `ettin-eval MODEL` is `ettin-eval run MODEL`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["run", *args])


app = typer.Typer(name="ettin-eval", cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def _eval(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Measure what an encoder or decoder is worth: ettin-eval MODEL --suite quick."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, or hub id.")],
    suite: Annotated[str | None, typer.Option(help="quick if left out; `ettin-eval tasks` lists them.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these, joined by commas.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the sets on disk; the hub if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result file; eval/NAME.json if left out.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: a tag, such as step599525.")] = None,
    objective: Annotated[str | None, typer.Option(help="mlm or mntp, for encoders whose config does not say.")] = None,
    protocol: Annotated[str, typer.Option(help="How encoders score text: pseudo, mask1 or mask3.")] = "pseudo",
    limit: Annotated[int | None, typer.Option(help="Most items of a task.")] = None,
    seed: Annotated[int, typer.Option(help="Of fine-tuning, subsets and shots.")] = 0,
    device: Annotated[str | None, typer.Option(help="cuda where there is one, else cpu.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most token positions in one pass.")] = 8192,
    lr: Annotated[float | None, typer.Option(help="Of fine-tuning, in place of a task's own.")] = None,
    grid: Annotated[str | None, typer.Option(help="glue: modernbert, or a YAML file of lists to search.")] = None,
) -> None:
    """Evaluate a model; what the result file holds already is not run again.

    Example: ettin-eval models/nano-encoder --suite quick --data evaluation/data
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: no bars of the libraries in log files
    import torch

    from ettin_eval.glue import read_grid
    from ettin_eval.results import Results
    from ettin_eval.subject import read_subject
    from ettin_eval.suites import SUITES
    from ettin_eval.tasks import Settings, chosen

    wanted = chosen(SUITES, suite, [name.strip() for name in tasks.split(",")] if tasks else [])
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    if lr is not None and not lr > 0:
        raise ValueError(f"--lr must be above 0, got {lr}")
    if data is not None and not data.is_dir():
        raise ValueError(f"--data must be a folder of evaluation sets, got {data}; `make eval-data` makes one")
    subject = read_subject(model, revision=revision, objective=objective)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = Path(model).name + (f"-{revision}" if revision else "")
    out = out or Path("eval", re.sub(r"[^\w.-]+", "-", name) + ".json")
    settings = Settings(data, limit, seed, device, batch_tokens, protocol, lr, read_grid(grid), out.with_suffix(""))
    missing = {task: reason for task in wanted if (reason := task.missing(settings))}
    for task, reason in missing.items():
        if tasks:
            raise ValueError(reason)
        print(f"{task.name} left out: {reason}", file=sys.stderr)
    wanted = [task for task in wanted if task not in missing]
    facts = {"model": model, "revision": revision, "kind": subject.kind, "objective": subject.objective,
             "settings": {"limit": limit, "seed": seed, "protocol": protocol, **({"lr": lr} if lr else {}),
                          **({"grid": settings.grid} if grid else {})}}
    results = Results(out, facts)
    started = time.monotonic()
    _evaluate(wanted, subject, settings, results)
    _print(model, results, [task.name for task in wanted])
    print(f"finished: {len(wanted)} tasks in {time.monotonic() - started:.0f} s, {out}")


def _evaluate(tasks: Sequence[Any], subject: Any, settings: Any, results: Any) -> None:
    """Runs the tasks that the results do not hold; each is kept when it is done."""
    for number, task in enumerate(tasks, 1):
        if results.has(task.name):
            continue
        print(f"[{number}/{len(tasks)}] {task.name}: {task.about}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        results.add(task.name, task.run(subject, settings), time.monotonic() - begun)


def _print(model: str, results: Any, names: Sequence[str]) -> None:
    table = Table("task", "metric", "value", "standard error", "n", title=model, box=None, title_justify="left")
    for name in names:
        for score in results.scores(name):
            table.add_row(score.task, score.metric, f"{score.value:.4f}",
                          "" if score.stderr is None else f"{score.stderr:.4f}", str(score.n))
    Console().print(table)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Study file, such as study/nano.yaml.")],
    quick: Annotated[bool, typer.Option("--quick", help="With the file's quick settings.")] = False,
) -> None:
    """Train suites of several seeds, evaluate every model, and say which claims hold. The same command goes on.

    Example: ettin-eval study study/nano.yaml --quick
    """
    from ettin_eval.study import read_study, run_study

    run_study(read_study(file, quick), shlex.join(["ettin-eval", "study", str(file), *(["--quick"] if quick else [])]))


@app.command("tasks")
def list_tasks() -> None:
    """List suites and their tasks."""
    from ettin_eval.suites import SUITES

    for suite, tasks in SUITES.items():
        print(suite)
        for task in tasks:
            print(f"  {task.name:32}{task.about}")


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; ends the process."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(args=argv, prog_name="ettin-eval")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
