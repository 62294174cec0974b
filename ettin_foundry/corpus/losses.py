"""States exactly what is lost with a shard: chunks, tokens, documents by name as far as anything still names them.

The counts come from the shard's entry. The ids come from the shard itself where its layout can still be read, else from
its neighbours: a document may begin in the shard before it or go on in the one after it. repair.py decides what is taken
out; the lines written here are kept in quarantine/missing.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.corpus.units import Plan
from ettin_foundry.data.inspect import peek_shard, plain, shard_order
from ettin_foundry.data.shards import read_columns

__all__ = ["describe_loss", "loss_lines"]


class _Edges(NamedTuple):
    """The documents at a shard's ends."""

    first: str
    first_part: int
    last: str
    ended: bool
    """The last chunk ends its document."""


def describe_loss(folder: Path, entry: Mapping[str, Any], neighbours: Sequence[Mapping[str, Any]], *, split: str,
                  reason: str, chunk_length: int, vocab_size: int, plan: Plan | None) -> dict[str, Any]:
    """One line of missing.jsonl.

    Args:
        folder: the split. entry: the shard's, perhaps without `tokens` and `documents`, where no manifest is left.
        neighbours: entries of all shards of the split. reason: why it cannot be used.
        chunk_length, vocab_size: of the set. plan: names the unit's input, if it is kept.

    Returns:
        {split, shard (the entry), reason, unit, chunks, tokens, documents (that end in the shard), whole_documents (of
        these, those that began in it), ids (of all its documents, or None), after, before (ids of the documents around it,
        or None), cut (documents of which other parts are still there: {doc, lost: "beginning", "middle" or "end"})}
    """
    by_number = {shard_order(other["raw"]["basename"]): other for other in neighbours}
    numbers = shard_order(entry["raw"]["basename"])
    unit = numbers[0] if len(numbers) == 2 else None

    def edges(step: int) -> _Edges | None:
        other = by_number.get((*numbers[:-1], numbers[-1] + step)) if numbers else None
        if other is None or other.get("source") != entry.get("source", other.get("source")):
            return None
        return _edges(folder, other, chunk_length, vocab_size)

    before, after = edges(-1), edges(1)
    goes_on_from = before.last if before is not None and not before.ended else None
    goes_on_into = after.first if after is not None and after.first_part > 0 else None
    cut = []
    if goes_on_from is not None and goes_on_from == goes_on_into:
        cut.append({"doc": goes_on_from, "lost": "middle"})
    else:
        cut += [{"doc": goes_on_from, "lost": "end"}] if goes_on_from is not None else []
        cut += [{"doc": goes_on_into, "lost": "beginning"}] if goes_on_into is not None else []
    documents = entry.get("documents")
    ends_another = goes_on_from is not None and goes_on_from != goes_on_into
    return {"split": split, "shard": {key: value for key, value in entry.items() if key != "lengths"}, "reason": reason,
            "unit": plan.units[unit].label if plan is not None and unit is not None and unit < len(plan.units) else None,
            "chunks": entry["samples"], "tokens": entry.get("tokens"), "documents": documents,
            "whole_documents": None if documents is None else documents - ends_another,
            "ids": _ids(folder, entry, chunk_length, vocab_size), "after": before.last if before else None,
            "before": after.first if after else None, "cut": cut}


def loss_lines(record: Mapping[str, Any]) -> list[str]:
    """A line of missing.jsonl for people. Its values come from a file and may be of any kind."""
    shard = record["shard"]
    name = plain(str((shard.get("zip") or shard["raw"])["basename"]), 200)

    def count(key: str) -> str:
        value = record.get(key)
        return f"{value:,}" if isinstance(value, int) else "an unknown number of"

    lines = [f"{record['split']}/{name}: {plain(str(record['reason']), 500)}",
             f"  {count('chunks')} chunks, {count('tokens')} tokens; {count('documents')} documents end in it, "
             f"{count('whole_documents')} of them lost whole"
             + (f"; of {plain(str(record['unit']), 300)}" if record.get("unit") else "")]
    ids = record.get("ids")
    if ids:
        lines.append(f"  {len(ids):,} documents: " + ", ".join(plain(str(doc), 100) for doc in ids[:3])
                     + (f", ... {plain(str(ids[-1]), 100)}" if len(ids) > 3 else ""))
    else:
        around = [f"{word} {plain(str(record[key]), 100)}" for word, key in (("after", "after"), ("before", "before"))
                  if record.get(key) is not None]
        lines.append("  its ids cannot be read; " + (f"in the order of the source they come {' and '.join(around)}" if around
                                                     else "it held all of the unit's documents in this split"))
    lines += [f"  document {plain(str(part['doc']), 100)} has lost its {part['lost']}" for part in record.get("cut", ())]
    return lines


def _edges(folder: Path, entry: Mapping[str, Any], chunk_length: int, vocab_size: int) -> _Edges | None:
    path = folder / entry["raw"]["basename"]
    try:
        shard = peek_shard(folder, entry, chunk_length=chunk_length, vocab_size=vocab_size)
        first, part, _ = read_columns(shard, 0, path)
        last, _, _ = read_columns(shard, len(shard.lengths) - 1, path)
    except (ValueError, OSError):
        return None
    return _Edges(first, part, last, bool(shard.last[-1]))


def _ids(folder: Path, entry: Mapping[str, Any], chunk_length: int, vocab_size: int) -> list[str] | None:
    """Ids of a bad shard's documents, in order, if its layout holds and it has as many chunks as it should."""
    path = folder / entry["raw"]["basename"]
    try:
        shard = peek_shard(folder, entry, chunk_length=chunk_length, vocab_size=vocab_size)
        if len(shard.lengths) != entry["samples"]:
            return None
        return list(dict.fromkeys(read_columns(shard, index, path)[0] for index in range(len(shard.lengths))))
    except (ValueError, OSError):
        return None
