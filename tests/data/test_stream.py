"""A row before it is masked, and its hash, against the description in words."""

import hashlib

import numpy as np

from ettin_foundry.data.stream import HASH_MODULUS, fill_row, hash_row


def test_a_row_is_its_pieces_between_bos_and_eos_and_the_rest_is_left_alone():
    ids, numbers = np.full(12, 9), np.full(12, -1)
    assert fill_row(ids, numbers, [np.array([3, 4], np.uint16), np.array([5], np.uint16)], cls=1, sep=2) == 7
    assert ids.tolist() == [1, 3, 4, 2, 1, 5, 2, 9, 9, 9, 9, 9] and numbers.tolist() == [0] * 4 + [1] * 3 + [-1] * 5


def test_the_hash_of_a_row_hangs_on_its_ids_its_padding_and_its_place():
    ids = np.arange(64, dtype=np.int64) * 700
    content = b"".join(int(i).to_bytes(8, "little") for i in ids)
    digest = hashlib.blake2b(content, digest_size=6, salt=(3).to_bytes(8, "little"))
    assert hash_row(ids, 3) == int.from_bytes(digest.digest(), "little") < HASH_MODULUS
    others = [hash_row(ids, 4), hash_row(ids[::-1], 3), hash_row(ids[:-1], 3), hash_row(np.append(ids, 0), 3)]
    assert len({hash_row(ids, 3), *others}) == 5
    swapped = sum(hash_row(row, place) for place, row in enumerate((ids[::-1], ids)))
    assert swapped != sum(hash_row(row, place) for place, row in enumerate((ids, ids[::-1])))
