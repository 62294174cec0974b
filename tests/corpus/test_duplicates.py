"""Claims of duplicates.py, against one Python dictionary over all documents."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ettin_foundry.corpus import duplicates
from ettin_foundry.corpus.duplicates import HASH_BYTES, Hasher, MergeCounts, hash_text, merge, read_drops, write_hashes


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """Memory for so many documents at a time, so that a few thousand are parted, sorted and read as 1e9 would be."""
    monkeypatch.setattr(duplicates, "_BASE_BYTES", 0)
    monkeypatch.setattr(duplicates, "_LEAST_BYTES", 0)
    return lambda documents: documents * duplicates._SORT_BYTES


def expected_drops(units: list[list[bytes]]) -> list[list[int]]:
    first: dict[bytes, tuple[int, int]] = {}
    for unit, hashes in enumerate(units):
        for ordinal, digest in enumerate(hashes):
            first.setdefault(digest, (unit, ordinal))
    return [[o for o, digest in enumerate(hashes) if first[digest] != (u, o)] for u, hashes in enumerate(units)]


def write_units(folder: Path, units: list[list[bytes]]) -> list[Path]:
    files = [folder / f"{number:05d}.npy" for number in range(len(units))]
    for path, hashes in zip(files, units):
        write_hashes(path, b"".join(hashes))
    return files


def random_units(rng: random.Random, *, texts: int, alike: bool) -> list[list[bytes]]:
    """Units of 0 to 300 documents. `alike`: many hashes share one half with others."""
    def digest() -> bytes:
        full = hash_text(str(rng.randrange(texts)))
        return rng.choice([full, full[:8] + bytes(8), bytes(8) + full[8:], bytes(16)]) if alike else full

    return [[digest() for _ in range(rng.choice([0, 1, 7, 100, 300]))] for _ in range(rng.randint(1, 6))]


@pytest.mark.parametrize("alike", [False, True], ids=["random", "sharing halves"])
@pytest.mark.parametrize("texts", [3, 60, 10_000])
def test_all_but_the_first_of_equal_documents_are_dropped_whatever_the_memory(
        tmp_path: Path, small_memory: Callable[[int], int], texts: int, alike: bool) -> None:
    rng = random.Random(texts)
    for case in range(4):
        folder = tmp_path / str(case)
        folder.mkdir()
        units = random_units(rng, texts=texts, alike=alike)
        files = write_units(folder, units)
        expected = expected_drops(units)
        for documents in (9, 60, 10_000):
            out = folder / str(documents)
            counts = merge(files, out, memory_bytes=small_memory(documents))
            assert [read_drops(out / path.name).tolist() for path in files] == expected
            assert counts == MergeCounts(sum(map(len, units)), sum(map(len, expected)), tuple(map(len, expected)))
            assert sorted(path.name for path in out.iterdir()) == [path.name for path in files]  # nothing is left over


def test_documents_that_only_share_most_bits_of_their_hash_stay(tmp_path: Path) -> None:
    base = hash_text("a")
    changed = [bytes([*base[:at], base[at] ^ 1 << bit, *base[at + 1:]]) for at in range(16) for bit in range(8)]
    files = write_units(tmp_path, [[base], changed, [base]])
    assert merge(files, tmp_path / "out").per_unit == (0, 0, 1)


def test_interleaved_runs_of_two_hashes_with_one_prefix_are_told_apart(
        tmp_path: Path, small_memory: Callable[[int], int]) -> None:
    first, second = bytes(16), bytes(8) + (1).to_bytes(8, "little")  # alike in all bits that are sorted by
    third = (1).to_bytes(8, "little") + bytes(8)
    units = [[first, second, third, first, second, third], [second, first, third]]
    files = write_units(tmp_path, units)
    for documents in (4, 100):
        merge(files, tmp_path / "out", memory_bytes=small_memory(documents))
        assert [read_drops(tmp_path / "out" / path.name).tolist() for path in files] == expected_drops(units)


def test_the_same_files_give_the_same_bytes_and_litter_of_a_killed_run_does_no_harm(
        tmp_path: Path, small_memory: Callable[[int], int]) -> None:
    files = write_units(tmp_path, random_units(random.Random(4), texts=50, alike=False))
    merge(files, tmp_path / "a", memory_bytes=small_memory(1000))
    litter = tmp_path / "b" / ".merge.killed"
    litter.mkdir(parents=True)
    (litter / "hashes.0").write_bytes(bytes(48))
    for _ in range(2):
        merge(files, tmp_path / "b", memory_bytes=small_memory(20))
        assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == \
            {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}


def test_an_error_leaves_no_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_units(tmp_path, [[hash_text("a")] * 3])

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(duplicates, "_write_drops", full)
    with pytest.raises(OSError, match="No space left"):
        merge(files, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["different", "all the same", "pairs"])
def test_memory_stays_within_what_is_given(tmp_path: Path, kind: str) -> None:
    number, units = 1_500_000, 3  # 24 MB of hashes, 96 MiB of arrays at 64 bytes each: more than is given
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, (number // units, 2), dtype=np.uint64)
    files = []
    for unit in range(units):
        if kind == "different":
            hashes = rng.integers(0, 2**64, (number // units, 2), dtype=np.uint64)
        elif kind == "all the same":
            hashes[:] = 7
        files.append(tmp_path / f"{unit}.npy")
        write_hashes(files[-1], hashes.tobytes())
    program = """if True:
        import sys
        from pathlib import Path
        from ettin_foundry.corpus import duplicates
        def peak():  # of this process alone; getrusage tells the peak of the one that started it, too
            (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
            return int(line.split()[1]) // 1024
        begin = peak()
        counts = duplicates.merge([Path(file) for file in sys.argv[2:]], Path(sys.argv[1]), memory_bytes=64 << 20)
        print(counts.duplicates, peak() - begin)
    """
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out"), *map(str, files)], capture_output=True,
                           text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    num_duplicates, mebibytes = map(int, found.stdout.split())
    assert num_duplicates == {"different": 0, "all the same": number - 1, "pairs": number * 2 // 3}[kind]
    assert mebibytes <= 64


@pytest.mark.parametrize("text", ["", "a", "\u00e9\U0001f600\n\0", "x" * 100_000])
def test_a_hash_is_xxh3_128_of_the_text_in_utf_8_in_whatever_pieces(text: str) -> None:
    assert hash_text(text) == xxhash.xxh3_128(text.encode("utf-8")).digest()
    assert len(hash_text(text)) == HASH_BYTES
    for size in (1, 3, 1000):
        hasher = Hasher()
        for begin in range(0, len(text), size):
            hasher.update(text[begin:begin + size])
        assert hasher.digest() == hash_text(text)


def test_texts_that_only_look_alike_have_different_hashes() -> None:
    texts = ["a", "a ", "A", "a\n", "\u00e9", "e\u0301", "", " ", "\ufeffa"]
    assert len(set(map(hash_text, texts))) == len(texts)


def test_hashes_are_written_as_a_plain_array_that_numpy_reads(tmp_path: Path) -> None:
    hashes = bytearray()
    for text in ("a", "b", "a"):
        hashes += hash_text(text)
    write_hashes(tmp_path / "0.npy", hashes)
    array = np.load(tmp_path / "0.npy")
    assert array.shape == (3, 2) and array.dtype == np.uint64 and array.tobytes() == bytes(hashes)
    write_hashes(tmp_path / "1.npy", b"")
    assert np.load(tmp_path / "1.npy").shape == (0, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "1.npy"]


def npy(array: np.ndarray, path: Path, *, allow_pickle: bool = False) -> None:
    with open(path, "wb") as stream:
        np.save(stream, array, allow_pickle=allow_pickle)


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.abort, ()


HOSTILE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no array at all"),
    "pickle": lambda path: npy(np.array([Bomb(), Bomb()], dtype=object), path, allow_pickle=True),
    "signed": lambda path: npy(np.zeros((4, 2), np.int64), path),
    "big-endian": lambda path: npy(np.zeros((4, 2), ">u8"), path),
    "columns": lambda path: npy(np.zeros((4, 3), np.uint64), path),
    "axes": lambda path: npy(np.zeros((4, 2, 1), np.uint64), path),
    "by columns": lambda path: npy(np.asfortranarray(np.arange(8, dtype=np.uint64).reshape(4, 2)), path),
    "cut": lambda path: (npy(np.zeros((4, 2), np.uint64), path), os.truncate(path, 128 + 48)),
    "longer": lambda path: (npy(np.zeros((4, 2), np.uint64), path), path.open("ab").write(bytes(16))),
    "huge": lambda path: (npy(np.zeros((4, 2), np.uint64), path),
                          path.write_bytes(path.read_bytes().replace(b"(4, 2), }", b"(4444444444444, 2), }"))),
    "overflowing": lambda path: (npy(np.zeros((4, 2), np.uint64), path), path.write_bytes(  # 2 * (2**63 + 4) is 8 in 64 bits
        path.read_bytes().replace(b"(4, 2), }" + b" " * 18, b"(9223372036854775812, 2), }"))),
    "negative": lambda path: (npy(np.zeros((4, 2), np.uint64), path),
                              path.write_bytes(path.read_bytes().replace(b"(4, 2), } ", b"(-4, 2), }"))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_of_hashes_that_is_none_is_refused_before_it_is_used(tmp_path: Path, kind: str) -> None:
    files = write_units(tmp_path, [[hash_text("a")], [hash_text("b")]])
    HOSTILE[kind](files[1])
    with pytest.raises(ValueError, match="00001.npy: .*; an array that a conversion wrote is needed, whole. Remove"):
        merge(files, tmp_path / "out")


@pytest.mark.parametrize("array", [np.array([3, 2], np.uint64), np.array([2, 2], np.uint64), np.zeros((2, 2), np.uint64),
                                   np.array([1.0, 2.0]), np.array([-1, 2])],
                         ids=["order", "twice", "axes", "float", "signed"])
def test_a_file_of_drops_that_is_none_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    npy(array, tmp_path / "00000.npy")
    with pytest.raises(ValueError, match="00000.npy: .*needed, whole. Remove"):
        read_drops(tmp_path / "00000.npy")


def test_missing_files_are_named(tmp_path: Path) -> None:
    files = write_units(tmp_path, [[hash_text("a")]])
    with pytest.raises(FileNotFoundError, match="00007.npy: missing; .*Start the conversion again"):
        merge([*files, tmp_path / "00007.npy"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="00007.npy: missing"):
        read_drops(tmp_path / "00007.npy")


def test_too_little_memory_and_units_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_units(tmp_path, [[hash_text("a")] * 200_000])
    with pytest.raises(ValueError, match="memory_bytes: 1000 given; at least 67108864 is needed"):
        merge(files, tmp_path / "out", memory_bytes=1000)
    with pytest.raises(ValueError, match="hash_files: two have the same name"):
        merge([*files, tmp_path / "other" / "00000.npy"], tmp_path / "out")
    monkeypatch.setattr(duplicates, "_SORT_BYTES", duplicates._LEAST_BYTES)  # as if there were 1e12 documents
    monkeypatch.setattr(duplicates, "_BASE_BYTES", 0)
    with pytest.raises(ValueError, match="given for 200000 documents; at least .* Give more"):
        merge(files, tmp_path / "out", memory_bytes=64 << 20)


def test_no_documents_and_no_units_give_nothing_to_drop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert merge([], tmp_path / "out") == MergeCounts(0, 0, ())
    files = write_units(tmp_path, [[], []])
    with caplog.at_level(logging.INFO):
        assert merge(files, tmp_path / "out") == MergeCounts(0, 0, (0, 0))
    assert read_drops(tmp_path / "out" / "00001.npy").shape == (0,)
    assert "duplicates: 0 of 0 documents" in caplog.text
