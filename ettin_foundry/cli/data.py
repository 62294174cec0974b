"""The commands of `ettin` for datasets: verify, show, finalize, mix; exit code 1 when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Folder or URL of a dataset, or a split.")]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(help="Check every byte of a dataset (folder or URL); all that is wrong is listed.")(verify)
    app.command(help="Show statistics by source, lengths of chunks and decoded samples of a dataset.")(show)
    app.command(help="Make a readable dataset of the finished units of a conversion.")(finalize)
    app.command(help="Build a mixture of datasets by token budgets; it points at their shards.")(mix)


def verify(location: _Dataset, threads: Annotated[
        int | None, typer.Option(min=1, help="Shards read at a time; all cores if left out.")] = None) -> None:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    from ettin_foundry.corpus.verify import verify_dataset

    console = Console(stderr=True)
    with Progress("verify", DownloadColumn(), TransferSpeedColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        report = verify_dataset(location, threads=threads, tick=lambda size: progress.advance(task, size))
    for text in [*(f"problem: {text}" for text in report.problems), *(f"note: {text}" for text in report.notes), report]:
        print(text)
    print("all is as it should be" if report.ok else f"{len(report.problems)} problems")
    raise typer.Exit(int(not report.ok))


def show(location: _Dataset,
         samples: Annotated[int, typer.Option(min=0, help="Decoded chunks of each source and split.")] = 1,
         seed: Annotated[int, typer.Option(min=0, help="Chooses them.")] = 0) -> None:
    from ettin_foundry.data.inspect import show_lines

    for line in show_lines(location, samples=samples, seed=seed):
        print(line)


def finalize(out: Annotated[str, typer.Argument(help="Folder or URL that was converted into.")]) -> None:
    from ettin_foundry.corpus.finalize import finalize as make_dataset

    for split, manifest in make_dataset(out).items():
        totals = manifest["totals"]
        print(f"{split}: {totals['documents']:,} documents, {totals['samples']:,} chunks, {totals['tokens']:,} tokens, "
              f"{len(manifest['shards']):,} shards")


def mix(spec: Annotated[Path, typer.Argument(help="YAML: a phase of sources.yaml, or your own budgets.")],
        out: Annotated[str, typer.Argument(help="Folder to make.")],
        seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the choice in each source.")] = 21) -> None:
    from ettin_foundry.corpus.mix import build_mix

    print("\n".join(build_mix(spec, out, seed=seed)))
