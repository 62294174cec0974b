"""Claims of interleave.py, and of the order that rests on it: every source has its share of any run of rows."""

from fractions import Fraction

import numpy as np
import pytest
from memory_set import CountedSet

from ettin_foundry.data.interleave import Interleave
from ettin_foundry.data.order import Order

# billions of tokens per source in the suite's first phase. The smallest is 0.3% of all
PRETRAIN = [837.2, 356.6, 263.9, 80.3, 57.3, 28.0, 19.6, 16.6, 12.7, 12.6, 7.3, 7.3, 5.3]


def worst_deviation(streams, shares, window):
    """Largest distance of a source's share in any run of `window` rows from its share of all."""
    worst = 0.0
    for stream, share in enumerate(shares):
        running = np.concatenate([[0], np.cumsum(streams == stream)])
        worst = max(worst, np.abs((running[window:] - running[:-window]) / window - share).max())
    return worst


@pytest.mark.parametrize(("shares", "bound"), [(PRETRAIN, 0.0006), ([99.5, 0.5], 0.0002), ([1] * 50, 0.0004)],
                         ids=["pretrain", "one of 0.5%", "fifty equal"])
def test_each_source_has_its_share_of_any_10_000_rows(shares, bound):
    shares = np.array(shares) / np.sum(shares)
    rows = np.round(shares * 300_000).astype(int)
    epochs = []
    for phases in np.random.default_rng(3).random((2, len(shares))):  # runs across an epoch's end are runs too
        merged = Interleave(rows, phases)
        epochs.append(np.array([merged.at(row)[0] for row in range(merged.num_rows)]))
    shares = rows / rows.sum()
    for stretch, streams in (("within an epoch", epochs[0]), ("across", np.concatenate(epochs))):
        # 2% is wanted; the docstring's bound is (1 - p) + p * (streams - 1) rows, once more where epochs meet
        stated = max((1 - share) + share * (len(shares) - 1) for share in shares) / 10_000
        worst = worst_deviation(streams, shares, 10_000)
        assert worst < stated * (1 if stretch == "within an epoch" else 2)
        assert worst < bound


def test_rows_of_a_shuffled_set_hold_the_shares_and_every_batch_mixes_the_sources():
    rng = np.random.default_rng(7)
    histograms = rng.multinomial(300, np.full(62, 1 / 62), 4)
    histograms = np.concatenate([np.zeros((4, 1), int), histograms], axis=1)
    sources = ["web"] * 90 + ["code"] * 40 + ["papers"] * 9 + ["books"] * 1  # books: 0.7%
    data = CountedSet(histograms, rng.integers(0, 4, 140), sources)
    order = Order(data, 64, packing=False, shuffle=True, seed=21, window=16)
    names = np.array(sources)[[order.row(number)[1] for number in range(order.rows_per_epoch + 15_000)]]
    streams = np.unique(names, return_inverse=True)[1]
    shares = np.bincount(streams[:order.rows_per_epoch]) / order.rows_per_epoch
    assert shares.min() < 0.0075
    assert worst_deviation(streams, shares, 10_000) < 0.0004
    for batch in np.split(streams[:15_000], 15):
        assert set(batch) == {0, 1, 2, 3}


@pytest.mark.parametrize("rows", [[1], [0, 5], [3, 0, 70_000, 1], [20_000, 20_000], [1] * 40, [999_983, 17, 8192]], ids=str)
@pytest.mark.parametrize("spread", [0, 1], ids=["no phases", "phases"])
def test_merged_streams_are_sorted_by_exact_keys_and_any_place_is_found_alone(rows, spread):
    phases = spread * np.random.default_rng(1).integers(0, 2**20, len(rows)) / 2**20
    phases[-1] = phases[0]  # equal keys where rows are equal too: the lower stream comes first
    merged = Interleave(rows, phases)
    total = sum(rows)
    borders = np.linspace(0, total, -(-total // 8192) + 1).astype(int)[:20]  # of blocks, give or take a row per stream
    places = np.concatenate([np.random.default_rng(2).integers(0, total, 200), *(borders + near for near in range(-5, 6))])
    places = np.unique(places.clip(0, total - 1))
    exact = [Fraction(phase) for phase in phases]
    for row in places.tolist():
        stream, index = Interleave(rows, phases).at(row)  # nothing kept from another place
        key = (index + exact[stream]) / rows[stream]
        # rows below this key in each stream, by whole-number arithmetic
        below = [min(count, max(0, -((phase - key * count) // 1))) + (
            other < stream and count > 0 and (key * count - phase) % 1 == 0 and 0 <= key * count - phase < count)
            for other, (count, phase) in enumerate(zip(rows, exact))]
        assert below[stream] == index and sum(below) == row
        assert merged.counts(row).tolist() == below
    assert merged.counts(total).tolist() == rows
    for row in (-1, total):
        with pytest.raises(IndexError, match=f"row {row}: the streams have {total} rows"):
            Interleave(rows, phases).at(row)
