"""What a conversion is to do: its sources and its plan, held to what was begun in the same place before.

Until a first unit is finished everything may still change. After that, options never do, inputs only where no finished
unit was read, and sources only by `append`. Nothing is written here; convert.py does that when all is agreed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ettin_foundry.corpus.options import ConvertOptions
from ettin_foundry.corpus.sources import STDLIB, Source, find_source
from ettin_foundry.corpus.units import PLAN, Plan, Unit, add_sources, make_plan
from ettin_foundry.data.storage import Storage, is_url

__all__ = ["check_given", "check_place", "find_sources", "finished_units", "plan_conversion"]


def check_place(storage: Storage, options: ConvertOptions) -> None:
    """Refuses a place without a plan that holds something, or that `append` finds empty.

    Raises:
        FileExistsError, FileNotFoundError: what is there, or is not.
    """
    ours = ("tokenizer/", "work/")  # written before the plan
    found = [name for name, _ in storage.list() if not name.startswith(ours) and name != PLAN]
    if found:
        raise FileExistsError(f"--out {storage.url}: it holds {found[0]} and no {PLAN}, so no conversion was begun there; "
                              "nothing is ever written over. Name another folder, or remove this one")
    if options.append:
        raise FileNotFoundError(f"--append: given, but {storage.url} holds no set; a finished one is needed. Leave --append "
                                "out to start one")


def find_sources(options: ConvertOptions, plan: Plan | None) -> list[Source]:
    """The sources, with absolute places, so that workers elsewhere find them; hub datasets at the plan's revision.

    Raises:
        FileNotFoundError, ValueError: from `sources.find_source`; two of one name; OUT is inside one.
    """
    sources = [find_source(text, licence=options.licence) for text in options.sources]
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"sources: {', '.join(sorted(twice))} is the name of more than one source; each needs a name "
                         "of its own in the manifest. Write NAME=SOURCE")
    found = []
    for source in sources:
        _check_apart(source, options)
        then = plan.sources.get(source.name) if plan else None
        if then is not None and not source.files and source.location != STDLIB:
            source = replace(source, revision=then["revision"])
        root = source.root if is_url(source.root) else os.path.abspath(source.root)
        found.append(replace(source, root=root))
    return found


def _check_apart(source: Source, options: ConvertOptions) -> None:
    """OUT inside a source would be read as text by the next start."""
    out, location = os.fspath(options.out), source.location
    inside = (out.rstrip("/") + "/").startswith(location.rstrip("/") + "/") if is_url(location) or is_url(out) else \
        Path(location).is_dir() and Path(out).resolve().is_relative_to(Path(location).resolve())
    if inside:
        raise ValueError(f"--out: {out} lies in the source {location}, whose files are all read; a place outside of it is "
                         "needed. Name another --out")


def finished_units(storage: Storage) -> set[int]:
    """Numbers of the units that have a completion record."""
    return {int(Path(name).stem) for name, _ in storage.list("units/") if Path(name).stem.isdigit()}


def plan_conversion(options: ConvertOptions, plan: Plan | None, sources: Sequence[Source], *, record: Mapping[str, Any],
                    fingerprint: Mapping[str, Any], storage: Storage) -> Plan:
    """What is to be done; an earlier plan must agree with it in all that shapes the data.

    Args:
        plan: the one that was begun, or None. record: the options that shape the data. fingerprint: the tokenizer's.

    Raises:
        ValueError: it does not; names what differs, and both values.
    """
    finished = finished_units(storage)
    if plan is None or not (finished or options.append):
        return make_plan(sources, options=record, tokenizer=fingerprint)
    _check_options(plan, record, fingerprint, sources, options=options, storage=storage)
    names = [source.name for source in sources]
    if options.append:
        wanted = add_sources(_before(plan, names, finished, storage), sources)
    elif names != list(plan.sources):
        raise ValueError(f"sources: {', '.join(names)} given, but {storage.url} was begun with {', '.join(plan.sources)}; "
                         "they must be the same. Use --append with the new sources alone, or another --out")
    else:
        wanted = add_sources(Plan(plan.options, plan.tokenizer), sources)
    if options.filters.deduplicate:  # which copy stays depends on every document before it
        finished = set(range(min(len(plan.units), len(wanted.units)))) | finished
    _check_inputs(plan, wanted, finished)
    return wanted


def check_given(todo: Sequence[Unit], plan: Plan, sources: Sequence[Source], storage: Storage) -> None:
    """`append` needs the other sources to be finished, and says how to finish them.

    Raises:
        ValueError: a unit to do is of a source that was not given.
    """
    names = {source.name for source in sources}
    if others := [unit for unit in todo if unit.source not in names]:
        old = [name for name in plan.sources if name not in names]
        raise ValueError(f"--append: {storage.url} is not finished: {len(others)} of its units are not done, the first is "
                         f"{others[0].label}; a finished set is needed. Run the conversion of {', '.join(old)} again first, "
                         "without --append")


def _before(plan: Plan, names: Sequence[str], finished: set[int], storage: Storage) -> Plan:
    """The plan without the sources that are appended (again), and without later ones of which nothing was finished."""
    kept = [name for name in plan.sources if name not in names]
    while len(kept) > 1 and not any(unit.source == kept[-1] and unit.number in finished for unit in plan.units):
        kept.pop()
    if list(plan.sources)[:len(kept)] != kept:
        raise ValueError(f"--append: {', '.join(names)} given, but {storage.url} has its sources in the order "
                         f"{', '.join(plan.sources)}; only the last ones can be added again. Name new sources")
    units = tuple(unit for unit in plan.units if unit.source in kept)
    return Plan(plan.options, plan.tokenizer, {name: plan.sources[name] for name in kept}, units)


def _check_options(plan: Plan, record: Mapping[str, Any], fingerprint: Mapping[str, Any], sources: Sequence[Source], *,
                   options: ConvertOptions, storage: Storage) -> None:
    differing = [f"{key} ({plan.options.get(key)!r} then, {record.get(key)!r} now)" for key in {**plan.options, **record}
                 if plan.options.get(key) != record.get(key) and not (options.append and key == "train_tokenizer")]
    differing += [f"tokenizer {key} ({plan.tokenizer.get(key)} then, {fingerprint[key]} now)"
                  for key in ("vocab_size", "special_ids", "vocab_sha256", "probe_sha256")
                  if plan.tokenizer.get(key) != fingerprint[key]]
    differing += [f"{key} of {source.name} ({plan.sources[source.name][key]!r} then, {getattr(source, key)!r} now)"
                  for source in sources if source.name in plan.sources for key in ("licence", "revision")
                  if plan.sources[source.name][key] != getattr(source, key)]
    if differing:
        raise ValueError(f"--out {storage.url}: it was begun with other options: {'; '.join(differing)}. The options of a "
                         "set never change: give the same ones to go on, or another --out")


def _check_inputs(plan: Plan, wanted: Plan, finished: set[int]) -> None:
    """Inputs may have changed only where no finished unit was read."""
    for number in sorted(finished):
        then = plan.units[number] if number < len(plan.units) else None
        now = wanted.units[number] if number < len(wanted.units) else None
        if then != now:
            what = now if then is None else then
            changed = [part.file for part, size in zip(then.parts, then.sizes)
                       if now is None or (part, size) not in zip(now.parts, now.sizes)] if then else []
            raise ValueError(f"{what.label if what else number}: the input was changed after it was converted"
                             f"{' (' + changed[0] + ')' if changed else ''}; finished units keep their input. Restore the "
                             "files as they were, or convert into another --out")
