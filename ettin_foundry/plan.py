"""Arithmetic before a run: from a config, and the data's manifest when it is there, to steps, tokens and operations.

Nothing is built, loaded or written here. Without data, rows are taken to be full and documents to be as long as a row,
which `Plan.measured` says and the report too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.checks import model_config, parse_time
from ettin_foundry.config import EttinConfig
from ettin_foundry.manifest import MANIFEST
from ettin_foundry.mds import MDSSet
from ettin_foundry.mix_set import MixSet, open_set

__all__ = ["DataFacts", "Plan", "data_facts", "report", "run_plan"]


@dataclass(frozen=True)
class DataFacts:
    """What a split holds at one row length; tokens count BOS and EOS and leave padding out."""

    num_tokens: int
    num_chunks: int
    num_rows: int
    attended_pairs: int
    """(query, key) pairs of all documents, summed over layers."""


@dataclass(frozen=True)
class Plan:
    """A run in numbers. Real tokens are those of chunks, BOS and EOS; padding is never counted."""

    size: str
    objective: str
    parameters: int
    max_seq_len: int
    rows_per_step: int
    tokens_per_step: int
    """Real tokens of an average step."""
    num_steps: int
    num_tokens: int
    """Real tokens of the whole run."""
    epochs: float | None
    """Passes over the data, None when the data is not there."""
    flops_per_token: int
    """Operations of forward and backward per real token, see `EttinConfig.flops`."""
    measured: bool
    """True when fill and lengths are the data's, False when every row is taken to be one full document."""

    @property
    def fill(self) -> float:
        """Share of a step's token positions that hold real tokens."""
        return self.tokens_per_step / (self.rows_per_step * self.max_seq_len)

    @property
    def flops(self) -> int:
        """Operations of the whole run."""
        return self.flops_per_token * self.num_tokens


def data_facts(mds: MDSSet | MixSet, config: EttinConfig, max_seq_len: int, *, packing: bool) -> DataFacts | None:
    """Sums over a split's manifest and length histograms; None when packed rows were not counted for this length."""
    rows = mds.rows(max_seq_len) if packing else mds.samples
    if rows is None:
        return None
    counts = np.zeros(mds.chunk_length + 1, dtype=np.int64)
    for shard in range(mds.num_shards):
        counts += mds.lengths(shard)
    lengths = np.flatnonzero(counts)
    pairs = sum(int(counts[n]) * config.attended_pairs(int(n) + 2) for n in lengths)
    num_chunks = int(mds.samples.sum())
    return DataFacts(int(mds.tokens.sum()) + 2 * num_chunks, num_chunks, int(rows.sum()), pairs)


def run_plan(cfg: dict[str, Any]) -> Plan:
    """The plan of a config that `checks.check_settings` accepts.

    Raises:
        ValueError: the data's files contradict their manifest.
    """
    config, loader = model_config(cfg), cfg["train_loader"]
    length, rows, packing = cfg["max_seq_len"], cfg["global_train_batch_size"], loader.get("packing", True)
    folder = Path(loader["dataset"]["local"]) / loader["dataset"].get("split", "train")
    facts = None
    if (folder / MANIFEST).is_file():
        try:
            facts = data_facts(open_set(folder), config, length, packing=packing)
        except OSError:
            if not loader["dataset"].get("remote"):
                raise  # else the loader fetches what is missing
    data = facts or DataFacts(length, 1, 1, config.attended_pairs(length))
    if cfg["model"]["objective"] == "clm":
        targets = data.num_tokens - data.num_chunks  # every token but the first of each document
    else:
        targets = round((data.num_tokens - 2 * data.num_chunks) * loader["mask_rate"])
    tokens_per_step = data.num_tokens * rows / data.num_rows
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    steps = math.ceil(amount / tokens_per_step) if unit == "tok" else int(amount)
    tokens = round(steps * tokens_per_step)
    return Plan(size=config.size or "custom", objective=cfg["model"]["objective"], parameters=config.num_parameters,
                max_seq_len=length, rows_per_step=rows, tokens_per_step=round(tokens_per_step), num_steps=steps,
                num_tokens=tokens, epochs=tokens / data.num_tokens if facts else None,
                flops_per_token=round(config.flops(data.num_tokens, targets, data.attended_pairs) / data.num_tokens),
                measured=facts is not None)


def report(cfg: dict[str, Any]) -> str:
    """What train.py prints before a run, one fact a line; empty for a run without our model."""
    if cfg.get("model", {}).get("name") != "ettin":
        return ""
    from ettin_foundry.attention import describe_backend  # imports torch, which the arithmetic above does without

    plan = run_plan(cfg)
    backend = describe_backend(cfg["model"].get("attn_impl", "auto"), cfg.get("precision", "amp_bf16"))
    basis = "as counted in the data" if plan.measured else "the data is not there yet: full rows, longest documents"
    epochs = "" if plan.epochs is None else f", {plan.epochs:.3g} passes over the data"
    kind = "decoder" if plan.objective == "clm" else "encoder"
    lines = [
        ("run", cfg.get("run_name") or "without a name"),
        ("model", f"{plan.size} {kind}, {plan.parameters:,} parameters, objective {plan.objective}"),
        ("step", f"{plan.rows_per_step:,} rows of {plan.max_seq_len:,}: {plan.tokens_per_step:,} real tokens, "
                 f"{plan.fill:.1%} full ({basis})"),
        ("length", f"{plan.num_steps:,} steps, {plan.num_tokens:,} tokens{epochs}"),
        ("work", f"{plan.flops_per_token:.4g} FLOPs per token, {plan.flops:.4g} in all"),
        ("attention", f"{backend.name}: {backend.reason}"),
        ("folder", cfg.get("save_folder") or "nothing is saved"),
    ]
    return "\n".join(f"{name:10} {text}" for name, text in lines)
