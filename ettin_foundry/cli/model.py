"""The commands of `ettin` for one model: export, push, parity, import, average, generate, fill-mask, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_Source = Annotated[Path, typer.Argument(
    metavar="SOURCE", help="Hugging Face folder, Composer .pt file, or folder of checkpoints.")]
_File = Annotated[Path, typer.Argument(metavar="OUT", help="The .pt file to write.")]
_Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer folder, if the model names none.")]
_Masked = Annotated[Literal["mlm", "mntp"] | None, typer.Option(help="Of the encoder, if the model does not say.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result of this name.")]


def export(
    sources: Annotated[list[Path], typer.Argument(
        metavar="CHECKPOINT", help="Composer .pt file, or folder of checkpoints. With --every, save folders.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    every: Annotated[bool, typer.Option("--every", help="Every checkpoint; whole folders are left.")] = False,
    tokenizer: _Tokenizer = None,
    objective: Annotated[Literal["mlm", "mntp", "clm"] | None, typer.Option(
        help="Another objective that the run was trained on.")] = None,
    licence: Annotated[str | None, typer.Option("--license", "--licence", help="Of the weights, for the card.")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the weights.")] = "fp32",
    onnx: Annotated[bool, typer.Option("--onnx", help="Also model.onnx, checked with onnxruntime.")] = False,
    trunk: Annotated[bool, typer.Option("--trunk", help="An encoder without its head, to make embeddings.")] = False,
    overwrite: _Overwrite = False,
) -> None:
    """Write a Composer checkpoint as a Hugging Face folder.

    With --every, one folder for each checkpoint of save folders, named step1000, ext1000, decay1000.
    vLLM (embeddings), text-embeddings-inference and llama.cpp take the folder that --trunk writes.

    Example: ettin export runs/nano-mlm-pretrain models/nano-encoder
    """
    if len(sources) > 1 and not every:
        raise typer.BadParameter("one checkpoint and the folder to write are needed; several save folders take --every",
                                 param_hint="CHECKPOINT")
    from ettin_foundry.hub.folder import export_checkpoint, export_every

    options: Any = {"objective": objective, "tokenizer": tokenizer, "licence": licence, "dtype": dtype,
                    "onnx": onnx, "trunk": trunk, "overwrite": overwrite}
    if every:
        print(export_every(sources, out, **options))
    else:
        model = export_checkpoint(sources[0], out, **options)
        print(f"wrote {out}: {model.config.num_parameters:,} parameters, {model.objective}")


def parity(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Exported folder, with its head.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each check.")] = False,
) -> None:
    """Compare an exported folder with the transformers installed here.

    Prints the largest difference of each check; exit code 1 when one fails.

    Example: ettin parity models/nano-encoder
    """
    from ettin_foundry.hub.parity import Parity

    failed = False
    for check in Parity(folder).run():
        failed |= not check.ok
        line = f"{'ok' if check.ok else 'FAILED':7}{check.name:20}{check.worst:8.1e} of {check.limit:.1e}  {check.note}"
        print(json.dumps({**check._asdict(), "ok": check.ok}) if as_json else line, flush=True)
    raise typer.Exit(int(failed))


def push(
    sources: Annotated[list[Path], typer.Argument(
        metavar="FOLDER", help="Exported folder. With --every, save folders, or the folder of an export --every.")],
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the Hub; made where there is none.")],
    every: Annotated[bool, typer.Option("--every", help="Every checkpoint, under tags; main is the newest.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go where; needs no network.")] = False,
) -> None:
    """Upload an exported model, or a run, to the Hugging Face Hub.

    Example: ettin push models/nano-encoder --repo me/nano-encoder
    """
    if len(sources) > 1 and not every:
        raise typer.BadParameter("one folder is needed; several save folders take --every", param_hint="FOLDER")
    from ettin_foundry.hub.push import push as upload

    print(upload(sources, repo, every=every, private=private, dry_run=dry_run))


def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Hugging Face folder of Ettin or ModernBERT.")],
    out: _File, objective: _Masked = None, overwrite: _Overwrite = False,
) -> None:
    """Turn a Hugging Face folder into a file of weights.

    A run takes it with load_path=OUT load_weights_only=true.

    Example: ettin import models/nano-encoder nano-encoder.pt
    """
    from ettin_foundry.hub.average import import_weights

    config, stated = import_weights(folder, out, objective=objective, overwrite=overwrite)
    print(f"wrote {out}: {config.num_parameters:,} parameters, {stated}")


def average(
    sources: Annotated[list[Path], typer.Argument(
        metavar="CHECKPOINT", help="Checkpoints of one phase of one recipe, or with --last a save folder.")],
    out: _File,
    last: Annotated[int | None, typer.Option(min=1, help="The K newest complete checkpoints of the folder.")] = None,
    overwrite: _Overwrite = False,
) -> None:
    """Write the mean of the weights of several checkpoints.

    Example: ettin average runs/nano-mlm-pretrain mean.pt --last 5
    """
    if last is not None and len(sources) != 1:
        raise ValueError(f"--last takes one save folder, got {len(sources)} sources")
    from ettin_foundry.hub.average import average_checkpoints

    config, found = average_checkpoints(sources, out, last=last, overwrite=overwrite)
    print(f"wrote {out}: mean of {len(found)} checkpoints ({', '.join(path.name for path in found)}), "
          f"{config.num_parameters:,} parameters")


def generate(source: _Source, prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Text to continue.")],
             max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each continuation.")] = 40,
             temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
             seed: Annotated[int, typer.Option(help="Of the draws above temperature 0.")] = 0,
             tokenizer: _Tokenizer = None) -> None:
    """Continue prompts with a decoder.

    Example: ettin generate models/nano-decoder "def main("
    """
    model = _build(source, tokenizer)
    for prompt, rest in zip(prompts, model.generate(prompts, max_new_tokens, temperature=temperature, seed=seed)):
        print(prompt + rest)


def fill_mask(source: _Source, texts: Annotated[list[str], typer.Argument(metavar="TEXT", help="Text with a [MASK].")],
              top_k: Annotated[int, typer.Option(min=1, help="Tokens to show.")] = 5, tokenizer: _Tokenizer = None,
              objective: _Masked = None) -> None:
    """Fill the first mask token of each text with an encoder.

    Example: ettin fill-mask models/nano-encoder "import [MASK]"
    """
    model = _build(source, tokenizer, objective)
    for text, best in zip(texts, model.fill_mask(texts, top_k)):
        print(text)
        for token, probability in best:
            print(f"  {probability:7.2%}  {token!r}")


def _build(source: Path, tokenizer: str | None, objective: str | None = None) -> Any:
    from ettin_foundry.hub.load import load_model

    loaded = load_model(source, objective)
    return loaded.predictor(loaded.tokenizer(tokenizer))


def evaluate(
    source: _Source,
    data: Annotated[Path, typer.Option(help="Folder of a dataset.")],
    objective: Annotated[list[str] | None, typer.Option(
        help="clm, mlm or mntp; may be repeated. All three if left out.")] = None,
    mask_rate: Annotated[float, typer.Option(help="Of mlm and mntp.")] = 0.15,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Of 16,384 positions; all if left out.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "validation",
    max_seq_len: Annotated[int | None, typer.Option(help="Length of a row; the model's own if left out.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where it runs.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a model's losses on a dataset under any objective.

    Example: ettin evaluate runs/nano-mlm-pretrain --data data/nano
    """
    from ettin_foundry.objectives.schedule import OBJECTIVES
    from ettin_foundry.tools.evaluate import evaluate as measure

    found = measure(source, data, objective or OBJECTIVES, mask_rate=mask_rate, max_batches=max_batches,
                    split=split, max_seq_len=max_seq_len, device=device)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'objective':10} {'loss':>8} {'accuracy':>9} {'perplexity':>11} {'targets':>11}")
    for name, values in found.items():
        print(f"{name:10} {values['loss']:8.4f} {values['accuracy']:9.4f} {values['perplexity']:11.4g} "
              f"{values['targets']:11,.0f}")
