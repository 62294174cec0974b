"""StableAdamW held to its formula in float64 and to torch-optimi; the clocks of schedules (values: benchmarks/fuzz)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from composer.core import Time, Timestamp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ettin_foundry.training.optimizer import OneMinusSqrt, StableAdamW, WarmupStableDecay

BETAS, EPS = (0.9, 0.98), 1e-6


class Formula:
    """facts of the reference (ModernBERT src/optimizer.py), one tensor, float64, written without looking at ours."""

    def __init__(self, p, decay, max_lr):
        self.p, self.decay, self.max_lr = p.detach().double().clone(), decay if p.ndim > 1 else 0.0, max_lr
        self.m, self.v, self.t, self.clipped = torch.zeros_like(self.p), torch.zeros_like(self.p), 0, 0

    def step(self, g, lr):
        g, self.t = g.double(), self.t + 1
        b1, b2 = (b * (1 - b ** (self.t - 1)) / (1 - b ** self.t) for b in BETAS)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        rms = math.sqrt((g * g / torch.maximum(self.v, torch.tensor(EPS**2, dtype=torch.float64))).mean().item())
        self.clipped += rms > 1
        eta = lr / max(1.0, rms)
        self.p = self.p * (1 - eta / self.max_lr * self.decay) - eta * self.m / (self.v.sqrt() + EPS)


def params(dtype=torch.float32, times=1):
    generator = torch.Generator().manual_seed(1)
    shapes = (5 * times, 3), (4 * times,), (2 * times, 2)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def gradients(step, like):
    generator = torch.Generator().manual_seed(100 + step)
    scale = 30.0 if step == 4 else 1.0  # a spike, so that the clipping of the step must act
    return [scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in like]


def run(optimizer, own, steps):
    for step in steps:
        for p, g in zip(own, gradients(step, own)):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("times", [1, 2**17])  # 2^21 and 2^19 entries are worked on one after the other
def test_steps_follow_the_formula(times):
    own = params(torch.float64, times)
    optimizer = StableAdamW(own, 0.01, betas=BETAS, eps=EPS, weight_decay=0.1, max_lr=0.02)
    reference = [Formula(p, 0.1, 0.02) for p in own]
    for step in range(8):
        lr = 0.01 * (step + 1) / 8
        for group in optimizer.param_groups:
            group["lr"] = lr
        for formula, p, g in zip(reference, own, gradients(step, own)):
            p.grad = g
            formula.step(g, lr)
        optimizer.step()
    for formula, p in zip(reference, own):
        assert formula.clipped  # else this says nothing about the stabiliser
        torch.testing.assert_close(p.detach(), formula.p, rtol=1e-12, atol=1e-12)  # float64 on both sides


def test_steps_in_fp32_are_those_of_torch_optimi():
    optimi = pytest.importorskip("optimi")
    own, other = params(), params()
    ours = StableAdamW(own, 0.01, betas=BETAS, eps=EPS, weight_decay=1e-4)
    theirs = optimi.StableAdamW([{"params": [other[0], other[2]]}, {"params": other[1:2], "weight_decay": 0.0}], 0.01,
                                betas=BETAS, eps=EPS, weight_decay=1e-4, decouple_lr=True, max_lr=0.01, triton=False)
    run(ours, own, range(8))
    run(theirs, other, range(8))
    for a, b in zip(own, other):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # roundings of 8 updates of up to 0.01


def test_a_step_reads_no_value_back():
    own = nn.Parameter(torch.empty(3, 2, device="meta"))  # which has none: on a GPU a read would stall the step
    own.grad = torch.empty_like(own)
    StableAdamW([own], 0.01, weight_decay=1e-5).step()


def test_impossible_settings_are_refused():
    for kwargs, says in (({"lr": 0.0}, "optimizer.lr"), ({"max_lr": 0}, "max_lr"), ({"betas": (0.9, 1.0)}, "betas")):
        with pytest.raises(ValueError, match=says):
            StableAdamW(params(), **{"lr": 0.01, **kwargs})
    for warmup, alpha_f, says in (("1ep", 0, "t_warmup .*'1ep'"), (10, 0, "t_warmup .*10"), ("0tok", 1.5, "1.5")):
        with pytest.raises(ValueError, match=says):
            WarmupStableDecay(warmup, "0tok", alpha_f=alpha_f)  # type: ignore[arg-type]


def test_reading_the_state_of_a_fresh_optimizer_changes_nothing():
    """torch.distributed.checkpoint makes a step of its own to have a state at all."""
    read, untouched = nn.ParameterList(params()), params()
    optimizer = StableAdamW(read, 0.01)
    get_optimizer_state_dict(read, optimizer)
    run(optimizer, read, range(2))
    run(StableAdamW(untouched, 0.01), untouched, range(2))
    assert all(torch.equal(a, b) for a, b in zip(read, untouched))


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize(("schedule", "run_length", "tokens", "batch", "factor"), [
    (WarmupStableDecay("1000tok", "0.2dur", alpha_f=0.02), "10000tok", 9000, 3, 0.51),
    (WarmupStableDecay("0tok", "20ba", alpha_f=0.02), "100ba", 9000, 90, 0.51),  # zero has no unit
    (WarmupStableDecay("0.3dur", "0.7dur"), "1000tok", 300, 1, 1.0),
    # tokens are counted in a run of batches too
    (WarmupStableDecay("2000tok", "0tok"), "8ba", 0, 0, 1e-10),
    (WarmupStableDecay("2000tok", "0tok"), "8ba", 500, 4, 0.25),
    (WarmupStableDecay("2000tok", "0.5dur"), "8ba", 2100, 6, 0.5),  # halfway from batch 4 to batch 8
    (WarmupStableDecay("0tok", "800tok"), "8ba", 0, 0, 1.0),
    (WarmupStableDecay("0tok", "800tok"), "8ba", 1200, 6, 0.5),  # 200 tokens a batch: the end is at 1,600
    (OneMinusSqrt("800tok", alpha_f=0.0), "8ba", 1000, 5, 0.5), (OneMinusSqrt("0tok"), "8ba", 1000, 5, 1.0),
    (WarmupStableDecay("0tok", "500tok", t_max="1000tok"), "4000tok", 750, 9, 0.5),])
def test_each_time_of_a_schedule_is_read_on_its_own_clock(schedule, run_length, tokens, batch, factor):
    state = SimpleNamespace(max_duration=Time.from_timestring(run_length),
                            timestamp=Timestamp(token=tokens, batch=batch))
    assert schedule(state) == pytest.approx(factor, rel=1e-9)
