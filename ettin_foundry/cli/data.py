"""The commands of `ettin` for datasets: convert, verify, show, mix, finalize."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Folder or URL of a dataset, or a split.")]


def _help(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, **limits)


def convert(
    sources: Annotated[list[str], typer.Argument(
        metavar="SOURCE", help="A .jsonl, .json, .txt (plain, .gz, .zst) or .parquet file, a folder or URL of them, a "
        "Hugging Face dataset id (owner/name[:config]), or python-stdlib. NAME=SOURCE names it in the manifest.")],
    out: Annotated[str, _help("Folder or URL of the dataset: new, or one where this was begun.")],
    tokenizer: Annotated[str | None, _help("Folder or Hugging Face id.")] = None,
    train_tokenizer: Annotated[int | None, _help("Entries of one to train on the corpus instead, e.g. 8192.")] = None,
    chunk_length: Annotated[int, _help("Most tokens in a chunk: row length of training minus 2.")] = 1022,
    cut_window: Annotated[float, _help("Share of a chunk in which to look for a paragraph or sentence end.")] = 0.01,
    validation: Annotated[float, _help("Share of the documents for validation, by a hash of the text.")] = 0.005,
    text_field: Annotated[str, _help("Key or column of the text.")] = "text",
    id_field: Annotated[str | None, _help("Key or column of a document's id.")] = None,
    max_document_bytes: Annotated[str, _help("Drop larger documents.")] = "256mb",
    max_bad_records: Annotated[int, _help("Drop up to so many records that cannot be read.")] = 1000,
    shard_size: Annotated[str, _help("Bytes per shard.")] = "64mb",
    unit_size: Annotated[str, _help("Input bytes per unit of work.")] = "256mb",
    compression: Annotated[Literal["zstd"] | None, _help("Of shards; plain if left out.")] = None,
    seed: Annotated[int, _help("Of the validation split.", min=0, max=2**63 - 1)] = 0,
    licence: Annotated[str | None, _help("Of files, for the manifest.", "--licence", "--license")] = None,
    append: Annotated[bool, _help("Add these sources to a finished dataset.", "--append")] = False,
    workers: Annotated[int | None, _help("Processes; all cores if left out.", min=1)] = None,
    engine: Annotated[Literal["auto", "fast", "tokenizers"], _help(
        "What tokenizes; auto: fast where its ids are the same.")] = "auto",
    task_index: Annotated[int | None, _help("Number of this task in a job array, from 0.")] = None,
    num_tasks: Annotated[int | None, _help("Tasks of the job array.")] = None,
    min_characters: Annotated[int | None, _help("Drop shorter documents.")] = None,
    max_characters: Annotated[int | None, _help("Drop longer documents.", min=1)] = None,
) -> None:
    """Turn text into a dataset.

    A dataset is MDS shards with a manifest. Interrupted, the same command goes on where it was. The result is the same
    whatever the workers and machines.

    Example: ettin convert texts/ --out data/mine --train-tokenizer 8192
    """
    given = locals()
    from ettin_foundry.corpus.convert import ConvertOptions
    from ettin_foundry.corpus.convert import convert as make_dataset
    from ettin_foundry.corpus.finalize import sole_writer
    from ettin_foundry.data.inspect import show_text

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with sole_writer(out, shared=task_index is not None):
            manifests, (done, units) = make_dataset(ConvertOptions(**given))
    except KeyboardInterrupt:
        print("interrupted: finished units are kept; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"{out}: {done} of {units} units done by this call")
    print(show_text(out, samples=0) if manifests else f"after all tasks: ettin finalize {out}")


def verify(dataset: _Dataset, threads: Annotated[
        int | None, typer.Option(min=1, help="Shards read at a time; all cores if left out.")] = None) -> None:
    """Check every byte of a dataset, and list all that is wrong.

    The exit code is 1 when something is wrong.

    Example: ettin verify data/mine
    """
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    from ettin_foundry.corpus.verify import verify_dataset

    console = Console(stderr=True)
    with Progress("verify", DownloadColumn(), TransferSpeedColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        report = verify_dataset(dataset, threads=threads, tick=lambda size: progress.advance(task, size))
    lines = [f"problem: {text}" for text in report.problems] + [f"note: {text}" for text in report.notes]
    print(*lines, report, sep="\n")
    print("all is as it should be" if report.ok else f"{len(report.problems)} problems")
    raise typer.Exit(int(not report.ok))


def show(dataset: _Dataset,
         samples: Annotated[int, typer.Option(min=0, help="Decoded chunks of each source and split.")] = 1,
         seed: Annotated[int, typer.Option(min=0, help="Chooses them.")] = 0) -> None:
    """Show sources, lengths of chunks and decoded samples of a dataset.

    Example: ettin show data/mine --samples 3
    """
    from ettin_foundry.data.inspect import show_text

    print(show_text(dataset, samples=samples, seed=seed))


def mix(spec: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML: a phase of sources.yaml, or own budgets.")],
        out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")],
        seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the choice in each source.")] = 21) -> None:
    """Make a mixture of datasets by token budgets.

    It points at the datasets' shards; nothing is copied.

    Example: ettin mix decay.yaml data/decay
    """
    from ettin_foundry.corpus.mix import build_mix

    print("\n".join(build_mix(spec, out, seed=seed)))


def finalize(out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL that was converted into.")]) -> None:
    """Make a dataset of the finished units of a conversion.

    Example: ettin finalize data/mine
    """
    from ettin_foundry.corpus.finalize import finalize as make_dataset
    from ettin_foundry.corpus.finalize import sole_writer
    from ettin_foundry.data.inspect import show_text

    with sole_writer(out):
        make_dataset(out)
    print(show_text(out, samples=0))
