"""Plans of one run or of a chain of runs, as text and as plain data.

A chain is a list of runs that are planned one by one and summed: a suite's stages, or the phases of one model. What each
starts from plays no part here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ettin_foundry.data.quantities import format_bytes, format_count
from ettin_foundry.tools import plan_cost
from ettin_foundry.tools.plan import Plan, aligned, lines, plan_with, split_facts
from ettin_foundry.tools.plan_cost import NO_PRICES, Cost, Prices
from ettin_foundry.tools.plan_course import Course
from ettin_foundry.tools.plan_memory import SLACK_GIB
from ettin_foundry.training.checks import check_settings
from ettin_foundry.training.keys import MODEL_KEYS

__all__ = ["PlannedRun", "as_json", "plan_chain", "text", "totals"]

_GIB = 2**30


@dataclass(frozen=True)
class PlannedRun:
    """One run and what it takes."""

    name: str
    cfg: dict[str, Any]
    plan: Plan
    cost: Cost
    along: Course


def plan_chain(stages: Sequence[tuple[str, dict[str, Any]]], *, gpus: str | None = None, mfu: float | None = None,
               prices: Prices = NO_PRICES) -> list[PlannedRun]:
    """Plans of runs, in order.

    Args:
        stages: (name, config): plain containers, interpolations resolved, as `recipes.resolved` gives them.
        gpus: such as `4xH100`; None: as `plan_cost.default_machine` says.
        mfu: share of the peak to assume, 6 operations per parameter and token; None: the original's.

    Raises:
        ValueError: what `checks.check_settings` refuses, and a batch that the GPUs cannot divide; it names the key, and of
            several runs the first that has it.
    """
    found = []
    for name, cfg in stages:
        try:
            found.append(_planned(name, cfg, gpus, mfu, prices))
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if len(stages) > 1 else str(error)) from error
    return found


def _planned(name: str, cfg: dict[str, Any], gpus: str | None, mfu: float | None, prices: Prices) -> PlannedRun:
    if (model := (cfg.get("model") or {}).get("name")) not in MODEL_KEYS:
        raise ValueError(f"model.name: {model!r} given; only {' and '.join(MODEL_KEYS)} can be planned. Start from a recipe "
                         "in yamls/")
    check_settings(cfg)
    machine = plan_cost.default_machine(cfg) if gpus is None else plan_cost.parse_gpus(gpus)
    plan, data, along = plan_with(cfg, split_facts(cfg))
    cost = plan_cost.cost(cfg, plan, data, along, machine, mfu=mfu, prices=prices)
    return PlannedRun(name, cfg, plan, cost, along)


def _memory_lines(cost: Cost) -> list[tuple[str, str]]:
    memory, gpu = cost.memory, cost.machine.gpu
    parts = [("parameters", memory.parameters), ("gradients", memory.gradients), ("moments", memory.moments),
             ("copies", memory.copies), ("activations", memory.activations), ("loss", memory.loss)]
    fit = ""
    if gpu is not None and cost.largest_microbatch is not None:
        fit = (f"; {cost.largest_microbatch:,} rows would fit with {SLACK_GIB:g} GiB to spare" if cost.fits else
               f"; DOES NOT FIT, {cost.largest_microbatch:,} rows would with {SLACK_GIB:g} GiB to spare")
    where = "in the process" if gpu is None else f"of {gpu.gib:g} on each GPU"
    return [("memory", f"{memory.total / _GIB:.1f} GiB {where}: "
             + ", ".join(f"{name} {n / _GIB:.2f}" for name, n in parts if n)),
            ("microbatch", f"{cost.microbatch:,} rows, {cost.microbatch_tokens:,} tokens, {cost.microbatches:,} a step, "
             f"{'flash' if cost.flash else 'reference'} attention{fit}")]


def _time_lines(run: PlannedRun) -> list[tuple[str, str]]:
    plan, cost, prices = run.plan, run.cost, run.cost.prices
    if cost.hours is None or cost.mfu is None or cost.mfu_useful is None:
        why = ("no GPU is planned for; give --gpus and --mfu" if cost.machine.gpu is None else
               f"the original has no hours for {plan.size} in {run.cfg.get('precision', 'amp_bf16')}; give --mfu")
        return [("hours", f"not known: {why}")]
    assert cost.kwh is not None and cost.machine.gpu is not None
    rate = plan.num_tokens / (cost.hours * 3600 * cost.machine.count)
    found = [("hours", f"{_amount(cost.hours)} on {cost.machine}, {_amount(cost.hours * cost.machine.count)} GPU hours"),
             ("speed", f"{rate:,.0f} tokens/s a GPU: MFU {cost.mfu:.1%} counting 6 per parameter and token "
              f"({'as given' if cost.mfu_given else 'as the original'}), {cost.mfu_useful:.1%} counting useful work"),
             ("energy", f"{_amount(cost.kwh)} kWh, GPUs at their limit of {cost.machine.gpu.watts:g} W, PUE {prices.pue:g}")]
    costs = [f"{cost.money:,.2f} for GPUs at {prices.gpu_hour:g} an hour" if cost.money is not None else "",
             f"{cost.money_energy:,.2f} for energy at {prices.kwh:g} a kWh" if cost.money_energy is not None else ""]
    if any(costs):
        found.append(("money", ", ".join(filter(None, costs))))
    return found


def _storage(cost: Cost) -> str:
    if not cost.checkpoints:
        return "nothing is saved"
    initial = " and the initial weights" if cost.initial_bytes else ""
    return f"{cost.checkpoints:,} checkpoints of {format_bytes(cost.checkpoint_bytes)}{initial}, {format_bytes(cost.storage)} in all"  # noqa: E501


def text(runs: Sequence[PlannedRun]) -> str:
    """One fact a line for one run, one line a stage and their sums for several."""
    if len(runs) > 1:
        return _table(runs)
    [run] = runs
    plan = run.plan
    rows = [*lines(run.cfg, plan)]
    rate = f", mask rate {run.along.mask_rate}" if run.along.schedule.masks else ""
    rows.insert(4, ("targets", f"{plan.targets_per_token:.4f} a token{rate}"))
    rows[-1] = ("work", rows[-1][1] + f"; 6 per parameter and token: {plan.flops_6n:.4g}")
    return aligned([*rows, *_memory_lines(run.cost), *_time_lines(run), ("storage", _storage(run.cost))])


def _amount(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _sum(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)


def totals(runs: Sequence[PlannedRun]) -> dict[str, float | None]:
    """Sums over a chain; None where a stage has no figure."""
    costs = [run.cost for run in runs]
    return {"num_tokens": sum(run.plan.num_tokens for run in runs), "num_steps": sum(run.plan.num_steps for run in runs),
            "flops": sum(run.plan.flops for run in runs), "hours": _sum([c.hours for c in costs]),
            "gpu_hours": _sum([None if c.hours is None else c.hours * c.machine.count for c in costs]),
            "kwh": _sum([c.kwh for c in costs]), "money": _sum([c.money for c in costs]),
            "money_energy": _sum([c.money_energy for c in costs]),
            "checkpoints": sum(c.checkpoints for c in costs), "storage_bytes": sum(c.storage for c in costs)}


def _table(runs: Sequence[PlannedRun]) -> str:
    """Columns aligned; a column without a figure in any stage is left out."""
    head = ["stage", "model", "objective", "tokens", "steps", "rows", "length", "GiB", "hours", "MFU 6N", "kWh", "money",
            "energy money", "checkpoints", "storage"]
    rows = [[run.name, f"{run.plan.size} {'decoder' if run.plan.causal else 'encoder'}", run.plan.objective,
             format_count(run.plan.num_tokens), f"{run.plan.num_steps:,}", f"{run.plan.rows_per_step:,}",
             f"{run.plan.max_seq_len:,}", f"{run.cost.memory.total / _GIB:.1f}" + ("" if run.cost.fits else "!"),
             "-" if run.cost.hours is None else _amount(run.cost.hours), _number(run.cost.mfu, ".1%"),
             "-" if run.cost.kwh is None else _amount(run.cost.kwh),
             _number(run.cost.money, ",.0f"), _number(run.cost.money_energy, ",.0f"), f"{run.cost.checkpoints:,}",
             format_bytes(run.cost.storage) if run.cost.checkpoints else "-"] for run in runs]
    total = totals(runs)
    rows.append(["total", "", "", format_count(total["num_tokens"] or 0), f"{total['num_steps']:,}", "", "", "",
                 _number(total["hours"], ",.1f"), "", _number(total["kwh"], ",.1f"), _number(total["money"], ",.0f"),
                 _number(total["money_energy"], ",.0f"), f"{total['checkpoints']:,}", format_bytes(total["storage_bytes"] or 0)])  # noqa: E501
    kept = [i for i in range(len(head)) if i < 8 or any(row[i] not in ("-", "") for row in rows)]
    widths = {i: max(len(row[i]) for row in [head, *rows]) for i in kept}
    table = "\n".join("  ".join(row[i].ljust(widths[i]) if i < 3 else row[i].rjust(widths[i]) for i in kept).rstrip()
                      for row in [head, *rows])
    machines = " and ".join(dict.fromkeys(str(run.cost.machine) for run in runs))
    notes = [f"on {machines}; GiB: of one device at the peak of a step"]
    if any(not run.plan.measured for run in runs):
        notes.append("some data is not there yet: full rows, longest documents")
    if not all(run.cost.fits for run in runs):
        notes.append("! does not fit; `ettin plan` of that run alone says what would")
    return "\n".join([table, *notes])


def as_json(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Everything that `text` shows, as plain data: bytes, hours, kWh, operations and tokens."""
    stages = []
    for run in runs:
        memory = dataclasses.asdict(run.cost.memory)
        facts = {field.name: getattr(run.cost, field.name) for field in dataclasses.fields(run.cost)
                 if field.name not in ("machine", "prices", "memory")}
        stages.append({"name": run.name, **dataclasses.asdict(run.plan), "fill": run.plan.fill, "flops": run.plan.flops,
                       "flops_6n": run.plan.flops_6n, "gpus": str(run.cost.machine), **facts, "fits": run.cost.fits,
                       "memory_bytes": {**memory, "total": run.cost.memory.total}, "storage_bytes": run.cost.storage})
    return {"stages": stages, "totals": totals(runs), "prices": dataclasses.asdict(runs[0].cost.prices)}
