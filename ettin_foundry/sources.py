"""Where text comes from: files, folders, Hugging Face datasets and the running Python's standard library.

Every reader streams `Document`s in a fixed order, so that two runs over the same corpus write the same bytes. What is
wrong with an input is said with its file and record, since a corpus of a million records is not searched by hand.
Tokenizing, splitting and writing are convert.py's work.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from ettin_foundry.stdlib_text import STDLIB, read_stdlib, stdlib_facts

__all__ = ["Document", "Meter", "Source", "SUFFIXES", "find_source", "read_source"]

log = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
_COMPRESSIONS = (".gz", ".zst")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.DOTALL)
_PARQUET_BATCH = 1024  # records decoded at a time
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and its name inside its source."""

    text: str
    id: str


@dataclass
class Meter:
    """How far the reading of files is, in bytes on disk; moved by the readers, read by the progress line."""

    finished_bytes: int = 0
    current: IO[bytes] | None = None

    def position(self) -> int:
        return self.finished_bytes + (self.current.tell() if self.current and not self.current.closed else 0)


@dataclass(frozen=True)
class Source:
    """One resolved corpus. `files` is empty for a Hugging Face dataset and for the standard library."""

    name: str
    location: str
    files: tuple[Path, ...] = ()
    root: Path = field(default_factory=Path)
    """Document ids are relative to this folder, so that no machine path gets into a data set."""
    licence: str | None = None
    revision: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes on disk to read; 0 where unknown."""
        return sum(path.stat().st_size for path in self.files)


def find_source(text: str, *, licence: str | None = None) -> Source:
    """Resolves a SOURCE argument: `[NAME=]` file, folder, Hugging Face dataset id (`owner/name[:config]`) or stdlib.

    Raises:
        FileNotFoundError: nothing is there, or the dataset cannot be reached. ValueError: a suffix that is not read.
    """
    named = _NAMED.fullmatch(text) if not Path(text).exists() else None
    name, location = named.groups() if named else (None, text)
    if location == STDLIB:
        files, root, facts = stdlib_facts()
        return Source(name or STDLIB, location, files, root, **facts)
    path = Path(location)
    if path.is_dir():
        return Source(name or path.resolve().name, location, _files_of(path), path, licence)
    if path.exists():
        if _kind(path) is None:
            raise ValueError(f"{path}: suffix {''.join(path.suffixes) or '(none)'} is not read; {_readable()} are. "
                             "Rename or convert the file")
        return Source(name or _stem(path), location, (path,), path.parent, licence)
    if _HUB_ID.fullmatch(location) and _kind(path) is None:
        return _find_hub(name, location, licence)
    raise FileNotFoundError(f"{location}: no such file or folder; a file ({_readable()}), a folder of them, a Hugging "
                            f"Face dataset id (owner/name) or {STDLIB} is allowed. Correct the path")


def read_source(source: Source, meter: Meter, *, text_field: str = "text",
                id_field: str | None = None) -> Iterator[Document]:
    """Streams a source's documents in a fixed order.

    Args:
        source: from `find_source`.
        meter: told how far the reading is.
        text_field: the key or column that holds the text.
        id_field: the key or column that holds a document's id. None takes `id` where a record has one, else the place
            of the record: `file:line`, or `file` for .txt.

    Raises:
        ValueError: unreadable archive, invalid UTF-8, a record without text; with file, record, and what to do.
    """
    if source.location == STDLIB:
        yield from (Document(text, name) for text, name in read_stdlib(source.files, source.root, meter))
    elif not source.files:
        yield from _read_hub(source, text_field, id_field)
    for path in source.files if source.location != STDLIB else ():
        yield from _read_file(path, path.relative_to(source.root).as_posix(), meter, text_field, id_field)


def _readable() -> str:
    return ", ".join(SUFFIXES) + " (plain, .gz or .zst)"


def _kind(path: Path) -> str | None:
    """The suffix that says how to read a file, `.gz` and `.zst` taken off; None where none does."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (*_COMPRESSIONS, *SUFFIXES):
        name = name[:-len(suffix)] if name.lower().endswith(suffix) else name
    return name


def _files_of(folder: Path) -> tuple[Path, ...]:
    """Every readable file below a folder, sorted by relative path; hidden ones are left out, others are reported."""
    found = sorted((path for path in folder.rglob("*") if path.is_file()
                    and not any(part.startswith(".") for part in path.relative_to(folder).parts)),
                   key=lambda path: path.relative_to(folder).as_posix())
    files = [path for path in found if _kind(path)]
    if not files:
        raise ValueError(f"{folder}: the folder holds {len(found)} files, none of them readable; {_readable()} are "
                         "read. Put the corpus there, or name its folder")
    if len(files) < len(found):
        other = next(path for path in found if not _kind(path))
        log.warning("%s: %d of %d files are not read, the first is %s; %s are", folder, len(found) - len(files),
                    len(found), other.name, _readable())
    return tuple(files)


def _read_file(path: Path, name: str, meter: Meter, text_field: str, id_field: str | None) -> Iterator[Document]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".parquet": _read_parquet}
    with open(path, "rb") as raw:
        meter.current = raw
        try:
            with _decompressed(raw, path) as stream:
                yield from readers[_kind(path) or ".txt"](stream, path, name, text_field, id_field)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: invalid UTF-8 ({error.reason} at byte {error.start}); text must be UTF-8. "
                             f"Convert the file, e.g. with `iconv -f LATIN1 -t UTF-8`") from None
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile and pyarrow's stream errors are OSErrors
            raise ValueError(f"{path}: the file cannot be read to its end ({error}); a whole "
                             f"{''.join(path.suffixes[-2:])} file is needed. Fetch or write it again") from error
        finally:
            meter.current = None
            meter.finished_bytes += path.stat().st_size


def _decompressed(raw: IO[bytes], path: Path) -> Any:
    """The file's content. pyarrow reads .zst: zstandard's stream reader takes a truncated file for a whole one."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw, "rb")
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _read_txt(stream: IO[bytes], path: Path, name: str, text_field: str, id_field: str | None) -> Iterator[Document]:
    yield Document(stream.read().removeprefix(_BOM).decode(), name)


def _read_jsonl(stream: IO[bytes], path: Path, name: str, text_field: str, id_field: str | None) -> Iterator[Document]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: invalid UTF-8 ({error.reason} at byte {error.start} of the line); text must be "
                             "UTF-8. Convert the file, e.g. with `iconv -f LATIN1 -t UTF-8`") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON ({error}); every line must be one JSON object. Repair or remove the "
                             "line") from None
        yield _document(record, where, f"{name}:{number}", text_field, id_field)


def _read_json(stream: IO[bytes], path: Path, name: str, text_field: str, id_field: str | None) -> Iterator[Document]:
    try:
        content = json.loads(stream.read().removeprefix(_BOM).decode())
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); one object or a list of objects is needed. Lines of objects "
                         "belong in a .jsonl file") from None
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        yield _document(record, f"{path} record {number}", f"{name}:{number}", text_field, id_field)


def _read_parquet(stream: IO[bytes], path: Path, name: str, text_field: str,
                  id_field: str | None) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as unpacked:  # parquet is read from its end: it needs a seekable file
        if path.suffix.lower() in _COMPRESSIONS:
            while block := stream.read(1 << 20):
                unpacked.write(block)
            unpacked.seek(0)
            stream = unpacked
        try:
            table = parquet.ParquetFile(stream)
            columns = [column for column in dict.fromkeys((text_field, id_field or "id"))
                       if column in table.schema_arrow.names]
            if text_field not in columns:
                raise ValueError(f"{path}: no column {text_field!r}; it has {', '.join(table.schema_arrow.names)}. "
                                 "Name the column with --text-field")
            number = 0
            for batch in table.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, f"{path} row {number}", f"{name}:{number}", text_field, id_field)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: no readable Parquet ({error}); a whole .parquet file is needed. Fetch or write "
                             "it again") from error


def _document(record: Any, where: str, default_id: str, text_field: str, id_field: str | None) -> Document:
    """A record's text and id.

    Raises:
        ValueError: the record has no text, no id although one was asked for, or text that is no valid Unicode.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a {type(record).__name__}; an object with the key {text_field!r} is needed. Repair "
                         "or remove the record")
    text = record.get(text_field)
    if not isinstance(text, str):
        found = f"its {text_field!r} is {text!r:.40}" if text_field in record else \
            f"no key {text_field!r}, its keys are {', '.join(map(str, record))[:200]}"
        raise ValueError(f"{where}: a record without text: {found}; a string is needed. Name the key with "
                         "--text-field, or repair the record")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half of a surrogate pair at character {error.start}; text must be valid Unicode. "
                         "Repair or remove the record") from None
    identity = record.get(id_field or "id")
    if id_field is not None and (identity is None or isinstance(identity, (dict, list))):
        raise ValueError(f"{where}: its {id_field!r} is {identity!r:.40}; a string or number is needed, --id-field "
                         "names it. Leave the option out to number records by their place")
    return Document(text, default_id if identity is None or isinstance(identity, (dict, list)) else str(identity))


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


def _read_hub(source: Source, text_field: str, id_field: str | None) -> Iterator[Document]:
    from datasets import load_dataset

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    repo, _, config = source.location.partition(":")
    try:
        records = load_dataset(repo, config or None, split="train", streaming=True, revision=source.revision)
    except Exception as error:
        raise ValueError(f"{source.location}: the dataset cannot be opened ({type(error).__name__}: "
                         f"{str(error)[:300]}); one with a train split and no code of its own is needed. Name a "
                         "configuration as owner/name:config, or download the files") from error
    for number, record in enumerate(records, 1):
        yield _document(record, f"{source.location} record {number}", f"{number}", text_field, id_field)
