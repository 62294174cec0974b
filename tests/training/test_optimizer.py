"""StableAdamW and the schedules, held to formulas in float64 and to hand-computed values."""

from __future__ import annotations

import copy
import math
import warnings
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("composer")

from composer.core import Time, Timestamp  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict  # noqa: E402

from ettin_foundry.training.optimizer import (  # noqa: E402
    OneMinusSqrt,
    StableAdamW,
    WarmupStableDecay,
    one_minus_sqrt,
    warmup_stable_decay,
)

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


def params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((5, 3), (4,), (2, 2))]


def gradients(step, like):
    generator = torch.Generator().manual_seed(100 + step)
    scale = 30.0 if step == 4 else 1.0  # a spike, so that the clipping of the step must act
    return [scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in like]


def run(optimizer, own, steps):
    for step in steps:
        for p, g in zip(own, gradients(step, own)):
            p.grad = g
        optimizer.step()


@pytest.mark.filterwarnings("ignore:You are using weight_decay")  # high on purpose: it must show
def test_steps_follow_the_formula():
    own = params(torch.float64)
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


@pytest.mark.parametrize("give", [
    lambda own: iter(own),
    lambda own: list(own),
    lambda own: [{"params": iter(own)}],
    lambda own: [{"params": {i: p for i, p in enumerate(own)}.values()}],
], ids=["generator", "list", "group of a generator", "group of dict values"])
def test_norms_and_biases_are_never_decayed(give):
    own = params()
    optimizer = StableAdamW(give(own), 0.01, weight_decay=1e-5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in own] == [1e-5, 0.0, 1e-5]


def test_a_groups_own_lr_is_the_peak_its_decay_is_relative_to():
    own = params()
    optimizer = StableAdamW([{"params": own[:1]}, {"params": own[1:], "lr": 0.5}], 0.01, weight_decay=1e-5)
    assert [group["max_lr"] for group in optimizer.param_groups] == [0.01, 0.5, 0.5]


@pytest.mark.parametrize(("give", "kwargs", "says"), [
    (lambda own: own, {"lr": 0.0}, "optimizer.lr"),
    (lambda own: own, {"max_lr": 0}, "optimizer.max_lr"),
    (lambda own: [{"params": own, "betas": (0.8, 0.9)}], {}, "betas would have no effect"),
    (lambda own: [{"params": own[1:2], "weight_decay": 0.1}], {}, "never decayed"),
], ids=["lr 0", "max_lr 0", "inert key", "decay of a norm"])
def test_settings_without_effect_are_refused(give, kwargs, says):
    with pytest.raises(ValueError, match=says):
        StableAdamW(give(params()), **{"lr": 0.01, **kwargs})


def test_a_high_weight_decay_is_warned_about_and_a_recipes_is_not():
    with pytest.warns(UserWarning, match="potentially high"):
        StableAdamW(params(), 0.01, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StableAdamW(params(), 0.01, weight_decay=1e-5)


@pytest.mark.parametrize("through", ["torch", "composer"])
def test_resumed_steps_equal_uninterrupted_steps_bitwise(through, tmp_path):
    whole, halves = nn.ParameterList(params()), nn.ParameterList(params())
    optimizer = StableAdamW(whole, 0.01, weight_decay=1e-4)
    run(optimizer, whole, range(6))
    first = StableAdamW(halves, 0.01, weight_decay=1e-4)
    run(first, halves, range(3))
    saved = first.state_dict() if through == "torch" else get_optimizer_state_dict(halves, first)
    torch.save(saved, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    second = StableAdamW(halves, 0.01, weight_decay=1e-4)
    halves.zero_grad()
    if through == "torch":
        second.load_state_dict(saved)
    else:  # what Composer calls; it first makes a fake step with zero gradients
        set_optimizer_state_dict(halves, second, saved)
    run(second, halves, range(3, 6))
    for a, b in zip(whole, halves):
        assert torch.equal(a, b)


def test_reading_the_state_of_a_fresh_optimizer_changes_nothing():
    """torch.distributed.checkpoint makes a step of its own to have a state at all."""
    read, untouched = nn.ParameterList(params()), params()
    optimizer = StableAdamW(read, 0.01)
    get_optimizer_state_dict(read, optimizer)
    run(optimizer, read, range(2))
    run(StableAdamW(untouched, 0.01), untouched, range(2))
    assert all(torch.equal(a, b) for a, b in zip(read, untouched))


def test_a_checkpoint_written_on_a_gpu_continues_on_the_cpu():
    """It says triton, and holds the kernels' scratch tensors; optimi alone would launch its kernels here."""
    own, other = params(), params()
    optimizer = StableAdamW(own, 0.01)
    run(optimizer, own, range(2))
    run(StableAdamW(other, 0.01), other, range(2))
    saved = copy.deepcopy(optimizer.state_dict())  # it shares the optimizer's tensors
    for group in saved["param_groups"]:
        group["triton"] = True
    for state in saved["state"].values():
        state["kahan_comp"], state["mean_square"] = torch.zeros(1, dtype=torch.uint8), torch.zeros(1)
    loaded = StableAdamW(other, 0.01)
    loaded.load_state_dict(saved)
    run(optimizer, own, range(2, 4))
    run(loaded, other, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(own, other))


@pytest.mark.parametrize(("t", "factor"), [
    (0, 1e-10), (50, 0.5), (100, 1.0), (600, 1.0), (700, 0.55), (800, 0.1), (900, 0.1),
])
def test_warmup_stable_decay_at_hand_computed_times(t, factor):
    value = warmup_stable_decay(t, warmup=100, decay=200, total=800, alpha_f=0.1)
    assert value == pytest.approx(factor, rel=1e-9)  # 0.5 is 0.5 + 0.5e-10


def test_warmup_stable_decay_without_a_decay_stays_flat():
    assert [warmup_stable_decay(t, warmup=0, decay=0, total=10, alpha_f=0.0) for t in (0, 9, 10, 11)] == [1.0] * 4


@pytest.mark.parametrize(("t", "factor"), [(0, 1.0), (600, 1.0), (650, 0.55), (800, 0.1), (900, 0.1)])
def test_one_minus_sqrt_at_hand_computed_times(t, factor):
    assert one_minus_sqrt(t, decay=200, total=800, alpha_f=0.1) == pytest.approx(factor, rel=1e-12)


def at(max_duration, *, tokens=0, batch=0):
    return SimpleNamespace(max_duration=Time.from_timestring(max_duration) if max_duration else None,
                           timestamp=Timestamp(token=tokens, batch=batch))


def test_schedulers_read_the_clock_that_max_duration_counts_in():
    by_tokens = WarmupStableDecay("1000tok", "0.2dur", alpha_f=0.02)
    assert by_tokens(at("10000tok", tokens=9000, batch=3)) == pytest.approx(0.51)
    by_batches = WarmupStableDecay("0tok", "20ba", alpha_f=0.02)  # zero has no unit
    assert by_batches(at("100ba", tokens=9000, batch=90)) == pytest.approx(0.51)
    assert OneMinusSqrt(alpha_f=0.5)(at("400ba", batch=100)) == 0.75
    assert WarmupStableDecay("0.3dur", "0.7dur", alpha_f=0.0)(at("1000tok", tokens=300)) == 1.0


@pytest.mark.parametrize(("call", "says"), [
    (lambda: WarmupStableDecay("1ep", "0tok"), "t_warmup: '1ep'"),
    (lambda: WarmupStableDecay("10", "0tok"), "t_warmup: '10'"),
    (lambda: WarmupStableDecay(10, "0tok"), "t_warmup: 10"),  # type: ignore[arg-type]
    (lambda: WarmupStableDecay("0tok", "0tok", alpha_f=1.5), "alpha_f: 1.5"),
    (lambda: OneMinusSqrt("0tok"), "t_decay"),
    (lambda: WarmupStableDecay("600tok", "0.5dur")(at("1000tok")), r"t_warmup \+ t_decay is 1100tok"),
    (lambda: WarmupStableDecay("6ba", "0ba")(at("1000tok")), "t_warmup: 6ba given with max_duration 1000tok"),
    (lambda: WarmupStableDecay("0ba", "0ba")(at("1ep")), "max_duration: 1ep"),
    (lambda: WarmupStableDecay("0ba", "0ba")(at(None)), "max_duration: missing"),
    (lambda: WarmupStableDecay("0ba", "0ba")(at("1ba"), 2.0), "scale_schedule_ratio"),
], ids=["epochs", "no unit", "a number", "alpha_f", "no decay", "too long", "mixed units", "run in epochs", "no run", "ssr"])
def test_impossible_schedules_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
