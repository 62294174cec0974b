"""The manifest of a converted split: what it states, and reading it without trusting it.

`manifest.json` is written last by convert.py, so a folder that holds one is complete. Everything that another module
relies on is checked here, names above all: a name with a slash in it would open any file of the machine. Opening the
files that it names is mds.py's work.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "FORMAT", "MANIFEST", "MAX_CHUNK_LENGTH", "VERSION", "read_json", "read_manifest", "refuse"]

FORMAT = "ettin-mds"
VERSION = 1
MANIFEST = "manifest.json"
COLUMNS = {"tokens": "ndarray:uint16", "doc": "str", "part": "int", "last": "int", "source": "str"}
"""Column name -> MDS encoding. No other column or encoding is read, so none that executes or decodes anything."""

MAX_CHUNK_LENGTH = 65_535  # a chunk's length is stored in at most two bytes
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_XXH64 = re.compile(r"[0-9a-f]{16}")


def refuse(path: Path | str, found: str, allowed: str, advice: str = "Fetch or convert the set again") -> ValueError:
    """The error for a file that is not what it must be, to be raised by the caller."""
    return ValueError(f"{path}: {found}; {allowed}. {advice}")


def read_json(path: Path) -> Any:
    """The JSON in a file of the set; a missing or unreadable one is an error that names it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; a split folder made by data_prep/convert.py is needed. Convert the "
                                "corpus, or correct dataset.local and dataset.split") from None
    except (ValueError, RecursionError) as error:
        raise refuse(path, f"is not JSON ({error})", "it must be the file that convert.py wrote") from None


def _need(where: str, mapping: Any, key: str, kind: type) -> Any:
    """The value of a key, of the given type; numbers must not be negative."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
        raise refuse(where, f"{key} is {value!r}", f"{kind.__name__} is needed")
    return value


def _check_file_entry(where: str, entry: dict[str, Any]) -> str:
    """A manifest's {basename, bytes, xxh64}: the name must be plain, so that it cannot leave the folder."""
    name = _need(where, entry, "basename", str)
    if not _PLAIN_NAME.fullmatch(name):
        raise refuse(where, f"file name {name!r}", "only plain file names inside the folder are allowed",
                      "Do not use this set: it was made to read other files")
    _need(where, entry, "bytes", int)
    if not _XXH64.fullmatch(_need(where, entry, "xxh64", str)):
        raise refuse(where, f"xxh64 of {name} is {entry['xxh64']!r}", "16 hexadecimal digits are needed")
    return name


def read_manifest(local: Path) -> dict[str, Any]:
    """The manifest, every field that anything relies on checked."""
    path = local / MANIFEST
    manifest = read_json(path)
    where = str(path)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        found = [manifest.get(key) for key in ("format", "version")] if isinstance(manifest, dict) else manifest
        raise refuse(where, f"format and version are {found!r:.80}", f"[{FORMAT!r}, {VERSION}] is read here")
    if manifest.get("columns") != COLUMNS:
        raise refuse(where, f"columns are {manifest.get('columns')!r:.300}", f"only {COLUMNS} is read")
    if not 1 <= _need(where, manifest, "chunk_length", int) <= MAX_CHUNK_LENGTH:
        raise refuse(where, f"chunk_length is {manifest['chunk_length']}", f"1 to {MAX_CHUNK_LENGTH} is possible")
    _need(where, manifest, "split", str)
    _need(where + " tokenizer", _need(where, manifest, "tokenizer", dict), "vocab_size", int)
    for key in ("documents", "samples", "tokens"):
        _need(where + " totals", manifest.get("totals"), key, int)
    names = [_check_file_entry(where + " lengths", _need(where, manifest, "lengths", dict))]
    for number, shard in enumerate(_need(where, manifest, "shards", list)):
        place = f"{where} shards[{number}]"
        names.append(_check_file_entry(place, _need(place, shard, "raw", dict)))
        if shard.get("zip") is not None:
            raise refuse(place, "zip is set", "version 1 has no compressed shards")
        if not _need(place, shard, "samples", int):
            raise refuse(place, "samples is 0", "a shard holds at least one chunk")
        _need(place, shard, "tokens", int)
        _need(place, shard, "source", str)
        for length, count in _need(place, shard, "rows", dict).items():
            _need(f"{place} rows[{length}]", {"count": count}, "count", int)
    if len(set(names)) != len(names):
        raise refuse(where, "a file is named twice", "every shard has a file of its own")
    if not manifest["shards"]:
        raise refuse(where, "it lists no shards", "at least one is needed")
    return manifest
