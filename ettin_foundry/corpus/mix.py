"""Builds a mixture: a manifest that points at shards of datasets by token budgets, without copying text.

A budget is filled with whole passes over the source, then whole shards in a seeded order, to the nearest shard. Tokens
are counted without BOS and EOS. The specification is YAML: a phase of data_prep/sources.yaml (docs/data.md shows one),
or, without `phase`, one's own `sets: {wiki: {set: ../sets/wiki, tokens: 3000000000}}`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
import yaml
from pydantic import BaseModel, BeforeValidator, Field

from ettin_foundry import program_folder
from ettin_foundry.data import MANIFEST
from ettin_foundry.data.manifest import check_record, open_plain
from ettin_foundry.data.mixture import MIX_FORMAT, MIX_VERSION, shared_identity
from ettin_foundry.data.order import raw_draws
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import atomic_folder, is_url, join, open_storage
from ettin_foundry.version import __version__

_MAX_PASSES = 1000  # an entry each, for every shard
_SHARDS = 5  # first word of the seed: no two uses share a stream
_Tokens = Annotated[float, Field(gt=0, le=1e15)] | None


class Entry(BaseModel, extra="forbid"):
    """Where a source is: a dataset, alone or with the source's name there and a budget."""

    set: str = Field(pattern=r"^[^\x00]+$")  # folder, seen from the specification, or URL
    source: str | None = None  # what that dataset calls it, None: all of it
    tokens: _Tokens = None  # without a phase


def _entry(text: Any) -> Any:
    return {"set": text} if type(text) is str else text


class MixSpec(BaseModel, extra="forbid"):
    """A specification as it is written."""

    sets: Annotated[dict[str, Annotated[Entry, BeforeValidator(_entry)]], Field(min_length=1)]
    phase: str | None = None
    scale: Annotated[float, Field(gt=0, le=1000)] | None = None  # of the phase's tokens
    tokens: _Tokens = None  # in all, instead of a scale


def _read_spec(path: Path) -> MixSpec:
    """The specification in a YAML file; a ValueError names a key that is unknown, missing or out of range."""
    try:
        # every scalar as it is written: a source may be called 1, null, yes or 2024-01-01
        written = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split()):.200}") from None
    return check_record(MixSpec, written, path, advice=[f"keys are {', '.join(MixSpec.model_fields)}", "correct it"])


def _budgets_of(spec: MixSpec, path: Path) -> tuple[dict[str, int], float | None]:
    """Source -> tokens of a specification at `path`, and the scale of its phase."""
    own = {name: entry.tokens for name, entry in spec.sets.items()}
    if spec.phase is None:
        if spec.scale or spec.tokens or None in own.values():
            raise ValueError(f"{path}: without phase, sets must be {{NAME: {{set: ..., tokens: ...}}}}, alone")
        return {name: max(1, round(tokens or 0)) for name, tokens in own.items()}, None
    phases = yaml.safe_load((program_folder() / "data_prep" / "sources.yaml").read_text(encoding="utf-8"))["phases"]
    if (wanted := phases.get(spec.phase)) is None:
        raise ValueError(f"{path}: phase must be one of {', '.join(phases)}, got {spec.phase!r}")
    if wrong := spec.sets.keys() - wanted.keys():
        raise ValueError(f"{path}: sets must name sources of phase {spec.phase} ({', '.join(wanted)}), got "
                         f"{', '.join(sorted(wrong))}")
    if (spec.scale and spec.tokens) or any(own.values()):
        raise ValueError(f"{path}: with phase, scale or tokens may be given, not both, and no tokens in sets")
    kept = {name: billions * 1e9 for name, billions in wanted.items() if name in spec.sets}
    scale = spec.tokens / sum(kept.values()) if spec.tokens else spec.scale or 1.0
    return {name: max(1, round(tokens * scale)) for name, tokens in kept.items()}, scale


@dataclass
class _Member:
    """One source: its dataset, the shards that are its own, what is taken of them."""

    name: str
    place: str
    data: MDSSplit
    shards: np.ndarray  # (S,) int64
    runs: list[tuple[int, np.ndarray]] = field(default_factory=list)  # pass, whole shards
    wanted: int | None = None

    def fill(self, wanted: int, seed: int) -> None:
        """Takes passes and shards until a budget of tokens is met to the nearest shard."""
        tokens, self.wanted = self.data.tokens[self.shards], wanted
        passes, rest = divmod(wanted, int(tokens.sum()))
        if passes > _MAX_PASSES:
            raise ValueError(f"sets.{self.name}: must be at most {_MAX_PASSES} times {tokens.sum():,}, got {wanted:,}")
        self.runs += [(number, self.shards) for number in range(passes)]
        # by its name, so that a source's choice does not depend on which others there are
        words = _SHARDS, seed, xxhash.xxh32(self.name.encode(errors="surrogatepass")).intdigest()
        order = np.argsort(raw_draws(len(tokens), *words), kind="stable")
        if whole := int(np.argmin(np.abs(np.append(0, np.cumsum(tokens[order])) - rest))):
            self.runs.append((passes, np.sort(self.shards[order[:whole]])))
        if not self.runs:
            raise ValueError(f"sets.{self.name}: its budget must be half of a shard ({tokens[order[0]]:,} tokens) at "
                             f"least, got {wanted:,}; raise it, or convert the source with a smaller --shard-size")

    def facts(self) -> dict[str, Any]:
        """The source as the manifest states it; tokens without BOS and EOS."""
        data = self.data
        tokens, chunks = (sum(int(of[shards].sum()) for _, shards in self.runs) for of in (data.tokens, data.samples))
        stated = data.manifest.get("sources") or {}
        licences = {stated.get(data.sources[shard], {}).get("licence") for shard in self.shards} - {None, ""}
        facts = {"chunks": chunks, "tokens": tokens, "licence": ", ".join(sorted(map(str, licences))) or None}
        if self.wanted is not None:
            available = int(data.tokens[self.shards].sum())
            facts |= {"wanted": self.wanted, "available": available, "repeats": round(tokens / available, 6)}
        return facts


def build_mix(spec: str | os.PathLike[str], out: str | os.PathLike[str], *, seed: int = 21) -> list[str]:
    """Builds a mixture into OUT/tokenizer, OUT/train and OUT/validation; what is in it, in lines for people.

    `spec` is a YAML file, see above, `out` a new or empty local folder; `seed` chooses shards of sources in part.
    """
    target, path = Path(os.path.realpath(out)), Path(spec)
    if is_url(out):
        raise ValueError(f"out must be a local folder, got {out}; build it here, and copy it there")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} must be a new or an empty folder; choose another, or remove it")
    written = _read_spec(path)
    budgets, scale = _budgets_of(written, path)
    head = {"seed": seed, "phase": written.phase, "scale": scale}
    entries = {name: written.sets[name] for name in budgets}
    for entry in entries.values():
        entry.set = entry.set if is_url(entry.set) else os.path.realpath(path.parent / entry.set)
    with atomic_folder(target) as partial:
        members = _open_members(entries, "train", partial.parent)
        for member in members:
            member.fill(budgets[member.name], seed)
        sources = _write_split(partial / "train", target, members, head)
        if validation := _open_members(entries, "validation", partial.parent):
            for member in validation:
                member.runs.append((0, member.shards))
            _write_split(partial / "validation", target, validation, head)
        storage = open_storage(members[0].place)
        if not (files := storage.list("tokenizer/")):
            raise FileNotFoundError(f"{storage.where('tokenizer')} holds no file; put the original there")
        for name, _ in files:
            if storage.is_local:
                os.close(open_plain(Path(storage.url) / name))  # a link is an error
            storage.get_file(name, partial / name, at_most=64 << 20)
    total, width = sum(facts["tokens"] for facts in sources.values()), max(map(len, sources))
    chunks = sum(int(member.data.samples[member.shards].sum()) for member in validation)
    return [f"{target}: {total:,} tokens; {chunks:,} chunks for validation", *(
        f"{name:<{width}}  {facts['tokens']:>17,} tokens  {facts['tokens'] / total:7.2%}  "
        f"{facts['tokens'] / facts['wanted'] - 1:+.4%} of the budget  {facts['repeats']:.3f} passes"
        for name, facts in sources.items())]


def _open_members(entries: dict[str, Entry], split: str, scratch: Path) -> list[_Member]:
    """The sources of a split with the shards that are theirs; a dataset may have no validation."""
    opened: dict[str, MDSSplit] = {}
    members: list[_Member] = []
    for name, entry in entries.items():
        place, where = entry.set, join(entry.set, split)
        if place not in opened:
            if not open_storage(where).exists(MANIFEST):
                if split == "validation":
                    continue
                raise FileNotFoundError(f"sets.{name}: {where} holds no {MANIFEST}; correct the path")
            local = scratch / f"{split}-{len(opened)}"
            opened[place] = MDSSplit(local, remote=where) if is_url(place) else MDSSplit(where)
        data, first = opened[place], next(iter(opened))
        if (mine := shared_identity(data)) != (other := shared_identity(opened[first])):
            raise ValueError(f"sets.{name}: {where} must have the chunk length and tokenizer of {first}, got "
                             f"{mine!r:.300} and {other!r:.300}")
        own = np.flatnonzero([entry.source in (None, source) for source in data.sources])
        if split == "validation":  # a dataset behind two sources is evaluated on once
            for member in members:
                own = np.setdiff1d(own, member.shards) if member.place == place else own
        elif not own.size:
            raise ValueError(f"sets.{name}.source must be one of {sorted({*data.sources})}, got {entry.source!r}")
        if own.size:
            members.append(_Member(name, place, data, own))
    return members


def _write_split(folder: Path, target: Path, members: list[_Member], head: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Writes the manifest of the split `folder` of a mixture that will lie at `target`; the facts of its sources."""
    datasets = {member.place: member.data for member in members}
    at = {place: number for number, place in enumerate(datasets)}
    sources = {member.name: member.facts() for member in members}
    manifest = {
        "format": MIX_FORMAT, "version": MIX_VERSION, "split": folder.name, **head,
        "chunk_length": members[0].data.chunk_length, "tokenizer": members[0].data.tokenizer,
        "code_version": __version__,
        "sets": [{"path": place if is_url(place) else os.path.relpath(place, target), "fingerprint": data.fingerprint}
                 for place, data in datasets.items()],
        "sources": sources,
        "runs": [{"source": member.name, "set": at[member.place], "pass": passed, "shards": shards.tolist()}
                 for member in members for passed, shards in member.runs],
        "parts": [],  # a key of the format: chunks that were taken of a shard alone
        "totals": {"samples": sum(facts["chunks"] for facts in sources.values()),
                   "tokens": sum(facts["tokens"] for facts in sources.values())}}
    folder.mkdir(parents=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in manifest.items())
    (folder / MANIFEST).write_text(f"{{\n{lines}\n}}\n")
    return sources
