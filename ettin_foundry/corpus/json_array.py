"""Reads a .json file: one record, or a list of them, one at a time; only the record being read is held."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

__all__ = ["json_records"]

_BLOCK_BYTES = 1 << 20
_RECORD_CHARACTERS = 128 << 20
_BLANK = re.compile(r"[ \t\n\r]*")
_NEAR_END = 32  # characters; an error so close to the end of what is read may be due to the end


def json_records(stream: BinaryIO, shown: str) -> Iterator[Any]:
    """The elements of a list, or a single value.

    Args:
        stream: the content, in UTF-8.
        shown: the file in messages.

    Raises:
        UnicodeDecodeError: no UTF-8; `start` is the byte in the content. ValueError: no JSON, or a record that is too large.
    """
    window = _Window(stream, shown)
    if window.peek() != "[":
        yield window.value()
    else:
        window.position += 1
        while window.peek() != "]":
            yield window.value()
            if window.peek() == ",":
                window.position += 1
                if window.peek() == "]":
                    raise window.refuse("a comma before the end of the list")
            elif window.peek() != "]":
                raise window.refuse("no comma after a record")
        window.position += 1
    if window.peek():
        raise window.refuse("more after the end")


class _Window:
    """The part of a file that is being parsed."""

    def __init__(self, stream: BinaryIO, shown: str) -> None:
        self.stream, self.shown = stream, shown
        self.text, self.position = "", 0
        self.ended = False
        self.num_bytes = self.records = 0
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.scan = json.JSONDecoder().raw_decode

    def more(self, number: int) -> None:
        """Reads on, dropping what has been parsed."""
        data = self.stream.read(number)
        self.ended = not data
        waiting = len(self.decoder.getstate()[0])
        try:
            text = self.decoder.decode(data, self.ended)
        except UnicodeDecodeError as error:
            start = self.num_bytes - waiting + error.start
            raise UnicodeDecodeError(error.encoding, b"", start, start + 1, error.reason) from None
        if not self.num_bytes:
            text = text.removeprefix("\ufeff")
        self.num_bytes += len(data)
        self.text = self.text[self.position:] + text
        self.position = 0

    def peek(self) -> str:
        """The next character that is not blank; none at the end."""
        while True:
            self.position = _BLANK.match(self.text, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self.more(_BLOCK_BYTES)

    def value(self) -> Any:
        """The value that begins at the position."""
        self.peek()
        self.records += 1
        while True:
            try:
                value, end = self.scan(self.text, self.position)
                if self.ended or end < len(self.text):
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _NEAR_END
                if self.ended or not cut_off:
                    raise self.refuse(str(error)) from None
            except (ValueError, RecursionError) as error:
                raise self.refuse(str(error)) from None
            held = len(self.text) - self.position
            if held > _RECORD_CHARACTERS:
                raise ValueError(f"{self.shown} record {self.records}: it has more than {_RECORD_CHARACTERS} characters; a "
                                 "record of a .json file may have no more. Write it as a line of a .jsonl file")
            self.more(max(_BLOCK_BYTES, held))

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"{self.shown}: no JSON (record {self.records}: {reason}); one object or a list of objects is "
                          "needed. Lines of objects belong in a .jsonl file")
