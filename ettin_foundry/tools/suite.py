"""A suite file: the training runs that make a family of models, in order, and what is exported and evaluated then.

    name: ettin-150m
    root: runs/ettin-150m            # a folder of each stage is made in it, and models/ and the report
    command: composer train.py       # what starts a run; recipe, overlays and key=value follow it
    variables: {data: data/pretrain} # for ${variables.data} in this file
    overrides: []                    # key=value for every stage
    scale: 1.0                       # multiplies every time in tokens: the same suite at a smaller budget
    stages:
      encoder: {yaml: [yamls/ettin-enc-150m.yaml], pair: pretrain}
      encoder-extend: {yaml: [yamls/ettin-enc-150m.yaml, yamls/phases/extend.yaml], from: encoder, pair: extend}
    exports: {encoder: encoder-extend}
    evaluation: {data: data/decay, objectives: [clm, mlm], mask_rate: 0.15, max_batches: 64}
    samples: {prompts: ["import "], masked: ["import [MASK]"]}   # shown in the report: of decoders, of encoders

A stage is an ordinary run of train.py: its files, then key=value. `from` names the stage whose newest checkpoint it
starts with (`variables.source`); stages of one `pair` are compared. `extends` names a suite file that this one changes.

A sweep is a suite with more stages, one for each value of a setting and each line of a picture, named LINE-VALUE. The
loss that is drawn is that of the line's objective on `evaluation.data`:

    x: {name: peak learning rate, keys: ["variables.peak_lr={x}"], values: [1.0e-3, 3.0e-3]}
    lines:
      encoder: {yaml: [yamls/nano.yaml], objective: mlm}
      decoder: {yaml: [yamls/nano.yaml, yamls/options/decoder.yaml], objective: clm}
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from omegaconf import OmegaConf as om
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from ettin_foundry.training import run_config
from ettin_foundry.training.run_config import parse_time

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
_Text = Annotated[str, StringConstraints(min_length=1)]
_Objective = Literal["mlm", "clm", "mntp"]
_OWN_KEYS = ("run_name", "save_folder", "variables.source")  # which follow from name, root and from


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(_Block):
    """What the exported models are compared on; mask_rate is of the masked objectives."""

    data: _Text
    objectives: tuple[_Objective, ...] = ("clm", "mlm", "mntp")
    mask_rate: float = 0.15
    max_batches: int | None = Field(None, ge=1)


class Samples(_Block):
    """Texts that the exported models are tried on."""

    prompts: tuple[_Text, ...] = ()  # continued by decoders
    masked: tuple[_Text, ...] = ()  # texts with [MASK], filled by encoders


class _StageBlock(_Block):
    yaml: list[_Text] = []
    overrides: list[_Text] = []
    source: str | None = Field(None, alias="from")
    pair: str | None = None


class _Line(_StageBlock):
    objective: _Objective


class _Setting(_Block):
    name: _Text
    keys: list[_Text] = Field(min_length=1)
    values: list[float | int | _Name] = Field(min_length=2)


class File(_Block):
    """What a suite file says, as the text at the top of this module."""

    extends: str | None = None
    name: _Name
    root: Path
    command: Annotated[str, StringConstraints(pattern=r"\S")] = "composer train.py"
    variables: dict[str, Any] = {}
    overrides: list[_Text] = []
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, strict=True)
    stages: dict[_Name, _StageBlock] = {}
    x: _Setting | None = None
    lines: dict[_Name, _Line] = {}
    exports: dict[_Name, str] = {}  # name of a model -> stage
    evaluation: Evaluation | None = None
    samples: Samples = Samples()


class Point(NamedTuple):
    """What a stage is in the picture of a sweep."""

    line: str
    x: float | int | str
    objective: str


@dataclass(frozen=True)
class Stage:
    """One run of train.py."""

    name: str
    file: File  # what starts a run, and scales it
    args: tuple[str, ...]  # YAML files and key=value, as train.py takes them; without those that `scale` adds
    folder: Path  # its save folder
    source: str | None = None  # the stage whose weights it starts with
    pair: str | None = None
    point: Point | None = None

    @functools.cached_property
    def words(self) -> list[str]:
        """The exact command line; raises as `run_config.resolved`."""
        scaled = _scaled(run_config.resolved(self.args), self.file.scale) if self.file.scale != 1 else []
        return [*shlex.split(self.file.command), *self.args, *scaled]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The run's configuration as plain containers; raises as `run_config.resolved`, with the stage's name."""
        with self.named():
            return run_config.resolved(self.words[len(shlex.split(self.file.command)):])

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Puts the stage's name before the message of an error that is raised within."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise type(error)(f"stages.{self.name}: {error}") from error


@dataclass(frozen=True)
class Suite:
    """A suite file, read and checked for itself; the settings of its stages are checked by `suite_run.check_suite`."""

    path: str
    file: File
    stages: tuple[Stage, ...]  # each after the one that it starts from

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ValueError(f"--stage must be one of {', '.join(names)} ({self.path}), got {name!r}")
        return self.stages[names.index(name)]

    def chain(self, stage: Stage) -> list[Stage]:
        """The stages from initialisation to this one."""
        return [*([] if stage.source is None else self.chain(self.stage(stage.source))), stage]

    def pairs(self) -> dict[str, list[Stage]]:
        """{pair: its members in order}."""
        names = dict.fromkeys(stage.pair for stage in self.stages if stage.pair is not None)
        return {name: [stage for stage in self.stages if stage.pair == name] for name in names}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Suite:
    """Reads a suite file, then key=value of the file itself, such as `scale=0.01`; errors name the key."""
    path = str(path)
    try:
        file = File.model_validate(_read(path, overrides))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {key}: {first['msg']}, got {first['input']!r}; keys of a suite are "
                         f"{', '.join(File.model_fields)}") from None
    if ":/" in str(file.root):
        raise ValueError(f"{path}: root must be a local folder, got {file.root}")
    needed = ("x", "lines", "evaluation") if file.x or file.lines else ("stages",)
    if missing := [key for key in needed if not getattr(file, key)]:
        raise ValueError(f"{path}: {missing[0]} must be given, got none; look at study/sweep-lr.yaml")
    stages = _stages(path, file)
    names = [stage.name for stage in stages]
    for model, stage in file.exports.items():
        if stage not in names:
            raise ValueError(f"{path}: exports.{model} must be one of {', '.join(names)}, got {stage!r}")
    if (file.evaluation or file.samples != Samples()) and not (file.exports or file.x):
        raise ValueError(f"{path}: evaluation and samples need exports, which are what is evaluated; add exports")
    return Suite(path, file, stages)


def _read(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The file, merged onto those that it extends, then the overrides; interpolations resolved."""
    layers = {path: run_config.read(path)}
    while (parent := layers[path].get("extends")) is not None:
        path = str(Path(path).parent / str(parent))
        if path in layers:
            raise ValueError(f"{path}: extends: leads back to it; a file cannot extend itself")
        layers[path] = run_config.read(path)
    path = next(iter(layers))
    if wrong := [text for text in overrides if "=" not in text]:
        raise ValueError(f"after the suite file only key=value of it is possible, such as scale=0.01, got {wrong[0]!r}")
    try:
        merged = om.merge(*(om.create(layer) for layer in reversed(layers.values())), om.from_cli(list(overrides)))
        if missing := sorted(om.missing_keys(merged)):
            raise ValueError(f"{path}: {missing[0]} has no value; add {missing[0]}=... to the command line")
        return om.to_container(merged, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _blocks(file: File) -> Iterator[tuple[str, _StageBlock, Point | None]]:
    """The stages as they are written, then those of the points of a sweep."""
    yield from ((name, block, None) for name, block in file.stages.items())
    values, keys = (file.x.values, file.x.keys) if file.x else ((), ())
    for (line, block), value in itertools.product(file.lines.items(), values):
        overrides = [*block.overrides, *(key.replace("{x}", str(value)) for key in keys)]
        yield f"{line}-{value}", block.model_copy(update={"overrides": overrides}), Point(line, value, block.objective)


def _stages(path: str, file: File) -> tuple[Stage, ...]:
    found: dict[str, Stage] = {}
    for name, block, point in _blocks(file):
        where, folder, own = f"{path}: stages.{name}", file.root / name, [*file.overrides, *block.overrides]
        if name == "models":
            raise ValueError(f"{where}: this folder of root holds the exports; give the stage another name")
        if block.source is not None and block.source not in found:
            raise ValueError(f"{where}.from must be a stage before it, one of {[*found]}, got {block.source!r}")
        if wrong := [text for text in own if "=" not in text or text.split("=", 1)[0] in _OWN_KEYS]:
            raise ValueError(f"{where}.overrides must be key=value without {', '.join(_OWN_KEYS)}, got {wrong[0]!r}")
        source = [] if block.source is None else [f"variables.source={found[block.source].folder}"]
        args = *block.yaml, f"run_name={file.name}-{name}", f"save_folder={folder}", *own, *source
        found[name] = Stage(name, file, args, folder, block.source, block.pair, point)
    pairs = [stage.pair for stage in found.values() if stage.pair is not None]
    if alone := [pair for pair in pairs if pairs.count(pair) < 2]:
        raise ValueError(f"{path}: pair must stand in at least two stages, got {alone[0]!r} in one")
    return tuple(found.values())


def _scaled(config: dict[str, Any], scale: float) -> list[str]:
    """key=value that multiplies each time in tokens, except in `variables`, from which those times were filled in."""
    found = []
    for key, value in run_config.walk(config):
        is_time = isinstance(value, str) and re.fullmatch(r"[0-9._]+(e[+-]?[0-9]+)?tok", value, re.IGNORECASE)
        if not is_time or key.split(".")[0] in ("variables", "loggers", "metadata", "run_name"):
            continue
        if "[" in key:
            raise ValueError(f"{key} must be in shares of the run such as 0.25dur with scale={scale:g}, got {value}; "
                             "times in a list are not scaled")
        if amount := parse_time(key, value)[0]:
            found.append(f"{key}={round(amount * scale)}tok")
    return found
