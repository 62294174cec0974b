"""The command `ettin`: convert text, run the demo, move models to and from Hugging Face, try them on a prompt.

Commands for data sets are in cli_data.py. Training is not here: it is the host's `composer train.py` or `llmfoundry
train`. Everything heavy is imported inside the command that needs it, so that `ettin --help` answers at once. Bad input
ends with one line on stderr and exit code 1.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ettin_foundry import cli_data, cli_lint, cli_plan, cli_suite
from ettin_foundry.config import CONTRASTIVE

__all__ = ["app", "main"]

app = typer.Typer(name="ettin", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="Ettin encoders and decoders: data in, Hugging Face folders out and in.")

# what a checkpoint without a record of its config must be told; a rotary base is never guessed
_NEEDED = ("max_position_embeddings", "global_rope_theta", "local_rope_theta")

Source = Annotated[Path, typer.Argument(help="Hugging Face folder, Composer .pt file, or folder of checkpoints.")]
TokenizerOption = Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer folder, if the model names none.")]
ObjectiveOption = Annotated[str | None, typer.Option("--objective", help="mlm, mntp or clm, if the model does not say.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of this name.")]


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
             help="Turn text into MDS shards (the same program as data_prep/convert.py; see its --help).")
def convert(context: typer.Context) -> None:
    from ettin_foundry.convert import main as convert_main

    raise typer.Exit(convert_main(context.args))


@app.command(help="Train a nano encoder and decoder, cross both, export all four. Run it in a clone of the repository.")
def demo(out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
         short: Annotated[bool, typer.Option("--short", help="A tenth of the work.")] = False,
         recipes: Annotated[Path, typer.Option(help="Folder with nano.yaml and phases/.")] = Path("yamls")) -> None:
    from ettin_foundry.demo import run_demo

    run_demo(out, short=short, recipes=recipes)


@app.command(help="Write a Composer checkpoint as a Hugging Face folder.")
def export(checkpoint: Annotated[Path, typer.Argument(help="Composer .pt file, or folder of checkpoints.")],
           out: Annotated[Path, typer.Argument(help="Folder to write.")],
           tokenizer: TokenizerOption = None, objective: ObjectiveOption = None,
           size: Annotated[str | None, typer.Option(help="nano to 1b, if the checkpoint does not say.")] = None,
           field: Annotated[list[str] | None, typer.Option(help="name=value of the config, if the checkpoint does not say; "
                                                                "may be repeated.")] = None,
           licence: Annotated[str | None, typer.Option("--license", help="The weights' licence, for the card.")] = None,
           sentence_transformers: Annotated[bool, typer.Option("--sentence-transformers", help="Write a sentence-transformers "
                                            "folder instead: the trunk and its pooling, no head.")] = False,
           overwrite: Overwrite = False) -> None:
    from ettin_foundry.hf import export_model

    _log_to_stderr()
    model = _read_checkpoint(checkpoint, size=size, objective=objective, fields=field or [])
    lineage = list(model.lineage)
    tokens = model.tokens + sum(entry.get("tokens") or 0 for entry in lineage)
    facts = {"tokens": tokens or None, "lineage": lineage, "license": licence}
    name = _tokenizer_name(tokenizer, model.tokenizer, checkpoint)
    if sentence_transformers:
        from ettin_foundry.sentence_export import export_sentence_model

        folder = export_sentence_model(model.state, model.config, name, out, objective=model.objective,
                                       pooling=model.pooling, facts=facts, overwrite=overwrite)
    elif model.objective == CONTRASTIVE:
        raise ValueError(f"{checkpoint}: is of the contrastive stage ({CONTRASTIVE}), after which the prediction head no longer "
                         "fits its trunk; pass --sentence-transformers, or a checkpoint from before")
    else:
        folder = export_model(model.state, model.config, name, out, objective=model.objective, facts=facts,
                              overwrite=overwrite)
    print(f"wrote {folder}: {model.config.num_parameters:,} parameters, {model.objective}")


@app.command("import", help="Turn a Hugging Face folder into a weights file for load_path (with load_weights_only).")
def import_(folder: Annotated[Path, typer.Argument(help="Hugging Face folder of an Ettin or ModernBERT model.")],
            out: Annotated[Path, typer.Argument(help="The .pt file to write.")],
            objective: ObjectiveOption = None, overwrite: Overwrite = False) -> None:
    import torch

    from ettin_foundry.checkpoint import load_model_state
    from ettin_foundry.hf import weights_checkpoint

    _log_to_stderr()
    if out.suffix != ".pt":
        raise ValueError(f"{out}: the name of the file to write must end in .pt, as the host expects of checkpoints")
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: exists; choose another name, or pass --overwrite to replace it")
    model = _read_folder(folder, objective)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.partial-{os.getpid()}.pt")
    try:
        torch.save(weights_checkpoint(model.state, model.config, objective=model.objective, tokenizer=model.tokenizer),
                   partial)
        stored, _ = load_model_state(partial)
        if stored.keys() != model.state.keys() or any(not torch.equal(stored[n], t) for n, t in model.state.items()):
            raise ValueError(f"{out}: what was written does not read back the same. Check the disk, then import again")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
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


@dataclasses.dataclass
class _Model:
    state: dict[str, Any]
    config: Any
    objective: str
    tokenizer: str | None
    tokens: int = 0
    lineage: Sequence[dict[str, Any]] = ()
    pooling: str = "mean"


def _read_folder(folder: Path, objective: str | None) -> _Model:
    from ettin_foundry.hf import import_folder

    state, config, stated = import_folder(folder)
    if stated is None and objective not in ("mlm", "mntp"):
        raise ValueError(f"--objective: {objective!r} given, and {folder / 'config.json'} does not say how this encoder "
                         "predicts; mlm and mntp are possible. Official Ettin encoders are mlm, those made from decoders "
                         "(ettin-enc-from-dec) mntp")
    if stated and objective not in (None, stated):
        raise ValueError(f"--objective: {objective!r} given, but {folder / 'config.json'} says {stated!r}; leave it out")
    tokenizer = str(folder) if (folder / "tokenizer.json").is_file() else None
    return _Model(state, config, stated or str(objective), tokenizer)


def _read_checkpoint(path: Path, *, size: str | None = None, objective: str | None = None,
                     fields: Sequence[str] = ()) -> _Model:
    """A Composer checkpoint and its config: from the checkpoint itself, or else from the options."""
    from ettin_foundry.checkpoint import load_model_state
    from ettin_foundry.config import EttinConfig

    state, record = load_model_state(path)
    if record:
        given = [name for name, value in (("--size", size), ("--objective", objective), ("--field", fields)) if value]
        if given:
            raise ValueError(f"{', '.join(given)}: given, but {path} carries its own config, which is used; leave it out")
        return _Model(state, EttinConfig(**record["config"]), record["objective"], record.get("tokenizer"),
                      int(record.get("tokens") or 0), tuple(record.get("lineage") or ()), _pooling(record))
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


def _pooling(record: dict[str, Any]) -> str:
    """That of the contrastive stage; other trunks are given the mean."""
    return json.loads(record.get("run_config") or "{}").get("model", {}).get("pooling", "mean")


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
    from ettin_foundry.composer_model import EttinModel
    from ettin_foundry.tokenizer import load

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


def main(argv: Sequence[str] | None = None) -> None:
    """The console script; ends the process with 0, 1 for bad input, 2 for a wrong command line."""
    try:
        app(args=None if argv is None else list(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
