"""A model read from anything: a Hugging Face folder, a Composer `.pt` file, a save folder."""

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


@dataclass(frozen=True)
class LoadedModel:
    source: Path
    state: dict[str, Tensor]  # under our names
    config: EttinConfig
    objective: str
    tokenizer: str | None  # its folder or name, if the source names one
    facts: dict[str, Any] = field(default_factory=dict)  # of `card.FACTS`

    def tokenizer_name(self, given: str | None = None) -> str:
        """The tokenizer given, or else the source's own; neither raises."""
        if not (name := given or self.tokenizer):
            raise ValueError(f"--tokenizer must be given, for {self.source} names none; pass the data's tokenizer folder")
        return name


def load_model(source: str | Path, objective: str | None = None, *, default_objective: str | None = None) -> LoadedModel:
    """Reads a model from a Hugging Face folder, or from what `checkpoints.load_model_state` reads.

    Args:
        objective: of an encoder's folder that does not say; of a checkpoint, another objective that it was trained on.
        default_objective: of an encoder's folder that does not say, where none is given.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        state, config, stated = import_folder(source)
        chosen = stated or objective or default_objective
        if (stated and objective not in (None, stated)) or (stated is None and chosen not in MASKED_OBJECTIVES):
            possible = stated or "mlm (official encoders) or mntp (those made from decoders)"
            raise ValueError(f"--objective must be {possible} for {source}, got {objective!r}")
        tokenizer = str(source) if (source / "tokenizer.json").is_file() else None
        return LoadedModel(source, state, config, str(chosen), tokenizer)
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
    """What a checkpoint is read as: what its run ends with, or another objective that it has been trained on."""
    config, schedule = EttinConfig(**record["config"]), _schedule(record)
    if asked is None:
        return record["objective"], config
    if len(schedule.objectives) == 1 or asked not in schedule.objectives:
        possible = "left out" if len(schedule.objectives) == 1 else f"one of {', '.join(schedule.objectives)}"
        raise ValueError(f"--objective must be {possible} for {path}, got {asked!r}: it was trained for "
                         f"{record.get('tokens') or 0:,} tokens of {schedule}")
    # an explicit window belongs to rows of clm
    explicit = json.loads(record.get("run_config") or "{}").get("model", {}).get("window_left", -1)
    return asked, config.with_causal(asked == "clm", explicit if asked == "clm" else -1)


def _schedule(record: Mapping[str, Any]) -> ObjectiveSchedule:
    return ObjectiveSchedule.parse(record.get("objective_schedule") or record["objective"])


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `card.FACTS` a record of `clock.Clock` holds."""
    lineage = [dict(entry) for entry in record.get("lineage") or ()]
    tokens = int(record.get("tokens") or 0) + sum(entry.get("tokens") or 0 for entry in lineage)
    facts: dict[str, Any] = {"tokens": tokens or None, "phase": record.get("phase"), "lineage": lineage}
    if len((schedule := _schedule(record)).objectives) > 1:
        facts["objective_schedule"] = str(schedule)
    if record.get("run_hash") and record.get("batch") is not None:
        facts["checkpoint"] = {key: record.get(key) for key in ("run_name", "phase", "batch", "run_hash")}
    return facts
