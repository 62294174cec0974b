"""Hours, energy, money and storage of plans against the original's figures, sums by hand, and what the host writes."""

import copy
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.tools import plan_cost
from ettin_foundry.tools.plan import DataFacts, plan_with
from ettin_foundry.tools.plan_cost import Prices, cost, parse_gpus
from ettin_foundry.tools.plan_memory import SLACK_GIB, Step, step_memory
from ettin_foundry.tools.plan_report import plan_chain
from ettin_foundry.training import recipes

ROOT = Path(__file__).resolve().parents[2]
# Ettin's repository, pretraining/README.md: hours on 4x H100 for 2T tokens; from them tokens/s of a GPU, and 6 N / peak in %
ORIGINAL = {"17m": (141, 985_028, 10.1), "32m": (212, 655_136, 12.8), "68m": (300, 462_963, 19.2),
            "150m": (470, 295_508, 26.8), "400m": (950, 146_199, 35.1), "1b": (2170, 64_004, 40.0)}


@functools.cache
def _recipe(size, member, phase, *more):
    overlays = [] if phase == "pretrain" else [str(ROOT / f"yamls/phases/{phase}.yaml"), "variables.source=runs/before"]
    return recipes.resolved([str(ROOT / f"yamls/ettin-{member}-{size}.yaml"), *overlays, *more])


def recipe(size, member, phase, *more):
    return copy.deepcopy(_recipe(size, member, phase, *more))


def planned(cfg, gpus="4xH100", data=None, **options):
    return cost(cfg, *plan_with(cfg, data), parse_gpus(gpus), **options)


@pytest.mark.parametrize("size", ORIGINAL)
def test_the_phases_of_each_size_take_the_originals_hours(size):
    """2T tokens: 1.7T, 250B and 50B. Of 1b our recipes have 1.8T (the last phases are a third), so its rate is compared."""
    hours, rate, share = ORIGINAL[size]
    member = "dec" if size in ("32m", "1b") else "enc"
    runs = plan_chain([(phase, recipe(size, member, phase)) for phase in ("pretrain", "extend", "decay")], gpus="4xH100")
    tokens = sum(run.plan.num_tokens for run in runs)
    assert tokens == pytest.approx(1.8e12 if size == "1b" else 2e12, rel=1e-4)  # each phase ends with a whole step
    assert sum(run.cost.hours for run in runs) * 2e12 / tokens == pytest.approx(hours, rel=0.01)
    if size != "1b":
        assert sum(run.cost.hours for run in runs) == pytest.approx(hours, rel=0.01)
    for run in runs:
        assert run.plan.num_tokens / (4 * 3600 * run.cost.hours) == pytest.approx(rate, rel=1e-4)
        assert 100 * run.cost.mfu == pytest.approx(share, abs=0.06)  # rounded to a decimal there, and of 989 TFLOP/s


def test_hours_energy_and_money_by_hand():
    found = planned(recipe("150m", "enc", "decay"), "8xH200", mfu=0.4, prices=Prices(2.5, 0.3, 1.2))
    steps = math.ceil(50e9 / (1024 * 8192))
    hours = 6 * 149_655_232 * steps * 1024 * 8192 / (8 * 989.5e12 * 0.4) / 3600
    assert found.hours == pytest.approx(hours, rel=1e-12)
    assert found.kwh == pytest.approx(hours * 8 * 0.7 * 1.2, rel=1e-12)
    assert found.money == pytest.approx(hours * 8 * 2.5, rel=1e-12)
    assert found.money_energy == pytest.approx(hours * 8 * 0.7 * 1.2 * 0.3, rel=1e-12)
    # useful work: layers at every token, head at 15% of the text, windows of 129 in 14 of 22 layers
    c, pairs = 768, 8 * 8192**2 + 14 * (8192 + 2 * (64 * 8192 - 64 * 65 // 2))
    work = 6 * 22 * (4 * c * c + 3 * c * 1152) + 6 * (c * c + c * 50368) * 0.15 * 8190 / 8192 + 12 * c * pairs / 8192
    assert found.mfu_useful == pytest.approx(0.4 * work / (6 * 149_655_232), rel=1e-6)
    assert found.checkpoints == 6 and found.checkpoint_bytes == 12 * 149_655_232
    without = planned(recipe("150m", "enc", "decay"))
    assert without.money is None and without.money_energy is None and without.kwh is not None


def test_no_share_of_the_peak_is_made_up():
    """nano was never trained by the original, nor any size in fp32; a CPU has no peak here."""
    cfg = recipe("150m", "enc", "decay")
    cfg["precision"] = "fp32"
    found = planned(cfg, "4xa100")
    assert found.hours is found.kwh is found.mfu is None and not found.flash
    assert planned(cfg, "4xa100", mfu=0.1).hours > 0
    assert cost(cfg, *plan_with(cfg, None), plan_cost.CPU).largest_microbatch is None


def test_peaks_are_those_of_composers_table():
    from composer.callbacks.speed_monitor import GPU_AVAILABLE_FLOPS as table

    names = {"h100": "h100-sxm", "h100-pcie": "h100-pcie", "h200": "h200-sxm", "a100": "a100", "a100-40gb": "a100",
             "a10": "a10"}
    assert set(plan_cost.GPUS) == set(names)
    for ours, theirs in names.items():
        assert plan_cost.GPUS[ours].flops == table[theirs]["amp_bf16"]


@pytest.mark.parametrize("text, count, name", [("4xH100", 4, "h100"), ("h200", 1, "h200"), ("16xA100-40GB", 16, "a100-40gb"),
                                               ("8xH100-SXM", 8, "h100")])
def test_gpus_are_read_as_people_write_them(text, count, name):
    machine = parse_gpus(text)
    assert (machine.count, machine.name, machine.gpu) == (count, name, plan_cost.GPUS[name])


@pytest.mark.parametrize("text", ["4xH800", "0xH100", "fourxH100", "4x", "-1xH100"])
def test_an_unknown_gpu_is_refused_with_the_known_ones(text):
    with pytest.raises(ValueError, match=r"--gpus: .* given; .*h100, h100-pcie, h200"):
        parse_gpus(text)


@pytest.mark.parametrize("changes, gpus, message", [
    ({}, "3xH100", r"global_train_batch_size: 1024 given, --gpus is 3x H100"),
    ({"device_train_microbatch_size": 300}, "4xH100", r"device_train_microbatch_size: 300 given; 1 to 256"),
    ({"device_train_microbatch_size": 0}, "4xH100", r"device_train_microbatch_size: 0 given; 1 to 256"),
    ({"train_loader": {"batch_size_warmup": {"min_size": 18, "tokens": "1000tok"}}}, "4xH100", r"min_size must .*got 18"),
])
def test_a_batch_that_the_gpus_cannot_divide_is_refused(changes, gpus, message):
    cfg = recipe("150m", "enc", "decay")
    for key, value in changes.items():
        cfg[key] = {**cfg[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        planned(cfg, gpus)


@pytest.mark.parametrize("options, message", [({"mfu": 0.0}, "--mfu: 0.0 given"), ({"mfu": 1.5}, "--mfu: 1.5 given")])
def test_a_share_that_is_none_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        planned(recipe("150m", "enc", "decay"), **options)
    with pytest.raises(ValueError, match="--mfu: 0.4 given.*one CPU process"):
        cfg = recipe("150m", "enc", "decay")
        cost(cfg, *plan_with(cfg, None), plan_cost.CPU, mfu=0.4)
    with pytest.raises(ValueError, match="--price: -1 given"):
        Prices(-1)
    with pytest.raises(ValueError, match="--pue: 0.9 given"):
        Prices(pue=0.9)


def test_the_microbatch_that_is_called_largest_is_the_last_that_fits():
    cfg = recipe("400m", "dec", "pretrain")
    found = planned(cfg)
    room = (79.1 - SLACK_GIB) * 2**30
    sizes = [step_memory(Step(EttinConfig.for_size("400m", causal=True), 1024 * rows, math.ceil(1024 * rows * 1023 / 1024),
                              ranks=4, accumulates=rows < 704)).total for rows in range(1, 705)]
    assert found.largest_microbatch == sum(size <= room for size in sizes) and found.fits
    assert found.memory.total == sizes[31] and found.microbatches == 22  # 704 rows in microbatches of 32
    cfg["device_train_microbatch_size"] = 704
    assert not planned(cfg).fits
    cfg["device_train_microbatch_size"] = "auto"
    assert planned(cfg).microbatch == found.largest_microbatch


def test_unpacked_rows_are_planned_for_a_full_microbatch_that_may_happen():
    data = DataFacts(num_tokens=60_000, num_chunks=100, num_rows=100, documents=((200, 50), (1000, 50)))
    assert plan_cost.fullest_tokens(data, 72, 1024, packing=True) == 72 * 1024
    assert plan_cost.fullest_tokens(data, 72, 1024, packing=False) == math.ceil(72 * 600 + 6 * math.sqrt(72) * 400)
    assert plan_cost.fullest_tokens(data, 2, 1024, packing=False) == 2048  # no more than all places


@pytest.mark.parametrize("interval, step_tokens, steps", [("1000tok", 300, 20), ("1000tok", 250, 20), ("100tok", 300, 7),
                                                          ("4ba", 300, 20), ("7ba", 300, 20), ("1ba", 300, 3),
                                                          ("99999tok", 300, 5)])
def test_checkpoints_are_counted_as_composer_saves_them(interval, step_tokens, steps):
    """Its own scheduler, asked at each batch."""
    from composer.core import Event, Time, Timestamp
    from composer.utils import create_interval_scheduler

    saves = create_interval_scheduler(interval)
    count = 0
    for batch in range(1, steps + 1):
        state = SimpleNamespace(previous_timestamp=Timestamp(batch=batch - 1, token=(batch - 1) * step_tokens),
                                timestamp=Timestamp(batch=batch, token=batch * step_tokens), dataloader_len=None,
                                max_duration=Time.from_batch(steps),
                                get_elapsed_duration=lambda batch=batch: Time(batch / steps, "dur"))
        count += bool(saves(state, Event.BATCH_CHECKPOINT))  # type: ignore[arg-type]
    plan = SimpleNamespace(num_steps=steps, num_tokens=steps * step_tokens, tokens_per_step=step_tokens)
    cfg = {"save_folder": "runs/x", "save_interval": interval}
    assert plan_cost.num_checkpoints(cfg, plan) == count  # type: ignore[arg-type]
    assert plan_cost.num_checkpoints({**cfg, "save_num_checkpoints_to_keep": 2}, plan) == min(2, count)  # type: ignore[arg-type]
    assert plan_cost.num_checkpoints({"save_interval": interval}, plan) == 0  # type: ignore[arg-type]


def test_a_real_checkpoint_has_the_planned_size(data_set, tmp_path):
    """What stands in the file beside the three tensors of each weight is the run's record."""
    import nano_run
    from omegaconf import OmegaConf as om

    overrides = ["max_duration=2ba", "save_interval=1ba"]
    nano_run.run(data_set, tmp_path, *overrides).close()
    cfg = om.to_container(nano_run.configure(data_set, tmp_path, *overrides), resolve=True)
    found = cost(cfg, *plan_with(cfg, None), plan_cost.CPU)  # type: ignore[arg-type]
    sizes = {path.name: path.stat().st_size for path in Path(cfg["save_folder"]).rglob("*.pt")  # type: ignore[index]
             if not path.is_symlink()}
    assert sizes.pop("step0.pt") == pytest.approx(found.initial_bytes, rel=0.02)
    assert len(sizes) == found.checkpoints == 2
    for size in sizes.values():
        assert size == pytest.approx(found.checkpoint_bytes, rel=0.02)
    assert cost({**cfg, "load_path": "x.pt"}, *plan_with(cfg, None), plan_cost.CPU).initial_bytes == 0  # type: ignore[arg-type,dict-item]
