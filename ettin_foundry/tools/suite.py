"""A suite file: the training runs that make a family of models, in order, and what is exported and evaluated at the end.

    name: ettin-150m
    root: runs/ettin-150m            # a folder of each stage is made in it, and models/ and the report
    command: composer train.py       # what starts a run; recipe, overlays and key=value follow it
    variables: {data: data/pretrain} # for ${variables.data} in this file
    overrides: []                    # key=value for every stage
    scale: 1.0                       # multiplies every time in tokens: the same suite at a smaller budget
    stages:
      encoder-pretrain: {yaml: [yamls/ettin-enc-150m.yaml], pair: pretrain}
      encoder-extend: {yaml: [yamls/ettin-enc-150m.yaml, yamls/phases/extend.yaml], from: encoder-pretrain, pair: extend}
    exports: {encoder: encoder-extend}
    evaluation: {data: data/decay, objectives: [clm, mlm], mask_rate: 0.15, max_batches: 64}

A stage is an ordinary run of train.py: its files, then key=value. `from` names the stage whose newest checkpoint it starts
with (`variables.source`), `pair` what its twin is compared with. `extends` names another suite file that this one changes.
Reading and checking only; running is in suite_run.py, the report in suite_report.py.
"""

from __future__ import annotations

import copy
import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf as om
from omegaconf.errors import OmegaConfBaseException

from ettin_foundry.model.config import OBJECTIVES
from ettin_foundry.training import checks, recipes

__all__ = ["Evaluation", "Stage", "Suite", "load"]

_STAGE_KEYS = ("yaml", "overrides", "from", "pair")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("models", "report.json", "report.md")  # beside the stages' folders in root


@dataclass(frozen=True)
class Stage:
    """One run of train.py."""

    name: str
    args: tuple[str, ...]
    """YAML files and key=value, as train.py takes them; without those that `scale` adds."""
    folder: Path
    """Its save folder."""
    source: str | None = None
    """The stage whose weights it starts with."""
    pair: str | None = None
    scale: float = 1.0

    @functools.cached_property
    def arguments(self) -> list[str]:
        """What train.py is given.

        Raises:
            ValueError, FileNotFoundError: as `recipes.configure`, with the stage's name before the message.
        """
        return [*self.args, *(_scaled(self._resolved(self.args), self.scale) if self.scale != 1 else ())]

    def config(self) -> dict[str, Any]:
        """The run's configuration, interpolations resolved, as plain containers.

        Raises:
            ValueError, FileNotFoundError: as `recipes.configure`, with the stage's name before the message.
        """
        return copy.deepcopy(self._config)

    @functools.cached_property
    def _config(self) -> dict[str, Any]:
        return self._resolved(self.arguments)

    def _resolved(self, args: Sequence[str]) -> dict[str, Any]:
        try:
            return recipes.resolved(args)
        except (ValueError, OSError) as error:
            raise type(error)(f"stages.{self.name}: {error}") from error


@dataclass(frozen=True)
class Evaluation:
    """What the exported models are compared on."""

    data: str
    objectives: tuple[str, ...] = ("clm", "mlm", "mntp")
    mask_rate: float = 0.15
    """Of the masked objectives."""
    max_batches: int | None = None


@dataclass(frozen=True)
class Suite:
    """A suite file, read and checked for itself; the stages' own settings are checked by `check`."""

    path: str
    name: str
    root: Path
    command: tuple[str, ...]
    stages: tuple[Stage, ...]
    """A stage comes after the one that it starts from."""
    exports: Mapping[str, str] = field(default_factory=dict)
    """Name of a model -> stage."""
    evaluation: Evaluation | None = None

    def stage(self, name: str) -> Stage:
        """The stage of this name.

        Raises:
            ValueError: there is none; the message names those that there are.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"--stage: {name!r} given; {self.path} has {', '.join(s.name for s in self.stages)}")

    def chain(self, stage: Stage) -> list[Stage]:
        """The stages from initialisation to this one."""
        before = [] if stage.source is None else self.chain(self.stage(stage.source))
        return [*before, stage]

    def pairs(self) -> dict[str, list[Stage]]:
        """{pair: its members in order}."""
        found: dict[str, list[Stage]] = {}
        for stage in self.stages:
            if stage.pair is not None:
                found.setdefault(stage.pair, []).append(stage)
        return found

    def words(self, stage: Stage) -> list[str]:
        """The exact command line of a stage."""
        return [*self.command, *stage.arguments]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Reads a suite file.

    Args:
        path: the file. overrides: key=value of the file itself, such as `scale=0.01` or `variables.data=data/mine`.

    Raises:
        FileNotFoundError: it, or one that it extends, is not there.
        ValueError: a key that is unknown, missing or of the wrong kind; the message names the key as it stands in the file.
    """
    plain = _read(str(path), overrides)
    known = ("extends", "name", "root", "command", "variables", "overrides", "scale", "stages", "exports", "evaluation")
    _check_keys(str(path), "", plain, known)
    for key in ("name", "root"):
        if not isinstance(plain.get(key), str) or not plain[key]:
            raise ValueError(f"{path}: {key}: {plain.get(key)!r} given; a text is needed. Add it")
    if not _NAME.fullmatch(plain["name"]) or "://" in plain["root"]:
        raise ValueError(f"{path}: name: {plain['name']!r}, root: {plain['root']!r} given; a name of letters, digits, '.', "
                         "'_' and '-' and a local folder are needed. Correct them")
    scale = plain.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise ValueError(f"{path}: scale: {scale!r} given; a number above 0 is needed, such as 0.01. Correct it")
    command = plain.get("command", "composer train.py")
    if not isinstance(command, str) or not command.split():
        raise ValueError(f"{path}: command: {command!r} given; a text such as composer train.py is needed. Correct it")
    stages = _stages(str(path), plain, float(scale))
    exports = plain.get("exports") or {}
    names = [stage.name for stage in stages]
    for model, stage in exports.items():
        if stage not in names or not _NAME.fullmatch(str(model)):
            raise ValueError(f"{path}: exports.{model}: {stage!r} given; a stage is needed, one of {', '.join(names)}")
    return Suite(path=str(path), name=plain["name"], root=Path(plain["root"]), command=tuple(shlex.split(command)),
                 stages=stages, exports=exports, evaluation=_evaluation(str(path), plain.get("evaluation"), exports))


def _read(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The file, laid onto those that it extends, then the overrides; interpolations resolved."""
    layers, at = [], path
    while at is not None:
        if at in (seen for seen, _ in layers):
            raise ValueError(f"{path}: extends: leads back to {at}; a file cannot extend itself. Correct it")
        layer = recipes.read(at)
        layers.append((at, layer))
        parent = layer.get("extends")
        at = None if parent is None else str(Path(at).parent / str(parent))
    if wrong := [text for text in overrides if "=" not in text]:
        raise ValueError(f"{wrong[0]}: given; after the suite file only key=value of that file is possible, such as "
                         "scale=0.01")
    try:
        merged = om.merge(*(om.create(layer) for _, layer in reversed(layers)), om.from_cli(list(overrides)))
        if missing := sorted(om.missing_keys(merged)):
            raise ValueError(f"{path}: {missing[0]}: no value given. Add it to the file, or {missing[0]}=... to the command "
                             "line")
        return om.to_container(merged, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _check_keys(path: str, where: str, block: Any, known: Sequence[str]) -> None:
    if not isinstance(block, dict):
        raise ValueError(f"{path}: {where}: {block!r} given; a block of keys is needed. Correct it")
    if unknown := sorted(str(key) for key in block if key not in known):
        key = f"{where}.{unknown[0]}" if where else unknown[0]
        raise ValueError(f"{path}: {key}: unknown key; the keys are {', '.join(known)}. Correct or remove it")


def _texts(path: str, key: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{path}: {key}: {value!r} given; a list of texts is needed. Correct it")
    return value


def _stages(path: str, plain: Mapping[str, Any], scale: float) -> tuple[Stage, ...]:
    blocks = plain.get("stages")
    if not isinstance(blocks, dict) or not blocks:
        raise ValueError(f"{path}: stages: {blocks!r} given; at least one {{name: {{yaml: [...]}}}} is needed")
    common = _key_values(path, "overrides", plain.get("overrides", []))
    found: dict[str, Stage] = {}
    for name, block in blocks.items():
        where = f"stages.{name}"
        _check_keys(path, where, block, _STAGE_KEYS)
        if not _NAME.fullmatch(str(name)) or name in _RESERVED:
            raise ValueError(f"{path}: {where}: not a possible name; letters, digits, '.', '_' and '-' are possible, and "
                             f"not {', '.join(_RESERVED)}. Rename it")
        files = _texts(path, f"{where}.yaml", block.get("yaml", []))
        source, folder = block.get("from"), Path(plain["root"]) / name
        if source is not None and source not in found:
            raise ValueError(f"{path}: {where}.from: {source!r} given; a stage that stands before it is needed, one of "
                             f"{', '.join(found) or 'none: it is the first'}. Correct it, or move the stage down")
        args = [*files, f"run_name={plain['name']}-{name}", f"save_folder={folder}", *common,
                *_key_values(path, f"{where}.overrides", block.get("overrides", [])),
                *([] if source is None else [f"variables.source={found[source].folder}"])]
        found[name] = Stage(name, tuple(args), folder, source, block.get("pair"), scale)
    pairs = [stage.pair for stage in found.values() if stage.pair is not None]
    if alone := [pair for pair in pairs if pairs.count(pair) < 2]:
        raise ValueError(f"{path}: pair: {alone[0]!r} given for one stage only; a pair has at least two members. Give its "
                         "twin the same name, or remove it")
    return tuple(found.values())


def _key_values(path: str, key: str, value: Any) -> list[str]:
    """A list of key=value; the keys that the suite itself sets are refused."""
    for text in _texts(path, key, value):
        if "=" not in text or text.split("=", 1)[0] in ("run_name", "save_folder", "variables.source"):
            raise ValueError(f"{path}: {key}: {text!r} given; key=value of train.py is needed, and not run_name, "
                             "save_folder or variables.source, which follow from name, root and from. Correct or remove it")
    return value


def _evaluation(path: str, block: Any, exports: Mapping[str, str]) -> Evaluation | None:
    if block is None:
        return None
    _check_keys(path, "evaluation", block, tuple(Evaluation.__dataclass_fields__))
    if not exports:
        raise ValueError(f"{path}: evaluation: given without exports; exported models are what is evaluated. Add exports, "
                         "or remove it")
    if not isinstance(block.get("data"), str):
        raise ValueError(f"{path}: evaluation.data: {block.get('data')!r} given; the folder of a converted set is needed")
    found = Evaluation(**{**block, "objectives": tuple(_texts(path, "evaluation.objectives", block.get(
        "objectives", list(Evaluation.objectives))))})
    if wrong := [name for name in found.objectives if name not in OBJECTIVES]:
        raise ValueError(f"{path}: evaluation.objectives: {wrong[0]!r} given; they are {', '.join(OBJECTIVES)}. Correct it")
    if found.max_batches is not None and (not isinstance(found.max_batches, int) or found.max_batches < 1):
        raise ValueError(f"{path}: evaluation.max_batches: {found.max_batches!r} given; a whole number of at least 1 is "
                         "needed, or nothing for the whole split. Correct it")
    return found


_TOKENS = re.compile(r"[0-9._]+(e[+-]?[0-9]+)?tok", re.IGNORECASE)


def _scaled(config: Mapping[str, Any], scale: float) -> list[str]:
    """key=value that multiplies each time in tokens, except in `variables`, from which those times were filled in."""
    return _multiplied({k: v for k, v in config.items() if k not in ("variables", "loggers", "metadata", "run_name")}, scale)


def _multiplied(block: Mapping[str, Any], scale: float, prefix: str = "") -> list[str]:
    found = []
    for name, value in block.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            found += _multiplied(value, scale, f"{key}.")
        elif isinstance(value, list) and _TOKENS.search(str(value)):
            raise ValueError(f"scale: {scale:g} given, but {key} holds times in tokens, {value}, and a list is not scaled. "
                             "Give them as shares of the run, such as 0.25dur")
        elif isinstance(value, str) and _TOKENS.fullmatch(value) and (amount := checks.parse_time(key, value)[0]):
            found.append(f"{key}={round(amount * scale)}tok")
    return found
