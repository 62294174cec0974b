"""Which documents are kept: length, predicates of the user's own, exact duplicates. Each is off by default.

A predicate is any function f(text, id) -> bool, written as `package.module:function`. It must answer by its arguments
alone, or two conversions will differ. Near-duplicates, language and quality filters and decontamination are datatrove's
work: run it first and convert what it writes (.jsonl.gz). Exact duplicates are found by duplicates.py.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DUPLICATE", "LONG", "OVERSIZED", "SHORT", "FilterChain", "FilterOptions"]

SHORT, LONG, DUPLICATE, OVERSIZED = "short", "long", "duplicate", "oversized"
"""Reasons to drop a document; a predicate's is `predicate package.module:function`."""

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which filters are on, and their settings. Picklable.

    Raises:
        ValueError: a setting out of range, or a predicate that cannot be used; the message names it.
    """

    min_characters: int | None = None
    """Fewest characters (Unicode code points) of a document that is kept."""
    max_characters: int | None = None
    """Most of them."""
    predicates: Sequence[str] = ()
    """`package.module:function` each; True keeps the document."""
    deduplicate: bool = False
    """Drop documents that equal an earlier one."""

    def __post_init__(self) -> None:
        for option, value, least in (("--min-characters", self.min_characters, 2),
                                     ("--max-characters", self.max_characters, 1)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{option} must be a whole number of at least {least}, got {value!r}; leave it out for no "
                                 "limit (empty documents are dropped anyway)")
        if (self.min_characters or 0) > (self.max_characters or sys.maxsize):
            raise ValueError(f"--min-characters must be at most --max-characters, got {self.min_characters} and "
                             f"{self.max_characters}")
        if isinstance(self.predicates, str) or len(set(self.predicates)) < len(self.predicates):
            raise ValueError(f"--filter must be a list of different names, got {self.predicates!r:.200}")
        for name in self.predicates:
            _load_predicate(name)
        object.__setattr__(self, "predicates", tuple(self.predicates))  # hashable, for caches

    def record(self) -> dict[str, Any]:
        """All that shapes the data, as JSON, without places on this machine.

        A predicate is told by the hash of the file that defines it; what that file imports is not looked at. The keys of
        decontamination stay, so that a manifest is the same, byte for byte, as one of a conversion that began earlier.
        """
        return {
            "min_characters": self.min_characters, "max_characters": self.max_characters,
            "predicates": [{"name": name, "sha256": hashlib.sha256(_load_predicate(name)[1].read_bytes()).hexdigest()}
                           for name in self.predicates],
            "decontaminate": [], "decontaminate_field": "text", "decontaminate_drop": False, "ngrams": None,
            "deduplicate": self.deduplicate}


class FilterChain:
    """The filters of one process, asked for document after document; cheap ones first.

    Raises:
        ValueError: a predicate cannot be loaded here.
    """

    def __init__(self, options: FilterOptions) -> None:
        self._shortest = options.min_characters or 0
        self._longest = sys.maxsize if options.max_characters is None else options.max_characters
        self._predicates = [(name, _load_predicate(name)[0]) for name in options.predicates]

    def reason(self, text: str, id: str) -> str | None:
        """Why a document is dropped: the first filter that it does not pass; None keeps it.

        Raises:
            ValueError: a predicate failed, or did not answer True or False; names predicate and document.
        """
        if not self._shortest <= len(text) <= self._longest:
            return SHORT if len(text) < self._shortest else LONG
        for name, predicate in self._predicates:
            try:
                keep = predicate(text, id)
            except Exception as error:
                raise ValueError(f"--filter {name} must give True or False, got {type(error).__name__} ({error!s:.300}) for "
                                 f"the document {id!r:.200}") from error
            if not isinstance(keep, (bool, np.bool_)):
                raise ValueError(f"--filter {name} must give True or False, got {keep!r:.100} for the document {id!r:.200}")
            if not keep:
                return f"predicate {name}"
        return None


def _load_predicate(name: str) -> tuple[Callable[[str, str], bool], Path]:
    """The function of a dotted path, and the file that defines it.

    Raises:
        ValueError: there is none, or none that can be called with (text, id), has a name, and has a source file.
    """
    def wrong(found: str) -> ValueError:
        return ValueError(f"--filter must be package.module:function of a function f(text, id) -> bool on PYTHONPATH, got "
                          f"{name!r}: {found}")

    if not isinstance(name, str) or not _DOTTED.fullmatch(name):
        raise wrong("it is not a dotted path")
    module_name, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module of the user's: whatever it raises
        raise wrong(f"it cannot be imported ({type(error).__name__}: {error!s:.300})") from error
    if not callable(function) or inspect.isclass(function) or getattr(function, "__name__", "") == "<lambda>":
        raise wrong(f"{attribute} is not a function written with def")
    try:
        inspect.signature(function).bind("text", "id")
    except TypeError as error:
        raise wrong(f"it cannot be called with (text, id): {error}") from None
    except ValueError:  # one in C that does not tell its parameters
        pass
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
    except TypeError:  # written in C, or an object that can be called
        file = Path()
    if not file.is_file():
        raise wrong("it has no source file, by whose hash a changed filter is noticed; wrap it in a function of a module")
    return function, file
