"""`ettin plan`: its arithmetic against sums by hand, the original's figures, and the host's own counting."""

import copy
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.tools import plan
from ettin_foundry.training import run_config
from ettin_foundry.training.run_config import model_config

ROOT = Path(__file__).resolve().parents[2]
NANO = run_config.resolved([str(ROOT / "yamls/nano.yaml")])
ENC = str(ROOT / "yamls/ettin-enc-150m.yaml")
CHUNKS = (1, 2, 3, 1, 2, 2, 3)


class Data:
    """Two shards with CHUNKS, in the shape of a split; rows counted for length 8 only."""

    chunk_length, num_shards = 3, 2
    samples, tokens = np.array([3, 4]), np.array([6, 8])

    def rows(self, length):
        return np.array([2, 3]) if length == 8 else None

    def lengths(self, shard):
        return np.array([[0, 1, 1, 1], [0, 1, 2, 1]], dtype=np.uint32)[shard]


def pairs_by_mask(config, length):
    """Every layer's attention mask written out, and its ones counted."""
    i, j = np.mgrid[:length, :length]
    total = 0
    for layer in range(config.num_hidden_layers):
        left, right = (length, 0 if config.causal else length) if config.is_global(layer) else config.windows[False]
        total += int(((i - j <= left) & (j - i <= right)).sum())
    return total


@pytest.fixture
def small(monkeypatch):
    """nano.yaml on `Data`: rows of 8, 10 a step, 1,000 tokens."""
    cfg = copy.deepcopy(NANO)
    monkeypatch.setattr(plan, "open_split", lambda folder: Data())
    cfg.update(max_seq_len=8, global_train_batch_size=10, max_duration="1_000tok")
    return cfg


def work_per_token(cfg, targets, pairs):
    """Operations by hand: 6 for each weight of the layers, 6 for each of the head at a target, 12 C a pair."""
    c, layers = 128, 4 * (4 * 128 * 128 + 3 * 128 * 192)
    return 6 * layers + 6 * (c * c + c * cfg["model"]["vocab_size"]) * targets + 12 * c * pairs


@pytest.mark.parametrize("objective, rate, targets", [("mlm", 0.5, 7), ("clm", 0.0, 21)])
def test_a_plan_counts_real_tokens_steps_and_operations(small, monkeypatch, objective, rate, targets):
    small["model"].update(objective=objective)
    small["train_loader"].update(mask_rate=rate)
    result = plan.plan_run(small)
    assert result.tokens_per_step == 56 and result.fill == 56 / 80  # 28 tokens in 5 rows, 10 rows a step
    assert result.num_steps == 18 and result.num_tokens == 18 * 56  # 17 steps are 952 tokens
    assert result.epochs == 18 * 56 / 28
    pairs = sum(pairs_by_mask(model_config(small), n + 2) for n in CHUNKS)
    assert result.flops_per_token == round(work_per_token(small, targets / 28, pairs / 28))
    assert result.targets_per_token == pytest.approx(targets / 28, rel=1e-12)
    assert plan.plan_run({**small, "max_duration": "7ba"}).num_steps == 7
    assert plan.plan_run({**small, "max_seq_len": 16}).epochs is None  # rows are not counted for this length
    unpacked = {**small, "train_loader": {**small["train_loader"], "packing": False}}
    assert plan.plan_run(unpacked).tokens_per_step == 40  # 28 tokens in 7 rows
    monkeypatch.setattr(Data, "lengths", lambda *_: (_ for _ in ()).throw(FileNotFoundError))  # not fetched yet
    assert plan.plan_run(small).epochs is None


def test_a_schedule_is_weighed_by_its_tokens(small):
    """Turns, then rows of mntp and clm, and a rate from 0.4 to 0.2: token by token, each kind with its own mask."""
    objective = [{"until": 500, "cycle": [{"tokens": 60, "objective": "mntp"}, {"tokens": 40, "objective": "clm"}]},
                 {"objective": {"mntp": 0.75, "clm": 0.25}}]
    small["model"].update(objective=objective, local_attention=4)
    small["train_loader"].update(objective=objective, mask_rate=[{"from": 0.4, "to": 0.2}])
    result = plan.plan_run(small)
    tokens = result.num_tokens
    masked = [float(t % 100 < 60) for t in range(500)] + [0.75] * (tokens - 500)
    causal = math.fsum(1 - share for share in masked) / tokens
    assert result.shares == pytest.approx({"clm": causal, "mntp": 1 - causal}, rel=1e-12)
    rates = [0.4 - 0.2 * min(1.0, t / 1000) for t in range(tokens)]
    targets = causal * 21 / 28 + math.fsum(share * rate * 14 / 28 for share, rate in zip(masked, rates)) / tokens
    assert result.targets_per_token == pytest.approx(targets, rel=1e-12)
    kinds = [EttinConfig.for_size("nano", causal=kind, local_attention=4, vocab_size=8192) for kind in (True, False)]
    decoder, encoder = (sum(pairs_by_mask(config, n + 2) for n in CHUNKS) / 28 for config in kinds)
    assert result.flops_per_token == round(work_per_token(small, targets, causal * decoder + (1 - causal) * encoder))


@pytest.mark.parametrize("warmup_tokens, max_tokens", [(20_000, 100_000), (300, 50_000)])
def test_steps_with_a_batch_size_warm_up_are_those_of_a_walk(small, warmup_tokens, max_tokens):
    """Sizes 4, 8, ... 40, each for the same number of steps, one step after the other."""
    small["train_loader"]["batch_size_warmup"] = {"min_size": 4, "tokens": f"{warmup_tokens}tok"}
    small.update(global_train_batch_size=40, device_train_microbatch_size=2, max_duration=f"{max_tokens}tok")
    each = max(1, round(warmup_tokens / (28 / 5 * 4 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9))))
    rows, steps, warm = 0, 0, 0
    while rows * 28 / 5 < max_tokens:
        size = min(40, 4 * (steps // each + 1))
        warm += size < 40
        rows, steps = rows + size, steps + 1
    result = plan.plan_run(small)
    assert (result.num_steps, result.warmup_steps, result.num_tokens) == (steps, warm, round(rows * 28 / 5))


@functools.cache
def phases(size, member):
    overlays = {"pretrain": [], **{phase: [str(ROOT / f"yamls/phases/{phase}.yaml"), "variables.source=x"]
                                   for phase in ("extend", "decay")}}
    recipe = str(ROOT / f"yamls/ettin-{member}-{size}.yaml")
    runs = [(phase, run_config.resolved([recipe, *more])) for phase, more in overlays.items()]
    return plan.plan_runs(runs, gpus="4xH100")


# Ettin's repository, pretraining/README.md: hours on 4x H100 for 2T tokens
@pytest.mark.parametrize("size, hours", [("17m", 141), ("32m", 212), ("68m", 300), ("150m", 470), ("400m", 950),
                                         ("1b", 2170)])
def test_the_phases_of_each_size_take_the_originals_hours_and_microbatches_fill_80_gb(size, hours):
    """2T tokens: 1.7T, 250B and 50B. Of 1b our recipes have 1.8T (last phases a third): its rate is compared."""
    total = plan.totals(phases(size, "dec" if size in ("32m", "1b") else "enc"))
    assert total["num_tokens"] == pytest.approx(1.8e12 if size == "1b" else 2e12, rel=1e-4)  # a phase ends with a step
    assert total["hours"] * 2e12 / total["num_tokens"] == pytest.approx(hours, rel=1e-4)
    for runs in (phases(size, "enc"), phases(size, "dec")):  # a tenth of 80 GB is free; with twice the rows it is not
        assert all(run.memory_gib <= 0.9 * 79.1 for run in runs)
        assert runs[0].microbatch == 704 or runs[0].largest_microbatch < 2 * runs[0].microbatch


@pytest.mark.parametrize(("gpus", "microbatches", "network"), [(8, 8, 50e9), (8, 8, 2e9), (128, 1, 50e9)])
def test_sums_over_gpus_cost_what_a_ring_sends_less_what_a_backward_hides(gpus, microbatches, network, monkeypatch):
    """400m under DDP, by hand: 395,881,664 fp32 gradients, each sent almost twice; 44 rows a pass, 22 on 128 GPUs."""
    monkeypatch.setattr(plan, "NETWORK_BYTES", network)
    recipe = run_config.resolved([ENC.replace("150m", "400m")])
    [run] = plan.plan_runs([("run", recipe)], gpus=f"{gpus}xH100")
    step = run.hours * 3600 / run.num_steps
    sums = 2 * (gpus - 1) / gpus * 4 * 395_881_664 / network
    expected = [step / (step + max(0, sums - hidden)) for hidden in (0, step / microbatches * 2 / 3)]
    assert run.efficiency == pytest.approx(expected, rel=1e-6)
    assert run.efficiency[0] < run.efficiency[1] and (run.efficiency[1] == 1.0) == (network == 50e9)
    assert plan.plan_runs([("run", NANO)], gpus="1xH100", mfu=0.1)[0].efficiency is None
    [sharded] = plan.plan_runs([("run", {**recipe, "fsdp_config": {"state_dict_type": "full"}})], gpus=f"{gpus}xH100")
    weights = 395_881_664 * (gpus - 1) / gpus  # a ring: of each microbatch gathers in bf16, twice, sums in fp32
    assert sharded.sent_bytes == pytest.approx(microbatches * (2 * 2 + 4) * weights, rel=1e-9)


@pytest.mark.parametrize("size, objective, tokens, half, gib", [
    ("150m", "mlm", 65_536, True, 39), ("1b", "clm", 16_384, True, 48.6),  # H200, 2026-11-26, compiled blocks
    ("17m", "mlm", 8192, False, 1.505), ("32m", "mlm", 2048, False, 1.255),  # a CPU: benchmarks/plan_memory.py
])
def test_memory_is_what_was_measured(size, objective, tokens, half, gib):
    config = EttinConfig.for_size(size, causal=objective == "clm")
    found = plan.memory_bytes(config, tokens, 1.0 if objective == "clm" else 0.3, half=half)
    assert sum(found.values()) / 2**30 == pytest.approx(gib, rel=0.05)


def test_the_microbatch_that_is_called_largest_is_the_last_that_fits():
    cfg = run_config.resolved([str(ROOT / "yamls/ettin-enc-400m.yaml")])
    largest = plan.plan_run(cfg, gpus="4xH100").largest_microbatch
    most, more, auto = (plan.plan_run({**cfg, "device_train_microbatch_size": rows}, gpus="4xH100")
                        for rows in (largest, largest + 1, "auto"))
    assert most.fits and most.memory_gib <= 0.9 * 79.1 < more.memory_gib and not more.fits
    assert auto.microbatch == largest
    assert plan.plan_run(cfg, gpus="4xH200").largest_microbatch > largest


@pytest.mark.parametrize("interval, step_tokens, steps", [("1000tok", 300, 20), ("100tok", 300, 7), ("7ba", 300, 20)])
def test_checkpoints_are_counted_as_composer_saves_them(interval, step_tokens, steps):
    """Its own scheduler, asked at each batch."""
    from composer.core import Event, Time, Timestamp
    from composer.utils import create_interval_scheduler

    saves, count = create_interval_scheduler(interval), 0
    for batch in range(1, steps + 1):
        state = SimpleNamespace(previous_timestamp=Timestamp(batch=batch - 1, token=(batch - 1) * step_tokens),
                                timestamp=Timestamp(batch=batch, token=batch * step_tokens), dataloader_len=None,
                                max_duration=Time.from_batch(steps),
                                get_elapsed_duration=lambda batch=batch: Time(batch / steps, "dur"))
        count += bool(saves(state, Event.BATCH_CHECKPOINT))
    cfg, run = {"save_folder": "runs/x", "save_interval": interval}, (steps, steps * step_tokens, step_tokens)
    assert plan.num_checkpoints(cfg, *run) == count
    assert plan.num_checkpoints({**cfg, "save_num_checkpoints_to_keep": 2}, *run) == min(2, count)
    assert plan.num_checkpoints({"save_interval": interval}, *run) == 0


# ------------------------------------------------------------------ the command


def test_a_suite_file_is_planned_stage_by_stage_as_text_and_json(ettin, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ("yamls/suite/demo.yaml", "scale=0.25", f"variables.data={tmp_path}", "--gpus", "1xH100", "--mfu", "0.05")
    code, out, _ = ettin("plan", *options, "--json")
    found = json.loads(out)
    stages = ["encoder", "decoder", "decoder-from-encoder", "encoder-from-decoder"]
    assert code == 0 and [stage["name"] for stage in found["stages"]] == stages
    assert found["stages"][0]["num_steps"] == math.ceil(1e6 / 1024)  # a quarter of nano's 4M tokens
    for key in ("num_tokens", "num_steps", "hours", "checkpoints", "storage_bytes"):
        assert found["totals"][key] == pytest.approx(sum(stage[key] for stage in found["stages"]), rel=1e-12)
    lines = ettin("plan", *options)[1].splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["stage", *stages, "total"]
