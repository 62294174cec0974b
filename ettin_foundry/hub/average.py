"""Files of weights alone, in the layout that the host loads: the mean of several checkpoints, or imported weights.

A mean is exact: summed in float64 and rounded once, to fp32, tensor by tensor over files that are mapped and not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ettin_foundry.data.storage import atomic_file
from ettin_foundry.hub.load import load_model
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import check_tensor, tensor_table, weights_checkpoint
from ettin_foundry.training import checkpoints

# of the newest checkpoint's record, what its mean says too
_KEPT = ("objective", "objective_schedule", "phase", "run_config", "tokens", "tokenizer", "tokenizer_fingerprint")


def _check_target(out: str | Path, overwrite: bool) -> None:
    if Path(out).suffix != ".pt":
        raise ValueError(f"{out}: the name of the file to write must end in .pt")
    if Path(out).exists() and not overwrite:
        raise ValueError(f"{out}: exists; give another name, or pass --overwrite to replace it")


def import_weights(folder: str | Path, out: str | Path, *, objective: str | None = None,
                   overwrite: bool = False) -> tuple[EttinConfig, str]:
    """Writes the weights of a Hugging Face folder, with all that it says of itself; returns (config, objective)."""
    _check_target(out, overwrite)
    model = load_model(folder, objective)
    with atomic_file(Path(out)) as file:
        record = {**model.record, "objective": model.objective}
        torch.save(weights_checkpoint(model.state, model.config, **record), file)
    return model.config, model.objective


def average_checkpoints(sources: Sequence[str | Path], out: str | Path, *, last: int | None = None,
                        weights: Sequence[float] | None = None,
                        overwrite: bool = False) -> tuple[EttinConfig, list[Path]]:
    """Writes the weighted mean of checkpoints of one kind, with a lineage that names each; returns (config, sources).

    Args:
        sources: as for `checkpoints.load_model_state`; tokens and phase of the mean are the newest's. out: a .pt file.
        last: take this many of the newest complete checkpoints of the one save folder in `sources`.
        weights: one above 0 for each source; they need not sum to 1. By default all are equal.
    """
    _check_target(out, overwrite)
    if last is not None:
        [folder] = sources
        sources = checkpoints.complete_checkpoints(folder)[-last:]
        if len(sources) < last:
            raise ValueError(f"--last must be at most {len(sources)}, the complete checkpoints in {folder}, got {last}")
    heads = [checkpoints.read_head(source) for source in sources]
    shares = _check_sources(heads, weights)
    record = max((head.record for head in heads), key=lambda record: record.get("tokens") or 0)
    config = EttinConfig(**record["config"])
    parts = [{"source": "/".join(head.path.resolve().parts[-2:]), "weight": share,
              **{key: head.record.get(key) for key in ("run_name", "batch", "tokens", "run_hash")}}
             for head, share in zip(heads, shares)]
    lineage = (*(record.get("lineage") or ()), {"merged_from": parts, "objective": record["objective"]})
    kept = {key: record[key] for key in _KEPT if key in record}
    content = weights_checkpoint(_mean(heads, shares, config), config, **{**kept, "lineage": lineage})
    with atomic_file(Path(out)) as file:
        torch.save(content, file)
    return config, [head.path for head in heads]


def _check_sources(heads: Sequence[checkpoints.Head], weights: Sequence[float] | None) -> list[float]:
    """Weights that sum to 1, of at least two checkpoints that are alike and not the same."""
    if len(heads) < 2:
        raise ValueError("a mean needs at least two checkpoints; name more, or raise --last")
    seen: dict[Any, Path] = {}
    kinds = []
    for head in heads:
        record = head.record
        if not record.get("config"):
            raise ValueError(f"{head.path}: holds no record of its config; average checkpoints of ettin_foundry's runs")
        run = tuple(record.get(key) for key in ("run_hash", "run_name", "batch"))
        for key in (head.path.resolve(), head.path.resolve() if None in run else run):
            if seen.setdefault(key, head.path) is not head.path:
                raise ValueError(f"{head.path}: the same checkpoint as {seen[key]}; name it once, and set --weights")
        tokenizer = {f"tokenizer {key}": value for key, value in (record.get("tokenizer_fingerprint") or {}).items()
                     if key != "name"}
        kinds.append({"objective": record.get("objective"), **record["config"], **tokenizer})
        for name, was in kinds[0].items():
            if was != (now := kinds[-1].get(name)):
                raise ValueError(f"{name}: must be the same in all, got {was!r} in {heads[0].path} and {now!r} in "
                                 f"{head.path}")
    if weights is None:
        return [1 / len(heads)] * len(heads)
    if len(weights) != len(heads) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"--weights must be {len(heads)} numbers above 0, got {', '.join(map(str, weights))}")
    return [weight / math.fsum(weights) for weight in weights]


def _mean(heads: Sequence[checkpoints.Head], shares: Sequence[float], config: EttinConfig) -> dict[str, torch.Tensor]:
    """fp32, on the CPU. Equal shares are added up and divided once, which is exact to the last rounding but one."""
    states, equal, out = [checkpoints.load_model_state(head.path)[0] for head in heads], len(set(shares)) == 1, {}
    for row in tensor_table(config):
        total = torch.zeros(row.shape, dtype=torch.float64)
        for head, share, state in zip(heads, shares, states):
            check_tensor(f"{head.path}: {row.name}", state[row.name], row.shape)
            total.add_(state[row.name], alpha=1.0 if equal else share)
        out[row.name] = total.div_(len(heads) if equal else 1).float()
    return out
