"""What the commands verify and show take as SET: a set, one split of it, or a mixture; a folder or a URL.

Finds the splits, opens them for reading, finds the tokenizer to decode with; a set behind a URL is read through a
temporary folder. Nothing is checked here beyond what opening checks (verify.py does that), and nothing is written into
the set.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.data.manifest import INDEX, MANIFEST, Buffer, expand_all, map_file, read_json
from ettin_foundry.data.mixture import MIX_FORMAT
from ettin_foundry.data.shards import Shard, parse_shard
from ettin_foundry.data.storage import Storage, is_url, open_storage

__all__ = ["QUARANTINE", "SHARD_NAME", "SetFolder", "find_set", "is_mix", "load_decoder", "open_splits",
           "peek_shard", "plain", "shard_order"]

QUARANTINE = "quarantine"
"""Folder in a dataset that holds what its owner took out of use; it is no split."""
SHARD_NAME = re.compile(r"shard(\.\d+)+\.mds(\.zstd)?")
"""Names that the converter gives to shards: shard.UNIT.NUMBER.mds, older ones shard.NUMBER.mds; packed ones end in .zstd."""

_LONGEST = 64 << 20  # bytes of a tokenizer.json


@dataclass(frozen=True)
class SetFolder:
    """Where a set lies.

    Attributes:
        storage: the folder that holds the splits, tokenizer/, README.md.
        splits: names of the split folders that are meant: all, or the one that was named; train first.
        whole: the set was named, not one split of it.
    """

    storage: Storage
    splits: tuple[str, ...]
    whole: bool


def find_set(location: str | os.PathLike[str]) -> SetFolder:
    """The set or split at a folder or URL; a folder counts as a split as long as one of its files is left.

    Raises:
        FileNotFoundError: nothing of a set is there.
    """
    place = os.fspath(location) if is_url(location) else os.path.abspath(open_storage(location).url)
    storage = open_storage(place)
    folders = {name.rpartition("/")[0] for name, _ in storage.list() if _of_split(name)}
    if "" in folders:  # the location is itself a split
        parent, _, name = storage.url.rpartition("/")
        return SetFolder(open_storage(parent or "/"), (name,), whole=False)
    splits = [folder for folder in folders if "/" not in folder and folder != QUARANTINE]
    if not splits:
        raise FileNotFoundError(f"{location}: holds no split, that is no {MANIFEST}, {INDEX} or shards, here or one folder "
                                "down; a folder made by data_prep/convert.py is needed. Correct the path")
    return SetFolder(storage, tuple(sorted(splits, key=lambda split: (split != "train", split))), whole=True)


def is_mix(folder: Path) -> bool:
    """Whether a split's folder on this machine is that of a mixture."""
    try:
        found = read_json(folder / MANIFEST)
    except (ValueError, OSError):
        return False
    return isinstance(found, dict) and found.get("format") == MIX_FORMAT


def shard_order(name: str) -> tuple[int, ...]:
    """The numbers in a shard's name; shards are listed in the order of these, not of the letters."""
    return tuple(int(number) for number in re.findall(r"\d+", name.removesuffix(".zstd")))


@contextlib.contextmanager
def open_splits(location: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
    """Split -> `mds.MDSSplit` or `mix_set.MixtureSplit`, for use inside the `with`.

    Raises:
        FileNotFoundError, ValueError: no set is there, or a manifest is not one; names the file.
    """
    from ettin_foundry.data.mixture import open_split

    found = find_set(location)
    with contextlib.ExitStack() as stack:
        if found.storage.is_local:
            yield {split: open_split(Path(found.storage.url) / split) for split in found.splits}
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ettin-")))
            yield {split: open_split(folder / split, remote=found.storage.where(split)) for split in found.splits}


def load_decoder(storage: Storage) -> Any | None:
    """The set's `tokenizers.Tokenizer`; None where it has no tokenizer/ folder.

    Raises:
        ValueError: tokenizer.json cannot be read.
    """
    from tokenizers import Tokenizer

    name = "tokenizer/tokenizer.json"
    if not storage.exists(name):
        return None
    try:
        if storage.size(name) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        return Tokenizer.from_str(storage.read_bytes(name).decode())
    except OSError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{storage.where(name)}: cannot be read ({error!s:.200}); the file that the converter saved is "
                         "needed. Put the set's own back") from None


def peek_shard(folder: Path, entry: Mapping[str, Any], *, chunk_length: int, vocab_size: int) -> Shard:
    """Opens a shard of a folder on this machine, checked but not held to its hash; a packed one is expanded in memory, not
    beside itself as a loader does it.

    Raises:
        FileNotFoundError, ValueError: it is missing, or is no shard.
    """
    path = folder / entry["raw"]["basename"]
    buffer: Buffer
    if entry.get("zip"):
        packed = folder / entry["zip"]["basename"]
        buffer = expand_all(map_file(packed, None, None), packed, entry["raw"]["bytes"])
    else:
        buffer = map_file(path, None, None)
    return parse_shard(buffer, path, num_samples=None, chunk_length=chunk_length, vocab_size=vocab_size)


def plain(text: str, limit: int | None = None) -> str:
    """Foreign text for a terminal: one line, control and formatting characters as escapes, cut at `limit` characters."""
    cut = text if limit is None or len(text) <= limit else text[:limit] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _of_split(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base in (MANIFEST, INDEX) or bool(SHARD_NAME.fullmatch(base))
