"""What changes in the course of a run besides the learning rate: its objective and its mask rate, as functions of tokens.

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

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ettin_foundry.model.config import CONTRASTIVE, MASKED_OBJECTIVES, OBJECTIVES
from ettin_foundry.objectives.segments import Block, check_segment_keys, parse_tokens, segments_of

__all__ = ["MaskRate", "ObjectiveSchedule", "check_together", "parse_tokens"]

Shares = tuple[tuple[str, float], ...]
"""(objective, share of the rows), in the order given; the shares sum to 1."""


def _shares(key: str, value: Any) -> Shares:
    """An objective's name, or a block of shares that sum to 1."""
    if isinstance(value, Mapping):
        for name, share in value.items():
            if name not in OBJECTIVES:
                raise ValueError(f"{key}.{name}: no objective; they are {', '.join(OBJECTIVES)}. Correct the key")
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise ValueError(f"{key}.{name}: {share!r} given; a share of the rows above 0 and up to 1 is needed. "
                                 "Correct it")
        total = sum(value.values())
        if not value or abs(total - 1) > 1e-9:
            raise ValueError(f"{key}: shares {dict(value)} given, which sum to {total:g}; they must sum to 1. Correct them")
        return tuple((str(name), float(share)) for name, share in value.items())
    if value not in OBJECTIVES:
        raise ValueError(f"{key}: {value!r} given; it must be one of {', '.join(OBJECTIVES)}, shares of them, or a list of "
                         "segments. Correct the key")
    return ((str(value), 1.0),)


def _plain_shares(shares: Shares) -> Any:
    return shares[0][0] if len(shares) == 1 else dict(shares)


class ObjectiveSchedule:
    """Which objective holds at each token of a run: a constant, segments, alternating blocks, or a mixture of rows.

    Attributes:
        objectives: every objective that occurs, in order of first occurrence.
        final: what the model is trained on at the end, and exported as; of a mixture, the first named.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._begins = [block.begin for block in self._blocks]
        every = [name for block in self._blocks for shares in self._all_shares(block) for name, _ in shares]
        self.objectives: tuple[str, ...] = tuple(dict.fromkeys(every))
        self.final: str = self._all_shares(self._blocks[-1])[-1][0][0]

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
        if value == CONTRASTIVE:
            return cls([Block(0, None, ((CONTRASTIVE, 1.0),))])
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            return cls([Block(0, None, _shares(key, value))])
        blocks = []
        for i, (begin, end, segment) in enumerate(segments_of(key, value, total)):
            where = f"{key}[{i}]"
            check_segment_keys(where, segment, ("until", "objective", "cycle"))
            if ("cycle" in segment) == ("objective" in segment):
                raise ValueError(f"{where}: {dict(segment)} given; a segment has either objective or cycle. Give one")
            if "cycle" in segment:
                blocks.append(Block(begin, end, None, _cycle(f"{where}.cycle", segment["cycle"], total)))
            else:
                blocks.append(Block(begin, end, _shares(f"{where}.objective", segment["objective"])))
        return cls(blocks)

    @staticmethod
    def _all_shares(block: Block) -> list[Shares]:
        return [shares for _, shares in block.cycle] if block.cycle else [block.value]

    def at(self, tokens: int) -> dict[str, float]:
        """{objective: share of the rows} of the batch that comes after `tokens` tokens; the shares sum to 1."""
        block = self._blocks[bisect.bisect_right(self._begins, tokens) - 1]
        if not block.cycle:
            return dict(block.value)
        place = (tokens - block.begin) % block.cycle[-1][0]
        return dict(next(shares for end, shares in block.cycle if place < end))

    @property
    def masks(self) -> bool:
        """Whether some objective needs a mask rate."""
        return any(name in MASKED_OBJECTIVES for name in self.objectives)

    @property
    def is_constant(self) -> bool:
        """Whether every batch has the same shares."""
        return len({shares for block in self._blocks for shares in self._all_shares(block)}) == 1

    @property
    def is_single(self) -> bool:
        """Whether there is one objective from begin to end."""
        return len(self.objectives) == 1

    def joints(self, total: int) -> list[int]:
        """Token counts, 0 included, at which the value may change, below `total`; for pictures and sums."""
        found = {0}
        for block in self._blocks:
            end = total if block.end is None else min(block.end, total)
            found.add(min(block.begin, total))
            turn = block.begin
            while block.cycle and turn < end:
                found.update(turn + part for part, _ in block.cycle)
                turn += block.cycle[-1][0]
        return sorted(t for t in found if t < total)

    def plain(self) -> Any:
        """The schedule as plain data in tokens, for checkpoints and hashes: `parse(plain())` is equal to it."""
        if len(self._blocks) == 1 and self._blocks[0].end is None and not self._blocks[0].cycle:
            return _plain_shares(self._blocks[0].value)
        result = []
        for block in self._blocks:
            entry: dict[str, Any] = {} if block.end is None else {"until": block.end}
            if block.cycle:
                ends = [0, *(end for end, _ in block.cycle)]
                entry["cycle"] = [{"tokens": end - begin, "objective": _plain_shares(shares)}
                                  for begin, (end, shares) in zip(ends, block.cycle)]
            else:
                entry["objective"] = _plain_shares(block.value)
            result.append(entry)
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectiveSchedule) and self._blocks == other._blocks

    def __str__(self) -> str:
        return _describe(self.plain())


def _cycle(key: str, value: Any, total: int | None) -> tuple[tuple[int, Shares], ...]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or len(value) < 2:
        raise ValueError(f"{key}: {value!r} given; a list of at least two blocks {{tokens: ..., objective: ...}} is needed. "
                         "Correct it")
    blocks, end = [], 0
    for i, block in enumerate(value):
        if not isinstance(block, Mapping) or set(block) != {"tokens", "objective"}:
            raise ValueError(f"{key}[{i}]: {block!r} given; a block is {{tokens: ..., objective: ...}}. Correct it")
        length = parse_tokens(f"{key}[{i}].tokens", block["tokens"], total)
        if length < 1:
            raise ValueError(f"{key}[{i}].tokens: {block['tokens']!r} given; at least 1 token is needed. Correct it")
        end += length
        blocks.append((end, _shares(f"{key}[{i}].objective", block["objective"])))
    return tuple(blocks)


class MaskRate:
    """The share of tokens that mlm and mntp choose, at each token of a run: a constant, steps, or linear stretches."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._begins = [block.begin for block in self._blocks]

    @classmethod
    def parse(cls, value: Any, *, total: int | None = None, key: str = "mask_rate") -> MaskRate:
        """Reads the forms of the module docstring; also what `plain` gave.

        Raises:
            ValueError: a rate outside (0, 1] (a constant 0, which masks nothing, is possible), an unknown key, or segments
                with a gap, an overlap, or past the end of the run; it names the key and both values.
        """
        if not isinstance(value, Sequence) or isinstance(value, str):
            if value != 0 or isinstance(value, bool):
                _check_rate(key, value)
            return cls([Block(0, None, (float(value), float(value)))])
        blocks = []
        for i, (begin, end, segment) in enumerate(segments_of(key, value, total)):
            where = f"{key}[{i}]"
            check_segment_keys(where, segment, ("until", "rate", "from", "to"))
            given = set(segment) - {"until"}
            if given == {"rate"}:
                _check_rate(f"{where}.rate", segment["rate"])
                pair = (float(segment["rate"]), float(segment["rate"]))
            elif given == {"from", "to"}:
                for name in ("from", "to"):
                    _check_rate(f"{where}.{name}", segment[name])
                if end is None:
                    raise ValueError(f"{where}: a linear stretch without an end given; its `until` is needed where "
                                     "max_duration is not in tokens. Add it")
                pair = (float(segment["from"]), float(segment["to"]))
            else:
                raise ValueError(f"{where}: {dict(segment)} given; a segment has either rate, or from and to. Correct it")
            blocks.append(Block(begin, end, pair))
        return cls(blocks)

    def at(self, tokens: int) -> float:
        """The rate of the batch that comes after `tokens` tokens."""
        block = self._blocks[bisect.bisect_right(self._begins, tokens) - 1]
        first, last = block.value
        if first == last or block.end is None:
            return first
        # a batch may begin past the end of the run's tokens only by rounding; the rate then stays at its end
        return first + (last - first) * min(1.0, (tokens - block.begin) / (block.end - block.begin))

    @property
    def is_zero(self) -> bool:
        """Whether nothing is ever masked: the rate of clm."""
        return all(block.value == (0.0, 0.0) for block in self._blocks)

    @property
    def is_constant(self) -> bool:
        """Whether every batch has the same rate."""
        return len({rate for block in self._blocks for rate in block.value}) == 1

    def joints(self, total: int) -> list[int]:
        """Token counts, 0 included, at which the rate jumps or its slope changes, below `total`."""
        return [begin for begin in self._begins if begin < total]

    def plain(self) -> Any:
        """The rate as plain data in tokens, for checkpoints and hashes: `parse(plain())` is equal to it."""
        if len(self._blocks) == 1 and self._blocks[0].end is None:
            return self._blocks[0].value[0]
        result = []
        for block in self._blocks:
            first, last = block.value
            until = {} if block.end is None else {"until": block.end}
            result.append({**until, **({"rate": first} if first == last else {"from": first, "to": last})})
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskRate) and self._blocks == other._blocks

    def __str__(self) -> str:
        return _describe(self.plain())


def _check_rate(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{key}: {value!r} given; a share of the tokens above 0 and up to 1 is needed. The recipes "
                         "use 0.3, and 0.15 in decay")


def _describe(plain: Any) -> str:
    """A schedule in one line for people."""
    if isinstance(plain, Mapping):
        return " + ".join(f"{share:g} {name}" for name, share in plain.items())
    if not isinstance(plain, Iterable) or isinstance(plain, str):
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
    if not objective.masks and not mask_rate.is_zero:
        raise ValueError(f"{key}mask_rate: {mask_rate} given with objective: {objective}, which has no use for it; it must "
                         f"be 0 or absent. Set it to 0 (variables.mask_rate and variables.eval_mask_rate in the recipes), "
                         f"or train {' or '.join(MASKED_OBJECTIVES)}")
    if objective.masks and mask_rate.is_zero:
        raise ValueError(f"{key}mask_rate: {mask_rate} given with objective: {objective}; it must be above 0 and at most 1, "
                         "the share of tokens to predict. Set mask_rate (the recipes use 0.3, in the decay phase 0.15)")
