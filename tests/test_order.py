"""Claims of order.py, on sets in memory: completeness, purity, reach of a look-up, mixing."""

import hashlib
import json
import logging

import numpy as np
import pytest
from memory_set import MemorySet, realistic_lengths, small_set

from ettin_foundry.order import Order, interleave

T = 64
KINDS = pytest.mark.parametrize(
    ("packing", "shuffle"), [(True, True), (True, False), (False, True), (False, False)],
    ids=["packed-shuffled", "packed-stored", "unpacked-shuffled", "unpacked-stored"])


def make(data, *, packing=True, shuffle=True, seed=21, window=3, max_seq_len=T):
    return Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=seed, window=window)


def epoch_rows(order, epoch):
    return [order.row(epoch * order.rows_per_epoch + row) for row in range(order.rows_per_epoch)]


@KINDS
def test_every_chunk_is_in_exactly_one_row_of_every_epoch(packing, shuffle):
    data = small_set()
    order = make(data, packing=packing, shuffle=shuffle)
    stored = [(shard, sample) for shard in range(data.num_shards) for sample in range(data.samples[shard])]
    for epoch in range(3):
        rows = epoch_rows(order, epoch)
        assert all(row[0] == epoch for row in rows)
        assert sorted((shard, sample) for _, shard, samples in rows for sample in samples) == stored


@KINDS
def test_no_row_is_longer_than_max_seq_len(packing, shuffle):
    data = small_set()
    for _, shard, samples in epoch_rows(make(data, packing=packing, shuffle=shuffle), 1):
        assert sum(len(data.chunk(shard, sample)) + 2 for sample in samples) <= T
        assert packing or len(samples) == 1


@KINDS
def test_tokens_before_is_the_running_sum_of_row_tokens_across_an_epochs_end(packing, shuffle):
    data = small_set()
    order = make(data, packing=packing, shuffle=shuffle)
    running = 0
    for number in range(2 * order.rows_per_epoch + 10):
        assert order.tokens_before(number) == running
        _, shard, samples = order.row(number)
        running += sum(len(data.chunk(shard, sample)) + 2 for sample in samples)


@KINDS
def test_a_row_does_not_depend_on_what_was_looked_up_before(packing, shuffle):
    data = small_set()
    in_turn = make(data, packing=packing, shuffle=shuffle)
    rows = [in_turn.row(number) for number in range(2 * in_turn.rows_per_epoch)]
    jumping = make(data, packing=packing, shuffle=shuffle)
    for number in np.random.default_rng(0).permutation(len(rows)):
        assert jumping.row(int(number)) == rows[number]
        assert jumping.tokens_before(int(number)) == in_turn.tokens_before(int(number))


def test_stream_of_a_seed_is_the_same_on_every_machine():
    # the digest is that of the first release: a change of it would change the data of every run that resumes
    shards = [np.array([(37 * chunk + 11 * shard) % 62 + 1 for chunk in range(20 + 5 * shard)]) for shard in range(7)]
    order = make(MemorySet(shards, chunk_length=62, sources=["a", "a", "b", "a", "b", "a", "c"]))
    rows = [order.row(number) for number in range(2 * order.rows_per_epoch)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "622fce0399a9be11"


def test_epochs_and_seeds_differ_in_rows_and_in_what_a_row_holds():
    data = small_set()
    first, second = (epoch_rows(make(data), epoch) for epoch in (0, 1))
    other = epoch_rows(make(data, seed=22), 0)
    for rows in (second, other):
        assert [row[1] for row in first] != [row[1] for row in rows]
        assert {row[1:] for row in first} != {row[1:] for row in rows}


def test_rows_are_permuted_within_windows_of_shards():
    shards = [shard for _, shard, _ in epoch_rows(make(small_set(8), window=3), 0)]
    windows: list[set[int]] = []
    last_of_window = -1
    for number, shard in enumerate(shards):  # a window ends where no shard seen so far comes again
        if number > last_of_window:
            windows.append(set())
        windows[-1].add(shard)
        last_of_window = max(last_of_window, len(shards) - 1 - shards[::-1].index(shard))
    assert [len(window) for window in windows] == [3, 3, 2]  # the last window is smaller
    assert set.union(*windows) == set(range(8))
    assert set(shards[:12]) == windows[0]  # any stretch mixes the rows of the whole window


def test_stored_order_without_shuffle():
    data = small_set()
    unpacked = [(shard, sample) for _, shard, (sample,) in epoch_rows(make(data, packing=False, shuffle=False), 0)]
    assert unpacked == sorted(unpacked)
    packed = epoch_rows(make(data, shuffle=False), 0)
    assert [shard for _, shard, _ in packed] == sorted(shard for _, shard, _ in packed)
    firsts = [(shard, samples[0]) for _, shard, samples in packed]
    assert firsts == sorted(firsts)
    for _, shard, samples in packed:  # the first chunk of a row is its longest
        assert len(data.chunk(shard, samples[0])) == max(len(data.chunk(shard, sample)) for sample in samples)


def test_looking_up_a_place_reads_the_histograms_of_one_window_only():
    rng = np.random.default_rng(0)
    data = MemorySet([rng.integers(1, 63, 20) for _ in range(400)], chunk_length=62, rows_at=(T,))
    order = make(data, window=16)
    assert not data.touched  # the start needs the manifest alone
    for share in (0.01, 0.5, 0.99):
        data.touched.clear()
        number = order.rows_per_epoch * 5 + int(share * order.rows_per_epoch)
        order.tokens_before(number)
        assert data.touched["lengths"] <= 16 and data.touched["sample_lengths"] == 0
        order.row(number)
        assert data.touched["lengths"] <= 16 and data.touched["sample_lengths"] == 1
        order.tokens_before(number + 1)
        order.row(number)
        assert data.touched["lengths"] <= 2 * 16 and data.touched["sample_lengths"] == 1


def test_reading_on_builds_every_window_once():
    data = small_set(12)
    order = make(data, window=3)
    for number in range(order.rows_per_epoch):
        order.tokens_before(max(0, number - 5))
        order.row(number)
    assert data.touched == {"lengths": 12, "sample_lengths": 12}


class Huge:
    """70,000 shards of 2T tokens, of which only what the manifest states exists."""

    shards = 70_000
    samples = np.full(shards, 45_000)
    tokens = 28_000_000 + np.arange(shards) % 1000
    sources = [f"source-{shard % 7}" for shard in range(70_000)]

    def rows(self, max_seq_len):
        return np.full(self.shards, 27_500)

    def lengths(self, shard):
        raise AssertionError("read a histogram")

    sample_lengths = lengths


def test_start_of_a_2t_token_set_reads_the_manifest_only():
    order = make(Huge(), max_seq_len=1024)
    assert order.rows_per_epoch == 70_000 * 27_500
    assert order.tokens_per_epoch == Huge.tokens.sum() + 2 * Huge.samples.sum()
    assert order.tokens_before(3 * order.rows_per_epoch) == 3 * order.tokens_per_epoch


def test_row_counts_missing_in_the_manifest_are_computed_and_logged(caplog):
    stated, computed = small_set(rows_at=(96,)), small_set(rows_at=())
    with caplog.at_level(logging.INFO, logger="ettin_foundry.order"):
        orders = [make(data, max_seq_len=96) for data in (stated, computed)]
    assert [record.message for record in caplog.records if "no packed row counts for max_seq_len=96" in record.message]
    assert len(caplog.records) == 1
    assert epoch_rows(orders[0], 0) == epoch_rows(orders[1], 0)


def test_shard_that_contradicts_the_manifest_stops_naming_the_shard():
    data = small_set()
    data._rows[T][4] += 1
    order = make(data)
    with pytest.raises(ValueError, match=r"shard 4 .*rows.*manifest says.*convert it again"):
        epoch_rows(order, 0)


def test_chunks_that_contradict_the_histogram_stop_naming_the_shard():
    data = small_set()
    data.sample_lengths = lambda shard: np.where(shard == 2, 7, data._lengths[shard])
    with pytest.raises(ValueError, match="shard 2 .*stored chunks.*lengths.npy"):
        epoch_rows(make(data), 0)


def test_sources_keep_their_share_in_any_stretch_of_shards():
    rng = np.random.default_rng(5)
    sources = ["big"] * 60 + ["middle"] * 25 + ["small"] * 5 + ["single"]
    tokens = rng.integers(80, 120, len(sources))
    for epoch in range(5):
        order = interleave(tokens, sources, 21, epoch)
        assert sorted(order) == list(range(len(sources)))
        for source in set(sources):
            mine = np.array([sources[shard] == source for shard in order])
            given, all_given = np.cumsum(tokens[order] * mine), np.cumsum(tokens[order])
            expected = all_given * tokens[[name == source for name in sources]].sum() / tokens.sum()
            # to within a shard of this source, and one of each other source that the place between shards may be off by
            assert np.abs(given - expected).max() < 120 * (1 + 4 * mine.mean())
    orders = [interleave(tokens, sources, 21, epoch).tolist() for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert len({order.index(90) for order in orders}) > 1  # a source of one shard is not always in the same place


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": -1}, "shuffle_seed: -1 given"), ({"seed": 2**32}, "shuffle_seed: 4294967296 given"),
    ({"window": 0}, "shuffle_window: 0 given")])
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(small_set(), **change)


def test_set_without_chunks_is_refused():
    with pytest.raises(ValueError, match="holds no chunk"):
        make(MemorySet([np.zeros(0, int)], chunk_length=62, rows_at=(T,)))


def test_fill_of_an_epoch_is_real_tokens_over_places():
    rng = np.random.default_rng(6)
    data = MemorySet([realistic_lengths(rng, 1500, 1022) for _ in range(2)], chunk_length=1022)
    order = make(data, max_seq_len=1024)
    assert order.fill == (data.tokens.sum() + 2 * data.samples.sum()) / (order.rows_per_epoch * 1024)
    assert order.fill > 0.995
