"""The settings of a run as one flat table in which two spellings of one thing are equal.

`10000` is `10000.0`, `1dur` is the run's length, a key that is left out is the default that the code takes, a size is the
shape it stands for. `variables` do not count, only what they fill in.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.data import MANIFEST
from ettin_foundry.data.manifest import SplitFacts, read_json, read_manifest
from ettin_foundry.data.mixture import MIX_FORMAT, open_split
from ettin_foundry.data.stream import DEFAULT_WINDOW
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.training.keys import DEFAULTS, HOST_DEFAULTS
from ettin_foundry.training.run_config import model_config, objective_schedule, parse_time

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
    """The meaning of a resolved config; a ValueError that begins with `name` for one that cannot be read."""
    cfg = {key: value for key, value in cfg.items() if value is not None and key != "variables"}
    try:
        config, (amount, unit) = model_config(cfg), parse_time("max_duration", cfg["max_duration"])
        run = _read_blocks(cfg, config, round(amount) if unit == "tok" else None)
        values = {key: _in_one_unit(value, amount, unit) for key, value in _leaves(run)}
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: cannot be read: {error!r}; a config that train.py would take is needed") from error
    return Meaning(name, cfg, values, config)


def _read_blocks(cfg: dict[str, Any], config: EttinConfig, total: int | None) -> dict[str, Any]:
    """The config with every default filled in."""
    run, fields = {**HOST_DEFAULTS, **cfg}, dataclasses.asdict(config)
    # causal and the length follow from objective and max_seq_len, which are compared themselves
    run["model"] = {key: value for key, value in {**_filled(cfg["model"]), **fields}.items()
                    if key not in (*_SHAPE, "causal", "max_position_embeddings")}
    run["model"] |= {"size": config.size or f"layers, widths, heads: {[fields[key] for key in _SHAPE]}",
                     "objective": _plain(objective_schedule(cfg))}
    run["train_loader"] = _loader(cfg["train_loader"], total)
    run["optimizer"], run["scheduler"] = _filled(cfg["optimizer"]), _filled(cfg["scheduler"])
    if run["optimizer"].get("max_lr") == run["optimizer"]["lr"]:
        run["optimizer"].pop("max_lr")  # its default
    if parse_time("scheduler.t_decay", run["scheduler"].get("t_decay", "1dur"))[0] == 0:
        run["scheduler"].pop("alpha_f", None)  # the end of a decay, of which there is none
    callbacks = {"ettin_clock": {}, **(cfg.get("callbacks") or {})}  # the checks give the clock to every run
    run["callbacks"] = {name: _filled(block or {}, name) for name, block in callbacks.items()}
    # FULL: the checks set it, and without sharding nothing is narrowed either
    run["fsdp_config"] = {"mixed_precision": "FULL", **(cfg.get("fsdp_config") or {})}
    run["tokenizer"] = dict(cfg.get("tokenizer") or {})
    if Path(run["tokenizer"].get("name", ".")) == Path(cfg["train_loader"]["dataset"]["local"], "tokenizer"):
        run["tokenizer"]["name"] = "that of the data"  # whose fingerprint tells what it does
    _read_evaluation(run, total)
    return run


def _filled(block: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """A block of ours with its defaults; `name` for blocks without the key."""
    return {**DEFAULTS.get(name or block.get("name", ""), {}), **{k: v for k, v in block.items() if v is not None}}


def _loader(block: Mapping[str, Any], total: int | None) -> dict[str, Any]:
    filled = _filled(block, "ettin_text")
    filled["mask_rate"] = _plain(MaskRate.parse(filled["mask_rate"], total=total))
    if isinstance(filled.get("objective"), (str, dict, list)):
        filled["objective"] = _plain(ObjectiveSchedule.parse(filled["objective"], total=total))
    if filled["shuffle"]:
        filled.setdefault("shuffle_window", DEFAULT_WINDOW)
    return {**filled, "dataset": {k: v for k, v in block["dataset"].items() if v is not None}}


def _plain(schedule: ObjectiveSchedule | MaskRate) -> Any:
    """A schedule as a name or number if it never changes, else as text that keeps the order of its parts."""
    value = schedule.plain()
    if isinstance(value, list):
        contents = [{key: item for key, item in segment.items() if key != "until"} for segment in value]
        if contents[0].keys() <= {"objective", "rate"} and all(content == contents[0] for content in contents):
            [value] = contents[0].values()
    return value if isinstance(value, (str, float)) else json.dumps(value)


def _read_evaluation(run: dict[str, Any], total: int | None) -> None:
    """Each evaluation under its label with all its objectives, of which the checks make one each, and the rows it reads."""
    given = run.pop("eval_loaders", None) or run.get("eval_loader") or []
    run.pop("eval_loader", None)
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for block in [given] if isinstance(given, Mapping) else given:
        value, label = block.get("objective") or [], str(block.get("label", ""))
        if not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            value = list(ObjectiveSchedule.parse(value, total=total).objectives)
        if value == [label.rpartition("/")[2]]:
            label = label.rpartition("/")[0]
        merged, before = found.setdefault("eval_loader" if label in ("", "eval") else f"eval_loader({label})", ({}, []))
        merged.update({k: v for k, v in block.items() if k not in ("label", "objective") and (k != "mask_rate" or v != 0)})
        before += value
    for key, (block, names) in found.items():
        run[key] = {**_loader(block, total), "objective": names[0] if len(names) == 1 else sorted(names)}
    if not found:
        for key in ("eval_interval", "eval_subset_num_batches", "eval_first", "device_eval_batch_size"):
            run.pop(key, None)
        return
    rows = run["device_train_microbatch_size"]
    rows = run.setdefault("device_eval_batch_size", 1 if rows == "auto" else rows)  # the host's default
    if run["eval_subset_num_batches"] != -1:
        run["eval_subset_num_batches"] = f"{run['eval_subset_num_batches'] * rows} rows on each device"


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty block is one, and so is a list of plain values."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{key}[{i}]")
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def _in_one_unit(value: Any, amount: float, unit: str) -> Any:
    """A time as `8_500_000_000tok`, shares of the run in the run's own unit; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        number, own_unit = parse_time("", value)
    except ValueError:
        return value
    if own_unit == "dur" or number == 0:
        number, own_unit = number * amount, unit
    number = round(number) if own_unit == "tok" else round(number, 6)
    return f"{int(number) if number == int(number) else number:_}{own_unit}"


def data_of(run: Meaning, loader: str) -> tuple[str, str | None, dict[str, Any] | None]:
    """(place, fingerprint, tokenizer) of the split that a loader reads; None for both where its manifest is not here.

    Raises:
        FileNotFoundError, ValueError: its manifest is invalid.
    """
    local, split, remote = (run.get(f"{loader}.dataset.{key}") for key in ("local", "split", "remote"))
    place, path = f"{remote or local}/{split}", Path(str(local)) / str(split) / MANIFEST
    try:
        if path.is_file():
            is_mixture = (read_json(path) or {}).get("format") == MIX_FORMAT
            facts = open_split(path.parent) if is_mixture else SplitFacts(read_manifest(path.parent))
            return place, facts.fingerprint, {key: value for key, value in facts.tokenizer.items() if key != "name"}
    except OSError:  # a mixture's datasets may be fetched later
        if remote is None:
            raise
    return place, None, None
