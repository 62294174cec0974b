"""Checkpoints as revisions: a Hugging Face folder for each checkpoint of a run, named as the original's tags name them.

Also what an export takes from a checkpoint's record: objective, shape and facts. Every record is read, and every refusal
made, before the first weight is; then one checkpoint after the other is mapped, written and read back tensor by tensor, so
that the memory is that of one model's weights in fp32. The optimizer's part of a file is not read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.hub.folder import WEIGHTS, write_json
from ettin_foundry.model.config import CONTRASTIVE, EttinConfig
from ettin_foundry.objectives.schedule import ObjectiveSchedule

__all__ = ["TAGS", "Revision", "chosen_objective", "export_every", "facts_of", "find_revisions", "revision_name"]

log = logging.getLogger(__name__)

TAGS = "tags.json"
_PREFIXES = {"pretrain": "step", "extend": "ext"}
_IDENTITY = ("run_name", "phase", "batch", "run_hash")


def revision_name(phase: str | None, batch: int) -> str:
    """`step{N}`, `ext{N}`, `decay{N}` as the original's tags; other phases by their own name; `ba{N}` without one."""
    prefix = _PREFIXES.get(phase or "", phase or "")
    return f"{prefix if re.fullmatch('[a-z][a-z_]*', prefix) else 'ba'}{batch}"


# ------------------------------------------------------------------ what a record says


def chosen_objective(path: str | Path, record: Mapping[str, Any], asked: str | None) -> tuple[str, EttinConfig]:
    """What a checkpoint is exported as: what its run ends with, or another objective that it has been trained on.

    A run of several objectives has one set of weights; an export of another kind has that kind's window.

    Args:
        path: for messages. record: as `clock.Clock` wrote it. asked: an objective, or None.

    Raises:
        ValueError: the weights were not trained on what was asked for.
    """
    config, final = EttinConfig(**record["config"]), record["objective"]
    if asked is None:
        return final, config
    schedule, trained = _trained(record)
    if schedule is None or schedule.is_single:
        raise ValueError(f"--objective: {asked!r} given, but {path} carries its own config and was trained on {final} only. "
                         "Leave it out")
    if asked not in trained:
        raise ValueError(f"--objective: {asked!r} given, but {path} was trained on {', '.join(trained) or 'nothing'} in its "
                         f"{int(record['tokens']):,} tokens (the run: {schedule}). Choose one of those")
    changed = config.of_kind(causal=asked == "clm")
    if changed.causal and not config.causal:  # an explicit window belongs to rows of clm
        explicit = json.loads(record.get("run_config") or "{}").get("model", {}).get("window_left", -1)
        changed = dataclasses.replace(changed, window_left=explicit)
    return asked, changed


def _trained(record: Mapping[str, Any]) -> tuple[ObjectiveSchedule | None, list[str]]:
    """The run's objectives, and those that its tokens so far had; (None, []) of the contrastive stage."""
    plain = record.get("objective_schedule")
    plain = record["objective"] if plain is None else plain
    if plain == CONTRASTIVE:
        return None, []
    schedule = ObjectiveSchedule.parse(plain)
    joints = schedule.joints(int(record.get("tokens") or 0))
    return schedule, list(dict.fromkeys(name for joint in joints for name in schedule.at(joint)))


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What card and config.json can be told from a record (see `card.FACTS`)."""
    lineage = [dict(entry) for entry in record.get("lineage") or ()]
    tokens = int(record.get("tokens") or 0) + sum(entry.get("tokens") or 0 for entry in lineage)
    facts: dict[str, Any] = {"tokens": tokens or None, "phase": record.get("phase")}
    if record.get("averaged"):
        lineage.append({"averaged": record["averaged"]})
    schedule, trained = _trained(record)
    if schedule is not None and not schedule.is_single:
        so_far = "" if len(trained) == len(schedule.objectives) else f" (up to here: {', '.join(trained) or 'none'})"
        facts["objective_schedule"] = f"{schedule}{so_far}"
    if record.get("run_hash") and record.get("batch") is not None:
        facts["checkpoint"] = {key: record.get(key) for key in _IDENTITY}
    return {**facts, "lineage": lineage}


# ------------------------------------------------------------------ every checkpoint of a run


@dataclass(frozen=True)
class Revision:
    """A checkpoint and its name."""

    name: str
    path: Path
    record: Mapping[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        return {key: self.record.get(key) for key in _IDENTITY}


def find_revisions(folders: Sequence[str | Path], *, averaged: bool = False) -> list[Revision]:
    """Every complete checkpoint of save folders, in the order of the folders and then of batches, step0 first.

    Args:
        averaged: only those that hold averages of `ema`; the others are named in a warning.

    Raises:
        FileNotFoundError: no such folder, or one without a complete checkpoint (with averages).
        ValueError: a checkpoint without a record, or two of one name.
    """
    from ettin_foundry.training import checkpoints as checkpoint

    found: dict[str, Revision] = {}
    for folder in map(Path, folders):
        if not folder.is_dir() or (folder / ".metadata").exists():
            raise FileNotFoundError(f"{folder}: is no folder of checkpoints; --every takes the save folders of runs")
        initial = folder / "initial" / "step0.pt"
        paths = [*([initial] if checkpoint.is_complete(initial) else []), *checkpoint.complete_checkpoints(folder)]
        if not paths:
            raise FileNotFoundError(f"{folder}: no complete checkpoint in it; --every takes the save folders of runs")
        if averaged:
            paths = [path for path in paths if _has_averages(path)]
            if not paths:
                raise FileNotFoundError(f"{folder}: no checkpoint in it holds averages. Leave --ema out")
        for path in paths:
            record = checkpoint.read_head(path).record
            if not record.get("config") or record.get("batch") is None:
                raise ValueError(f"{path}: holds no record of its phase and batch, so it has no name; export it alone, "
                                 "without --every")
            name = "step0" if path == initial else revision_name(record.get("phase"), record["batch"])
            if name in found:
                raise ValueError(f"{path}: would be called {name}, as would {found[name].path}; a name is needed once. "
                                 "Export runs of the same phase to different folders")
            found[name] = Revision(name, path, record)
    return list(found.values())


def _has_averages(path: Path) -> bool:
    from ettin_foundry.training import checkpoints as checkpoint

    try:
        checkpoint.load_model_state(path, ema=True, names=())
    except ValueError as error:
        log.warning("left out: %s", error)
        return False
    return True


def export_every(revisions: Sequence[Revision], out: str | Path, write: Callable[[Revision, Path], Any],
                 objectives: Mapping[str, str], *, averaged: bool = False, tags: bool = False,
                 overwrite: bool = False) -> str:
    """Writes one folder for each revision; whole folders of the same checkpoint are left as they are.

    Args:
        out: where the folders go. write: makes one folder. objectives: {revision's name: what it is exported as}.
        averaged: whether the averages of `ema` are written.
        tags: also write OUT/tags.json: of each revision, in order, tag, objective, tokens and where it comes from.
        overwrite: write every folder anew.

    Returns:
        One line that says what was done, with seconds for a checkpoint and MB/s.

    Raises:
        ValueError: a folder of this name holds something else; it is found before any is written. And as `write`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    out = Path(out)
    wanted = []
    for revision in revisions:
        identity = {**revision.identity, "objective": objectives[revision.name], "averaged": averaged}
        if overwrite or not _is_there(out / revision.name, identity, revision.path):
            wanted.append(revision)
    num_bytes, begin = 0, time.monotonic()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("export", total=len(wanted))
        for revision in wanted:
            bar.update(task, description=revision.name)
            write(revision, out / revision.name)
            num_bytes += (out / revision.name / WEIGHTS).stat().st_size
            bar.advance(task)
    seconds = time.monotonic() - begin
    if tags:
        _write_tags(out, revisions)
    line = f"{len(revisions)} revisions in {out}: {len(wanted)} written, {len(revisions) - len(wanted)} were there"
    if wanted:
        line += f"; {seconds / len(wanted):.2f} s for each, {num_bytes / 1e6 / seconds:,.0f} MB/s"
    return line


def _read_identity(folder: Path) -> dict[str, Any]:
    """Of an export: the checkpoint's identity, objective, tokens, and whether its weights are averages; {} if it is none."""
    try:
        block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["ettin_foundry"]
        return {**(block.get("checkpoint") or {}), "objective": block["objective"], "tokens": block["tokens"],
                "averaged": any("averaged" in entry for entry in block["lineage"])}
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}


def _is_there(folder: Path, here: Mapping[str, Any], source: Path) -> bool:
    """Whether a whole folder of this very checkpoint stands there; one of another is refused."""
    from safetensors import SafetensorError, safe_open

    if not folder.exists():
        return False
    there = _read_identity(folder)
    for key, value in here.items():
        if there.get(key) != value:
            raise ValueError(f"{folder}: exists, with {key} {there.get(key)!r}, and {source} with {key} {value!r} is to be "
                             "written there. Choose another folder, or pass --overwrite to replace it")
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            return True  # opening compares the header with the file's length
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: its {WEIGHTS} is not whole ({error}). Pass --overwrite to write it again") from error


def _write_tags(out: Path, revisions: Sequence[Revision]) -> None:
    tags = []
    for revision in revisions:
        written = _read_identity(out / revision.name)
        tags.append({"tag": revision.name, "objective": written["objective"], "tokens": written["tokens"] or 0,
                     **revision.identity})
    partial = out / f".{TAGS}.partial-{os.getpid()}"
    write_json(partial, {"tags": tags})
    partial.replace(out / TAGS)
