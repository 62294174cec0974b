"""Builds a mixture: datasets and token budgets to a manifest that points at their shards, without copying text.

A source's budget is filled with whole passes over its dataset, then with whole shards in a seeded order, then with
chunks of the next shard in a seeded order, to the nearest chunk. What is repeated is counted and stated; passes come
one after the other. The specification is YAML:

    phase: decay                  # a mixture of data_prep/sources.yaml ...
    scale: 0.001                  # ... of which this share is taken (or `tokens:` for a total; all without either)
    sets:                         # where each of its sources was converted to: folder (from this file) or URL
      arxiv: ../sets/arxiv
      dclm_dolmino: {set: "s3://bucket/web", source: dclm}    # only what that dataset calls dclm
    leave_out: [textbooks]        # sources of the phase that one does without; the others keep their budgets

or, without `phase`, a mixture of one's own: `sets: {wiki: {set: ../sets/wiki, tokens: 3000000000}}`.
Tokens are those of the datasets' manifests: BOS and EOS are not counted. `data/mixture.py` reads what is built.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from ettin_foundry.data.manifest import MANIFEST, open_plain
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.mixture import MIX_FORMAT, MIX_VERSION, chunk_permutation, name_word
from ettin_foundry.data.mixture import shared_identity
from ettin_foundry.data.shard_rows import raw_draws
from ettin_foundry.data.storage import is_url, join, open_storage
from ettin_foundry.version import __version__

CATALOGUE = Path(__file__).resolve().parents[2] / "data_prep" / "sources.yaml"
_SHARDS = 5  # first word of the seed: what the numbers are for, so that no two uses share a stream; chunks have 6
_MAX_TOKENIZER_BYTES = 64 << 20

_Tokens = Annotated[float, Field(gt=0, le=1e15)]
_Model = TypeVar("_Model", bound=BaseModel)


class _Entry(BaseModel, extra="forbid"):
    """Where a source's text is: a folder or URL of a dataset, what that calls the source, its budget without a phase."""

    set: str = Field(min_length=1)
    source: str | None = None
    tokens: _Tokens | None = None


class MixSpec(BaseModel, extra="forbid"):
    """A specification as it is written."""

    sets: dict[str, Annotated[_Entry, BeforeValidator(lambda entry: {"set": entry} if isinstance(entry, str) else entry)]]
    phase: str | None = None
    scale: Annotated[float, Field(gt=0, le=1000)] | None = None
    tokens: _Tokens | None = None
    leave_out: list[str] = []
    catalogue: str | None = None
    tolerance: Annotated[None, Field(description="a budget is met to the nearest chunk")] = None


class Catalogue(BaseModel):
    """data_prep/sources.yaml: facts of each source, and billions of tokens by phase and source."""

    sources: dict[str, dict[str, Any]]
    phases: dict[str, dict[str, Annotated[float, Field(gt=0, le=1e6)]]]


def read_yaml(path: Path, model: type[_Model]) -> _Model:
    """A YAML file as a checked record.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not YAML, or a key is unknown, missing or out of range.
    """
    try:
        return model.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split()):.200}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}, got "
                         f"{first['input']!r:.80}; possible keys are {', '.join(model.model_fields)}") from None


def budgets_of(spec: MixSpec, path: Path) -> tuple[dict[str, int], float | None]:
    """Source -> tokens of a specification at `path`, and the scale of its phase.

    Raises:
        ValueError: sources and phase do not fit together; names the key.
    """
    if spec.phase is None:
        for key in ("scale", "tokens", "leave_out", "catalogue"):
            if getattr(spec, key):
                raise ValueError(f"{path}: {key} must be left out without phase, where it has no effect")
        if missing := [name for name, entry in spec.sets.items() if entry.tokens is None]:
            raise ValueError(f"{path}: sets.{missing[0]} must be {{set: ..., tokens: ...}}; add tokens, or name a phase")
        return {name: max(1, round(entry.tokens or 0)) for name, entry in spec.sets.items()}, None
    phases = read_yaml(path.parent / spec.catalogue if spec.catalogue else CATALOGUE, Catalogue).phases
    if spec.phase not in phases:
        raise ValueError(f"{path}: phase must be one of {', '.join(phases)}, got {spec.phase!r}")
    wanted = phases[spec.phase]
    for key, names in (("sets", spec.sets), ("leave_out", spec.leave_out)):
        if unknown := [name for name in names if name not in wanted]:
            raise ValueError(f"{path}: {key} must name sources of phase {spec.phase} ({', '.join(wanted)}), got {unknown[0]!r}")
    if wrong := [name for name in wanted if (name in spec.sets) == (name in spec.leave_out)]:
        raise ValueError(f"{path}: each source of phase {spec.phase} must stand in either sets or leave_out; see "
                         f"{', '.join(wrong)}")
    if with_tokens := [name for name, entry in spec.sets.items() if entry.tokens is not None]:
        raise ValueError(f"{path}: sets.{with_tokens[0]}.tokens must be left out with phase, which has the budgets")
    if spec.scale is not None and spec.tokens is not None:
        raise ValueError(f"{path}: scale and tokens must not both be given")
    kept = {name: billions * 1e9 for name, billions in wanted.items() if name in spec.sets}
    scale = spec.scale or (spec.tokens / sum(kept.values()) if spec.tokens else 1.0)
    return {name: max(1, round(tokens * scale)) for name, tokens in kept.items()}, scale


class MixSummary(NamedTuple):
    """What was built: the folder, the manifest's facts of each source, chunks for validation."""

    out: Path
    sources: dict[str, dict[str, Any]]
    validation_chunks: int

    @property
    def tokens(self) -> int:
        return sum(facts["tokens"] for facts in self.sources.values())

    def __str__(self) -> str:
        width = max(map(len, self.sources))
        lines = [f"{name:<{width}}  {facts['tokens']:>17,} tokens  {facts['tokens'] / self.tokens:7.2%}  "
                 f"{facts['tokens'] / facts['wanted'] - 1:+.4%} of the budget  {facts['repeats']:.3f} passes"
                 for name, facts in self.sources.items()]
        return "\n".join([f"{self.out}: {self.tokens:,} tokens; {self.validation_chunks:,} chunks for validation", *lines])


@dataclass
class _Member:
    """One source while it is chosen: its dataset, those shards of it that are its own, what is taken of them."""

    name: str
    place: str
    data: MDSSplit
    shards: np.ndarray  # (S,) int64
    wanted: int | None = None  # tokens; None takes all
    runs: list[tuple[int, np.ndarray]] = field(default_factory=list)  # pass, whole shards
    parts: list[dict[str, Any]] = field(default_factory=list)

    def fill(self, seed: int) -> None:
        """Takes passes, shards and chunks until the budget is met to the nearest chunk.

        Raises:
            ValueError: the budget is less than half a chunk.
        """
        tokens = self.data.tokens[self.shards]
        passes, rest = divmod(int(tokens.sum()) if self.wanted is None else self.wanted, int(tokens.sum()))
        self.runs += [(number, self.shards) for number in range(passes)]
        order = np.argsort(raw_draws(len(tokens), _SHARDS, seed, name_word(self.name)), kind="stable")
        whole = int(np.searchsorted(np.cumsum(tokens[order]), rest, side="right"))
        if whole:
            self.runs.append((passes, np.sort(self.shards[order[:whole]])))
        if left := rest - int(tokens[order[:whole]].sum()):
            shard = int(self.shards[order[whole]])
            lengths = np.asarray(self.data.sample_lengths(shard), np.int64)
            chunks = chunk_permutation(seed, self.name, shard, len(lengths))
            before = np.concatenate([[0], np.cumsum(lengths[chunks])])  # tokens of the first n chunks
            first = int(np.argmin(np.abs(before - left)))
            counts = np.bincount(lengths[chunks[:first]])
            if first:
                self.parts.append({"pass": passes, "shard": shard, "first": first, "extra": [],
                                   "lengths": {str(n): int(counts[n]) for n in np.flatnonzero(counts)}})
        if not self.runs and not self.parts:
            raise ValueError(f"sets.{self.name}: its budget must be at least half a chunk, got {self.wanted} tokens")

    def facts(self) -> dict[str, Any]:
        """The source as the manifest states it; tokens without BOS and EOS."""
        whole = np.concatenate([np.zeros(0, np.int64), *(shards for _, shards in self.runs)]).astype(np.int64)
        lengths = [(int(length), count) for part in self.parts for length, count in part["lengths"].items()]
        chunks = int(self.data.samples[whole].sum()) + sum(count for _, count in lengths)
        tokens = int(self.data.tokens[whole].sum()) + sum(length * count for length, count in lengths)
        stated, names = self.data.manifest.get("sources") or {}, {self.data.sources[shard] for shard in self.shards}
        licences = {str(stated[name]["licence"]) for name in names if stated.get(name, {}).get("licence")}
        facts = {"chunks": chunks, "tokens": tokens, "licence": ", ".join(sorted(licences)) or None}
        if self.wanted is not None:
            available = int(self.data.tokens[self.shards].sum())
            facts |= {"wanted": self.wanted, "available": available, "repeats": round(tokens / available, 6)}
        return facts


def build_mix(spec: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 21) -> MixSummary:
    """Builds a mixture into OUT/tokenizer, OUT/train and OUT/validation (the validation splits of all its datasets).

    Args:
        spec: a YAML file, see above. out: folder to be made; must not exist, or be empty.
        seed: 0 to 2**32 - 1; of the choice of shards and chunks where a source is not taken whole.

    Raises:
        FileNotFoundError, ValueError: the specification or a dataset is wrong. FileExistsError: OUT holds something.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 to 2**32 - 1, got {seed}")
    if is_url(out):
        raise ValueError(f"out must be a local folder, got {out}; build the mixture here and copy the folder, which is small")
    target, path = Path(os.path.realpath(out)), Path(spec)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} must be a new or an empty folder; choose another, or remove it")
    written = read_yaml(path, MixSpec)
    budgets, scale = budgets_of(written, path)
    head = {"seed": seed, "phase": written.phase, "scale": scale}
    entries = {name: (place if is_url(place := written.sets[name].set) else os.path.realpath(path.parent / place),
                      written.sets[name].source) for name in budgets}
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:16]}.partial"
    partial.mkdir(parents=True)
    try:
        members = _open_members(entries, "train", partial)
        for member in members:
            member.wanted = budgets[member.name]
            member.fill(seed)
        sources = _write_split(partial, target, "train", members, head)
        rest = _open_members(entries, "validation", partial)
        for member in rest:
            member.fill(seed)
        held_out = _write_split(partial, target, "validation", rest, head) if rest else {}
        _copy_tokenizer(members[0].place, partial / "tokenizer")
        shutil.rmtree(partial / "cache", ignore_errors=True)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return MixSummary(target, sources, sum(facts["chunks"] for facts in held_out.values()))


def _open_members(entries: dict[str, tuple[str, str | None]], split: str, scratch: Path) -> list[_Member]:
    """The sources of a split with the shards that are theirs. Of validation, datasets without one are left out.

    Raises:
        FileNotFoundError, ValueError: a dataset is missing, has no such source, or differs from the first in
            tokenizer or chunk length.
    """
    opened: dict[str, MDSSplit] = {}
    members: list[_Member] = []
    for name, (place, source) in entries.items():
        if place not in opened:
            where = join(place, split)
            if not open_storage(where).exists(MANIFEST):
                if split == "validation":
                    continue
                raise FileNotFoundError(f"sets.{name}: {where} holds no {MANIFEST}; convert the dataset, or correct the path")
            opened[place] = MDSSplit(scratch / "cache" / f"{split}-{name_word(place)}", remote=where) if is_url(place) \
                else MDSSplit(where)
            _check_same(name, opened[place], *next(iter(opened.items())))
        data = opened[place]
        sources = np.array(data.sources)
        mine = np.flatnonzero(sources == source) if source else np.arange(data.num_shards)
        if split == "validation":  # a dataset behind two sources is evaluated on once
            for other in members:
                mine = np.setdiff1d(mine, other.shards) if other.place == place else mine
        elif not mine.size:
            raise ValueError(f"sets.{name}.source must be one of {', '.join(sorted(set(data.sources)))} of {place}, got "
                             f"{source!r}")
        if mine.size:
            members.append(_Member(name, place, data, mine))
    return members


def _check_same(name: str, data: MDSSplit, place: str, first: MDSSplit) -> None:
    for what, mine, other in zip(("chunk_length", "tokenizer"), shared_identity(data), shared_identity(first)):
        if mine != other:
            raise ValueError(f"sets.{name}: {data.local} has {what} {mine!r:.300}, {place} has {other!r:.300}; all datasets "
                             "of a mixture must have the same")


def _write_split(partial: Path, target: Path, split: str, members: list[_Member], head: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a split; the facts of its sources."""
    datasets = {member.place: member.data for member in members}
    number = {place: at for at, place in enumerate(datasets)}
    manifest = {
        "format": MIX_FORMAT, "version": MIX_VERSION, "split": split, **head,
        "chunk_length": members[0].data.chunk_length, "tokenizer": members[0].data.tokenizer, "code_version": __version__,
        "sets": [{"path": place if is_url(place) else os.path.relpath(place, target), "fingerprint": data.fingerprint}
                 for place, data in datasets.items()],
        "sources": (sources := {member.name: member.facts() for member in members}),
        "runs": [{"source": member.name, "set": number[member.place], "pass": passed, "shards": shards.tolist()}
                 for member in members for passed, shards in member.runs],
        "parts": [{"source": member.name, "set": number[member.place], **part} for member in members for part in member.parts],
        "totals": {key: sum(facts[of] for facts in sources.values()) for key, of in (("samples", "chunks"), ("tokens", "tokens"))},
    }
    (partial / split).mkdir()
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    (partial / split / MANIFEST).write_text(f"{{\n{lines}\n}}\n")
    return sources


def _copy_tokenizer(place: str, folder: Path) -> None:
    """Copies the plain files of a dataset's tokenizer folder.

    Raises:
        FileNotFoundError: the dataset has none. ValueError: a file of it is a link, or far too large.
    """
    storage = open_storage(place)
    names = [(name, size) for name, size in storage.list("tokenizer/") if name.count("/") == 1]
    if not names:
        raise FileNotFoundError(f"{join(place, 'tokenizer')} holds no file; put the dataset's own tokenizer back")
    folder.mkdir()
    for name, size in names:
        if size > _MAX_TOKENIZER_BYTES:
            raise ValueError(f"{join(place, name)} must have at most {_MAX_TOKENIZER_BYTES} bytes, got {size}")
        if storage.is_local:
            with open(open_plain(Path(place) / name), "rb") as stream:
                data = stream.read()
        else:
            data = storage.read_bytes(name)
        (folder / name.rpartition("/")[2]).write_bytes(data)
