"""The settings of a run as one flat table in which two spellings of one thing are equal.

`10000` is `10000.0`, `1dur` is the run's length, a key that is left out is the default that the code takes, a size is
the shape it stands for. `variables` do not count, only what they fill in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.data import MANIFEST
from ettin_foundry.data.mixture import open_split
from ettin_foundry.data.stream import DEFAULT_WINDOW
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.training.keys import DEFAULTS, HOST_DEFAULTS
from ettin_foundry.training.run_config import model_config, objective_schedule, parse_time, total_tokens, walk

_SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True)
class Meaning:
    """A run's settings, read: `values` by dotted key, without keys that are absent and have no default."""

    name: str
    cfg: Mapping[str, Any]
    values: Mapping[str, Any]
    config: EttinConfig

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def has(self, key: str) -> bool:
        """Whether the key, or one below it, is set."""
        return any(k == key or k.startswith((f"{key}.", f"{key}[")) for k in self.values)


def read_meaning(name: str, cfg: Mapping[str, Any]) -> Meaning:
    """The meaning of a resolved config that `checks.check_settings` accepts."""
    cfg = {key: value for key, value in cfg.items() if value is not None and key != "variables"}
    config, (amount, unit) = model_config(cfg), parse_time("max_duration", cfg["max_duration"])
    values = {key: _in_one_unit(value, amount, unit) for key, value in walk(_read_blocks(cfg, config))}
    return Meaning(name, cfg, values, config)


def _read_blocks(cfg: dict[str, Any], config: EttinConfig) -> dict[str, Any]:
    """The config with every default filled in."""
    total, fields = total_tokens(cfg), dataclasses.asdict(config)
    run = {**HOST_DEFAULTS, **cfg, "optimizer": _filled(cfg["optimizer"]), "scheduler": _filled(cfg["scheduler"])}
    # causal and the length follow from objective and max_seq_len, which are compared themselves
    run["model"] = {key: value for key, value in {**_filled(cfg["model"]), **fields}.items()
                    if key not in (*_SHAPE, "causal", "max_position_embeddings")}
    run["model"] |= {"size": config.size or f"layers, widths, heads: {[fields[key] for key in _SHAPE]}",
                     "objective": _plain(objective_schedule(cfg))}
    run["optimizer"].setdefault("max_lr", run["optimizer"]["lr"])
    callbacks = {"ettin_clock": {}, **(cfg.get("callbacks") or {})}  # the checks give the clock to every run
    run["callbacks"] = {key: _filled(block or {}, key) for key, block in callbacks.items()}
    # FULL: the checks set it, and without sharding nothing is narrowed either
    run["fsdp_config"] = {"mixed_precision": "FULL", **(cfg.get("fsdp_config") or {})}
    if Path(cfg["tokenizer"].get("name", ".")) == Path(cfg["train_loader"]["dataset"]["local"], "tokenizer"):
        run["tokenizer"] = {**cfg["tokenizer"], "name": "that of the data"}  # whose fingerprint tells what it does
    run["train_loader"] = _loader(cfg["train_loader"], total)
    evaluations = run.pop("eval_loaders", None) or run.pop("eval_loader", None) or []
    evaluations = [evaluations] if isinstance(evaluations, Mapping) else evaluations
    for i, block in enumerate(evaluations):
        run["eval_loader" if len(evaluations) == 1 else f"eval_loader[{block.get('label', i)}]"] = _loader(block, total)
    micro = run["device_train_microbatch_size"]
    run.setdefault("device_eval_batch_size", 1 if micro == "auto" else micro)  # the host's default
    return run


def _filled(block: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """A block of ours with its defaults; `name` for blocks without the key."""
    return {**DEFAULTS.get(name or block.get("name", ""), {}), **{k: v for k, v in block.items() if v is not None}}


def _loader(block: Mapping[str, Any], total: int | None) -> dict[str, Any]:
    filled = _filled(block, "ettin_text")
    filled["mask_rate"] = _plain(MaskRate.parse(filled["mask_rate"], total=total))
    objective = filled.get("objective")
    if isinstance(objective, list) and all(isinstance(name, str) for name in objective):  # an evaluation under each
        filled["objective"] = ", ".join(sorted(objective))
    elif objective is not None:
        filled["objective"] = _plain(ObjectiveSchedule.parse(objective, total=total))
    if filled["shuffle"]:
        filled.setdefault("shuffle_window", DEFAULT_WINDOW)
    return filled


def _plain(schedule: ObjectiveSchedule | MaskRate) -> Any:
    """A constant as a name or number, else text that keeps the order of its parts."""
    value = schedule.plain()
    return value if isinstance(value, (str, float)) else json.dumps(value)


def _in_one_unit(value: Any, amount: float, unit: str) -> Any:
    """A time as `8_500_000_000tok`, shares of the run in the run's own unit; anything else as it is."""
    try:
        number, own_unit = parse_time("", value)
    except ValueError:
        return value
    if own_unit == "dur" or number == 0:
        number, own_unit = number * amount, unit
    return f"{round(number, 0 if own_unit == 'tok' else 6):_}".removesuffix(".0") + own_unit


def data_of(run: Meaning, loader: str) -> tuple[str, str | None, dict[str, Any] | None]:
    """(place, fingerprint, tokenizer) of the split that a loader reads; the last two None without its manifest."""
    local, split, remote = (run.get(f"{loader}.dataset.{key}") for key in ("local", "split", "remote"))
    place, folder = f"{remote or local}/{split}", Path(str(local), str(split))
    try:
        if (folder / MANIFEST).is_file():
            facts = open_split(folder)
            return place, facts.fingerprint, {key: value for key, value in facts.tokenizer.items() if key != "name"}
    except OSError:  # a mixture's datasets may be fetched later
        if remote is None:
            raise
    return place, None, None
