"""What a mixture is to be: the YAML specification, and the catalogue of corpora and phases that it may refer to.

data_prep/sources.yaml states which source gives how many tokens to which phase; a specification names a phase and where
each of its sources was converted to, or gives budgets of its own. Both are checked in full before any set is opened.
mix.py describes the specification and builds from it.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.data.storage import is_url

__all__ = ["CATALOGUE", "MixSpec", "SetEntry", "read_catalogue", "read_spec"]

CATALOGUE = Path(__file__).resolve().parents[2] / "data_prep" / "sources.yaml"
_KEYS = ("phase", "scale", "tokens", "sets", "leave_out", "tolerance", "catalogue")
_ENTRY_KEYS = ("set", "source", "tokens")
_TOLERANCE = 0.001
_MOST_TOKENS = 10**15


@dataclass(frozen=True)
class SetEntry:
    """Where a source's text is.

    Attributes:
        place: absolute folder, or URL, of a converted set.
        source: what the set calls it; None takes the whole set.
    """

    place: str
    source: str | None


@dataclass(frozen=True)
class MixSpec:
    """A checked specification; `sets` and `budgets` (tokens) have the same names in the same order."""

    sets: dict[str, SetEntry]
    budgets: dict[str, int]
    phase: str | None
    scale: float | None
    tolerance: float


def read_spec(path: Path) -> MixSpec:
    """Reads a specification.

    Raises:
        FileNotFoundError: it, or the catalogue that it needs, is missing. ValueError: a key is unknown, missing, out of
            range or without effect; names the key.
    """
    spec = _load(path, "a specification of a mixture")
    _known(spec, _KEYS, str(path))
    entries = spec.get("sets")
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries):
        raise ValueError(f"{path}: sets: {entries!r:.80} given; at least one `name: folder or URL of a converted set` is "
                         "needed. Add it")
    sets = {name: _entry(f"{path}: sets.{name}", entry, path.parent) for name, entry in entries.items()}
    tolerance = _number(f"{path}: tolerance", spec.get("tolerance", _TOLERANCE), most=0.1)
    if spec.get("phase") is None:
        for key in ("scale", "tokens", "leave_out", "catalogue"):
            if spec.get(key) is not None:
                raise ValueError(f"{path}: {key}: {spec[key]!r:.80} given without phase, where it has no effect; it is "
                                 "allowed with phase. Remove it, or name a phase")
        budgets = {name: _own_budget(f"{path}: sets.{name}", entries[name]) for name in sets}
        return MixSpec(sets, budgets, None, None, tolerance)
    budgets, scale = _phase_budgets(path, spec, sets)
    return MixSpec({name: sets[name] for name in budgets}, budgets, spec["phase"], scale, tolerance)


def read_catalogue(path: Path = CATALOGUE) -> dict[str, Any]:
    """The catalogue: `sources` (name -> facts) and `phases` (name -> {source: billions of tokens}).

    Raises:
        FileNotFoundError: there is none. ValueError: a phase names an unknown source, or gives no positive number.
    """
    catalogue = _load(path, "a catalogue such as data_prep/sources.yaml")
    sources, phases = catalogue.get("sources"), catalogue.get("phases")
    if not isinstance(sources, dict) or not isinstance(phases, dict):
        raise ValueError(f"{path}: has keys {list(catalogue)}; sources and phases, each a mapping, are needed. Correct it")
    for phase, budgets in phases.items():
        _known(budgets if isinstance(budgets, dict) else {}, sources, f"{path}: phases.{phase}")
        if not isinstance(budgets, dict) or not budgets:
            raise ValueError(f"{path}: phases.{phase}: {budgets!r:.80} given; `source: billions of tokens` is needed. "
                             "Correct it")
        for name, billions in budgets.items():
            _number(f"{path}: phases.{phase}.{name}", billions, most=_MOST_TOKENS / 1e9)
    return catalogue


def _phase_budgets(path: Path, spec: dict[str, Any], sets: dict[str, SetEntry]) -> tuple[dict[str, int], float]:
    """Tokens per source of a phase, after scaling, and the scale."""
    given = spec.get("catalogue")
    phases = read_catalogue(CATALOGUE if given is None else path.parent / str(given))["phases"]
    _known([spec["phase"]], phases, f"{path}: phase")
    wanted = {name: billions * 1e9 for name, billions in phases[spec["phase"]].items()}
    left_out = spec.get("leave_out") or []
    if not isinstance(left_out, list):
        raise ValueError(f"{path}: leave_out: {left_out!r:.80} given; a list of sources is needed. Correct it")
    _known(sets, wanted, f"{path}: sets, for phase {spec['phase']}")
    _known(left_out, wanted, f"{path}: leave_out, for phase {spec['phase']}")
    if both := sorted(set(left_out) & set(sets)):
        raise ValueError(f"{path}: {both[0]} stands in sets and in leave_out; a source is taken or left out. Remove one")
    if missing := [name for name in wanted if name not in sets and name not in left_out]:
        raise ValueError(f"{path}: sets: nothing given for {', '.join(missing)}; phase {spec['phase']} needs every source. "
                         "Add where its set lies, or name it in leave_out")
    for name, entry in spec["sets"].items():
        if isinstance(entry, dict) and "tokens" in entry:
            raise ValueError(f"{path}: sets.{name}.tokens: {entry['tokens']!r} given with phase, which has the budgets; it "
                             "is allowed without phase. Remove it")
    kept = {name: tokens for name, tokens in wanted.items() if name in sets}
    if spec.get("scale") is not None and spec.get("tokens") is not None:
        raise ValueError(f"{path}: scale: {spec['scale']!r} and tokens: {spec['tokens']!r} given; one of them is possible. "
                         "Remove one")
    scale = 1.0 if spec.get("scale") is None else _number(f"{path}: scale", spec["scale"], most=1000)
    if spec.get("tokens") is not None:
        scale = _number(f"{path}: tokens", spec["tokens"], most=_MOST_TOKENS) / sum(kept.values())
    return {name: max(1, round(tokens * scale)) for name, tokens in kept.items()}, scale


def _entry(where: str, entry: Any, folder: Path) -> SetEntry:
    if isinstance(entry, str):
        entry = {"set": entry}
    _known(entry if isinstance(entry, dict) else {}, _ENTRY_KEYS, where)
    place = entry.get("set") if isinstance(entry, dict) else None
    source = entry.get("source") if isinstance(entry, dict) else None
    if not isinstance(place, str) or not place or not isinstance(source, str | None):
        raise ValueError(f"{where}: {entry!r:.200} given; a folder or URL of a converted set is needed, or "
                         "{set: folder or URL, source: name in that set}. Correct it")
    return SetEntry(place if is_url(place) else os.path.realpath(folder / place), source)


def _own_budget(where: str, entry: Any) -> int:
    if not isinstance(entry, dict) or entry.get("tokens") is None:
        raise ValueError(f"{where}: {entry!r:.200} given without phase; {{set: ..., tokens: ...}} is needed. Add tokens, or "
                         "name a phase")
    return max(1, round(_number(f"{where}.tokens", entry["tokens"], most=_MOST_TOKENS)))


def _number(where: str, value: Any, *, most: float) -> float:
    """A positive number; YAML reads 3e9 as text, so that is understood too."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number <= most:
        raise ValueError(f"{where}: {value!r:.80} given; a number above 0 and at most {most:g} is needed. Correct it")
    return number


def _known(given: Collection[Any], allowed: Collection[str], where: str) -> None:
    for name in given:
        if not isinstance(name, str) or name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, 1)
            raise ValueError(f"{where}: {name!r} given; possible are {', '.join(map(str, allowed))}. "
                             + (f"Did you mean {near[0]}?" if near else "Correct or remove it"))


def _load(path: Path, what: str) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {what} is needed. Correct the path") from None
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: is not YAML ({error!s:.200}); {what} is needed. Correct it") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds {type(loaded).__name__}; {what}, a mapping, is needed. Correct it")
    return loaded
