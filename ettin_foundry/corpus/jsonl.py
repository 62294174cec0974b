"""Reads lines of JSON: whole files or the lines that begin in a stretch of one; tiny records fast, enormous ones unheld.

Lines are taken from blocks of a megabyte, so that a record of 20 bytes costs about a microsecond. A line of more than
16 MiB stays on disk: its long strings are found by their quotes alone, the little that is left of it is parsed as JSON,
and its text is handed on as a LongDocument. Everything about a record follows from its bytes and its place, never from
how the file was cut.
"""

from __future__ import annotations

import functools
import shlex
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from ettin_foundry.corpus import documents
from ettin_foundry.corpus.documents import BadText, Document, LongDocument, Span, Spool

__all__ = ["read_jsonl"]

_BLOCK_BYTES = 1 << 20
_STRING_BYTES = 1 << 20  # in a long line, longer strings are not held
_REST_BYTES = 64 << 20  # what such a line may hold besides them: parsed, it takes many times its size
_BOM = b"\xef\xbb\xbf"


class _Lines(NamedTuple):
    """Whole lines that follow each other, or one long line."""

    offset: int
    """Of the first line's first byte, in the decompressed file."""
    lines: list[bytes]
    long: Span | None = None


class _Place(NamedTuple):
    """What messages call a line."""

    shown: str
    """The file."""
    command: str
    """Prints the file's content."""

    def line(self, number: int | None, offset: int) -> str:
        """`number` counts from 1; None where it is not known, as in the middle of a file."""
        return f"{self.shown} byte {offset}" if number is None else f"{self.shown} line {number} (byte {offset})"

    def look(self, offset: int) -> str:
        return f"Repair or remove it; look at it with `{self.command} | tail -c +{offset + 1} | head -n 1 | head -c 500`"


def read_jsonl(stream: BinaryIO, name: str, *, shown: str, path: Path | None, begin: int, end: int | None, text_field: str,
               id_field: str | None, tick: Callable[[], None]) -> Iterator[Document | LongDocument]:
    """The documents of the lines whose first byte is in [begin, end).

    Args:
        stream: the content, standing at `begin`, or one byte before it where `begin` is not 0.
        name: what default ids begin with; they end with the line's byte offset.
        shown: the file in messages.
        path: the file itself, where it is local and not compressed.
        begin, end: bytes of the content; None: to its end.
        text_field, id_field: as for `readers.read_parts`.
        tick: called now and then.

    Raises:
        ValueError: a line is no JSON object with text in UTF-8; names its place.
    """
    place = _Place(shown, _command(shown))
    number = 1 if begin == 0 else None
    key = id_field or "id"
    for offset, lines, long in _lines(stream, begin, end, path):
        tick()
        if long is not None:
            where = place.line(number, offset)
            found = _read_long(long, where, place.look(offset), f"{name}:{offset}", text_field, id_field)
            if found is not None:
                yield found
        for index, line in enumerate(lines):
            try:
                record = orjson.loads(line)
                text, identity = record.get(text_field), record.get(key)
            except (ValueError, AttributeError):
                text = identity = None
            if type(text) is str and type(identity) is str:
                yield Document(text, identity)
            elif type(text) is str and identity is None and id_field is None:
                yield Document(text, f"{name}:{offset}")
            elif type(text) is str and type(identity) is int:
                yield Document(text, str(identity))
            elif line.strip():
                where = place.line(None if number is None else number + index, offset)
                yield documents.make_document(_parse(line, where, place.look(offset)), where, f"{name}:{offset}",
                                              text_field=text_field, id_field=id_field)
            offset += len(line) + 1
        if number is not None:
            number += len(lines) + (long is not None)


def _parse(line: bytes, where: str, look: str) -> object:
    try:
        record = documents.parse_json(line)
        if isinstance(record, dict) and any(isinstance(value, float) for value in record.values()):
            import json

            record = json.loads(line)  # orjson makes floats of integers over 64 bits, which an id must not become
    except BadText as error:
        what = "every line must be one JSON object" if str(error).startswith("no JSON") else \
            "text must be UTF-8: convert the file, e.g. with `iconv -f LATIN1 -t UTF-8`"
        raise ValueError(f"{where}: {str(error).replace(' of it)', ' of the line)')}; {what}. {look}") from None
    return record


def _command(shown: str) -> str:
    lower = shown.lower()
    fetch = f"aws s3 cp {shlex.quote(shown)} -" if lower.startswith("s3://") else f"cat {shlex.quote(shown)}"
    return fetch + (" | zcat" if lower.endswith(".gz") else " | zstdcat" if lower.endswith(".zst") else "")


def _lines(stream: BinaryIO, begin: int, end: int | None, path: Path | None) -> Iterator[_Lines]:
    """The lines that begin in [begin, end), without their ends, in groups."""
    held: list[bytes] = []  # the beginning of a line whose end is in a later block
    size = 0
    spool: Spool | None = None
    offset: int | None = None
    for position, block in _blocks(stream, begin, end):
        offset = position if offset is None else offset
        cut = block.find(b"\n")
        if spool is None and size + (len(block) if cut < 0 else cut) > documents.LONG_BYTES:
            spool = Spool(path, offset)
            for part in held:
                spool.write(part)
            held.clear()
        if cut < 0:
            spool.write(block) if spool else held.append(block)
            size += len(block)
            continue
        if spool:
            spool.write(block[:cut])
            yield _Lines(offset, [], spool.span())
            offset, block, spool = position + cut + 1, block[cut + 1:], None
        lines = block.split(b"\n")
        lines[0] = b"".join((*held, lines[0]))
        tail = lines.pop()
        yield _Lines(offset, lines)
        offset += sum(map(len, lines)) + len(lines)
        held, size = [tail], len(tail)
    if spool:
        yield _Lines(offset or 0, [], spool.span())
    elif size:
        yield _Lines(offset or 0, [b"".join(held)])


def _blocks(stream: BinaryIO, begin: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the lines that begin in [begin, end): from the first one's start to the last one's end."""
    if begin:
        position, block = _first_line(stream, begin, end)
    else:
        position, block = 0, stream.read(_BLOCK_BYTES)
        if block.startswith(_BOM):
            position, block = len(_BOM), block[len(_BOM):]
    while block:
        if end is not None and position + len(block) >= end:
            cut = block.find(b"\n", max(0, end - 1 - position))
            if cut >= 0:  # the first line end from byte end - 1 on is the last line's
                yield position, block[:cut + 1]
                return
        yield position, block
        position += len(block)
        block = stream.read(_BLOCK_BYTES)


def _first_line(stream: BinaryIO, begin: int, end: int | None) -> tuple[int, bytes]:
    """The offset of the first line that begins in [begin, end), and bytes from there on; no bytes where none does."""
    position = begin - 1
    while block := stream.read(_BLOCK_BYTES if end is None else max(0, min(_BLOCK_BYTES, end - 1 - position))):
        cut = block.find(b"\n")
        if cut >= 0:
            return position + cut + 1, block[cut + 1:] or stream.read(_BLOCK_BYTES)
        position += len(block)
    return position, b""


def _read_long(line: Span, where: str, look: str, default_id: str, text_field: str,
               id_field: str | None) -> Document | LongDocument | None:
    """The document of a long line; None for a line of blanks."""
    mark = uuid.uuid4().hex
    rest, strings = _without_long_strings(line, mark, where, look)
    if not rest.strip():
        return None
    record = _parse(bytes(rest), where, look)
    marked = {f"{mark}{number}": span for number, span in enumerate(strings)}
    if not isinstance(record, dict) or (span := marked.get(_as_key(record.get(text_field)))) is None:
        return documents.make_document(record, where, default_id, text_field=text_field, id_field=id_field)
    identity = documents.record_id(record, where, default_id, id_field)
    if identity in marked:
        raise ValueError(f"{where}: its {id_field or 'id'!r} is longer than {_STRING_BYTES} bytes; a name is needed. Say "
                         "where it is with --id-field, or repair the record")
    pieces = functools.partial(documents.json_pieces, span, where)
    if span.end - span.begin > documents.LONG_BYTES:
        return LongDocument(identity, pieces)
    return Document("".join(pieces()), identity)


def _as_key(value: object) -> str:
    return value if isinstance(value, str) else ""


def _without_long_strings(line: Span, mark: str, where: str, look: str) -> tuple[bytearray, list[Span]]:
    """A line with each string of over 1 MiB replaced by `mark` and its number, and what was inside those strings.

    Outside of strings JSON has no quote, and inside only escaped ones: quotes and backslashes are all there is to see.
    """
    rest, strings, pending = bytearray(), [], bytearray()
    inside = odd = False  # in a string; after an odd number of backslashes
    begin = line.begin  # of the string
    for position in range(line.begin, line.end, _BLOCK_BYTES):
        data = line.read(position, _BLOCK_BYTES)
        done = at = 0
        while (quote := data.find(b'"', at)) >= 0:
            at = quote + 1
            if not inside:
                rest += data[done:at]
                begin = position + at
            elif _escaped(data, quote, odd):
                continue
            elif position + quote - begin > _STRING_BYTES:
                rest += b"%s%d\"" % (mark.encode(), len(strings))
                strings.append(line.cut(begin, position + quote))
            else:
                rest += pending + data[done:at]
            pending.clear()
            inside, done = not inside, at
        if not inside:
            rest += data[done:]
        elif len(pending) <= _STRING_BYTES:
            pending += data[done:]
        odd = inside and _escaped(data, len(data), odd)
        if len(rest) > _REST_BYTES:
            raise ValueError(f"{where}: a line of {line.end - line.begin} bytes, more than {_REST_BYTES} of them outside of "
                             f"its long strings; a record may hold no more. {look}")
    return rest + pending if inside else rest, strings


def _escaped(data: bytes, at: int, odd: bool) -> bool:
    """Whether the character at `at` is escaped; `odd`: the data follow an odd number of backslashes."""
    for reach in (32, at):  # a long run of backslashes is rare
        before = data[max(0, at - reach):at]
        run = len(before) - len(before.rstrip(b"\\"))
        if run < len(before):
            return run % 2 == 1
    return (run + odd) % 2 == 1
