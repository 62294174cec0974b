"""The commands of `ettin` for one model: export, import, average, generate, fill-mask."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

_Source = Annotated[Path, typer.Argument(help="Hugging Face folder, Composer .pt file, or folder of checkpoints.")]
_Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer folder, if the model names none.")]
_Objective = Annotated[str | None, typer.Option("--objective", help="mlm or mntp, if the model does not say.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of this name.")]


def add_commands(app: typer.Typer) -> None:
    for name, command in (("export", export), ("import", import_), ("average", average), ("generate", generate),
                          ("fill-mask", fill_mask)):
        app.command(name)(command)


def export(paths: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT OUT", help="Composer .pt file, or folder of "
                                                       "checkpoints; folder to write. With --every, several save folders.")],
           every: Annotated[bool, typer.Option("--every", help="Every checkpoint; whole folders are left.")] = False,
           tokenizer: _Tokenizer = None,
           objective: Annotated[str | None, typer.Option(help="mlm, mntp or clm: another objective that the run was "
                                                         "trained on.")] = None,
           licence: Annotated[str | None, typer.Option("--license", help="The weights' licence, for the card.")] = None,
           overwrite: _Overwrite = False) -> None:
    """Write a Composer checkpoint as a Hugging Face folder.

    With --every, one folder for each checkpoint of save folders, named step1000, ext1000, decay1000.
    """
    *sources, out = paths
    if not sources or (len(sources) > 1 and not every):
        raise typer.BadParameter("a checkpoint and the folder to write are needed (several save folders with --every)",
                                 param_hint="CHECKPOINT OUT")
    from ettin_foundry.hub.folder import export_every, export_model
    from ettin_foundry.hub.load import load_model

    _log_to_stderr()
    facts = {"license": licence}
    if every:
        print(export_every(sources, out, objective=objective, tokenizer=tokenizer, facts=facts, overwrite=overwrite))
        return
    model = load_model(sources[0], objective)
    export_model(model.state, model.config, model.tokenizer_name(tokenizer), out, objective=model.objective,
                 facts={**model.facts, **facts}, overwrite=overwrite)
    print(f"wrote {out}: {model.config.num_parameters:,} parameters, {model.objective}")


def import_(folder: Annotated[Path, typer.Argument(help="Hugging Face folder of an Ettin or ModernBERT model.")],
            out: Annotated[Path, typer.Argument(help="The .pt file to write.")],
            objective: _Objective = None, overwrite: _Overwrite = False) -> None:
    """Turn a Hugging Face folder into a weights file for load_path (with load_weights_only)."""
    from ettin_foundry.hub.average import check_weights_file, save_weights
    from ettin_foundry.hub.load import load_model
    from ettin_foundry.model.weights import weights_checkpoint

    _log_to_stderr()
    check_weights_file(out, overwrite)
    model = load_model(folder, objective)
    save_weights(out, weights_checkpoint(model.state, model.config, objective=model.objective, tokenizer=model.tokenizer))
    print(f"wrote {out}: {model.config.num_parameters:,} parameters, {model.objective}")


def average(paths: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT... OUT.pt", help="Checkpoints of one phase of "
                                                        "one recipe, or with --last a save folder; then the file.")],
            last: Annotated[int | None, typer.Option(min=1, help="The K newest complete checkpoints of the folder.")] = None,
            weights: Annotated[str | None, typer.Option(help="One number above 0 for each checkpoint, such as 1,1,2; they "
                                                        "need not sum to 1.")] = None,
            overwrite: _Overwrite = False) -> None:
    """Write the mean of the weights of several checkpoints.

    ettin average A.pt B.pt OUT.pt, or ettin average SAVE_FOLDER OUT.pt --last 5.
    """
    *sources, out = paths
    if not sources:
        raise typer.BadParameter("checkpoints and the file to write are needed", param_hint="CHECKPOINT... OUT.pt")
    if last is not None and len(sources) != 1:
        raise ValueError(f"--last takes one save folder, got {len(sources)} sources")
    from ettin_foundry.hub.average import average_checkpoints, last_checkpoints

    if last is not None:
        sources = last_checkpoints(sources[0], last)
    try:
        numbers = None if weights is None else [float(part) for part in weights.split(",")]
    except ValueError:
        raise ValueError(f"--weights must be numbers with commas between them, such as 1,1,2, got {weights!r}") from None
    config, objective = average_checkpoints(sources, out, weights=numbers, overwrite=overwrite)
    print(f"wrote {out}: mean of {len(sources)} checkpoints ({', '.join(path.name for path in sources)}), "
          f"{config.num_parameters:,} parameters, {objective}")


def generate(source: _Source, prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
             max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
             temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
             seed: int = 0, tokenizer: _Tokenizer = None) -> None:
    """Continue prompts with a decoder."""
    model = _build(source, tokenizer, None)
    for prompt, rest in zip(prompts, model.generate(prompts, max_new_tokens, temperature=temperature, seed=seed)):
        print(prompt + rest)


def fill_mask(source: _Source, texts: Annotated[list[str], typer.Argument(help="Texts with a [MASK].")],
              top_k: Annotated[int, typer.Option(min=1)] = 5, tokenizer: _Tokenizer = None,
              objective: _Objective = None) -> None:
    """Fill the first mask token of each text with an encoder."""
    model = _build(source, tokenizer, objective)
    for text, best in zip(texts, model.fill_mask(texts, top_k)):
        print(text)
        for token, probability in best:
            print(f"  {probability:7.2%}  {token!r}")


def _build(source: Path, tokenizer: str | None, objective: str | None) -> Any:
    """An `EttinModel` with the source's weights, ready for samples."""
    from ettin_foundry.data.tokenizer import load
    from ettin_foundry.hub.load import build_model, load_model

    _log_to_stderr()
    loaded = load_model(source, objective)
    return build_model(loaded, load(loaded.tokenizer_name(tokenizer)))


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
