"""What a run starts from (nothing, its own checkpoints, or another run's), and whether it may.

All is compared before any work, by settings and records (`prepare_start`); the callbacks in start.py and clock.py
compare again, with what was built. A record is what `Clock.state_dict` writes, its JSON read. Torch and the host are
imported only once a file is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.data import tokenizer
from ettin_foundry.data.stream import check_warmup
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule
from ettin_foundry.training import keys, run_config
from ettin_foundry.training.run_config import parse_time, require, value_at, walk

log = logging.getLogger(__name__)

STARTS = ("ettin_phase", "ettin_cross")
_SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# what a phase may change unasked; causal follows from the objective, which is compared instead
_FREE_FIELDS = ("causal", "max_position_embeddings", "attn_out_dropout", "initializer_range",
                "initializer_cutoff_factor")
# how keys begin that a resumed run may change beside `keys.NO_EFFECT`: paths and evaluation, and what does not count in
# the same words, but is compared by its meaning
_FREE_KEYS = tuple("""
    callbacks code_paths compile_config device_ eval_ fsdp_config icl_ load_ max_duration model only_ run_name save_
    spin_dataloaders tokenizer tp_config variables train_loader.dataset train_loader.mask_rate train_loader.objective
    """.split())
_COMPARED_YET = ("callbacks.global_lr_scaling", "callbacks.layer_freezing", "train_loader.dataset.split")
# what can never change within a run: its rows, and what the checkpoint's tensors are
_FIXED_KEYS = tuple("""
    run_name model tokenizer seed max_seq_len optimizer.name callbacks.ettin_ train_loader.shuffle train_loader.packing
    train_loader.dataset train_loader.max_seq_len""".split())
PARTS_LEFT_OUT = ("state/timestamp", "state/dataset_state", "state/schedulers", "state/rank_zero_seed",
                  "state/train_metrics", "state/eval_metrics", "rng")
"""Of a checkpoint, what a phase that starts from it does not take."""

Differences = dict[str, tuple[Any, Any]]
"""{key: (then, now)}."""


class Source(NamedTuple):
    """A checkpoint or Hugging Face folder to start from, with its record, or what its config.json says."""

    path: Path
    record: Mapping[str, Any]
    has_moments: bool = False
    is_folder: bool = False


def record_of(cfg: Mapping[str, Any], *, read_tokenizer: bool = True) -> dict[str, Any]:
    """What the record of this config's run will say at its start."""
    schedule = run_config.objective_schedule(cfg)
    tokens = tokenizer.fingerprint(tokenizer.load(cfg["tokenizer"]["name"])) if read_tokenizer else None
    return {"run_name": _run_name(cfg), "objective": schedule.final,
            "objective_schedule": schedule.plain(), "config": dataclasses.asdict(run_config.model_config(cfg)),
            "tokenizer_fingerprint": tokens, "run_config": run_config.config_text(cfg)}


def read_source(key: str, given: str) -> Source:
    """What a checkpoint (as for `checkpoints.locate`) or a Hugging Face folder says of itself; errors name the key."""
    from ettin_foundry.model.hf_config import read_config, read_record
    from ettin_foundry.training.checkpoints import read_head

    try:
        if (path := Path(given, "config.json")).is_file():
            config, objective = read_config(path)
            said = {"config": dataclasses.asdict(config), "size": config.size, "objective": objective}
            return Source(path.parent, {**read_record(path.parent), **said, "tokenizer": given}, is_folder=True)
        head = read_head(given)
        if not head.record.get("config"):
            raise ValueError(f"{head.path.name} does not say what model it holds; make one with `ettin import`")
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{key}: {given!r} given; {error}") from error
    return Source(head.path, head.record, head.has_moments)


def describe(found: Differences) -> str:
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in found.items())


def compare(key: str, source: Source, now: Mapping[str, Any], accept: Sequence[str] = ()) -> Differences:
    """What another run's weights differ in from the run that takes them; refuses what `accept` does not list.

    key: the callback that names the source (objectives must differ for `ettin_cross`), or load_path. now: a record.
    """
    crossing, list_key = key.endswith("ettin_cross"), f"{key}.accept"
    place = f"{key}.source: {source.path}"
    if key == "load_path":
        place, list_key = f"{key}: {source.path}", "callbacks.ettin_clock.accept"
    old, new = source.record["config"], now["config"]
    found = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    if shape := [f"{name} {was} (here {now})" for name, (was, now) in found.items() if name in _SHAPE_FIELDS]:
        raise ValueError(f"{place} has {', '.join(shape)}; its weights do not fit, so set model.size")
    free = (*_FREE_FIELDS, *(("window_left",) if crossing or old["causal"] != new["causal"] else ()))
    found = {name: values for name, values in found.items() if name not in free}
    found |= _compare_tokenizers(source.record, now, source.path)
    was, starts = source.record.get("objective"), tuple(ObjectiveSchedule.parse(now["objective_schedule"]).at(0))
    trained = f"{place} was trained with {was}, and this run starts with {' + '.join(starts)}; use callbacks."
    if crossing and was is None and starts != ("clm",) and not old["causal"]:
        raise ValueError(f"{place} does not say whether it predicts masks as mlm or mntp; run `ettin import FOLDER "
                         "FILE.pt --objective mlm` (official encoders) and give FILE.pt")
    if crossing and was in starts:
        raise ValueError(f"{trained}ettin_phase to go on with the same objective")
    if not crossing and was not in starts:
        if "clm" in (was, *starts):
            raise ValueError(f"{trained}ettin_cross (yamls/phases/cross.yaml) to change it")
        found["objective"] = (was, " + ".join(starts))
    if refused := {name: values for name, values in found.items() if name not in accept}:
        pairs = ", ".join(f"{name} {was} (here {now})" for name, (was, now) in refused.items())
        raise ValueError(f"{place} has {pairs}; set the same here (rotary bases: variables.rope_theta=...; objective: "
                         f"callbacks.ettin_cross), or allow it: {list_key}=[{','.join(refused)}]")
    return found


def _compare_tokenizers(then: Mapping[str, Any], now: Mapping[str, Any], path: str | Path) -> Differences:
    old, new, named = then.get("tokenizer_fingerprint"), now.get("tokenizer_fingerprint"), then.get("tokenizer")
    if not old and named and (Path(named) / "tokenizer.json").is_file():
        old = tokenizer.fingerprint(tokenizer.load(named))
    if new is not None and old is None:
        log.warning("%s names no tokenizer that is here: whether it is this run's is not checked", path)
    if old and new:
        for name in tokenizer.COMPARED:
            if old.get(name) != new[name]:
                was, is_now = (f"{f.get('name')!r} with {name} {f.get(name)}" for f in (old, new))
                return {"tokenizer": (was, is_now)}
    return {}


# ------------------------------------------------------------------ before work


def check_start(cfg: Mapping[str, Any]) -> None:
    """Refuses settings of the start that contradict each other; reads no file."""
    given = {f"callbacks.{name}": block or {} for name, block in (cfg.get("callbacks") or {}).items() if name in STARTS}
    for key, block in given.items():
        source, accept = block.get("source"), block.get("accept", [])
        require(isinstance(source, str) and source, f"{key}.source", "a checkpoint or folder", source,
                "add variables.source=CHECKPOINT to the command line")
        for other in (*(f"{key}.source" for key in given), "load_path", "load_ignore_keys"):
            value = value_at(cfg, other)
            require(other == f"{key}.source" or not value, other, f"left out with {key}.source={source}", value,
                    "only one can give the weights")
        require(isinstance(accept, list), f"{key}.accept", "a list of what may differ", accept, "add brackets")
        require(block.get("keep", "all") in ("all", "weights"), f"{key}.keep",
                "all (weights and optimizer moments) or weights", block.get("keep"), "correct it")
    require(given or not cfg.get("load_ignore_keys"), "load_ignore_keys", "left out, since part of a checkpoint counts "
            "wrongly", cfg.get("load_ignore_keys"), "use callbacks.ettin_phase, or load_weights_only=true")
    accept = value_at(cfg, "callbacks.ettin_clock.accept")
    require(isinstance(accept or [], list), "callbacks.ettin_clock.accept", "a list of keys", accept, "add brackets")
    for key, value in (("run_name", _run_name(cfg)), ("save_folder", cfg.get("save_folder"))):
        require(value or not cfg.get("autoresume"), key, "given with autoresume, which finds checkpoints by it", value,
                "set it, or autoresume=false")


def _run_name(cfg: Mapping[str, Any]) -> str:
    return cfg.get("run_name") or os.environ.get("RUN_NAME", "")


def prepare_start(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Scans what will be loaded, repairs the link that autoresume follows, refuses what this run may not start from.

    Returns the keys to set in the config, by which the host loads what is meant.
    """
    from ettin_foundry.training import checkpoints

    checkpoints.install_validation()  # also for files that the host downloads
    accept = value_at(cfg, "callbacks.ettin_clock.accept") or []
    folder = (cfg.get("save_folder") or "").replace("{run_name}", _run_name(cfg))
    if cfg.get("autoresume") and "://" not in folder:
        rank, sharded = os.environ.get("RANK", "0"), _is_sharded(cfg)
        latest = cfg.get("save_latest_filename") or ("latest-sharded-rank{rank}" if sharded else "latest-rank{rank}.pt")
        latest = latest.replace("{rank}", rank if sharded else "0")
        if "{" not in folder + latest and (sharded or rank == "0"):
            checkpoints.repair_latest(folder, latest=latest)
        if own := checkpoints.newest_complete(folder):
            now = record_of(cfg, read_tokenizer=False)
            check_resume(checkpoints.read_head(own).record, now, place=str(own), own=True, accept=accept)
            return {}
    for name in STARTS:
        if name in (cfg.get("callbacks") or {}):
            return _prepare_source(cfg, name)
    return _prepare_load_path(cfg, path, accept) if (path := cfg.get("load_path")) else {}


def _is_sharded(cfg: Mapping[str, Any]) -> bool:
    return value_at(cfg, "fsdp_config.state_dict_type") == "sharded"


def _prepare_load_path(cfg: Mapping[str, Any], path: str, accept: Sequence[str]) -> dict[str, Any]:
    """Scans and compares what load_path names; of a save folder the host is given the newest checkpoint."""
    from ettin_foundry.training.checkpoints import read_head

    require(not path.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.lzma")), "load_path", "a .pt file", path,
            "the host unpacks archives without any check")
    if "://" in path or "{" in path:  # of other machines, or of this rank
        return {}
    require(not Path(path, "config.json").is_file(), "load_path", "a checkpoint, not a Hugging Face folder", path,
            f"run `ettin import {path} FILE.pt`, and set load_path=FILE.pt load_weights_only=true")
    head = read_head(path)
    if not head.record.get("config"):
        log.warning("load_path: %s does not say what model it holds, so nothing is compared", head.path)
    elif cfg.get("load_weights_only"):
        compare("load_path", Source(head.path, head.record), record_of(cfg), accept)
    else:
        check_resume(head.record, record_of(cfg), place=str(head.path), own=False, accept=accept)
    return {"load_path": str(head.path)}


def _prepare_source(cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checks the source that a callback names; the keys by which the host loads it, none for `ettin_cross`."""
    key, block = f"callbacks.{name}", cfg["callbacks"][name]
    given, crossing, keep_all = block["source"], name == "ettin_cross", block.get("keep") != "weights"
    remote = "://" in given
    require(not (remote and crossing), f"{key}.source", "a local file or folder", given, "download it first")
    if remote:  # the record comes with the callbacks' state, and EnterPhase checks it
        loading: dict[str, Any] = {"load_ignore_keys": [*PARTS_LEFT_OUT, *([] if keep_all else ["state/optimizers"])]}
    else:
        loading = {"load_weights_only": True}
        if keep_all:
            loading = {"load_ignore_keys": [*PARTS_LEFT_OUT, "state/callbacks"]}
    own_is_remote = "://" in (cfg.get("save_folder") or "") and cfg.get("autoresume")
    if remote or (own_is_remote and not Path(given).exists()):  # then it is needed unless the host finds this run's own
        return {} if crossing else {"load_path": given, **loading}
    source = read_source(f"{key}.source", given)
    if crossing:
        compare(key, source, record_of(cfg), block.get("accept", []))
        return {}
    path, optimizer, anew = source.path, cfg["optimizer"]["name"], f"set {key}.keep=weights to start the optimizer anew"
    if source.is_folder:
        raise ValueError(f"{key}.source: {path} is a Hugging Face folder, which holds no optimizer moments; use "
                         f"callbacks.ettin_cross, or `ettin import` it and {anew}")
    before = value_at(json.loads(source.record.get("run_config") or "{}"), "optimizer.name") or optimizer
    if keep_all and (not source.has_moments or before != optimizer):
        has = f"moments of {before}, not of {optimizer}" if source.has_moments else "no optimizer moments"
        raise ValueError(f"{key}.source: {path} holds {has}; give a whole checkpoint of the same optimizer, or {anew}")
    if path.is_dir() != _is_sharded(cfg):
        kind, other = ("a sharded checkpoint", "sharded") if path.is_dir() else ("one file", "full")
        raise ValueError(f"{key}.source: {path} is {kind}; set fsdp_config.state_dict_type={other}, as its run had it")
    compare(key, source, record_of(cfg), block.get("accept", []))
    return {"load_path": str(path), **loading}


# ------------------------------------------------------------------ going on


def check_resume(then: Mapping[str, Any], now: Mapping[str, Any], *, place: str, own: bool,
                 accept: Sequence[str] = ()) -> Differences:
    """What a run does otherwise than the checkpoint that it goes on from; refuses what `accept` does not list.

    then, now: records. own: the checkpoint lies in the run's own save folder; else a branch begins, whose optimizer's
    settings, schedule and length may differ unasked.
    """
    pairs = {"run_name": (then.get("run_name"), now.get("run_name"))} if own else {}
    pairs["model.objective"] = (_without_end(then.get("objective_schedule")), _without_end(now["objective_schedule"]))
    pairs |= {f"model.{key}": ((then.get("config") or {}).get(key), new) for key, new in now["config"].items()}
    found = {key: (old, new) for key, (old, new) in pairs.items() if None not in (old, new) and old != new}
    found |= _compare_tokenizers(then, now, place) | compare_configs(then, now)
    free = (*accept, *(() if own else ("optimizer", "scheduler", "max_duration")))
    refused = [key for key in found if key.startswith(_FIXED_KEYS) or not key.startswith(free)]
    if refused:
        differ = "; ".join(f"{key} must be {found[key][0]!r}, got {found[key][1]!r}" for key in refused)
        advice = "start a run of another name and save_folder, by callbacks.ettin_phase or ettin_cross"
        if not any(key.startswith(_FIXED_KEYS) for key in refused):
            advice = f"change it from here on: callbacks.ettin_clock.accept=[{','.join([*accept, *refused])}]"
        raise ValueError(f"{differ}: so it was in the checkpoint that this run resumes ({place}); restore it, or "
                         + advice)
    return found


def compare_configs(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """What differs between the configs in two records and can change learning, as the user typed it."""
    old, new = (json.loads(record.get("run_config") or "{}") for record in (then, now))
    if "max_duration" not in old or "max_duration" not in new:  # not written by a whole run
        return {}
    was, now = _learning(old), _learning(new)
    changed = [key for key in dict.fromkeys((*now, *was)) if was.get(key) != now.get(key)]
    found = {key: (value_at(old, key) or was.get(key), value_at(new, key) or now.get(key)) for key in changed}
    for key in (f"callbacks.{name}.source" for name in STARTS):
        a, b = value_at(old, key), value_at(new, key)
        if a and b and Path(a).resolve() != Path(b).resolve():
            found[key] = (a, b)
    runs = [parse_time("max_duration", config["max_duration"]) for config in (old, new)]
    if runs[0] != runs[1]:
        before = (then.get("tokens", 0), then.get("batch", 0))
        factors = [run_config.lr_factor(old["scheduler"], run, *before) for run in runs]
        if factors[0] is None or factors[0] != factors[1]:  # the learning rate would jump
            found["max_duration"] = (old["max_duration"], new["max_duration"])
    return found


def _learning(config: dict[str, Any]) -> dict[str, Any]:
    """Of a config what can change learning: {key: value}, with defaults, and with times and rates as numbers."""
    filled = {**keys.HOST_DEFAULTS, **config}
    for name in ("optimizer", "scheduler", "train_loader"):
        filled[name] = {**keys.DEFAULTS.get(config[name].get("name"), {}), **config[name]}
    if filled["optimizer"].get("max_lr") == filled["optimizer"].get("lr"):
        filled["optimizer"].pop("max_lr", None)  # its default
    total = run_config.total_tokens(config)
    if warmup := filled["train_loader"].get("batch_size_warmup"):
        tokens = check_warmup(warmup, config["global_train_batch_size"], total=total)
        filled["train_loader"]["batch_size_warmup"] = {**warmup, "tokens": tokens}
    found = {key: _as_number(value) for key, value in walk(filled) if value is not None and (
        key.startswith(_COMPARED_YET) or not key.startswith(_FREE_KEYS)
        and not any(re.fullmatch(pattern, key) for pattern in keys.NO_EFFECT))}
    rate = MaskRate.parse(filled["train_loader"].get("mask_rate", 0.0), total=total)
    return found | {"train_loader.mask_rate": _without_end(rate.plain())}


def _as_number(value: Any) -> Any:
    """A time as (number, unit), so that `2_000tok` is `2000tok`; anything else as it is."""
    with contextlib.suppress(ValueError):
        return parse_time("", value)
    return value


def _without_end(plain: Any) -> Any:
    """A schedule in plain data without the end of its last segment, which a longer run moves; a slope keeps it."""
    if isinstance(plain, list) and "from" not in plain[-1]:
        return [*plain[:-1], {key: value for key, value in plain[-1].items() if key != "until"}]
    return plain
