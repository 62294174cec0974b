"""Checkpoints of Composer in their folders: what they say of themselves, and which is the newest sound one.

The record of a save is the archive's own directory, written last: names, sizes and CRC-32 of its entries. A sharded
checkpoint is an archive an entry, and `.metadata`, written last, says where they are.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.training.loading import load_checkpoint, load_sharded, opened, read_metadata
from ettin_foundry.version import __version__

log = logging.getLogger(__name__)


def _read_state(path: Path, wanted: str) -> tuple[dict[str, Any], bool]:
    """A checkpoint's `state`, of a sharded one the Clock's entry and one part, and whether the moments are there."""
    if not path.is_dir():
        state = load_checkpoint(path).get("state", {})
        return state, any((optimizer or {}).get("state") for optimizer in (state.get("optimizers") or {}).values())
    metadata = read_metadata(path / ".metadata")
    for info in metadata.storage_data.values():
        part = Path(path, info.relative_path)
        if not part.is_file() or part.stat().st_size < info.offset + info.length:
            raise ValueError(f"{path}: {part.name} is missing or cut short; copy it again, or give another checkpoint")
    found: dict[str, Any] = {"state": {}}
    for name, keys in metadata.planner_data.items():
        if keys[0] == "state" and (keys[1] == wanted or keys[1:3] == ("callbacks", "Clock")):
            entry, inner = metadata.state_dict_metadata[name], found
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            is_tensor = type(entry).__name__ == "TensorStorageMetadata"
            inner[keys[-1]] = torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    load_sharded(path, found)
    in_state = (keys[keys[0] == "state":] for keys in metadata.planner_data.values())
    return found["state"], any(keys[0] == "optimizers" and keys[2:3] == ("state",) for keys in in_state)


class Head(NamedTuple):
    """What a checkpoint says of itself: `Clock.state_dict`, `RowStream.state_dict`, whether it has moments."""

    path: Path
    record: dict[str, Any]
    data: dict[str, Any]
    has_moments: bool


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or, of a save folder, the newest complete one in it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such path; give a .pt file, a sharded checkpoint, a save folder or a "
                                "Hugging Face folder")
    if (path / "config.json").exists():
        raise ValueError(f"{path}: a Hugging Face folder, no checkpoint, without optimizer moments; run `ettin import "
                         f"{path} FILE.pt` and give load_path=FILE.pt load_weights_only=true, or use "
                         "callbacks.ettin_cross")
    found = newest_complete(path) if path.is_dir() and not is_complete(path) else path
    if found is None:
        raise FileNotFoundError(f"{path}: no complete checkpoint in this folder; give a save folder that holds one")
    return found


def read_head(path: str | Path) -> Head:
    """What a checkpoint (as for `load_model_state`) says of itself, in a moment whatever its size."""
    path = locate(path)
    with naming(path):
        state, has_moments = _read_state(path, "dataset_state")
        data = (state.get("dataset_state") or {}).get("train") or {}
        return Head(path, decode_record(state.get("callbacks", {}).get("Clock", {})), dict(data), has_moments)


def load_model_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """({our name: tensor on the CPU}, what `Clock.state_dict` wrote about the run) of a Composer checkpoint.

    path: a `.pt` file, a sharded checkpoint (every rank must call this), or a save folder (its newest complete one).
    """
    path = locate(path)
    with naming(path):
        state, _ = _read_state(path, "model")
        weights = {name.removeprefix("model."): value for name, value in state.get("model", {}).items()
                   if name.startswith("model.") and isinstance(value, torch.Tensor)}
        return weights, decode_record(state.get("callbacks", {}).get("Clock", {}))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is read of a model inside: whatever a damaged or foreign one lacks is a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, OSError)) and str(path) in str(error):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise ValueError(f"{path}: cannot be read as a model and its record ({what}); give another") from error


def decode_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Clock's entry, with what stands in it as JSON text read; a ValueError where a newer version wrote it."""
    if newer := set(record.get("config") or ()) - set(EttinConfig.__dataclass_fields__):
        raise ValueError(f"its record holds model.{', model.'.join(sorted(newer))}, unknown to this version "
                         f"({__version__}); install the newer ettin_foundry that wrote it")
    texts = [key for key in ("objective_schedule", "tokenizer_fingerprint") if key in record]
    return {**record, **{key: json.loads(record[key]) for key in texts}}


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a zip file's directory and a sharded one's .metadata come last."""
    with contextlib.suppress(zipfile.BadZipFile):  # of a file that says it spans disks
        return (path / ".metadata").is_file() or path.is_file() and zipfile.is_zipfile(path)
    return False


def complete_checkpoints(save_folder: str | Path, *, others: bool = False) -> list[Path]:
    """The complete checkpoints of a save folder (or `others` with a number, too) by batch (`ba123`), then by time."""
    found = []
    for path in Path(save_folder).glob("[!.]*"):
        if (path.suffix == ".pt" or path.is_dir()) and not path.is_symlink():
            batch = re.search(r"ba(\d+)", path.name)
            if others and batch or is_complete(path):
                found.append((int(batch[1]) if batch else -1, path.stat().st_mtime_ns, path))
    return [path for _, _, path in sorted(found)]


def newest_complete(save_folder: str | Path) -> Path | None:
    """The last of `complete_checkpoints`, if there is one."""
    return next(reversed(complete_checkpoints(save_folder)), None)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, if anything; all of it is read and compared with its CRCs."""
    try:
        infos = read_metadata(path / ".metadata").storage_data.values() if path.is_dir() else ()
        for part, *entry in [(Path(path, info.relative_path), info.offset, info.length) for info in infos] or [(path,)]:
            with opened(part) as file:
                file.seek(entry[0] if entry else 0)
                with zipfile.ZipFile(io.BytesIO(file.read(entry[1])) if entry else file) as archive:
                    if bad := archive.testzip():
                        return f"{bad} in {part.name} is not what was written"
    # the reader refuses flags and versions that it does not know in its own ways
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return str(error) or type(error).__name__
    return None


def move_link(link: Path, name: str) -> None:
    """Makes a link or has it lead elsewhere, at once: who is killed here leaves the old one or the new one."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    os.replace(fresh, link)


def check_folder(save_folder: Path) -> None:
    """Makes the folder; a ValueError where it is none, cannot be written to, or its disk is full."""
    try:
        save_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"save_folder must be a folder to write to, got {str(save_folder)!r}: {error}; make room or "
                         "give another (variables.save_root=...)") from error


def repair_latest(save_folder: str | Path) -> Path | None:
    """Points the link that autoresume follows at the newest sound checkpoint; returns that one.

    Composer, killed before or between removing and making it, leaves an old one or none. What is damaged or was cut off
    is named, passed over and stays where it is; a ValueError if all is (but first sharded saves), for the run would
    begin again.
    """
    rank, found = os.environ.get("RANK", "0"), complete_checkpoints(os.path.realpath(save_folder), others=True)
    lost = any(path.is_file() or is_complete(path) for path in found)
    while found and (what := damage(found[-1])):
        log.log(logging.WARNING if rank == "0" else logging.DEBUG, "%s is passed over and kept: %s", found.pop(), what)
    if not found and lost:
        raise ValueError(f"save_folder: no checkpoint in {save_folder} is sound; move them away to begin again")
    if not found:
        return None
    newest = found[-1]
    link = Path(save_folder) / (f"latest-sharded-rank{rank}" if newest.is_dir() else "latest-rank0.pt")
    # links in a circle resolve to one of them; a file is there where links were copied
    leads = os.path.realpath(link) == str(newest) if link.is_symlink() else is_complete(link)
    if not leads and (newest.is_dir() or rank == "0"):
        if link.exists() and not link.is_symlink():
            raise ValueError(f"{link}: a damaged file, not a link; move it away to resume from the newest checkpoint")
        move_link(link, newest.name)
        log.warning("%s led elsewhere or nowhere; it leads to %s now, the newest checkpoint", link, newest.name)
    return newest
