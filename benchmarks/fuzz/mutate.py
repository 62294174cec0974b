"""Damage done to sound files: of bytes anywhere, of the structure where a kind of file has one, of the file itself."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import yaml

NUMBERS = (0, 1, -1, 2, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1)
TEXTS = ("", " ", "x", "\0", "..", "../outside", "/etc/passwd", "\u00e9\u202e", "\ud800", "nan", "1e999",
         "9" * 5000, "x" * 100_000, "true", "${x}", "${oc.env:HOME}", "???", "null", "mlm", "clm", "1dur",
         "-1tok", "0ba", "1e400tok", "{}", "__class__", "model.safetensors")
VALUES = (*NUMBERS, 10**30, 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"), True, False, None, *TEXTS, [], {},
          [[]], [None], {"": 0}, [0] * 1000, {"name": "ettin"})


def damage(path: Path, rng: Random, others: list[Path]) -> str:
    """Damages one file in place, once or a few times, and says how."""
    if rng.random() < 0.04:
        return _replace_file(path, rng, others)
    data, how = path.read_bytes(), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = {".json": _change_json, ".yaml": _change_yaml, ".safetensors": _change_safetensors,
                  ".pt": _change_archive}.get(path.suffix, _change_bytes)
        change = _change_bytes if rng.random() < 0.3 else change
        try:
            data = change(data, rng)
        except (ValueError, KeyError, RecursionError, zipfile.BadZipFile, yaml.YAMLError, UnicodeError):
            change, data = _change_bytes, _change_bytes(data, rng)  # its structure went with the change before
        how.append(change.__name__.strip("_"))
    if rng.random() < 0.05 and others:  # the end of another file
        data, how = data[:rng.randrange(len(data) + 1)] + _tail(rng.choice(others).read_bytes(), rng), [*how, "splice"]
    path.write_bytes(data)
    return f"{path.name}: {', '.join(how)}"


def _tail(data: bytes, rng: Random) -> bytes:
    return data[rng.randrange(len(data) + 1):]


def _replace_file(path: Path, rng: Random, others: list[Path]) -> str:
    """Another file, a folder, a link to itself or into the void, an empty file, or none in its place."""
    kind = rng.choice(("missing", "empty", "folder", "loop", "dangling", *(["other"] if others else [])))
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind in ("loop", "dangling"):
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    elif kind == "other":
        shutil.copyfile(rng.choice(others), path)
    return f"{path.name}: {kind}"


def _change_bytes(data: bytes, rng: Random) -> bytes:
    raw, kind = bytearray(data), rng.randrange(9)
    at, end = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    if rng.random() < 0.7:  # a short stretch
        end = min(end, at + rng.choice((1, 2, 4, 8, 64)))
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        del raw[at:end]
    elif kind == 2:
        raw[at:at] = raw[at:end]
    elif kind == 3:
        raw[at:end] = bytes(end - at)
    elif kind == 4:
        raw[at:end] = rng.randbytes(end - at)
    elif kind == 5:  # a grown number in text
        digits = list(re.finditer(rb"\d+", raw[at:at + 4096]))
        if digits:
            found = rng.choice(digits)
            raw[at + found.start():at + found.end()] = str(rng.choice(NUMBERS)).encode()
    elif kind == 6:  # a binary number
        width = rng.choice((1, 2, 4, 8))
        at = rng.choice((at, at // width * width, min(at % 64, len(raw))))
        raw[at:at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, rng.choice(("little", "big")))
    elif kind == 7:
        raw += rng.randbytes(rng.choice((1, 16, 5000)))
    if kind == 8 or bytes(raw) == data:
        for _ in range(rng.choice((1, 1, 8)) if raw else 0):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of every node."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(item, (dict, list)):
            _places(item, found)
    return found


def change_tree(tree: Any, rng: Random) -> Any:
    """A copy of plain containers with one node changed, removed, renamed, repeated or swapped."""
    tree = copy.deepcopy(tree)
    places = _places(tree, []) if isinstance(tree, (dict, list)) else []
    if not places or rng.random() < 0.01:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    value, kind = holder[key], rng.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice((str(key) + "x", str(key)[:-1], *TEXTS))] = holder.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 3 and isinstance(value, list):
        holder[key] = value * rng.choice((0, 2, 3)) + value[:1]
    elif kind == 4 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        holder[key] = value[:at] + rng.choice(TEXTS) + value[at + rng.randrange(2):]
    elif kind in (5, 6, 7) and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, value * 1000, -value, float(value), str(value), *NUMBERS))
    elif kind == 8:
        holder[key] = [value] if rng.random() < 0.5 else {str(key): value}
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def _change_json(data: bytes, rng: Random) -> bytes:
    tree = change_tree(json.loads(data), rng)
    if rng.random() < 0.01:  # deeper than any reader goes
        return b"[" * 100_000 + b"]" * 100_000
    return json.dumps(tree, ensure_ascii=True).encode()


def _change_yaml(data: bytes, rng: Random) -> bytes:
    return yaml.safe_dump(change_tree(yaml.safe_load(data), rng), sort_keys=False).encode("utf-8", "surrogatepass")


def _change_safetensors(data: bytes, rng: Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    head = _change_json(data[8:8 + size], rng)
    stated = len(head) if rng.random() < 0.9 else rng.choice(NUMBERS) % 2**64
    return stated.to_bytes(8, "little") + head + data[8 + size:]


def _change_archive(data: bytes, rng: Random) -> bytes:
    """A zip file of which one entry is damaged, renamed or gone, and all sums are right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    pickles = [at for at, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    at = rng.choice(pickles) if pickles and rng.random() < 0.7 else rng.randrange(len(entries))
    name, content = entries[at]
    kind = rng.randrange(12)
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries[at] = rng.choice((name + "x", "../" + name, entries[rng.randrange(len(entries))][0])), content
    else:
        entries[at] = name, _change_bytes(content, rng)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", rng.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED,))) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return written.getvalue()
