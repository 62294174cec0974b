"""Merged checkpoints: the mean of the weights of several, as one file of weights that says what it was made of.

Exact: products and sums are in float64, and the mean is rounded once, to fp32. Files are mapped and gone through in
stretches of about an eighth of a model, so the memory is that of one model whatever the number of checkpoints. Optimizer
states are not read. Averages kept during a run are the algorithm `ema` (ema.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ettin_foundry.hub.weights_file import check_weights_file, save_weights, stretches
from ettin_foundry.model import weights as hf
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.training import checkpoints as checkpoint

__all__ = ["last_checkpoints", "merge_checkpoints"]


def last_checkpoints(save_folder: str | Path, number: int) -> list[Path]:
    """The newest complete checkpoints of a save folder, oldest first.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds fewer.
    """
    folder = Path(save_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; --last takes a save folder of a run")
    found = checkpoint.complete_checkpoints(folder)
    if number > len(found):
        raise ValueError(f"--last: {number} given, but {folder} holds {len(found)} complete checkpoint(s). Lower it, or "
                         "keep more of them (save_interval, save_num_checkpoints_to_keep)")
    return found[len(found) - number:]


def merge_checkpoints(sources: Sequence[str | Path], out: str | Path, *, weights: Sequence[float] | None = None,
                      overwrite: bool = False) -> tuple[EttinConfig, str]:
    """Writes the weighted mean of checkpoints as `hf.weights_checkpoint` lays it out, its lineage naming each of them.

    The file exports, and starts a phase (`callbacks.ettin_phase` with `keep: weights`) or a crossing. It is of the
    newest source's tokens and phase.

    Args:
        sources: as for `checkpoint.load_model_state`. out: the .pt file to write.
        weights: one above 0 for each source; they need not sum to 1. By default all are equal.

    Returns:
        (config, objective) of the result.

    Raises:
        FileNotFoundError, ValueError: fewer than two or the same twice, another config, objective or tokenizer (with
            both values), a source without a record, NaN or infinite values, or the file exists.
    """
    out = Path(out)
    check_weights_file(out, overwrite)
    heads = [checkpoint.read_head(source) for source in sources]
    shares = _shares(heads, weights)
    for head in heads:
        if not head.record.get("config"):
            raise ValueError(f"{head.path}: holds no record of its config, so whether it fits the others is not known. "
                             "Merge checkpoints of runs of ettin_foundry")
    for head in heads[1:]:
        _check_alike(heads[0], head)
    newest = max(heads, key=lambda head: head.record.get("tokens") or 0).record
    config, objective = EttinConfig(**newest["config"]), newest["objective"]
    merged = _mean(heads, shares, config)
    entry = {"merged_from": [_describe(head, share) for head, share in zip(heads, shares)], "objective": objective}
    content = hf.weights_checkpoint(merged, config, objective=objective, tokenizer=newest.get("tokenizer"),
                                    lineage=(*(newest.get("lineage") or ()), entry))
    content["state"]["callbacks"]["Clock"].update(
        {"tokens": newest.get("tokens") or 0, "phase": newest.get("phase"), "run_config": newest.get("run_config") or "{}"},
        **{key: json.dumps(newest[key]) for key in ("objective_schedule", "tokenizer_fingerprint") if key in newest})
    save_weights(out, content)
    return config, objective


def _shares(heads: Sequence[checkpoint.Head], weights: Sequence[float] | None) -> list[float]:
    """Weights that sum to 1, after the checks that need no record."""
    if len(heads) < 2:
        raise ValueError(f"{heads[0].path if heads else 'checkpoints'}: a mean needs at least two checkpoints. Name more, "
                         "or raise --last")
    seen: dict[Any, Path] = {}
    for head in heads:
        run = (head.record.get("run_hash"), head.record.get("run_name"), head.record.get("batch"))
        for key in (head.path.resolve(), run if all(part is not None for part in run) else head.path.resolve()):
            if seen.setdefault(key, head.path) is not head.path:
                raise ValueError(f"{head.path}: the same checkpoint as {seen[key]}, which would count twice. Name it once, "
                                 "with a larger weight (--weights) if that is meant")
    if weights is None:
        return [1 / len(heads)] * len(heads)
    if len(weights) != len(heads) or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"--weights: {', '.join(map(str, weights))} given; {len(heads)} numbers above 0 are needed, one "
                         "for each checkpoint in its order")
    return [weight / math.fsum(weights) for weight in weights]


def _check_alike(first: checkpoint.Head, other: checkpoint.Head) -> None:
    a, b = first.record, other.record
    pairs = {"objective": (a.get("objective"), b.get("objective")),
             **{name: (a["config"].get(name), value) for name, value in b["config"].items()}}
    old, new = a.get("tokenizer_fingerprint"), b.get("tokenizer_fingerprint")
    if old and new:
        pairs |= {f"tokenizer {name}": (old.get(name), value) for name, value in new.items()}
    else:
        pairs["tokenizer"] = (a.get("tokenizer"), b.get("tokenizer"))
    for name, (was, now) in pairs.items():
        if was != now:
            raise ValueError(f"{name}: {was!r} in {first.path}, {now!r} in {other.path}; only models of one kind have a "
                             "mean. Merge checkpoints of one phase of one recipe")


def _mean(heads: Sequence[checkpoint.Head], shares: Sequence[float], config: EttinConfig) -> dict[str, torch.Tensor]:
    """fp32, on the CPU. Equal shares are added up and divided once, which is exact to the last rounding but one."""
    shapes = {row.name: row.shape for row in hf.tensor_table(config)}
    equal = len(set(shares)) == 1
    merged: dict[str, torch.Tensor] = {}
    for names in stretches({name: 4 * math.prod(shape) for name, shape in shapes.items()}):
        sums = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
        for head, share in zip(heads, shares):
            state, _ = checkpoint.load_model_state(head.path, names=names)
            for name in names:
                _check_tensor(head.path, name, state.get(name), shapes[name])
                sums[name].add_(state[name], alpha=1.0 if equal else share)
            del state  # and with it the mapped pages
        for name in names:
            total = sums.pop(name)
            merged[name] = (total.div_(len(heads)) if equal else total).float()
    return merged


def _check_tensor(path: Path, name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        raise ValueError(f"{path}: {name} is {'missing' if tensor is None else f'of shape {tuple(tensor.shape)}'}; its "
                         f"config needs {shape}. The checkpoint was not written by this model")
    if not all(math.isfinite(bound) for bound in tensor.aminmax()):
        raise ValueError(f"{path}: {name} has NaN or infinite values, so that run has diverged; merge earlier checkpoints")


def _describe(head: checkpoint.Head, share: float) -> dict[str, Any]:
    record: Mapping[str, Any] = head.record
    path = head.path.resolve()
    return {"source": f"{path.parent.name}/{path.name}", "weight": share,
            **{key: record.get(key) for key in ("run_name", "batch", "tokens", "run_hash")}}
