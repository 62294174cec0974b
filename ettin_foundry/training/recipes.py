"""From YAML files and key=value to one configuration: what `train.py` and every command that takes a recipe read.

Later files win over earlier ones, and key=value wins over files. What a configuration may hold is checked in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from omegaconf.errors import OmegaConfBaseException

__all__ = ["configure", "merge", "read", "resolved"]

HERE = Path(__file__).resolve().parents[2]  # the clone, when it is one: recipes are looked for in its yamls/


def merge(base: Any, over: Any) -> Any:
    """`over` laid onto `base`, in new containers.

    Blocks are merged key by key, except that a block whose `name` changes is replaced: a new scheduler must not inherit
    the old one's settings. `???` (no value yet) never hides a value.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        if base.get("name", over.get("name")) == over.get("name", base.get("name")):
            return {**base, **{k: merge(base[k], v) if k in base else v for k, v in over.items()}}
        return over
    return base if over == "???" else over


def read(path: str) -> dict[str, Any]:
    """One YAML file, interpolations left as they are."""
    if not Path(path).is_file():
        known = ", ".join(sorted(p.relative_to(HERE).as_posix() for p in (HERE / "yamls").rglob("*.yaml")))
        raise FileNotFoundError(f"{path}: no such file. Arguments are YAML files and key=value; recipes here: {known}")
    try:
        config = om.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: holds {type(config).__name__}, not keys and values; see yamls/ for examples")
    return om.to_container(config)  # type: ignore[return-value]


def configure(args: Sequence[str]) -> DictConfig:
    """The merged config of a command line, every interpolation resolvable and no value missing.

    Raises:
        FileNotFoundError, ValueError: a file is missing or broken, an override names no variable, a value is missing.
    """
    om.clear_resolver("oc.env")  # as LLM-Foundry does, so that a YAML means the same in both
    files, overrides = [arg for arg in args if "=" not in arg], [arg for arg in args if "=" in arg]
    if wrong := [arg for arg in files if not arg.endswith((".yaml", ".yml"))]:
        raise ValueError(f"{wrong[0]}: neither a YAML file nor key=value; the only option is --dry-run")
    if not files:
        raise ValueError("no recipe given; usage: composer train.py recipe.yaml [overlay.yaml ...] [key=value ...]")
    merged: dict[str, Any] = {}
    for path in files:
        merged = merge(merged, read(path))
    command_line = om.to_container(om.from_cli(overrides))
    assert isinstance(command_line, dict)
    known = merged.get("variables") or {}
    if unknown := [k for k in command_line.get("variables") or {} if k not in known]:
        raise ValueError(f"variables.{unknown[0]}: {', '.join(files)} has no such variable, so nothing would change; "
                         f"the variables are {', '.join(map(str, known))}")
    config = om.create(merge(merged, command_line))
    assert isinstance(config, DictConfig)
    try:
        missing = sorted(om.missing_keys(config), key=lambda key: (not key.startswith("variables."), key))
        if not missing:
            om.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{', '.join(files)}: {' '.join(str(error).split())}") from error
    if missing:
        raise ValueError(f"{missing[0]}: no value given; add {missing[0]}=... to the command line"
                         + (f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""))
    return config


def resolved(args: Sequence[str]) -> dict[str, Any]:
    """`configure`, with every interpolation filled in, as plain containers."""
    return om.to_container(configure(args), resolve=True)  # type: ignore[return-value]
