"""Checkpoints as revisions: a Hugging Face folder for each checkpoint of a run, named as the original's tags name them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.hub.folder import export_model, write_json
from ettin_foundry.hub.load import chosen_objective, load_model
from ettin_foundry.model.weights import WEIGHTS
from ettin_foundry.training import checkpoints

__all__ = ["export_every", "revision_name"]

_PREFIXES = {"pretrain": "step", "extend": "ext"}


def revision_name(phase: str | None, batch: int) -> str:
    """`step{N}`, `ext{N}`, `decay{N}` as the original's tags; other phases by their own name; `ba{N}` without one."""
    prefix = _PREFIXES.get(phase or "", phase or "")
    return f"{prefix if re.fullmatch('[a-z][a-z_]*', prefix) else 'ba'}{batch}"


@dataclass(frozen=True)
class Revision:
    name: str
    path: Path
    identity: Mapping[str, Any]
    """run_name, phase, batch and run_hash of the checkpoint, and the objective it is exported as."""


def _find_revisions(folders: Sequence[str | Path], objective: str | None) -> list[Revision]:
    """Every complete checkpoint of save folders, in the order of the folders and then of batches, step0 first."""
    found: dict[str, Revision] = {}
    for folder in map(Path, folders):
        initial = folder / "initial" / "step0.pt"
        paths = [*([initial] if checkpoints.is_complete(initial) else []), *checkpoints.complete_checkpoints(folder)]
        if not paths or (folder / ".metadata").exists():
            raise FileNotFoundError(f"{folder}: is no folder of complete checkpoints; --every takes save folders of runs")
        for path in paths:
            record = checkpoints.read_head(path).record
            if not record.get("config") or record.get("batch") is None:
                raise ValueError(f"{path}: holds no record of its phase and batch, so it has no name; export it alone, "
                                 "without --every")
            name = "step0" if path == initial else revision_name(record.get("phase"), record["batch"])
            if name in found:
                raise ValueError(f"{path}: would be called {name}, as would {found[name].path}; export runs of the same "
                                 "phase to different folders")
            identity = {key: record.get(key) for key in ("run_name", "phase", "batch", "run_hash")}
            found[name] = Revision(name, path, {**identity, "objective": chosen_objective(path, record, objective)[0]})
    return list(found.values())


def export_every(folders: Sequence[str | Path], out: str | Path, *, objective: str | None = None,
                 tokenizer: str | None = None, facts: Mapping[str, Any] | None = None, tags: bool = False,
                 overwrite: bool = False) -> str:
    """Writes one folder for each complete checkpoint of save folders; whole folders of the same checkpoint are left.

    Every refusal is made before the first weight is read; then one checkpoint after the other is mapped and written.

    Args:
        folders: save folders of runs. out: where the folders go.
        objective, tokenizer: as for `load.load_model` and `LoadedModel.tokenizer_name`. facts: for every card.
        tags: also write OUT/tags.json: of each revision, in order, tag, objective, tokens and where it comes from.

    Returns:
        One line that says what was done, with seconds for a checkpoint and MB/s.
    """
    from rich.console import Console
    from rich.progress import track

    out = Path(out)
    revisions = _find_revisions(folders, objective)
    wanted = [revision for revision in revisions if overwrite or not _is_there(out / revision.name, revision)]
    num_bytes, start = 0, time.monotonic()
    for revision in track(wanted, "export", console=Console(stderr=True)):
        model = load_model(revision.path, objective)
        export_model(model.state, model.config, model.tokenizer_name(tokenizer), out / revision.name,
                     objective=model.objective, facts={**model.facts, **(facts or {})}, overwrite=overwrite)
        num_bytes += (out / revision.name / WEIGHTS).stat().st_size
    seconds = time.monotonic() - start
    if tags:
        entries = [{"tag": revision.name, "tokens": _block_of(out / revision.name)["tokens"] or 0, **revision.identity}
                   for revision in revisions]
        write_json(out / ".tags.json.partial", {"tags": entries})
        (out / ".tags.json.partial").replace(out / "tags.json")
    line = f"{len(revisions)} revisions in {out}: {len(wanted)} written, {len(revisions) - len(wanted)} were there"
    return line + (f"; {seconds / len(wanted):.2f} s for each, {num_bytes / 1e6 / seconds:,.0f} MB/s" if wanted else "")


def _block_of(folder: Path) -> dict[str, Any]:
    """Our block of an exported config.json; empty if it is none."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["ettin_foundry"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _is_there(folder: Path, revision: Revision) -> bool:
    """Whether a whole folder of this very checkpoint stands there; one of another is refused."""
    from safetensors import SafetensorError, safe_open

    if not folder.exists():
        return False
    block = _block_of(folder)
    there = {**(block.get("checkpoint") or {}), "objective": block.get("objective")}
    for key, value in revision.identity.items():
        if there.get(key) != value:
            raise ValueError(f"{folder}: {key} must be {value!r} as in {revision.path}, got {there.get(key)!r}; give "
                             "another folder, or pass --overwrite to replace it")
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            return True  # opening compares the header with the file's length
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: its {WEIGHTS} is not whole ({error}); pass --overwrite to write it again") from error
