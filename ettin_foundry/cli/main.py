"""The command `ettin`: datasets, training runs seen as a whole, and models to and from Hugging Face.

Training itself is the host's `composer train.py` or `llmfoundry train`. Everything heavy is imported inside the command
that needs it, so that `ettin --help` answers at once. Exit codes: 0; 1 for bad input, with one line on standard error,
or a negative answer; 2 for a wrong command line; 3 when a stage of a suite failed; 128 + the signal when stopped.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ettin_foundry import __version__
from ettin_foundry.cli import data, model, runs

_GROUPS = {
    "Data": (data.convert, data.verify, data.show, data.mix, data.finalize),
    "Runs": (runs.recipes, runs.plan, runs.lint, runs.suite, runs.order),
    "Models": (model.export, model.import_, model.average, model.generate, model.fill_mask, model.evaluate),
}
_DATATROVE = "datatrove before the conversion; `ettin convert` reads what it writes (.jsonl.gz)"
_CHECKPOINT = "a checkpoint of train.py, which holds its shape"
_REMOVED = {
    "demo": "`make demo`, which is `ettin suite yamls/suite/demo.yaml` after converting python-stdlib into data/demo",
    "repair": "`ettin convert` again into the same folder, which makes lost shards again",
    "merge": "`ettin average`",
    "average --weights": "the mean without it, in which all checkpoints weigh the same",
    **{f"convert --{option}": _DATATROVE for option in ("decontaminate", "decontaminate-field", "drop-contaminated")},
    "convert --limit-bytes": "a smaller source, such as one of its files or `head -n 100000 all.jsonl > some.jsonl`",
    "verify --no-samples": "`ettin verify` without it: every sample is read",
    "show --picture": "the table of lengths in the dataset's README.md, and `ettin show`",
    "export --tags": "`ettin export --every`: each folder has the name of its revision",
    "export --ema": "`ettin average SAVE_FOLDER MEAN.pt --last 5`, and export MEAN.pt",
    "export --sentence-transformers": "sentence-transformers on the exported folder, as in examples/embeddings.py",
    "export --size": _CHECKPOINT,
    "export --field": _CHECKPOINT,
    **{f"plan --{option}": "the GPU hours that it prints" for option in ("price", "kwh-price", "pue")},
    "plan --picture": "the lr, rows and mask_rate of each step in steps.jsonl, which a run leaves in its save folder",
    "suite --command": "the key command='...' after the suite file",
    **{f"order --{option}": "examples/data_order.py, which writes Parquet" for option in ("export", "from", "to")},
}


class _Group(TyperGroup):
    """Lists the commands by group, and names the nearest choice where an option's value is none."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width, listed = max(map(len, self.commands)), list[Any](self.commands.items())
        for title, commands in itertools.groupby(listed, lambda item: item[1].rich_help_panel):
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), each.get_short_help_str(80)) for name, each in commands])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            if " is not one of " in error.message:
                value, *choices = error.message.split("'")[1::2]
                error.message += "".join(f" Did you mean '{near}'?" for near in get_close_matches(value, choices, 1))
            raise


app = typer.Typer(name="ettin", cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


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
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        for removed in (words[0], *(f"{words[0]} {word.split('=')[0]}" for word in words[1:])) if words else ():
            if removed in _REMOVED:
                raise ValueError(f"`ettin {removed}` does not exist any more; use {_REMOVED[removed]}")
        app(args=words, prog_name="ettin")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
