"""A folder of an exported model, whole or not there: written beside its place, read back, renamed into it.

What is in such a folder is the work of hf.py (language models) and sentence_export.py (embeddings of texts).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["POOLING", "WEIGHTS", "check_target", "differing_tensors", "new_folder", "write_json"]

WEIGHTS = "model.safetensors"
POOLING = "1_Pooling"
"""The only folder inside one, of sentence-transformers."""


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuses a name that is in use.

    Raises:
        ValueError: a file or link, a folder that is not empty without `overwrite`, or one that is no exported model.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file; the name of a new folder is needed")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder}: exists and is not empty; choose another name, or pass overwrite "
                             "(ettin export --overwrite) to replace it")
        others = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name != POOLING]
        if not (folder / "config.json").is_file() or others:
            raise ValueError(f"{folder}: is not an exported model (it lacks config.json or holds folders), so it is not "
                             "overwritten; choose another name or delete it yourself")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `folder` when the block ends, and gone when it fails.

    An earlier export of that name steps aside first, and goes once the new one stands.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)  # a leftover of a killed process that had our number
    partial.mkdir()
    try:
        yield partial
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(partial: Path, folder: Path) -> None:
    earlier = partial.with_name(partial.name.replace(".partial-", ".earlier-"))
    if folder.exists():
        folder.rename(earlier)
    try:
        partial.rename(folder)
    except OSError:
        if earlier.exists():
            earlier.rename(folder)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def differing_tensors(folder: Path, weights: Mapping[str, Tensor]) -> list[str]:
    """Names under which the folder's file does not hold these fp32 tensors bit by bit, or holds others."""
    from safetensors import safe_open

    path, differing = folder / WEIGHTS, []
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    for name in sorted(names & weights.keys()):
        with safe_open(path, "pt") as file:  # anew for each tensor: pages that were read stay in memory while it is open
            if not torch.equal(weights[name].view(torch.int32), file.get_tensor(name).view(torch.int32)):
                differing.append(name)
    return differing + sorted(names ^ weights.keys())
