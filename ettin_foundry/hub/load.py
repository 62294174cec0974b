"""A model read from anything: a Hugging Face folder, a Composer `.pt` file, a save folder. Needs no host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.hf_config import read_record
from ettin_foundry.model.inference import Predictor
from ettin_foundry.model.transformer import Ettin
from ettin_foundry.model.weights import import_folder, tensor_table
from ettin_foundry.objectives.schedule import MASKED_OBJECTIVES, ObjectiveSchedule
from ettin_foundry.training import checkpoints


@dataclass(frozen=True)
class LoadedModel:
    source: Path  # the folder or the checkpoint itself
    state: dict[str, Tensor]  # under our names
    config: EttinConfig
    objective: str
    record: Mapping[str, Any]  # what it says of itself, as `clock.Clock.state_dict`
    facts: dict[str, Any]  # `facts_of` the record
    other: EttinConfig  # the same shape with the other attention, for rows of the other kind

    def tokenizer(self, given: str | None = None, otherwise: str | Path = "") -> Any:
        """The tokenizer that the model was trained with, by its fingerprint; ValueError where none is found.

        A run leaves a copy in its save folder. The recorded place counts where it is a folder that exists.

        given: by the user: this one or none. otherwise: where to look after what the source itself says.
        """
        wanted = self.record.get("tokenizer_fingerprint") or {}
        beside = [folder / "tokenizer" for folder in self.source.resolve().parents[:2]]  # 2: of initial/step0.pt
        places = [str(place) for place in (*(beside if wanted else ()), self.record.get("tokenizer"), otherwise)
                  if place and Path(place, "tokenizer.json").is_file()]
        if "/" in (hub_name := wanted.get("name", "")):  # of a folder it has no slash
            places.append(hub_name)
        others = []
        for place in [given] if given else places:
            tokenizer = tokenizers.load(place)
            with checkpoints.naming(Path(place)):
                found = tokenizers.fingerprint(tokenizer)
            if not (differing := wanted and tokenizers.difference(found, wanted)):
                return tokenizer
            others.append(f"{place}, whose {differing}")
        raise ValueError(f"the tokenizer must be the one that {self.source} was trained with, got "
                         f"{'; '.join(others) or 'none'}; give the folder of its data's tokenizer (--tokenizer)")

    def predictor(self, tokenizer: Any, device: Any = "cpu") -> Predictor:
        """The model in eval mode, ready to be asked."""
        model = Ettin(self.config, other=self.other)
        model.load_state_dict(self.state)
        return Predictor(model.eval().to(device), tokenizer, self.objective)


def load_model(source: str | Path, objective: str | None = None, *,
               default_objective: str | None = None) -> LoadedModel:
    """Reads a model from a Hugging Face folder, or from what `checkpoints.load_model_state` reads.

    objective: of an encoder's folder that does not say; of a checkpoint, another objective that it was trained on.
    default_objective: of an encoder's folder that does not say, where none is given.
    """
    with checkpoints.naming(Path(source)):
        source = Path(source)
        if (source / "config.json").is_file():
            state, config, stated = import_folder(source)
            chosen = stated or objective or default_objective
            if (stated and objective not in (None, stated)) or (stated is None and chosen not in MASKED_OBJECTIVES):
                possible = stated or "mlm (official encoders) or mntp (those made from decoders)"
                raise ValueError(f"--objective must be {possible} for {source}, got {objective!r}")
            has_tokenizer = (source / "tokenizer.json").is_file()
            record = {**read_record(source), "tokenizer": str(source.resolve()), "tokenizer_fingerprint":
                      tokenizers.fingerprint(tokenizers.load(source)) if has_tokenizer else None}
            other = config.with_causal(not config.causal)
            return LoadedModel(source, state, config, str(chosen), record, facts_of(record), other)
        source = checkpoints.locate(source)
        state, record = checkpoints.load_model_state(source)
        if not record.get("config"):
            raise ValueError(f"{source}: holds no record of its config; give a checkpoint of ettin_foundry's runs")
        chosen, config, other = chosen_objective(source, record, objective)
        shapes = {row.name: row.shape for row in tensor_table(config)}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError(f"{source}: its tensors are not those of its config; give another checkpoint")
        return LoadedModel(source, state, config, chosen, record, facts_of(record), other)


def chosen_objective(path: Path, record: Mapping[str, Any], asked: str | None) -> tuple[str, EttinConfig, EttinConfig]:
    """(objective, config, config with the other attention) that a checkpoint is read as: what its run ends with, or the
    one asked for, if it has been trained on that."""
    config, chosen = EttinConfig(**record["config"]), asked or record["objective"]
    schedule = ObjectiveSchedule.parse(record.get("objective_schedule") or record["objective"])
    if chosen not in schedule.objectives:
        raise ValueError(f"--objective must be {' or '.join(schedule.objectives)} for {path}, got {asked!r}; it was "
                         f"trained for {record.get('tokens') or 0:,} tokens of {schedule}")
    # an explicit window belongs to rows of clm
    explicit = json.loads(record.get("run_config") or "{}").get("model", {}).get("window_left", -1)
    other = config.with_causal(not config.causal, -1 if config.causal else explicit)
    configs = {config.causal: config, other.causal: other}
    return chosen, configs[chosen == "clm"], configs[chosen != "clm"]


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that `card.card` takes, of a record of `clock.Clock`."""
    lineage = [dict(entry) for entry in record.get("lineage") or ()]
    tokens = int(record.get("tokens") or 0) + sum(entry.get("tokens") or 0 for entry in lineage)
    facts: dict[str, Any] = {"tokens": tokens or None, "phase": record.get("phase"), "lineage": lineage}
    schedule = record.get("objective_schedule")
    if schedule and len((parsed := ObjectiveSchedule.parse(schedule)).objectives) > 1:
        facts["objective_schedule"] = str(parsed)
    if record.get("run_hash") and record.get("batch") is not None:
        facts["checkpoint"] = {key: record.get(key) for key in ("run_name", "phase", "batch", "run_hash")}
    return facts
