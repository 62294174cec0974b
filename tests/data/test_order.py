"""The order of rows, on datasets in memory: against epochs written out, reach of a look-up, shards ahead; and streams
merged by keys: against exact fractions, and every source has its share of any run of rows."""

import hashlib
import json
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from memory_set import MemorySet, small_set

from ettin_foundry.data.order import ORDER_VERSION, Interleave, Order
from ettin_foundry.data.packing import pack_lengths, piece_counts

T = 64
MIXED = ["b", "a", "a", "c", "a", "b", "a", "a", "a"]
KINDS = pytest.mark.parametrize(
    ("packing", "shuffle"), [(True, True), (True, False), (False, True), (False, False)])


def make(data, *, packing=True, shuffle=True, seed=21, window=3, max_seq_len=T):
    return Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=seed, window=window)


def epoch_rows(order, epoch):
    return [order.row(epoch * order.rows_per_epoch + row) for row in range(order.rows_per_epoch)]


def draws(count, *words):
    return np.random.PCG64(np.random.SeedSequence(words)).random_raw(count).tolist()


def sort_by(items, keys):
    return [item for _, item in sorted(zip(keys, items))]


def written_out(data, *, packing, shuffle, seed, window, epoch):
    """An epoch's rows as (shard, samples), written out one by one: slow, exact, and no code of order.py."""
    def shard_rows(shard):
        counts = piece_counts(data.lengths(shard))
        lengths, offsets = pack_lengths(counts, T).expand() if packing else (
            sorted(np.repeat(np.arange(len(counts)), counts).tolist(), reverse=True), range(data.samples[shard] + 1))
        of_length = defaultdict(list)
        stored = (data.sample_lengths(shard) + 2).tolist()
        places = range(len(stored))
        for sample in sort_by(places, draws(len(stored), 3, seed, epoch, shard)) if shuffle else places:
            of_length[stored[sample]].append(sample)
        dealt = [of_length[length].pop(0) for length in lengths]
        return [(shard, tuple(dealt[begin:end])) for begin, end in zip(offsets, offsets[1:])]

    if not shuffle:  # by the stored place of the first chunk
        return [row for shard in range(len(data.stored)) for row in sorted(shard_rows(shard))]
    keyed, window_number = [], 0
    for number, name in enumerate(sorted(set(data.sources))):
        members = [shard for shard, source in enumerate(data.sources) if source == name]
        phase, *shard_draws = draws(len(members) + 1, 1, seed, epoch, number)
        passes = getattr(data, "passes", [0] * len(data.stored))
        members = sort_by(members, [(passes[shard], draw) for shard, draw in zip(members, shard_draws)])
        size = max(1, int(Fraction(window * len(members), len(data.stored)) + Fraction(1, 2)))
        rows = []
        for first in range(0, len(members), size):
            together = [row for shard in members[first:first + size] for row in shard_rows(shard)]
            rows += sort_by(together, draws(len(together), 2, seed, epoch, window_number))
            window_number += 1
        phase = Fraction(phase >> 44, 2**20)
        keyed += [((index + phase) / len(rows), number, row) for index, row in enumerate(rows)]
    return [row for _, _, row in sorted(keyed)]


@KINDS
@pytest.mark.parametrize("sources", [None, MIXED])
@pytest.mark.parametrize("passes", [None, [0, 0, 1, 0, 1, 1, 1, 0, 0]])
def test_rows_and_tokens_are_those_of_epochs_written_out_row_by_row_in_whatever_order_they_are_looked_up(
        packing, shuffle, sources, passes):
    data = small_set(9, sources=sources, passes=passes)
    order, jumping = (make(data, packing=packing, shuffle=shuffle, window=4) for _ in range(2))
    expected, tokens = [], 0
    for epoch in range(3):
        rows = written_out(data, packing=packing, shuffle=shuffle, seed=21, window=4, epoch=epoch)
        assert len(rows) == order.rows_per_epoch
        chunks = [(shard, sample) for shard, samples in rows for sample in samples]
        assert len(set(chunks)) == len(chunks) == sum(data.samples)
        for shard, samples in rows:
            expected.append(((epoch, shard, samples), tokens))
            tokens += sum(data.stored[shard][sample] + 2 for sample in samples)
    assert tokens == 3 * order.tokens_per_epoch
    assert [(order.row(number), order.tokens_before(number)) for number in range(len(expected))] == expected
    for number in np.random.default_rng(0).permutation(len(expected)).tolist():
        assert (jumping.row(number), jumping.tokens_before(number)) == expected[number]


def test_stream_of_a_seed_is_the_same_on_every_machine():
    # a change of a digest changes the data of every run that resumes: it needs a new ORDER_VERSION
    shards = [np.array([(37 * chunk + 11 * shard) % 62 + 1 for chunk in range(20 + 5 * shard)]) for shard in range(7)]
    for sources, shuffle, digest in [(None, True, "041b7e1858c890c3"), ("aababac", True, "8a42b442f444a08a"),
                                     ("aababac", False, "3a9d116f3ab00ec7")]:
        order = make(MemorySet(shards, sources=sources and list(sources)), shuffle=shuffle)
        rows = [order.row(number) for number in range(2 * order.rows_per_epoch)]
        assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest
    assert ORDER_VERSION == 2


def test_looking_up_a_place_reads_the_histograms_of_one_window_and_reading_on_builds_each_once():
    rng = np.random.default_rng(0)
    data = MemorySet([rng.integers(1, 63, 20) for _ in range(400)])
    order = make(data, window=16)
    assert not data.touched  # the start needs the manifest alone
    for share in (0.01, 0.5, 0.99):
        data.touched.clear()
        number = order.rows_per_epoch * 5 + int(share * order.rows_per_epoch)
        order.tokens_before(number)
        assert data.touched["lengths"] <= 16 and data.touched["sample_lengths"] == 0
        order.row(number)
        assert data.touched["lengths"] <= 16 and data.touched["sample_lengths"] == 1
    data = small_set(12)
    order = make(data, window=3)
    for number in range(order.rows_per_epoch):
        order.tokens_before(max(0, number - 5))
        order.row(number)
    assert data.touched == {"lengths": 12, "sample_lengths": 12}


def test_row_counts_missing_in_the_manifest_are_computed_and_wrong_ones_stop_naming_the_shard():
    orders = [make(small_set(rows_at=rows_at), max_seq_len=96) for rows_at in ((96,), ())]
    assert epoch_rows(orders[0], 0) == epoch_rows(orders[1], 0)
    data = small_set()
    data.packed[T][4] += 1
    with pytest.raises(ValueError, match="shard 4 .*manifest"):
        epoch_rows(make(data), 0)
    with pytest.raises(ValueError, match="at least one chunk"):
        make(MemorySet([np.zeros(0, int)]))


SHARED_OUT = ["big"] * 16 + ["middle"] * 6 + ["small"] * 2


@KINDS
def test_shards_ahead_name_what_each_source_needs_at_least_a_shard_in_advance(packing, shuffle):
    data = small_set(24, sources=SHARED_OUT)
    order = make(data, packing=packing, shuffle=shuffle, window=4)
    rows_of = data.rows(T) if packing else data.samples
    shards = np.array([order.row(number)[1] for number in range(3 * order.rows_per_epoch)])
    for number in range(0, 2 * order.rows_per_epoch, 7):
        ahead = order.shards_ahead(number)
        assert len(set(ahead)) == len(ahead) and shards[number] in ahead
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


@pytest.mark.parametrize("rows", [[0, 5], [3, 0, 70_000, 1], [20_000, 20_000], [1] * 40, [999_983, 17, 8192]], ids=str)
@pytest.mark.parametrize("spread", [0, 1], ids=["no phases", "phases"])
def test_merged_streams_are_sorted_by_exact_keys_and_any_place_is_found_alone(rows, spread):
    phases = spread * np.random.default_rng(1).integers(0, 2**20, len(rows)) / 2**20
    phases[-1] = phases[0]  # equal keys where rows are equal too: the lower stream comes first
    merged = Interleave(rows, phases)
    total = sum(rows)
    borders = np.linspace(0, total, -(-total // 8192) + 1).astype(int)[:20]  # of blocks, give or take a row per stream
    near_borders = (borders + near for near in range(-5, 6))
    places = np.concatenate([np.random.default_rng(2).integers(0, total, 200), *near_borders])
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
