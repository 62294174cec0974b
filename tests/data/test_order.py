"""Claims of order.py, on sets in memory: completeness, purity, reach of a look-up, windows, shards ahead."""

import hashlib
import json
import logging
import pickle
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from memory_set import MemorySet, realistic_lengths, small_set

from ettin_foundry.data.order import ORDER_VERSION, Order
from ettin_foundry.data.packing import pack_lengths, piece_counts

T = 64
MIXED = ["b", "a", "a", "c", "a", "b", "a", "a", "a"]
KINDS = pytest.mark.parametrize(
    ("packing", "shuffle"), [(True, True), (True, False), (False, True), (False, False)],
    ids=["packed-shuffled", "packed-stored", "unpacked-shuffled", "unpacked-stored"])


def make(data, *, packing=True, shuffle=True, seed=21, window=3, max_seq_len=T):
    return Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=seed, window=window)


def epoch_rows(order, epoch):
    return [order.row(epoch * order.rows_per_epoch + row) for row in range(order.rows_per_epoch)]


def draws(count, *words):
    return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count).tolist()


def sort_by(items, keys):
    return [item for _, item in sorted(zip(keys, items))]


def written_out(data, *, packing, seed, window, epoch):
    """The rows of a shuffled epoch as (shard, samples), written out one by one: slow, exact, and no code of order.py."""
    def shard_rows(shard):
        counts = piece_counts(data.lengths(shard))
        lengths, offsets = pack_lengths(counts, T).expand() if packing else (
            sorted(np.repeat(np.arange(len(counts)), counts).tolist(), reverse=True), range(data.samples[shard] + 1))
        of_length = defaultdict(list)
        stored = (data.sample_lengths(shard) + 2).tolist()
        for sample in sort_by(range(len(stored)), draws(len(stored), 3, seed, epoch, shard)):
            of_length[stored[sample]].append(sample)
        dealt = [of_length[length].pop(0) for length in lengths]
        return [(shard, tuple(dealt[begin:end])) for begin, end in zip(offsets, offsets[1:])]

    keyed, window_number = [], 0
    for number, name in enumerate(sorted(set(data.sources))):
        members = [shard for shard, source in enumerate(data.sources) if source == name]
        phase, *shard_draws = draws(len(members) + 1, 1, seed, epoch, number)
        passes = getattr(data, "passes", [0] * data.num_shards)
        members = sort_by(members, [(passes[shard], draw) for shard, draw in zip(members, shard_draws)])
        size = max(1, int(Fraction(window * len(members), data.num_shards) + Fraction(1, 2)))
        rows = []
        for first in range(0, len(members), size):
            together = [row for shard in members[first:first + size] for row in shard_rows(shard)]
            rows += sort_by(together, draws(len(together), 2, seed, epoch, window_number))
            window_number += 1
        phase = Fraction(phase >> 44, 2**20)
        keyed += [((index + phase) / len(rows), number, row) for index, row in enumerate(rows)]
    return [row for _, _, row in sorted(keyed)]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("sources", [None, MIXED], ids=["one source", "three sources"])
@pytest.mark.parametrize("repeated", [False, True], ids=["once", "repeated"])
def test_rows_and_tokens_are_those_of_an_epoch_written_out_row_by_row(packing, sources, repeated):
    shards = small_set(9)._lengths
    passes = [0, 0, 1, 0, 1, 1, 1, 0, 0] if repeated else None
    data = MemorySet(shards, chunk_length=62, rows_at=(T,), sources=sources, passes=passes)
    order = make(data, packing=packing, window=4)
    number = tokens = 0
    for epoch in range(3):
        rows = written_out(data, packing=packing, seed=21, window=4, epoch=epoch)
        assert len(rows) == order.rows_per_epoch
        for shard, samples in rows:
            assert order.row(number) == (epoch, shard, samples)
            assert order.tokens_before(number) == tokens
            tokens += sum(len(data.chunk(shard, sample)) + 2 for sample in samples)
            number += 1
    assert tokens == 3 * order.tokens_per_epoch


@KINDS
def test_every_chunk_is_in_exactly_one_row_of_every_epoch(packing, shuffle):
    data = small_set(9, sources=MIXED)
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
    data = small_set(9, sources=MIXED)
    order = make(data, packing=packing, shuffle=shuffle)
    running = 0
    for number in range(2 * order.rows_per_epoch + 10):
        assert order.tokens_before(number) == running
        _, shard, samples = order.row(number)
        running += sum(len(data.chunk(shard, sample)) + 2 for sample in samples)


@KINDS
def test_a_row_does_not_depend_on_what_was_looked_up_before(packing, shuffle):
    data = small_set(9, sources=MIXED)
    in_turn = make(data, packing=packing, shuffle=shuffle)
    rows = [in_turn.row(number) for number in range(2 * in_turn.rows_per_epoch)]
    jumping = make(data, packing=packing, shuffle=shuffle)
    for number in np.random.default_rng(0).permutation(len(rows)):
        assert jumping.row(int(number)) == rows[number]
        assert jumping.tokens_before(int(number)) == in_turn.tokens_before(int(number))


def test_stream_of_a_seed_is_the_same_on_every_machine():
    # a change of a digest changes the data of every run that resumes: it needs a new ORDER_VERSION. Those of one source
    # and of the stored order are still version 1's
    shards = [np.array([(37 * chunk + 11 * shard) % 62 + 1 for chunk in range(20 + 5 * shard)]) for shard in range(7)]
    for sources, shuffle, digest in [(None, True, "041b7e1858c890c3"), ("aababac", True, "8a42b442f444a08a"),
                                     ("aababac", False, "3a9d116f3ab00ec7")]:
        order = make(MemorySet(shards, chunk_length=62, sources=sources and list(sources)), shuffle=shuffle)
        rows = [order.row(number) for number in range(2 * order.rows_per_epoch)]
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest
    assert ORDER_VERSION == 2


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
    with caplog.at_level(logging.INFO, logger="ettin_foundry.data.order"):
        orders = [make(data, max_seq_len=96) for data in (stated, computed)]
    assert [record.message for record in caplog.records if "no packed row counts for max_seq_len=96" in record.message]
    assert len(caplog.records) == 1
    assert epoch_rows(orders[0], 0) == epoch_rows(orders[1], 0)


def test_shard_that_contradicts_the_manifest_stops_naming_the_shard():
    data = small_set()
    data._rows[T][4] += 1
    order = make(data)
    with pytest.raises(ValueError, match=r"shard 4 .*rows.*manifest states"):
        epoch_rows(order, 0)


def test_chunks_that_contradict_the_histogram_stop_naming_the_shard():
    data = small_set()
    data.sample_lengths = lambda shard: np.where(shard == 2, 7, data._lengths[shard])
    with pytest.raises(ValueError, match="shard 2 .*stored chunks.*lengths.npy"):
        epoch_rows(make(data), 0)


def test_source_of_one_shard_is_spread_over_the_whole_epoch_from_another_place_each_time():
    data = small_set(9, sources=["big"] * 8 + ["single"])
    order = make(data)
    firsts = set()
    for epoch in range(4):
        places = np.flatnonzero([shard == 8 for _, shard, _ in epoch_rows(order, epoch)])
        gap = order.rows_per_epoch / len(places)
        assert np.abs(np.diff(places) - gap).max() <= 1 and places[0] < gap + 1
        firsts.add(places[0])
    assert len(firsts) > 1


def test_window_of_a_source_is_its_share_of_the_window_and_at_least_one_shard():
    order = make(small_set(30, sources=["big"] * 20 + ["middle"] * 8 + ["small"] * 2), window=6)
    assert [stream.window for stream in order._streams] == [4, 2, 1]  # of 4, 1.6 and 0.4
    assert order.shards_at_once == 7
    assert make(small_set(30), window=6).shards_at_once == 6 and make(small_set(4), window=6).shards_at_once == 4
    assert make(small_set(9, sources=MIXED), shuffle=False, window=6).shards_at_once == 1


def test_repeats_of_a_shard_come_pass_after_pass():
    shards = [np.full(40, 62)] * 12
    data = MemorySet(shards, chunk_length=62, passes=[0, 1, 2] * 4, sources=["many"] * 12)
    for epoch in range(3):
        order = [shard % 3 for _, shard, _ in epoch_rows(make(data, window=1), epoch)]
        assert order == sorted(order)


SHARED_OUT = ["big"] * 16 + ["middle"] * 6 + ["small"] * 2


@KINDS
def test_shards_ahead_name_what_each_source_needs_at_least_a_shard_in_advance(packing, shuffle):
    data = small_set(24, sources=SHARED_OUT)
    order = make(data, packing=packing, shuffle=shuffle, window=4)
    rows_of = data.rows(T) if packing else data.samples
    shards = np.array([order.row(number)[1] for number in range(3 * order.rows_per_epoch)])
    for number in range(0, 2 * order.rows_per_epoch, 7):
        ahead = order.shards_ahead(number)
        assert len(set(ahead)) == len(ahead) <= 2 * order.shards_at_once
        assert shards[number] in ahead[:order.shards_at_once]
        for first, last in [(0, 15), (16, 21), (22, 23)] if shuffle else [(0, 23)]:
            coming = [shard for shard in shards[number:] if first <= shard <= last]
            assert set(coming[:rows_of[first:last + 1].min()]) <= set(ahead)  # a window has at least one shard


def test_shards_ahead_are_in_order_of_need():
    order = make(small_set(24, sources=SHARED_OUT), window=1)  # one shard of each source at a time, then one of each
    shards = [order.row(number)[1] for number in range(3 * order.rows_per_epoch)]
    firsts_of_last_epoch = 2 * order.rows_per_epoch - max(order.table.rows(T))
    for number in range(0, firsts_of_last_epoch, 5):
        needed = [shards.index(shard, number) for shard in order.shards_ahead(number)]
        assert needed[:3] == sorted(needed[:3]) and needed[3:] == sorted(needed[3:])
        assert needed[0] == number


def test_order_survives_pickling_with_its_place():
    data = small_set(9, sources=MIXED)
    order = make(data)
    before = [order.row(number) for number in range(50)]
    again = pickle.loads(pickle.dumps(order))
    assert [again.row(number) for number in range(50)] == before


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
