"""Files of weights alone: the mean of several checkpoints, or imported weights, in the layout that the host loads.

A mean is exact: products and sums are in float64, and the mean is rounded once, to fp32. The files are mapped and summed
tensor by tensor, so memory holds the mean and one tensor in float64, whatever their number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ettin_foundry.data.storage import atomic_file
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import check_tensor, tensor_table, weights_checkpoint
from ettin_foundry.training import checkpoints


def check_weights_file(out: str | Path, overwrite: bool) -> None:
    """Refuses a name that is not .pt, or that is in use without `overwrite`."""
    if Path(out).suffix != ".pt":
        raise ValueError(f"{out}: the name of the file to write must end in .pt")
    if Path(out).exists() and not overwrite:
        raise ValueError(f"{out}: exists; give another name, or pass --overwrite to replace it")


def save_weights(out: str | Path, content: Mapping[str, Any]) -> None:
    """Writes what `weights.weights_checkpoint` made; what does not read back the same is an error and not left there."""
    with atomic_file(Path(out)) as file:
        torch.save(dict(content), file)
        file.flush()
        stored = torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)["state"]["model"]
        if any(not torch.equal(stored[name], tensor) for name, tensor in content["state"]["model"].items()):
            raise ValueError(f"{out}: what was written does not read back the same; check the disk, then try again")


def last_checkpoints(save_folder: str | Path, number: int) -> list[Path]:
    """The newest complete checkpoints of a save folder, oldest first; fewer than `number` are an error."""
    found = checkpoints.complete_checkpoints(save_folder)
    if number > len(found):
        raise ValueError(f"--last must be at most {len(found)}, the complete checkpoints in {save_folder}, got {number}")
    return found[len(found) - number:]


def average_checkpoints(sources: Sequence[str | Path], out: str | Path, *, weights: Sequence[float] | None = None,
                        overwrite: bool = False) -> tuple[EttinConfig, str]:
    """Writes the weighted mean of checkpoints of one kind, with a lineage that names each; returns (config, objective).

    Args:
        sources: as for `checkpoints.load_model_state`; tokens and phase of the mean are the newest's. out: a .pt file.
        weights: one above 0 for each source; they need not sum to 1. By default all are equal.
    """
    check_weights_file(out, overwrite)
    heads = [checkpoints.read_head(source) for source in sources]
    shares = _check_sources(heads, weights)
    newest = max(heads, key=lambda head: head.record.get("tokens") or 0).record
    config, objective = EttinConfig(**newest["config"]), newest["objective"]
    parts = [{"source": "/".join(head.path.resolve().parts[-2:]), "weight": share,
              **{key: head.record.get(key) for key in ("run_name", "batch", "tokens", "run_hash")}}
             for head, share in zip(heads, shares)]
    lineage = (*(newest.get("lineage") or ()), {"merged_from": parts, "objective": objective})
    content = weights_checkpoint(_mean(heads, shares, config), config, objective=objective,
                                 tokenizer=newest.get("tokenizer"), lineage=lineage)
    content["state"]["callbacks"]["Clock"].update(
        {"tokens": newest.get("tokens") or 0, "phase": newest.get("phase"), "run_config": newest.get("run_config") or "{}"},
        **{key: json.dumps(newest[key]) for key in ("objective_schedule", "tokenizer_fingerprint") if key in newest})
    save_weights(out, content)
    return config, objective


def _check_sources(heads: Sequence[checkpoints.Head], weights: Sequence[float] | None) -> list[float]:
    """Weights that sum to 1, of at least two checkpoints that are alike and not the same."""
    if len(heads) < 2:
        raise ValueError("a mean needs at least two checkpoints; name more, or raise --last")
    has_fingerprints = all(head.record.get("tokenizer_fingerprint") for head in heads)
    seen: dict[Any, Path] = {}
    kinds = []
    for head in heads:
        if not head.record.get("config"):
            raise ValueError(f"{head.path}: holds no record of its config; average checkpoints of ettin_foundry's runs")
        run = tuple(head.record.get(key) for key in ("run_hash", "run_name", "batch"))
        for key in (head.path.resolve(), head.path.resolve() if None in run else run):
            if seen.setdefault(key, head.path) is not head.path:
                raise ValueError(f"{head.path}: the same checkpoint as {seen[key]}; name it once, and set --weights")
        tokenizer = head.record["tokenizer_fingerprint"] if has_fingerprints else {"": head.record.get("tokenizer")}
        kinds.append({"objective": head.record.get("objective"), **head.record["config"],
                      **{f"tokenizer {name}": value for name, value in tokenizer.items()}})
        for name in {**kinds[0], **kinds[-1]}:
            if (was := kinds[0].get(name)) != (now := kinds[-1].get(name)):
                raise ValueError(f"{name}: must be the same in all, got {was!r} in {heads[0].path}, {now!r} in {head.path}")
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
