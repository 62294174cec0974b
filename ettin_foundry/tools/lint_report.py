"""What the linter found: differences with their verdicts, as data and as a table of plain text for logs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ABSENT", "HARMLESS", "OBJECTIVE", "UNFAIR", "Difference", "Report", "shown"]

UNFAIR, HARMLESS, OBJECTIVE = "unfair", "harmless", "objective"
ABSENT = "absent"
_WIDEST = 48


@dataclass(frozen=True)
class Difference:
    """One key in which two runs, or two phases of one model, differ."""

    key: str
    a: Any
    b: Any
    """Its two values: of the first run and the second, or of the phase before and this one."""
    verdict: str
    """`objective`: demanded by the objective. `harmless`: cannot change what is learnt. `unfair`: anything else."""
    reason: str
    where: str = ""
    """The run, pair or phase that it was found in, when a report is about more than one."""


@dataclass(frozen=True)
class Report:
    """Everything that was found, and what could not be compared."""

    names: tuple[str, str]
    """What the two columns of values are."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    what: str = "pair"
    """What was looked at, for the last line."""

    @property
    def fair(self) -> bool:
        """Whether no difference is unfair."""
        return not self.unfair

    @property
    def unfair(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.verdict == UNFAIR)

    def __str__(self) -> str:
        """A table, unfair differences first, then the notes, then one line with the verdict."""
        rank = {UNFAIR: 0, HARMLESS: 1, OBJECTIVE: 2}
        found = sorted(self.differences, key=lambda d: (rank[d.verdict], d.key))
        lines = _table(("verdict", "key", *self.names, "why"), _rows(found)) if found else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), self._verdict()])

    def _verdict(self) -> str:
        counts = {verdict: sum(d.verdict == verdict for d in self.differences) for verdict in (UNFAIR, HARMLESS, OBJECTIVE)}
        rest = [f"{counts[OBJECTIVE]} demanded by the objective"] if counts[OBJECTIVE] else []
        rest += [f"{counts[HARMLESS]} harmless"] if counts[HARMLESS] else []
        if self.fair:
            return f"fair {self.what}: " + (", ".join(rest) if rest else "no difference")
        keys = dict.fromkeys(d.key for d in self.unfair)
        return f"unfair {self.what}: {', '.join([f'{counts[UNFAIR]} unfair', *rest])}; unfair: {', '.join(sorted(keys))}"


def _rows(found: Iterable[Difference]) -> list[tuple[str, ...]]:
    """One row for each difference; those that say the same of several places share one."""
    places: dict[tuple[str, ...], list[str]] = {}
    for d in found:
        places.setdefault((d.verdict, d.key, shown(d.a), shown(d.b), d.reason), []).append(d.where)
    return [(*row[:4], f"{', '.join(wheres)}: {row[4]}" if any(wheres) else row[4]) for row, wheres in places.items()]


def shown(value: Any) -> str:
    """A value as it stands in the table: as in YAML, numbers as short as they are exact, cut where it is long."""
    short = isinstance(value, float) and float(f"{value:g}") == value  # else two numbers could look alike
    text = str(value).lower() if isinstance(value, bool) else f"{value:g}" if short else str(value)
    return text if len(text) <= _WIDEST else text[:_WIDEST - 3] + "..."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns under each other; the last column is as wide as it is."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head) - 1)]
    return ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[-1]]) for row in (head, *rows)]
