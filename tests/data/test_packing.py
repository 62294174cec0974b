"""Claims of packing.py, against placing pieces one by one."""

import numpy as np
import pytest
from memory_set import realistic_lengths

from ettin_foundry.data.packing import pack_lengths, piece_counts


def place_one_by_one(pieces, capacity):
    """Best-fit decreasing as a textbook has it; the space left in each row."""
    left = []
    for piece in sorted(pieces, reverse=True):
        fitting = [(space, row) for row, space in enumerate(left) if space >= piece]
        if fitting:
            left[min(fitting)[1]] -= piece
        else:
            left.append(capacity - piece)
    return sorted(left)


def rows_of(packing):
    lengths, offsets = packing.expand()
    return [lengths[begin:end] for begin, end in zip(offsets[:-1], offsets[1:])]


@pytest.mark.parametrize("seed", range(12))
def test_packing_on_counts_equals_placing_pieces_one_by_one(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.choice([16, 64, 100]))
    longest = capacity if seed % 2 else capacity // 3  # with short pieces only, many share a row
    pieces = rng.integers(3, longest + 1, int(rng.integers(1, 400)))
    packing = pack_lengths(np.bincount(pieces), capacity)
    assert sorted(capacity - row.sum() for row in rows_of(packing)) == place_one_by_one(pieces.tolist(), capacity)


@pytest.mark.parametrize("capacity", [1024, 8192])
def test_every_piece_is_in_exactly_one_row_and_no_row_is_longer_than_capacity(capacity):
    chunks = realistic_lengths(np.random.default_rng(1), 3000, 1022)
    counts = piece_counts(np.bincount(chunks))
    packing = pack_lengths(counts, capacity)
    rows = rows_of(packing)
    np.testing.assert_array_equal(np.bincount(np.concatenate(rows), minlength=counts.size), counts)
    assert max(row.sum() for row in rows) <= capacity
    assert len(rows) == packing.num_rows
    assert packing.num_tokens == chunks.sum() + 2 * chunks.size


@pytest.mark.parametrize(("capacity", "goal"), [(1024, 0.995), (8192, 0.99)])
def test_rows_are_full_on_realistic_lengths(capacity, goal):
    chunks = realistic_lengths(np.random.default_rng(2), 45_000, capacity - 2)  # about the text of one 64 MB shard
    packing = pack_lengths(piece_counts(np.bincount(chunks)), capacity)
    assert packing.fill >= goal
    assert packing.fill == pytest.approx((chunks + 2).sum() / (packing.num_rows * capacity))


def test_equal_rows_are_one_group():
    chunks = realistic_lengths(np.random.default_rng(3), 200, 1022)
    counts = piece_counts(np.bincount(chunks))
    once, thousandfold = pack_lengths(counts, 1024), pack_lengths(1000 * counts, 1024)
    assert thousandfold.num_rows > 900 * once.num_rows * once.fill
    # the groups follow the distinct lengths: each length closes at most a few
    assert len(thousandfold.patterns) < 4 * np.count_nonzero(counts)


def test_rows_depend_on_the_histogram_alone():
    chunks = realistic_lengths(np.random.default_rng(4), 500, 1022)
    first, second = (pack_lengths(piece_counts(np.bincount(c)), 1024) for c in (chunks, chunks[::-1]))
    assert first.patterns == second.patterns
    np.testing.assert_array_equal(first.multiplicities, second.multiplicities)


def test_no_pieces_give_no_rows():
    packing = pack_lengths(np.zeros(10, int), 16)
    assert packing.num_rows == 0 and packing.fill == 1.0
    lengths, offsets = packing.expand()
    assert lengths.size == 0 and offsets.tolist() == [0]


def test_chunk_longer_than_the_row_is_refused_by_name():
    with pytest.raises(ValueError, match="max_seq_len: 64 given.* chunk of 63 tokens.* at most 62 .*Raise max_seq_len"):
        pack_lengths(piece_counts(np.bincount([10, 63])), 64)
    assert pack_lengths(piece_counts(np.bincount([10, 62])), 64).num_rows == 2


@pytest.mark.parametrize("counts", [[1, 0, 2], [0, 3, -1]], ids=["length 0", "negative"])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="counts:"):
        pack_lengths(counts, 64)
