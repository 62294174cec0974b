"""Which documents stay, for which reason they go, and duplicates against one dictionary over all documents."""

from __future__ import annotations

import hashlib
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ettin_foundry.corpus import filters as corpus_filters
from ettin_foundry.corpus.filters import FilterOptions, find_duplicates, write_hashes

PREDICATES = """
import functools
def keep(text, id): return "keep" in text
def named(text: str, id: str) -> bool: return id != "bad"
def fails(text, id): raise ZeroDivisionError("division by zero")
def none(text, id): return None
def short_list(text): return True
def three(text, id, language): return True
def defaults(text, id="", *, language="en"): return True
cached, number, partial = functools.lru_cache(lambda text, id: True), 7, functools.partial(three, language="en")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of an importable module that holds PREDICATES, new in every test."""
    name = f"rules_{hashlib.md5(str(tmp_path).encode()).hexdigest()}"
    (tmp_path / f"{name}.py").write_text(PREDICATES)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_the_first_filter_that_refuses_names_the_reason(module):
    options = FilterOptions(min_characters=4, max_characters=9, predicates=[f"{module}:keep", f"{module}:named"])
    documents = [("", "0"), ("\U0001f600" * 3, "0"), ("\U0001f600" * 4, "1"), ("keep", "2"), ("keep" * 2 + "!", "3"),
                 ("keep", "bad"), ("keep" * 2 + "!!", "6")]  # length is counted in characters
    for filters in (options, pickle.loads(pickle.dumps(options))):
        assert [filters.reason(*document) for document in documents] == \
            ["short", "short", f"predicate {module}:keep", None, None, f"predicate {module}:named", "long"]
    for more in ({}, {"predicates": [f"{module}:defaults", f"{module}:cached"]}):  # functions written in other ways
        assert [FilterOptions(**more).reason(*document) for document in documents] == [None] * 7


def test_a_predicate_that_gives_no_truth_value_stops_with_its_name_and_the_document(module):
    for name, error in ("fails", r"ZeroDivisionError \(division by zero\)"), ("none", r"TypeError \(None\)"):
        with pytest.raises(ValueError, match=f"--filter {module}:{name} must .*{error} for the document 'doc-0'"):
            FilterOptions(predicates=[f"{module}:{name}"]).reason("text", "doc-0")


@pytest.mark.parametrize("name", ["{m}", "{m}:", ":keep", "{m}:absent", "no_such_module:keep", "{m}_broken:keep",
                                  "{m}:number", "{m}:short_list", "{m}:three", "{m}:partial", "operator:contains"])
def test_filters_that_cannot_be_used_are_refused_when_they_are_named(module, name):
    with pytest.raises(ValueError, match=r"--filter must be package\.module:function .*got"):
        FilterOptions(predicates=[name.format(m=module)])
    for least, most in ((1, None), (None, 0), (9, 8)):
        with pytest.raises(ValueError, match="--min-characters must be"):
            FilterOptions(min_characters=least, max_characters=most)


def test_the_record_holds_every_setting_and_no_place_of_this_machine(module, tmp_path):
    options = FilterOptions(min_characters=2, max_characters=9, predicates=[f"{module}:keep"], deduplicate=True)
    record, sha256 = options.record(), hashlib.sha256(PREDICATES.encode()).hexdigest()
    assert record == {
        "min_characters": 2, "max_characters": 9, "predicates": [{"name": f"{module}:keep", "sha256": sha256}],
        "decontaminate": [], "decontaminate_field": "text", "decontaminate_drop": False,
        "ngrams": None, "deduplicate": True}
    (tmp_path / f"{module}.py").write_text(PREDICATES + "def keep(text, id): return True  # another rule")
    again = FilterOptions(predicates=[f"{module}:keep"])  # in the same process
    assert again.record()["predicates"] != record["predicates"] and again.reason("other text", "0") is None


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
