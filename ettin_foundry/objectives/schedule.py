"""Objective and mask rate as functions of the tokens read so far.

A batch takes the value that holds at the real tokens before it, whatever ranks and resumes. Times are in `tok`, or in
`dur`, a share of max_duration; the last segment ends with the run.

    objective: clm                                              # constant
    objective:                                                  # one after the other (arXiv 2507.00994)
      - {until: 0.25dur, objective: clm}
      - {until: 1dur, objective: mlm}
    objective:                                                  # alternating blocks (AntLM, arXiv 2412.03275)
      - cycle: [{tokens: 4_000_000tok, objective: clm}, {tokens: 16_000_000tok, objective: mlm}]
    objective: {mntp: 0.9375, clm: 0.0625}                      # drawn for each row (GPT-BERT, arXiv 2410.24159)
    mask_rate: 0.3
    mask_rate: [{until: 0.9dur, rate: 0.30}, {until: 1dur, rate: 0.15}]     # steps (mmBERT, arXiv 2509.06888)
    mask_rate: [{from: 0.30, to: 0.15}]                                     # linear (GPT-BERT)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OBJECTIVES = ("mlm", "clm", "mntp")  # clm trains a decoder (causal attention), the others an encoder
MASKED_OBJECTIVES = ("mlm", "mntp")  # those that choose tokens at a given mask rate
Shares = tuple[tuple[str, float], ...]  # (objective, share of the rows), in the order given; the shares sum to 1
_TIME = re.compile(r"((?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)(tok|dur)", re.IGNORECASE)


class Segment(NamedTuple):
    start: int  # in tokens
    end: int | None  # None where the length of the run is not known
    value: Any  # (rate at the start, rate at the end), or blocks (tokens, `Shares`) that repeat; tokens None if alone


class _Schedule:
    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)

    def _segment(self, tokens: int) -> Segment:
        return next(segment for segment in reversed(self._segments) if segment.start <= tokens)

    def plain(self) -> Any:
        """The schedule as plain data in tokens, for checkpoints and hashes; `parse` reads it back."""
        contents = [self._content(segment) for segment in self._segments]  # type: ignore[attr-defined]
        if len(contents) == 1 and self._segments[0].end is None and contents[0].keys() <= {"objective", "rate"}:
            return next(iter(contents[0].values()))
        return [{**({} if segment.end is None else {"until": segment.end}), **content}
                for segment, content in zip(self._segments, contents)]

    def __str__(self) -> str:
        """As it would stand in YAML, in one line."""
        return json.dumps(self.plain()).replace('"', "")


class ObjectiveSchedule(_Schedule):
    """Which objective holds at each token of a run: a constant, segments, alternating blocks, or a mixture of rows.

    Attributes:
        objectives: every objective that occurs, in order of first occurrence.
        final: what the model is trained on at the end, and exported as; of a mixture, the first named.
        masks: whether some objective needs a mask rate.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        mixtures: list[Shares] = [shares for segment in segments for _, shares in segment.value]
        self.objectives = tuple(dict.fromkeys(name for shares in mixtures for name, _ in shares))
        self.final: str = mixtures[-1][0][0]
        self.masks = not set(MASKED_OBJECTIVES).isdisjoint(self.objectives)

    @classmethod
    def parse(cls, value: Any, *, total: int | None = None, key: str = "objective") -> ObjectiveSchedule:
        """Reads the module docstring's forms, or what `plain` gave; without `total`, the run's tokens, not `dur`."""
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            return cls([Segment(0, None, ((None, _shares(key, value)),))])
        segments = []
        for where, start, end, content in _segments(key, value, total, ("objective",), ("cycle",)):
            blocks: Any = content.get("cycle", [{"tokens": None, **content}])
            if "cycle" in content and (not isinstance(blocks, Sequence) or len(blocks) < 2 or not all(
                    isinstance(block, Mapping) and set(block) == {"tokens", "objective"} for block in blocks)):
                raise ValueError(f"{where}.cycle must be at least two blocks {{tokens, objective}}, got {blocks!r}")
            parsed = [(None if "objective" in content else
                       parse_tokens(f"{where}.cycle[{i}].tokens", block["tokens"], total, least=1),
                       _shares(f"{where}.objective", block["objective"])) for i, block in enumerate(blocks)]
            segments.append(Segment(start, end, tuple(parsed)))
        return cls(segments)

    def at(self, tokens: int) -> dict[str, float]:
        """{objective: share of the rows} of the batch that comes after `tokens` tokens; the shares sum to 1."""
        segment = self._segment(tokens)
        if len(segment.value) == 1:
            return dict(segment.value[0][1])
        place, end = (tokens - segment.start) % sum(length for length, _ in segment.value), 0
        return dict(next(shares for length, shares in segment.value if place < (end := end + length)))

    def _content(self, segment: Segment) -> dict[str, Any]:
        blocks = [{"tokens": length, "objective": shares[0][0] if len(shares) == 1 else dict(shares)}
                  for length, shares in segment.value]
        return {"cycle": blocks} if len(blocks) > 1 else {"objective": blocks[0]["objective"]}


class MaskRate(_Schedule):
    """The share of tokens that mlm and mntp choose, at each token of a run: a constant, steps, or linear segments."""

    @classmethod
    def parse(cls, value: Any, *, total: int | None = None, key: str = "mask_rate") -> MaskRate:
        """As `ObjectiveSchedule.parse`; rates are in (0, 1], or a constant 0, which masks nothing."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            rate = 0.0 if value == 0 and not isinstance(value, bool) else _rate(key, value)
            return cls([Segment(0, None, (rate, rate))])
        segments = []
        for where, start, end, content in _segments(key, value, total, ("rate",), ("from", "to")):
            if end is None and "from" in content:
                raise ValueError(f"{where}.until must be given for a slope where max_duration is not in tokens")
            names = ("rate", "rate") if "rate" in content else ("from", "to")
            segments.append(Segment(start, end, tuple(_rate(f"{where}.{name}", content[name]) for name in names)))
        return cls(segments)

    def at(self, tokens: int) -> float:
        """The rate of the batch that comes after `tokens` tokens."""
        segment = self._segment(tokens)
        first, last = segment.value
        if first == last or segment.end is None:
            return first
        # a batch may start past the end of the run's tokens only by rounding; the rate then stays at its end
        return first + (last - first) * min(1.0, (tokens - segment.start) / (segment.end - segment.start))

    def _content(self, segment: Segment) -> dict[str, Any]:
        first, last = segment.value
        return {"rate": first} if first == last else {"from": first, "to": last}


def parse_tokens(key: str, value: Any, total: int | None, *, least: int = 0) -> int:
    """A time such as `3_000_000_000tok`, `0.25dur` of `total` or a plain number, in tokens; `key` is for messages."""
    number: float | None = value if type(value) is int else None
    if match := _TIME.fullmatch(value) if isinstance(value, str) else None:
        if (is_share := match[2].lower() == "dur") and total is None:
            raise ValueError(f"{key} must be in tok where max_duration is not in tokens, got {value!r}")
        number = float(match[1]) * (total or 0 if is_share else 1)
    if number is None or round(number) < least:
        raise ValueError(f"{key} must be at least {least} tokens, or a share such as 0.25dur, got {value!r}")
    return round(number)


def _segments(key: str, value: Sequence[Any], total: int | None,
              *forms: tuple[str, ...]) -> list[tuple[str, int, int | None, Mapping[str, Any]]]:
    """(key, start, end, content without until) of segments; `forms`: the keys they may have."""
    found, start = [], 0
    for i, segment in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(segment, Mapping) or set(segment) - {"until"} not in map(set, forms):
            raise ValueError(f"{where} must have the keys {' or '.join(' and '.join(form) for form in forms)}, with "
                             f"until, got {segment!r}")
        if "until" not in segment and i < len(value) - 1:
            raise ValueError(f"{where}.until must be given; only the last segment may leave it out")
        end = parse_tokens(f"{where}.until", segment["until"], total) if "until" in segment else total
        if end is not None and (end <= start or (total is not None and end > total)):
            raise ValueError(f"{where}.until must be after the segment's start ({start:,} tokens) and not past the end "
                             f"of the run ({total} tokens), got {segment.get('until', end)!r}")
        found.append((where, start, end, {name: part for name, part in segment.items() if name != "until"}))
        start = end if end is not None else start
    if not found:
        raise ValueError(f"{key} must have at least one segment, got an empty list")
    if total is not None and start < total:
        raise ValueError(f"{found[-1][0]}.until must be the end of the run, {total:,} tokens, or absent, got {start:,}")
    return found


def _shares(key: str, value: Any) -> Shares:
    shares = value if isinstance(value, Mapping) else {value: 1.0} if isinstance(value, str) else {}
    valid = all(name in OBJECTIVES and type(share) in (int, float) and 0 < share <= 1 for name, share in shares.items())
    if not valid or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"{key} must be one of {', '.join(OBJECTIVES)}, shares of them that sum to 1, or a list of "
                         f"segments, got {value!r}")
    return tuple((str(name), float(share)) for name, share in shares.items())


def _rate(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise ValueError(f"{key} must be above 0 and at most 1, a share of the tokens, got {value!r}")
    return float(value)


def check_together(objective: ObjectiveSchedule, mask_rate: MaskRate, key: str = "") -> None:
    """Refuses a mask rate that nothing would use, and objectives that lack one; `key` stands before `mask_rate`."""
    if objective.masks == (mask_rate.plain() == 0):
        needed = "above 0 and at most 1" if objective.masks else "0 or absent"
        raise ValueError(f"{key}mask_rate must be {needed} with objective: {objective}, got {mask_rate}; set "
                         "variables.mask_rate (and variables.eval_mask_rate)")
