"""Whether two runs are a fair pair: they read the same rows in the same order at the same sizes and schedule, and differ
only where their objectives demand it.

Every leaf of the two configs is compared by what it means (meaning.py). A difference is `objective` or `harmless` only by a
rule that stands here with its reason; whatever has no rule is `unfair`, so a key that is new, or not known, is never passed
over. The phases of one model, one after the other, are lint_chain.py's; files of settings are lint_settings.py's.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.tools.lint_chain import lint_chain
from ettin_foundry.tools.lint_report import ABSENT, HARMLESS, OBJECTIVE, UNFAIR, Difference, Report
from ettin_foundry.tools.meaning import Meaning, data_of, read_meaning

__all__ = ["Difference", "Report", "lint_chain", "lint_pair"]

_LOADER = r"(?:train_loader|eval_loader(?:\(.*?\))?)"
_WATCHERS = ("speed_monitor", "lr_monitor", "runtime_estimator", "scheduled_gc", "memory_monitor", "memory_snapshot",
             "oom_observer", "optimizer_monitor", "system_metrics_monitor", "ettin_clock", "ettin_monitor", "ettin_samples",
             "ettin_export", "ettin_steps")

# pattern of a whole key -> why a difference in it cannot change what is learnt
_HARMLESS = {
    rf"{_LOADER}\.(num_workers|prefetch_factor|pin_memory|persistent_workers|timeout)":
        "how rows are fetched; which ones follows from data and seed alone",
    rf"{_LOADER}\.dataset\.cache_limit": "how much of the set is kept on disk",
    r"model\.attn_impl": "the same function, up to rounding",
    r"dist_timeout|max_split_size_mb|expandable_segments|cuda_load_lazy|profiler(\..*)?": "memory and time, no values",
    r"progress_bar|log_to_console|console_log_interval|python_log_level|log_config|(loggers|metadata)(\..*)?|"
    r"flatten_metadata": "what is logged",
    r"save_interval|save_filename|save_latest_filename|save_overwrite|save_num_checkpoints_to_keep|"
    r"only_composer_checkpoint|autoresume": "what is kept on disk; a run that resumes goes on exactly",
    r"eval_interval|eval_first": "evaluating changes no weight",
    rf"callbacks\.({'|'.join(_WATCHERS)})(\..*)?": "it watches or writes, and changes no weight",
    r"callbacks\.ettin_(phase|cross)\.accept": "it lets a run begin, and acts no further",
    r"fsdp_config\.(state_dict_type|activation_checkpointing|activation_cpu_offload|reshard_after_forward|verbose|"
    r"load_monolith_rank0_only)": "where tensors lie, not what they hold",
}

# pattern of a whole key -> what an unfair difference in it does; the first that fits is said
_UNFAIR = {
    rf"{_LOADER}\.(shuffle|shuffle_seed|shuffle_window|packing|dataset\.on_bad_shard)":
        "the members would not read the same rows in the same order",
    r"eval_loader.*|eval_subset_num_batches": "the members' validation losses could not be compared",
    r"global_train_batch_size|train_loader\.batch_size_warmup.*|(model|train_loader)\.max_seq_len|max_seq_len":
        "the members' steps would not hold the same rows",
    r"max_duration": "one member would see more tokens",
    r"seed": "first weights and dropout are drawn from it",
    r"(optimizer|scheduler|algorithms)\b.*": "the members would be trained another way",
    r"model\..*": "the members would differ in more than their attention mask",
    r"tokenizer\b.*": "the members would not see the same tokens",
    r"precision|fsdp_config\..*|compile_config.*": "the members would compute in another way",
    r"accumulate_train_batch_on_tokens": "a target would not weigh the same",
    r"load_.*|callbacks\.ettin_(phase|cross).*|reset_time|restart_override": "the members would not begin alike",
    r"save_weights_only|save_ignore_keys": "a later phase, or a resume, would not find the same state",
}
_UNKNOWN = "not known to be without effect on what is learnt"

_Ruling = tuple[str, str]


def lint_pair(a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str] = ("a", "b")) -> Report:
    """Compares two runs as the members of a pair.

    Args:
        a, b: configs as plain containers, interpolations resolved; both must pass `checks.check_settings`, which is not
            repeated here.
        names: what the runs are called in the report.

    Returns:
        Every difference with its verdict. Where the data's manifests are on this machine, sets are compared by their
        fingerprints; else by where they lie, which a note says.

    Raises:
        ValueError, FileNotFoundError: a config cannot be read, or a manifest is broken.
    """
    first, second = read_meaning(names[0], a), read_meaning(names[1], b)
    found, notes = _compare_data(first, second)
    done = {d.key for d in found}
    place = re.compile(rf"{_LOADER}\.dataset\.(local|split|remote)")
    for keys in _grouped(first, second):
        keys = [key for key in keys if key not in done and not place.fullmatch(key)]
        if not keys:
            continue
        rulings = {key: _rule(key, first, second) for key in keys}
        worst = min(keys, key=lambda key: (UNFAIR, HARMLESS, OBJECTIVE).index(rulings[key][0]))
        shown = keys[0] if len(keys) == 1 else _missing_block(keys[0], first, second)
        found.append(Difference(shown, _value(shown, first), _value(shown, second), *rulings[worst]))
    return Report(names, tuple(found), tuple(notes))


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _grouped(a: Meaning, b: Meaning) -> Iterator[list[str]]:
    """The keys whose values differ; those of a block that one side lacks altogether in one group."""
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys([*a.values, *b.values]):
        if not _same(a.get(key, ABSENT), b.get(key, ABSENT)):
            groups.setdefault(_missing_block(key, a, b), []).append(key)
    yield from groups.values()


def _missing_block(key: str, a: Meaning, b: Meaning) -> str:
    """The highest block above a key of which one side has nothing, or the key."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        above = ".".join(parts[:depth])
        if a.tells(above) != b.tells(above):
            return above
    return key


def _value(key: str, run: Meaning) -> Any:
    return run.values[key] if key in run.values else "given" if run.tells(key) else ABSENT


# ------------------------------------------------------------------ rules


def _rule(key: str, a: Meaning, b: Meaning) -> _Ruling:
    for pattern, rule in _RULES.items():
        if re.fullmatch(pattern, key):
            return rule(key, a, b)
    if reason := _reason(_HARMLESS, key):
        return HARMLESS, reason
    return UNFAIR, _reason(_UNFAIR, key) or _UNKNOWN


def _reason(reasons: Mapping[str, str], key: str) -> str | None:
    return next((reason for pattern, reason in reasons.items() if re.fullmatch(pattern, key)), None)


def _of_member(reason: str, a: Meaning, b: Meaning) -> _Ruling:
    """What has to be each member's own; of two runs of one objective nothing is demanded by it."""
    return (HARMLESS if _same(a.get("model.objective"), b.get("model.objective")) else OBJECTIVE), reason


def _name(key: str, a: Meaning, b: Meaning) -> _Ruling:
    return _of_member("names the run", a, b)


def _source(key: str, a: Meaning, b: Meaning) -> _Ruling:
    if key not in a.values or key not in b.values:
        return UNFAIR, "one member begins with trained weights, the other does not"
    return _of_member("each run goes on from its own checkpoint", a, b)


def _objective(key: str, a: Meaning, b: Meaning) -> _Ruling:
    if _same(a.get("model.objective"), b.get("model.objective")):
        return UNFAIR, "trained alike, the members would be validated on different tasks"
    return OBJECTIVE, "what a pair is for"


def _mask_rate(key: str, a: Meaning, b: Meaning) -> _Ruling:
    block = key.rpartition(".")[0]
    if all(_masks(run.get(f"{block}.objective", run.values["model.objective"])) for run in (a, b)):
        return UNFAIR, "both members mask, so they must mask alike"
    return OBJECTIVE, "only one member masks"


def _masks(objective: Any) -> bool:
    """Of an objective as `Meaning` has it: whether a mask rate acts in it."""
    if isinstance(objective, str) and objective.startswith(("[", "{")):
        objective = json.loads(objective)
    if isinstance(objective, list) and all(isinstance(name, str) for name in objective):
        return any(name in MASKED_OBJECTIVES for name in objective)
    return ObjectiveSchedule.parse(objective).masks


def _window(key: str, a: Meaning, b: Meaning) -> _Ruling:
    usual = [run.config.window_left == dataclasses.replace(run.config, window_left=-1).window_left for run in (a, b)]
    if a.config.causal != b.config.causal and all(usual):
        return OBJECTIVE, "transformers keeps half the window of tokens to the left in encoders, one less in decoders"
    return UNFAIR, "the members would not see equally far"


def _microbatch(key: str, a: Meaning, b: Meaning) -> _Ruling:
    if not _all_ettin(a, b):
        return UNFAIR, "the loss depends on which rows are together in a microbatch"
    if all(run.get("accumulate_train_batch_on_tokens") is True for run in (a, b)):
        return HARMLESS, "every target of a step weighs the same, whatever the microbatch"
    return UNFAIR, "microbatches are weighted by rows, so that their size changes what a target weighs"


def _eval_batch(key: str, a: Meaning, b: Meaning) -> _Ruling:
    if not _all_ettin(a, b):
        return UNFAIR, "the metric depends on which rows are together in a batch"
    return HARMLESS, "metrics are sums over targets, whatever the batch"


def _all_ettin(a: Meaning, b: Meaning) -> bool:
    return all(run.get("model.name") == "ettin" for run in (a, b))


_RULES: dict[str, Callable[[str, Meaning, Meaning], _Ruling]] = {
    r"run_name|save_folder": _name,
    r"load_path|callbacks\.ettin_(phase|cross)\.source": _source,
    rf"(model|{_LOADER})\.objective": _objective,
    rf"{_LOADER}\.mask_rate": _mask_rate,
    r"model\.window_left": _window,
    r"device_train_microbatch_size|device_train_batch_size|device_train_grad_accum|n_gpus": _microbatch,
    r"device_eval_batch_size": _eval_batch,
}


# ------------------------------------------------------------------ data


def _compare_data(a: Meaning, b: Meaning) -> tuple[list[Difference], list[str]]:
    """Differences of the sets that the loaders read, and what was compared."""
    found, notes = [], []
    loaders = dict.fromkeys(key.removesuffix(".dataset.local") for run in (a, b) for key in run.values
                            if key.endswith(".dataset.local"))
    for loader in loaders:
        key = f"{loader}.dataset"
        if not (a.tells(key) and b.tells(key)):
            continue  # the loader itself is a difference
        one, other = data_of(a, loader), data_of(b, loader)
        if one.fingerprint and other.fingerprint:
            marks = one.fingerprint[:12], other.fingerprint[:12]
            if one.fingerprint != other.fingerprint:
                found.append(Difference(key, *marks, UNFAIR, "the members would not read the same text (fingerprints of the "
                                        "sets)"))
            elif one.place != other.place:
                found.append(Difference(key, one.place, other.place, HARMLESS, "copies of one set, by their fingerprints"))
            notes.append(f"{key}: fingerprint {' and '.join(dict.fromkeys(marks))}")
        elif one.place != other.place:
            found.append(Difference(key, one.place, other.place, UNFAIR, "another set, as far as can be seen: the manifests "
                                    "are not both on this machine"))
        else:
            notes.append(f"{key}: {one.place} is not on this machine, so only its place was compared")
    return found, notes
