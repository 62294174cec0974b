"""A model read from anything: a Hugging Face folder, a Composer `.pt` file, a sharded checkpoint, a save folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ettin_foundry.model.config import MASKED_OBJECTIVES, EttinConfig
from ettin_foundry.model.weights import import_folder
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training.checkpoints import load_model_state

__all__ = ["LoadedModel", "build_model", "chosen_objective", "facts_of", "load_model"]


@dataclass(frozen=True)
class LoadedModel:
    """Weights under our names, and what is known of them."""

    source: Path
    state: dict[str, Tensor]
    config: EttinConfig
    objective: str
    tokenizer: str | None
    """Folder or name of the tokenizer, if the source names one."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What a model card can be told, see `card.FACTS`."""

    def tokenizer_name(self, given: str | None = None) -> str:
        """The tokenizer given, or else the source's own; neither is an error."""
        if not (name := given or self.tokenizer):
            raise ValueError(f"--tokenizer must be given, for {self.source} names none; pass the data's tokenizer folder")
        return name


def load_model(source: str | Path, objective: str | None = None, *, default_objective: str | None = None) -> LoadedModel:
    """Reads a model from a Hugging Face folder, or from what `checkpoints.load_model_state` reads.

    Args:
        objective: of an encoder's folder that does not say; of a checkpoint, another objective that it was trained on.
        default_objective: taken for an encoder's folder that does not say, where none is given.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        state, config, stated = import_folder(source)
        chosen = stated or objective or default_objective
        if (stated and objective not in (None, stated)) or (stated is None and chosen not in MASKED_OBJECTIVES):
            possible = stated or "mlm (official encoders) or mntp (those made from decoders)"
            raise ValueError(f"--objective must be {possible} for {source}, got {objective!r}")
        has_tokenizer = (source / "tokenizer.json").is_file()
        return LoadedModel(source, state, config, str(chosen), str(source) if has_tokenizer else None)
    state, record = load_model_state(source)
    if not record.get("config"):
        raise ValueError(f"{source}: holds no record of its config; only checkpoints of ettin_foundry's runs can be read")
    chosen, config = chosen_objective(source, record, objective)
    return LoadedModel(source, state, config, chosen, record.get("tokenizer"), facts_of(record))


def build_model(loaded: LoadedModel, tokenizer: Any) -> Any:
    """An `EttinModel` with these weights and this tokenizer, in eval mode."""
    from ettin_foundry.model.composer import EttinModel

    fields = dataclasses.asdict(loaded.config)
    del fields["causal"]
    model = EttinModel(tokenizer, size="nano", objective=loaded.objective, max_seq_len=fields.pop("max_position_embeddings"),
                       **fields)  # every field of the size is replaced
    model.model.load_state_dict(loaded.state)
    return model.eval()


def chosen_objective(path: str | Path, record: Mapping[str, Any], asked: str | None) -> tuple[str, EttinConfig]:
    """What a checkpoint is read as: what its run ends with, or another objective that it has been trained on.

    A run of several objectives has one set of weights; read as the other kind it has that kind's window.
    """
    config, final = EttinConfig(**record["config"]), record["objective"]
    schedule, trained = _trained(record)
    if asked is None:
        return final, config
    if schedule.is_single or asked not in trained:
        possible = "left out" if schedule.is_single else f"one of {', '.join(trained)}"
        raise ValueError(f"--objective must be {possible} for {path}, got {asked!r}: it was trained for "
                         f"{int(record.get('tokens') or 0):,} tokens of {schedule}")
    # an explicit window belongs to rows of clm
    explicit = json.loads(record.get("run_config") or "{}").get("model", {}).get("window_left", -1)
    return asked, config.with_causal(asked == "clm", explicit if asked == "clm" else -1)


def _trained(record: Mapping[str, Any]) -> tuple[ObjectiveSchedule, list[str]]:
    """The run's objectives, and those that its tokens so far had."""
    schedule = ObjectiveSchedule.parse(record.get("objective_schedule") or record["objective"])
    breakpoints = schedule.breakpoints(int(record.get("tokens") or 0))
    return schedule, list(dict.fromkeys(name for tokens in breakpoints for name in schedule.at(tokens)))


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What card and config.json can be told from a record of `clock.Clock` (see `card.FACTS`)."""
    lineage = [dict(entry) for entry in record.get("lineage") or ()]
    tokens = int(record.get("tokens") or 0) + sum(entry.get("tokens") or 0 for entry in lineage)
    facts: dict[str, Any] = {"tokens": tokens or None, "phase": record.get("phase"), "lineage": lineage}
    schedule, trained = _trained(record)
    if not schedule.is_single:
        so_far = "" if len(trained) == len(schedule.objectives) else f" (up to here: {', '.join(trained) or 'none'})"
        facts["objective_schedule"] = f"{schedule}{so_far}"
    if record.get("run_hash") and record.get("batch") is not None:
        facts["checkpoint"] = {key: record.get(key) for key in ("run_name", "phase", "batch", "run_hash")}
    return facts
