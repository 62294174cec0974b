"""Which documents stay, for which reason they go, and duplicates against one dictionary over all documents."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ettin_foundry.corpus import filters as corpus_filters
from ettin_foundry.corpus.filters import FilterOptions, find_duplicates, write_hashes


def test_length_is_counted_in_characters_and_names_the_reason():
    filters = FilterOptions(min_characters=4, max_characters=9)
    texts = ["", "\U0001f600" * 3, "\U0001f600" * 4, "keep" * 2 + "!", "keep" * 2 + "!!"]
    assert [filters.reason(text) for text in texts] == ["short", "short", None, None, "long"]
    assert [FilterOptions().reason(text) for text in texts] == [None] * 5
    for least, most in ((1, None), (None, 0), (9, 8)):
        with pytest.raises(ValueError, match="--min-characters must be"):
            FilterOptions(min_characters=least, max_characters=most)


def expected_drops(units: list[list[bytes]]) -> list[list[int]]:
    seen, drops = set[bytes](), list[list[int]]()
    for hashes in units:
        drops.append([at for at, digest in enumerate(hashes) if digest in seen or digest in hashes[:at]])
        seen |= set(hashes)
    return drops


def write_units(folder: Path, units: list[list[bytes]]) -> list[Path]:
    for number, hashes in enumerate(units):
        write_hashes(folder / f"{number:05d}.npy", b"".join(hashes))
    return [folder / f"{number:05d}.npy" for number in range(len(units))]


@pytest.mark.parametrize("alike", [False, True], ids=["random", "sharing halves"])
@pytest.mark.parametrize("texts", [1, 3, 60, 10_000])
def test_all_but_the_first_of_equal_documents_are_dropped_whatever_the_memory(tmp_path, monkeypatch, texts, alike):
    rng = random.Random(texts)

    def digest() -> bytes:
        full = xxhash.xxh3_128_digest(str(rng.randrange(texts)))
        return rng.choice([full, full[:8] + bytes(8), bytes(8) + full[8:], bytes(16)]) if alike else full

    for case in range(4):
        folder = tmp_path / str(case)
        folder.mkdir()
        sizes = [rng.choice([0, 1, 7, 100, 300]) for _ in range(rng.randint(1, 6))]
        units = [[digest() for _ in range(size)] for size in sizes]
        files, expected = write_units(folder, units), expected_drops(units)
        for block in (9, 60, 10_000):
            monkeypatch.setattr(corpus_filters, "_BLOCK", block)
            out = folder / str(block)
            assert find_duplicates(files, out) == sum(map(len, expected))
            assert [np.load(out / path.name).tolist() for path in files] == expected
            assert sorted(path.name for path in out.iterdir()) == [path.name for path in files]  # nothing is left


def test_a_file_of_hashes_is_never_unpickled(tmp_path):
    files = write_units(tmp_path, [[bytes(16)], [bytes(16)]])
    np.save(files[1], np.array([object()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="memory-mapped"):
        find_duplicates(files, tmp_path / "out")
