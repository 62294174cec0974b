"""Streams merged by keys: against exact fractions, and every source has its share of any run of rows."""

from fractions import Fraction

import numpy as np
import pytest

from ettin_foundry.data.order import Interleave

# billions of tokens per source in the suite's first phase. The smallest is 0.3% of all
PRETRAIN = [837.2, 356.6, 263.9, 80.3, 57.3, 28.0, 19.6, 16.6, 12.7, 12.6, 7.3, 7.3, 5.3]


@pytest.mark.parametrize("shares", [PRETRAIN, [99.5, 0.5], [1] * 50], ids=["pretrain", "one of 0.5%", "fifty equal"])
def test_each_source_has_its_share_of_any_10_000_rows(shares):
    rows = np.round(300_000 * np.array(shares) / np.sum(shares)).astype(int)
    shares = rows / rows.sum()
    epochs = [Interleave(rows, phases) for phases in np.random.default_rng(3).random((2, len(shares)))]
    streams = np.array([merged.at(row)[0] for merged in epochs for row in range(merged.num_rows)])
    # the bound of the module's docstring in rows, twice: runs across an epoch's end are runs too
    bound = 2 * max((1 - share) + share * (len(shares) - 1) for share in shares)
    for stream, share in enumerate(shares):
        running = np.concatenate([[0], np.cumsum(streams == stream)])
        assert np.abs((running[10_000:] - running[:-10_000]) - 10_000 * share).max() < bound


@pytest.mark.parametrize("rows", [[1], [0, 5], [3, 0, 70_000, 1], [20_000, 20_000], [1] * 40, [999_983, 17, 8192]], ids=str)
@pytest.mark.parametrize("spread", [0, 1], ids=["no phases", "phases"])
def test_merged_streams_are_sorted_by_exact_keys_and_any_place_is_found_alone(rows, spread):
    phases = spread * np.random.default_rng(1).integers(0, 2**20, len(rows)) / 2**20
    phases[-1] = phases[0]  # equal keys where rows are equal too: the lower stream comes first
    merged = Interleave(rows, phases)
    total = sum(rows)
    borders = np.linspace(0, total, -(-total // 8192) + 1).astype(int)[:20]  # of blocks, give or take a row per stream
    places = np.concatenate([np.random.default_rng(2).integers(0, total, 200), *(borders + near for near in range(-5, 6))])
    exact = [Fraction(phase) for phase in phases]
    for row in np.unique(places.clip(0, total - 1)).tolist():
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
        with pytest.raises(IndexError):
            Interleave(rows, phases).at(row)
