"""The command `ettin`: convert text, move models to and from Hugging Face, try them on a prompt.

Commands for data sets are in cli_data.py. Training is not here: it is the host's `composer train.py` or `llmfoundry
train`. Everything heavy is imported inside the command that needs it, so that `ettin --help` answers at once. Bad input
ends with one line on stderr and exit code 1.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ettin_foundry.cli import average as cli_merge
from ettin_foundry.cli import data as cli_data
from ettin_foundry.cli import lint as cli_lint
from ettin_foundry.cli import order as cli_order
from ettin_foundry.cli import plan as cli_plan
from ettin_foundry.cli import suite as cli_suite

__all__ = ["app", "main"]

app = typer.Typer(name="ettin", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="Ettin encoders and decoders: data in, Hugging Face folders out and in.")

Source = Annotated[Path, typer.Argument(help="Hugging Face folder, Composer .pt file, or folder of checkpoints.")]
TokenizerOption = Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer folder, if the model names none.")]
ObjectiveOption = Annotated[str | None, typer.Option("--objective", help="mlm or mntp, if the model does not say.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of this name.")]


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
             help="Turn text into MDS shards (the same program as data_prep/convert.py; see its --help).")
def convert(context: typer.Context) -> None:
    from ettin_foundry.cli.convert import main as convert_main

    raise typer.Exit(convert_main(context.args))


@app.command(help="Write a Composer checkpoint as a Hugging Face folder; with --every, one folder for each checkpoint of "
             "save folders, named step1000, ext1000, decay1000.")
def export(paths: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT OUT", help="Composer .pt file, or folder of "
                                                       "checkpoints; folder to write. With --every, several save folders.")],
           every: Annotated[bool, typer.Option("--every", help="Every checkpoint; whole folders are left.")] = False,
           tags: Annotated[bool, typer.Option("--tags", help="With --every: list the revisions in OUT/tags.json.")] = False,
           tokenizer: TokenizerOption = None,
           objective: Annotated[str | None, typer.Option(help="mlm, mntp or clm: another objective that the run "
                                                         "was trained on.")] = None,
           licence: Annotated[str | None, typer.Option("--license", help="The weights' licence, for the card.")] = None,
           overwrite: Overwrite = False) -> None:
    *sources, out = paths
    if not sources or (len(sources) > 1 and not every):
        raise typer.BadParameter("a checkpoint and the folder to write are needed (several save folders with --every)",
                                 param_hint="CHECKPOINT OUT")
    if tags and not every:
        raise ValueError("--tags: given without --every, where there is one revision. Leave it out")

    from ettin_foundry.hub.folder import export_model
    from ettin_foundry.hub.load import load_model
    from ettin_foundry.hub.revisions import export_every

    _log_to_stderr()
    facts = {"license": licence}
    if every:
        print(export_every(sources, out, objective=objective, tokenizer=tokenizer, facts=facts, tags=tags,
                           overwrite=overwrite))
        return
    model = load_model(sources[0], objective)
    export_model(model.state, model.config, model.tokenizer_name(tokenizer), out, objective=model.objective,
                 facts={**model.facts, **facts}, overwrite=overwrite)
    print(f"wrote {out}: {model.config.num_parameters:,} parameters, {model.objective}")


@app.command("import", help="Turn a Hugging Face folder into a weights file for load_path (with load_weights_only).")
def import_(folder: Annotated[Path, typer.Argument(help="Hugging Face folder of an Ettin or ModernBERT model.")],
            out: Annotated[Path, typer.Argument(help="The .pt file to write.")],
            objective: ObjectiveOption = None, overwrite: Overwrite = False) -> None:
    from ettin_foundry.hub.average import check_weights_file, save_weights
    from ettin_foundry.hub.load import load_model
    from ettin_foundry.model.weights import weights_checkpoint

    _log_to_stderr()
    check_weights_file(out, overwrite)
    model = load_model(folder, objective)
    save_weights(out, weights_checkpoint(model.state, model.config, objective=model.objective, tokenizer=model.tokenizer))
    print(f"wrote {out}: {model.config.num_parameters:,} parameters, {model.objective}")


@app.command(help="Continue prompts with a decoder.")
def generate(source: Source, prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
             max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
             temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
             seed: int = 0, tokenizer: TokenizerOption = None) -> None:
    _log_to_stderr()
    model = _build(source, tokenizer, None)
    for prompt, rest in zip(prompts, model.generate(prompts, max_new_tokens, temperature=temperature, seed=seed)):
        print(prompt + rest)


@app.command("fill-mask", help="Fill the first mask token of each text with an encoder.")
def fill_mask(source: Source, texts: Annotated[list[str], typer.Argument(help="Texts with a [MASK].")],
              top_k: Annotated[int, typer.Option(min=1)] = 5, tokenizer: TokenizerOption = None,
              objective: ObjectiveOption = None) -> None:
    _log_to_stderr()
    model = _build(source, tokenizer, objective)
    for text, best in zip(texts, model.fill_mask(texts, top_k)):
        print(text)
        for token, probability in best:
            print(f"  {probability:7.2%}  {token!r}")


cli_data.add_commands(app)
cli_suite.add_commands(app)
cli_plan.add_commands(app)
cli_lint.add_commands(app)
cli_order.add_commands(app)
cli_merge.add_commands(app)


def _build(source: Path, tokenizer: str | None, objective: str | None) -> Any:
    """An `EttinModel` with the source's weights, ready for samples."""
    from ettin_foundry.data.tokenizer import load
    from ettin_foundry.hub.load import build_model, load_model

    loaded = load_model(source, objective)
    return build_model(loaded, load(loaded.tokenizer_name(tokenizer)))


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)


_REMOVED = {
    "demo": "`make demo`, or `ettin suite yamls/suite/demo.yaml` after converting python-stdlib into data/demo",
    "repair": "`ettin convert` again into the same folder makes lost shards again, or copy them from a whole copy",
}


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; ends the process with 0, 1 for bad input, 2 for a wrong command line."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words and words[0] in _REMOVED:
            raise ValueError(f"`ettin {words[0]}` does not exist any more; use {_REMOVED[words[0]]}")
        app(args=words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
