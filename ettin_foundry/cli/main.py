"""The command `ettin`: datasets, training runs seen as a whole, and models to and from Hugging Face.

Training itself is the host's `composer train.py` or `llmfoundry train`. Everything heavy is imported inside the command
that needs it, so that `ettin --help` answers at once. Exit codes: 0; 1 for bad input, with one line on standard error,
or a negative answer; 2 for a wrong command line; 3 when a stage of a suite failed; 128 + the signal when stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ettin_foundry import __version__
from ettin_foundry.cli import data, model, runs

_GROUPS = {
    "Data": (data.convert, data.verify, data.show, data.mix, data.finalize),
    "Runs": (runs.recipes, runs.plan, runs.lint, runs.suite, runs.sweep, runs.watch, runs.report, runs.order),
    "Models": (model.export, model.push, model.parity, model.import_, model.average, model.generate, model.fill_mask,
               model.evaluate),
}

app = typer.Typer(name="ettin", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback(invoke_without_command=True)
def _ettin(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Ettin encoders and decoders: data in, Hugging Face folders out and in."""
    if version:
        print(__version__)
        raise typer.Exit


for _title, _commands in _GROUPS.items():
    for _command in _commands:
        app.command(_command.__name__.rstrip("_").replace("_", "-"), rich_help_panel=_title)(_command)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; ends the process."""
    try:
        code = app(args=argv, prog_name="ettin", standalone_mode=False)
    except typer.TyperException as error:  # one line, as of all errors: typer's box breaks it
        error.message, code = error.message.removeprefix("Value error, "), error.exit_code
        error.show()  # type: ignore[attr-defined]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    raise SystemExit(code or 0)


if __name__ == "__main__":
    main()
