"""Every attack on a reader of converted sets is refused before a byte is used, with a message that names the file.

Beside the split that is spoilt lies a folder that no attack may read or change. `python tests/test_hostile.py` prints the
attacks and what is said of each as a table.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import numpy as np
import pytest
import zstd
from attacks import ATTACKS, SHARD, Attack, attack, fetch, lie, plant_array, read_all, verify
from hand_made import edit, random_documents, seal, write_split

from ettin_foundry.data.shards import MDSSplit

SECRET = b"never to be read or changed"
PATIENCE = 30  # seconds after which an attack that makes the reader wait has won

# ------------------------------------------------------------------ counts

for key in ("samples", "tokens", "documents"):
    lie(f"total of {key} too small", lambda m, key=key: m["totals"].update({key: 1}), f"totals.{key} is 1; its shards sum")
lie("total missing", lambda m: m["totals"].pop("samples"), "samples is None")
lie("shard of 0 samples", lambda m: m["shards"][1].update(samples=0), r"shards\[1\].*samples is 0")
lie("shard of -5 samples", lambda m: m["shards"][1].update(samples=-5), r"shards\[1\].*samples is -5")
lie("tokens as a truth value", lambda m: m["shards"][1].update(tokens=True), r"shards\[1\].*tokens is True")
lie("samples as a float", lambda m: m["shards"][1].update(samples=3.0), r"shards\[1\].*samples is 3.0")
lie("more samples than the file can hold", lambda m: m["shards"][1].update(samples=10**6, tokens=10**6), "cannot hold that")
lie("more tokens than the file can hold", lambda m: m["shards"][1].update(tokens=m["shards"][1]["raw"]["bytes"]),
    "cannot hold that")
lie("tokens whose sum overflows", lambda m: m["shards"][1].update(tokens=2**62), r"shards\[1\].*0 to 9007199254740992 is")
lie("fewer tokens than samples", lambda m: m["shards"][1].update(tokens=1), "cannot hold that")
lie("more documents than chunks", lambda m: m["shards"][1].update(documents=10**6), "cannot end more than one each")
lie("negative rows", lambda m: m["shards"][1]["rows"].update({"64": -1}), "count is -1")
lie("more rows than chunks", lambda m: m["shards"][1]["rows"].update({"64": 10**6}), "1000000 rows of '64'")
lie("rows of no length", lambda m: m["shards"][1]["rows"].update({"abc": 1}), "rows of 'abc'")
lie("wrong rows", lambda m: m["shards"][1]["rows"].update({"64": 1}),
    r"shards\[1\] states 1 rows of 64; its chunks fill \d+", read=verify)
lie("wrong documents", lambda m: (m["shards"][0].update(documents=m["shards"][0]["documents"] - 1),
                                  m["totals"].update(documents=m["totals"]["documents"] - 1)),
    r"shards\[0\] states \d+ documents; \d+ end in it", read=verify)
lie("wrong documents in an older set", lambda m: ([shard.pop("documents") for shard in m["shards"]],
                                                  m["totals"].update(documents=5)),
    "totals.documents is 5; 44 documents end", read=verify)
lie("no source", lambda m: m["shards"][1].pop("source"), "source is None")
attack("manifest with another source", lambda folder, _: edit(folder, lambda m: m["shards"][0].update(source="z")),
       f"{SHARD}: chunk 0 is of source 'a'", read=verify)
lie("no shards", lambda m: m.update(shards=[]), "lists no shards")
lie("shards that are numbers", lambda m: m.update(shards=[3]), r"shards\[0\]: raw is None")
lie("chunk_length of 0", lambda m: m.update(chunk_length=0), "chunk_length is 0")
lie("chunk_length as text", lambda m: m.update(chunk_length="62"), "chunk_length is '62'")
lie("chunk_length too small", lambda m: m.update(chunk_length=5), "cannot hold that|lengths")
lie("no vocabulary", lambda m: m["tokenizer"].pop("vocab_size"), "vocab_size is None")
lie("vocabulary beyond uint16", lambda m: m["tokenizer"].update(vocab_size=2**20), "vocab_size is 1048576")
lie("another version", lambda m: m.update(version=2), r"\['ettin-mds', 2\].*\['ettin-mds', 1\] is read")


def spoil_lengths(change: Callable[[np.ndarray], np.ndarray], folder: Path, outside: Path) -> None:
    plant_array(change(np.load(folder / "lengths.npy")), folder, outside)


def swap_lengths(lengths: np.ndarray) -> np.ndarray:
    """Other lengths, with the same number of chunks and tokens: a - 1 and b + 1 instead of a and b."""
    a, b = (int(at) for at in np.flatnonzero(lengths[0])[[3, -3]])
    lengths[0, [a, b]] -= 1
    lengths[0, [a - 1, b + 1]] += 1
    return lengths


for label, (change, message) in {
        "other lengths of the same sum": (swap_lengths, f"{SHARD}: its chunk lengths differ from the manifest's histogram"),
        "rows of other shards": (lambda a: a[::-1], "lengths.npy: row 0 counts .*; the manifest states"),
        "a count more": (lambda a: a + np.eye(*a.shape, dtype=a.dtype), "lengths.npy: row 0 counts"),
        "counts that overflow": (lambda a: a + np.array(2**32 - 1, "<u4"), "lengths.npy: row 0 counts"),
        "another type": (lambda a: a.astype(np.int64), "lengths.npy.*int64|lengths: bytes is"),
        "a row missing": (lambda a: a[:-1], r"lengths.npy: holds uint32 \("),
        "columns first": (lambda a: np.asfortranarray(a), "lengths.npy: holds")}.items():
    attack(f"lengths.npy with {label}", partial(spoil_lengths, change), message)


def overwrite_lengths(data: bytes, folder: Path, _: Path) -> None:
    (folder / "lengths.npy").write_bytes(data)
    seal(folder)


npy = b"\x93NUMPY\1\0"
for label, data in {"no array": b"junk" * 20,
                    "a header that is code": npy + b"\x30\0" + b"__import__('os').mkdir('executed')".ljust(48),
                    "a header of brackets": npy + b"\xff\x0f" + b"(" * 4095, "a header cut off": npy + b"\xff\xff{"}.items():
    attack(f"lengths.npy with {label}", partial(overwrite_lengths, data), "lengths.npy: is no NumPy array")

# ------------------------------------------------------------------ JSON, the stock index, remote places


def overwrite_manifest(text: bytes, folder: Path, _: Path) -> None:
    (folder / "manifest.json").write_bytes(text)


for label, text in {"no JSON": b"{", "not UTF-8": b'{"format": "\xff"}', "endless nesting": b"[" * 100_000,
                    "NaN": b'{"version": NaN}', "a number of 5,000 digits": b'{"version": ' + b"9" * 5000 + b"}"}.items():
    attack(f"manifest with {label}", partial(overwrite_manifest, text), "manifest.json: is not JSON")
attack("manifest that is a list", partial(overwrite_manifest, b"[]"), "manifest.json: format and version are")
attack("manifest of 1 GiB", lambda folder, _: os.truncate(folder / "manifest.json", (1 << 30) + 1), "has 1073741825 bytes")


def edit_index(change: Callable[[dict], object], folder: Path, _: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


for label, change in {
        "a name that leaves the folder": lambda i: i["shards"][1]["raw_data"].update(basename="../outside/secret.mds"),
        "a pickle column": lambda i: i["shards"][0].update(column_encodings=["pkl"] * 5),
        "a shard less": lambda i: i["shards"].pop(), "no shards": lambda i: i.pop("shards")}.items():
    attack(f"index.json with {label}", partial(edit_index, change), "index.json: ", read=verify)


def grow(name: str, folder: Path, _: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + bytes(1 << 20))


attack("remote shard larger than stated", partial(grow, SHARD), rf"{SHARD}: \d+ bytes; \d+ are stated", read=fetch)
attack("remote lengths.npy larger than stated", partial(grow, "lengths.npy"), r"lengths.npy: \d+ bytes; \d+ are", read=fetch)
attack("remote shard altered", lambda folder, _: (folder / SHARD).write_bytes(
    (folder / SHARD).read_bytes()[:-1] + b"\x77"), rf"{SHARD}: xxh64 is", read=fetch)


def change_remote(folder: Path, _: Path) -> None:
    MDSSplit(folder.parent / "cache", remote=str(folder))
    edit(folder, lambda m: m["shards"].reverse())


attack("remote set exchanged for another", change_remote, "holds another set than dataset.remote", read=fetch)


# ------------------------------------------------------------------ what is held against them


def make_split(folder: Path, packed: bool) -> Path:
    rng = np.random.default_rng(1)
    shards = [(source, random_documents(rng, 16 - number)) for number, source in enumerate("aab")]
    shards[0][1][0] = ("d\u00e90", np.arange(20, dtype=np.uint16))  # the first chunk is the only one of its document
    return write_split(folder, [(source, documents[:15]) for source, documents in shards],
                       compress=(lambda data: zstd.compress(data, 3)) if packed else None)


def outside_of(folder: Path) -> Path:
    outside = folder.parent / "outside"
    outside.mkdir()
    for name in ("secret", "secret.mds", "secret.zstd"):
        (outside / name).write_bytes(SECRET)
    return outside


def refusal(one: Attack, folder: Path) -> str:
    """What is said of an attack.

    Raises:
        AssertionError: it is not refused, or something outside of the split was changed.
    """
    make_split(folder, one.packed)
    outside = outside_of(folder)
    one.spoil(folder, outside)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"{one.name}: the reader waits"))
    signal.alarm(PATIENCE)
    try:
        one.read(folder)
    except (ValueError, OSError) as error:
        said = str(error)
    else:
        raise AssertionError(f"{one.name}: read without a word")
    finally:
        signal.alarm(0)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == dict.fromkeys(
        ("secret", "secret.mds", "secret.zstd"), SECRET), f"{one.name}: changed a file outside of the split"
    assert not Path("executed").exists()
    return said


@pytest.mark.parametrize("one", ATTACKS, ids=[one.name.replace(" ", "-") for one in ATTACKS])
def test_attack_is_refused(one: Attack, tmp_path: Path) -> None:
    said = refusal(one, tmp_path / "train")
    assert re.search(one.message, said, re.DOTALL), said
    assert not (one.packed and (tmp_path / "train" / SHARD).exists())  # nothing of it was kept


def test_the_split_that_is_spoilt_was_good(tmp_path: Path) -> None:
    for packed in (False, True):
        folder = make_split(tmp_path / str(packed), packed)
        verify(folder)
        read_all(folder)
    assert len({one.name for one in ATTACKS}) == len(ATTACKS)


def test_a_link_beside_a_packed_shard_is_replaced_and_not_followed(tmp_path: Path) -> None:
    folder = make_split(tmp_path / "train", packed=True)
    outside = outside_of(folder)
    (folder / SHARD).symlink_to(outside / "secret.mds")
    read_all(folder)
    assert not (folder / SHARD).is_symlink() and (outside / "secret.mds").read_bytes() == SECRET


def main() -> None:
    """Prints every attack and its refusal as a Markdown table."""
    print("| attack | refused with |\n|---|---|")
    for one in ATTACKS:
        with tempfile.TemporaryDirectory() as place:
            said = refusal(one, Path(place) / "train").replace(place + "/train", "SET").replace(place, "...")
        shown = said if len(said) <= 260 else said[:200] + " ... " + said[-50:]
        print(f"| {one.name} | {ascii(shown)[1:-1].replace('|', chr(92) + '|')} |")


if __name__ == "__main__":
    main()
