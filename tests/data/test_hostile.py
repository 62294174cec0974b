"""Every attack on a reader of datasets is refused before a byte is used, with a message that names the file.

Each spoils a small good split; beside it lies a folder that no attack may read or change. `seal` puts sizes and hashes
right again, because whoever can write a shard can also write its hash: what is tested is the check behind it.
"""

import os
import pickle
import re
import shutil
from pathlib import Path

import hand_made
import numpy as np
import pytest
import zstd
from hand_made import NAMES, array_file, edit, random_documents, samples_of, seal, set_in, shard_bytes, write_split

from ettin_foundry.data.shards import MDSSplit

SHARD, ZIP = "shard.00000.000.mds", "shard.00000.000.mds.zstd"
SECRET = {name: b"never to be read or changed" for name in ("secret", "secret.mds", "secret.zstd")}
pytestmark = pytest.mark.timeout(60)  # an attack may not make the reader wait


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    """The same good split, plain (False) and compressed (True)."""
    rng = np.random.default_rng(1)
    shards = [(source, random_documents(rng, 16 - number)[:15]) for number, source in enumerate("aab")]
    shards[0][1][0] = ("d\u00e90", np.arange(20, dtype=np.uint16))  # the only chunk of its document
    place = tmp_path_factory.mktemp("masters")
    return {False: write_split(place / "plain" / "train", shards),
            True: write_split(place / "zstd" / "train", shards, compress=lambda data: zstd.compress(data, 3))}


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


def test_the_split_that_is_spoilt_was_good(split, masters):
    read_all(split(False))
    for folder in masters.values():
        check_all(folder)


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


RAW, FIRST = ("shards", 0, "raw"), ("shards", 1)
LIES = [  # values that are wrong only beside others: file, change, message, how it is found
    *[("manifest.json", *lie, read_all) for lie in [
        (lambda m: m["shards"][0].update(m["shards"][1]), "manifest.json: basename"),
        *[(set_in("columns", key, value="pkl"), "manifest.json: columns") for key in ("extra", "tokens")],
        (set_in("shards", 0, "zip", value={"basename": ZIP, "bytes": 9, "xxh64": "0" * 16}), "manifest.json: zip"),
        *[(set_in(*RAW, "basename", value=name), "basename") for name in (".hidden.mds", "shard\0.mds", "a.mds\n")],
        (lambda m: [m["shards"][n].update(samples=m["shards"][n]["samples"] + more) for n, more in ((0, 1), (1, -1))],
         "header states"), (set_in(*FIRST, "documents", value=10**6), "manifest.json: totals.documents"),
        (lambda m: m["shards"][1].pop("source"), "shards.1.source"), (set_in("chunk_length", value=5), "chunk_len")]],
    *[("manifest.json", *lie, check_all) for lie in [
        (set_in(*FIRST, "rows", "64", value=1), "shards.1: rows of 64 is 1"),
        (lambda m: (m["shards"][0].update(documents=m["shards"][0]["documents"] - 1),
                    m["totals"].update(documents=m["totals"]["documents"] - 1)), "shards.0: documents"),
        (set_in("shards", 0, "source", value="z"), f"{SHARD}: it holds chunks of another source")]],
    *[("index.json", change, "index.json: its shards", check_all) for change in [
        lambda i: i["shards"][1]["raw_data"].update(basename="../outside/secret.mds"), lambda i: i["shards"].pop(),
        lambda i: i["shards"][0].update(column_encodings=["pkl"] * 5), lambda i: i.pop("shards")]],
]


@pytest.mark.parametrize(("name", "change", "message", "read"), LIES, ids=range(len(LIES)))
def test_manifests_and_indices_that_contradict_themselves_are_refused(split, name, change, message, read):
    folder = split(False)
    edit(folder, change, name)
    refused(folder, message, read=read)


def test_a_manifest_that_is_no_json_object_is_refused(split):
    folder = split(False)
    for text in (b"{", b'{"format": "\xff"}', b"[" * 100_000, b'{"version": NaN}', b"[]", b"3", b"9" * 5000):
        (folder / "manifest.json").write_bytes(text)
        refused(folder, "manifest.json: ")


@pytest.mark.parametrize("name", [SHARD, "lengths.npy", "manifest.json", ZIP])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "large", "pointer"])
def test_only_plain_files_are_read(split, tmp_path, name, kind):
    folder = split(name == ZIP)
    path = folder / name
    if kind == "large":
        os.truncate(path, (1 << 30) + 1)
        return refused(folder, rf"{name}: has \d+ bytes")
    path.rename(tmp_path / name)
    if kind == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 8123456\n")
        refused(folder, f"{name} must be the file itself.*git lfs pull")
        return refused(tmp_path / "copy", f"{name} must be.*lfs pull", read=lambda to: read_all(to, remote=str(folder)))
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


def put(data, at, value, dtype='<u4'):
    raw = np.array([value], dtype).tobytes()
    data[at:at + len(raw)] = raw


def sample_at(data, index):
    """Where a sample begins; -1 is the end of the last one."""
    index %= int.from_bytes(data[:4], "little") + 1
    return int(np.frombuffer(data, "<u4", 1, 4 + 4 * index)[0])


def last_at(data, index=0):
    """Where a sample's `last` is; `part` follows it."""
    return sample_at(data, index) + 12 + int(np.frombuffer(data, "<u4", 1, sample_at(data, index))[0])


def config(change):
    def forge(data):
        where = slice(4 + 4 * (int.from_bytes(data[:4], "little") + 1), sample_at(data, 0))
        data[where] = change(bytes(data[where])).ljust(where.stop - where.start)
    return forge


@pytest.mark.parametrize(("change", "message", "read"), [
    (lambda d: put(d, 0, 3), "states 3 samples", read_all), (lambda d: d.extend(b"xx"), "leave the file", read_all),
    (lambda d: put(d, sample_at(d, 1) - 2, 60_000, "<u2"), "token 60000 in chunk 0", read_all),
    *[(config(change), "has other columns", read_all) for change in (
        lambda c: c.replace(b'"int", "int"', b'"pkl", "int"'), lambda c: c.replace(b'"mds"', b'"csv"'),
        lambda c: c.replace(b'"last", "part"', b'"part", "last"'), lambda c: b"[3]")],
    *[(config(change), "is not JSON", read_all) for change in (lambda c: b"{", lambda c: b"[" * len(c))],
    (lambda d: put(d, last_at(d, 1) + 8, 7, "<i8"), "chunk 1 is part 7", check_all),
    (lambda d: put(d, last_at(d) + 8, -1, "<i8"), "chunk 0 is part -1", check_all),
    (lambda d: put(d, last_at(d) + 16, ord("z"), "u1"), "chunks of another source", check_all)], ids=range(12))
def test_forged_bytes_under_a_right_hash_are_refused(split, change, message, read):
    """Those that only some readers look at; test_shards.py tries any bytes."""
    folder = split(False)
    data = bytearray((folder / SHARD).read_bytes())
    change(data)
    (folder / SHARD).write_bytes(data)
    seal(folder)
    refused(folder, f"{SHARD}: .*(?:{message})", read=read)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_column_is_never_decoded(split):
    folder, payload = split(False), pickle.dumps(Payload())
    encodings = {**dict(zip(NAMES, hand_made.CONFIG["column_encodings"])), "extra": "pkl", "tokens": "pkl"}
    names = sorted(encodings)
    forged = {**hand_made.CONFIG, "column_names": names, "column_encodings": [encodings[name] for name in names],
              "column_sizes": [8 if encodings[name] == "int" else None for name in names]}
    sample = np.array([len(payload)] * 4, "<u4").tobytes() + payload * 4
    (folder / SHARD).write_bytes(shard_bytes([sample], forged))
    seal(folder)
    edit(folder, lambda m: (m["shards"][0].update(samples=1, tokens=3, documents=1, rows={}), m["totals"].update(
        {key: sum(shard[key] for shard in m["shards"]) for key in ("samples", "tokens", "documents")})))
    refused(folder, "other columns.*pkl")


def swap(lengths):
    """Other lengths, with the same number of chunks and tokens: a - 1 and b + 1 instead of a and b."""
    a, b = (int(at) for at in np.flatnonzero(lengths[0])[[3, -3]])
    lengths[0, [a, b]] -= 1
    lengths[0, [a - 1, b + 1]] += 1
    return lengths


NPY = b"\x93NUMPY\1\0"


@pytest.mark.parametrize(("change", "message"), [
    (lambda a: array_file(swap(a)), f"{SHARD}: its chunk lengths differ"),
    (lambda a: array_file(a[::-1]), "lengths.npy: row 0 counts"),
    (lambda a: array_file(a + np.eye(*a.shape, dtype=a.dtype)), "lengths.npy: row 0 counts"),
    *[(lambda a, change=change: change(a), "lengths.npy: its header|lengths must") for change in (
        lambda a: array_file(a.astype(np.int64)), lambda a: array_file(a[:-1]),
        lambda a: array_file(np.asfortranarray(a)), lambda a: array_file(np.array([Payload()])), lambda a: b"junk" * 20,
        lambda a: NPY + b"\x30\0" + b"__import__('os').mkdir('executed')".ljust(48), lambda a: NPY + b"\xff\xff{")],
], ids=range(10))
def test_other_tables_of_lengths_are_refused(split, change, message):
    folder = split(False)
    (folder / "lengths.npy").write_bytes(change(np.load(folder / "lengths.npy")))
    seal(folder)
    refused(folder, message)


@pytest.mark.parametrize(("change", "message"), [
    (lambda raw: zstd.compress(bytes(1 << 26)), "expands beyond"), (lambda raw: zstd.compress(raw[:-5]), "expands to"),
    (lambda raw: zstd.compress(raw) + zstd.compress(b"x" * 99), "expands beyond"),
    (lambda raw: zstd.compress(raw) + b"junk", "not a whole zstd file"),
    (lambda raw: zstd.compress(raw)[:-3], "not a whole zstd file"),
    (lambda raw: b"PK\3\4" + raw[:100], "not a whole zstd file"),
    # frame header: no size, window of 2**30; then one raw block
    (lambda raw: b"\x28\xb5\x2f\xfd\x00\xa0\x09\x00\x00x", "too much memory"),
    (lambda raw: zstd.compress(raw[:-1] + bytes([raw[-1] ^ 1])), "expanded: xxh64 is")], ids=range(8))
def test_compressed_shards_expand_to_what_is_stated(split, change, message):
    folder = split(True)
    (folder / ZIP).write_bytes(change(zstd.uncompress((folder / ZIP).read_bytes())))
    seal(folder)
    refused(folder, f"{ZIP}.*{message}")
    assert not (folder / SHARD).exists()


@pytest.mark.parametrize("name", [SHARD, "lengths.npy", "manifest.json"])
def test_what_a_store_hands_over_instead_of_a_file_is_not_kept(split, tmp_path, name):
    folder, local = split(False), tmp_path / "local"
    place, good = str(folder), (folder / name).read_bytes()
    for content in (good + bytes(1 << 20), good[:-1] + b"x", good[:-9], b"", b"<html>Please log in</html>"):
        (folder / name).write_bytes(content)
        refused(local, f"{place}/{name}.*(must have|xxh64 is|is not JSON)", read=lambda to: read_all(to, remote=place))
    (folder / name).write_bytes(good)
    assert samples_of(MDSSplit(local, remote=place)) == samples_of(MDSSplit(folder))
