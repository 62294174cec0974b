"""Documents as the readers hand them on: short ones as text, long ones as pieces that stay on disk until they are asked for.

A text of a gigabyte is never held: it lies in its file, or in a temporary one where that is compressed or remote, and is
decoded in pieces as often as anybody wants them. JSON strings are cut between characters and decoded piece by piece.
"""

from __future__ import annotations

import codecs
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

__all__ = ["LONG_BYTES", "PIECE_BYTES", "BadText", "Document", "LongDocument", "Span", "Spool", "json_pieces",
           "make_document", "not_utf8", "one_line", "parse_json", "record_id", "text_document", "utf8_pieces"]

LONG_BYTES = 16 << 20
"""Texts of more bytes (UTF-8, or escaped in JSON) come as LongDocument."""
PIECE_BYTES = 8 << 20

_ESCAPE_BYTES = 6  # \uXXXX


class Document(NamedTuple):
    """One text and its name inside its source."""

    text: str
    id: str


class LongDocument(NamedTuple):
    """A text too large to hold. `pieces()` may be called often, from any thread, also after the reader has gone on."""

    id: str
    pieces: Callable[[], Iterator[str]]
    """Strings of at most 8 Mi characters; joined they are the text. Iterating raises ValueError at invalid text."""


class BadText(ValueError):
    """What is wrong inside a text; the reader says where."""


class Span:
    """The bytes [begin, end) of an open file; reading them moves nothing, so that threads do not disturb each other."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        self.file, self.begin, self.end = file, begin, end

    def cut(self, begin: int, end: int) -> Span:
        return Span(self.file, begin, end)

    def read(self, position: int, number: int) -> bytes:
        """At most `number` bytes from `position` on.

        Raises:
            OSError: the file is shorter than it was.
        """
        wanted = min(number, self.end - position)
        data = os.pread(self.file.fileno(), wanted, position)
        while len(data) < wanted:
            more = os.pread(self.file.fileno(), wanted - len(data), position + len(data))
            if not more:
                raise OSError(f"the file ends at byte {position + len(data)}; it was cut while it was read. Start again")
            data += more
        return data


class Spool:
    """Takes a long text's bytes in order and gives their span: in the corpus file itself where that can be, else in a copy.

    Args:
        path: the local file that the bytes come from, uncompressed; None where there is none.
        begin: offset of the first byte in it.
    """

    def __init__(self, path: Path | None, begin: int) -> None:
        self.copy = path is None
        self.begin = 0 if path is None else begin
        self.size = 0
        self.file: Any = tempfile.TemporaryFile() if path is None else open(path, "rb", buffering=0)  # noqa: SIM115

    def write(self, data: bytes | memoryview) -> None:
        if self.copy:
            self.file.write(data)
        self.size += len(data)

    def span(self) -> Span:
        if self.copy:
            self.file.flush()
        return Span(self.file, self.begin, self.begin + self.size)


def one_line(error: BaseException) -> str:
    """What an error says, without line ends and control characters: some libraries quote the broken file."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


def not_utf8(where: str, reason: str, byte: int | str) -> ValueError:
    """The error for a file in another encoding, to be raised by the caller."""
    return ValueError(f"{where}: invalid UTF-8 ({reason} at byte {byte}); text must be UTF-8. Convert the file, e.g. with "
                      "`iconv -f LATIN1 -t UTF-8`")


def utf8_pieces(span: Span, where: str) -> Iterator[str]:
    """The text of a span of UTF-8.

    Raises:
        ValueError: invalid UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(span.begin, span.end, PIECE_BYTES):
        waiting = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(span.read(begin, PIECE_BYTES), begin + PIECE_BYTES >= span.end)
        except UnicodeDecodeError as error:
            raise not_utf8(where, error.reason, begin - waiting + error.start) from None
        if piece:
            yield piece


def json_pieces(span: Span, where: str) -> Iterator[str]:
    """The text of a span that is the inside of a JSON string.

    Raises:
        ValueError: invalid UTF-8, escapes or control characters, half of a surrogate pair.
    """
    position = span.begin
    while position < span.end:
        data = span.read(position, PIECE_BYTES)
        if position + len(data) < span.end:
            data = data[:_whole_characters(data)]
        try:
            piece = parse_json(b'"' + data + b'"')
            piece.encode()
        except UnicodeEncodeError as error:
            raise _half_pair(where, f"about {error.start} characters after byte {position}") from None
        except BadText as error:
            raise ValueError(f"{where}: the text in bytes {position} to {position + len(data)} has {error}; every line must "
                             "be one JSON object in UTF-8. Repair or remove the line") from None
        yield piece
        position += len(data)


def _whole_characters(data: bytes) -> int:
    """Where to cut the beginning of a JSON string's inside: the last place that splits no character, escape or pair."""
    cut = len(data)
    while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:  # to the start of the last character
        cut -= 1
    cut -= data[cut - 1] >= 0xC0  # it may be incomplete
    start = _escape_before(data, cut)
    if start is not None and (cut - start < 2 or (data[start + 1:start + 2] == b"u" and cut - start < _ESCAPE_BYTES)):
        cut = start
    high = cut - _ESCAPE_BYTES  # the first half of a pair stays with the second
    if high >= 0 and data[high:high + 3].lower() == b"\\ud" and data[high + 3:high + 4].lower() in b"89ab" and \
            _escape_before(data, high + 1) == high:
        cut = high
    return cut or len(data)


def _escape_before(data: bytes, cut: int) -> int | None:
    """Start of the escape that begins in the last 6 bytes before `cut`, if it does: the last backslash, if not escaped."""
    last = data.rfind(b"\\", max(0, cut - _ESCAPE_BYTES), cut)
    if last < 0:
        return None
    first = last
    while first > 0 and data[first - 1] == 0x5C:
        first -= 1
    return last if (last - first) % 2 == 0 else None


def parse_json(data: bytes) -> Any:
    """A JSON value; what orjson does not read (NaN, 1e400, halves of surrogate pairs) is read as the standard library does.

    Raises:
        BadText: it is none; says why.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        import json

        try:
            return json.loads(data.decode())
        except UnicodeDecodeError as error:
            raise BadText(f"invalid UTF-8 ({error.reason} at byte {error.start} of it)") from None
        except (ValueError, RecursionError) as error:
            raise BadText(f"no JSON ({error})") from None


def text_document(text: str, identity: str) -> Document | LongDocument:
    """A document of a text in memory."""
    if len(text) <= LONG_BYTES // 4 or len(text.encode()) <= LONG_BYTES:
        return Document(text, identity)
    return LongDocument(identity, functools.partial(_slices, text))


def _slices(text: str) -> Iterator[str]:
    for begin in range(0, len(text), PIECE_BYTES):
        yield text[begin:begin + PIECE_BYTES]


def make_document(record: Any, where: str, default_id: str, *, text_field: str,
                  id_field: str | None) -> Document | LongDocument:
    """A record's text and id.

    Raises:
        ValueError: the record has no text, no id although one was asked for, or text that is no valid Unicode.
    """
    identity = record_id(record, where, default_id, id_field) if isinstance(record, dict) else ""
    return text_document(record_text(record, where, text_field), identity)


def record_text(record: Any, where: str, text_field: str) -> str:
    """The text of a record.

    Raises:
        ValueError: it has none, or one that is no valid Unicode.
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
        raise _half_pair(where, f"at character {error.start}") from None
    return text


def _half_pair(where: str, place: str) -> ValueError:
    return ValueError(f"{where}: half of a surrogate pair {place}; text must be valid Unicode. Repair or remove the record")


def record_id(record: dict[str, Any], where: str, default_id: str, id_field: str | None) -> str:
    """The id of a record, or its place where it has none.

    Raises:
        ValueError: an id was asked for and the record has none, or one that is no valid Unicode.
    """
    identity = record.get(id_field or "id")
    if id_field is not None and (identity is None or isinstance(identity, (dict, list))):
        raise ValueError(f"{where}: its {id_field!r} is {identity!r:.40}; a string or number is needed, --id-field "
                         "names it. Leave the option out to number records by their place")
    found = default_id if identity is None or isinstance(identity, (dict, list)) else str(identity)
    try:
        found.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: its {id_field or 'id'!r} is {found!r:.40}; valid Unicode is needed. Repair or remove "
                         "the record") from None
    return found
