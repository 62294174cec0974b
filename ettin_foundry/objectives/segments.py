"""Segments of a schedule on the token clock: read from YAML, without gap or overlap, up to the end of the run.

What holds in a segment is the matter of schedules.py. Nothing here imports torch or the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Block", "check_segment_keys", "parse_tokens", "segments_of"]

_TIME = re.compile(r"([0-9._]+(?:e[+-]?[0-9]+)?)(tok|dur)", re.IGNORECASE)


def parse_tokens(key: str, value: Any, total: int | None) -> int:
    """A time such as `3_000_000_000tok`, `0.25dur` or a plain number of tokens, in tokens.

    Args:
        key: what it is called in messages.
        total: tokens of the run, which `dur` is a share of; None when max_duration is not in tokens.

    Raises:
        ValueError: another unit, no number, below 0, or a share without a total.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    try:
        number = float(match[1])  # type: ignore[index]
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {value!r} given; tokens or a share of the run are needed. Write it like "
                         "8_500_000_000tok or 0.25dur") from None
    assert match is not None
    if match[2].lower() == "tok":
        return round(number)
    if total is None:
        raise ValueError(f"{key}: {value!r} given, a share of a run whose max_duration is not in tokens; only tok is "
                         "possible here. Give max_duration in tok, or this in tok")
    return round(number * total)


@dataclass(frozen=True)
class Block:
    """A stretch of the token clock, and what holds in it: an objective's shares, or a rate at its begin and end."""

    begin: int
    end: int | None
    value: Any
    cycle: tuple[tuple[int, Any], ...] = ()
    """(end of the block within a turn, shares), when the stretch repeats a list of blocks."""


def segments_of(key: str, value: Any, total: int | None) -> list[tuple[int, int | None, Mapping[str, Any]]]:
    """(begin, end, segment) of a list of segments: without gap or overlap, up to the end of the run."""
    segments, begin = [], 0
    for i, segment in enumerate(value):
        if not isinstance(segment, Mapping):
            raise ValueError(f"{key}[{i}]: {segment!r} given; a segment is a block of keys such as {{until: 0.25dur, ...}}. "
                             "Correct it")
        last = i == len(value) - 1
        if "until" not in segment and not last:
            raise ValueError(f"{key}[{i}].until: not given; only the last segment may leave it out. Say when this one ends")
        end = parse_tokens(f"{key}[{i}].until", segment["until"], total) if "until" in segment else total
        if end is not None and end <= begin:
            raise ValueError(f"{key}[{i}].until: {segment.get('until', end)!r} ({end:,} tokens) given, but the segment "
                             f"begins at {begin:,} tokens; segments may not overlap, and each needs some tokens. Put them "
                             "in order")
        if end is not None and total is not None and end > total:
            raise ValueError(f"{key}[{i}].until: {segment['until']!r} ({end:,} tokens) given, past the end of the run "
                             f"({total:,} tokens). Shorten it or lengthen max_duration")
        segments.append((begin, end, segment))
        begin = end if end is not None else begin
    if not segments:
        raise ValueError(f"{key}: an empty list given; at least one segment is needed. Remove the key or fill the list")
    end = segments[-1][1]
    if end is not None and total is not None and end < total:
        raise ValueError(f"{key}[{len(segments) - 1}].until: {segments[-1][2]['until']!r} ({end:,} tokens) given, but the "
                         f"run has {total:,} tokens; what follows would have no value. Leave the last `until` out")
    return segments


def check_segment_keys(key: str, segment: Mapping[str, Any], allowed: Sequence[str]) -> None:
    if unknown := sorted(set(segment) - set(allowed)):
        raise ValueError(f"{key}.{unknown[0]}: unknown key; a segment takes {', '.join(allowed)}. Correct or remove it")
