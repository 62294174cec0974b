"""Arithmetic before a run: from a config, and the data's manifest when it is there, to steps, tokens and operations.

Nothing is built, loaded or written here. Without data, rows are taken to be full and documents to be as long as a row,
which `Plan.measured` says and the report too. What a run costs is in plan_cost.py, its memory in plan_memory.py.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.manifest import MANIFEST
from ettin_foundry.data.mixture import MixtureSplit, open_split
from ettin_foundry.data.ramp import BatchRamp
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import parse_tokens
from ettin_foundry.tools.plan_course import Course, course
from ettin_foundry.training.keys import MODEL_KEYS
from ettin_foundry.training.run_config import model_config, parse_time, total_tokens

__all__ = ["DataFacts", "Plan", "aligned", "batch_ramp", "data_facts", "kinds", "lines", "plan_with", "report", "run_plan",
           "split_facts"]


@dataclass(frozen=True)
class DataFacts:
    """What a split holds at one row length; tokens count BOS and EOS and leave padding out."""

    num_tokens: int
    num_chunks: int
    num_rows: int
    documents: tuple[tuple[int, int], ...]
    """(length with BOS and EOS, how many) of the chunks, each of which is a document to the model."""

    def attended_pairs(self, config: EttinConfig) -> int:
        """(query, key) pairs of all documents, summed over layers."""
        return sum(number * config.attended_pairs(length) for length, number in self.documents)

    @property
    def tokens_per_row(self) -> float:
        return self.num_tokens / self.num_rows

    @property
    def text_share(self) -> float:
        """Share of the tokens that are neither BOS nor EOS."""
        return 1 - 2 * self.num_chunks / self.num_tokens

    @property
    def first_share(self) -> float:
        """Share of the tokens that are the first of a document."""
        return self.num_chunks / self.num_tokens


@dataclass(frozen=True)
class Plan:
    """A run in numbers. Real tokens are those of chunks, BOS and EOS; padding is never counted."""

    size: str
    objective: str
    """As a schedule is written for people."""
    causal: bool
    """What the model is at the end: a decoder."""
    parameters: int
    max_seq_len: int
    rows_per_step: int
    """Of the full batch, after a warm-up."""
    first_rows: int
    """Rows of the first step; rows_per_step without a batch-size warm-up."""
    warmup_steps: int
    """Steps with fewer than rows_per_step rows."""
    tokens_per_step: int
    """Real tokens of an average step of the full batch."""
    num_steps: int
    num_tokens: int
    """Real tokens of the whole run."""
    epochs: float | None
    """Passes over the data, None when the data is not there."""
    shares: dict[str, float]
    """{objective: share of the run's tokens}."""
    targets_per_token: float
    """Over the whole run, whatever its schedules."""
    flops_per_token: int
    """Useful operations of forward and backward per real token, see `EttinConfig.flops`, over the whole run."""
    measured: bool
    """True when fill and lengths are the data's, False when every row is taken to be one full document."""

    @property
    def fill(self) -> float:
        """Share of a step's token positions that hold real tokens."""
        return self.tokens_per_step / (self.rows_per_step * self.max_seq_len)

    @property
    def flops(self) -> int:
        """Useful operations of the whole run."""
        return self.flops_per_token * self.num_tokens

    @property
    def flops_6n(self) -> int:
        """Operations of the whole run in the usual short count: 6 per parameter and token, attention left out."""
        return 6 * self.parameters * self.num_tokens


def data_facts(mds: MDSSplit | MixtureSplit, max_seq_len: int, *, packing: bool) -> DataFacts | None:
    """Sums over a split's manifest and length histograms; None when packed rows were not counted for this length."""
    rows = mds.rows(max_seq_len) if packing else mds.samples
    if rows is None:
        return None
    counts = np.zeros(mds.chunk_length + 1, dtype=np.int64)
    for shard in range(mds.num_shards):
        counts += mds.lengths(shard)
    documents = tuple((int(n) + 2, int(counts[n])) for n in np.flatnonzero(counts))
    num_chunks = int(mds.samples.sum())
    return DataFacts(int(mds.tokens.sum()) + 2 * num_chunks, num_chunks, int(rows.sum()), documents)


def split_facts(cfg: dict[str, Any]) -> DataFacts | None:
    """What a config's training split holds, None when it is not here.

    Raises:
        ValueError: the data's files contradict their manifest.
    """
    loader = cfg["train_loader"]
    folder = Path(loader["dataset"]["local"]) / loader["dataset"].get("split", "train")
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return data_facts(open_split(folder), cfg["max_seq_len"], packing=loader.get("packing", True))
    except OSError:
        if not loader["dataset"].get("remote"):
            raise  # else the loader fetches what is missing
    return None


def _full_rows(length: int) -> DataFacts:
    return DataFacts(length, 1, 1, ((length, 1),))


def batch_ramp(cfg: dict[str, Any], tokens_per_row: float) -> BatchRamp:
    """Rows of each step: a config's batch-size warm-up, or the same batch from the start."""
    warmup = cfg["train_loader"].get("batch_size_warmup")
    if isinstance(warmup, dict) and "tokens" in warmup:
        key = "train_loader.batch_size_warmup.tokens"
        warmup = {**warmup, "tokens": parse_tokens(key, warmup["tokens"], total_tokens(cfg))}
    return BatchRamp.build(warmup, max_size=cfg["global_train_batch_size"], tokens_per_row=tokens_per_row)


def kinds(cfg: dict[str, Any]) -> dict[bool, EttinConfig]:
    """{causal: shape}: what a config's model computes for rows of clm, and for the others (composer_model.py)."""
    config = model_config(cfg)
    window = -1 if config.causal else cfg["model"].get("window_left", -1)
    return {config.causal: config,
            not config.causal: dataclasses.replace(config, causal=not config.causal, window_left=window)}


def _flops_per_token(cfg: dict[str, Any], data: DataFacts, shares: dict[str, float], targets: float) -> float:
    """Useful operations per token: layers, head at the targets, and attention of each kind by its share of the run."""
    shapes = kinds(cfg)
    causal = shares.get("clm", 0.0)
    pairs = sum(share * data.attended_pairs(shapes[kind]) for kind, share in ((True, causal), (False, 1 - causal)) if share)
    layers = shapes[False].flops(data.num_tokens, 0, 0) + shapes[False].flops(0, 0, 1) * pairs
    return layers / data.num_tokens + shapes[False].flops(0, 1, 0) * targets


def run_plan(cfg: dict[str, Any]) -> Plan:
    """The plan of a config that `checks.check_settings` accepts.

    Raises:
        ValueError: the data's files contradict their manifest.
    """
    return plan_with(cfg, split_facts(cfg))[0]


def plan_with(cfg: dict[str, Any], facts: DataFacts | None) -> tuple[Plan, DataFacts, Course]:
    """`run_plan` of a split whose facts are known (None: not here), with what the rest of a plan is computed from."""
    config = model_config(cfg)
    data = facts or _full_rows(cfg["max_seq_len"])
    ramp = batch_ramp(cfg, data.tokens_per_row)
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    if unit == "tok":  # the first step that has this many tokens behind it
        longest = math.ceil(amount / data.tokens_per_row / ramp.min_size) + 1
        steps = bisect.bisect_left(range(longest + 1), amount, key=lambda k: ramp.first_row(k) * data.tokens_per_row)
    else:
        steps = int(amount)
    tokens = round(ramp.first_row(steps) * data.tokens_per_row)
    along = course(cfg, max(1, tokens))
    shares, targets = along.shares(), along.predicted(data.text_share, data.first_share)
    objective = str(along.schedule)
    plan = Plan(size=config.size or "custom", objective=objective, causal=config.causal, parameters=config.num_parameters,
                max_seq_len=cfg["max_seq_len"], rows_per_step=ramp.max_size, first_rows=ramp.min_size,
                warmup_steps=min(steps, ramp.num_steps), tokens_per_step=round(data.tokens_per_row * ramp.max_size),
                num_steps=steps, num_tokens=tokens, epochs=tokens / data.num_tokens if facts else None, shares=shares,
                targets_per_token=targets, flops_per_token=round(_flops_per_token(cfg, data, shares, targets)),
                measured=facts is not None)
    return plan, data, along


def lines(cfg: dict[str, Any], plan: Plan) -> list[tuple[str, str]]:
    """(name, text) of what every report begins with."""
    basis = "as counted in the data" if plan.measured else "the data is not there yet: full rows, longest documents"
    epochs = "" if plan.epochs is None else f", {plan.epochs:.3g} passes over the data"
    kind = "decoder" if plan.causal else "encoder"
    ramp = f", after {plan.warmup_steps:,} steps of {plan.first_rows:,} rows and more" if plan.warmup_steps else ""
    return [
        ("run", cfg.get("run_name") or "without a name"),
        ("model", f"{plan.size} {kind}, {plan.parameters:,} parameters, objective {plan.objective}"),
        ("step", f"{plan.rows_per_step:,} rows of {plan.max_seq_len:,}: {plan.tokens_per_step:,} real tokens, "
                 f"{plan.fill:.1%} full ({basis}){ramp}"),
        ("length", f"{plan.num_steps:,} steps, {plan.num_tokens:,} tokens{epochs}"),
        ("work", f"{plan.flops_per_token:.4g} FLOPs per token, {plan.flops:.4g} in all"),
    ]


def aligned(pairs: list[tuple[str, str]]) -> str:
    """One line a fact."""
    return "\n".join(f"{name:10} {text}" for name, text in pairs)


def report(cfg: dict[str, Any]) -> str:
    """What train.py prints before a run, one fact a line; empty for a run without our model."""
    if cfg.get("model", {}).get("name") not in MODEL_KEYS:
        return ""
    from ettin_foundry.model.attention import describe_backend  # imports torch, which the arithmetic above does without

    backend = describe_backend(cfg["model"].get("attn_impl", "auto"), cfg.get("precision", "amp_bf16"))
    return aligned([*lines(cfg, run_plan(cfg)), ("attention", f"{backend.name}: {backend.reason}"),
                    ("folder", cfg.get("save_folder") or "nothing is saved")])
