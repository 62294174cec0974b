"""Reads the parts of a source as documents, in a fixed order: .jsonl, .json, .txt, .parquet, plain or compressed.

Two runs over the same corpus give the same documents, however it is cut into parts. Memory is bounded by the largest
document: one above `ReadOptions.max_document_bytes` is left out and counted. An error names file and place.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import itertools
import json
import re
import shutil
import sys
import tempfile
import tokenize
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from ettin_foundry.corpus.sources import (
    COMPRESSIONS,
    DOCSTRINGS,
    STDLIB,
    Meter,
    Part,
    Source,
    file_kind,
    open_hub_dataset,
    part_bytes,
)
from ettin_foundry.data.storage import Storage

__all__ = ["Document", "ReadOptions", "read_module", "read_parts"]

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 16 << 20  # most of a batch
_BLANK = re.compile(r"[ \t\n\r]*")
_SKIPPED_MODULES = ("_test", "xx", "_xx", "_ctypes_test", "readline", "antigravity", "_tkinter")
"""Prefixes: test modules, and those whose import touches the terminal or needs a display library."""


class Document(NamedTuple):
    """One text and its name inside its source."""

    text: str
    id: str


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents."""

    text_field: str = "text"
    """The key or column that holds the text."""
    id_field: str | None = None
    """The key or column that holds a document's id. None takes `id` where a record has one, else the place of the
    record: `file:byte` for .jsonl, `file:record` for .json and .parquet, `file` for .txt."""
    max_document_bytes: int = 256 << 20
    """A text of more UTF-8 bytes, or a .jsonl line of more bytes, is left out and counted in `Meter.oversized`."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ReadOptions:
        """Of a plan's options, which name `max_document_bytes` only where it is not the default."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})


class _File(NamedTuple):
    """A part of a file being read."""

    source: str
    part: Part
    shown: str
    """The file in messages."""
    path: Path | None
    """The file itself, where it is local and not compressed."""
    raw: BinaryIO
    content: BinaryIO
    """`raw`, decompressed."""
    meter: Meter
    options: ReadOptions

    def tick(self, byte: int | None = None) -> None:
        """Moves the meter to a byte of the file; None: to where it is being read."""
        self.meter.current_bytes = max(0, (self.raw.tell() if byte is None else byte) - self.part.begin)


def read_parts(source: Source, parts: Sequence[Part], meter: Meter,
               options: ReadOptions = ReadOptions()) -> Iterator[Document]:  # noqa: B008
    """Streams the documents of some parts of a source, in order.

    Args:
        source: from `find_source`. parts: from `plan_parts`. meter: told how far the reading is.

    Raises:
        ValueError: unreadable archive, invalid UTF-8, a record without text, a file that changed since it was listed;
            with file, record, and what to do. OSError: storage that does not answer.
    """
    storage = source.storage() if source.files else None
    for part in parts:
        meter.where = part.file
        if part.file == DOCSTRINGS and source.location == STDLIB:
            yield from _docstrings()
        elif source.location == STDLIB:
            if (text := read_module(Path(source.root, part.file))) is not None:
                yield Document(text, part.file)
        elif storage is None:
            yield from _read_hub(source, part, meter, options)
        else:
            yield from _read_file(source, storage, part, meter, options)
        meter.finish(part_bytes(source, part))


def _read_hub(source: Source, part: Part, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    records = open_hub_dataset(source)
    found = max(1, int(getattr(records, "n_shards", 1)))
    if found != part.end:
        raise ValueError(f"{source.location} must have the {part.end} data shards that were planned, got {found}; use the "
                         "version of `datasets` that the conversion began with, or another --out")
    shard = records if found == 1 else records.shard(num_shards=found, index=part.begin)
    for number, record in enumerate(shard, 1):
        where = f"{source.location} shard {part.begin} record {number}"
        if document := _document(record, where, f"{part.begin}:{number}", meter, options):
            yield document


def _read_file(source: Source, storage: Storage, part: Part, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    shown, kind = storage.where(part.file), file_kind(part.file)
    path = None if part.file.lower().endswith(COMPRESSIONS) else storage.local_path(part.file)
    with storage.open(part.file) as raw:
        size = raw.seek(0, io.SEEK_END)
        if size != source.sizes.get(part.file):
            raise ValueError(f"{shown} must have the {source.sizes.get(part.file)} bytes that were listed, got {size}: it "
                             "changed; restore it, or begin again in another folder")
        raw.seek(max(0, part.begin - 1) if kind == ".jsonl" else 0)
        try:
            with _decompressed(raw, part.file) as content:
                yield from _READERS[str(kind)](_File(source.name, part, shown, path, raw, content, meter, options))
        except UnicodeDecodeError as error:
            raise _not_utf8(shown, error) from None
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile and pyarrow's stream errors are OSErrors
            if isinstance(error, (FileNotFoundError, PermissionError, ConnectionError)) or \
                    getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE):
                raise  # not the file's fault
            raise ValueError(f"{shown} must be a whole {''.join(Path(shown).suffixes[-2:])} file, got one that cannot be "
                             f"read to its end ({_one_line(error)}); fetch or write it again") from error


def _decompressed(raw: BinaryIO, name: str) -> contextlib.AbstractContextManager[Any]:
    if name.lower().endswith(".gz"):
        return gzip.open(raw, "rb")
    if name.lower().endswith(".zst"):
        import pyarrow  # zstandard's stream reader takes a truncated file for a whole one

        stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
        return io.BufferedReader(stream, _BLOCK_BYTES)
    return contextlib.nullcontext(raw)


def _document(record: Any, where: str, default_id: str, meter: Meter, options: ReadOptions) -> Document | None:
    """The document of a record; None for one that is too large, which is counted.

    Raises:
        ValueError: the record has no text, no id although one was asked for, or text that is not valid Unicode.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object with the key {options.text_field!r}, got a {type(record).__name__}; "
                         "repair or remove the record")
    text, key = record.get(options.text_field), options.id_field or "id"
    if not isinstance(text, str):
        found = f"{text!r:.40}" if options.text_field in record else f"the keys {', '.join(map(str, record))[:200]}"
        raise ValueError(f"{where}: its {options.text_field!r} must be a string, got {found}; name the key of the text with "
                         "--text-field, or repair the record")
    identity = record.get(key)
    if identity is None or isinstance(identity, (dict, list)):
        if options.id_field is not None:
            raise ValueError(f"{where}: its {key!r} must be a string or number, got {identity!r:.40}; leave --id-field out "
                             "to number records by their place")
        identity = default_id
    identity = str(identity)
    for name, value in ((key, identity), (options.text_field, text)):
        try:
            num_bytes = len(value.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: its {name!r} must be valid Unicode, got half of a surrogate pair at character "
                             f"{error.start}; repair or remove the record") from None
    if num_bytes > options.max_document_bytes:
        meter.oversized += 1
        return None
    return Document(text, identity)


def _read_txt(file: _File) -> Iterator[Document]:
    data = bytearray()
    while block := file.content.read(_BLOCK_BYTES):
        data += block
        file.tick()
        if len(data) > file.options.max_document_bytes:
            file.meter.oversized += 1
            return
    yield Document(data.removeprefix(_BOM).decode(), file.part.file)


def _read_jsonl(file: _File) -> Iterator[Document]:
    """The documents of the lines whose first byte is in the part; default ids end with the line's byte offset."""
    part, options = file.part, file.options
    text_field, key, limit = options.text_field, options.id_field or "id", options.max_document_bytes
    number = 0  # of the line, known only where reading begins with the file
    for offset, lines in _line_groups(file.content, part.begin, part.end, limit):
        file.tick()
        for line in lines:
            number += 1
            try:
                record = orjson.loads(line)
                text, identity = record.get(text_field), record.get(key)
            except (ValueError, AttributeError):
                text = identity = None
            if len(line) > limit:
                file.meter.oversized += 1
            elif type(text) is str and type(identity) is str:
                yield Document(text, identity)
            elif type(text) is str and identity is None and options.id_field is None:
                yield Document(text, f"{part.file}:{offset}")
            elif type(text) is str and type(identity) is int:
                yield Document(text, str(identity))
            elif line.strip():
                where = f"{file.shown} byte {offset}" if part.begin else f"{file.shown} line {number} (byte {offset})"
                if document := _document(_parse(line, where), where, f"{part.file}:{offset}", file.meter, options):
                    yield document
            offset += len(line) + 1


def _line_groups(stream: BinaryIO, begin: int, end: int | None, limit: int) -> Iterator[tuple[int, list[bytes]]]:
    """(byte offset, lines) of the lines that begin in the bytes [begin, end), without their ends.

    Where `begin` is not 0 the stream stands one byte before it. A line of more than `limit` bytes is cut off behind
    `limit` bytes; it is the last of its group.
    """
    position = begin - 1 + _skip_line(stream, sys.maxsize if end is None else end - begin + 1) if begin else 0
    while end is None or position < end:
        block = stream.read(_BLOCK_BYTES if end is None else min(_BLOCK_BYTES, end - position))
        if not block:
            return
        skipped = 0
        if not block.endswith(b"\n"):
            block += stream.readline(limit + 1)
            skipped = 0 if block.endswith(b"\n") else _skip_line(stream, sys.maxsize)
        if position == 0 and block.startswith(_BOM):
            position, block = len(_BOM), block[len(_BOM):]
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield position, lines
        position += len(block) + skipped


def _skip_line(stream: BinaryIO, most: int) -> int:
    """Reads to the end of the line, at most `most` bytes; how many they were."""
    skipped = 0
    while skipped < most and (piece := stream.readline(min(_BLOCK_BYTES, most - skipped))):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _parse(line: bytes, where: str) -> Any:
    """A line of JSON that orjson does not read as it should: NaN, 1e400, integers of over 64 bits, or no JSON at all."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be one JSON object, got no JSON ({error}); repair or remove the line") from None


def _read_json(file: _File) -> Iterator[Document]:
    for number, record in enumerate(_json_values(file), 1):
        where = f"{file.shown} record {number}"
        if document := _document(record, where, f"{file.part.file}:{number}", file.meter, file.options):
            yield document


def _json_values(file: _File) -> Iterator[Any]:
    """The elements of a list, or a single value; only the one being read is held.

    Raises:
        ValueError: no JSON, or a value that does not end within four times `max_document_bytes`.
    """
    stream = io.TextIOWrapper(file.content, "utf-8-sig", newline="")
    scan = json.JSONDecoder().raw_decode
    window, position, ended, number = "", 0, False, 0

    def error(found: str) -> ValueError:
        return ValueError(f"{file.shown} must be one JSON object or a list of them, got no JSON (record {number}: {found}); "
                          "lines of objects belong in a .jsonl file")

    def more(characters: int) -> None:
        nonlocal window, position, ended
        file.tick()
        text = stream.read(characters)
        window, position, ended = window[position:] + text, 0, not text

    def peek() -> str:
        """The next character that is not blank; none at the end."""
        nonlocal position
        while (position := _BLANK.match(window, position).end()) == len(window) and not ended:  # type: ignore[union-attr]
            more(_BLOCK_BYTES)
        return window[position:position + 1]

    def value() -> Any:
        nonlocal position, number
        peek()
        number += 1
        while True:
            try:
                found, end = scan(window, position)
                if ended or end < len(window):  # a number may go on
                    position = end
                    return found
            except (ValueError, RecursionError) as reason:
                # near the end of the window an error may be due to the end
                cut_off = isinstance(reason, json.JSONDecodeError) and \
                    (reason.msg.startswith("Unterminated string") or reason.pos > len(window) - 32)
                if ended or not cut_off:
                    raise error(str(reason)) from None
            if len(window) - position > 4 * file.options.max_document_bytes:
                raise error("it does not end within four times --max-document-bytes")
            more(max(_BLOCK_BYTES, len(window) - position))

    if peek() != "[":
        yield value()
    else:
        position += 1
        while peek() != "]":
            yield value()
            if peek() == ",":
                position += 1
                if peek() == "]":
                    raise error("a comma before the end of the list")
            elif peek() != "]":
                raise error("no comma after a record")
        position += 1
    if peek():
        raise error("more after the end")


def _read_parquet(file: _File) -> Iterator[Document]:
    """The documents of the row groups whose first byte is in the part; default ids end with the row in the file, from 1."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    options = file.options
    key = options.id_field or "id"
    with contextlib.ExitStack() as closing:
        seekable: Any = file.path or file.content
        if file.part.file.lower().endswith(COMPRESSIONS):  # Parquet is read from its end
            seekable = closing.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file.content, seekable, _BLOCK_BYTES)
            seekable.seek(0)
        try:
            # from a network a column is fetched in one go: going back and forth would fetch blocks repeatedly
            table = ParquetFile(seekable, buffer_size=_BLOCK_BYTES if file.path else 0, page_checksum_verification=True)
            names = table.schema_arrow.names
            if options.text_field not in names:
                raise ValueError(f"{file.shown} must have a column {options.text_field!r}, got {', '.join(names)}; name the "
                                 "column with --text-field")
            columns = [name for name in dict.fromkeys((options.text_field, key)) if name in names]
            for number, begin, num_bytes, row, batch_rows in _row_groups(table.metadata, file):
                for batch in table.iter_batches(batch_rows, row_groups=[number], columns=columns, use_threads=False):
                    ids = batch.column(key).to_pylist() if key in columns else itertools.repeat(None)
                    for text, identity in zip(_column_texts(batch.column(options.text_field), file, row), ids):
                        row += 1
                        if type(text) is str and type(identity) is str and 4 * len(text) <= options.max_document_bytes:
                            yield Document(text, identity)
                            continue
                        record = {key: identity, options.text_field: text}
                        if document := _document(record, f"{file.shown} row {row}", f"{file.part.file}:{row}", file.meter,
                                                 options):
                            yield document
                file.tick(begin + num_bytes)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file.shown} must be a whole .parquet file, got one that cannot be read "
                             f"({_one_line(error)}); fetch or write it again") from error


def _row_groups(metadata: Any, file: _File) -> Iterator[tuple[int, int, int, int, int]]:
    """(number, first byte, compressed bytes, rows before it, rows of a batch) of the part's row groups."""
    begin, end = file.part.begin, file.part.end
    first_row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        offsets = [offset for column in columns for offset in (column.dictionary_page_offset, column.data_page_offset)]
        start = min((offset for offset in offsets if offset), default=0)
        if begin <= start and (end is None or start < end):
            text_bytes = sum(column.total_uncompressed_size for column in columns
                             if column.path_in_schema == file.options.text_field)
            batch_rows = min(max(1, _PARQUET_BYTES * group.num_rows // max(1, text_bytes)), _PARQUET_ROWS)
            yield number, start, sum(column.total_compressed_size for column in columns), first_row, batch_rows
        first_row += group.num_rows


def _column_texts(column: Any, file: _File, row: int) -> list[Any]:
    """The values of a column; `row` is the number of rows before it."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for number, value in enumerate(column, row + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{file.shown} row {number}", error) from None
        raise


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".parquet": _read_parquet}


def read_module(path: Path) -> str | None:
    """The text of a .py file of the standard library; None for one that does not decode."""
    try:
        with tokenize.open(path) as stream:  # honours a file's coding line
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):  # deliberately odd encodings, as in lib2to3's data
        return None


def _docstrings() -> Iterator[Document]:
    """The docstrings of modules without a .py file.

    Those of .py files are not repeated as documents: a text must not be on both sides of the validation split.
    """
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(_SKIPPED_MODULES):
            continue
        try:
            spec = importlib.util.find_spec(name)
            extension = bool(spec and spec.origin and spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)))
            if name not in sys.builtin_module_names and not extension:
                continue
            with warnings.catch_warnings():  # some modules announce their removal when imported
                warnings.simplefilter("ignore")
                module = importlib.import_module(name)
        except (ImportError, ValueError):  # built without its C library
            continue
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for attribute, value in sorted(vars(module).items()):
            if inspect.isroutine(value) or inspect.isclass(value):
                parts.append(_described(f"{name}.{attribute}", value))
                if inspect.isclass(value) and value.__module__ == name:
                    parts += [_described(f"{name}.{attribute}.{key}", member)
                              for key, member in sorted(vars(value).items()) if not key.startswith("_")]
        yield Document("\n\n".join(part for part in parts if part).strip() + "\n", f"docstrings/{name}")


def _described(name: str, value: Any) -> str:
    doc = value.__doc__ if isinstance(getattr(value, "__doc__", None), str) else ""
    return f"{name}{getattr(value, '__text_signature__', None) or ''}\n\n{inspect.cleandoc(doc)}" if doc else ""


def _one_line(error: BaseException) -> str:
    """What an error says, without line ends and control characters: some libraries quote the broken file."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where} must be UTF-8, got other bytes ({error.reason} at byte {error.start} of what was decoded); "
                      "convert the file, e.g. with `iconv -f LATIN1 -t UTF-8`")
