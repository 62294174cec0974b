"""Which documents are kept: length, predicates of the user's own, exact duplicates. Each is off by default.

A predicate is any function f(text, id) -> bool, written as `package.module:function`. It must answer by its
arguments alone, or two conversions will differ. Near-duplicates, language and quality filters and
decontamination are datatrove's work: run it first and convert what it writes (.jsonl.gz). Exact duplicates
are found by duplicates.py.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DUPLICATE", "LONG", "OVERSIZED", "SHORT", "FilterChain", "FilterOptions"]

SHORT, LONG, DUPLICATE, OVERSIZED = "short", "long", "duplicate", "oversized"
"""Reasons to drop a document; a predicate's is `predicate package.module:function`."""


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which filters are on, and their settings. Picklable."""

    min_characters: int | None = None  # Unicode code points; empty documents are dropped anyway
    max_characters: int | None = None
    predicates: Sequence[str] = ()  # `package.module:function` each; True keeps the document
    deduplicate: bool = False  # drop documents that equal an earlier one

    def __post_init__(self) -> None:
        object.__setattr__(self, "predicates", tuple(self.predicates))  # hashable, for caches
        least, most = self.min_characters, self.max_characters
        if (least is not None and least < 2) or (most is not None and most < max(least or 0, 1)):
            raise ValueError("--min-characters must be at least 2 and at most --max-characters, got "
                             f"{least} and {most}; leave one out for no limit")
        for name in self.predicates:
            _load_predicate(name)

    def record(self) -> dict[str, Any]:
        """All that shapes the data, as JSON, without places on this machine.

        A predicate is told by the hash of the file that defines it; what that file imports is not looked at.
        The keys of decontamination stay, so that a manifest is the same, byte for byte, as one of an earlier
        conversion.
        """
        files = {name: _load_predicate(name)[1].read_bytes() for name in self.predicates}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        return {"min_characters": self.min_characters, "max_characters": self.max_characters,
                "predicates": [{"name": name, "sha256": digest} for name, digest in digests.items()],
                "decontaminate": [], "decontaminate_field": "text", "decontaminate_drop": False,
                "ngrams": None, "deduplicate": self.deduplicate}


class FilterChain:
    """The filters of one process, asked for document after document; cheap ones first."""

    def __init__(self, options: FilterOptions) -> None:
        self._shortest = options.min_characters or 0
        self._longest = options.max_characters or sys.maxsize
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
                if not isinstance(keep, (bool, np.bool_)):
                    raise TypeError(f"{keep!r:.100}")
            except Exception as error:
                raise ValueError(f"--filter {name} must give True or False, got {type(error).__name__} "
                                 f"({error!s:.300}) for the document {id!r:.200}") from error
            if not keep:
                return f"predicate {name}"
        return None


def _load_predicate(name: str) -> tuple[Callable[[str, str], bool], Path]:
    """The function of a dotted path, and the file that defines it; ValueError where there is none of use."""
    try:
        module, _, attribute = name.partition(":")
        function = getattr(importlib.import_module(module), attribute)
        if inspect.isclass(function) or getattr(function, "__name__", "") == "<lambda>":
            raise TypeError(f"{attribute} is not a function written with def")
        inspect.signature(function).bind("text", "id")
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
        if not file.is_file():
            raise TypeError("it has no source file")
    except Exception as error:  # a module of the user's: whatever it raises
        raise ValueError("--filter must be package.module:function of a function f(text, id) -> bool on "
                         f"PYTHONPATH, got {name!r} ({type(error).__name__}: {error!s:.300})") from error
    return function, file
