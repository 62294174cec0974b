"""Reads the parts of a source as documents, in a fixed order: .jsonl, .json, .txt, .parquet, plain, .gz or .zst.

Two runs over the same corpus give the same documents, however it is cut into parts. Memory is bounded by the largest
document: one above `ReadOptions.max_document_bytes` is left out and counted; a .json file is read whole, up to that size.
An error names file and place.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson

from ettin_foundry.corpus import sources
from ettin_foundry.corpus.sources import STDLIB, Meter, Part, Source
from ettin_foundry.data.storage import Storage, open_storage

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 16 << 20  # most of a batch


class Document(NamedTuple):
    text: str
    id: str  # its name inside its source


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents."""

    text_field: str = "text"  # the key or column that holds the text
    id_field: str | None = None
    """The key or column of the id. None takes `id` where a record has one, else the place of the record: `file:byte` for
    .jsonl, `file:record` for .json and .parquet, `file` for .txt."""
    max_document_bytes: int = 256 << 20
    """A larger text (UTF-8) or .jsonl line is left out and counted in `Meter.oversized`."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> ReadOptions:
        """Of a plan's options, which name `max_document_bytes` only where it is not the default."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})


class _File(NamedTuple):
    """A part of a file being read."""

    part: Part
    shown: str  # the file in messages
    path: Path | None  # the file itself, where it is local and not compressed
    raw: BinaryIO
    content: BinaryIO  # `raw`, decompressed
    meter: Meter
    options: ReadOptions

    def tick(self, byte: int | None = None) -> None:
        """Moves the meter to a byte of the file; None: to where it is being read."""
        self.meter.current_bytes = max(0, (self.raw.tell() if byte is None else byte) - self.part.begin)


def read_parts(source: Source, parts: Sequence[Part], meter: Meter,
               options: ReadOptions = ReadOptions()) -> Iterator[Document]:  # noqa: B008
    """Streams the documents of some parts of a source, in order, and moves the meter.

    Raises ValueError, with file, record and what to do, for an unreadable archive, invalid UTF-8, a record without text,
    or a file that changed since it was listed; OSError for storage that does not answer.
    """
    storage = open_storage(source.root) if source.files else None
    for part in parts:
        if source.location == STDLIB and part.file == sources.DOCSTRINGS:
            yield from itertools.starmap(Document, sources.stdlib_docstrings())
        elif source.location == STDLIB:
            if (text := sources.read_module(Path(source.root, part.file))) is not None:
                yield Document(text, part.file)
        elif storage is None:
            yield from _read_hub(source, part, meter, options)
        else:
            yield from _read_file(source, storage, part, meter, options)
        meter.current_bytes, meter.finished_bytes = 0, meter.finished_bytes + sources.part_bytes(source, part)


def _read_hub(source: Source, part: Part, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    records, number = sources.open_hub_dataset(source)
    if number != part.end:
        raise ValueError(f"{source.location} must have the {part.end} data shards that were planned, got {number}; "
                         "convert with the version of `datasets` that planned them, or into another --out")
    shard = records if number == 1 else records.shard(num_shards=number, index=part.begin)
    for row, record in enumerate(shard, 1):
        where = f"{source.location} shard {part.begin} record {row}"
        yield from _document(record, where, f"{part.begin}:{row}", meter, options)


def _read_file(source: Source, storage: Storage, part: Part, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    name, shown = part.file.lower(), storage.where(part.file)
    with storage.open(part.file) as raw:
        size, listed = raw.seek(0, io.SEEK_END), source.files.get(part.file)
        if size != listed:
            raise ValueError(f"{shown} must have the {listed} bytes that were listed, got {size}; restore it")
        raw.seek(max(0, part.begin - 1) if name.endswith(".jsonl") else 0)
        path, content = None, raw
        try:
            if name.endswith(".gz"):
                content = cast(BinaryIO, gzip.open(raw, "rb"))
            elif name.endswith(".zst"):
                import pyarrow  # zstandard's stream reader takes a truncated file for a whole one

                content = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _BLOCK_BYTES)
            else:
                path = Path(storage.where(part.file)) if storage.is_local else None
            file = _File(part, shown, path, raw, content, meter, options)
            yield from _READERS[str(sources.file_kind(name))](file)
        except UnicodeDecodeError as error:
            raise _not_utf8(shown, error) from None
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile and pyarrow's errors are OSErrors
            if getattr(error, "errno", None) or isinstance(error, (FileNotFoundError, ConnectionError)):
                raise  # not the file's fault
            raise ValueError(f"{shown} must be a whole file, got one that cannot be read to its end ({error!r:.300}); "
                             "fetch or write it again") from error


def _document(record: Any, where: str, default_id: str, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    """The document of a record, which must have text and the id asked for; nothing where it is too large."""
    text = record.get(options.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{where} must be an object whose {options.text_field!r} is a string, got {record!r:.200}; name "
                         "the key of the text with --text-field, or repair the record")
    identity = record.get(options.id_field or "id")
    if identity is None or isinstance(identity, (dict, list)):
        if options.id_field is not None:
            raise ValueError(f"{where}: its {options.id_field!r} must be a string or number, got {identity!r:.40}; leave "
                             "--id-field out to number records by their place")
        identity = default_id
    identity = str(identity)
    try:
        identity.encode()
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} must be valid Unicode, got half of a surrogate pair at character {error.start}; "
                         "repair or remove the record") from None
    if num_bytes > options.max_document_bytes:
        meter.oversized += 1
    else:
        yield Document(text, identity)


def _read_whole(file: _File) -> bytes | None:
    """The file without its byte order mark; None where it has more than `max_document_bytes`."""
    data = bytearray()
    while block := file.content.read(_BLOCK_BYTES):
        data += block
        file.tick()
        if len(data) > file.options.max_document_bytes:
            return None
    return bytes(data.removeprefix(_BOM))


def _read_txt(file: _File) -> Iterator[Document]:
    if (data := _read_whole(file)) is not None:
        yield Document(data.decode(), file.part.file)
    else:
        file.meter.oversized += 1


def _read_jsonl(file: _File) -> Iterator[Document]:
    """The documents of the lines whose first byte is in the part; default ids end with that byte's offset."""
    name, begin, end = file.part
    options, limit = file.options, file.options.max_document_bytes
    text_field, key = options.text_field, options.id_field or "id"
    number = 0  # of the line, known only where reading begins with the file
    for offset, lines in _line_groups(file.content, begin, sys.maxsize if end is None else end, limit):
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
            elif type(text) is str and type(identity) in (str, int):
                yield Document(text, str(identity))
            elif type(text) is str and identity is None and options.id_field is None:
                yield Document(text, f"{name}:{offset}")
            elif line.strip():
                where = f"{file.shown} " + (f"byte {offset}" if begin else f"line {number} (byte {offset})")
                yield from _document(_parse(line, where), where, f"{name}:{offset}", file.meter, options)
            offset += len(line) + 1


def _line_groups(stream: BinaryIO, begin: int, end: int, limit: int) -> Iterator[tuple[int, list[bytes]]]:
    """(byte offset, lines) of the lines that begin in the bytes [begin, end), without their ends.

    Where `begin` is not 0 the stream stands one byte before it. A line of more than `limit` bytes is cut off behind
    them; it is the last of its group.
    """
    position = begin - 1 + _skip_line(stream, end - begin + 1) if begin else 0
    while position < end and (block := stream.read(min(_BLOCK_BYTES, end - position))):
        skipped = 0
        if not block.endswith(b"\n"):
            block += stream.readline(limit + 1)
            skipped = 0 if block.endswith(b"\n") else _skip_line(stream, sys.maxsize)
        if position == 0 and block.startswith(_BOM):
            position, block = len(_BOM), block[len(_BOM):]
        yield position, block.removesuffix(b"\n").split(b"\n")
        position += len(block) + skipped


def _skip_line(stream: BinaryIO, most: int) -> int:
    """Reads to the end of the line, at most `most` bytes; how many they were."""
    skipped = 0
    while piece := stream.readline(min(_BLOCK_BYTES, most - skipped)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _parse(data: bytes, where: str) -> Any:
    """JSON that orjson may not read rightly: NaN, 1e400, integers of over 64 bits, or no JSON at all."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be one JSON value, got no JSON ({error}); repair or remove it, or call a file with "
                         "one object a line .jsonl") from None


def _read_json(file: _File) -> Iterator[Document]:
    """The documents of a list of records, or of a single one; the file is read whole."""
    if (data := _read_whole(file)) is None:
        raise ValueError(f"{file.shown} must have at most --max-document-bytes ({file.options.max_document_bytes}), as a "
                         ".json file is read whole, got more; raise the limit, or write its records as lines of .jsonl")
    value = _parse(data, file.shown)
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        yield from _document(record, f"{file.shown} record {number}", f"{file.part.file}:{number}", file.meter, file.options)


def _read_parquet(file: _File) -> Iterator[Document]:
    """The documents of the row groups whose first byte is in the part; default ids end with the row."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    (name, begin, end), text_field = file.part, file.options.text_field
    with contextlib.ExitStack() as closing:
        seekable: Any = file.path or file.content
        if name.lower().endswith(sources.COMPRESSIONS):  # Parquet is read from its end
            seekable = closing.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file.content, seekable, _BLOCK_BYTES)
            seekable.seek(0)
        try:
            # from a network a column is fetched in one go: going back and forth would fetch blocks repeatedly
            table = ParquetFile(seekable, buffer_size=_BLOCK_BYTES if file.path else 0, page_checksum_verification=True)
            names = table.schema_arrow.names
            if text_field not in names:
                raise ValueError(f"{file.shown} must have a column {text_field!r}, got {', '.join(names)}; name the "
                                 "column with --text-field")
            columns = [name for name in names if name in (text_field, file.options.id_field or "id")]
            row = 0
            for number in range(table.num_row_groups):
                group = table.metadata.row_group(number)
                chunks = [group.column(index) for index in range(group.num_columns)]
                starts = [at for c in chunks for at in (c.dictionary_page_offset, c.data_page_offset) if at]
                start = min(starts, default=0)
                if start < begin or (end is not None and start >= end):
                    row += group.num_rows
                    continue
                text_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == text_field)
                rows = min(max(1, _PARQUET_BYTES * group.num_rows // max(1, text_bytes)), _PARQUET_ROWS)
                for batch in table.iter_batches(rows, [number], columns, use_threads=False):
                    yield from _rows(batch, row, file)
                    row += len(batch)
                file.tick(start + sum(c.total_compressed_size for c in chunks))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{file.shown} must be a whole .parquet file, got one that cannot be read ({error!r:.300}); "
                             "fetch or write it again") from error


def _rows(batch: Any, row: int, file: _File) -> Iterator[Document]:
    """The documents of a batch that `row` rows are before."""
    text_field, key, most = file.options.text_field, file.options.id_field or "id", file.options.max_document_bytes
    try:
        texts = batch.column(text_field).to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{file.shown} rows {row + 1} to {row + len(batch)}", error) from None
    ids = batch.column(key).to_pylist() if key in batch.schema.names else itertools.repeat(None)
    for number, (text, identity) in enumerate(zip(texts, ids), row + 1):
        if type(text) is str and type(identity) is str and 4 * len(text) <= most:
            yield Document(text, identity)
        else:
            yield from _document({key: identity, text_field: text}, f"{file.shown} row {number}",
                                 f"{file.part.file}:{number}", file.meter, file.options)


def _not_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{where} must be UTF-8, got other bytes ({error.reason} at byte {error.start}); "
                      "convert the file, e.g. with `iconv -f LATIN1 -t UTF-8`")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt, ".parquet": _read_parquet}
