"""Reads a run's config from plain containers: times, tokens, objective, shape, loaders, text; and schedules of the lr.

What may stand in a config is checked in checks.py. Neither torch nor the host is imported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training.recipes import rows_from_tokens

FIELDS = tuple(field.name for field in dataclasses.fields(EttinConfig)
               if field.name not in ("causal", "max_position_embeddings"))
"""Fields of the shape that a config may set; the other two follow from objective and max_seq_len."""
_TIME = re.compile(r"([0-9._]+(?:e[+-]?[0-9]+)?)(tok|ba|dur|sp|sec|iter)", re.IGNORECASE)


def must_be(key: str, allowed: str, given: Any, advice: str) -> ValueError:
    """The error of a setting that cannot be: the key as one types it, what is allowed, what was given, what to do."""
    return ValueError(f"{key} must be {allowed}, got {given!r}; {advice}")


def require(fits: Any, key: str, allowed: str, given: Any, advice: str) -> None:
    """Raises `must_be` unless the setting fits."""
    if not fits:
        raise must_be(key, allowed, given, advice)


def parse_time(key: str, value: Any) -> tuple[float, str]:
    """A time of the host such as `3_000_000_000tok` as (number, unit); a ValueError that names `key` if it is none."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        return float(match[1]), match[2].lower()  # type: ignore[index]
    except (TypeError, ValueError):
        raise must_be(key, "a number with the unit tok, ba or dur", value, "the loader's one epoch never ends, so give "
                      "a time such as 8_500_000_000tok or 3000ba") from None


def total_tokens(cfg: Mapping[str, Any]) -> int | None:
    """Tokens of the run; None when max_duration is not in tokens."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    return round(amount) if unit == "tok" else None


def objective_schedule(cfg: Mapping[str, Any]) -> ObjectiveSchedule:
    """The objective of a config's model over the run's tokens."""
    value = cfg["model"].get("objective")
    total = None if isinstance(value, str) else total_tokens(cfg)  # a name alone needs no clock
    return ObjectiveSchedule.parse(value, total=total, key="model.objective")


def model_config(cfg: Mapping[str, Any]) -> EttinConfig:
    """The shape that a config asks for; under a schedule, that of the objective it ends with."""
    fields = {key: value for key, value in cfg["model"].items() if key in FIELDS}
    return EttinConfig.for_size(cfg["model"].get("size"), causal=objective_schedule(cfg).final == "clm",
                                max_position_embeddings=cfg["max_seq_len"], **fields)


def loaders(cfg: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, block) of every loader, the training loader first."""
    yield "train_loader", cfg.get("train_loader") or {}
    evals = cfg.get("eval_loaders") or cfg.get("eval_loader") or []  # the host renames a list to eval_loaders
    if isinstance(evals, Mapping):
        yield "eval_loader", dict(evals)
    else:
        yield from ((f"eval_loader[{i}]", block) for i, block in enumerate(evals))


def value_at(cfg: Any, key: str) -> Any:
    """The value of a dotted key, or None."""
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping) else None
    return cfg


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty block is a leaf."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from walk(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, f"{key}[{i}]")
    else:
        yield key, value


def without_nulls(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are set; where eval_loader is null, all that belongs to evaluation is left out on purpose."""
    evaluates = cfg.get("eval_loader", ...) is not None or cfg.get("eval_loaders")
    return {key: value for key, value in cfg.items()
            if value is not None and (evaluates or not key.startswith("eval_"))}


def config_text(cfg: Mapping[str, Any]) -> str:
    """The resolved config as canonical JSON, without nulls; the same on any number of processes."""
    derived = ("n_gpus", "device_train_batch_size", "device_train_grad_accum")  # by the host
    config = {key: value for key, value in without_nulls(cfg).items() if key not in derived}
    if "eval_loaders" in config:  # the host's name for a list
        config["eval_loader"] = config.pop("eval_loaders")
    bare = {key: value for key, value in config.items()
            if key not in ("device_train_microbatch_size", "device_eval_batch_size")}
    if (rows := rows_from_tokens(bare)).items() <= config.items():  # made of tokens for this number of processes
        config |= rows_from_tokens(bare, world_size=1) if rows else {}
    micro = config.get("device_train_microbatch_size")
    if config.get("device_eval_batch_size") == (1 if micro == "auto" else micro):  # the host's default
        config.pop("device_eval_batch_size", None)
    if callbacks := config.get("callbacks"):
        config["callbacks"] = {name: block for name, block in callbacks.items() if name != "ettin_clock"}
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def config_hash(text: str) -> str:
    """sha256 of a `config_text`, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def warmup_stable_decay(t: float, *, warmup: float, decay: float, total: float, alpha_f: float) -> float:
    """Factor on the peak lr at time t: linear from 1e-10 to 1, flat, then linear to `alpha_f` over the last `decay`.

    All times in one unit. Source: ModernBERT's src/scheduler.py, lines 81-131 (decay 0 divides by 0 there; here: flat).
    """
    if t < warmup:
        return 1e-10 + (1 - 1e-10) * (t / warmup)
    if decay == 0 or t < total - decay:
        return 1.0
    return 1.0 - min(1.0, (t - (total - decay)) / decay) * (1.0 - alpha_f)


def one_minus_sqrt(t: float, *, decay: float, total: float, alpha_f: float) -> float:
    """Factor on the peak lr at time t: flat, then alpha_f + (1 - alpha_f)(1 - sqrt(x)) over the last `decay`.

    x runs from 0 to 1 in that stretch. All times in one unit. Source: ModernBERT's src/scheduler.py, lines 258-289.
    """
    x = min(1.0, max(0.0, (t - (total - decay)) / decay))
    return alpha_f + (1.0 - alpha_f) * (1.0 - math.sqrt(x))


SCHEDULES = {"warmup_stable_decay": {"t_warmup": "0tok", "t_decay": "0tok", "t_max": "1dur"},
             "one_minus_sqrt": {"t_decay": "1dur", "t_max": "1dur"}}
"""Learning-rate schedules of ours: {name: {time: default}}."""


def schedule_factor(name: str, times: Mapping[str, tuple[float, str]], alpha_f: float, run: tuple[float, str],
                    clock: Callable[[str], float]) -> float:
    """Factor on the peak lr of a schedule of ours, each of whose times is read on the clock of its own unit.

    In a run of batches, the end in tokens is estimated from those so far. times: as in `SCHEDULES`, and run:
    max_duration, as (number, unit). clock: the present in a unit.
    """
    def read(key: str) -> tuple[float, float, float]:
        """(present, length of that time, end of the schedule) in one unit."""
        (length, unit), (end, end_unit) = ((value * run[0], run[1]) if unit == "dur" else (value, unit)
                                           for value, unit in (times[key], times["t_max"]))
        now, past = clock(unit), clock(end_unit)
        if unit != end_unit:
            end = end * now / past if past else math.inf
        return now, length, end

    now, decay, end = read("t_decay")
    if name == "one_minus_sqrt":
        return one_minus_sqrt(now, decay=decay, total=end, alpha_f=alpha_f)
    present, warmup, _ = read("t_warmup")
    if present < warmup:
        return warmup_stable_decay(present, warmup=warmup, decay=0.0, total=0.0, alpha_f=1.0)
    return warmup_stable_decay(now, warmup=0.0, decay=decay, total=end, alpha_f=alpha_f)


def lr_factor(scheduler: Mapping[str, Any], run: tuple[float, str], tokens: int, batch: int) -> float | None:
    """`schedule_factor` of a scheduler's block after so many tokens and batches; None for a scheduler of the host."""
    if scheduler["name"] not in SCHEDULES:
        return None
    times = {key: parse_time(f"scheduler.{key}", scheduler.get(key, default))
             for key, default in SCHEDULES[scheduler["name"]].items()}
    clock = {"tok": tokens, "ba": batch}
    return schedule_factor(scheduler["name"], times, scheduler.get("alpha_f", 0.0), run, lambda unit: clock[unit])
