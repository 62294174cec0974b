"""The command `ettin lint`: whether two runs, or the phases of one model, belong together.

Exit codes: 0 when nothing is unfair, 1 when something is or a run is refused, 2 for a wrong command line.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command(help="Say whether two runs are a fair pair, and each difference with its reason. Nothing is trained.")(lint)


def lint(words: Annotated[list[str], typer.Argument(metavar="A B [KEY=VALUE]...", help="Two runs, each YAML files and "
                                                    "key=value joined by '+'; then key=value for both.")],
         chain: Annotated[bool, typer.Option("--chain", help="The runs are one model's phases, in order.")] = False) -> None:
    from ettin_foundry.tools.pair import lint_chain, lint_pair

    runs = [word for word in words if "=" not in word.split("+")[0]]
    if len(runs) == 2 or (len(runs) > 2 and chain):
        found = [_config(run, [word for word in words if word not in runs]) for run in runs]
        names = [str(config.get("run_name") or run) for run, config in zip(runs, found)]
        if chain:
            report = lint_chain(list(zip(names, found)))
        else:
            second = names[1] if names[1] != names[0] else f"{names[1]} (second)"
            report = lint_pair(found[0], found[1], names=(names[0], second))
    else:
        raise typer.BadParameter(f"{len(runs)} run(s) given: {' '.join(runs)}; two runs are compared, --chain takes two or "
                                 "more phases")
    print(report)
    if not report.fair:
        raise typer.Exit(1)


def _config(text: str, overrides: list[str]) -> dict[str, Any]:
    """The checked config of `recipe.yaml+overlay.yaml+key=value` and overrides after it.

    Raises:
        FileNotFoundError, ValueError: a file is missing or the run is refused; the message begins with `text`.
    """
    from ettin_foundry.training import recipes
    from ettin_foundry.training.checks import check_settings

    parts: list[str] = []
    for part in text.split("+"):
        if parts and "=" not in part and not part.endswith((".yaml", ".yml")):
            parts[-1] += f"+{part}"  # a value such as 1e+3
        else:
            parts.append(part)
    try:
        config = {key: value for key, value in recipes.resolved([*parts, *overrides]).items() if value is not None}
        check_settings(config)
    except (ValueError, OSError) as error:
        raise type(error)(f"{text}: {error}") from error
    return config
