"""Checkpoints of Composer, read: nothing pickled runs before it was checked, and the newest complete one is found.

mosaicml 0.32.1 unpickles whatever it loads (`torch.load(weights_only=False)`). `load_checkpoint` reads with torch's
unpickler of allow-listed types, and `install_validation` makes Composer ask it before each load, also of files it
downloaded: what passes it names no other global, whoever loads it. Sharded checkpoints, pickles of other kinds, are refused.
"""

from __future__ import annotations

import codecs
import datetime
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.torch_version import TorchVersion

log = logging.getLogger(__name__)

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_DATA_TYPES: list[Any] = [
    datetime.timedelta, TorchVersion, np.ndarray, np.dtype, codecs.encode,
    *(type(np.dtype(name)) for name in ("uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct")]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Composer `.pt` file as a dict (`state`, `rng`), on the CPU, tensors mapped from the file rather than read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a global outside the allow-list (the message names it), not a file of torch.save, or a folder.
    """
    path = Path(path)
    if path.name == ".metadata" or (path / ".metadata").exists():
        folder = path.parent if path.name == ".metadata" else path
        raise ValueError(f"{folder}: a sharded checkpoint, which is not read; make one file of it with `python -m "
                         f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt`")
    if (path / "config.json").exists():
        raise ValueError(f"{path}: a Hugging Face folder, not a checkpoint; make one with `ettin import {path} FILE.pt`")
    if path.exists() and not is_complete(path):
        raise ValueError(f"{path}: not a whole archive as torch.save writes it; give another checkpoint")
    try:
        with torch.serialization.safe_globals(_DATA_TYPES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"its pickle asks for {found[1]}" if found else "its pickle is not one of torch.save"
        raise ValueError(f"{path}: {what}; loading it could run code, so only checkpoints of tensors and plain data are "
                         "read. If you trust its origin, write its weights anew, as safetensors") from error


def validate(path: str | Path, specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """`load_checkpoint` as Composer calls it before it reads a file; a refusal is an error, which says more than a False."""
    load_checkpoint(path)
    return True


def install_validation() -> None:
    """Has Composer call `validate` before it loads anything in this process; a user's own function stays in place."""
    ours = f"{__name__}.validate"
    if os.environ.setdefault("CHECKPOINT_VALIDATION_FUNCTION", ours) != ours:
        log.warning("CHECKPOINT_VALIDATION_FUNCTION is %s: checkpoints are checked by that, not by ettin_foundry",
                    os.environ["CHECKPOINT_VALIDATION_FUNCTION"])


class Head(NamedTuple):
    """What a checkpoint says of itself: `Clock.state_dict`, `RowStream.state_dict`, and whether it has the optimizer's."""

    path: Path
    record: dict[str, Any]
    data: dict[str, Any]
    has_moments: bool


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means: a file itself, or, of a save folder, the newest complete one in it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a .pt file or a save folder")
    found = newest_complete(path) if path.is_dir() and not (path / ".metadata").exists() else path
    if found is None:
        raise FileNotFoundError(f"{path}: no complete checkpoint in this folder; give one that holds a .pt file")
    return found


def read_head(path: str | Path) -> Head:
    """What a checkpoint (as for `load_model_state`) says of itself, in a moment whatever its size."""
    path = locate(path)
    state = load_checkpoint(path).get("state", {})
    return Head(path, decode_record(state.get("callbacks", {}).get("Clock", {})),
                dict((state.get("dataset_state") or {}).get("train") or {}),
                any((optimizer or {}).get("state") for optimizer in (state.get("optimizers") or {}).values()))


def load_model_state(path: str | Path, *,
                     names: Collection[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights in a Composer checkpoint, and what `clock.Clock` wrote about the run.

    Args:
        path: a `.pt` file, or a save folder (then its newest complete checkpoint).
        names: only these tensors, in our names.

    Returns:
        ({name without the `model.` prefix: tensor on the CPU}, what `Clock.state_dict` names, or nothing).
    """
    path = locate(path)
    state = load_checkpoint(path).get("state", {})
    weights = {name.removeprefix("model."): value for name, value in state.get("model", {}).items()
               if name.startswith("model.")}
    if not weights:
        raise ValueError(f"{path}: no tensor named model.* in it; give a checkpoint that Composer's Trainer saved")
    record = decode_record(state.get("callbacks", {}).get("Clock", {}))
    return weights if names is None else {name: weights[name] for name in names if name in weights}, record


def decode_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Clock's entry, with what stands in it as JSON text read."""
    texts = [key for key in ("objective_schedule", "tokenizer_fingerprint") if key in record]
    return {**record, **{key: json.loads(record[key]) for key in texts}}


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a zip file's directory comes last."""
    return path.is_file() and zipfile.is_zipfile(path)


def complete_checkpoints(save_folder: str | Path) -> list[Path]:
    """The complete checkpoints of a save folder by batch number (`ba123` in the name), then by time; the newest is last.

    Reads no pickle. Links are not followed: what they point to is looked at under its own name.
    """
    found = []
    for path in Path(save_folder).glob("*.pt"):
        if not path.is_symlink() and is_complete(path):
            batch = re.search(r"ba(\d+)", path.name)
            found.append((int(batch[1]) if batch else -1, path.stat().st_mtime_ns, path))
    return [path for _, _, path in sorted(found)]


def newest_complete(save_folder: str | Path) -> Path | None:
    """The last of `complete_checkpoints`, if there is one."""
    return next(reversed(complete_checkpoints(save_folder)), None)


def repair_latest(save_folder: str | Path, *, latest: str = "latest-rank0.pt") -> None:
    """Points the link that autoresume follows at the newest complete checkpoint, if it leads nowhere.

    Composer removes the link and then makes it anew, and writes checkpoints under their final name: killed in between,
    there is no link, or it leads to half a file, and the run would start over or fail. Deletes nothing but that link.
    """
    link = Path(save_folder) / latest
    if is_complete(link):
        return
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link}: a damaged file where a link to the latest checkpoint should be; move it away to resume "
                         "from the newest complete checkpoint")
    newest = newest_complete(save_folder)
    if newest is not None:
        fresh = link.with_name(f".{link.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(newest.name)
        os.replace(fresh, link)  # atomic: a kill here leaves the old link or the new one
        log.warning("%s was missing or broken; it leads to %s now, the newest complete checkpoint", link, newest.name)
