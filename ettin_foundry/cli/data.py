"""The commands of `ettin` for datasets: verify, show, finalize, mix.

Everything heavy is imported inside the command that needs it. Exit codes: 0; 1 when something is wrong with the dataset or
the input; 2 for a wrong command line.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

_TELL_SECONDS = 10.0

_Dataset = Annotated[str, typer.Argument(metavar="DATASET", help="Folder or URL of a dataset, split or mixture.")]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(help="Check every byte of a dataset (folder or URL); all that is wrong is listed.")(verify)
    app.command(help="Show statistics by source, lengths of chunks and decoded samples of a dataset.")(show)
    app.command(help="Make a readable dataset of the finished units of a conversion.")(finalize)
    app.command(help="Build a mixture of datasets by token budgets; it points at their shards.")(mix)


def verify(location: _Dataset, threads: Annotated[int | None, typer.Option(
        min=1, help="Shards read at a time; all cores if left out.")] = None) -> None:
    from ettin_foundry.corpus.verify import verify_dataset

    report = verify_dataset(location, threads=threads, tick=_progress())
    for line in [*(f"problem: {text}" for text in report.problems), *(f"note: {text}" for text in report.notes), report]:
        print(line)
    print("all is as it should be" if report.ok else f"{len(report.problems)} problems")
    if not report.ok:
        raise typer.Exit(1)


def show(location: _Dataset,
         samples: Annotated[int, typer.Option(min=0, help="Decoded chunks of each source and split.")] = 1,
         seed: Annotated[int, typer.Option(min=0, help="Chooses them.")] = 0) -> None:
    from ettin_foundry.data.inspect import show_lines

    for line in show_lines(location, samples=samples, seed=seed):
        print(line)


def finalize(out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL that was converted into.")]) -> None:
    from ettin_foundry.corpus.finalize import finalize as make_dataset

    for split, manifest in make_dataset(out).items():
        totals = manifest["totals"]
        print(f"{split}: {totals['documents']:,} documents, {totals['samples']:,} chunks, {totals['tokens']:,} tokens, "
              f"{len(manifest['shards']):,} shards")


def mix(spec: Annotated[Path, typer.Argument(help="YAML file: a phase of data_prep/sources.yaml, or your own budgets.")],
        out: Annotated[str, typer.Argument(help="Folder to make.")],
        seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Chooses where not all is taken.")] = 21) -> None:
    from ettin_foundry.corpus.mix import build_mix

    print(build_mix(spec, out, seed=seed))


def _progress() -> Callable[[int], None]:
    """A line on stderr every ten seconds, since silence looks like a hang."""
    lock, begin = threading.Lock(), time.monotonic()
    done, told = 0, begin

    def tick(num_bytes: int) -> None:
        nonlocal done, told
        with lock:
            done += num_bytes
            now = time.monotonic()
            if now - told > _TELL_SECONDS:
                told = now
                print(f"verify: {done / 1e6:,.0f} MB read, {done / 1e6 / (now - begin):,.0f} MB/s", file=sys.stderr)

    return tick
