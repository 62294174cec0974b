"""The commands of `ettin` for data sets: verify, show, finalize, mix. cli.py adds them to the program.

Everything heavy is imported inside the command that needs it. Exit codes: 0, 1 when something is wrong with the set or the
input, 2 for a wrong command line.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated

import typer

__all__ = ["add_commands"]

_TOLD_SECONDS = 10.0

_Set = Annotated[str, typer.Argument(metavar="SET", help="Set made by `ettin convert`, one split of it, or a mixture.")]
_Threads = Annotated[int | None, typer.Option(help="Shards read at a time; all cores if left out.")]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command(help="Check every byte of a set (folder or URL); all that is wrong is listed.")(verify)
    app.command(help="Show statistics by source, lengths of chunks and decoded samples of a set.")(show)
    app.command(help="Make a readable set of the finished units of a conversion.")(finalize)
    app.command(help="Build a mixture of converted sets by token budgets; it points at their shards.")(mix)


def verify(location: _Set, threads: _Threads = None,
           samples: Annotated[bool, typer.Option(help="Print a decoded chunk of each source.")] = True) -> None:
    from ettin_foundry.corpus.show import sample_lines
    from ettin_foundry.corpus.verify import verify_set

    _log_to_stderr()
    report = verify_set(location, threads=threads, tick=_progress("verify"))
    for text in report.problems:
        print(f"problem: {text}")
    for text in report.notes:
        print(f"note: {text}")
    if samples and report.samples:
        print(*sample_lines(report.samples), sep="\n")
    print(report)
    print("all is as it should be" if report.ok else f"{len(report.problems)} problems")
    if not report.ok:
        raise typer.Exit(1)


def show(location: _Set,
         samples: Annotated[int, typer.Option(min=0, help="Decoded chunks of each source and split.")] = 1,
         seed: Annotated[int, typer.Option(min=0, help="Chooses them.")] = 0,
         picture: Annotated[str | None, typer.Option(help="Write the histogram of lengths to this .svg file.")] = None
         ) -> None:
    from ettin_foundry.corpus.show import show_set

    _log_to_stderr()
    for line in show_set(location, samples=samples, seed=seed, picture=picture):
        print(line)


def finalize(out: Annotated[str, typer.Argument(metavar="OUT", help="Folder or URL that was converted into.")]) -> None:
    from ettin_foundry.corpus.finalize import finalize as make_set

    _log_to_stderr()
    for split, manifest in make_set(out).items():
        totals = manifest["totals"]
        print(f"{split}: {totals['documents']:,} documents, {totals['samples']:,} chunks, {totals['tokens']:,} tokens, "
              f"{len(manifest['shards']):,} shards")


def mix(spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file: a phase of data_prep/sources.yaml, or sets and "
                                            "budgets of your own.")],
        out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to make.")],
        seed: Annotated[int, typer.Option(help="Of the choice where a source is not taken whole.")] = 21) -> None:
    from ettin_foundry.corpus.mix import build_mix

    _log_to_stderr()
    print(build_mix(spec, out, seed=seed))


def _progress(title: str) -> Callable[[int], None]:
    """A line on stderr every ten seconds, since silence looks like a hang."""
    lock, begin = threading.Lock(), time.monotonic()
    done, told = 0, begin

    def tick(num_bytes: int) -> None:
        nonlocal done, told
        with lock:
            done += num_bytes
            now = time.monotonic()
            if now - told > _TOLD_SECONDS:
                told = now
                print(f"{title}: {done / 1e6:,.0f} MB read, {done / 1e6 / (now - begin):,.0f} MB/s", file=sys.stderr)

    return tick


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
