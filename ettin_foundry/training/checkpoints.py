"""Checkpoints without surprises: nothing pickled runs before it was checked, and the newest complete one is found.

mosaicml 0.32.1 unpickles whatever it loads (`torch.load(weights_only=False)`; fixed after its last release), and torch 2.7
does the same with the `.metadata` and the byte entries of sharded checkpoints. `scan_pickle` reads the pickle's opcodes
without executing any (pickle_scan.py) and refuses every global that training does not write; `install_validation` makes
Composer ask it before each load, also of files it downloaded. Reading for our own purposes goes through `load_checkpoint`.

What is not here: saving (Composer's), and Hugging Face folders (hf.py).
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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.torch_version import TorchVersion

from ettin_foundry.training.pickle_scan import ALLOWED_METADATA_GLOBALS, Slice, refuse, scan_archive, scan_opcodes

__all__ = [
    "Head",
    "complete_checkpoints",
    "decode_record",
    "install_validation",
    "is_complete",
    "load_checkpoint",
    "load_model_state",
    "locate",
    "newest_complete",
    "read_head",
    "repair_latest",
    "scan_pickle",
    "validate",
]

log = logging.getLogger(__name__)

_RECONSTRUCT = np.empty(0).__reduce__()[0]


def scan_pickle(path: str | Path) -> None:
    """Refuses a checkpoint whose pickles name anything but the data types of a checkpoint; executes nothing.

    Args:
        path: a Composer `.pt` file, a `.metadata` file, or the folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a global outside the allow-list (the message names it), or a file that is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a .pt file or the folder of a sharded checkpoint")
    if path.is_dir():
        metadata = _read_metadata(path / ".metadata")
        for index, info in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                validate(path / info.relative_path, [(info.offset, info.length)])
    elif path.name == ".metadata":
        _read_metadata(path)
    else:
        validate(path)


def validate(path: str | Path, specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """The same check in the form that Composer calls before it reads a file (CHECKPOINT_VALIDATION_FUNCTION).

    Args:
        path: the file about to be read.
        specs: (offset, length) in bytes of the entries about to be read, for the data files of a sharded checkpoint.

    Returns:
        True. A refusal is an error that says why, where a False would only say "invalid".
    """
    path = Path(path)
    if path.name == ".metadata":
        _read_metadata(path)
        return True
    with path.open("rb") as file:
        for offset, length in specs if specs is not None else [(0, path.stat().st_size)]:
            scan_archive(Slice(file, offset, length), path)
    return True


def install_validation() -> None:
    """Has Composer call `validate` before it loads anything in this process; a user's own function stays in place."""
    ours = f"{__name__}.validate"
    if os.environ.setdefault("CHECKPOINT_VALIDATION_FUNCTION", ours) != ours:
        log.warning("CHECKPOINT_VALIDATION_FUNCTION is %s: checkpoints are checked by that, not by ettin_foundry",
                    os.environ["CHECKPOINT_VALIDATION_FUNCTION"])


def _read_metadata(path: Path) -> Any:
    """torch.distributed.checkpoint's Metadata, unpickled only after the scan; its file names must stay in the folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; a folder without .metadata is no complete sharded checkpoint")
    data = path.read_bytes()
    scan_opcodes(data, path, ALLOWED_METADATA_GLOBALS)
    metadata = pickle.loads(data)
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != str(info.relative_path):
            raise refuse(path, f"it points to {info.relative_path!r}, outside its folder")
    return metadata


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Composer `.pt` file as a dict (`state`, `rng`), on the CPU, tensors mapped from the file rather than read.

    Raises:
        FileNotFoundError, ValueError: as `scan_pickle`.
    """
    scan_pickle(path)
    dtypes = [type(np.dtype(name)) for name in ("uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")]
    allowed: list[Any] = [
        datetime.timedelta, TorchVersion, np.ndarray, np.dtype, codecs.encode, *dtypes,
        (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


@dataclass(frozen=True)
class Head:
    """What a checkpoint says of itself; reading it reads no tensor."""

    path: Path
    record: dict[str, Any]
    """What `clock.Clock` wrote about the run; empty for a run without it."""
    data: dict[str, Any]
    """Place in the training stream and what it is a stream of (`data.RowDataset.state_dict`); empty where not saved."""
    has_moments: bool
    """Whether the optimizer's state is in it."""


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or, of a save folder, the newest complete one in it.

    Raises:
        FileNotFoundError: nothing is there, or a folder without a complete checkpoint.
    """
    path = Path(path)
    if not path.is_dir() or (path / ".metadata").exists():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such checkpoint; give a .pt file or the folder of a sharded checkpoint")
        return path
    newest = newest_complete(path)
    if newest is None:
        raise FileNotFoundError(f"{path}: no complete checkpoint in this folder; give one that holds a .pt file or a "
                                "sharded checkpoint with its .metadata")
    return newest


def read_head(path: str | Path) -> Head:
    """What a checkpoint says of itself, in a moment whatever its size.

    Args:
        path: as for `load_model_state`.

    Raises:
        FileNotFoundError, ValueError: as `load_model_state`, or data files of a sharded checkpoint are missing or cut short.
    """
    path = locate(path)
    if path.is_dir():
        metadata = _read_metadata(path / ".metadata")
        for info in metadata.storage_data.values():
            part = path / info.relative_path
            if not part.is_file() or part.stat().st_size < info.offset + info.length:
                raise ValueError(f"{path}: {part.name} is missing or cut short, so the checkpoint is partial; copy it "
                                 "again, or give an earlier one")
        state = _load_sharded(path, lambda keys: keys[:3] == ("state", "callbacks", "Clock") or keys[1:2] == (
            "dataset_state",)).get("state", {})
        every = [keys[keys[0] == "state":] for keys in (metadata.planner_data or {}).values()]
        has_moments = any(keys[:1] == ("optimizers",) and keys[2:3] == ("state",) for keys in every)
    else:
        state = load_checkpoint(path).get("state", {})
        has_moments = any((optimizer or {}).get("state") for optimizer in (state.get("optimizers") or {}).values())
    return Head(path, decode_record(state.get("callbacks", {}).get("Clock", {})),
                dict((state.get("dataset_state") or {}).get("train") or {}), has_moments)


def load_model_state(path: str | Path, *, ema: bool = False,
                     names: Collection[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights in a Composer checkpoint, and what `clock.Clock` wrote about the run.

    Args:
        path: a `.pt` file, the folder of a sharded checkpoint, or a save folder (then its newest complete checkpoint).
            With torch.distributed started, every rank must call it for a sharded one.
        ema: the averages that the algorithm `ema` kept (ema.py) instead of the weights that were trained.
        names: only these tensors, in our names; the others are not read.

    Returns:
        ({name without the `model.` prefix: tensor on the CPU}, what `Clock.state_dict` names); the second is empty for a
        checkpoint of a run without Clock. With ema, `averaged` in it names the algorithm's settings.

    Raises:
        FileNotFoundError, ValueError: as `scan_pickle`, or there is no model (or average) in the checkpoint.
    """
    path = locate(path)
    if path.is_dir():
        def wanted(keys: tuple[Any, ...]) -> bool:
            if keys[:2] == ("state", "model"):
                return names is None or str(keys[2]).removeprefix("model.") in names
            return keys[:3] == ("state", "callbacks", "Clock")

        state = _load_sharded(path, wanted).get("state", {})
    else:
        state = load_checkpoint(path).get("state", {})
    weights = {name.removeprefix("model."): value for name, value in state.get("model", {}).items()
               if name.startswith("model.")}
    if not weights and names is None:
        raise ValueError(f"{path}: no tensor named model.* in it; a checkpoint that Composer's Trainer saved is needed")
    weights = _trained_or_averaged(path, weights, state, ema)
    record = decode_record(state.get("callbacks", {}).get("Clock", {}))
    if ema:
        record["averaged"] = str(dict(state["algorithms"])["EMA"].get("repr"))
    return weights if names is None else {name: weights[name] for name in names if name in weights}, record


def _trained_or_averaged(path: Path, weights: dict[str, torch.Tensor], state: Mapping[str, Any],
                         ema: bool) -> dict[str, torch.Tensor]:
    """The algorithm's entry says which of the two is in state/model; the other one is in the entry.

    Ours (ema.py) leaves the trained weights in state/model. Composer's own puts the averages there before it saves.
    """
    entry = dict(state.get("algorithms") or ()).get("EMA") or {}
    if ema and not entry.get("ema_started"):
        why = "the run's ema_start had not come yet" if entry else "it has no state of algorithms.ema"
        raise ValueError(f"{path}: holds no averaged weights ({why}). Leave --ema out, or give another checkpoint")
    if entry.get("ema_started") and ema != entry["ema_weights_active"]:
        stored = entry["ema_model"]["named_parameters_dict"]  # under DDP, Composer's own has `module.` before the name
        return {**weights, **{name.removeprefix("module.").removeprefix("model."): t for name, t in stored.items()}}
    return weights


def decode_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Clock's entry, with what stands in it as JSON text read (nested lists would not survive a sharded checkpoint)."""
    texts = [key for key in ("objective_schedule", "tokenizer_fingerprint") if key in record]
    return {**record, **{key: json.loads(record[key]) for key in texts}}


def _load_sharded(folder: Path, wanted: Callable[[tuple[Any, ...]], bool]) -> dict[str, Any]:
    """The entries of a sharded checkpoint whose keys are wanted, as one nested dict."""
    scan_pickle(folder)
    metadata = _read_metadata(folder / ".metadata")
    found: dict[str, Any] = {}
    for name, keys in (metadata.planner_data or {}).items():
        if not wanted(keys):
            continue
        entry = metadata.state_dict_metadata[name]
        place = found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        is_tensor = isinstance(entry, TensorStorageMetadata)
        place[keys[-1]] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder))
    return found


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a zip file's directory and a sharded one's .metadata come last."""
    if path.is_dir():
        return (path / ".metadata").is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def complete_checkpoints(save_folder: str | Path) -> list[Path]:
    """The complete checkpoints of a save folder by batch number (`ba123` in the name), then by time; the newest is last.

    Reads no pickle. Links are not followed: what they point to is looked at under its own name.
    """
    folder = Path(save_folder)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or not (path.suffix == ".pt" or path.is_dir()) or not is_complete(path):
            continue
        batch = re.search(r"ba(\d+)", path.name)
        found.append((int(batch[1]) if batch else -1, path.stat().st_mtime_ns, path))
    return [path for _, _, path in sorted(found)]


def newest_complete(save_folder: str | Path) -> Path | None:
    """The last of `complete_checkpoints`, if there is one."""
    return next(reversed(complete_checkpoints(save_folder)), None)


def repair_latest(save_folder: str | Path, *, latest: str = "latest-rank0.pt") -> Path | None:
    """Points the link that autoresume follows at the newest complete checkpoint, if it leads nowhere.

    Composer removes the link and then makes it anew, and writes checkpoints under their final name: killed in between,
    there is no link, or it leads to half a file, and the run would start over or fail. Deletes nothing but that link.

    Returns:
        The checkpoint that the link leads to now; None when there is none to lead to.

    Raises:
        ValueError: `latest` is a file, not a link, and damaged.
    """
    link = Path(save_folder) / latest
    if link.exists() and is_complete(link):
        return link.resolve()
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link}: a damaged file where a link to the latest checkpoint should be; move it away to resume "
                         "from the newest complete checkpoint")
    newest = newest_complete(save_folder)
    if newest is None:
        return None
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(newest.name)
    os.replace(fresh, link)  # atomic: a kill here leaves the old link or the new one
    log.warning("%s was missing or broken; it leads to %s now, the newest complete checkpoint", link, newest.name)
    return newest
