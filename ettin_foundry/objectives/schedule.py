"""Objective and mask rate as functions of the tokens read so far.

A schedule is a list of segments on the token clock (real tokens before a batch). A batch takes the value that holds at the
tokens before it, so the value of a step follows from the data alone: it is the same after a resume, on any number of ranks,
and for both members of a pair. Nothing here imports torch or the host.

In YAML (times in `tok`, or in `dur`, a share of max_duration; the last segment ends with the run):

    objective: clm                                              # constant
    objective:                                                  # one after the other (arXiv 2507.00994: CLM, then MLM)
      - {until: 0.25dur, objective: clm}
      - {until: 1dur, objective: mlm}
    objective:                                                  # alternating blocks (AntLM, arXiv 2412.03275)
      - cycle: [{tokens: 4_000_000tok, objective: clm}, {tokens: 16_000_000tok, objective: mlm}]
    objective: {mntp: 0.9375, clm: 0.0625}                      # drawn for each row (GPT-BERT, arXiv 2410.24159)

    mask_rate: 0.3
    mask_rate:                                                  # steps (mmBERT, arXiv 2509.06888)
      - {until: 0.9dur, rate: 0.30}
      - {until: 1dur, rate: 0.15}
    mask_rate:                                                  # linear (GPT-BERT)
      - {from: 0.30, to: 0.15}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ettin_foundry.model.config import MASKED_OBJECTIVES, OBJECTIVES

__all__ = ["MaskRate", "ObjectiveSchedule", "check_together", "parse_tokens"]

Shares = tuple[tuple[str, float], ...]
"""(objective, share of the rows), in the order given; the shares sum to 1."""

_TIME = re.compile(r"([0-9._]+(?:e[+-]?[0-9]+)?)(tok|dur)", re.IGNORECASE)


@dataclass(frozen=True)
class Segment:
    """A segment of the token clock.

    Attributes:
        start, end: in tokens; the end is None where the length of the run is not known.
        value: of a mask rate, (rate at the start, rate at the end). Of an objective, blocks (tokens, `Shares`) that repeat
            in turn, or one block of tokens None.
    """

    start: int
    end: int | None
    value: Any


class _Schedule:
    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)

    def _segment(self, tokens: int) -> Segment:
        return next(segment for segment in reversed(self._segments) if segment.start <= tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Schedule) and self._segments == other._segments

    def plain(self) -> Any:
        raise NotImplementedError

    def __str__(self) -> str:
        return _describe(self.plain())


class ObjectiveSchedule(_Schedule):
    """Which objective holds at each token of a run: a constant, segments, alternating blocks, or a mixture of rows.

    Attributes:
        objectives: every objective that occurs, in order of first occurrence.
        final: what the model is trained on at the end, and exported as; of a mixture, the first named.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self._mixtures: list[Shares] = [shares for segment in self._segments for _, shares in segment.value]
        self.objectives: tuple[str, ...] = tuple(dict.fromkeys(name for shares in self._mixtures for name, _ in shares))
        self.final: str = self._mixtures[-1][0][0]

    @classmethod
    def parse(cls, value: Any, *, total: int | None = None, key: str = "objective") -> ObjectiveSchedule:
        """Reads the forms of the module docstring; also what `plain` gave.

        Args:
            total: tokens of the run; without it `dur` is refused and the end is not checked.
            key: what the value is called in messages.

        Raises:
            ValueError: an unknown objective or key, shares that do not sum to 1, or segments with a gap, an overlap, or
                past the end of the run; it names the key and both values.
        """
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            return cls([Segment(0, None, ((None, _shares(key, value)),))])
        segments = []
        for where, start, end, content in _segments(key, value, total, ("objective",), ("cycle",)):
            blocks: Any = content.get("cycle")
            if blocks is None:
                parsed: list[Any] = [(None, _shares(f"{where}.objective", content["objective"]))]
            elif not isinstance(blocks, Sequence) or len(blocks) < 2 or not all(
                    isinstance(block, Mapping) and set(block) == {"tokens", "objective"} for block in blocks):
                raise ValueError(f"{where}.cycle must be a list of at least two blocks {{tokens: ..., objective: ...}}, "
                                 f"got {blocks!r}")
            else:
                parsed = [(parse_tokens(f"{where}.cycle[{i}].tokens", block["tokens"], total, least=1),
                           _shares(f"{where}.cycle[{i}].objective", block["objective"])) for i, block in enumerate(blocks)]
            segments.append(Segment(start, end, tuple(parsed)))
        return cls(segments)

    def at(self, tokens: int) -> dict[str, float]:
        """{objective: share of the rows} of the batch that comes after `tokens` tokens; the shares sum to 1."""
        segment = self._segment(tokens)
        if len(segment.value) == 1:
            return dict(segment.value[0][1])
        place = (tokens - segment.start) % sum(length for length, _ in segment.value)
        for length, shares in segment.value:
            if place < length:
                return dict(shares)
            place -= length
        raise AssertionError

    @property
    def masks(self) -> bool:
        """Whether some objective needs a mask rate."""
        return any(name in MASKED_OBJECTIVES for name in self.objectives)

    @property
    def is_constant(self) -> bool:
        """Whether every batch has the same shares."""
        return len(set(self._mixtures)) == 1

    @property
    def is_single(self) -> bool:
        """Whether there is one objective from start to end."""
        return len(self.objectives) == 1

    def breakpoints(self, total: int) -> list[int]:
        """Token counts, 0 included, at which the value may change, below `total`."""
        found = {0}
        for segment in self._segments:
            end, at = total if segment.end is None else min(segment.end, total), segment.start
            found.add(at)
            while len(segment.value) > 1 and at < end:
                for length, _ in segment.value:
                    at += length
                    found.add(min(at, end))
        return sorted(t for t in found if t < total)

    def plain(self) -> Any:
        """The schedule as plain data in tokens, for checkpoints and hashes: `parse(plain())` is equal to it."""
        def name_or_shares(shares: Shares) -> Any:
            return shares[0][0] if len(shares) == 1 else dict(shares)

        first = self._segments[0]
        if len(self._segments) == 1 and first.end is None and len(first.value) == 1:
            return name_or_shares(first.value[0][1])
        result = []
        for segment in self._segments:
            entry: dict[str, Any] = {} if segment.end is None else {"until": segment.end}
            if len(segment.value) > 1:
                entry["cycle"] = [{"tokens": length, "objective": name_or_shares(shares)}
                                  for length, shares in segment.value]
            else:
                entry["objective"] = name_or_shares(segment.value[0][1])
            result.append(entry)
        return result


class MaskRate(_Schedule):
    """The share of tokens that mlm and mntp choose, at each token of a run: a constant, steps, or linear segments."""

    @classmethod
    def parse(cls, value: Any, *, total: int | None = None, key: str = "mask_rate") -> MaskRate:
        """Reads the forms of the module docstring; also what `plain` gave. Arguments as of `ObjectiveSchedule.parse`.

        Raises:
            ValueError: a rate outside (0, 1] (a constant 0, which masks nothing, is possible), an unknown key, or segments
                with a gap, an overlap, or past the end of the run; it names the key and both values.
        """
        if not isinstance(value, Sequence) or isinstance(value, str):
            rate = 0.0 if value == 0 and not isinstance(value, bool) else _rate(key, value)
            return cls([Segment(0, None, (rate, rate))])
        segments = []
        for where, start, end, content in _segments(key, value, total, ("rate",), ("from", "to")):
            names = ("rate", "rate") if "rate" in content else ("from", "to")
            if end is None and "from" in content:
                raise ValueError(f"{where}.until must be given for a linear segment where max_duration is not in tokens")
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

    @property
    def is_zero(self) -> bool:
        """Whether nothing is ever masked: the rate of clm."""
        return all(segment.value == (0.0, 0.0) for segment in self._segments)

    @property
    def is_constant(self) -> bool:
        """Whether every batch has the same rate."""
        return len({rate for segment in self._segments for rate in segment.value}) == 1

    def breakpoints(self, total: int) -> list[int]:
        """Token counts, 0 included, at which the rate jumps or its slope changes, below `total`."""
        return [segment.start for segment in self._segments if segment.start < total]

    def plain(self) -> Any:
        """The rate as plain data in tokens, for checkpoints and hashes: `parse(plain())` is equal to it."""
        if len(self._segments) == 1 and self._segments[0].end is None:
            return self._segments[0].value[0]
        return [{**({} if segment.end is None else {"until": segment.end}),
                 **({"rate": segment.value[0]} if segment.value[0] == segment.value[1]
                    else dict(zip(("from", "to"), segment.value)))} for segment in self._segments]


def parse_tokens(key: str, value: Any, total: int | None, *, least: int = 0) -> int:
    """A time such as `3_000_000_000tok`, `0.25dur` or a plain number of tokens, in tokens.

    Args:
        key: what it is called in messages.
        total: tokens of the run, which `dur` is a share of; None when max_duration is not in tokens.

    Raises:
        ValueError: another unit, no number, below `least`, or a share without a total.
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    number: float | None = value if isinstance(value, int) and not isinstance(value, bool) else None
    if match:
        if match[2].lower() == "dur" and total is None:
            raise ValueError(f"{key} must be in tok where max_duration is not in tokens, got {value!r}")
        try:
            number = float(match[1]) * (total if match[2].lower() == "dur" else 1)  # type: ignore[operator]
        except ValueError:
            pass
    if number is None or round(number) < least:
        raise ValueError(f"{key} must be at least {least} tokens or a share of the run, such as 8_500_000_000tok or "
                         f"0.25dur, got {value!r}")
    return round(number)


def _segments(key: str, value: Sequence[Any], total: int | None,
              *forms: tuple[str, ...]) -> list[tuple[str, int, int | None, Mapping[str, Any]]]:
    """(key, start, end, content) of a list of segments, without gap or overlap, up to the end of the run.

    Args:
        forms: the keys that a segment has besides `until`, in each form that is possible.
    """
    found, start = [], 0
    for i, segment in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(segment, Mapping) or not any(set(segment) - {"until"} == set(form) for form in forms):
            raise ValueError(f"{where} must have the keys {' or '.join(' and '.join(form) for form in forms)}, with "
                             f"until, got {segment!r}")
        if "until" not in segment and i < len(value) - 1:
            raise ValueError(f"{where}.until must be given; only the last segment may leave it out")
        end = parse_tokens(f"{where}.until", segment["until"], total) if "until" in segment else total
        if end is not None and (end <= start or (total is not None and end > total)):
            raise ValueError(f"{where}.until must be after the segment's start ({start:,} tokens) and not past the end of "
                             f"the run ({total} tokens), got {segment.get('until', end)!r} ({end:,} tokens)")
        found.append((where, start, end, segment))
        start = end if end is not None else start
    if not found:
        raise ValueError(f"{key} must have at least one segment, got an empty list")
    if total is not None and start < total:
        raise ValueError(f"{found[-1][0]}.until must be the end of the run, {total:,} tokens, or absent, got {start:,}")
    return found


def _shares(key: str, value: Any) -> Shares:
    """An objective's name, or a mapping of objectives to shares that sum to 1."""
    shares = value if isinstance(value, Mapping) else {value: 1.0} if isinstance(value, str) else {}
    valid = all(name in OBJECTIVES and isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share <= 1
                for name, share in shares.items())
    if not valid or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"{key} must be one of {', '.join(OBJECTIVES)}, shares of them that sum to 1, or a list of "
                         f"segments, got {value!r}")
    return tuple((str(name), float(share)) for name, share in shares.items())


def _rate(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{key} must be above 0 and at most 1, a share of the tokens, got {value!r}")
    return float(value)


def _describe(plain: Any) -> str:
    """A schedule in one line for people."""
    if isinstance(plain, Mapping):
        return " + ".join(f"{share:g} {name}" for name, share in plain.items())
    if not isinstance(plain, list):
        return str(plain)
    parts = []
    for segment in plain:
        if "cycle" in segment:
            what = "turns of " + ", ".join(f"{b['tokens']:,} tokens {_describe(b['objective'])}" for b in segment["cycle"])
        elif "from" in segment:
            what = f"{segment['from']:g} to {segment['to']:g}"
        else:
            what = _describe(segment.get("objective", segment.get("rate")))
        parts.append(what + (f" until {segment['until']:,}" if "until" in segment else ""))
    return ", then ".join(parts)


def check_together(objective: ObjectiveSchedule, mask_rate: MaskRate, key: str = "") -> None:
    """Refuses a mask rate that nothing would use, and objectives that lack one.

    Args:
        key: what stands before `mask_rate` in messages, such as `train_loader.`.

    Raises:
        ValueError: naming both values.
    """
    if objective.masks == mask_rate.is_zero:
        needed = "above 0 and at most 1" if objective.masks else "0 or absent"
        raise ValueError(f"{key}mask_rate must be {needed} with objective: {objective}, got {mask_rate}; set "
                         "variables.mask_rate (and variables.eval_mask_rate)")
