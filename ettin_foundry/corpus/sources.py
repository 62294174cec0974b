"""Where text comes from, and in which parts it is read: files, folders, URLs, Hugging Face datasets, stdlib.

A source is resolved once into a sorted listing with sizes. The parts follow from it alone, the same on every machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.data.storage import check_name, is_url, join, open_storage

log = logging.getLogger(__name__)

_FILE = re.compile(r"(?s)(.+?)(?i:(\.jsonl|\.json|\.txt|\.parquet\Z)(\.gz|\.zst)?)\Z")
STDLIB = "python-stdlib"  # the running Python's standard library: real English and code on every machine
_READABLE = ".jsonl, .json, .txt (plain, .gz or .zst), .parquet"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.DOTALL)
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Part(NamedTuple):
    """What is read in one go: a file, or the records that begin in the bytes [begin, end) of one."""

    file: str
    begin: int = 0
    end: int | None = None  # None: to the end of the file
    size: int = 0  # in a plan: bytes on disk of the file when it was made; 0 where it is no file


@dataclass
class Meter:
    """How far the reading is, in bytes on disk: moved by the readers, read from any thread."""

    finished_bytes: int = 0
    current_bytes: int = 0
    oversized: int = 0  # documents left out: larger than `ReadOptions.max_document_bytes`
    unreadable: int = 0  # records left out: no JSON, not UTF-8, without text

    def position(self) -> int:
        return self.finished_bytes + self.current_bytes


@dataclass(frozen=True)
class Source:
    """One resolved corpus. `files` is empty for a Hugging Face dataset."""

    name: str
    location: str  # as the user wrote it, without the name
    files: Mapping[str, int] = field(default_factory=dict)  # name, relative to `root`, in sorted order -> bytes on disk
    root: str = ""  # a folder or URL; no path of a machine gets into a dataset
    licence: str | None = None
    revision: str | None = None


def find_source(text: str, *, licence: str | None = None) -> Source:
    """Resolves a SOURCE argument: `[NAME=]` file, folder, URL, `owner/name[:config]` on the hub, or stdlib.

    Raises FileNotFoundError where nothing is there or the dataset cannot be reached, ValueError for what is not read.
    """
    if not text:
        raise ValueError("source must be a file, folder, URL or dataset id, got an empty name")
    named = _NAMED.fullmatch(text) if not Path(text).exists() else None
    name, location = named.groups() if named else (None, text)
    path = Path(location.removeprefix("file://"))
    if location == STDLIB:
        return _find_stdlib(name or STDLIB)
    if is_url(location):
        default, root, found = _list_url(location)
    elif path.is_dir():
        default, root, found = path.resolve().name, str(path), open_storage(path).list()
    elif path.is_file():
        default, root, found = _FILE.sub(r"\1", path.name), str(path.parent), [(path.name, path.stat().st_size)]
    elif path.exists():
        raise ValueError(f"{path} must be a file or folder, got a pipe or device; write it to a file")
    elif _HUB_ID.fullmatch(location) and file_kind(location) is None:
        return _find_hub(name, location, licence)
    else:
        raise FileNotFoundError(f"{location}: no such file or folder; give a file ({_READABLE}), a folder of them, a "
                                f"URL (s3://...), a Hugging Face dataset id (owner/name) or {STDLIB}")
    return Source(name or default, location, _readable_files(root, found), root, licence)


def plan_parts(source: Source, unit_bytes: int) -> list[tuple[Part, ...]]:
    """Cuts a source into units of about `unit_bytes` on disk, in the order of its documents.

    Small neighbours share a unit. Plain .jsonl and .parquet files over 1.5 units are cut into ranges of equal size.
    A Hugging Face dataset has one unit for each of its data shards.
    """
    if not source.files:
        _, number = open_hub_dataset(source)
        return [(Part("hub", shard, number),) for shard in range(number)]  # no bytes: shard, and number of shards
    units: list[tuple[Part, ...]] = []
    open_unit, held = list[Part](), 0
    for name, size in source.files.items():
        is_cut = name.lower().endswith((".jsonl", ".parquet")) and size > 1.5 * unit_bytes
        number = -(-size // unit_bytes) if is_cut else 1
        if open_unit and (number > 1 or held + size > unit_bytes):
            units.append(tuple(open_unit))
            open_unit, held = [], 0
        if number > 1:
            cuts = [size * index // number for index in range(number + 1)]
            units += [(Part(name, *cut),) for cut in zip(cuts, cuts[1:])]
        else:
            open_unit.append(Part(name))
            held += size
    return [*units, tuple(open_unit)] if open_unit else units


def part_bytes(source: Source, part: Part) -> int:
    """Bytes on disk to read for a part; 0 where unknown. Over all parts they sum to those of the source's files."""
    size = source.files.get(part.file, 0)
    return max(0, (size if part.end is None else min(part.end, size)) - part.begin)


def file_kind(name: str) -> str | None:
    """The suffix that says how to read a file, `.gz` and `.zst` taken off; None where none does."""
    match = _FILE.match(name.rpartition("/")[2])
    return match[2].lower() if match else None


def open_hub_dataset(source: Source) -> tuple[Any, int]:
    """The records of a dataset's train split, streamed at the source's revision; how many shards it has."""
    from datasets import load_dataset

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    repo, _, config = source.location.partition(":")
    records = load_dataset(repo, config or None, split="train", streaming=True, revision=source.revision)
    return records, max(1, int(getattr(records, "n_shards", 1)))


def _find_stdlib(name: str) -> Source:
    """The .py files of the standard library without its test suites."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    files = {name: paths[name].stat().st_size for name in sorted(paths) if not _SKIPPED_FOLDERS & {*name.split("/")}}
    return Source(name, STDLIB, files, str(root), "PSF-2.0", platform.python_version())


def _readable_files(root: str, found: list[tuple[str, int]]) -> dict[str, int]:
    """Name -> size of the files to read; the others are logged."""
    files = {check_name(name): size for name, size in found if file_kind(name)}
    others = [name for name, _ in found if name not in files]
    if tables := [name for name in others if name.lower().endswith((".arrow", ".feather"))]:  # as save_to_disk leaves
        table = join(root, tables[0])
        raise ValueError(f"{table} must be a Parquet file, got an Arrow one; write it anew: datasets.load_from_disk"
                         f"({os.path.dirname(table)!r}).to_parquet('texts.parquet')")
    if not files:
        raise ValueError(f"{root} must hold files named {_READABLE}, got {', '.join(others[:3]) or 'none'}")
    if odd := [name for name in files if re.search("[\ud800-\udfff]", name)]:  # names become parts of document ids
        raise ValueError(f"{root}: names must be UTF-8, got {os.fsencode(odd[0])!r}; rename it")
    if others:
        log.warning("%s: %d of %d files are not read, the first is %s", root, len(others), len(found), others[0])
    places = dict[str, str]()
    for name in list(files):  # `gzip -k` and `zstd` leave the original beside the packed file
        place = re.sub(r"\.(gz|zst)$", "", name if is_url(root) else os.path.realpath(Path(root, name)), flags=re.I)
        if (first := places.setdefault(place, name)) != name:
            log.warning("%s: %s is not read, as it is the text of %s; rename it if it is not", root, name, first)
            del files[name]
    for name in [name for name, size in files.items() if size < 1024][:20]:
        open_storage(root).open(name).close()  # refuses, before anything is planned, what git-lfs left for a file
    return files


def _list_url(location: str) -> tuple[str, str, list[tuple[str, int]]]:
    """(default name, root, files with sizes): of one file where there is one of that name, else of a folder."""
    folder, _, last = location.rstrip("/").rpartition("/")
    if file_kind(last) and not location.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            return _FILE.sub(r"\1", last), folder, [(last, open_storage(folder).size(last))]
    storage = open_storage(location)
    if not (found := storage.list()):
        raise FileNotFoundError(f"{location}: nothing is there; give a file or folder of {_READABLE}")
    return last, storage.url, found


def _find_hub(name: str | None, location: str, licence: str | None) -> Source:
    from huggingface_hub import HfApi

    repo = location.partition(":")[0]
    try:
        info = HfApi().dataset_info(repo)
    except Exception as error:  # offline, not found, gated, rate limited: the client has a class for each
        raise FileNotFoundError(f"{location}: no such file or folder, and the Hugging Face dataset {repo} cannot be "
                                f"reached ({type(error).__name__}: {error!s:.200})") from error
    found = (info.card_data or {}).get("license")
    licence = licence or (", ".join(map(str, found)) if isinstance(found, list) else found and str(found))
    return Source(name or repo.replace("/", "--"), location, licence=licence, revision=info.sha)
