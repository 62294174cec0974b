"""Intervals against scipy's bootstrap and against the formulas of a normal sample."""

from __future__ import annotations

import numpy as np
import pytest
from ettin_eval.bootstrap import Bootstrap, Interval
from scipy import stats


def test_a_difference_of_one_seed_is_scipys_paired_bootstrap():
    generator = np.random.default_rng(1)
    first, second = generator.random((1, 80)), generator.random((1, 80)) * 0.8
    ours = Bootstrap({"a": 80}, 1, draws=20_000).difference({"a": first}, {"a": second}, ["a"])
    theirs = stats.bootstrap((first[0], second[0]), lambda x, y: np.mean(x) - np.mean(y), paired=True, vectorized=False,
                             method="percentile", n_resamples=20_000, rng=2).confidence_interval
    assert ours.value == pytest.approx(np.mean(first) - np.mean(second), rel=1e-12)
    # two samples of 20,000 draws: a quantile at 2.5% has a standard error of sqrt(.025 * .975 / 20,000) / density, here
    # about 0.0006; five of the two together
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_items_that_both_models_share_cancel_in_a_paired_difference():
    generator = np.random.default_rng(3)
    hard = generator.random((2, 200))  # how hard an item is, for both models
    bootstrap = Bootstrap({"a": 200}, 2, draws=2_000)
    paired = bootstrap.difference({"a": hard + 0.01}, {"a": hard}, ["a"])
    assert paired == pytest.approx((0.01, 0.01, 0.01), abs=1e-6)  # fp32 weights
    alone = bootstrap.mean({"a": hard}, ["a"])
    assert alone.high - alone.low > 0.04


def test_the_spread_between_seeds_widens_the_interval():
    bootstrap = Bootstrap({"a": 400}, 4, draws=20_000)
    seeds = np.array([0.1, 0.2, 0.4, 0.5])[:, None]
    found = bootstrap.mean({"a": np.broadcast_to(seeds, (4, 400))}, ["a"])
    # items are constant within a seed, so what is drawn is the mean of 4 of the 4 seeds: all 256 draws, counted
    means = np.sort(np.mean(np.stack(np.meshgrid(*[seeds[:, 0]] * 4), -1).reshape(-1, 4), axis=1))
    assert found.value == pytest.approx(0.3)
    # the distribution is discrete in steps of 0.025, and a quantile of the draws may fall on a neighbour
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.0251)


def test_tasks_weigh_alike_whatever_their_items():
    bootstrap = Bootstrap({"a": 10, "b": 1000}, 1, draws=100)
    model = {"a": np.ones((1, 10)), "b": np.zeros((1, 1000))}
    assert bootstrap.mean(model, ["a", "b"]) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)  # fp32 weights


def test_verdicts():
    assert [Interval(*each).verdict for each in ((1, 0.5, 2), (-1, -2, -0.5), (0.1, -0.2, 0.3))] == [
        "holds", "does not", "undecided"]


def test_models_of_other_items_are_not_compared():
    with pytest.raises(ValueError, match="a must have the same seeds and items for both models"):
        Bootstrap({"a": 3}, 1).difference({"a": np.ones((1, 3))}, {"a": np.ones((1, 4))}, ["a"])
