"""Whether two runs are a fair pair, and whether a phase may follow another.

A fair pair reads the same rows in the same order at the same sizes and schedule, and differs only where the objectives
demand it. What a difference in a key means stands in `RULES`; a key that no rule names must be equal.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ettin_foundry.data.inspect import table
from ettin_foundry.data.mixture import open_split
from ettin_foundry.objectives.schedule import MASKED_OBJECTIVES
from ettin_foundry.training.run_config import NO_EFFECT, model_config, settings
from ettin_foundry.training.sources import STARTS, compare, record_of
from ettin_foundry.training.steps import read_steps

UNFAIR, HARMLESS, OBJECTIVE = VERDICTS = "unfair", "harmless", "objective"
_WIDEST = 48


class Difference(NamedTuple):
    """One key in which two runs differ."""

    key: str
    a: Any
    b: Any
    verdict: str
    reason: str


class Report(NamedTuple):
    """Every difference, and notes about what could not be compared."""

    names: tuple[str, str]
    differences: list[Difference]
    notes: list[str]

    @property
    def fair(self) -> bool:
        return not any(d.verdict == UNFAIR for d in self.differences)

    def __str__(self) -> str:
        """A table, unfair differences first, then the notes, then one line with the verdict."""
        found = sorted(self.differences, key=lambda d: (VERDICTS.index(d.verdict), d.key))
        heads = "verdict", "key", *(f"{side}: {name}" for side, name in zip("ab", self.names)), "why"
        rows = [(d.verdict, d.key, str(d.a)[:_WIDEST], str(d.b)[:_WIDEST], d.reason) for d in found]
        lines = [*table([dict(zip(heads, row)) for row in rows], left=5), *(f"note: {note}" for note in self.notes)]
        if unfair := [d.key for d in found if d.verdict == UNFAIR]:
            return "\n".join([*lines, f"unfair pair, because of {', '.join(unfair)}"])
        counts = Counter(d.verdict for d in found)
        summary = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
        return "\n".join([*lines, f"fair pair: {summary or 'no difference'}"])


class Settings(dict[str, Any]):
    """`run_config.settings` of a resolved config that `checks.check_settings` accepts."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__(settings(cfg))
        self.config = model_config(cfg)


def _data_of(run: Settings, key: str) -> tuple[str, str | None, dict[str, Any] | None]:
    """(place, fingerprint, tokenizer) of a loader's dataset, by its key; the last two None without its manifest."""
    local, split, remote = (run.get(f"{key}.{name}") for name in ("local", "split", "remote"))
    place = f"{remote or local}/{split}"
    try:
        facts = open_split(Path(str(local), str(split)))
    except OSError:
        return place, None, None
    return place, facts.fingerprint, {name: value for name, value in facts.tokenizer.items() if name != "name"}


class Rule(NamedTuple):
    """What a difference in the keys that a pattern matches means, if a condition on both runs holds."""

    keys: str
    verdict: str
    reason: str
    condition: Callable[[Settings, Settings, str], bool] = lambda a, b, key: True


def _one_masks(a: Settings, b: Settings, key: str) -> bool:
    objectives = [str(run.get(key.replace("mask_rate", "objective"), run.get("model.objective"))) for run in (a, b)]
    return not all(any(name in objective for name in MASKED_OBJECTIVES) for objective in objectives)


def _usual_windows(a: Settings, b: Settings, key: str) -> bool:
    usual = [run.config.window_left == dataclasses.replace(run.config, window_left=-1).window_left for run in (a, b)]
    return a.config.causal != b.config.causal and all(usual)


_LOADER = r"(train_loader|eval_loader(\[.*?\])?)"
RULES = (
    Rule(rf"(model|{_LOADER})\.objective", OBJECTIVE, "what a pair is for",
         lambda a, b, key: a.get("model.objective") != b.get("model.objective")),
    Rule(rf"{_LOADER}\.mask_rate", OBJECTIVE, "only one member masks", _one_masks),
    Rule(r"model\.window_left", OBJECTIVE, "transformers lets an encoder see half of local_attention to the left, a "
         "decoder one token less", _usual_windows),
    Rule("run_name|save_folder", HARMLESS, "names the run"),
    Rule(r"load_path|callbacks\.ettin_(phase|cross)\.source", HARMLESS, "each run continues its own checkpoint",
         lambda a, b, key: key in a and key in b),
    Rule("device_train_microbatch_size", HARMLESS, "every target of a step weighs the same, whatever the microbatch",
         lambda a, b, key: all(run.get("accumulate_train_batch_on_tokens") for run in (a, b))),
    Rule("device_eval_batch_size", HARMLESS, "metrics are sums over targets, whatever the batch",
         lambda a, b, key: all(run.get("eval_subset_num_batches") == -1 for run in (a, b))),
    *(Rule(keys, HARMLESS, reason) for keys, reason in NO_EFFECT.items()),
    Rule(rf"{_LOADER}\.(shuffle|shuffle_seed|shuffle_window|packing)|global_train_batch_size|max_duration|"
         r"train_loader\.batch_size_warmup.*|(.*\.)?max_seq_len", UNFAIR,
         "the members would not read the same rows in the same steps"),
    Rule("eval_loader.*|eval_subset_num_batches|device_eval_batch_size", UNFAIR,
         "the members' validation losses could not be compared"),
    Rule(r"model\..*", UNFAIR, "the members would differ in more than their attention mask"),
    Rule(r"load_.*|callbacks\.ettin_(phase|cross).*|seed", UNFAIR, "the members would not begin alike"),
    Rule(".*", UNFAIR, "the members would be trained another way, for all that is known of it"),
)
"""The first rule whose pattern matches the whole key, and whose condition holds, gives the verdict."""


def lint_pair(a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str] = ("a", "b")) -> Report:
    """Compares two resolved configs that `checks.check_settings` accepts as the members of a pair.

    Datasets are compared by their fingerprints where their manifests are on this machine, else by their paths, which a
    note says; a ValueError for a broken manifest.
    """
    first, second = Settings(a), Settings(b)
    found, notes = _compare_data(first, second)
    compared = re.compile("|".join([rf"{_LOADER}\.dataset\.(local|split|remote)", *(re.escape(d.key) for d in found)]))
    for key in dict.fromkeys([*first, *second]):
        one, other = (run.get(key, "absent") for run in (first, second))
        if (one != other or isinstance(one, bool) != isinstance(other, bool)) and not compared.fullmatch(key):
            rule = next(rule for rule in RULES if re.fullmatch(rule.keys, key) and rule.condition(first, second, key))
            found.append(Difference(key, one, other, rule.verdict, rule.reason))
    return Report(names, found, notes)


def _compare_data(a: Settings, b: Settings) -> tuple[list[Difference], list[str]]:
    """Differences of the datasets that the loaders read, and notes on how they were compared."""
    found, notes = [], []
    for key in dict.fromkeys(key.removesuffix(".local") for key in a if key.endswith(".dataset.local")):
        if f"{key}.local" not in b:
            continue  # the loader itself is a difference
        (place, mark, _), (other, other_mark, _) = _data_of(a, key), _data_of(b, key)
        if mark and other_mark and mark != other_mark:
            found.append(Difference(key, mark[:12], other_mark[:12], UNFAIR, "not the same text (fingerprints)"))
        elif mark and other_mark and place != other:
            found.append(Difference(key, place, other, HARMLESS, "copies of one dataset, by fingerprint"))
        elif place != other:
            found.append(Difference(key, place, other, UNFAIR,
                                    "other folders, whose manifests are not both on this machine"))
        elif not mark:
            notes.append(f"{key}: {place} is not on this machine, so only its path was compared")
    return found, notes


def compare_steps(first: Path, second: Path) -> int | None:
    """The first step at which two runs, by their logs, did not read the same rows (or only one did); None without."""
    for pair in itertools.zip_longest(read_steps(first), read_steps(second), fillvalue={}):
        if any(pair[0].get(key) != pair[1].get(key) for key in ("step", "tokens", "rows", "ids_hash")):
            return min(step["step"] for step in pair if step)
    return None


def check_phase(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a phase that will refuse at its start what the run `name` before it leaves; neither has run."""
    starts = [start for start in STARTS if start in (now.get("callbacks") or {})]
    if not starts:
        raise ValueError(f"callbacks must have one of {', '.join(STARTS)} after {name}, got none; use an overlay of "
                         "yamls/phases")
    records = []
    for cfg in (before, now):  # the tokenizer is that of the data, where this is here
        tokens = _data_of(Settings(cfg), "train_loader.dataset")[2]
        records.append({**record_of(cfg, read_tokenizer=False), "tokenizer_fingerprint": tokens})
    source: Any = SimpleNamespace(path=name, record=records[0])  # as of a checkpoint
    compare(f"callbacks.{starts[0]}.source", source, records[1], now["callbacks"][starts[0]].get("accept") or [])
