"""Reads Parquet: the row groups that begin in a stretch of the file, few records at a time, long texts not held.

A row group belongs to the stretch that its first byte is in, so that stretches can be planned without opening the file.
Arrow decodes a page of a column at once, and a value is never divided: a text of n bytes needs about 3n of memory once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ettin_foundry.corpus import documents
from ettin_foundry.corpus.documents import Document, LongDocument, Spool, make_document, one_line, utf8_pieces

__all__ = ["read_parquet"]

_BATCH_ROWS = 1024
_BATCH_BYTES = 16 << 20
_BUFFER_BYTES = 1 << 20


class _RowGroup(NamedTuple):
    number: int
    begin: int
    """Its first byte in the file."""
    compressed_bytes: int
    first_row: int
    rows: int
    batch_rows: int


def read_parquet(file: Path | BinaryIO, name: str, *, shown: str, begin: int, end: int | None, text_field: str,
                 id_field: str | None, progress: Callable[[int], None]) -> Iterator[Document | LongDocument]:
    """The documents of the row groups whose first byte is in [begin, end).

    Args:
        file: a local file, or a seekable stream.
        name: what default ids begin with; they end with the row's number in the whole file, from 1.
        shown: the file in messages.
        begin, end: bytes of the file; None: to its end.
        text_field, id_field: as for `readers.read_parts`.
        progress: told the byte that has been reached.

    Raises:
        ValueError: no Parquet, no such column, a row without text; names the row.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    key = id_field or "id"
    try:
        # from a network a column is fetched in one go: going back and forth between columns would fetch blocks repeatedly
        table = ParquetFile(file, buffer_size=_BUFFER_BYTES if isinstance(file, Path) else 0,
                            page_checksum_verification=True)
        columns = [column for column in dict.fromkeys((text_field, key)) if column in table.schema_arrow.names]
        if text_field not in columns:
            raise ValueError(f"{shown}: no column {text_field!r}; it has {', '.join(table.schema_arrow.names)}. "
                             "Name the column with --text-field")
        for group in _row_groups(table.metadata, text_field, begin, end):
            row = group.first_row
            for batch in table.iter_batches(group.batch_rows, row_groups=[group.number], columns=columns, use_threads=False):
                for text, identity in _values(batch, text_field, key, f"{shown} row", row):
                    row += 1
                    if type(text) is str and type(identity) is str:
                        yield Document(text, identity)
                    else:
                        yield _document(text, identity, f"{shown} row {row}", f"{name}:{row}", text_field, id_field)
                progress(group.begin + group.compressed_bytes * (row - group.first_row) // max(1, group.rows))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{shown}: no readable Parquet ({one_line(error)}); a whole .parquet file is needed. Fetch or "
                         "write it again") from error


def _document(text: Any, identity: Any, where: str, default_id: str, text_field: str,
              id_field: str | None) -> Document | LongDocument:
    record = {text_field: "" if isinstance(text, Spool) else text}
    if identity is not None:
        record[id_field or "id"] = identity
    document = make_document(record, where, default_id, text_field=text_field, id_field=id_field)
    if isinstance(text, Spool):
        return LongDocument(document.id, functools.partial(utf8_pieces, text.span(), where))
    return document


def _row_groups(metadata: Any, text_field: str, begin: int, end: int | None) -> Iterator[_RowGroup]:
    """The row groups whose first byte is in [begin, end)."""
    first_row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        starts = [offset for column in columns for offset in (column.dictionary_page_offset, column.data_page_offset)
                  if offset is not None and offset > 0]
        start = min(starts, default=0)
        if begin <= start and (end is None or start < end):
            sizes = [column.total_uncompressed_size for column in columns if column.path_in_schema == text_field]
            compressed = sum(column.total_compressed_size for column in columns)
            batch_rows = min(max(1, _BATCH_BYTES * group.num_rows // max(1, sum(sizes))), _BATCH_ROWS)
            yield _RowGroup(number, start, compressed, first_row, group.num_rows, batch_rows)
        first_row += group.num_rows


def _values(batch: Any, text_field: str, key: str, where: str, row: int) -> Iterator[tuple[Any, Any]]:
    """(text, id) of each row; a long text as a spool of its UTF-8. `row` is the number of rows before the batch."""
    import pyarrow

    texts = batch.column(text_field)
    ids = batch.column(key).to_pylist() if key in batch.schema.names else itertools.repeat(None)
    wide = pyarrow.types.is_large_string(texts.type)
    known = wide or pyarrow.types.is_string(texts.type)
    if not (known and texts.nbytes > documents.LONG_BYTES):
        try:
            yield from zip(texts.to_pylist(), ids)
            return
        except UnicodeDecodeError:
            pass
    offsets = np.frombuffer(texts.buffers()[1], np.int64 if wide else np.int32)[texts.offset:] if known else np.zeros(1)
    for index, identity in zip(range(len(texts)), ids):
        if known and offsets[index + 1] - offsets[index] > documents.LONG_BYTES:
            spool = Spool(None, 0)
            spool.write(memoryview(texts.buffers()[2])[offsets[index]:offsets[index + 1]])
            yield spool, identity
            continue
        try:
            yield texts[index].as_py(), identity
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} {row + index + 1}: invalid UTF-8 ({error.reason} at byte {error.start} of the text); "
                             "text must be UTF-8. Repair or remove the row") from None
