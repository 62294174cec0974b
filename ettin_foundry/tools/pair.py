"""Whether two runs are a fair pair, and whether the phases of one model continue each other.

A fair pair reads the same rows in the same order at the same sizes and schedule, and differs only where the objectives
demand it. A difference is `objective` or `harmless` only by a rule below; any other key, known or not, is `unfair`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.tools.curves import learning_rates
from ettin_foundry.tools.meaning import Meaning, data_of, read_meaning

UNFAIR, HARMLESS, OBJECTIVE = "unfair", "harmless", "objective"
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
        order = (UNFAIR, HARMLESS, OBJECTIVE)
        found = sorted(self.differences, key=lambda d: (order.index(d.verdict), d.key))
        rows = [("verdict", "key", *self.names, "why")]
        rows += [(d.verdict, d.key, _shown(d.a), _shown(d.b), f"{d.where}: {d.reason}".removeprefix(": ")) for d in found]
        widths = [*(max(map(len, column)) for column in list(zip(*rows))[:4]), 0]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows if found]
        counts = [f"{sum(d.verdict == verdict for d in found)} {verdict}" for verdict in order]
        counts = [count for count in counts if not count.startswith("0 ")] or ["no difference"]
        keys = f"; unfair: {', '.join(sorted({d.key for d in self.unfair}))}" if self.unfair else ""
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes),
                          f"{'fair' if self.fair else 'unfair'} {self.what}: {', '.join(counts)}{keys}"])


def _shown(value: Any) -> str:
    """As in YAML, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _WIDEST else text[:_WIDEST - 3] + "..."


# ------------------------------------------------------------------ pairs

_LOADER = r"(?:train_loader|eval_loader(?:\(.*?\))?)"
_OBSERVERS = ("speed_monitor|lr_monitor|runtime_estimator|scheduled_gc|memory_monitor|memory_snapshot|oom_observer|"
              "optimizer_monitor|system_metrics_monitor|ettin_clock|ettin_monitor|ettin_samples|ettin_export|ettin_steps")

# pattern of a whole key -> why a difference in it cannot change what is learnt
_HARMLESS = {
    rf"{_LOADER}\.(num_workers|prefetch_factor|pin_memory|persistent_workers|timeout|dataset\.cache_limit)":
        "how rows are fetched; which ones follows from data and seed alone",
    r"model\.(attn_impl|compile)": "the same function, up to rounding",
    r"(loggers|metadata|profiler)(\..*)?|progress_bar|log_to_console|console_log_interval|python_log_level|log_config|"
    r"flatten_metadata|dist_timeout|max_split_size_mb|expandable_segments|cuda_load_lazy": "logging, memory and time only",
    r"save_interval|save_filename|save_latest_filename|save_overwrite|save_num_checkpoints_to_keep|"
    r"only_composer_checkpoint|autoresume": "what is kept on disk; a run that resumes continues exactly",
    r"eval_interval|eval_first": "evaluating changes no weight",
    r"device_eval_batch_size": "metrics are sums over targets, whatever the batch",
    rf"callbacks\.({_OBSERVERS})(\..*)?": "it observes or writes, and changes no weight",
    r"callbacks\.ettin_(phase|cross)\.accept": "it lets a run begin, and has no further effect",
    r"fsdp_config\.(state_dict_type|activation_checkpointing|activation_cpu_offload|reshard_after_forward|verbose|"
    r"load_monolith_rank0_only)": "where tensors lie, not what they hold",
}
# what an unfair difference in a key does; the first that matches is said
_UNFAIR = {
    rf"{_LOADER}\.(shuffle|shuffle_seed|shuffle_window|packing)|global_train_batch_size|max_duration|"
    r"train_loader\.batch_size_warmup.*|(.*\.)?max_seq_len": "the members would not read the same rows in the same steps",
    r"eval_loader.*|eval_subset_num_batches": "the members' validation losses could not be compared",
    r"model\..*": "the members would differ in more than their attention mask",
    r"load_.*|callbacks\.ettin_(phase|cross).*|seed": "the members would not begin alike",
    r"(optimizer|scheduler|algorithms|precision|tokenizer|fsdp_config)\b.*": "the members would be trained another way",
    r".*": "not known to be without effect on what is learnt",
}


def lint_pair(a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str] = ("a", "b")) -> Report:
    """Compares two resolved configs that `checks.check_settings` accepts as the members of a pair.

    Datasets are compared by their fingerprints where their manifests are on this machine, else by where they lie, which a
    note says.

    Raises:
        ValueError, FileNotFoundError: a config cannot be read, or a manifest is broken.
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
        old, new = [run.values[shown] if shown in run.values else "given" if run.has(shown) else ABSENT
                    for run in (first, second)]
        rules = [_rule(key, first, second) for key in keys]
        found.append(Difference(shown, old, new, *min(rules, key=lambda r: (UNFAIR, HARMLESS, OBJECTIVE).index(r[0]))))
    return Report(names, tuple(found), tuple(notes))


def _rule(key: str, a: Meaning, b: Meaning) -> tuple[str, str]:
    """(verdict, reason) of a key in which two runs differ."""
    one_objective = a.get("model.objective") == b.get("model.objective")
    own = HARMLESS if one_objective else OBJECTIVE  # what each member must have for itself
    if key in ("run_name", "save_folder"):
        return own, "names the run"
    if re.fullmatch(r"load_path|callbacks\.ettin_(phase|cross)\.source", key):
        both = key in a.values and key in b.values
        return (own, "each run continues its own checkpoint") if both else (UNFAIR, "only one member begins with weights")
    if re.fullmatch(rf"(model|{_LOADER})\.objective", key):
        return (UNFAIR, "validated on different tasks") if one_objective else (OBJECTIVE, "what a pair is for")
    if re.fullmatch(rf"{_LOADER}\.mask_rate", key):
        objectives = [str(run.get(f"{key.rpartition('.')[0]}.objective", run.get("model.objective"))) for run in (a, b)]
        both = all(any(name in objective for name in MASKED_OBJECTIVES) for objective in objectives)
        return (UNFAIR, "both members mask, so they must mask alike") if both else (OBJECTIVE, "only one member masks")
    if key == "model.window_left":
        usual = [run.config.window_left == dataclasses.replace(run.config, window_left=-1).window_left for run in (a, b)]
        if a.config.causal != b.config.causal and all(usual):
            return OBJECTIVE, "transformers keeps half the window of tokens to the left in encoders, one less in decoders"
        return UNFAIR, "the members would not see equally far"
    if key in ("device_train_microbatch_size", "device_train_batch_size", "device_train_grad_accum", "n_gpus"):
        if all(run.get("accumulate_train_batch_on_tokens") is True for run in (a, b)):
            return HARMLESS, "every target of a step weighs the same, whatever the microbatch"
        return UNFAIR, "microbatches are weighted by rows, so that their size changes what a target weighs"
    rules = [(HARMLESS, *item) for item in _HARMLESS.items()] + [(UNFAIR, *item) for item in _UNFAIR.items()]
    return next((verdict, reason) for verdict, pattern, reason in rules if re.fullmatch(pattern, key))


def _compare_data(a: Meaning, b: Meaning) -> tuple[list[Difference], list[str]]:
    """Differences of the datasets that the loaders read, and notes on how they were compared."""
    found, notes = [], []
    for loader in dict.fromkeys(key.removesuffix(".dataset.local") for run in (a, b) for key in run.values
                                if key.endswith(".dataset.local")):
        key = f"{loader}.dataset"
        if not (a.has(key) and b.has(key)):
            continue  # the loader itself is a difference
        (place, mark, _), (other, other_mark, _) = data_of(a, loader), data_of(b, loader)
        if mark and other_mark:
            if mark != other_mark:
                found.append(Difference(key, mark[:12], other_mark[:12], UNFAIR, "not the same text (fingerprints)"))
            elif place != other:
                found.append(Difference(key, place, other, HARMLESS, "copies of one dataset, by fingerprint"))
            notes.append(f"{key}: fingerprint {' and '.join(dict.fromkeys((mark[:12], other_mark[:12])))}")
        elif place != other:
            found.append(Difference(key, place, other, UNFAIR, "elsewhere, and the manifests are not both on this machine"))
        else:
            notes.append(f"{key}: {place} is not on this machine, so only its place was compared")
    return found, notes


# ------------------------------------------------------------------ chains of phases

_MODEL_KEYS = [f"model.{key}" for key in ("size", "vocab_size", "global_attn_every_n_layers", "local_attention", "norm_eps")]
_Found = Iterator[tuple[str, Any, Any, str]]  # key, before, now, reason


def lint_chain(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Report:
    """Compares each phase of a model, (name, config as for `lint_pair`), with the one before it.

    Shape, tokenizer, row length, rotary theta, clock, learning rate and weight decay must continue; data, budget, batch and
    mask rate may change. A cross run follows the run whose weights it takes.
    """
    chain = [read_meaning(name, cfg) for name, cfg in runs]
    found, notes = [], []
    for i, now in enumerate(chain[1:], 1):
        for check in (_check_model, _check_theta, _check_optimizer):
            found += [Difference(key, a, b, UNFAIR, reason, now.name) for key, a, b, reason in check(chain[:i], now)]
        if unknown := [run.get("scheduler.name") for run in chain[i - 1:i + 1] if learning_rates(dict(run.cfg)) is None]:
            notes.append(f"{now.name}: the learning rates of {unknown[0]} are not known here, so they were not compared")
    return Report(("before", "now"), tuple(found), tuple(notes), "chain")


def _start(run: Meaning) -> str:
    """How a run begins: `scratch`, another's `weights`, a `phase` that keeps the optimizer, or `loaded` with its clock."""
    if run.has("callbacks.ettin_cross") or run.get("callbacks.ettin_phase.keep") == "weights":
        return "weights"
    if run.has("callbacks.ettin_phase"):
        return "phase"
    if run.get("load_path") is None:
        return "scratch"
    return "weights" if run.get("load_weights_only") else "loaded"


def _changed(keys: Sequence[str], before: Meaning, now: Meaning, reason: str) -> _Found:
    found = ((key, before.get(key, ABSENT), now.get(key, ABSENT), reason) for key in keys)
    return (each for each in found if each[1] != each[2])


def _check_model(past: Sequence[Meaning], now: Meaning) -> _Found:
    before = past[-1]
    same_kind = before.config.causal == now.config.causal
    yield from _changed([*_MODEL_KEYS, *(["model.window_left"] if same_kind else [])], before, now,
                        "the weights belong to another model")
    if not same_kind and not (now.has("callbacks.ettin_cross") or now.get("load_weights_only")):
        yield from _changed(["model.objective"], before, now, "encoder and decoder continue as each other with the weights "
                            "alone, as callbacks.ettin_cross takes them")
    names = [run.get("tokenizer.name", ABSENT) for run in (before, now)]
    own = [str(run.cfg.get("tokenizer", {}).get("name")) for run in (before, now)]
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
    before, start = past[-1], _start(now)
    if start == "scratch":
        yield "load_path", before.values["max_duration"], ABSENT, "nothing is loaded: the phase would train a new model"
        return
    if start == "loaded":
        yield ("load_path", before.values["max_duration"], now.values["max_duration"], "the checkpoint's clock is not set "
               "back: the phase is past its end, or begins in the middle of its schedule")
    if start != "weights":
        yield from _changed(("optimizer.name", "optimizer.weight_decay"), before, now,
                            "the optimizer is kept, and would do something else")
    ours, last = learning_rates(dict(now.cfg)), learning_rates(dict(before.cfg))
    if start != "loaded" and ours and last:
        begin, end, given = ours[1][0], last[1][-1], now.values["optimizer.lr"]
        if begin > end and not math.isclose(begin, end, rel_tol=1e-6):
            yield "optimizer.lr", end, begin, "the learning rate jumps up from where the phase before ended"
        elif start == "phase" and 1e-6 * given <= begin < end * (1 - 1e-6):  # below that it warms up
            yield "optimizer.lr", end, begin, "the learning rate falls from where the phase before ended"
    old, new = (run.get("optimizer.max_lr", run.values["optimizer.lr"]) for run in (before, now))
    if start == "phase" and old != new:
        yield "optimizer.max_lr", old, new, "weight decay is relative to max_lr: at one learning rate it would be another"
