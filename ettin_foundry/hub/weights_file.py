"""A file of weights alone, in the host's layout: written beside its place, read back, renamed into it.

Its content is made by `hf.weights_checkpoint`. What reads such files tensor by tensor goes over them in stretches, since
pages of a mapped file stay in memory until the file is let go.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ettin_foundry.training.checkpoints import load_model_state

__all__ = ["check_weights_file", "save_weights", "stretches"]

_SHARE, _LEAST = 8, 64 << 20


def check_weights_file(out: Path, overwrite: bool) -> None:
    """Refuses a name that the host would not load, or that is in use.

    Raises:
        ValueError: it does not end in .pt, or exists without `overwrite`.
    """
    if out.suffix != ".pt":
        raise ValueError(f"{out}: the name of the file to write must end in .pt, as the host expects of checkpoints")
    if out.is_dir() or (out.exists() and not overwrite):
        raise ValueError(f"{out}: exists; choose another name, or pass --overwrite to replace it")


def stretches(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in their order, in lists of about an eighth of the whole.

    Args:
        sizes: bytes of each tensor.
    """
    most = max(_LEAST, sum(sizes.values()) // _SHARE)
    found: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if found[-1] and filled + size > most:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += size
    return found


def save_weights(out: Path, content: Mapping[str, Any]) -> None:
    """Writes what `hf.weights_checkpoint` made.

    Raises:
        ValueError: what was written does not read back the same; then nothing is left of it.
    """
    weights = {name.removeprefix("model."): tensor for name, tensor in content["state"]["model"].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.partial-{os.getpid()}.pt")
    try:
        torch.save(dict(content), partial)
        for names in stretches({name: tensor.nbytes for name, tensor in weights.items()}):
            stored, _ = load_model_state(partial, names=names)
            if any(name not in stored or not torch.equal(stored[name], weights[name]) for name in names):
                raise ValueError(f"{out}: what was written does not read back the same. Check the disk, then try again")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
