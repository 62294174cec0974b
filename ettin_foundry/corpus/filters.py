"""Which documents are kept: length, predicates of the user's own, overlap with evaluation texts. Each is off by default.

A chain asks the gates in this order, the cheap ones first, and names the first that a document does not pass; the
conversion counts documents under that name. Exact duplicates need all documents at once and are found before, by
duplicates.py. A predicate is any function f(text, id) -> bool, written as `package.module:function`: language, quality,
licence, whatever a corpus needs. It must answer by its arguments alone, or two conversions will differ.

Near-duplicates (MinHash) are left out on purpose. datasketch, the well-kept library for it, holds the index of all
documents in one process or in a database server, which is neither bounded nor restartable here; datatrove does it well at
scale, as four stages of a pipeline of its own over files. Run that first and convert what it writes (.jsonl.gz).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ettin_foundry.corpus.decontamination import Hit, NgramIndex

__all__ = ["CONTAMINATED", "DUPLICATE", "LONG", "SHORT", "FilterChain", "FilterOptions", "Predicate", "build_filters"]

Predicate = Callable[[str, str], bool]

SHORT, LONG, CONTAMINATED, DUPLICATE = "short", "long", "contaminated", "duplicate"
"""Reasons to drop a document; a predicate's is `predicate package.module:function`."""

_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which gates are on, and their settings. Picklable.

    Raises:
        ValueError: a setting out of range or without effect, or a predicate that cannot be used; the message names it.
    """

    min_characters: int | None = None
    """Fewest characters (Unicode code points) of a document that is kept."""
    max_characters: int | None = None
    """Most of them."""
    predicates: Sequence[str] = ()
    """`package.module:function` each; True keeps the document."""
    decontaminate: Sequence[str] = ()
    """Sources of evaluation texts, as `sources.find_source` takes them: overlap is reported."""
    decontaminate_field: str = "text"
    """Key or column of the evaluation texts."""
    decontaminate_drop: bool = False
    """Drop what overlaps, besides reporting it."""
    deduplicate: bool = False
    """Drop documents that equal an earlier one."""

    def __post_init__(self) -> None:
        self._check_lengths()
        for option, values in (("--filter", self.predicates), ("--decontaminate", self.decontaminate)):
            if isinstance(values, str) or not all(isinstance(value, str) and value for value in values):
                raise ValueError(f"{option}: {values!r:.200} given; a list of names is needed. Name each in its own option")
            if twice := sorted({value for value in values if list(values).count(value) > 1}):
                raise ValueError(f"{option}: {twice[0]} given twice; once has the whole effect. Leave one out")
        if self.decontaminate_drop and not self.decontaminate:
            raise ValueError("--drop-contaminated: given without --decontaminate, where it has no effect; evaluation texts "
                             "are needed. Name them with --decontaminate, or leave it out")
        if self.decontaminate_field != "text" and not self.decontaminate:
            raise ValueError(f"--decontaminate-field: {self.decontaminate_field!r} given without --decontaminate, where it "
                             "has no effect; evaluation texts are needed. Name them, or leave it out")
        for name in self.predicates:
            _load_predicate(name)
        for key in ("predicates", "decontaminate"):  # hashable, for caches
            object.__setattr__(self, key, tuple(getattr(self, key)))

    def _check_lengths(self) -> None:
        for option, value, least in (("--min-characters", self.min_characters, 2),
                                     ("--max-characters", self.max_characters, 1)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{option}: {value!r} given; a whole number of at least {least} is needed (an empty "
                                 "document is dropped anyway). Leave it out for no limit")
        if (self.min_characters or 0) > (self.max_characters or sys.maxsize):
            raise ValueError(f"--min-characters {self.min_characters} and --max-characters {self.max_characters} given; the "
                             "first may not be larger: every document would be dropped. Exchange or correct them")

    @property
    def num_gates(self) -> int:
        """Gates that are on; deduplication is one."""
        return (sum(limit is not None for limit in (self.min_characters, self.max_characters)) + len(self.predicates)
                + bool(self.decontaminate) + self.deduplicate)

    def record(self, *, ngrams: NgramIndex | None = None) -> dict[str, Any]:
        """All that shapes the data, as JSON, without places on this machine.

        Args:
            ngrams: the index of the evaluation texts: its fingerprint tells texts that changed under the same name. A
                predicate is told by the hash of the file that defines it; what that file imports is not looked at.
        """
        return {
            "min_characters": self.min_characters, "max_characters": self.max_characters,
            "predicates": [{"name": name, "sha256": hashlib.sha256(_load_predicate(name)[1].read_bytes()).hexdigest()}
                           for name in self.predicates],
            "decontaminate": [_name_of(source) for source in self.decontaminate],
            "decontaminate_field": self.decontaminate_field, "decontaminate_drop": self.decontaminate_drop,
            "ngrams": None if ngrams is None else ngrams.record(), "deduplicate": self.deduplicate}


def build_filters(options: FilterOptions, *, ngrams: NgramIndex | None = None) -> FilterChain:
    """The gates that the options turn on, for one process.

    Args:
        ngrams: the index of `options.decontaminate`; needed if and only if that is given.

    Raises:
        ValueError: a predicate cannot be loaded here.
    """
    if (ngrams is not None) != bool(options.decontaminate):
        raise ValueError(f"ngrams: {'none' if ngrams is None else 'an index'} given with decontaminate "
                         f"{list(options.decontaminate)}; the index of these texts is needed, or none of both")
    return FilterChain(options, [(name, _load_predicate(name)[0]) for name in options.predicates], ngrams)


class FilterChain:
    """The gates, asked for document after document; made by `build_filters`."""

    def __init__(self, options: FilterOptions, predicates: Sequence[tuple[str, Predicate]],
                 ngrams: NgramIndex | None) -> None:
        self._shortest = options.min_characters or 0
        self._longest = sys.maxsize if options.max_characters is None else options.max_characters
        self._predicates = predicates
        self._ngrams = ngrams
        self._drop = options.decontaminate_drop
        self._reports: list[dict[str, Any]] = []

    @property
    def needs_text(self) -> bool:
        """Whether whole texts are needed: predicates get them."""
        return bool(self._predicates)

    @property
    def needs_pieces(self) -> bool:
        """Whether the text is needed at all, be it in pieces."""
        return self.needs_text or self._ngrams is not None

    def reason(self, text: str | None, id: str, *, num_characters: int,
               pieces: Callable[[], Iterable[str]] | None = None) -> str | None:
        """Why a document is dropped; None keeps it.

        Args:
            text: the document, or None for one that comes in `pieces` or when only its length counts.
            id: its name, for reports and messages.
            num_characters: its length.
            pieces: gives its consecutive strings; used for the overlap when there is no `text`.

        Raises:
            ValueError: a predicate failed, or did not answer True or False; names predicate and document.
        """
        if reason := self._by_length(num_characters) or self._by_predicates(text, id):
            return reason
        if self._ngrams is None:
            return None
        if text is not None:
            return self._by_overlap(id, self._ngrams.hits(text))
        if pieces is None:
            raise ValueError(f"document {id!r:.200}: neither text nor pieces given; the search for overlap needs one")
        return self._by_overlap(id, self._ngrams.hits_of_pieces(pieces()))

    def reasons(self, texts: Sequence[str], ids: Sequence[str]) -> list[str | None]:
        """`reason` of each of many documents at once, which is far faster for the overlap with evaluation texts."""
        reasons = [self._by_length(len(text)) or self._by_predicates(text, id) for text, id in zip(texts, ids, strict=True)]
        if self._ngrams is not None:
            left = [at for at, reason in enumerate(reasons) if reason is None]
            for at, hits in zip(left, self._ngrams.hits_of_batch([texts[at] for at in left])):
                reasons[at] = self._by_overlap(ids[at], hits)
        return reasons

    def take_reports(self) -> list[dict[str, Any]]:
        """Overlaps found since the last call: the document's id, the evaluation text's name, the first n-gram, how many."""
        reports, self._reports = self._reports, []
        return reports

    def _by_length(self, num_characters: int) -> str | None:
        return SHORT if num_characters < self._shortest else LONG if num_characters > self._longest else None

    def _by_predicates(self, text: str | None, id: str) -> str | None:
        for name, predicate in self._predicates:
            if text is None:
                raise ValueError(f"document {id!r:.200}: no text given; the predicate {name} needs it")
            try:
                keep = predicate(text, id)
            except Exception as error:
                raise ValueError(f"--filter {name}: it raised {type(error).__name__} ({error!s:.300}) for the document "
                                 f"{id!r:.200}; True or False is needed for any text. Repair the function") from error
            if not isinstance(keep, (bool, np.bool_)):
                raise ValueError(f"--filter {name}: it returned {keep!r:.100} ({type(keep).__name__}) for the document "
                                 f"{id!r:.200}; True or False is needed. Repair the function")
            if not keep:
                return f"predicate {name}"
        return None

    def _by_overlap(self, id: str, hits: Sequence[Hit]) -> str | None:
        self._reports += [{"doc": id, **hit._asdict()} for hit in hits]
        return CONTAMINATED if hits and self._drop else None


def _load_predicate(name: str) -> tuple[Predicate, Path]:
    """The function of a dotted path, and the file that defines it.

    Raises:
        ValueError: there is none, or none that can be called with (text, id), has a name, and has a source file.
    """
    def refuse(found: str, advice: str) -> ValueError:
        return ValueError(f"--filter {name}: {found}; package.module:function of a function f(text, id) -> bool is "
                          f"needed. {advice}")

    if not _DOTTED.fullmatch(name):
        raise refuse("it is no dotted path", "Put the function into a module, and its folder on PYTHONPATH")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's: whatever it raises
        raise refuse(f"{module_name} cannot be imported ({type(error).__name__}: {error!s:.300})",
                     "Correct it, or put its folder on PYTHONPATH") from error
    if not hasattr(module, attribute):
        raise refuse(f"{module_name} has no {attribute}", "Correct the name")
    function: Any = getattr(module, attribute)
    if not callable(function) or inspect.isclass(function):
        raise refuse(f"it is a {type(function).__name__}, no function", "Name a function")
    if getattr(function, "__name__", "") == "<lambda>":
        raise refuse("it is a lambda, which messages and records cannot name", "Write it with def")
    try:
        inspect.signature(function).bind("text", "id")
    except TypeError as error:
        raise refuse(f"it cannot be called with (text, id): {error}", "Change its parameters") from None
    except ValueError:  # one in C that does not tell its parameters
        pass
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
    except TypeError:  # written in C, or an object that can be called
        file = Path("")
    if not file.is_file():
        raise refuse("it has no source file, by whose hash a changed filter is told", "Wrap it in a function of a module")
    return cast(Predicate, function), file


def _name_of(source: str) -> str:
    """NAME of NAME=SOURCE, else the last part of a path or URL."""
    name, equals, _ = source.partition("=")
    return name if equals and "/" not in name else source.rstrip("/").rpartition("/")[2]
