"""Files of weights alone, in the layout that the host loads: the mean of several checkpoints, or imported weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.storage import atomic_file
from ettin_foundry.hub.load import LoadedModel, load_model
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import check_tensor, tensor_table, weights_checkpoint
from ettin_foundry.training import checkpoints


def import_weights(folder: str | Path, out: str | Path, *, objective: str | None = None,
                   overwrite: bool = False) -> tuple[EttinConfig, str]:
    """Writes the weights of a Hugging Face folder, with all that it says of itself; returns (config, objective)."""
    _check_target(out, overwrite)
    model = load_model(folder, objective)
    _save(out, model.state, model.config, {**model.record, "objective": model.objective})
    return model.config, model.objective


def average_checkpoints(sources: Sequence[str | Path], out: str | Path, *, last: int | None = None,
                        overwrite: bool = False) -> tuple[EttinConfig, list[Path]]:
    """Writes the mean of checkpoints of one kind, with a lineage that names each; returns (config, sources).

    sources: as for `load_model`; tokens and phase of the mean are the newest's. out: a .pt file.
    last: take this many of the newest complete checkpoints of the one save folder in `sources`.
    """
    _check_target(out, overwrite)
    if last is not None:
        [folder] = sources
        sources = checkpoints.complete_checkpoints(folder)[-last:]
        if len(sources) < last:
            raise ValueError(f"--last must be at most {len(sources)}, the complete checkpoints in {folder}, got {last}")
    models = [load_model(source) for source in sources]
    _check_same_kind(models)
    newest = max(models, key=lambda model: model.record.get("tokens") or 0)
    parts = [{"source": "/".join(model.source.resolve().parts[-2:]),
              **{key: model.record.get(key) for key in ("run_name", "batch", "tokens", "run_hash")}}
             for model in models]
    lineage = (*(newest.record.get("lineage") or ()), {"merged_from": parts, "objective": newest.objective})
    kept = {key: newest.record[key] for key in (
        "objective_schedule", "phase", "run_config", "tokens", "tokenizer", "tokenizer_fingerprint")
        if key in newest.record}
    _save(out, _mean(models), newest.config, {**kept, "objective": newest.objective, "lineage": lineage})
    return newest.config, [model.source for model in models]


def _check_target(out: str | Path, overwrite: bool) -> None:
    if Path(out).suffix != ".pt":
        raise ValueError(f"{out}: the name of the file to write must end in .pt")
    if Path(out).exists() and not overwrite:
        raise ValueError(f"{out}: exists; give another name, or pass --overwrite to replace it")


def _save(out: str | Path, state: dict[str, Tensor], config: EttinConfig, record: dict[str, Any]) -> None:
    with atomic_file(Path(out)) as file:
        torch.save(weights_checkpoint(state, config, **record), file)


def _check_same_kind(models: Sequence[LoadedModel]) -> None:
    """Refuses less than two checkpoints, one that is named twice, and those of different kinds."""
    if len(models) < 2:
        raise ValueError("a mean needs at least two checkpoints; name more, or raise --last")
    seen: dict[Any, Path] = {}
    kinds = [{"objective": model.objective, **dataclasses.asdict(model.config)} for model in models]
    tokens = [model.record.get("tokenizer_fingerprint") or {} for model in models]
    for model, kind, fingerprint in zip(models, kinds, tokens):
        run = tuple(model.record.get(key) for key in ("run_hash", "run_name", "batch"))
        if (same := seen.setdefault(model.source.resolve() if None in run else run, model.source)) is not model.source:
            raise ValueError(f"{model.source}: the same checkpoint as {same}; name it once")
        for name, was in kinds[0].items():
            if was != kind[name]:
                raise ValueError(f"{name}: must be the same in all, got {was!r} in {models[0].source} and "
                                 f"{kind[name]!r} in {model.source}")
        if differing := tokenizers.difference(fingerprint, tokens[0]):
            raise ValueError(f"{model.source}: its tokenizer's {differing} as in {models[0].source}")


def _mean(models: Sequence[LoadedModel]) -> dict[str, Tensor]:
    """Summed in float64 and rounded once, to fp32, tensor by tensor over files that are mapped and not read."""
    out = {}
    for row in tensor_table(models[0].config):
        total = torch.zeros(row.shape, dtype=torch.float64)
        for model in models:
            check_tensor(f"{model.source}: {row.name}", model.state[row.name], row.shape)
            total += model.state[row.name]
        out[row.name] = total.div_(len(models)).float()
    return out
