"""The command `ettin order`: the documents of any step of a run, and the order as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ettin_foundry.data.stream import RowStream

__all__ = ["add_commands"]

_CHARACTERS = 60  # of a decoded chunk that are shown


def add_commands(app: typer.Typer) -> None:
    app.command(help="Show the documents that a step of a run reads, or write its order as Parquet.")(order)


def order(
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[DATASET] [KEY=VALUE]...", help="If not the recipe's; keys as for train.py.")] = None,
    yaml: Annotated[list[str] | None, typer.Option(
        help="The recipe and its overlays, joined by + or one at a time.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(
        help="In place of a recipe: a checkpoint or save folder, and the step that follows it.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Counted from 0, as in steps.jsonl.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows whose documents are printed.")] = 8,
    decode: Annotated[bool, typer.Option("--decode", help="Print how each chunk begins.")] = False,
    export: Annotated[Path | None, typer.Option(
        help="Folder to write the order into, in the format of jhu-clsp/ettin-data-order.")] = None,
    first: Annotated[int, typer.Option("--from", min=0, help="First step of the export.")] = 0,
    last: Annotated[int | None, typer.Option("--to", min=0, help="First step that is not exported.")] = None,
) -> None:
    from rich.console import Console
    from rich.progress import track

    from ettin_foundry.tools.order import export_order, next_step, steps_of_run, stream_of
    from ettin_foundry.training.recipes import resolved

    places, overrides = ([a for a in arguments or [] if ("=" in a) is key] for key in (False, True))
    for wrong, message in (
            ((yaml is None) == (checkpoint is None), "either --yaml or --checkpoint must be given"),
            (checkpoint and overrides, f"--checkpoint must come without keys, got {' '.join(overrides)}"),
            (len(places) > 1, f"DATASET must be one place, got {' '.join(places)}; recipes belong to --yaml"),
            (export is None and (first or last is not None), "--from and --to must come with --export"),
            (export and step is not None, "--export must come with --from and --to instead of --step"),
            (yaml and export is None and step is None, "--step or --export must be given with --yaml")):
        if wrong:
            raise ValueError(message)
    location, following = places[0] if places else None, 0
    if checkpoint is not None:
        cfg, stream, following = next_step(checkpoint, location)
    else:
        cfg = resolved([*(path for paths in yaml or [] for path in paths.split("+")), *overrides])
        stream = stream_of(cfg, location)
    if export is None:
        _show(cfg, stream, following if step is None else step, rows, decode)
        return
    steps, console = steps_of_run(cfg, stream, first, last), Console(stderr=True)
    for _ in track(export_order(cfg, stream, export, steps), "steps", len(steps), console=console,
                   disable=not console.is_terminal):
        pass
    files = sum(1 for _ in export.rglob("*.parquet"))
    print(f"{export} holds the order of {cfg.get('run_name') or 'the run'} in {files:,} files")


def _show(cfg: dict[str, Any], stream: RowStream, step: int, rows: int, decode: bool) -> None:
    from ettin_foundry.data.inspect import load_decoder, plain
    from ettin_foundry.data.packing import SPECIALS_PER_PIECE
    from ettin_foundry.data.storage import open_storage
    from ettin_foundry.tools.order import view_step
    from ettin_foundry.training.run_config import parse_time

    folder = stream.data.local.parent
    decoder = load_decoder(open_storage(str(folder))) if decode else None
    if decode and decoder is None:
        raise ValueError(f"--decode needs the tokenizer/ of the dataset, got {folder} without one")
    view = view_step(stream, step, rows=rows)
    head = view.rows[0]
    print(f"step {step:,} of {cfg.get('run_name') or 'the run'}: {len(view.rows):,} rows, "
          f"{view.num_tokens:,} tokens, {head.tokens_before:,} before it, in epoch {head.epoch}; ids_hash "
          f"{view.ids_hash:012x}")
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    if (head.tokens_before if unit == "tok" else step) >= amount:
        print(f"the run ends before it: max_duration is {cfg['max_duration']}")
    if rows:
        print(f"{'row':>6} {'tokens':>7}  source, document (part)")
    for row, stored in zip(view.rows, view.samples):
        for chunk, sample in zip(row.chunks, stored):
            part = f"part {sample['part']}" + (", the last" if sample["last"] else "")
            source, doc = plain(sample["source"], 60), plain(sample["doc"], 200)
            print(f"{row.place:>6,} {len(chunk) + SPECIALS_PER_PIECE:>7,}  {source}  {doc} ({part})")
            if decoder is not None:
                print(" " * 16 + plain(decoder.decode(chunk[:_CHARACTERS].tolist()), _CHARACTERS))
    if len(view.samples) < len(view.rows):
        print(f"and {len(view.rows) - len(view.samples):,} rows more (--rows)")
