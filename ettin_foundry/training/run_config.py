"""What a run's config says: times, tokens, objective and shape, read out of plain containers.

Nothing is refused here but what cannot be read; what may stand in a config is checked in checks.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ettin_foundry.model.config import OBJECTIVES, EttinConfig
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training.keys import FIELDS

__all__ = ["TIME", "loaders", "model_config", "objective_schedule", "parse_time", "refusal", "total_tokens", "walk"]

TIME = re.compile(r"([0-9._]+(?:e[+-]?[0-9]+)?)(tok|ba|dur|ep|sp|sec|iter)", re.IGNORECASE)
"""A time of the host: number and unit."""


def refusal(key: str, given: Any, allowed: str, advice: str) -> ValueError:
    """The error of a setting that cannot be: the key as one types it, what was given, what is allowed, what to do."""
    return ValueError(f"{key}: {given!r} given; {allowed}. {advice}")


def parse_time(key: str, value: Any) -> tuple[float, str]:
    """A time such as `3_000_000_000tok` as (number, unit).

    Raises:
        ValueError: not a time, or one in epochs; it names `key`.
    """
    match = TIME.fullmatch(value) if isinstance(value, str) else None
    if (isinstance(value, int) and not isinstance(value, bool)) or (match and match[2].lower() == "ep"):
        raise refusal(key, value, "it means epochs, and our loader is endless: its one epoch never ends",
                      "Give tokens or batches, such as 8_500_000_000tok or 3000ba")
    try:
        return float(match[1]), match[2].lower()  # type: ignore[index]
    except (TypeError, ValueError):
        raise refusal(key, value, "a number with its unit is needed: tok, ba or dur",
                      "Write it like 8_500_000_000tok, 3000ba or 0.2dur") from None


def total_tokens(cfg: dict[str, Any]) -> int | None:
    """Tokens of the run, which a `dur` in a schedule is a share of; None when max_duration is not in tokens."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    return round(amount) if unit == "tok" else None


def objective_schedule(cfg: dict[str, Any]) -> ObjectiveSchedule:
    """The objective of a config's model over the run's tokens.

    Raises:
        ValueError: an unknown objective, or a schedule with a gap, an overlap, or past the end of the run.
    """
    value = cfg["model"].get("objective")
    if value is None:
        raise refusal("model.objective", value, f"one of {', '.join(OBJECTIVES)} is needed",
                      "clm makes a decoder, the others an encoder")
    total = None if isinstance(value, str) else total_tokens(cfg)  # a name alone needs no clock
    return ObjectiveSchedule.parse(value, total=total, key="model.objective")


def model_config(cfg: dict[str, Any]) -> EttinConfig:
    """The shape that a config's model block asks for; under a schedule, that of the objective it ends with.

    Raises:
        ValueError: an unknown size or objective, or a field out of range; it names the key.
    """
    model = cfg["model"]
    fields = {key: value for key, value in model.items() if key in FIELDS}
    return EttinConfig.for_size(model.get("size"), causal=objective_schedule(cfg).final == "clm",
                                max_position_embeddings=cfg["max_seq_len"], **fields)


def loaders(cfg: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, block) of every loader, the training loader first."""
    yield "train_loader", cfg.get("train_loader") or {}
    evals = cfg.get("eval_loaders") or cfg.get("eval_loader") or []  # the host renames a list to eval_loaders
    if isinstance(evals, dict):
        yield "eval_loader", evals
    else:
        yield from ((f"eval_loader[{i}]", block) for i, block in enumerate(evals))


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, f"{key}[{i}]")
    else:
        yield key, value
