"""Whether two runs are a fair pair, and whether the phases of one model continue each other.

A fair pair reads the same rows in the same order at the same sizes and schedule, and differs only where the objectives
demand it. What a difference in a key means stands in `RULES`; a key that no rule names must be equal.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.tools.curves import learning_rates
from ettin_foundry.tools.meaning import Meaning, data_of, read_meaning
from ettin_foundry.training.keys import NO_EFFECT

UNFAIR, HARMLESS, OBJECTIVE = VERDICTS = "unfair", "harmless", "objective"
ABSENT = "absent"
_WIDEST = 48


@dataclass(frozen=True)
class Difference:
    """One key in which two runs, or two phases of one model, differ."""

    key: str
    a: Any
    b: Any
    verdict: str
    reason: str
    where: str = ""  # the phase, when the report is about a chain


@dataclass(frozen=True)
class Report:
    """Every difference, and notes about what could not be compared."""

    names: tuple[str, str]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()
    what: str = "pair"

    @property
    def unfair(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.verdict == UNFAIR)

    @property
    def fair(self) -> bool:
        return not self.unfair

    def __str__(self) -> str:
        """A table, unfair differences first, then the notes, then one line with the verdict."""
        found = sorted(self.differences, key=lambda d: (VERDICTS.index(d.verdict), d.key))
        rows = [("verdict", "key", *self.names, "why")]
        rows += [(d.verdict, d.key, _shown(d.a), _shown(d.b), f"{d.where}: {d.reason}".removeprefix(": "))
                 for d in found]
        widths = [*(max(map(len, column)) for column in list(zip(*rows))[:4]), 0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows if found]
        lines += [f"note: {note}" for note in self.notes]
        if self.unfair:
            keys = ", ".join(sorted({d.key for d in self.unfair}))
            return "\n".join([*lines, f"unfair {self.what}, because of {keys}"])
        counts = [f"{sum(d.verdict == verdict for d in found)} {verdict}" for verdict in VERDICTS[1:]]
        counts = [count for count in counts if not count.startswith("0 ")]
        return "\n".join([*lines, f"fair {self.what}: {', '.join(counts) or 'no difference'}"])


def _shown(value: Any) -> str:
    """As in YAML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _WIDEST else text[:_WIDEST - 3] + "..."


# ------------------------------------------------------------------ pairs


class Rule(NamedTuple):
    """What a difference in the keys that a pattern matches means, if a condition on both runs holds."""

    keys: str
    verdict: str
    reason: str
    condition: Callable[[Meaning, Meaning, str], bool] = lambda a, b, key: True


def _other_objectives(a: Meaning, b: Meaning, key: str) -> bool:
    return a.get("model.objective") != b.get("model.objective")


def _one_masks(a: Meaning, b: Meaning, key: str) -> bool:
    objectives = [str(run.get(key.replace("mask_rate", "objective"), run.get("model.objective"))) for run in (a, b)]
    return not all(any(name in objective for name in MASKED_OBJECTIVES) for objective in objectives)


def _usual_windows(a: Meaning, b: Meaning, key: str) -> bool:
    usual = [run.config.window_left == dataclasses.replace(run.config, window_left=-1).window_left for run in (a, b)]
    return a.config.causal != b.config.causal and all(usual)


def _both_given(a: Meaning, b: Meaning, key: str) -> bool:
    return key in a.values and key in b.values


def _weighs_targets(a: Meaning, b: Meaning, key: str) -> bool:
    return all(run.get("accumulate_train_batch_on_tokens") is True for run in (a, b))


def _whole_split(a: Meaning, b: Meaning, key: str) -> bool:
    return all(run.get("eval_subset_num_batches") == -1 for run in (a, b))


_LOADER = r"(train_loader|eval_loader(\[.*?\])?)"
RULES = (
    Rule(rf"(model|{_LOADER})\.objective", OBJECTIVE, "what a pair is for", _other_objectives),
    Rule(rf"{_LOADER}\.mask_rate", OBJECTIVE, "only one member masks", _one_masks),
    Rule(r"model\.window_left", OBJECTIVE, "transformers lets an encoder see half of local_attention to the left, a "
         "decoder one token less", _usual_windows),
    Rule("run_name|save_folder", HARMLESS, "names the run"),
    Rule(r"load_path|callbacks\.ettin_(phase|cross)\.source", HARMLESS, "each run continues its own checkpoint",
         _both_given),
    Rule("device_train_microbatch_size", HARMLESS, "every target of a step weighs the same, whatever the microbatch",
         _weighs_targets),
    Rule("device_eval_batch_size", HARMLESS, "metrics are sums over targets, whatever the batch", _whole_split),
    *(Rule(keys, HARMLESS, reason) for keys, reason in NO_EFFECT.items()),
    Rule(rf"{_LOADER}\.mask_rate", UNFAIR, "both members mask, so they must mask alike"),
    Rule(rf"{_LOADER}\.(shuffle|shuffle_seed|shuffle_window|packing)|global_train_batch_size|max_duration|"
         r"train_loader\.batch_size_warmup.*|(.*\.)?max_seq_len", UNFAIR,
         "the members would not read the same rows in the same steps"),
    Rule("device_train_microbatch_size", UNFAIR, "microbatches are weighted by rows, so their size changes what a "
         "target weighs"),
    Rule("eval_loader.*|eval_subset_num_batches|device_eval_batch_size", UNFAIR,
         "the members' validation losses could not be compared"),
    Rule(r"model\.window_left", UNFAIR, "the members would not see equally far"),
    Rule(r"model\..*", UNFAIR, "the members would differ in more than their attention mask"),
    Rule(r"load_.*|callbacks\.ettin_(phase|cross).*|seed", UNFAIR, "the members would not begin alike"),
    Rule(r"(optimizer|scheduler|algorithms|precision|tokenizer|fsdp_config)\b.*", UNFAIR,
         "the members would be trained another way"),
    Rule(".*", UNFAIR, "not known to be without effect on what is learnt"),
)
"""The first rule whose pattern matches the whole key, and whose condition holds, gives the verdict."""


def lint_pair(a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str] = ("a", "b")) -> Report:
    """Compares two resolved configs that `checks.check_settings` accepts as the members of a pair.

    Datasets are compared by their fingerprints where their manifests are on this machine, else by their paths, which a
    note says; a ValueError or FileNotFoundError for a broken manifest.
    """
    first, second = read_meaning(names[0], a), read_meaning(names[1], b)
    found, notes = _compare_data(first, second)
    compared = re.compile("|".join([rf"{_LOADER}\.dataset\.(local|split|remote)", *(re.escape(d.key) for d in found)]))
    blocks: dict[str, list[str]] = {}  # the keys of a block that one side lacks are one difference
    for key in dict.fromkeys([*first.values, *second.values]):
        one, other = first.get(key, ABSENT), second.get(key, ABSENT)
        if (one != other or isinstance(one, bool) != isinstance(other, bool)) and not compared.fullmatch(key):
            parts = key.split(".")
            above = [".".join(parts[:n]) for n in range(1, len(parts))]
            block = next((block for block in above if first.has(block) != second.has(block)), key)
            blocks.setdefault(block, []).append(key)
    for block, keys in blocks.items():
        shown = keys[0] if len(keys) == 1 else block
        old, new = (run.get(shown, "given" if run.has(shown) else ABSENT) for run in (first, second))
        rules = [next(rule for rule in RULES if re.fullmatch(rule.keys, key) and rule.condition(first, second, key))
                 for key in keys]
        # of a whole block, the most general of the worst
        worst = min(rules, key=lambda rule: (VERDICTS.index(rule.verdict), -RULES.index(rule)))
        found.append(Difference(shown, old, new, worst.verdict, worst.reason))
    return Report(names, tuple(found), tuple(notes))


def _compare_data(a: Meaning, b: Meaning) -> tuple[list[Difference], list[str]]:
    """Differences of the datasets that the loaders read, and notes on how they were compared."""
    found, notes = [], []
    for key in dict.fromkeys(key.removesuffix(".local") for key in a.values if key.endswith(".dataset.local")):
        if not b.has(key):
            continue  # the loader itself is a difference
        (place, mark, _), (other, other_mark, _) = (data_of(run, key.removesuffix(".dataset")) for run in (a, b))
        if mark and other_mark and mark != other_mark:
            found.append(Difference(key, mark[:12], other_mark[:12], UNFAIR, "not the same text (fingerprints)"))
        elif mark and other_mark and place != other:
            found.append(Difference(key, place, other, HARMLESS, "copies of one dataset, by fingerprint"))
        elif place != other:
            found.append(Difference(key, place, other, UNFAIR,
                                    "elsewhere, and the manifests are not both on this machine"))
        elif not mark:
            notes.append(f"{key}: {place} is not on this machine, so only its path was compared")
    return found, notes


# ------------------------------------------------------------------ chains of phases

_MODEL_KEYS = [f"model.{key}" for key in ("size", "vocab_size", "global_attn_every_n_layers", "local_attention",
                                          "norm_eps")]
_Found = Iterator[tuple[str, Any, Any, str]]  # key, before, now, reason


def lint_chain(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Report:
    """Compares each phase of a model, (name, config as for `lint_pair`), with the one before it.

    Shape, tokenizer, row length, rotary theta, clock, learning rate and weight decay must continue; data, budget, batch
    and mask rate may change. A cross run follows the run whose weights it takes.
    """
    chain = [read_meaning(name, cfg) for name, cfg in runs]
    found, notes = [], []
    for i, now in enumerate(chain[1:], 1):
        for check in (_check_model, _check_theta, _check_optimizer):
            found += [Difference(key, a, b, UNFAIR, reason, now.name) for key, a, b, reason in check(chain[:i], now)]
        for run in chain[i - 1:i + 1]:
            if learning_rates(dict(run.cfg)) is None:
                notes.append(f"{now.name}: learning rates were not compared, since they cannot be computed for the "
                             f"scheduler {run.get('scheduler.name')} of {run.name}")
    return Report(("before", "now"), tuple(found), tuple(notes), "chain")


def _changed(keys: Sequence[str], before: Meaning, now: Meaning, reason: str) -> _Found:
    found = ((key, before.get(key, ABSENT), now.get(key, ABSENT), reason) for key in keys)
    return (each for each in found if each[1] != each[2])


def _check_model(past: Sequence[Meaning], now: Meaning) -> _Found:
    before = past[-1]
    same_kind = before.config.causal == now.config.causal
    yield from _changed([*_MODEL_KEYS, *(["model.window_left"] if same_kind else [])], before, now,
                        "the weights belong to another model")
    if not same_kind and not (now.has("callbacks.ettin_cross") or now.get("load_weights_only")):
        yield from _changed(["model.objective"], before, now, "encoder and decoder continue as each other with the "
                            "weights alone, as callbacks.ettin_cross takes them")
    names = [run.get("tokenizer.name") for run in (before, now)]
    own = [run.cfg["tokenizer"]["name"] for run in (before, now)]
    if names[0] == names[1] and own[0] != own[1]:  # both beside their data: what the manifests say of them
        names = [data_of(run, "train_loader")[2] for run in (before, now)]
    if None not in names and names[0] != names[1]:
        yield "tokenizer.name", own[0], own[1], "the embedding's rows would stand for other tokens"
    if now.values["max_seq_len"] < before.values["max_seq_len"]:
        yield from _changed(["max_seq_len"], before, now, "rows shrink: long documents are not trained on any more")


def _check_theta(past: Sequence[Meaning], now: Meaning) -> _Found:
    """Positions that were learnt under one theta are read under another."""
    moved = list(_changed(("model.global_rope_theta", "model.local_rope_theta"), past[-1], now, ""))
    for key, old, new, _ in moved:
        if new < old or len({run.values[key] for run in past}) > 1:
            yield key, old, new, "rotary theta may go up once"
        elif key == "model.local_rope_theta" and len(moved) == 1:
            yield key, old, new, "local layers get another rotary theta in a phase that leaves global layers theirs"


def _check_optimizer(past: Sequence[Meaning], now: Meaning) -> _Found:
    before, is_phase, loads = past[-1], now.has("callbacks.ettin_phase"), now.get("load_path") is not None
    if not (is_phase or loads or now.has("callbacks.ettin_cross")):
        yield "load_path", ABSENT, ABSENT, "nothing is loaded: the phase would train a new model"
        return
    weights_only = (now.has("callbacks.ettin_cross") or now.get("callbacks.ettin_phase.keep") == "weights"
                    or (loads and now.get("load_weights_only")))
    if loads and not weights_only:
        yield ("load_path", before.get("load_path", ABSENT), now.get("load_path"), "the checkpoint's clock is not set "
               "back, so the phase begins past its end or in the middle of its schedule; use callbacks.ettin_phase")
    if not weights_only:
        yield from _changed(("optimizer.name", "optimizer.weight_decay"), before, now,
                            "the optimizer is kept, and would do something else")
    ours, last = learning_rates(dict(now.cfg)), learning_rates(dict(before.cfg))
    if (is_phase or weights_only) and ours and last:
        begin, end, given = ours[1][0], last[1][-1], now.values["optimizer.lr"]
        if begin > end and not math.isclose(begin, end, rel_tol=1e-6):
            yield "optimizer.lr", end, begin, "the learning rate jumps up from where the phase before ended"
        elif not weights_only and 1e-6 * given <= begin < end * (1 - 1e-6):  # below that it warms up
            yield "optimizer.lr", end, begin, "the learning rate falls from where the phase before ended"
    if is_phase and not weights_only:
        yield from _changed(("optimizer.max_lr",), before, now,
                            "weight decay is relative to max_lr: at one learning rate it would be another")
