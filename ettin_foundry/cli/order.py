"""The command `ettin order`: the documents of any step of a run, and the order as files. cli.py adds it to the program.

Everything heavy is imported inside the command; neither torch nor the host is, unless a checkpoint is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ettin_foundry.data.stream import RowStream
    from ettin_foundry.tools.order import StepView

__all__ = ["add_commands"]

_WORDS = 60  # characters of a decoded chunk that are shown


def add_commands(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command(help="Show the documents that a step of a run reads, or write the order of a run into Parquet files.")(order)


def order(arguments: Annotated[list[str] | None, typer.Argument(metavar="[SET] [KEY=VALUE]...", help="The set, if not where "
                                                                "the recipe has it; keys as for train.py.")] = None,
          yaml: Annotated[list[str] | None, typer.Option(help="The run's recipe and its overlays, joined by + or one at a "
                                                         "time.")] = None,
          checkpoint: Annotated[Path | None, typer.Option(help="In place of a recipe: a checkpoint or save folder; the step "
                                                          "is the one that a resumed run does next.")] = None,
          step: Annotated[int | None, typer.Option(min=0, help="Counted from 0, as in steps.jsonl.")] = None,
          rows: Annotated[int, typer.Option(min=0, help="Rows whose documents are printed.")] = 8,
          decode: Annotated[bool, typer.Option("--decode", help="Print how each chunk begins.")] = False,
          export: Annotated[Path | None, typer.Option(help="Folder to write the run's order into, in the format of "
                                                      "jhu-clsp/ettin-data-order.")] = None,
          first: Annotated[int, typer.Option("--from", min=0, help="First step of the export.")] = 0,
          last: Annotated[int | None, typer.Option("--to", min=0, help="First step that is not exported; the run's end if "
                                                   "left out.")] = None) -> None:
    from ettin_foundry.tools.order import view_step

    _check_options(yaml, checkpoint, step, export, first, last)
    cfg, stream, following = _open(arguments or [], yaml or [], checkpoint)
    if export is not None:
        _export(cfg, stream, export, first, last)
        return
    number = following if step is None else step
    view = view_step(stream, number, rows=rows)
    for line in _lines(cfg, stream, view, decode):
        print(line)


def _check_options(yaml: Any, checkpoint: Any, step: Any, export: Any, first: int, last: Any) -> None:
    if (yaml is None) == (checkpoint is None):
        raise ValueError(f"--yaml, --checkpoint: {'both' if yaml else 'neither'} given; a recipe or a checkpoint "
                         "names the run. Give one of the two")
    if export is None and (first or last is not None):
        raise ValueError(f"--from, --to: {first} and {last} given without --export, whose steps they are. Add it, or give "
                         "--step instead")
    if export is not None and step is not None:
        raise ValueError(f"--step: {step} given with --export, which writes --from to --to. Leave one of them out")
    if export is None and step is None and checkpoint is None:
        raise ValueError("--step: not given; with a recipe it is needed, or --export. Give one of the two")


def _open(arguments: list[str], yaml: list[str], checkpoint: Path | None) -> tuple[dict[str, Any], RowStream, int]:
    """(config, stream, next step) of the run that the command line names."""
    from ettin_foundry.tools.order import next_step, stream_of
    from ettin_foundry.training.recipes import resolved

    places, overrides = [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]
    if len(places) > 1:
        raise ValueError(f"SET: {', '.join(places)} given; one set is possible. Recipes belong to --yaml")
    location = places[0] if places else None
    if checkpoint is not None:
        if overrides:
            raise ValueError(f"{overrides[0]}: given with --checkpoint, which carries its run's config. Leave it out")
        return next_step(checkpoint, location)
    cfg = resolved([*(path for paths in yaml for path in paths.split("+")), *overrides])
    return cfg, stream_of(cfg, location), 0


def _lines(cfg: dict[str, Any], stream: RowStream, view: StepView, decode: bool) -> list[str]:
    from ettin_foundry.data.inspect import load_decoder, plain
    from ettin_foundry.data.storage import open_storage
    from ettin_foundry.tools.order import is_past_end

    lines = [f"step {view.step:,} of {cfg.get('run_name') or 'the run'}: {view.rows:,} rows, {view.tokens:,} tokens, "
             f"{view.tokens_before:,} before it, in epoch {view.epoch}; ids_hash {view.ids_hash:012x}"]
    if is_past_end(cfg, view):
        lines.append(f"the run ends before it: max_duration is {cfg['max_duration']}")
    if view.pieces:
        lines.append(f"{'row':>6} {'tokens':>7}  source, document (part)")
    decoder = load_decoder(open_storage(str(stream.data.local.parent))) if decode else None
    if decode and decoder is None:
        raise ValueError(f"--decode: {stream.data.local.parent} has no tokenizer/ to decode with. Leave it out, or put the "
                         "set's own there")
    for piece in view.pieces:
        part = f"part {piece.part}" + (", the last" if piece.last else "")
        lines.append(f"{piece.row:>6,} {piece.tokens:>7,}  {plain(piece.source, 60)}  {plain(piece.doc, 200)} ({part})")
        if decoder is not None:
            lines.append(" " * 16 + plain(decoder.decode(piece.chunk[:_WORDS].tolist()), _WORDS))
    shown = len({piece.row for piece in view.pieces})
    if shown < view.rows:
        lines.append(f"and {view.rows - shown:,} rows more (--rows)")
    return lines


def _export(cfg: dict[str, Any], stream: RowStream, out: Path, first: int, last: int | None) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from ettin_foundry.tools.order_export import export_order

    console = Console(stderr=True)
    with Progress("steps", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
                  disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        files, written = export_order(cfg, stream, out, first=first, last=last,
                                      tick=lambda done, total: progress.update(task, completed=done, total=total))
    kept = f", {files - written:,} of them as they were" if written < files else ""
    print(f"{out} holds the order of {cfg.get('run_name') or 'the run'}: {files:,} files{kept}")
