"""The command `ettin`: convert text, move models to and from Hugging Face, try them on a prompt.

Commands for data sets are in cli_data.py. Training is not here: it is the host's `composer train.py` or `llmfoundry
train`. Everything heavy is imported inside the command that needs it, so that `ettin --help` answers at once. Bad input
ends with one line on stderr and exit code 1.
"""

from __future__ import annotations

import dataclasses
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

# what a checkpoint without a record of its config must be told; a rotary base is never guessed
_NEEDED = ("max_position_embeddings", "global_rope_theta", "local_rope_theta")

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
           objective: Annotated[str | None, typer.Option(help="mlm, mntp or clm: if the checkpoint does not say, or "
                                                         "another one that its run was trained on.")] = None,
           size: Annotated[str | None, typer.Option(help="nano to 1b, if the checkpoint does not say.")] = None,
           field: Annotated[list[str] | None, typer.Option(help="name=value of the config, if the checkpoint does not say; "
                                                                "may be repeated.")] = None,
           licence: Annotated[str | None, typer.Option("--license", help="The weights' licence, for the card.")] = None,
           overwrite: Overwrite = False) -> None:
    *sources, out = paths
    if not sources or (len(sources) > 1 and not every):
        raise typer.BadParameter("a checkpoint and the folder to write are needed (several save folders with --every)",
                                 param_hint="CHECKPOINT OUT")
    if tags and not every:
        raise ValueError("--tags: given without --every, where there is one revision. Leave it out")

    def write(source: Path, folder: Path) -> _Model:
        model = _read_checkpoint(source, size=size, objective=objective, fields=field or [])
        name = _tokenizer_name(tokenizer, model.tokenizer, source)
        export_model(model.state, model.config, name, folder, objective=model.objective,
                     facts={**model.facts, "license": licence}, overwrite=overwrite)
        return model

    from ettin_foundry.model.weights import export_model

    _log_to_stderr()
    if not every:
        model = write(sources[0], out)
        print(f"wrote {out}: {model.config.num_parameters:,} parameters, {model.objective}")
        return
    from ettin_foundry.hub.revisions import chosen_objective, export_every, find_revisions

    found = find_revisions(sources)
    kinds = {revision.name: chosen_objective(revision.path, revision.record, objective)[0] for revision in found}
    print(export_every(found, out, lambda revision, folder: write(revision.path, folder), kinds, tags=tags,
                       overwrite=overwrite))


@app.command("import", help="Turn a Hugging Face folder into a weights file for load_path (with load_weights_only).")
def import_(folder: Annotated[Path, typer.Argument(help="Hugging Face folder of an Ettin or ModernBERT model.")],
            out: Annotated[Path, typer.Argument(help="The .pt file to write.")],
            objective: ObjectiveOption = None, overwrite: Overwrite = False) -> None:
    from ettin_foundry.hub.weights_file import check_weights_file, save_weights
    from ettin_foundry.model.weights import weights_checkpoint

    _log_to_stderr()
    check_weights_file(out, overwrite)
    model = _read_folder(folder, objective)
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


@dataclasses.dataclass
class _Model:
    state: dict[str, Any]
    config: Any
    objective: str
    tokenizer: str | None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def _read_folder(folder: Path, objective: str | None) -> _Model:
    from ettin_foundry.model.weights import import_folder

    state, config, stated = import_folder(folder)
    if stated is None and objective not in ("mlm", "mntp"):
        raise ValueError(f"--objective: {objective!r} given, and {folder / 'config.json'} does not say how this encoder "
                         "predicts; mlm and mntp are possible. Official Ettin encoders are mlm, those made from "
                         "decoders (ettin-enc-from-dec) mntp")
    if stated and objective not in (None, stated):
        raise ValueError(f"--objective: {objective!r} given, but {folder / 'config.json'} says {stated!r}; leave it out")
    tokenizer = str(folder) if (folder / "tokenizer.json").is_file() else None
    return _Model(state, config, stated or str(objective), tokenizer)


def _read_checkpoint(path: Path, *, size: str | None = None, objective: str | None = None,
                     fields: Sequence[str] = ()) -> _Model:
    """A Composer checkpoint and its config: from the checkpoint itself, or else from the options."""
    from ettin_foundry.model.config import EttinConfig
    from ettin_foundry.training.checkpoints import load_model_state

    state, record = load_model_state(path)
    if record.get("config"):
        from ettin_foundry.hub.revisions import chosen_objective, facts_of

        if given := [name for name, value in (("--size", size), ("--field", fields)) if value]:
            raise ValueError(f"{', '.join(given)}: given, but {path} carries its own config, which is used; leave it out")
        chosen, config = chosen_objective(path, record, objective)
        return _Model(state, config, chosen, record.get("tokenizer"), facts_of(record))
    overrides = dict(_parse_field(entry) for entry in fields)
    missing = [name for name, value in (("--size", size), ("--objective", objective)) if not value]
    missing += [f"--field {name}=..." for name in _NEEDED if name not in overrides]
    if missing:
        raise ValueError(f"{path}: holds no record of its config (it was not trained with ettin_foundry's clock); pass "
                         f"{', '.join(missing)}")
    embedding = state.get("trunk.embeddings.tok_embeddings.weight")
    if embedding is None:
        raise ValueError(f"{path}: holds no Ettin model (trunk.embeddings.tok_embeddings.weight is missing); pass a "
                         "checkpoint of a run with model.name: ettin")
    overrides.setdefault("vocab_size", embedding.shape[0])
    config = EttinConfig.for_size(str(size), causal=objective == "clm", **overrides)
    return _Model(state, config, str(objective), None)


def _parse_field(entry: str) -> tuple[str, int | float]:
    name, _, value = entry.partition("=")
    try:
        return name, int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise ValueError(f"--field: {entry!r} given; name=number is needed, such as global_rope_theta=160000") from None


def _tokenizer_name(given: str | None, recorded: str | None, source: Path) -> str:
    name = given or recorded
    if not name:
        raise ValueError(f"--tokenizer: not given, and {source} names none; pass the tokenizer folder of the training data")
    return name


def _build(source: Path, tokenizer: str | None, objective: str | None) -> Any:
    """An `EttinModel` with the source's weights, ready for samples."""
    from ettin_foundry.data.tokenizer import load
    from ettin_foundry.model.composer import EttinModel

    is_folder = (source / "config.json").is_file()
    model = _read_folder(source, objective) if is_folder else _read_checkpoint(source)
    fields = dataclasses.asdict(model.config)
    fields.pop("causal")
    built = EttinModel(load(_tokenizer_name(tokenizer, model.tokenizer, source)), size="nano", objective=model.objective,
                       max_seq_len=fields.pop("max_position_embeddings"), **fields)  # every field of the size is replaced
    built.model.load_state_dict(model.state)
    return built.eval()


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
