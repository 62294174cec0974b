"""What a planned run takes on given GPUs: memory, hours, energy, money and checkpoints.

Hours come from a share of the GPU's peak that is assumed, never from a measurement here: for a published size, the share
that the original reached; otherwise what the user gives. Both counts of operations are shown, because the share means
nothing without its count: 6 per parameter and token ("6N", as the original's hours are usually read), and the useful work
of `EttinConfig.flops`. Evaluations, checkpoint writing and start-up take no time here. Prices are the user's; there is no
default.
"""

from __future__ import annotations

import bisect
import math
import re
from dataclasses import dataclass
from typing import Any

from ettin_foundry.data.ramp import check_warmup
from ettin_foundry.tools.plan import DataFacts, Plan, kinds
from ettin_foundry.tools.plan_course import Course
from ettin_foundry.tools.plan_memory import SLACK_GIB, Memory, Step, step_memory
from ettin_foundry.training.run_config import parse_time

__all__ = ["CPU", "GPUS", "NO_PRICES", "ORIGINAL_GPUS", "ORIGINAL_HOURS", "ORIGINAL_TOKENS", "Cost", "Gpu", "Machine",
           "Prices", "cost", "default_machine", "num_checkpoints", "original_mfu", "parse_gpus"]


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    flops: float
    """Peak per second in dense bf16; those of Composer's table (composer/callbacks/speed_monitor.py) where it has them."""
    gib: float
    """Memory that torch reports, GiB."""
    watts: float
    """Power limit that the maker publishes."""


GPUS = {
    "h100": Gpu(1.979e15 / 2, 79.1, 700), "h100-pcie": Gpu(1.513e15 / 2, 79.1, 350), "h200": Gpu(1.979e15 / 2, 139.8, 700),
    "a100": Gpu(312e12, 79.1, 400), "a100-40gb": Gpu(312e12, 39.4, 400), "a10": Gpu(125e12, 22.0, 150),
}
"""h100, h200 and a100 are SXM modules."""

# Ettin's repository, pretraining/README.md: hours for 2T tokens, all phases, on 4x H100
ORIGINAL_HOURS = {"17m": 141, "32m": 212, "68m": 300, "150m": 470, "400m": 950, "1b": 2170}
ORIGINAL_TOKENS, ORIGINAL_GPUS = 2_000_000_000_000, 4

_GPUS = re.compile(r"(?:([0-9]+)x)?([a-z][a-z0-9-]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Equal GPUs, all of one run; or one CPU process."""

    count: int
    gpu: Gpu | None
    name: str

    def __str__(self) -> str:
        return f"{self.count}x {self.name.upper()}" if self.gpu else "one CPU process"


CPU = Machine(1, None, "cpu")


def parse_gpus(text: str) -> Machine:
    """`4xH100` or `H100` as a Machine.

    Raises:
        ValueError: not of this form, or a GPU that GPUS does not list.
    """
    match = _GPUS.fullmatch(text)
    name = match[2].lower().removesuffix("-sxm") if match else ""
    if match is None or name not in GPUS or int(match[1] or 1) < 1:
        raise ValueError(f"--gpus: {text!r} given; a number and a GPU are needed, such as 4xH100. The known ones are "
                         f"{', '.join(GPUS)}. Correct it, or take the nearest of them and give --mfu")
    return Machine(int(match[1] or 1), GPUS[name], name)


@dataclass(frozen=True)
class Prices:
    """What the user pays, in a currency of theirs; None where it was not said."""

    gpu_hour: float | None = None
    kwh: float | None = None
    pue: float = 1.0
    """Power of the whole data centre for one unit of power in the GPUs (power usage effectiveness)."""

    def __post_init__(self) -> None:
        for name, value in (("--price", self.gpu_hour), ("--kwh-price", self.kwh)):
            if value is not None and value < 0:
                raise ValueError(f"{name}: {value} given; a price of at least 0 is needed. Correct it")
        if self.pue < 1:
            raise ValueError(f"--pue: {self.pue} given; a data centre takes at least the power of its GPUs, so at least 1 "
                             "is needed. Correct it")


NO_PRICES = Prices()


@dataclass(frozen=True)
class Cost:
    """A run on a machine. Times and energies are None where no share of the peak is known."""

    machine: Machine
    prices: Prices
    microbatch: int
    """Rows."""
    microbatches: int
    """Of a step of the full batch."""
    microbatch_tokens: int
    """Of the fullest one, which memory is planned for."""
    flash: bool
    memory: Memory
    largest_microbatch: int | None
    """Rows that fit into the GPU with SLACK_GIB to spare; None on a CPU. 0: not even one."""
    mfu_given: bool
    """By the user; else the original's."""
    mfu: float | None
    """Share of the peak, 6 operations per parameter and token."""
    mfu_useful: float | None
    """The same speed in useful work."""
    hours: float | None
    kwh: float | None
    money: float | None
    money_energy: float | None
    checkpoints: int
    checkpoint_bytes: int
    """Of each."""
    initial_bytes: int
    """Of the weights before the first step, which a run writes that starts from none."""

    @property
    def fits(self) -> bool:
        return self.largest_microbatch is None or self.microbatch <= self.largest_microbatch

    @property
    def storage(self) -> int:
        """Bytes of all that is kept."""
        return self.checkpoints * self.checkpoint_bytes + self.initial_bytes


def original_mfu(size: str, parameters: int) -> float | None:
    """Share of an H100's peak at which the original trained this size, 6 operations per parameter and token."""
    if size not in ORIGINAL_HOURS:
        return None
    seconds = ORIGINAL_HOURS[size] * 3600 * ORIGINAL_GPUS
    return 6 * parameters * ORIGINAL_TOKENS / (seconds * GPUS["h100"].flops)


def fullest_tokens(data: DataFacts, rows: int, max_seq_len: int, *, packing: bool) -> int:
    """Real tokens of the fullest microbatch of `rows` rows that a run is likely to meet.

    Packed rows are all but full. Of unpacked ones, the mean and six standard deviations of their sum: beyond that lies one
    microbatch in a billion.
    """
    if packing:
        return rows * max_seq_len
    mean = data.num_tokens / data.num_chunks
    variance = sum(number * (length - mean) ** 2 for length, number in data.documents) / data.num_chunks
    return min(rows * max_seq_len, math.ceil(rows * mean + 6 * math.sqrt(rows * variance)))


class _Steps:
    """The microbatches of a run on a machine, by their rows."""

    def __init__(self, cfg: dict[str, Any], data: DataFacts, along: Course, machine: Machine) -> None:
        causal = {name == "clm" for name in along.objectives}
        self._shapes = [kinds(cfg)[kind] for kind in sorted(causal)]
        self._cfg, self._data, self._machine = cfg, data, machine
        self._targets = along.most_predicted(data.text_share, data.first_share)

    def of(self, rows: int) -> Step:
        """The fullest microbatch of `rows` rows, of the kind that takes most memory."""
        cfg, data, machine = self._cfg, self._data, self._machine
        sharding = (cfg.get("fsdp_config") or {}) if machine.count > 1 else {}
        half, on_gpu = cfg.get("precision", "amp_bf16").startswith("amp_"), machine.gpu is not None
        tokens = fullest_tokens(data, rows, cfg["max_seq_len"], packing=cfg["train_loader"].get("packing", True))
        steps = [Step(shape, tokens, min(tokens, math.ceil(tokens * self._targets)), on_gpu=on_gpu, half=half,
                      flash=on_gpu and half and cfg["model"].get("attn_impl", "auto") != "reference",
                      mean_document=data.num_tokens / data.num_chunks, longest_document=cfg["max_seq_len"],
                      ranks=machine.count, sharded=bool(sharding), recompute=bool(sharding.get("activation_checkpointing")),
                      accumulates=rows < cfg["global_train_batch_size"] // machine.count)
                 for shape in self._shapes]
        return max(steps, key=lambda step: step_memory(step).total)

    def largest(self) -> int | None:
        """Rows of the largest microbatch that fits into the GPU; 0 if none does, None on a CPU."""
        if self._machine.gpu is None:
            return None
        room = (self._machine.gpu.gib - SLACK_GIB) * 2**30
        sizes = range(1, self._cfg["global_train_batch_size"] // self._machine.count + 1)
        return bisect.bisect_right(sizes, room, key=lambda rows: step_memory(self.of(rows)).total)


def default_machine(cfg: dict[str, Any]) -> Machine:
    """The original's 4x H100, or the most of them that the batch can be divided over; one CPU process for fp32."""
    if cfg.get("precision") == "fp32":
        return CPU
    rows, micro = cfg["global_train_batch_size"], cfg["device_train_microbatch_size"]
    for count in (ORIGINAL_GPUS, 2):
        if isinstance(rows, int) and rows % count == 0 and (not isinstance(micro, int) or micro * count <= rows):
            return Machine(count, GPUS["h100"], "h100")
    return Machine(1, GPUS["h100"], "h100")


def _check_batch(cfg: dict[str, Any], machine: Machine) -> None:
    rows, micro = cfg["global_train_batch_size"], cfg["device_train_microbatch_size"]
    if not isinstance(rows, int) or rows < 1 or rows % machine.count:
        raise ValueError(f"global_train_batch_size: {rows!r} given, --gpus is {machine}; a multiple of the number of GPUs "
                         "is needed. Change one of the two")
    share = rows // machine.count
    if micro == "auto" and machine.gpu is None:
        raise ValueError("device_train_microbatch_size: 'auto' given; a CPU cannot find it by running out of memory. Give a "
                         "number of rows, or --gpus")
    if micro != "auto" and (not isinstance(micro, int) or not 1 <= micro <= share):
        raise ValueError(f"device_train_microbatch_size: {micro!r} given; 1 to {share} is possible: global_train_batch_size "
                         f"is {rows} on {machine}. Lower it")
    if (warmup := cfg["train_loader"].get("batch_size_warmup")) is not None:
        check_warmup(warmup, rows, world_size=machine.count, microbatch=micro)


def num_checkpoints(cfg: dict[str, Any], plan: Plan) -> int:
    """Checkpoints that are there after the run: one whenever the clock passes a multiple of save_interval, and the last."""
    if not cfg.get("save_folder"):
        return 0
    value, unit = parse_time("save_interval", cfg.get("save_interval", "1000ba"))  # the host's default
    total, step = (plan.num_steps, 1) if unit == "ba" else (plan.num_tokens, plan.tokens_per_step)
    interval = value * total if unit == "dur" else value
    number = min(plan.num_steps, math.floor(total / interval))
    if math.floor(total / interval) == math.floor((total - step) / interval):
        number += 1
    kept = cfg.get("save_num_checkpoints_to_keep", -1)
    return number if kept < 0 else min(number, kept)


def _starts_from_nothing(cfg: dict[str, Any]) -> bool:
    callbacks = cfg.get("callbacks") or {}
    return not cfg.get("load_path") and not any((callbacks.get(name) or {}).get("source") for name in callbacks)


def cost(cfg: dict[str, Any], plan: Plan, data: DataFacts, along: Course, machine: Machine, *, mfu: float | None = None,
         prices: Prices = NO_PRICES) -> Cost:
    """What the run takes on the machine.

    Args:
        mfu: share of the peak to assume, 6 operations per parameter and token; None: the original's for a published size
            in 16-bit precision, else unknown.

    Raises:
        ValueError: the batch cannot be divided over the GPUs, or a share that is none.
    """
    _check_batch(cfg, machine)
    if mfu is not None and (machine.gpu is None or not 0 < mfu <= 1):
        raise ValueError(f"--mfu: {mfu} given; a share above 0 and up to 1 of a GPU's peak is needed, and GPUs to plan for "
                         f"({machine} here). Correct it, or add --gpus")
    steps = _Steps(cfg, data, along, machine)
    largest = steps.largest()
    micro = cfg["device_train_microbatch_size"]
    if micro == "auto":
        micro = max(1, largest or 0)
    step = steps.of(micro)
    hours = kwh = useful = None
    given = mfu is not None
    if machine.gpu is not None:
        if mfu is None and cfg.get("precision", "amp_bf16").startswith("amp_"):
            mfu = original_mfu(plan.size, plan.parameters)
        if mfu is not None:
            hours = plan.flops_6n / (machine.count * machine.gpu.flops * mfu) / 3600
            useful = mfu * plan.flops / plan.flops_6n
            kwh = hours * machine.count * machine.gpu.watts / 1000 * prices.pue
    weights = 4 * plan.parameters
    return Cost(
        machine=machine, prices=prices, microbatch=micro, microbatches=-(-plan.rows_per_step // (machine.count * micro)),
        microbatch_tokens=step.tokens, flash=step.flash, memory=step_memory(step), largest_microbatch=largest,
        mfu_given=given, mfu=mfu if hours is not None else None, mfu_useful=useful, hours=hours, kwh=kwh,
        money=None if hours is None or prices.gpu_hour is None else hours * machine.count * prices.gpu_hour,
        money_energy=None if kwh is None or prices.kwh is None else kwh * prices.kwh,
        checkpoints=num_checkpoints(cfg, plan),
        checkpoint_bytes=weights * (1 if cfg.get("save_weights_only") else 3),
        initial_bytes=weights if _starts_from_nothing(cfg) and "://" not in cfg.get("save_folder", "://") else 0)
