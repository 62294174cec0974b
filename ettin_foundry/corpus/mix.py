"""Builds a mixture: converted sets and token budgets to a manifest that points at shards, without copying text.

A source's budget is filled with whole passes over its set, then with whole shards in a seeded order, then with chunks of
the next shard in a seeded order, the last of them chosen so that their lengths sum to what is still missing. So a budget
is met to the token where there are chunks of different lengths, else to within a chunk; more than the tolerance (0.1%)
away is an error. What is repeated is counted and stated. The order spreads every source evenly over an epoch
(interleave.py), and passes come one after the other (order.py).

The specification is YAML:

    phase: decay                  # a mixture of data_prep/sources.yaml ...
    scale: 0.001                  # ... of which this share is taken (or `tokens:` for a total; all, if neither is given)
    sets:                         # where each of its sources was converted to: folder (relative to this file) or URL
      arxiv: ../sets/arxiv
      dclm_dolmino: {set: "s3://bucket/web", source: dclm}    # only what that set calls dclm
    leave_out: [textbooks]        # sources of the phase that one does without; the others keep their budgets

or, without `phase`, a mixture of one's own: `sets: {wiki: {set: ../sets/wiki, tokens: 3000000000}}`.
Tokens are those of the sets' manifests: BOS and EOS are not counted. Reading a mixture is mix_set.py's work.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.corpus.mix_spec import MixSpec, read_spec
from ettin_foundry.data.manifest import MANIFEST, open_plain
from ettin_foundry.data.mixture import (
    MIX_FORMAT,
    MIX_VERSION,
    MixtureSplit,
    chunk_permutation,
    name_word,
    open_split,
    shared_identity,
)
from ettin_foundry.data.order import raw_draws
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import is_url, join, open_storage
from ettin_foundry.version import __version__

__all__ = ["MixtureSplit", "MixSummary", "SourceShare", "build_mix", "open_split"]

_SHARDS = 5  # first word of the seed: what the numbers are for, so that no two uses share a stream; mix_manifest.py has 6
_END = 64  # chunks of which those are taken that fill the end of a budget best
_LARGEST_TOKENIZER_FILE = 64 << 20


@dataclass(frozen=True)
class SourceShare:
    """What one source gives to a mixture, in tokens without BOS and EOS."""

    wanted: int
    tokens: int
    chunks: int
    available: int
    """Tokens of the source's set, once."""
    licence: str | None = None

    @property
    def repeats(self) -> float:
        """Passes over what is available; above 1 text is repeated."""
        return self.tokens / self.available


@dataclass(frozen=True)
class MixSummary:
    """What was built."""

    out: Path
    sources: dict[str, SourceShare]
    validation_chunks: int

    @property
    def tokens(self) -> int:
        return sum(share.tokens for share in self.sources.values())

    def __str__(self) -> str:
        width = max(map(len, self.sources))
        lines = [f"{name:<{width}}  {share.tokens:>17,} tokens  {share.tokens / self.tokens:7.2%}  "
                 f"{share.tokens / share.wanted - 1:+.4%} of the budget  {share.repeats:.3f} passes"
                 for name, share in self.sources.items()]
        return "\n".join([f"{self.out}: {self.tokens:,} tokens; {self.validation_chunks:,} chunks for validation", *lines])


@dataclass
class _Member:
    """One source while it is chosen."""

    name: str
    place: str  # of its set
    data: MDSSplit
    shards: np.ndarray  # (S,) int64: those of the set that are its own
    licence: str | None
    runs: list[tuple[int, np.ndarray]] = field(default_factory=list)  # pass, whole shards
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def available(self) -> int:
        return int(self.data.tokens[self.shards].sum())

    @property
    def chunks(self) -> int:
        return sum(int(self.data.samples[shards].sum()) for _, shards in self.runs) + sum(
            sum(part["lengths"].values()) for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(int(self.data.tokens[shards].sum()) for _, shards in self.runs) + sum(
            int(length) * count for part in self.parts for length, count in part["lengths"].items())


def build_mix(spec: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 21) -> MixSummary:
    """Builds a mixture into OUT/tokenizer, OUT/train and OUT/validation (the validation splits of all its sets).

    Args:
        spec: a YAML file, see above.
        out: folder to be made; must not exist, or be empty.
        seed: 0 to 2**32 - 1; of the choice of shards and chunks where a source is not taken whole.

    Raises:
        FileNotFoundError, ValueError: the specification or a set is wrong, or a budget cannot be met within the tolerance.
        FileExistsError: OUT holds something.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed!r} given; a whole number from 0 to 2**32 - 1 is needed. Correct it")
    target = _check_out(out)
    wanted = read_spec(Path(spec))
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:16]}.partial"
    partial.mkdir(parents=True)
    try:
        members = _open_members(wanted, "train", partial)
        for member in members:
            _fill(member, wanted.budgets[member.name], seed, wanted.tolerance)
        shares = {member.name: SourceShare(wanted.budgets[member.name], member.tokens, member.chunks, member.available,
                                           member.licence) for member in members}
        _write_split(partial, target, "train", members, wanted, seed)
        rest = _open_members(wanted, "validation", partial)
        for member in rest:
            member.runs.append((0, member.shards))
        if rest:
            _write_split(partial, target, "validation", rest, wanted, seed)
        _copy_tokenizer(members[0].place, partial / "tokenizer")
        shutil.rmtree(partial / "cache", ignore_errors=True)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return MixSummary(target, shares, sum(member.chunks for member in rest))


def _check_out(out: str | os.PathLike[str]) -> Path:
    if is_url(os.fspath(out)):
        raise ValueError(f"out: {os.fspath(out)} given; a local folder is needed. A mixture is a few small files: build it "
                         "here and copy the folder")
    target = Path(os.path.realpath(out))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists; a mixture goes into a new or an empty folder. Choose another, or remove "
                              "it")
    return target


def _open_members(spec: MixSpec, split: str, scratch: Path) -> list[_Member]:
    """The sources of a split with the shards that are theirs. Of validation, sets without one are left out.

    Raises:
        FileNotFoundError, ValueError: a set is missing or not one, has no such source, or differs from the first in
            tokenizer or chunk length.
    """
    opened: dict[str, MDSSplit] = {}
    members: list[_Member] = []
    for name, entry in spec.sets.items():
        if entry.place not in opened:
            data = _open(name, entry.place, split, scratch)
            if data is None:
                continue
            opened[entry.place] = data
            _check_same(name, data, *next(iter(opened.items())))
        data = opened[entry.place]
        sources = np.array(data.sources)
        mine = np.flatnonzero(sources == entry.source) if entry.source else np.arange(data.num_shards)
        if split == "validation":  # a set behind two sources is evaluated on once
            taken = [member.shards for member in members if member.place == entry.place]
            mine = np.setdiff1d(mine, np.concatenate(taken)) if taken else mine
        elif not mine.size:
            raise ValueError(f"sets.{name}: source: {entry.source!r} given; the set {entry.place} holds "
                             f"{', '.join(map(repr, sorted(set(data.sources))))}. Correct the name, or leave it out for all")
        if mine.size:
            members.append(_Member(name, entry.place, data, mine, _licences(data, set(sources[mine].tolist()))))
    return members


def _licences(data: MDSSplit, names: set[str]) -> str | None:
    stated = data.manifest.get("sources") or {}
    found = {str(stated[name]["licence"]) for name in names if stated.get(name, {}).get("licence")}
    return ", ".join(sorted(found)) or None


def _open(name: str, place: str, split: str, scratch: Path) -> MDSSplit | None:
    where = join(place, split)
    if not open_storage(where).exists(MANIFEST):
        if split != "train":
            return None
        raise FileNotFoundError(f"sets.{name}: {place} given; {where} holds no {MANIFEST}. A set converted by "
                                "data_prep/convert.py is needed: convert it, or correct the path")
    if is_url(place):
        return MDSSplit(scratch / "cache" / f"{split}-{name_word(place)}", remote=where)
    return MDSSplit(where)


def _check_same(name: str, data: MDSSplit, place: str, first: MDSSplit) -> None:
    for what, mine, other in zip(("chunk_length", "tokenizer"), shared_identity(data), shared_identity(first)):
        if mine != other:
            raise ValueError(f"sets.{name}: {data.local} has {what} {mine!r:.300}, {place} has {other!r:.300}; all sets of "
                             "a mixture must have the same. Convert one of them again with the other's")


def _fill(member: _Member, wanted: int, seed: int, tolerance: float) -> None:
    """Takes passes, shards and chunks until the budget is met.

    Raises:
        ValueError: whole chunks come no nearer to the budget than the tolerance allows.
    """
    tokens = member.data.tokens[member.shards]
    passes, rest = divmod(wanted, member.available)
    member.runs += [(number, member.shards) for number in range(passes)]
    order = np.argsort(raw_draws(len(tokens), _SHARDS, seed, name_word(member.name)), kind="stable")
    whole = int(np.searchsorted(np.cumsum(tokens[order]), rest, side="right"))
    if whole:
        member.runs.append((passes, np.sort(member.shards[order[:whole]])))
    left = rest - int(tokens[order[:whole]].sum())
    if left:
        left -= _fill_part(member, int(member.shards[order[whole]]), left, passes, seed)
    if abs(left) > tolerance * wanted:
        raise ValueError(f"sets.{member.name}: a budget of {wanted:,} tokens given; whole chunks meet it only to within "
                         f"{abs(left):,} tokens, more than the tolerance of {tolerance:.3%}. Raise the budget (scale or "
                         "tokens), or the tolerance")


def _fill_part(member: _Member, shard: int, left: int, passed: int, seed: int) -> int:
    """Takes chunks of one shard: the first of a permutation, and for the end of the budget those of the next that fit best.

    Returns:
        Their tokens, `left` or as near to it as they come.
    """
    lengths = np.asarray(member.data.sample_lengths(shard), np.int64)
    order = chunk_permutation(seed, member.name, shard, len(lengths))
    before = np.concatenate([[0], np.cumsum(lengths[order])])
    first = max(0, int(np.searchsorted(before, left, side="right")) - 1 - _END // 4)
    rest = order[first:first + _END]
    extra = sorted(rest[_nearest_sum(lengths[rest].tolist(), left - int(before[first]))].tolist())
    chosen = np.append(order[:first], extra).astype(np.int64)
    if not chosen.size:
        return 0
    counts = np.bincount(lengths[chosen])
    member.parts.append({"pass": passed, "shard": shard, "first": first, "extra": extra,
                         "lengths": {str(n): int(counts[n]) for n in np.flatnonzero(counts)}})
    return int(lengths[chosen].sum())


def _nearest_sum(numbers: list[int], wanted: int) -> list[int]:
    """Positions of numbers whose sum is as near to `wanted` as possible, the earliest that give that sum."""
    most = (1 << (wanted + max(numbers, default=0) + 1)) - 1
    sums = [1]  # bit n of sums[i]: some of the first i numbers sum to n
    for number in numbers:
        sums.append((sums[-1] | sums[-1] << number) & most)
    rest = next(value for off in range(wanted + 1) for value in (wanted - off, wanted + off) if sums[-1] >> value & 1)
    chosen = []
    for position in reversed(range(len(numbers))):
        if not sums[position] >> rest & 1:
            chosen.append(position)
            rest -= numbers[position]
    return chosen[::-1]


def _write_split(partial: Path, target: Path, split: str, members: list[_Member], spec: MixSpec, seed: int) -> None:
    sets = {member.place: member.data for member in members}
    number = {place: at for at, place in enumerate(sets)}
    manifest = {
        "format": MIX_FORMAT, "version": MIX_VERSION, "split": split, "seed": seed, "phase": spec.phase,
        "scale": spec.scale, "chunk_length": members[0].data.chunk_length, "tokenizer": members[0].data.tokenizer,
        "code_version": __version__,
        "sets": [{"path": place if is_url(place) else os.path.relpath(place, target), "fingerprint": data.fingerprint}
                 for place, data in sets.items()],
        "sources": {member.name: _facts(member, spec, split) for member in members},
        "runs": [{"source": member.name, "set": number[member.place], "pass": passed, "shards": shards.tolist()}
                 for member in members for passed, shards in member.runs],
        "parts": [{"source": member.name, "set": number[member.place], **part}
                  for member in members for part in member.parts],
        "totals": {"samples": sum(member.chunks for member in members), "tokens": sum(member.tokens for member in members)},
    }
    (partial / split).mkdir()
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    (partial / split / MANIFEST).write_text(f"{{\n{lines}\n}}\n")


def _facts(member: _Member, spec: MixSpec, split: str) -> dict[str, Any]:
    """A source as the manifest states it; tokens without BOS and EOS."""
    facts = {"chunks": member.chunks, "tokens": member.tokens, "licence": member.licence}
    if split == "train":
        facts |= {"wanted": spec.budgets[member.name], "available": member.available,
                  "repeats": round(member.tokens / member.available, 6)}
    return facts


def _copy_tokenizer(place: str, folder: Path) -> None:
    """Copies the plain files of a set's tokenizer folder.

    Raises:
        FileNotFoundError: the set has none. ValueError: a file of it is a link, or far too large.
    """
    storage = open_storage(place)
    names = [name for name, _ in storage.list("tokenizer/") if name.count("/") == 1]
    if not names:
        raise FileNotFoundError(f"{join(place, 'tokenizer')}: holds no file; the tokenizer that the set was converted with "
                                "is needed. Put it back into the set")
    folder.mkdir()
    for name in names:
        if storage.size(name) > _LARGEST_TOKENIZER_FILE:
            raise ValueError(f"{join(place, name)}: has {storage.size(name)} bytes; a file of a tokenizer has at most "
                             f"{_LARGEST_TOKENIZER_FILE}. Put the set's own tokenizer back")
        if storage.is_local:
            with open(open_plain(Path(place) / name), "rb") as stream:
                data = stream.read()
        else:
            data = storage.read_bytes(name)
        (folder / name.rpartition("/")[2]).write_bytes(data)
