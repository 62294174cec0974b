"""Every attack on a reader of datasets is refused before a byte is used, with a message that names the file.

Each spoils a small good split; beside it lies a folder that no attack may read or change. `seal` puts sizes and hashes
right again, because whoever can write a shard can also write its hash: what is tested is the check behind it.
"""

import io
import os
import re
import shutil
from pathlib import Path

import hand_made
import numpy as np
import pytest
import zstd
from hand_made import edit, samples_of, seal, set_in

from ettin_foundry.data.shards import MDSSplit

SHARD, ZIP = "shard.00000.000.mds", "shard.00000.000.mds.zstd"
SECRET = {name: b"never to be read or changed" for name in ("secret", "secret.mds", "secret.zstd")}
pytestmark = pytest.mark.timeout(60)  # an attack may not make the reader wait


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    rng, place = np.random.default_rng(1), tmp_path_factory.mktemp("masters")
    shards = [(source, hand_made.random_documents(rng, 15)) for source in "aab"]
    return {packed: hand_made.write_split(place / str(packed) / "train", shards, packed=packed)
            for packed in (False, True)}


@pytest.fixture
def split(masters, tmp_path):
    """Copies a split, with a folder beside it that must stay as it is."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name, content in SECRET.items():
        (outside / name).write_bytes(content)
    yield lambda packed: Path(shutil.copytree(masters[packed], tmp_path / "train"))
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == SECRET and not Path("executed").exists()


def read_all(folder, **options):
    samples_of(MDSSplit(folder, **options))


def check_all(folder):
    data = MDSSplit(folder)
    for shard in range(data.num_shards):
        data.check_shard(shard)
    data.check_index()


def refused(folder, message, *, read=read_all):
    with pytest.raises((ValueError, OSError)) as caught:
        read(folder)
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


@pytest.mark.parametrize("packed", [False, True])
def test_any_wrong_value_in_a_manifest_is_refused_or_changes_nothing(split, packed):
    folder, refusals = split(packed), 0
    expected = samples_of(MDSSplit(folder))
    for place, value in hand_made.spoil(folder / "manifest.json"):
        for path in folder.glob("*.mds") if packed else ():
            path.unlink()
        try:
            found = samples_of(MDSSplit(folder))
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), (place, value, error)
            refusals += 1
        else:
            assert found == expected and place[-1] not in ("basename", "bytes", "xxh64", "samples"), (place, value)
    assert refusals > 200


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def told(change, name="manifest.json"):
    """An attack that changes what a JSON file says."""
    return lambda folder: edit(folder, change, name)


def forged(change, name=SHARD):
    """An attack that changes a file's bytes, and the size and hash that are stated of it."""
    def attack(folder):
        (folder / name).write_bytes(change(bytearray((folder / name).read_bytes())))
        seal(folder)
    return attack


def put(at, value, dtype="<u4"):
    def change(data):
        raw = np.array([value], dtype).tobytes()
        data[at:at + len(raw)] = raw
        return data
    return change


def header(change):
    """Changes the JSON in front of a shard's samples, which keeps its length."""
    def forge(data):
        count, first = np.frombuffer(data, "<u4", 2).tolist()
        where = slice(4 + 4 * (count + 1), first)
        data[where] = change(bytes(data[where])).ljust(where.stop - where.start)
        return data
    return forge


def table(change):
    """Changes the array in lengths.npy."""
    def forge(data):
        changed = change(np.load(io.BytesIO(data)))
        return changed if isinstance(changed, bytes) else hand_made.array_file(changed)
    return forged(forge, "lengths.npy")


def swap(lengths):
    """Other lengths, with the same number of chunks and tokens: a - 1 and b + 1 instead of a and b."""
    a, b = (int(at) for at in np.flatnonzero(lengths[0])[[3, -3]])
    lengths[0, [a, b]] -= 1
    lengths[0, [a - 1, b + 1]] += 1
    return lengths


READING = [  # found by a reader: attack, message
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
    *[(lambda folder, text=text: (folder / "manifest.json").write_bytes(text), "manifest.json: ") for text in (
        b"{", b'{"format": "\xff"}', b"[" * 100_000, b'{"version": NaN}', b"[]", b"3", b"9" * 5000)],
    *[(told(set_in(*place, value=value)), message) for *place, value, message in [
        ("columns", "extra", "pkl", "manifest.json: columns"), ("chunk_length", 5, "chunk_length is 5"),
        ("shards", 0, "zip", {"basename": ZIP, "bytes": 9, "xxh64": "0" * 16}, "manifest.json: raw must.*zip"),
        *[("shards", 0, "raw", "basename", name, "basename") for name in (".hidden.mds", "shard\0.mds", "a.mds\n")]]],
    (told(lambda m: m["shards"][0].update(m["shards"][1])), "manifest.json: basename"),
    (told(lambda m: [m["shards"][n].update(samples=m["shards"][n]["samples"] + more) for n, more in ((0, 1), (1, -1))]),
     "header states"),
    (forged(put(0, 3)), f"{SHARD}: .*states 3 samples"), (forged(lambda d: d + b"xx"), f"{SHARD}: .*leave the file"),
    (forged(lambda d: put(np.frombuffer(d, "<u4", 3)[2] - 2, 60_000, "<u2")(d)), f"{SHARD}: token 60000 in chunk 0"),
    *[(forged(header(change)), f"{SHARD}: .*has other columns") for change in (
        lambda c: c.replace(b'"int", "int"', b'"pkl", "int"'), lambda c: c.replace(b'"mds"', b'"csv"'),
        lambda c: c.replace(b'"last", "part"', b'"part", "last"'), lambda c: b"[3]")],
    *[(forged(header(change)), f"{SHARD}: is not JSON") for change in (lambda c: b"{", lambda c: b"[" * len(c))],
    (table(swap), f"{SHARD}: its chunk lengths differ"),
    (table(lambda a: a[::-1]), "lengths.npy: row 0 counts"),
    *[(table(change), "lengths.npy: its header") for change in (
        lambda a: a[:-1], np.asfortranarray, lambda a: np.array([Payload()]),
        lambda a: b"\x93NUMPY\1\0\x30\0" + b"__import__('os').mkdir('executed')".ljust(48))]]
CHECKING = [  # what no reader needs: found by a check
    (told(set_in("shards", 1, "rows", "64", value=1)), "shards.1: rows of 64 is 1"),
    (told(lambda m: [counts.update(documents=counts["documents"] - 1) for counts in (m["shards"][0], m["totals"])]),
     "shards.0: documents"),
    (told(set_in("shards", 0, "source", value="z")), f"{SHARD}: it holds chunks of another source"),
    *[(told(change, "index.json"), "index.json: its shards") for change in (
        lambda i: i["shards"][0].update(column_encodings=["pkl"] * 5), lambda i: i.pop("shards"))]]
EXPANDING = [(forged(lambda data, change=change: change(zstd.uncompress(bytes(data))), ZIP), f"{ZIP}.*{message}")
             for change, message in [
    (lambda raw: zstd.compress(bytes(1 << 26)), "expands beyond"), (lambda raw: zstd.compress(raw[:-5]), "expands to"),
    (lambda raw: zstd.compress(raw) + zstd.compress(b"x" * 99), "expands beyond"),
    (lambda raw: zstd.compress(raw) + b"junk", "not a whole zstd file"),
    (lambda raw: zstd.compress(raw)[:-3], "not a whole zstd file"),
    # frame header: no size, window of 2**30; then one raw block
    (lambda raw: b"\x28\xb5\x2f\xfd\x00\xa0\x09\x00\x00x", "too much memory"),
    (lambda raw: zstd.compress(raw[:-1] + bytes([raw[-1] ^ 1])), "expanded: xxh64 is")]]


@pytest.mark.parametrize(("packed", "read", "attack", "message"), [
    (packed, read, *attack) for packed, read, attacks in (
        (False, read_all, READING), (False, check_all, CHECKING), (True, read_all, EXPANDING)) for attack in attacks],
    ids=range(len(READING + CHECKING + EXPANDING)))
def test_lies_and_forged_bytes_are_refused(split, packed, read, attack, message):
    folder = split(packed)
    attack(folder)
    refused(folder, message, read=read)
    assert not (packed and (folder / SHARD).exists())


@pytest.mark.parametrize("name", [SHARD, "lengths.npy", "manifest.json", ZIP])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large"])
def test_only_plain_files_are_read(split, tmp_path, name, kind):
    folder = split(name == ZIP)
    path = folder / name
    if kind == "large":
        os.truncate(path, (1 << 30) + 1)
        return refused(folder, rf"{name}: has \d+ bytes")
    path.rename(tmp_path / name)
    if kind == "link":
        path.symlink_to(tmp_path / name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refused(folder, f"{name}: .*plain file")
    assert not (name == ZIP and (folder / SHARD).exists())  # nothing of it was kept
    if kind == "link":  # what the message advises
        read_all(tmp_path / "copy", remote=str(folder))


@pytest.mark.parametrize("below", ["", SHARD + ".part", SHARD + ".lock"])
def test_links_where_shards_are_made_lead_nowhere(split, tmp_path, below):
    folder = split(True)
    (folder / SHARD).symlink_to(tmp_path / "outside" / "secret.mds")
    read_all(folder)
    assert not (folder / SHARD).is_symlink()  # replaced, not followed
    (folder / SHARD).unlink()
    shutil.rmtree(folder / ".cache")
    target = folder / ".cache" / below
    target.parent.mkdir(exist_ok=True)
    target.symlink_to(tmp_path / "outside" / ("secret.mds" if below.endswith(".lock") else ""))
    refused(folder, "is not a folder|symbolic links")


@pytest.mark.parametrize("name", [SHARD, "lengths.npy", "manifest.json"])
def test_what_a_store_hands_over_instead_of_a_file_is_not_kept(split, tmp_path, name):
    folder, local = split(False), tmp_path / "local"
    place, good = str(folder), (folder / name).read_bytes()
    for content in (good + bytes(1 << 20), good[:-1] + b"x", good[:-9], b"", b"<html>Please log in</html>"):
        (folder / name).write_bytes(content)
        refused(local, f"{place}/{name}.*(must have|xxh64 is|is not JSON)", read=lambda to: read_all(to, remote=place))
    (folder / name).write_bytes(good)
    assert samples_of(MDSSplit(local, remote=place)) == samples_of(MDSSplit(folder))
