"""Reads recipes: merges YAML files and key=value into one configuration, for `train.py` and every command.

Later files win over earlier ones, and key=value wins over files. What a configuration may hold is checked in checks.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from omegaconf.errors import OmegaConfBaseException

from ettin_foundry import program_folder
from ettin_foundry.model.config import did_you_mean

# last words of keys whose values are names or paths: `run_name: 1e3` is the text 1e3
TEXT_KEYS = frozenset("run_name name label size phase data extend_data decay_data source save_root save_folder "
                      "load_path local remote split folder project entity group".split())


def merge(base: Any, over: Any) -> Any:
    """`over` laid onto `base` key by key, in new containers; a block whose `name` changes is replaced.

    So a new scheduler does not inherit the old one's settings. `???` (no value yet) never hides a value.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        if "name" in base and over.get("name", base["name"]) != base["name"]:
            return over
        return {**base, **{k: merge(base[k], v) if k in base else v for k, v in over.items()}}
    return base if over == "???" else over


def read(path: str) -> dict[str, Any]:
    """One YAML file, interpolations left as they are."""
    if not Path(path).is_file():
        here = program_folder()
        known = ", ".join(sorted(p.relative_to(here).as_posix() for p in (here / "yamls").rglob("*.yaml")))
        raise FileNotFoundError(f"{path}: no such file. Arguments are YAML files and key=value; recipes here: {known}")
    try:
        config = om.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: holds {type(config).__name__}, not keys and values; see yamls/ for examples")
    return _with_texts(om.to_container(config), yaml.load(Path(path).read_bytes(), yaml.BaseLoader))


def _with_texts(value: Any, raw: Any, key: str = "") -> Any:
    """A YAML value in which names and paths are as written; `raw` has every scalar as text."""
    if isinstance(value, dict) and isinstance(raw, dict):
        return {name: _with_texts(item, raw.get(str(name)), str(name)) for name, item in value.items()}
    return raw if key in TEXT_KEYS and isinstance(value, (bool, int, float)) and isinstance(raw, str) else value


def _quoted(override: str) -> str:
    """key=value with a name or path in quotes, so that YAML takes it as text."""
    key, _, value = override.partition("=")
    plain = key.rpartition(".")[2] in TEXT_KEYS and value not in ("", "null", "~", "???") and value[0] not in "[{'\""
    return f"{key}={json.dumps(value)}" if plain else override


def configure(args: Sequence[str]) -> DictConfig:
    """The merged config of a command line: its interpolations resolve, no value is missing, its variables exist."""
    om.clear_resolver("oc.env")  # as LLM-Foundry does, so that a YAML means the same in both
    files, overrides = [arg for arg in args if "=" not in arg], [arg for arg in args if "=" in arg]
    if wrong := [arg for arg in files if not arg.endswith((".yaml", ".yml"))]:
        raise ValueError(f"{wrong[0]}: neither a YAML file nor key=value; the only option is --dry-run")
    if not files:
        raise ValueError("no recipe given; usage: composer train.py recipe.yaml [overlay.yaml ...] [key=value ...]")
    merged: dict[str, Any] = {}
    for path in files:
        merged = merge(merged, read(path))
    command_line: Any = om.to_container(om.from_cli([_quoted(each) for each in overrides]))
    known = merged.get("variables") or {}
    if unknown := [k for k in command_line.get("variables") or {} if k not in known]:
        raise ValueError(f"variables.{unknown[0]}: {', '.join(files)} has no such variable, so nothing would change"
                         + did_you_mean(unknown[0], known))
    config: Any = om.create(merge(merged, command_line))
    try:
        missing = sorted(om.missing_keys(config), key=lambda key: (not key.startswith("variables."), key))
        if not missing:
            plain: Any = om.to_container(config, resolve=True)
            config.update(rows_from_tokens(plain))
    except OmegaConfBaseException as error:
        raise ValueError(f"{', '.join(files)}: {' '.join(str(error).split())}") from error
    if missing:
        raise ValueError(f"{missing[0]}: no value given; add {missing[0]}=... to the command line"
                         + (f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""))
    return config


def resolved(args: Sequence[str]) -> dict[str, Any]:
    """`configure`, with every interpolation filled in, as plain containers."""
    return om.to_container(configure(args), resolve=True)  # type: ignore[return-value]


def rows_from_tokens(cfg: dict[str, Any], world_size: int | None = None) -> dict[str, int]:
    """Rows a GPU takes at once, where a config (plain containers, resolved) gives token positions instead.

    `variables.microbatch_tokens` gives `device_train_microbatch_size`: the most rows of `max_seq_len` that it holds and
    that divide every batch of each of `world_size` (by default WORLD_SIZE) processes. `variables.eval_tokens` gives
    `device_eval_batch_size`. A key that the config has itself is left alone.
    """
    variables, length, batch = cfg.get("variables") or {}, cfg.get("max_seq_len"), cfg.get("global_train_batch_size")
    found: dict[str, int] = {}
    for name, key in (("microbatch_tokens", "device_train_microbatch_size"), ("eval_tokens", "device_eval_batch_size")):
        tokens = variables.get(name)
        if tokens is None or cfg.get(key) is not None or not isinstance(length, int) or not isinstance(batch, int):
            continue
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < length:
            raise ValueError(f"variables.{name} must be an integer >= {length} (max_seq_len), got {tokens!r}")
        rows = tokens // length
        if key == "device_train_microbatch_size":
            warmup = (cfg.get("train_loader") or {}).get("batch_size_warmup") or {}
            smallest = warmup.get("min_size") if isinstance(warmup, dict) else None
            share = math.gcd(batch, smallest if isinstance(smallest, int) else 0)
            share = max(1, share // (world_size or int(os.environ.get("WORLD_SIZE", "1"))))
            rows = next(n for n in range(min(rows, share), 0, -1) if share % n == 0)
        found[key] = rows
    return found
