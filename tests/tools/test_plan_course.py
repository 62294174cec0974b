"""Sums over schedules against one token at a time, and learning rates against formulas written out by hand."""

import math
import random

import numpy as np
import pytest

from ettin_foundry.tools.plan_course import course, learning_rates, lr_joints

TEXT, FIRST = 0.97, 0.015  # shares of the tokens: between BOS and EOS, first of a document


def random_objective(rng, total):
    """(YAML form, {objective: share} of each token) of a random schedule; the second is made without ettin_foundry."""

    def value():
        names = rng.sample(["mlm", "clm", "mntp"], rng.choice([1, 1, 2, 3]))
        if len(names) == 1:
            return names[0], {names[0]: 1.0}
        cuts = sorted(rng.sample(range(1, 8), len(names) - 1))
        shares = {name: (b - a) / 8 for name, a, b in zip(names, [0, *cuts], [*cuts, 8])}
        return shares, shares

    if rng.random() < 0.3:
        plain, shares = value()
        return plain, [shares] * total
    borders = sorted(rng.sample(range(1, total), rng.randint(0, 3)))
    segments, tokens = [], []
    for begin, end in zip([0, *borders], [*borders, total]):
        if rng.random() < 0.4:
            blocks = [(rng.randint(1, 30), *value()) for _ in range(rng.randint(2, 3))]
            turn = [shares for length, _, shares in blocks for _ in range(length)]
            segments.append({"until": end, "cycle": [{"tokens": n, "objective": plain} for n, plain, _ in blocks]})
            tokens += [turn[t % len(turn)] for t in range(end - begin)]
        else:
            plain, shares = value()
            segments.append({"until": end, "objective": plain})
            tokens += [shares] * (end - begin)
    return segments, tokens


def random_rate(rng, total):
    """(YAML form, rate at each token)."""
    if rng.random() < 0.3:
        rate = rng.uniform(0.01, 1)
        return rate, [rate] * total
    borders = sorted(rng.sample(range(1, total), rng.randint(0, 3)))
    segments, tokens = [], []
    for begin, end in zip([0, *borders], [*borders, total]):
        first, last = rng.uniform(0.01, 1), rng.uniform(0.01, 1)
        if rng.random() < 0.5:
            segments.append({"until": end, "rate": first})
            tokens += [first] * (end - begin)
        else:
            segments.append({"until": end, "from": first, "to": last})
            tokens += [first + (last - first) * t / (end - begin) for t in range(end - begin)]
    return segments, tokens


def targets(shares, rate):
    """Of one token, in words of the objectives: all but the first; the chosen ones; a rate uniform from 1/1000 to 1."""
    masked = shares.get("mlm", 0) + shares.get("mntp", 0)
    return shares.get("clm", 0) * (1 - FIRST) + masked * rate * TEXT


def test_means_of_1000_random_schedules_are_those_of_single_tokens():
    rng = random.Random(7)
    for _ in range(1000):
        total = rng.randint(20, 80)
        objective, shares = random_objective(rng, total)
        mask_rate, rates = random_rate(rng, total)
        more = rng.choice([0, 0, 9])  # a run ends with a whole step, past its tokens; the last value then stays
        cfg = {"model": {"objective": objective}, "train_loader": {"mask_rate": mask_rate}, "max_duration": f"{total}tok"}
        if more and isinstance(objective, list) and "cycle" in objective[-1]:
            more = 0  # where a turn stands past its end is nobody's business
        end = mask_rate[-1].get("to", mask_rate[-1].get("rate")) if isinstance(mask_rate, list) else mask_rate
        shares, rates = shares + shares[-1:] * more, rates + [end] * more
        found = course(cfg, total + more)
        each = [targets(s, r) for s, r in zip(shares, rates)]
        # float64 sums of up to 89 numbers below 1
        assert found.predicted(TEXT, FIRST) == pytest.approx(math.fsum(each) / len(each), rel=1e-12)
        assert found.most_predicted(TEXT, FIRST) == pytest.approx(max(each), rel=1e-12)
        for name, share in found.shares().items():
            assert share == pytest.approx(math.fsum(s.get(name, 0) for s in shares) / len(shares), rel=1e-12)
        assert {name for s in shares for name in s} <= set(found.objectives)


def test_shares_between_bounds_are_means_of_single_tokens():
    rng = random.Random(3)
    for _ in range(50):
        objective, shares = random_objective(rng, 120)
        cfg = {"model": {"objective": objective}, "train_loader": {"mask_rate": 0.3}, "max_duration": "120tok"}
        bounds = np.array(sorted({0, 120, *rng.sample(range(1, 120), 9)}), dtype=np.float64)
        found = course(cfg, 120).shares_between(bounds)
        for i, (a, b) in enumerate(zip(bounds.astype(int), bounds.astype(int)[1:])):
            for name, values in found.items():
                expected = sum(s.get(name, 0) for s in shares[a:b]) / (b - a)
                assert values[i] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scheduler, formula", [
    ({"name": "warmup_stable_decay", "t_warmup": "100tok", "t_decay": "0.2dur", "alpha_f": 0.1},
     lambda t: 1e-10 + (1 - 1e-10) * t / 100 if t < 100 else 1.0 if t < 800 else 1 - 0.9 * (t - 800) / 200),
    ({"name": "warmup_stable_decay", "t_warmup": "0tok", "t_decay": "0tok"}, lambda t: 1.0),
    ({"name": "one_minus_sqrt", "t_decay": "1dur", "alpha_f": 0.5}, lambda t: 0.5 + 0.5 * (1 - math.sqrt(t / 1000))),
    ({"name": "one_minus_sqrt", "t_decay": "500tok", "t_max": "900tok"},
     lambda t: 1 - math.sqrt(min(1.0, max(0.0, (t - 400) / 500)))),
])
def test_learning_rates_follow_the_recipe(scheduler, formula):
    cfg = {"scheduler": scheduler, "optimizer": {"lr": 8e-4}, "max_duration": "1000tok"}
    places = np.linspace(0, 1, 301)
    assert learning_rates(cfg, places) == pytest.approx([8e-4 * formula(1000 * p) for p in places], rel=1e-9)
    assert all(0 <= joint <= 1 for joint in lr_joints(cfg))


def test_a_scheduler_of_the_host_is_not_guessed():
    cfg = {"scheduler": {"name": "cosine_with_warmup"}, "optimizer": {"lr": 1e-3}, "max_duration": "1000tok"}
    assert learning_rates(cfg, np.linspace(0, 1, 3)) is None and lr_joints(cfg) == []
