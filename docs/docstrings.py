"""Lists what docstrings say of parameters for the page of the API: lines such as `max_batches: of 16,384 positions`."""

import re
from typing import Any

import griffe

_LINE = re.compile(r"^((?:[a-z_]+, )*[a-z_]+)(?=: \S)", re.M)


class Parameters(griffe.Extension):
    """Lines that begin with `name: ` become items of a list."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and (found := _LINE.search(obj.docstring.value)):
            text, begin = obj.docstring.value, found.start()
            obj.docstring.value = text[:begin].rstrip() + "\n\n" + _LINE.sub(r"- `\1`", text[begin:])
