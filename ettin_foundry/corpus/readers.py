"""Reads the parts of a source as documents, in a fixed order: .jsonl, .json, .txt, plain, .gz or .zst, and .parquet.

Two runs over the same corpus give the same documents, however it is cut into parts. JSON is one record a line.
Memory is bounded by the largest document. A record that cannot be read is left out and counted, the first named in the
log; what is wrong with a whole file (cut off, another column) is an error.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import logging
import re
import sys
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import orjson

from ettin_foundry.corpus import sources
from ettin_foundry.corpus.sources import STDLIB, Meter, Part, Source
from ettin_foundry.data.storage import Storage, open_storage

log = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS, _PARQUET_BYTES = 1024, 16 << 20  # most of a batch
_ADVICE = "convert it with `iconv -f LATIN1 -t UTF-8` or `iconv -f UTF-16 -t UTF-8`, or add .gz or .zst to a packed one"


class Document(NamedTuple):
    text: str
    id: str  # its name inside its source


@dataclass(frozen=True)
class ReadOptions:
    """How records become documents."""

    text_field: str = "text"  # the key or column that holds the text
    id_field: str | None = None
    """The key or column of the id. None takes `id` where a record has one, else the place of the record: `file:byte`
    for .jsonl and .json, `file:record` for .parquet, `file` for .txt."""
    max_document_bytes: int = 256 << 20
    """A larger text (UTF-8) or line of JSON is left out and counted in `Meter.oversized`."""
    max_bad_records: int = 1000  # more than so many unreadable records of a unit are an error


class _File(NamedTuple):
    """A part of a file being read."""

    part: Part
    shown: str  # the file in messages
    path: Path | None  # the file itself, where it is local and not compressed
    raw: BinaryIO
    content: io.BufferedReader  # `raw`, decompressed
    meter: Meter
    options: ReadOptions


def read_parts(source: Source, parts: Sequence[Part], meter: Meter,
               options: ReadOptions = ReadOptions()) -> Iterator[Document]:  # noqa: B008
    """Streams the documents of some parts of a source, in order, and moves the meter.

    Raises ValueError, with place and what to do, for an unreadable archive, a file that changed since it was listed, or
    where too many records cannot be read; OSError for storage that does not answer.
    """
    storage = open_storage(source.root) if source.files else None
    for part in parts:
        if source.location == STDLIB:
            with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # some are written not to decode
                with tokenize.open(Path(source.root, part.file)) as stream:
                    yield Document(stream.read(), part.file)
        elif storage is None:
            yield from _read_hub(source, part, meter, options)
        else:
            yield from _read_file(source, storage, part, meter, options)
        meter.current_bytes, meter.finished_bytes = 0, meter.finished_bytes + sources.part_bytes(source, part)


def _read_hub(source: Source, part: Part, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    records, number = sources.open_hub_dataset(source)
    if number != part.end:
        raise ValueError(f"{source.location} must have the {part.end} data shards that were planned, got {number}; "
                         "use the version of `datasets` that planned them, or another --out")
    shard = records if number == 1 else records.shard(num_shards=number, index=part.begin)
    for row, record in enumerate(shard, 1):
        where = f"{source.location} shard {part.begin} record {row}"
        yield from _document(record, where, f"{part.begin}:{row}", meter, options)


def _read_file(source: Source, storage: Storage, part: Part, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    shown, listed, kind = storage.where(part.file), source.files.get(part.file), sources.file_kind(part.file)
    with storage.open(part.file) as raw:
        if (size := raw.seek(0, io.SEEK_END)) != listed:
            raise ValueError(f"{shown} must have the {listed} bytes that were listed, got {size}; restore it")
        try:
            content = _decompressed(raw, part.file)
            path = Path(storage.where(part.file)) if storage.is_local and content is raw else None
            yield from _READERS[str(kind)](_File(part, shown, path, raw, content, meter, options))
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile and pyarrow's errors are OSErrors
            if getattr(error, "errno", None) or isinstance(error, (FileNotFoundError, ConnectionError)):
                raise  # not the file's fault
            raise ValueError(f"{shown} must be a whole file, got {error!r:.300}; fetch or write it again") from error


def _decompressed(raw: Any, name: str) -> io.BufferedReader:
    """The content of a file from its beginning on."""
    raw.seek(0)
    if name.lower().endswith(".gz"):
        return cast(io.BufferedReader, gzip.open(raw, "rb"))
    if name.lower().endswith(".zst") and raw.peek(1):  # a file of no bytes is no archive for pyarrow
        import pyarrow  # zstandard's stream reader takes a truncated file for a whole one

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), _BLOCK_BYTES)
    return raw


def _document(record: Any, where: str, default_id: str, meter: Meter, options: ReadOptions) -> Iterator[Document]:
    """The document of a record, or of the JSON of one; none, but a count, where it is too large or cannot be read."""
    try:
        if isinstance(record, bytes):
            record = json.loads(record.decode())  # not orjson: it reads no NaN, 1e400 or integers of over 64 bits
        text = record.get(options.text_field) if isinstance(record, dict) else None
        text = text.decode() if isinstance(text, bytes) else text
        if not isinstance(text, str):
            raise ValueError(f"{options.text_field!r} must be a string, got {record!r:.200}; see --text-field")
        identity = record.get(options.id_field or "id")
        if identity is None or isinstance(identity, (dict, list)):
            if options.id_field is not None:
                raise ValueError(f"{options.id_field!r} must be text or a number, got {identity!r:.40}; see --id-field")
            identity = default_id
        identity = identity.decode("utf-8", "backslashreplace") if isinstance(identity, bytes) else str(identity)
        identity.encode()
        num_bytes = len(text.encode())
    except (ValueError, RecursionError) as error:
        meter.unreadable, problem = meter.unreadable + 1, f"{where}: {error}"
        if isinstance(error, UnicodeDecodeError):
            problem += f"; {_ADVICE}"
        if meter.unreadable > options.max_bad_records:
            raise ValueError(f"{problem}; --max-bad-records ({options.max_bad_records}) must allow for it") from None
        if meter.unreadable == 1:  # of a wrong field there would be a thousand lines
            log.warning("unreadable, left out: %s", problem)
        return
    if num_bytes > options.max_document_bytes:
        meter.oversized += 1
    else:
        yield Document(text, identity)


def _read_txt(file: _File) -> Iterator[Document]:
    data = bytearray()
    while block := file.content.read(_BLOCK_BYTES):
        data += block
        if len(data) > file.options.max_document_bytes:
            file.meter.oversized += 1
            return
    record = {file.options.id_field or "id": file.part.file, file.options.text_field: bytes(data.removeprefix(_BOM))}
    yield from _document(record, file.shown, file.part.file, file.meter, file.options)


def _read_jsonl(file: _File) -> Iterator[Document]:
    """The documents of the lines whose first byte is in the part; default ids end with that byte's offset."""
    (name, begin, end, _), stream, options = file.part, file.content, file.options
    if not begin and re.match(rb"(\xef\xbb\xbf)?\s*(\[\s*{|[\[{]\s*\n)", stream.peek(64)):
        raise ValueError(f"{file.shown} must have one record a line, got JSON over several lines, or a list; write it "
                         "anew by `jq -c '.[]?' FILE > FILE.jsonl`, or `jq -c .` for a single record")
    text_field, key, limit = options.text_field, options.id_field or "id", options.max_document_bytes
    end, number = sys.maxsize if end is None else end, 0
    position = stream.seek(begin - 1) + _skip_line(stream, end - begin + 1) if begin else 0
    while position < end and (line := stream.readline(limit + 1)):
        offset, position, number = position, position + len(line), number + 1
        if not number % 256:
            file.meter.current_bytes = file.raw.tell() - begin
        if not line.endswith(b"\n"):
            position += _skip_line(stream, sys.maxsize)
        if not offset and line.startswith(_BOM):
            offset, line = 3, line[3:]
        try:
            record = orjson.loads(line)
            text, identity = record.get(text_field), record.get(key)
        except (ValueError, AttributeError):
            text = identity = None
        if len(line) > limit and not line.endswith(b"\n"):
            file.meter.oversized += 1
        elif type(text) is str and type(identity) in (str, int):
            yield Document(text, str(identity))
        elif type(text) is str and identity is None and options.id_field is None:
            yield Document(text, f"{name}:{offset}")
        elif line.strip():
            where = f"{file.shown} " + (f"byte {offset}" if begin else f"line {number} (byte {offset})")
            yield from _document(line, where, f"{name}:{offset}", file.meter, options)


def _skip_line(stream: BinaryIO, most: int) -> int:
    """Reads to the end of the line, at most `most` bytes; how many they were."""
    skipped = 0
    while piece := stream.readline(min(_BLOCK_BYTES, most - skipped)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _read_parquet(file: _File) -> Iterator[Document]:
    """The documents of the row groups whose first byte is in the part; default ids end with the row."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    (_, begin, end, _), text_field = file.part, file.options.text_field
    if not file.raw.seek(0, io.SEEK_END):
        return  # a part that nothing was written to
    try:
        # from a network a column is fetched in one go: going back and forth would fetch blocks repeatedly
        table = ParquetFile(file.path or file.raw, buffer_size=_BLOCK_BYTES if file.path else 0,
                            page_checksum_verification=True)
        names, row = table.schema_arrow.names, 0
        if text_field not in names and table.metadata.num_rows:
            raise ValueError(f"{file.shown} must have a column {text_field!r}, got {names}; see --text-field")
        columns = [name for name in names if name in (text_field, file.options.id_field or "id")]
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            chunks = [group.column(index) for index in range(group.num_columns)]
            start = min((at for c in chunks for at in (c.dictionary_page_offset, c.data_page_offset) if at), default=0)
            if start < begin or (end is not None and start >= end):
                row += group.num_rows
                continue
            text_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == text_field)
            rows = min(max(1, _PARQUET_BYTES * group.num_rows // max(1, text_bytes)), _PARQUET_ROWS)
            for batch in table.iter_batches(rows, [number], columns, use_threads=False):
                yield from _rows(batch, row, file)
                row += len(batch)
            file.meter.current_bytes = start - begin + sum(c.total_compressed_size for c in chunks)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.shown} must be a whole .parquet file, got {error!r:.300}; fetch it again") from error


def _rows(batch: Any, row: int, file: _File) -> Iterator[Document]:
    """The documents of a batch that `row` rows are before."""
    text_field, key, most = file.options.text_field, file.options.id_field or "id", file.options.max_document_bytes
    column = batch.column(text_field)
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:  # some row's: as bytes they are looked at one by one
        column = getattr(column, "storage", column)
        texts = getattr(column, "dictionary_decode", lambda: column)().cast("large_binary").to_pylist()
    ids = batch.column(key).to_pylist() if key in batch.schema.names else itertools.repeat(None)
    for number, (text, identity) in enumerate(zip(texts, ids), row + 1):
        if type(text) is str and type(identity) is str and 4 * len(text) <= most:
            yield Document(text, identity)
        else:
            yield from _document({key: identity, text_field: text}, f"{file.shown} row {number}",
                                 f"{file.part.file}:{number}", file.meter, file.options)


_READERS = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".txt": _read_txt, ".parquet": _read_parquet}
