"""Attacks on a reader of converted sets: how to spoil a small good split, and what must be said of it.

Each spoils names, links, columns, sizes, offsets or compressed files here; lies about counts are in test_hostile.py. `seal`
puts sizes and hashes right again, because whoever can write a shard can also write its hash: what is tested is the check
behind it.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstd
from hand_made import CONFIG, NAMES, array_file, edit, seal, shard_bytes

from ettin_foundry.data.shards import MDSSplit, scan_shard

SHARD, ZIP = "shard.00000.000.mds", "shard.00000.000.mds.zstd"


class Attack(NamedTuple):
    name: str
    spoil: Callable[[Path, Path], object]
    """Called with the split and the folder outside of it."""
    message: str
    packed: bool
    read: Callable[[Path], object]


ATTACKS: list[Attack] = []


def read_all(folder: Path) -> None:
    data = MDSSplit(folder)
    for shard in range(data.num_shards):
        for index in range(int(data.samples[shard])):
            data.sample(shard, index)


def verify(folder: Path) -> None:
    MDSSplit(folder).verify()


def fetch(folder: Path) -> None:
    read_all_of = MDSSplit(folder.parent / "cache", remote=str(folder))
    for shard in range(read_all_of.num_shards):
        read_all_of.chunk(shard, 0)


def scan(folder: Path) -> None:
    scan_shard(folder / SHARD, chunk_length=62, vocab_size=512)


def attack(name: str, spoil: Callable[[Path, Path], object], message: str, *, packed: bool = False,
           read: Callable[[Path], object] = read_all) -> None:
    ATTACKS.append(Attack(name, spoil, message, packed, read))


def lie(name: str, change: Callable[[dict[str, Any]], object], message: str, *, packed: bool = False,
        read: Callable[[Path], object] = read_all) -> None:
    """An attack through the manifest."""
    attack(name, lambda folder, _: edit(folder, change), f"manifest.json.*(?:{message})", packed=packed, read=read)


def forge(name: str, change: Callable[[bytearray], object], message: str, *,
          read: Callable[[Path], object] = read_all) -> None:
    """An attack through the bytes of the first shard, under a right size and hash."""
    def spoil(folder: Path, _: Path) -> None:
        data = bytearray((folder / SHARD).read_bytes())
        change(data)
        (folder / SHARD).write_bytes(data)
        seal(folder)

    attack(name, spoil, f"{SHARD}: .*(?:{message})", read=read)


def pack(name: str, change: Callable[[bytes], bytes], message: str) -> None:
    """An attack through a compressed shard, under a right size and hash."""
    def spoil(folder: Path, _: Path) -> None:
        (folder / ZIP).write_bytes(change(zstd.uncompress((folder / ZIP).read_bytes())))
        seal(folder)

    attack(name, spoil, message, packed=True)


def put(data: bytearray, at: int, value: int, dtype: str = "<u4") -> None:
    raw = np.array([value], dtype).tobytes()
    data[at:at + len(raw)] = raw


def sample_at(data: bytearray, index: int) -> int:
    """Where a sample begins; -1 is the end of the last one."""
    index %= int.from_bytes(data[:4], "little") + 1
    return int(np.frombuffer(data, "<u4", 1, 4 + 4 * index)[0])


def array_at(data: bytearray) -> int:
    """Where the token array of the first sample begins."""
    return sample_at(data, 1) - int(np.frombuffer(data, "<u4", 3, sample_at(data, 0))[2])


def doc_at(data: bytearray, index: int = 0) -> int:
    return sample_at(data, index) + 12


def last_at(data: bytearray, index: int = 0) -> int:
    return doc_at(data, index) + int(np.frombuffer(data, "<u4", 1, sample_at(data, index))[0])


class Payload:
    def __init__(self, outside: Path) -> None:
        self.outside = outside

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.outside / "executed"),)


# ------------------------------------------------------------------ names, links, things that are no files

for label, bad in {"leaves the folder": "../outside/secret.mds", "is absolute": "/etc/secret.mds", "has a slash": "a/b.mds",
                   "is hidden": ".hidden.mds", "holds NUL": "shard\0.mds", "is empty": "", "is ..": "..",
                   "is endless": "s" * 300 + ".mds", "is the manifest's": "manifest.json", "is the table's": "lengths.npy",
                   "is the index's": "index.json", "is a note's": "substitutions.jsonl"}.items():
    lie(f"shard name {label}", lambda m, bad=bad: m["shards"][0]["raw"].update(basename=bad), "plain file names")
lie("lengths name leaves the folder", lambda m: m["lengths"].update(basename="../outside/secret"), "it must be lengths.npy")
lie("lengths name is a shard's", lambda m: m["lengths"].update(basename=SHARD), "it must be lengths.npy")
lie("packed name leaves the folder", lambda m: m["shards"][0]["zip"].update(basename="../outside/secret.zstd"),
    f"it must be {ZIP}", packed=True)
lie("packed name is another shard's", lambda m: m["shards"][0]["zip"].update(basename=m["shards"][1]["zip"]["basename"]),
    f"it must be {ZIP}", packed=True)
lie("two shards share a file", lambda m: m["shards"][0].update(m["shards"][1]), "named twice")


def replace_by_link(name: str, folder: Path, outside: Path) -> None:
    (folder / name).rename(outside.parent / name)
    (folder / name).symlink_to(outside.parent / name)


def replace_by_pipe(name: str, folder: Path, _: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def replace_by_folder(name: str, folder: Path, _: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


for file in (SHARD, "lengths.npy", "manifest.json"):
    attack(f"{file} is a link", partial(replace_by_link, file), f"{file}: cannot be opened as a plain file.*links")
    attack(f"{file} is a pipe that nobody writes", partial(replace_by_pipe, file), f"{file}: is not a plain file")
attack("shard is a folder", partial(replace_by_folder, SHARD), f"{SHARD}: is not a plain file")
attack("packed shard is a link", partial(replace_by_link, ZIP), f"{ZIP}: cannot be opened as a plain file", packed=True)


def link_cache(below: str, folder: Path, outside: Path) -> None:
    target = folder / ".cache" / below
    target.parent.mkdir(exist_ok=True)
    target.symlink_to(outside / "secret.mds" if below.endswith(".lock") else outside)


attack("cache folder is a link", partial(link_cache, ""), r"\.cache: is not a folder; a link would lead", packed=True)
attack("folder of files being made is a link", partial(link_cache, SHARD + ".part"), r"\.part: is not a folder", packed=True)
attack("lock file is a link", partial(link_cache, SHARD + ".lock"), r"\.lock: cannot be opened", packed=True)

# ------------------------------------------------------------------ columns and encodings

lie("extra pickle column", lambda m: m["columns"].update(extra="pkl"), "columns are .*pkl")
lie("pickled tokens", lambda m: m["columns"].update(tokens="pkl"), "columns are .*pkl")
lie("jpeg column", lambda m: m["columns"].update(doc="jpeg"), "columns are .*jpeg")


def plant_pickle(column: str, folder: Path, outside: Path) -> None:
    """A shard whose header names a pickle column, with a payload in it."""
    encodings = dict(zip(NAMES, CONFIG["column_encodings"]))
    names = sorted({*NAMES, column})
    encodings[column] = "pkl"
    config = {**CONFIG, "column_names": names, "column_encodings": [encodings[name] for name in names],
              "column_sizes": [8 if encodings[name] == "int" else None for name in names]}
    payload = pickle.dumps(Payload(outside))
    sample = np.array([len(payload)] * 4, "<u4").tobytes() + payload * 4
    (folder / SHARD).write_bytes(shard_bytes([sample], config))
    seal(folder)
    edit(folder, lambda m: (m["shards"][0].update(samples=1, tokens=3, documents=1, rows={}), m["totals"].update(
        {key: sum(shard[key] for shard in m["shards"]) for key in ("samples", "tokens", "documents")})))


for column in ("extra", "tokens", "doc"):
    attack(f"pickle in the shard's column {column}", partial(plant_pickle, column), "other columns.*pkl.*Do not use")


def config_at(data: bytearray) -> slice:
    return slice(4 + 4 * (int.from_bytes(data[:4], "little") + 1), sample_at(data, 0))


def change_config(change: Callable[[bytes], bytes], data: bytearray) -> None:
    where = config_at(data)
    new = change(bytes(data[where]))
    data[where] = new.ljust(where.stop - where.start)


for label, change in {
        "an unknown encoding": lambda c: c.replace(b'"int", "int"', b'"pkl", "int"'),
        "another format": lambda c: c.replace(b'"mds"', b'"csv"'),
        "another type": lambda c: c.replace(b"uint16", b"uint32"),
        "another order of columns": lambda c: c.replace(b'"last", "part"', b'"part", "last"'),
        "an unknown compression": lambda c: c.replace(b'"compression": null', b'"compression": "gz"'),
        "no JSON": lambda c: b"{", "endless nesting": lambda c: b"[" * len(c)}.items():
    forge(f"shard header with {label}", partial(change_config, change), "describes other columns")


def plant_array(array: np.ndarray, folder: Path, outside: Path) -> None:
    (folder / "lengths.npy").write_bytes(array_file(array))
    seal(folder)


attack("pickled object in lengths.npy", lambda folder, outside: plant_array(np.array([Payload(outside)]), folder, outside),
       "lengths.npy: holds object")

# ------------------------------------------------------------------ sizes, offsets, layout of a shard

attack("truncated shard", lambda folder, _: (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-7]),
       rf"{SHARD}: has \d+ bytes; the manifest states \d+")
attack("shard with bytes appended", lambda folder, _: (folder / SHARD).write_bytes((folder / SHARD).read_bytes() + b"x"),
       rf"{SHARD}: has \d+ bytes; the manifest states \d+")
attack("flipped byte in a token", lambda folder, _: (folder / SHARD).write_bytes(
    (folder / SHARD).read_bytes()[:-1] + bytes([(folder / SHARD).read_bytes()[-1] ^ 1])),
    rf"{SHARD}: xxh64 is [0-9a-f]+; the manifest states")
lie("size of 0", lambda m: m["shards"][0]["raw"].update(bytes=0), "bytes of .* is 0")
lie("size beyond the format", lambda m: m["shards"][0]["raw"].update(bytes=2**32), "bytes is 4294967296")
lie("negative size", lambda m: m["shards"][0]["raw"].update(bytes=-1), "bytes is -1")
lie("hash that is none", lambda m: m["shards"][0]["raw"].update(xxh64="abc"), "16 hexadecimal digits")
lie("lengths.npy larger than its table", lambda m: m["lengths"].update(bytes=2**40), "bytes is 1099511627776")
lie("packed size beyond what packing gives", lambda m: m["shards"][0]["zip"].update(bytes=2**31), "bytes is 2147483648",
    packed=True)
forge("sample count too small", lambda d: put(d, 0, 3), "its header states 3 samples")
forge("sample count too large", lambda d: put(d, 0, 2**32 - 1), "its header states 4294967295 samples")
forge("offsets that overlap", lambda d: put(d, 4 + 4 * 2, sample_at(d, 1)), "offsets overlap")
forge("offsets that skip samples", lambda d: put(d, 4 + 4 * 2, sample_at(d, 5)), "offsets overlap|do not add up")
forge("first offset inside the table", lambda d: put(d, 4, 8), "offsets overlap")
forge("offset beyond the file", lambda d: put(d, 4 + 4 * 3, 2**32 - 1), "offsets overlap")
forge("bytes after the last sample", lambda d: d.extend(b"xx"), "leave the file")
forge("last sample cut off", lambda d: d.__setitem__(slice(sample_at(d, -2), len(d)), b""), "offsets overlap|leave the file")
forge("header overwritten", lambda d: d.__setitem__(slice(0, 8), b"\xff" * 8), "its header states")
forge("size of a doc beyond the file", lambda d: put(d, sample_at(d, 0), 2**32 - 1), "do not add up")
forge("size of tokens beyond the file", lambda d: put(d, sample_at(d, 0) + 8, 2**31), "do not add up")
forge("sizes that wrap around 2**32", lambda d: (put(d, sample_at(d, 0), 2**32 - 8), put(d, sample_at(d, 0) + 4, 20)),
      "do not add up")
forge("sample without tokens", lambda d: (put(d, sample_at(d, 0), sum(np.frombuffer(d, "<u4", 3, sample_at(d, 0))[[0, 2]])),
                                          put(d, sample_at(d, 0) + 8, 0)), "a sample has no tokens")
for label, byte in {"two axes": 8, "lengths of 4 bytes": 6, "lengths of 8 bytes": 7, "no axis": 0}.items():
    forge(f"token array with {label}", lambda d, byte=byte: d.__setitem__(array_at(d), byte), "one row of uint16")
forge("token array shorter than its length", lambda d: d.__setitem__(array_at(d) + 1, d[array_at(d) + 1] - 1),
      "one row of uint16")
forge("token outside the vocabulary", lambda d: put(d, sample_at(d, 1) - 2, 60_000, "<u2"),
      "token 60000 in chunk 0; the tokenizer has 512 entries")
forge("last that is neither 0 nor 1", lambda d: put(d, last_at(d), 2, "<i8"), "`last` of a sample is neither")
forge("last that is negative", lambda d: put(d, last_at(d), -(2**63), "<i8"), "`last` of a sample is neither")
forge("doc that is not UTF-8", lambda d: put(d, doc_at(d), 0xFF, "u1"), "doc or source of chunk 0 is not UTF-8")
forge("doc that is not UTF-8, unread", lambda d: put(d, doc_at(d), 0xFF, "u1"), "doc of a chunk is not UTF-8", read=verify)
forge("parts that jump", lambda d: put(d, last_at(d, 1) + 8, 7, "<i8"), "chunk 1 is part 7 of its document", read=verify)
forge("negative part", lambda d: put(d, last_at(d) + 8, -1, "<i8"), "chunk 0 is part -1 of its document", read=verify)
forge("chunk of another source", lambda d: d.__setitem__(array_at(d) - 1, ord("z")), "chunk 0 is of source 'z'", read=verify)
forge("scanned shard with a sample count beyond it", lambda d: put(d, 0, 2**31), "need more", read=scan)
attack("scanned shard with its header cut off", lambda folder, _: os.truncate(folder / SHARD, 3), f"{SHARD}: .*need more",
       read=scan)
attack("scanned shard cut in half", lambda folder, _: os.truncate(folder / SHARD, (folder / SHARD).stat().st_size // 2),
       f"{SHARD}: its sample offsets", read=scan)
forge("scanned shard of no samples", lambda d: put(d, 0, 0), "at least one is needed", read=scan)

# ------------------------------------------------------------------ compressed shards

pack("packed shard expands to 64 MiB", lambda raw: zstd.compress(bytes(1 << 26)), f"{ZIP}: expands beyond")
pack("packed shard expands to less", lambda raw: zstd.compress(raw[:-5]), rf"{ZIP}: expands to \d+ bytes; the manifest")
pack("packed shard with a second frame", lambda raw: zstd.compress(raw) + zstd.compress(b"x" * 99), f"{ZIP}: expands beyond")
pack("packed shard with bytes after it", lambda raw: zstd.compress(raw) + b"junk", f"{ZIP}: is not a whole zstd file")
pack("packed shard cut off", lambda raw: zstd.compress(raw)[:-3], f"{ZIP}: is not a whole zstd file")
pack("packed shard that is no zstd", lambda raw: b"PK\3\4" + raw[:100], f"{ZIP}: is not a whole zstd file")
# frame header: no size, window of 2**30; then one raw block
pack("packed shard with a window of 1 GiB", lambda raw: b"\x28\xb5\x2f\xfd\x00\xa0\x09\x00\x00x",
     f"{ZIP}: is not a whole zstd file.*too much memory")
pack("packed shard with other content", lambda raw: zstd.compress(raw[:-1] + bytes([raw[-1] ^ 1])),
     rf"{ZIP}, expanded: xxh64 is [0-9a-f]+; the manifest states")
attack("flipped byte in a packed shard", lambda folder, _: (folder / ZIP).write_bytes(
    (folder / ZIP).read_bytes()[:-1] + b"\x77"), rf"{ZIP}: xxh64 is [0-9a-f]+; the manifest states", packed=True)
attack("packed shard under the name of a raw one", lambda folder, _: (folder / SHARD).write_bytes(
    zstd.compress((folder / SHARD).read_bytes())), rf"{SHARD}: has \d+ bytes")
lie("unknown compression", lambda m: m.update(compression="br"), "compression is 'br'")
lie("packed entry in a plain set", lambda m: m["shards"][0].update(zip=dict(m["shards"][0]["raw"])), "all shards have one")
lie("plain entry in a packed set", lambda m: m["shards"][0].update(zip=None), "all shards have one", packed=True)
