"""The command `ettin merge`. cli.py adds it to the program; the work is in merge.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_commands"]


def add_commands(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command(help="Write the mean of the weights of several checkpoints: ettin merge A.pt B.pt OUT.pt, or "
                     "ettin merge SAVE_FOLDER OUT.pt --last 5.")(merge)


def merge(paths: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT... OUT.pt", help="Checkpoints of one phase of one "
                                                      "recipe, or with --last a save folder; last, the file to write.")],
          last: Annotated[int | None, typer.Option(min=1, help="The K newest complete checkpoints of the folder.")] = None,
          weights: Annotated[str | None, typer.Option(help="One number above 0 for each checkpoint, such as 1,1,2; they "
                                                      "need not sum to 1.")] = None,
          overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier file of this name.")] = False
          ) -> None:
    *sources, out = paths
    if not sources:
        raise typer.BadParameter("checkpoints and the file to write are needed", param_hint="CHECKPOINT... OUT.pt")
    if last is not None and len(sources) != 1:
        raise ValueError(f"--last: {last} given with {len(sources)} sources; it takes one save folder. Name either")
    from ettin_foundry.hub.average import average_checkpoints, last_checkpoints

    if last is not None:
        sources = last_checkpoints(sources[0], last)
    config, objective = average_checkpoints(sources, out, weights=None if weights is None else _numbers(weights),
                                          overwrite=overwrite)
    print(f"wrote {out}: mean of {len(sources)} checkpoints ({', '.join(path.name for path in sources)}), "
          f"{config.num_parameters:,} parameters, {objective}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--weights: {text!r} given; numbers with commas between them are needed, such as 1,1,2") from None
