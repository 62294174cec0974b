"""The commands of `ettin` that look at recipes before anything runs. cli.py adds them to the program.

Everything heavy is imported inside the command that needs it. Exit codes: 0, 1 for bad input, 2 for a wrong command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(help="Say what a run, or every stage of a suite, will take: steps, tokens, memory, hours, energy, money, "
                     "storage. Nothing is built or trained.")(plan)


def plan(recipe: Annotated[list[str], typer.Argument(metavar="RECIPE [OVERLAY | KEY=VALUE]...", help="As for train.py; or a "
                                                     "suite file and keys of it.")],
         gpus: Annotated[str | None, typer.Option(help="Such as 4xH100, which is taken if left out (for runs in fp32: one "
                                                  "CPU process).")] = None,
         mfu: Annotated[float | None, typer.Option(help="Share of the peak to assume, counting 6 operations per parameter "
                                                   "and token. If left out, the original's for the six sizes.")] = None,
         price: Annotated[float | None, typer.Option(help="Of one GPU for one hour.")] = None,
         kwh_price: Annotated[float | None, typer.Option(help="Of one kWh.")] = None,
         pue: Annotated[float, typer.Option(help="Power of the data centre for one unit in its GPUs.")] = 1.0,
         picture: Annotated[Path | None, typer.Option(help="Draw learning rate, batch size, mask rate, objective and row "
                                                      "length over tokens into this file (png, svg or pdf).")] = None,
         as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False) -> None:
    from ettin_foundry.tools import plan_report
    from ettin_foundry.tools.plan_cost import Prices

    prices = Prices(price, kwh_price, pue)
    stages, sources = _stages(recipe)
    runs = plan_report.plan_chain(stages, gpus=gpus, mfu=mfu, prices=prices)
    if picture is not None:
        from ettin_foundry.tools.plan_picture import draw

        draw(runs, picture, sources)
    print(json.dumps(plan_report.as_json(runs), indent=1) if as_json else plan_report.text(runs))
    if picture is not None and not as_json:
        print(f"wrote {picture}")


def _stages(recipe: list[str]) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, str | None]]:
    """(name, config) of the run that the arguments ask for, or of each stage of a suite file; and what each starts from."""
    from ettin_foundry.training import recipes

    if recipe[0].endswith((".yaml", ".yml")) and {"stages", "extends"} & set(recipes.read(recipe[0])):
        from ettin_foundry.tools import suite

        stages = suite.load(recipe[0], recipe[1:]).stages
        return [(stage.name, stage.config()) for stage in stages], {stage.name: stage.source for stage in stages}
    cfg = recipes.resolved(recipe)
    name = cfg.get("run_name") or recipe[0]
    return [(name, cfg)], {name: None}
