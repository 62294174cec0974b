"""Packing on counts of lengths; against placing pieces one by one: benchmarks/fuzz, `packing`."""

import numpy as np
import pytest

from ettin_foundry.data.packing import pack_lengths, piece_counts


def realistic_lengths(documents, chunk_length, median):
    """Chunk lengths as real text gives them: log-normal documents, long ones cut into full chunks and a rest."""
    chunks = []
    for tokens in np.exp(np.random.default_rng(2).normal(np.log(median), 1.1, documents)).astype(int) + 1:
        chunks += [chunk_length] * (tokens // chunk_length) + [tokens % chunk_length] * (tokens % chunk_length > 0)
    return np.array(chunks)


def rows_of(packing):
    lengths, offsets = packing.expand()
    return np.split(lengths, offsets[1:-1])


@pytest.mark.parametrize("median", [500, 60])
@pytest.mark.parametrize(("capacity", "goal"), [(1024, 0.995), (8192, 0.99)])
def test_every_piece_is_in_one_row_and_rows_are_full_on_realistic_lengths(capacity, goal, median):
    chunks = realistic_lengths(45_000, capacity - 2, median)  # about the text of one 64 MB shard
    counts = piece_counts(np.bincount(chunks))
    packing = pack_lengths(counts, capacity)
    rows = rows_of(packing)
    np.testing.assert_array_equal(np.bincount(np.concatenate(rows), minlength=counts.size), counts)
    assert max(row.sum() for row in rows) <= capacity and len(rows) == packing.num_rows
    assert (chunks + 2).sum() / (packing.num_rows * capacity) >= goal
    # equal rows are one group: the groups follow the distinct lengths, not the chunks
    assert len(pack_lengths(1000 * counts, capacity).patterns) < 4 * np.count_nonzero(counts)


def test_no_pieces_give_no_rows_and_a_piece_longer_than_a_row_is_refused():
    empty = pack_lengths(np.zeros(10, int), 16)  # as a mixture may leave of a shard
    assert empty.num_rows == 0 and [part.tolist() for part in empty.expand()] == [[], [0]]
    assert pack_lengths(piece_counts(np.bincount([10, 62])), 64).num_rows == 2
    with pytest.raises(ValueError, match="max_seq_len must be at least 65, got 64"):
        pack_lengths(piece_counts(np.bincount([10, 63])), 64)
