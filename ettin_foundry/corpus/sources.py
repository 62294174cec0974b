"""Where text comes from, and in which parts it is read: files, folders, URLs, Hugging Face datasets, the standard library.

A source is resolved once into a sorted listing with sizes; everything after that follows from the listing, so that the
same corpus is cut into the same parts on every machine. Nothing is opened here: reading is readers.py's work, and what
a folder in a bucket is storage.py's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ettin_foundry.corpus.stdlib_text import STDLIB, stdlib_facts
from ettin_foundry.data.storage import LocalStorage, Storage, check_name, is_url, open_storage

__all__ = ["COMPRESSIONS", "DOCSTRINGS", "HUB", "SUFFIXES", "Meter", "Part", "Source", "SourceFile", "file_kind",
           "find_source", "part_bytes", "plan_parts"]

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst")
HUB = "hub"
"""The `file` of a part of a Hugging Face dataset; its `begin` and `end` are a data shard and the number of them."""
DOCSTRINGS = "docstrings"
"""The `file` of the part of the standard library that is in no file."""

_SPLITTABLE = (".jsonl", ".parquet")
_SPLIT_FROM = 1.5  # units; a smaller file is one part
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.DOTALL)


class SourceFile(NamedTuple):
    """One file of a source."""

    name: str
    """Relative to the source's root, divided by slashes: no machine path gets into a data set."""
    size: int
    """Bytes on disk."""


class Part(NamedTuple):
    """What is read in one go: a file, or the records that begin in the bytes [begin, end) of one."""

    file: str
    begin: int = 0
    end: int | None = None
    """None: to the end of the file."""


@dataclass
class Meter:
    """How far the reading is, in bytes on disk: moved by the readers, read by the progress line from any thread."""

    finished_bytes: int = 0
    current_bytes: int = 0
    where: str = ""
    """The file being read."""

    def position(self) -> int:
        return self.finished_bytes + self.current_bytes

    def finish(self, num_bytes: int) -> None:
        """A part has been read to its end."""
        self.current_bytes = 0
        self.finished_bytes += num_bytes


@dataclass(frozen=True)
class Source:
    """One resolved corpus. `files` is empty for a Hugging Face dataset."""

    name: str
    location: str
    """As the user wrote it, without the name."""
    files: tuple[SourceFile, ...] = ()
    root: str = ""
    """Folder or URL that the files' names are relative to."""
    licence: str | None = None
    revision: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on disk to read; 0 where unknown."""
        return sum(file.size for file in self.files)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """File name -> bytes on disk."""
        return dict(self.files)

    def storage(self) -> Storage:
        return open_storage(self.root)


def find_source(text: str, *, licence: str | None = None) -> Source:
    """Resolves a SOURCE argument: `[NAME=]` file, folder, URL, Hugging Face dataset id (`owner/name[:config]`) or stdlib.

    Raises:
        FileNotFoundError: nothing is there, or the dataset cannot be reached. ValueError: a suffix that is not read, or
            a file name that cannot be written into a data set.
    """
    if not text:
        raise ValueError("source: an empty name given; a file, folder, URL or dataset id is needed. Leave it out")
    named = _NAMED.fullmatch(text) if not Path(text).exists() else None
    name, location = named.groups() if named else (None, text)
    if location == STDLIB:
        root, files, facts = stdlib_facts()
        return Source(name or STDLIB, location, tuple(SourceFile(*file) for file in files), root, **facts)
    if is_url(location):
        return _find_url(name, location, licence)
    path = Path(location.removeprefix("file://"))
    if path.is_dir():
        storage = LocalStorage(str(path))
        return Source(name or path.resolve().name, location, _files_of(storage, storage.list()), str(path), licence)
    if path.is_file():
        if file_kind(path.name) is None:
            raise ValueError(f"{path}: suffix {''.join(path.suffixes) or '(none)'} is not read; {_readable()} are. "
                             "Rename or convert the file")
        file = SourceFile(_speakable(path.name, str(path.parent)), path.stat().st_size)
        return Source(name or _stem(path.name), location, (file,), str(path.parent), licence)
    if path.exists():
        raise ValueError(f"{path}: neither a file nor a folder; text is read several times, which a pipe or device does not "
                         "allow. Write it to a file")
    if _HUB_ID.fullmatch(location) and file_kind(location) is None:
        return _find_hub(name, location, licence)
    raise FileNotFoundError(f"{location}: no such file or folder; a file ({_readable()}), a folder of them, a URL (s3://...),"
                            f" a Hugging Face dataset id (owner/name) or {STDLIB} is allowed. Correct the path")


def plan_parts(source: Source, unit_bytes: int) -> list[tuple[Part, ...]]:
    """Cuts a source into units of about `unit_bytes` on disk, in the order of its documents; a function of the listing.

    Small neighbours share a unit. Plain .jsonl and .parquet files over 1.5 units are cut into stretches of equal size. A
    Hugging Face dataset has one unit for each of its data shards.

    Raises:
        ValueError: `unit_bytes` below 1, or the dataset cannot be opened.
    """
    if unit_bytes < 1:
        raise ValueError(f"unit size: {unit_bytes} bytes given; at least 1 is needed. 256mb suits most corpora")
    units: list[tuple[Part, ...]] = []
    open_unit: list[Part] = []
    held = 0
    if not source.files and source.location != STDLIB:
        from ettin_foundry.corpus.hub_datasets import count_hub_shards

        number = count_hub_shards(source)
        return [(Part(HUB, shard, number),) for shard in range(number)]
    for file in source.files:
        stretches = _stretches(file, unit_bytes) if source.location != STDLIB else [Part(file.name)]
        if open_unit and (len(stretches) > 1 or held + file.size > unit_bytes):
            units.append(tuple(open_unit))
            open_unit, held = [], 0
        if len(stretches) > 1:
            units += [(stretch,) for stretch in stretches]
        else:
            open_unit.append(stretches[0])
            held += file.size
    if source.location == STDLIB:
        open_unit.append(Part(DOCSTRINGS))
    return [*units, tuple(open_unit)] if open_unit else units


def part_bytes(source: Source, part: Part) -> int:
    """Bytes on disk to read for a part; 0 where unknown. Over the parts of a plan they sum to `source.num_bytes`."""
    size = source.sizes.get(part.file, 0)
    return max(0, (size if part.end is None else min(part.end, size)) - part.begin) if size else 0


def file_kind(name: str) -> str | None:
    """The suffix that says how to read a file, `.gz` and `.zst` taken off; None where none does."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _stretches(file: SourceFile, unit_bytes: int) -> list[Part]:
    if file.size <= _SPLIT_FROM * unit_bytes or not file.name.lower().endswith(_SPLITTABLE):
        return [Part(file.name)]
    number = -(-file.size // unit_bytes)
    cuts = [file.size * index // number for index in range(number + 1)]
    return [Part(file.name, begin, end) for begin, end in zip(cuts, cuts[1:])]


def _readable() -> str:
    return ", ".join(SUFFIXES) + " (plain, .gz or .zst)"


def _stem(name: str) -> str:
    for suffix in (*COMPRESSIONS, *SUFFIXES):
        name = name[:-len(suffix)] if name.lower().endswith(suffix) else name
    return name


def _speakable(name: str, folder: str) -> str:
    """The file's name, which becomes part of document ids.

    Raises:
        ValueError: it is no valid Unicode.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{folder}: file name {os.fsencode(name)!r} is not UTF-8; names become document ids, which must be "
                         "valid text. Rename the file") from None
    return check_name(name)


def _files_of(storage: Storage, found: list[tuple[str, int]]) -> tuple[SourceFile, ...]:
    """The readable ones of the files below a folder or URL, sorted by name; others are reported."""
    files = [SourceFile(_speakable(name, storage.url), size) for name, size in found if file_kind(name)]
    if not files:
        raise ValueError(f"{storage.url}: the folder holds {len(found)} files, none of them readable; {_readable()} are "
                         "read. Put the corpus there, or name its folder")
    if len(files) < len(found):
        other = next(name for name, _ in found if not file_kind(name))
        log.warning("%s: %d of %d files are not read, the first is %s; %s are", storage.url, len(found) - len(files),
                    len(found), other, _readable())
    return tuple(files)


def _find_url(name: str | None, location: str, licence: str | None) -> Source:
    """A file where there is one of that name, else a folder."""
    folder, _, last = location.rstrip("/").rpartition("/")
    if file_kind(last) and not location.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            file = SourceFile(_speakable(last, folder), open_storage(folder).size(last))
            return Source(name or _stem(last), location, (file,), folder, licence)
    storage = open_storage(location)
    if not (found := storage.list()):
        raise FileNotFoundError(f"{location}: nothing is there; a file ({_readable()}) or a folder of them is needed. "
                                "Correct the URL")
    return Source(name or last, location, _files_of(storage, found), storage.url, licence)


def _find_hub(name: str | None, location: str, licence: str | None) -> Source:
    from huggingface_hub import HfApi

    repo = location.partition(":")[0]
    try:
        info = HfApi().dataset_info(repo)
    except Exception as error:  # offline, not found, gated, rate limited: the client has a class for each
        reason = str(error).strip().partition("\n")[0][:200]
        raise FileNotFoundError(f"{location}: no such file or folder, and the Hugging Face dataset {repo} cannot be "
                                f"reached ({type(error).__name__}: {reason}). Correct the name, connect to the "
                                "network, or download the dataset and name its folder") from error
    card = info.card_data or {}
    return Source(name or repo.replace("/", "--"), location, licence=licence or _as_text(card.get("license")),
                  revision=info.sha)


def _as_text(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else None if value is None else str(value)
