"""What a run will take, from its config and its data's manifest: steps, tokens, operations, memory, hours, disk space.

Nothing is built, loaded or written. Without the data, rows are taken to be full and documents to be as long as a row.
Hours assume a share of the GPU's peak, counting 6 operations per parameter and token: the one that the original reached
at a published size, or `--mfu`. Evaluations, checkpoint writing and start-up are not counted.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ettin_foundry.data.inspect import render
from ettin_foundry.data.mixture import open_split
from ettin_foundry.data.stream import BatchRamp, check_warmup
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.training import run_config
from ettin_foundry.training.checks import check_settings
from ettin_foundry.training.run_config import parse_time, total_tokens

MARGIN = 0.1  # share of the memory left free when a microbatch is said to fit: for CUDA, NCCL, fragments, a form's 5%
GPUS = {"h100": (1.979e15 / 2, 79.1), "h100-pcie": (1.513e15 / 2, 79.1), "h200": (1.979e15 / 2, 139.8),
        "a100": (312e12, 79.1), "a100-40gb": (312e12, 39.4), "a10": (125e12, 22.0)}
"""{name: (peak FLOP/s in dense bf16 as in Composer's speed_monitor.py, memory in GiB)}; h100, h200, a100 are SXM."""

# Ettin's repository, pretraining/README.md: hours for 2T tokens, all phases, on 4x H100
ORIGINAL_HOURS = {"17m": 141, "32m": 212, "68m": 300, "150m": 470, "400m": 950, "1b": 2170}
ORIGINAL_TOKENS, ORIGINAL_GPUS = 2_000_000_000_000, 4
_NO_DATA = "no rows of this length are counted on this machine: taken as full, documents as long as a row"


class DataFacts(NamedTuple):
    """What a split holds at one row length; tokens count BOS and EOS and leave padding out."""

    num_tokens: int
    num_chunks: int
    num_rows: int
    documents: Sequence[tuple[int, int]]  # (length with BOS and EOS, number) of the chunks


def data_facts(cfg: dict[str, Any]) -> DataFacts | None:
    """What a config's training split holds; None where it, or its count of packed rows, is not on this machine."""
    loader, dataset = cfg["train_loader"], cfg["train_loader"]["dataset"]
    try:
        split = open_split(Path(dataset["local"], dataset.get("split", "train")))
        rows = split.rows(cfg["max_seq_len"]) if loader.get("packing", True) else split.samples
        if rows is None:
            return None
        counts = np.sum([split.lengths(shard).astype(np.int64) for shard in range(split.num_shards)], axis=0)
    except OSError:  # of a remote dataset, some files may be here and others not yet
        return None
    num_chunks = int(split.samples.sum())
    return DataFacts(int(split.tokens.sum()) + 2 * num_chunks, num_chunks, int(rows.sum()),
                     [(int(n) + 2, int(counts[n])) for n in np.flatnonzero(counts)])


class Plan(NamedTuple):
    """A run in numbers. Real tokens are those of chunks, BOS and EOS; padding is not counted."""

    name: str
    model: str  # size and kind: 150m encoder
    objective: str  # over the run, as text
    mask_rate: str | None  # None where no objective masks
    parameters: int
    max_seq_len: int
    rows_per_step: int  # of the full batch
    first_rows: int  # of the first step of a batch-size warm-up
    warmup_steps: int  # steps with fewer than rows_per_step rows
    tokens_per_step: int  # real tokens of an average step of the full batch
    fill: float  # share of a step's token positions that hold real tokens
    num_steps: int
    num_tokens: int  # real tokens of the whole run
    epochs: float | None  # passes over the data; None when the data is not here
    shares: dict[str, float]  # {objective: share of the run's tokens}
    targets_per_token: float
    flops_per_token: int  # useful work of forward and backward (`EttinConfig.flops`), mean over the run
    flops: int  # of the whole run
    num_gpus: int
    gpu: str  # a key of GPUS, or cpu
    machine: str  # both as text
    microbatch: int  # rows on a device
    memory_bytes: dict[str, int]  # at the peak of a step on a device, by what they belong to
    largest_microbatch: int | None  # rows that fit with MARGIN to spare; None on a CPU
    fits: bool
    mfu: float | None  # assumed share of the peak, 6 operations per parameter and token
    hours: float | None
    sent_bytes: int  # by each GPU a step
    efficiency: tuple[float, float] | None  # of GPUs beside one: least, and where passes hide what is sent
    folder: str | None  # where checkpoints are saved
    checkpoints: int  # those that exist after the run
    storage_bytes: int

    @property
    def memory_gib(self) -> float:
        return sum(self.memory_bytes.values()) / 2**30


NETWORK_BYTES = 50e9  # a second, that a GPU sends to other machines: one link of 400 Gb/s each


def sent_bytes(parameters: int, ranks: int, passes: int = 1) -> int:
    """What each GPU sends a step: a ring's sum of fp32 gradients under DDP, whatever the microbatches. FSDP2 sends as
    much in each of `passes` microbatches: bf16 weights for forward and backward, and fp32 gradients."""
    return passes * 2 * 4 * parameters * (ranks - 1) // ranks


# bytes that autograd keeps of a token in a layer, for each unit of (hidden_size, intermediate_size), in 16 bits or fp32
_ACTIVATIONS = {True: (24, 6), False: (48, 16)}


def memory_bytes(config: EttinConfig, num_tokens: int, targets_per_token: float, *, half: bool = True, ranks: int = 1,
                 fsdp: bool = False, recompute: bool = False) -> dict[str, int]:
    """Peak memory of a training step on one device, by what it belongs to.

    A closed form within 5% of measured peaks: amp_bf16 with compiled blocks, flash attention, an fp32 residual stream
    on one H200 (150m mlm, 65,536 tokens: 39 GiB, eager 44; 1b clm, 16,384 tokens: 48.6 GiB), fp32 with the reference
    attention on a CPU (benchmarks/plan_memory.py). CUDA context and unusable memory of the allocator are not counted.
    `num_tokens` are a microbatch's; `half`: amp_bf16 or amp_fp16, else fp32; `recompute`: a layer keeps its input only.
    """
    weights = 4 * config.num_parameters
    model = 4 * weights / (ranks if fsdp else 1)  # weights, gradients and two moments
    model += (weights if ranks > 1 and not fsdp else 0) + (weights / 2 if half else 0)  # DDP's buckets; 16-bit casts
    per_width, per_glu = _ACTIVATIONS[half]
    layer = num_tokens * (per_width * config.hidden_size + per_glu * config.intermediate_size)
    kept = 4 * num_tokens * config.hidden_size * config.num_hidden_layers
    # a slice of logits with its gradient, and the output matrix twice (its gradient, and that of the embedding)
    logits = min(num_tokens * targets_per_token * config.vocab_size, 2**28 if half else 2**25)
    loss = logits * (8 if half else 4) + 8 * config.vocab_size * config.hidden_size
    activations = kept + layer if recompute else config.num_hidden_layers * layer
    return {"model": round(model), "activations": round(activations), "loss": round(loss)}


_PLACES = 10_000  # of a run, at which a schedule is looked at


def objective_means(objective: ObjectiveSchedule, rate: MaskRate, num_tokens: int,
                    first_share: float) -> tuple[dict[str, float], float, float]:
    """({objective: its share}, mean of the targets of a token, most of them at any time) of a run of `num_tokens`.

    clm predicts all but the `first_share` of the tokens, which begin a piece; masks spare these and those that end one.
    """
    shares, targets, number = dict.fromkeys(objective.objectives, 0.0), list[float](), min(num_tokens, _PLACES)
    for place in ((2 * n + 1) * num_tokens // (2 * number) for n in range(number)):
        mixture, masked = objective.at(place), rate.at(place) * (1 - 2 * first_share)
        targets.append(sum(share * (1 - first_share if name == "clm" else masked) for name, share in mixture.items()))
        for name, share in mixture.items():
            shares[name] += share / number
    return shares, math.fsum(targets) / number, max(targets)


def _flops_per_token(cfg: dict[str, Any], data: DataFacts, causal: float, targets: float) -> int:
    """Layers, head at the targets, and attention of either kind by its share of the run."""
    config = run_config.model_config(cfg)
    window = -1 if config.causal else cfg["model"].get("window_left", -1)
    other = dataclasses.replace(config, causal=not config.causal, window_left=window)
    own = causal if config.causal else 1 - causal
    pairs = sum(share * number * shape.attended_pairs(length) for length, number in data.documents
                for shape, share in ((config, own), (other, 1 - own)) if share)
    per_token = (config.flops(data.num_tokens, 0, 0) + config.flops(0, 0, 1) * pairs) / data.num_tokens
    return round(per_token + config.flops(0, 1, 0) * targets)


def _num_steps(cfg: dict[str, Any], ramp: BatchRamp, per_row: float) -> int:
    """Steps of a run whose rows hold `per_row` tokens: in tokens, until the first step with this many before it."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    if unit != "tok":
        return int(amount)
    most = math.ceil(amount / per_row / ramp.min_size) + 1
    return bisect.bisect_left(range(most + 1), amount, key=lambda k: ramp.first_row(k) * per_row)


def num_checkpoints(cfg: dict[str, Any], num_steps: int, num_tokens: int, tokens_per_step: int) -> int:
    """Checkpoints that exist after the run: one whenever the clock passes a multiple of save_interval, and the last."""
    if not cfg.get("save_folder"):
        return 0
    value, unit = parse_time("save_interval", cfg.get("save_interval", "1000ba"))  # the host's default
    total, step = (num_steps, 1) if unit == "ba" else (num_tokens, tokens_per_step)
    interval = value * total if unit == "dur" else value
    number = min(num_steps, total // interval) + (total // interval == (total - step) // interval)
    kept = cfg.get("save_num_checkpoints_to_keep", -1)
    return int(number if kept < 0 else min(number, kept))


def _microbatch(cfg: dict[str, Any], ranks: int) -> Any:
    """Rows, or auto; those that follow from variables.microbatch_tokens follow for so many processes."""
    given, free = cfg["device_train_microbatch_size"], {**cfg, "device_train_microbatch_size": None}
    here, there = (run_config.rows_from_tokens(free, n).get("device_train_microbatch_size") for n in (None, ranks))
    return there if given == here else given


def _machine(cfg: dict[str, Any], gpus: str | None) -> tuple[int, str]:
    """(number, kind) of `--gpus`; else the original's 4x H100, or one for a small batch, or one CPU for fp32."""
    rows, fits = cfg["global_train_batch_size"], lambda number: rows % number == 0 and (
        (micro := _microbatch(cfg, number)) == "auto" or number * micro <= rows)
    if gpus is None:
        return (1, "cpu") if cfg.get("precision") == "fp32" else (ORIGINAL_GPUS if fits(ORIGINAL_GPUS) else 1, "h100")
    match = re.fullmatch(r"(?:([1-9][0-9]*)x)?([a-z][a-z0-9-]*)", gpus, re.IGNORECASE)
    name, number = match[2].lower().removesuffix("-sxm") if match else "", int(match[1] or 1) if match else 1
    if name not in GPUS:
        raise ValueError(f"--gpus must be a number and one of {', '.join(GPUS)}, such as 4xH100, got {gpus!r}")
    if not fits(number):
        raise ValueError(f"--gpus must divide global_train_batch_size ({rows}) with device_train_microbatch_size "
                         f"({_microbatch(cfg, number)}) rows for each, got {gpus!r}; choose another number")
    return number, name


def plan_run(cfg: dict[str, Any], *, name: str = "", gpus: str | None = None, mfu: float | None = None) -> Plan:
    """The plan of a config that `check_settings` accepts; `mfu` is a share of the peak, None the original's."""
    num_gpus, gpu = _machine(cfg, gpus)
    if mfu is not None and not (gpu in GPUS and 0 < mfu <= 1):
        raise ValueError(f"--mfu must be above 0, at most 1, and used with GPUs, got {mfu} on {gpu}; add --gpus")
    facts, config, length = data_facts(cfg), run_config.model_config(cfg), cfg["max_seq_len"]
    data = facts or DataFacts(length, 1, 1, ((length, 1),))
    per_row = data.num_tokens / data.num_rows
    rows, budget, micro = cfg["global_train_batch_size"], total_tokens(cfg), _microbatch(cfg, num_gpus)
    if (warmup := cfg["train_loader"].get("batch_size_warmup")) is not None:
        warmup = check_warmup(warmup, rows, world_size=num_gpus, microbatch=micro, total=budget)
    ramp = BatchRamp.build(warmup, max_size=rows, tokens_per_row=per_row)
    steps = _num_steps(cfg, ramp, per_row)
    tokens, per_step = round(ramp.first_row(steps) * per_row), round(per_row * ramp.max_size)
    objective = run_config.objective_schedule(cfg)
    rate = MaskRate.parse(cfg["train_loader"].get("mask_rate", 0.0), total=budget)
    shares, targets, most_targets = objective_means(objective, rate, max(1, tokens), data.num_chunks / data.num_tokens)
    half, sharding = cfg.get("precision", "amp_bf16").startswith("amp_"), cfg.get("fsdp_config") or {}
    memory = functools.partial(memory_bytes, config, targets_per_token=most_targets, half=half, ranks=num_gpus,
                               fsdp=bool(sharding), recompute=bool(sharding.get("activation_checkpointing")))
    share = ramp.max_size // num_gpus
    largest = None if gpu not in GPUS else bisect.bisect_right(
        range(1, share + 1), GPUS[gpu][1] * (1 - MARGIN) * 2**30, key=lambda rows: sum(memory(rows * length).values()))
    if gpu in GPUS and mfu is None and half and config.size in ORIGINAL_HOURS:
        original = ORIGINAL_HOURS[config.size] * 3600 * ORIGINAL_GPUS * GPUS["h100"][0]
        mfu = 6 * config.num_parameters * ORIGINAL_TOKENS / original
    micro = max(1, largest or 0) if micro == "auto" else micro
    hours = mfu and 6 * config.num_parameters * tokens / (num_gpus * GPUS[gpu][0] * mfu) / 3600
    efficiency, sent = None, sent_bytes(config.num_parameters, num_gpus, math.ceil(share / micro) if sharding else 1)
    if hours and num_gpus > 1:
        seconds, sums = hours * 3600 / max(1, steps), sent / NETWORK_BYTES
        hidden = seconds * (1 if sharding else 2 / 3 * min(micro, share) / share)  # DDP: by the last backward
        efficiency = seconds / (seconds + sums), seconds / (seconds + max(0.0, sums - hidden))
    checkpoints = num_checkpoints(cfg, steps, tokens, per_step)
    flops = _flops_per_token(cfg, data, shares.get("clm", 0.0), targets)
    return Plan(
        name=name or cfg.get("run_name") or "without a name",
        model=f"{config.size or 'custom'} {'decoder' if config.causal else 'encoder'}",
        objective=str(objective), mask_rate=str(rate) if objective.masks else None, parameters=config.num_parameters,
        max_seq_len=length, rows_per_step=ramp.max_size, first_rows=ramp.min_size,
        warmup_steps=min(steps, ramp.num_steps),
        tokens_per_step=per_step, fill=per_step / (ramp.max_size * length), num_steps=steps, num_tokens=tokens,
        epochs=tokens / data.num_tokens if facts else None, shares=shares, targets_per_token=targets,
        flops_per_token=flops, flops=flops * tokens, num_gpus=num_gpus, gpu=gpu,
        machine="one CPU process" if gpu == "cpu" else f"{num_gpus}x {gpu.upper()}", microbatch=micro, hours=hours,
        memory_bytes=memory(micro * length), largest_microbatch=largest, mfu=mfu,
        fits=largest is None or micro <= largest, sent_bytes=sent, efficiency=efficiency,
        folder=cfg.get("save_folder"), checkpoints=checkpoints,
        storage_bytes=checkpoints * 4 * config.num_parameters * (1 if cfg.get("save_weights_only") else 3))


def plan_runs(stages: Sequence[tuple[str, dict[str, Any]]], *, gpus: str | None = None,
              mfu: float | None = None) -> list[Plan]:
    """Plans of runs (name, resolved config), in order; a ValueError for what `check_settings` and `plan_run` refuse."""
    found = []
    for name, cfg in stages:
        try:
            if (model := (cfg.get("model") or {}).get("name")) != "ettin":
                raise ValueError(f"model.name must be ettin to be planned, got {model!r}; use a recipe of yamls/")
            check_settings(cfg)
            found.append(plan_run(cfg, name=name, gpus=gpus, mfu=mfu))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def totals(plans: Sequence[Plan]) -> dict[str, Any]:
    """Sums over runs; hours are None where a run has none."""
    keys = ("num_tokens", "num_steps", "flops", "checkpoints", "storage_bytes")
    hours = [plan.hours for plan in plans]
    return {**{key: sum(getattr(plan, key) for plan in plans) for key in keys},
            "hours": None if None in hours else sum(hours)}  # type: ignore[arg-type]


def text(plans: list[Plan]) -> str:
    """One fact a line for one run; one line a stage and their sums for several."""
    return render(Path(__file__).with_name("plan.txt.jinja"), plans=plans, totals=totals(plans), no_data=_NO_DATA,
                  gpus=GPUS, margin=MARGIN, network=NETWORK_BYTES)
