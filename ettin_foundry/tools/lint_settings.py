"""The settings of a whole suite as data, linted: every pair, every chain of phases, and the sizes against each other.

A file of settings is JSON:

    {"note": "where it is from",
     "common": {SETTINGS that all runs share},
     "runs": [{"size": "17m", "side": "enc", "phase": "pretrain", "settings": {SETTINGS}}, ...]}

`side`, `enc` or `dec`, is what comes out: a cross run that makes a decoder starts from the encoder. SETTINGS are blocks in
the words of the recipes (model, train_loader, optimizer, scheduler, max_duration, ...), without interpolations; a run's are
laid onto the common ones. The loaders' objective is the model's if it is left out. `model.local_rope_theta: null` means that
it was left out in a program where local layers then take the global theta. A setting that recipes here do not have stands
under its own name and is compared like any other; these have a meaning: `reset_time` and `restart_override` (see
lint_chain.py), `train_loader.batch_size_warmup_tokens` (of ModernBERT's sequence packer, which alone reads it).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.tools.lint_chain import lint_chain
from ettin_foundry.tools.lint_report import ABSENT, UNFAIR, Difference, Report, shown
from ettin_foundry.tools.meaning import read_meaning
from ettin_foundry.tools.pair import lint_pair
from ettin_foundry.training.recipes import merge
from ettin_foundry.training.run_config import parse_time

__all__ = ["SettingsRun", "lint_file", "read_settings"]

SIDES = ("enc", "dec")
PHASES = ("pretrain", "extend", "decay", "cross")

# what a size may set: its shape, learning rates, budgets, and what memory and disks allow
_OF_A_SIZE = re.compile(r"model\.size|optimizer\.(lr|max_lr|weight_decay)|scheduler\.t_\w+|max_duration|save_interval|"
                        r"device_\w+|train_loader\.batch_size_warmup.*|run_name|save_folder|eval_interval")


class SettingsRun(NamedTuple):
    size: str
    side: str
    phase: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.side} {self.size} {self.phase}"


def read_settings(path: str | Path) -> list[SettingsRun]:
    """The runs of a file of settings.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not in the format of the module docstring; names what is wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; a file of settings in JSON is needed") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); a file of settings is needed") from None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list) or not content["runs"]:
        raise ValueError(f"{path}: holds no list `runs`; a file of settings is {{common: ..., runs: [...]}}")
    runs: dict[tuple[str, str, str], SettingsRun] = {}
    for i, entry in enumerate(content["runs"]):
        entry = entry if isinstance(entry, dict) else {}
        place = tuple(entry.get(key) for key in ("size", "side", "phase"))
        if not isinstance(place[0], str) or place[1] not in SIDES or place[2] not in PHASES:
            raise ValueError(f"{path}: runs[{i}]: size, side and phase are {place}; a name, one of {', '.join(SIDES)}, and "
                             f"one of {', '.join(PHASES)} are needed. Correct it")
        if place in runs:
            raise ValueError(f"{path}: runs[{i}]: there are two runs {place}; one is needed. Remove the other")
        if not isinstance(entry.get("settings"), dict):
            raise ValueError(f"{path}: runs[{i}]: settings are {entry.get('settings')!r}; a block is needed. Correct it")
        settings = merge(content.get("common") or {}, entry["settings"])
        _complete(settings)
        runs[place] = SettingsRun(*place, settings)  # type: ignore[arg-type]
    return list(runs.values())


def _complete(settings: dict[str, Any]) -> None:
    """What is said once in a file of settings: the objective, and a theta that stands for both."""
    model = settings.setdefault("model", {})
    if model.get("local_rope_theta", 0) is None:
        settings["model"] = {**model, "local_rope_theta": model.get("global_rope_theta")}
    for key in ("train_loader", "eval_loader"):
        if isinstance(settings.get(key), dict):
            settings[key] = {"objective": model.get("objective"), **settings[key]}


def lint_file(path: str | Path) -> Report:
    """Everything that is unfair, does not go on, or does nothing in a file of settings.

    Returns:
        Unfair differences only, each with the run, pair or phase where it is; notes say what was looked at.

    Raises:
        FileNotFoundError, ValueError: as `read_settings`, or a run's settings cannot be read.
    """
    runs = read_settings(path)
    by_place = {(run.size, run.side, run.phase): run for run in runs}
    found = [finding for run in runs for finding in _alone(run)]
    counts = {"pair": 0, "chain": 0}
    for size in dict.fromkeys(run.size for run in runs):
        for phase in PHASES:
            members = [by_place[size, side, phase] for side in SIDES if (size, side, phase) in by_place]
            if len(members) == 2:
                counts["pair"] += 1
                found += [dataclasses.replace(d, where=f"enc and dec {size} {phase}") for d in lint_pair(
                    members[0].settings, members[1].settings, names=(members[0].name, members[1].name)).unfair]
        for side in SIDES:
            last = SIDES[1 - SIDES.index(side)]  # the cross run makes the other side
            chain = [by_place[place] for place in [*((size, side, p) for p in PHASES[:-1]), (size, last, "cross")]
                     if place in by_place]
            counts["chain"] += len(chain) > 1
            found += lint_chain([(run.name, run.settings) for run in chain]).unfair if chain else ()
    found += list(_across_sizes(runs))
    note = f"{len(runs)} runs, {counts['pair']} pairs of one size and phase, {counts['chain']} chains of phases"
    return Report(("a / before", "b / now"), tuple(found), (note,), "suite")


def _alone(run: SettingsRun) -> Iterator[Difference]:
    """Switches that do nothing, or more than they say, whatever the other runs are."""
    loader, key = run.settings.get("train_loader") or {}, "train_loader.batch_size_warmup_tokens"
    tokens = loader.get("batch_size_warmup_tokens", "0tok")
    if parse_time(key, tokens)[0] > 0 and not loader.get("packing", True):
        yield Difference(key, tokens, "no effect", UNFAIR, "the batch-size warm-up is read by the sequence packer alone, "
                         "which is off", run.name)
    if run.settings.get("reset_time") and run.settings.get("autoresume"):
        yield Difference("reset_time", True, "autoresume: true", UNFAIR, "the clock is set back at every start, also when a "
                         "killed run resumes", run.name)


def _across_sizes(runs: Sequence[SettingsRun]) -> Iterator[Difference]:
    """Keys that a size has no reason to set, in which the sizes of one side and phase differ."""
    for side in SIDES:
        for phase in PHASES:
            alike = [run for run in runs if (run.side, run.phase) == (side, phase)]
            meanings = {run.size: read_meaning(run.name, run.settings) for run in alike}
            for key in dict.fromkeys(key for meaning in meanings.values() for key in meaning.values):
                groups: dict[str, list[str]] = {}
                for size, meaning in meanings.items():
                    groups.setdefault(shown(meaning.get(key, ABSENT)), []).append(size)
                if len(groups) > 1 and not _OF_A_SIZE.fullmatch(key):
                    *few, most = (f"{value}: {' '.join(sizes)}" for value, sizes in
                                  sorted(groups.items(), key=lambda group: len(group[1])))
                    yield Difference(key, "; ".join(few), most, UNFAIR, "it differs between sizes, and no size is a reason",
                                     f"{side} {phase}")
