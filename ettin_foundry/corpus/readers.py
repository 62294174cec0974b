"""Reads the parts of a source as documents, in a fixed order: .jsonl, .json, .txt, .parquet, plain or compressed.

Two runs over the same corpus give the same documents, however it is cut into parts. Memory stays bounded, whatever the
size of a file, a document or their number (documents.py says how long texts are handed on). What is wrong with an input
is said with its file and place, since a corpus of a million records is not searched by hand.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ettin_foundry.corpus import documents
from ettin_foundry.corpus.documents import Document, LongDocument, Spool
from ettin_foundry.corpus.json_array import json_records
from ettin_foundry.corpus.jsonl import read_jsonl
from ettin_foundry.corpus.sources import (
    COMPRESSIONS,
    DOCSTRINGS,
    HUB,
    Meter,
    Part,
    Source,
    file_kind,
    part_bytes,
    plan_parts,
)
from ettin_foundry.corpus.stdlib_text import STDLIB, read_docstrings, read_module
from ettin_foundry.data.storage import Storage

__all__ = ["Document", "LongDocument", "read_parts", "read_source"]

_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


class _File(NamedTuple):
    """A part of a file being read."""

    part: Part
    shown: str
    """The file in messages."""
    path: Path | None
    """The file itself, where it is local and not compressed."""
    raw: BinaryIO
    meter: Meter
    text_field: str
    id_field: str | None

    def tick(self) -> None:
        """Moves the meter to where the file is being read."""
        self.reached(self.raw.tell())

    def reached(self, byte: int) -> None:
        self.meter.current_bytes = max(0, byte - self.part.begin)


def read_source(source: Source, meter: Meter, *, text_field: str = "text",
                id_field: str | None = None) -> Iterator[Document | LongDocument]:
    """All documents of a source: `read_parts` over the whole of it."""
    parts = [part for unit in plan_parts(source, 1 << 62) for part in unit]
    yield from read_parts(source, parts, meter, text_field=text_field, id_field=id_field)


def read_parts(source: Source, parts: Sequence[Part], meter: Meter, *, text_field: str = "text",
               id_field: str | None = None) -> Iterator[Document | LongDocument]:
    """Streams the documents of some parts of a source, in order.

    Args:
        source: from `find_source`.
        parts: from `plan_parts`.
        meter: told how far the reading is.
        text_field: the key or column that holds the text.
        id_field: the key or column that holds a document's id. None takes `id` where a record has one, else the place
            of the record: `file:byte` for .jsonl, `file:record` for .json and .parquet, `file` for .txt.

    Raises:
        ValueError: unreadable archive, invalid UTF-8, a record without text, a file that changed since it was listed; with
            file, record, and what to do. OSError: storage that does not answer.
    """
    storage = source.storage() if source.files else None
    for part in parts:
        meter.where = part.file
        if source.location == STDLIB:
            yield from _read_stdlib(source, part)
        elif storage is None:
            yield from _read_hub(source, part, text_field, id_field)
        else:
            yield from _read_file(source, storage, part, meter, text_field, id_field)
        meter.finish(part_bytes(source, part))


def _read_stdlib(source: Source, part: Part) -> Iterator[Document | LongDocument]:
    if part.file == DOCSTRINGS:
        yield from (Document(text, identity) for text, identity in read_docstrings())
    elif (text := read_module(Path(source.root, part.file))) is not None:
        yield documents.text_document(text, part.file)


def _read_hub(source: Source, part: Part, text_field: str, id_field: str | None) -> Iterator[Document | LongDocument]:
    from ettin_foundry.corpus.hub_datasets import read_hub_shard

    if part.file != HUB or part.end is None:
        raise ValueError(f"{source.location}: {part} is no part of a Hugging Face dataset; one of its data shards is "
                         "needed. Begin again in another folder")
    for number, record in enumerate(read_hub_shard(source, part.begin, part.end), 1):
        where = f"{source.location} shard {part.begin} record {number}"
        yield documents.make_document(record, where, f"{part.begin}:{number}", text_field=text_field, id_field=id_field)


def _read_file(source: Source, storage: Storage, part: Part, meter: Meter, text_field: str,
               id_field: str | None) -> Iterator[Document | LongDocument]:
    shown = storage.where(part.file)
    kind = file_kind(part.file)
    path = None if part.file.lower().endswith(COMPRESSIONS) else storage.local_path(part.file)
    with storage.open(part.file) as raw:
        size = raw.seek(0, io.SEEK_END)
        if size != source.sizes.get(part.file):
            raise ValueError(f"{shown}: {size} bytes; {source.sizes.get(part.file)} were listed: it changed since. Let the "
                             "corpus be as it was, or begin again in another folder")
        raw.seek(max(0, part.begin - 1) if kind == ".jsonl" else 0)
        try:
            with _content(raw, part.file) as stream:
                yield from _READERS[kind or ".txt"](stream, _File(part, shown, path, raw, meter, text_field, id_field))
        except UnicodeDecodeError as error:
            raise documents.not_utf8(shown, error.reason, error.start) from None
        except (EOFError, zlib.error, OSError) as error:  # BadGzipFile and pyarrow's stream errors are OSErrors
            if isinstance(error, (FileNotFoundError, PermissionError, ConnectionError)) or \
                    getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE):
                raise  # not the file's fault
            raise _broken(shown, error) from error


def _broken(shown: str, error: Exception) -> ValueError:
    if "too much memory for decoding" in str(error):
        return ValueError(f"{shown}: it was compressed with a window of over 128 MiB (zstd --long); a smaller one is read. "
                          "Write it again: zstd -d --long=31 < FILE | zstd")
    return ValueError(f"{shown}: the file cannot be read to its end ({documents.one_line(error)}); a whole "
                      f"{''.join(Path(shown).suffixes[-2:])} file is needed. Fetch or write it again")


def _content(raw: BinaryIO, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
    """The file's content. pyarrow reads .zst: zstandard's stream reader takes a truncated file for a whole one."""
    if name.lower().endswith(".gz"):
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if name.lower().endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)  # type: ignore[return-value]
    return contextlib.nullcontext(raw)


def _read_txt(stream: BinaryIO, file: _File) -> Iterator[Document | LongDocument]:
    head = stream.read(documents.LONG_BYTES + 1)
    if len(head) <= documents.LONG_BYTES:
        yield Document(head.removeprefix(_BOM).decode(), file.part.file)
        return
    spool = Spool(file.path, 0)
    while head:
        spool.write(head)
        file.tick()
        head = stream.read(_BLOCK_BYTES)
    span = spool.span()
    if span.read(span.begin, len(_BOM)) == _BOM:
        span = span.cut(span.begin + len(_BOM), span.end)
    yield LongDocument(file.part.file, functools.partial(documents.utf8_pieces, span, file.shown))


def _read_lines(stream: BinaryIO, file: _File) -> Iterator[Document | LongDocument]:
    return read_jsonl(stream, file.part.file, shown=file.shown, path=file.path, begin=file.part.begin, end=file.part.end,
                      text_field=file.text_field, id_field=file.id_field, tick=file.tick)


def _read_json(stream: BinaryIO, file: _File) -> Iterator[Document | LongDocument]:
    for number, record in enumerate(json_records(stream, file.shown), 1):
        if not number % 256:
            file.tick()
        yield documents.make_document(record, f"{file.shown} record {number}", f"{file.part.file}:{number}",
                                      text_field=file.text_field, id_field=file.id_field)


def _read_parquet(stream: BinaryIO, file: _File) -> Iterator[Document | LongDocument]:
    from ettin_foundry.corpus.parquet import read_parquet

    with contextlib.ExitStack() as closing:
        seekable: Any = file.path or stream
        if file.part.file.lower().endswith(COMPRESSIONS):  # parquet is read from its end
            seekable = closing.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, seekable, _BLOCK_BYTES)
            seekable.seek(0)
        yield from read_parquet(seekable, file.part.file, shown=file.shown, begin=file.part.begin, end=file.part.end,
                                text_field=file.text_field, id_field=file.id_field, progress=file.reached)


_READERS = {".jsonl": _read_lines, ".json": _read_json, ".txt": _read_txt, ".parquet": _read_parquet}
