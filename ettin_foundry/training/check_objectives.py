"""Objectives and mask rates: what of them may stand together, and schedules brought to tokens.

Part of checks.py, which calls each function before any work.
"""

from __future__ import annotations

from typing import Any

from ettin_foundry.data.ramp import check_warmup
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.training.run_config import loaders, objective_schedule, refusal, total_tokens

__all__ = ["check_objectives", "resolve_schedules"]


def check_objectives(cfg: dict[str, Any]) -> None:
    """Refuses objectives and mask rates that contradict each other, between model and loaders or over the run.

    Raises:
        ValueError: naming the key, what was given and what is allowed.
    """
    schedule = objective_schedule(cfg)
    if not schedule.is_constant and total_tokens(cfg) is None:
        raise refusal("max_duration", cfg["max_duration"], "an objective that changes is a schedule on the token clock, "
                      "which needs the run's length in tokens", "Give max_duration in tok")
    for key, block in loaders(cfg):
        if key == "train_loader":
            if block.get("objective") != cfg["model"]["objective"]:
                raise refusal(f"{key}.objective", block.get("objective"), f"model.objective is "
                              f"{cfg['model']['objective']!r} and must be the same", "Set it once: variables.objective=...")
            rate = MaskRate.parse(block.get("mask_rate", 0.0), total=total_tokens(cfg), key=f"{key}.mask_rate")
            check_together(schedule, rate, f"{key}.")
        else:
            _evaluated(cfg, key, block)


def _evaluated(cfg: dict[str, Any], key: str, block: dict[str, Any]) -> list[str]:
    """The objectives that an evaluation loader asks for: a name, a list of names, or all of a schedule."""
    value = block.get("objective")
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise refusal(f"{key}.objective", value, "a name stands in it twice", "Name each objective once")
        parts = [ObjectiveSchedule.parse(name, key=f"{key}.objective") for name in value]
    else:
        parts = [ObjectiveSchedule.parse(value, total=total_tokens(cfg), key=f"{key}.objective")]
    names: list[str] = list(dict.fromkeys(name for part in parts for name in part.objectives))
    rate = block.get("mask_rate", 0.0)
    if isinstance(rate, list):
        raise refusal(f"{key}.mask_rate", rate, "an evaluation has one rate, or its losses could not be compared",
                      "Give a number, such as 0.15")
    # as many names, of which one may mask: the rate is for those that do
    shares: Any = {name: 1 / len(names) for name in names} if len(names) > 1 else names[-1]
    check_together(ObjectiveSchedule.parse(shares), MaskRate.parse(rate, key=f"{key}.mask_rate"), f"{key}.")
    return names


def resolve_schedules(cfg: dict[str, Any]) -> None:
    """Writes schedules in tokens, since model and loader do not know the run's length, and a loader for each evaluation."""
    total = total_tokens(cfg)
    cfg["model"] = {**cfg["model"], "objective": objective_schedule(cfg).plain()}
    train = cfg["train_loader"] = {**cfg["train_loader"], "objective": cfg["model"]["objective"]}
    if "mask_rate" in train:
        train["mask_rate"] = MaskRate.parse(train["mask_rate"], total=total, key="train_loader.mask_rate").plain()
    if warmup := train.get("batch_size_warmup"):
        train["batch_size_warmup"] = {**warmup, "tokens": check_warmup(warmup, cfg["global_train_batch_size"], total=total)}
    evals = []
    for key, block in list(loaders(cfg))[1:]:
        names = _evaluated(cfg, key, block)
        if len(names) == 1:
            evals.append({**block, "objective": names[0]})
            continue
        label = f"{block['label']}/" if block.get("label") else ""
        for name in names:
            own = {**block, "objective": name, "label": label + name}
            evals.append(own if name in MASKED_OBJECTIVES else {k: v for k, v in own.items() if k != "mask_rate"})
    if len(evals) == 1 and "label" not in evals[0]:
        cfg["eval_loader"] = evals[0]
    elif evals:  # the host takes a label from a list only, and hands it on from a dict
        cfg.pop("eval_loader", None)
        cfg["eval_loaders"] = evals
