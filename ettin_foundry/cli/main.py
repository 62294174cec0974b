"""The command `ettin`: data, training runs seen as a whole, and models to and from Hugging Face.

Training itself is the host's `composer train.py` or `llmfoundry train`. Everything heavy is imported inside the command
that needs it, so that `ettin --help` answers at once. Exit codes: 0; 1 for bad input, with one line on standard error, or a
negative answer; 2 for a wrong command line; 3 when a stage of a suite failed; 128 + the signal when stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from ettin_foundry.cli import data, model, order, runs

app = typer.Typer(name="ettin", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="Ettin encoders and decoders: data in, Hugging Face folders out and in.")

_REMOVED = {
    "demo": "`make demo`, which is `ettin suite yamls/suite/demo.yaml` after converting python-stdlib into data/demo",
    "repair": "`ettin convert` again into the same folder, which makes lost shards again, or copy them from a whole copy",
    "merge": "`ettin average`, with the same arguments",
    "export --ema": "`ettin average SAVE_FOLDER MEAN.pt --last 5`, and export MEAN.pt",
    "export --sentence-transformers": "sentence-transformers on the exported folder, as in examples/embeddings.py",
    "export --size": "a checkpoint of train.py, which holds its shape",
    "export --field": "a checkpoint of train.py, which holds its shape",
    "plan --price": "the GPU hours that it prints",
    "plan --kwh-price": "the GPU hours that it prints",
    "plan --pue": "the GPU hours that it prints",
}


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
             help="Turn text into a dataset (the same program as data_prep/convert.py; see its --help).")
def convert(context: typer.Context) -> None:
    from ettin_foundry.cli.convert import main as convert_main

    raise typer.Exit(convert_main(context.args))


for _group in (model, data, runs, order):
    _group.add_commands(app)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; ends the process."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        for removed in (words[0], *(f"{words[0]} {word.split('=')[0]}" for word in words[1:])) if words else ():
            if removed in _REMOVED:
                raise ValueError(f"`ettin {removed}` does not exist any more; use {_REMOVED[removed]}")
        app(args=words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
