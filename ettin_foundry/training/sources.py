"""What a run starts from (nothing, its own checkpoints, or another run's), and whether it may.

All is compared before any work, by settings and records (`prepare_start`); callbacks.py and clock.py
compare again, with what was built. A record is what `Clock.state_dict` writes, its JSON read. Torch and the host are
imported only once a file is read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ettin_foundry import REGISTRY
from ettin_foundry.data import tokenizer
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training import run_config
from ettin_foundry.training.run_config import parse_time, require, value_at

if TYPE_CHECKING:
    from ettin_foundry.training.checkpoints import Head

log = logging.getLogger(__name__)

STARTS = ("ettin_phase", "ettin_cross")
_SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# what a phase may change unasked; causal follows from the objective, which is compared instead
_FREE_FIELDS = ("causal", "max_position_embeddings", "attn_out_dropout", "initializer_range",
                "initializer_cutoff_factor")
# keys that a resumed run may change, beside NO_EFFECT: paths and evaluation, and what is compared apart
_FREE_KEYS = re.compile(r"callbacks\.(?!global_lr_scaling|layer_freezing)|train_loader\.(objective|dataset\.(?!split))|"
                        "(code_paths|compile_config|device_|eval_|fsdp_config|icl_|load_|max_duration|model|only_|"
                        "run_name|save_|spin_dataloaders|tokenizer|tp_config)")
PARTS_LEFT_OUT = ("state/timestamp", "state/dataset_state", "state/schedulers", "state/rank_zero_seed",
                  "state/train_metrics", "state/eval_metrics", "rng")
"""Of a checkpoint, what a phase that starts from it does not take."""

Differences = dict[str, tuple[Any, Any]]  # {key: (then, now)}


class Finished(ValueError):
    """The newest checkpoint of a run's own folder has come to max_duration: nothing is left to train."""


def is_finished(record: Mapping[str, Any], max_duration: Any) -> bool:
    amount, unit = parse_time("max_duration", max_duration)
    return int(record.get("tokens" if unit == "tok" else "batch") or 0) >= amount


def record_of(cfg: Mapping[str, Any], *, read_tokenizer: bool = True) -> dict[str, Any]:
    """What the record of this config's run will say at its start."""
    schedule = run_config.objective_schedule(cfg)
    tokens = tokenizer.fingerprint(tokenizer.load(cfg["tokenizer"]["name"])) if read_tokenizer else None
    return {"run_name": _run_name(cfg), "objective": schedule.final,
            "objective_schedule": schedule.plain(), "config": dataclasses.asdict(run_config.model_config(cfg)),
            "tokenizer_fingerprint": tokens, "run_config": run_config.config_text(cfg)}


def read_source(key: str, given: str) -> Head:
    """What a checkpoint (as for `checkpoints.locate`) or a Hugging Face folder says of itself; errors name the key."""
    from ettin_foundry.model.hf_config import read_config, read_record
    from ettin_foundry.training.checkpoints import Head, naming, read_head

    try:
        if "ettin_cross" in key and (path := Path(given, "config.json")).is_file():
            config, objective = read_config(path)
            said = {"config": dataclasses.asdict(config), "size": config.size, "objective": objective}
            with naming(path.parent):
                return Head(path.parent, {**read_record(path.parent), **said, "tokenizer": given}, {}, False)
        head = read_head(given)
        if not head.record.get("config"):
            raise ValueError(f"{head.path.name} does not say what model it holds; make one with `ettin import`")
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{key}: {given!r} given; {error}") from error
    return head


def describe(found: Differences) -> str:
    return ", ".join(f"{key} {old} -> {new}" for key, (old, new) in found.items())


def compare(key: str, source: Head, now: Mapping[str, Any], accept: Sequence[str] = ()) -> Differences:
    """What another run's weights differ in from the run that takes them; refuses what `accept` does not list.

    key: where the source is named: of `ettin_cross` (objectives must differ), `ettin_phase`, or load_path.
    """
    crossing, place = "ettin_cross" in key, f"{key}: {source.path}"
    old, new = source.record["config"], now["config"]
    found = _compare_models(source.record, now, source.path)
    if shape := [f"{name} {was} (here {now})" for name, (was, now) in found.items() if name in _SHAPE_FIELDS]:
        raise ValueError(f"{place} has {', '.join(shape)}; its weights do not fit, so set model.size")
    free = (*_FREE_FIELDS, *(("window_left",) if crossing or old["causal"] != new["causal"] else ()))
    found = {name: values for name, values in found.items() if name not in free}
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
        list_key = ("callbacks.ettin_clock." if key == "load_path" else key.removesuffix("source")) + "accept"
        raise ValueError(f"{place} has {pairs}; set the same here (rotary bases: variables.rope_theta=...; objective: "
                         f"callbacks.ettin_cross), or allow it: {list_key}=[{','.join(refused)}]")
    return found


def _compare_models(then: Mapping[str, Any], now: Mapping[str, Any], place: Any) -> Differences:
    """Fields of the models of two records, and `tokenizer`, that differ; `place` of the first is for a warning."""
    was = then.get("config") or {}
    found = {name: (was[name], value) for name, value in now["config"].items() if name in was and was[name] != value}
    old, new, folder = then.get("tokenizer_fingerprint"), now.get("tokenizer_fingerprint"), then.get("tokenizer")
    if not old and folder and (Path(folder) / "tokenizer.json").is_file():
        old = tokenizer.fingerprint(tokenizer.load(folder))
    if new and not old:
        log.warning("%s names no tokenizer that is here: whether it is this run's is not checked", place)
    elif old and new and (differ := [name for name in tokenizer.COMPARED if old.get(name) != new[name]]):
        first, second = (f"{each.get('name')!r} with {differ[0]} {each.get(differ[0])}" for each in (old, new))
        found["tokenizer"] = (first, second)
    return found


def check_start(cfg: Mapping[str, Any]) -> None:
    """Refuses settings of the start that contradict each other; reads no file."""
    for name in (*STARTS, "ettin_clock"):
        accept = value_at(cfg, f"callbacks.{name}.accept")
        require(isinstance(accept or [], list), f"callbacks.{name}.accept", "a list of keys", accept, "add brackets")
    given = {f"callbacks.{name}": block or {} for name, block in (cfg.get("callbacks") or {}).items() if name in STARTS}
    for key, block in given.items():
        source, keep = block.get("source"), block.get("keep", "all")
        require(isinstance(source, str) and source, f"{key}.source", "a checkpoint or folder", source,
                "add variables.source=CHECKPOINT to the command line")
        require(keep in ("all", "weights"), f"{key}.keep", "all (weights and moments) or weights", keep, "correct it")
    named = [key for key in (*(f"{key}.source" for key in given), "load_path") if value_at(cfg, key)]
    for key in named[1:]:
        require(False, key, f"left out with {named[0]}={value_at(cfg, named[0])}", value_at(cfg, key),
                "only one can give the weights")


def _run_name(cfg: Mapping[str, Any]) -> str:
    return cfg.get("run_name") or os.environ.get("RUN_NAME", "")


def prepare_start(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Scans what will be loaded, repairs the link that autoresume follows, refuses what this run may not start from.

    Returns the keys to set in the config, by which the host loads what is meant.
    """
    from ettin_foundry.training import checkpoints, saving

    saving.wait_for_write()  # of a run before in this process
    accept = value_at(cfg, "callbacks.ettin_clock.accept") or []
    folder = (cfg.get("save_folder") or "").replace("{run_name}", _run_name(cfg))
    if cfg.get("autoresume") and "://" in folder:
        Path(folder, "latest-rank0.pt").unlink(missing_ok=True)  # the host would take its last download again
    if cfg.get("autoresume") and "://" not in folder and (own := checkpoints.repair_latest(folder)):
        record, now = checkpoints.read_head(own).record, record_of(cfg, read_tokenizer=False)
        check_resume(record, now, place=str(own), own=True, accept=accept)
        if is_finished(record, cfg["max_duration"]):
            raise Finished(f"{own} holds {record['tokens']:,} tokens, {record['batch']:,} steps, and max_duration is "
                           f"{cfg['max_duration']}; a larger one goes on from there")
        return {}
    for name in STARTS:
        if name in (cfg.get("callbacks") or {}):
            return _prepare_source(cfg, f"callbacks.{name}.source", cfg["callbacks"][name])
    path, weights_only = cfg.get("load_path") or "", cfg.get("load_weights_only")
    if not path or "{" in path or "://" in path and not weights_only:  # of this rank, or compared by the clock
        return {}
    if not weights_only:
        head = read_source("load_path", path)
        check_resume(head.record, record_of(cfg), place=str(head.path), own=False, accept=accept)
        return {"load_path": str(head.path)}
    block = {"accept": list(accept), "keep": "weights"}  # a phase in all but name
    return {**_prepare_source(cfg, "load_path", {"source": path, **block}),
            "callbacks": {**(cfg.get("callbacks") or {}), "ettin_phase": block}}


def _prepare_source(cfg: Mapping[str, Any], key: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the source that a callback or load_path names; the keys by which the host loads it."""
    given, keep_all = block["source"], "ettin_phase" in key and block.get("keep") != "weights"
    loading: dict[str, Any] = {"load_path": given, "load_weights_only": True}
    if "://" in given:  # the record comes with the callbacks' state
        log.warning("%s: %s is compared with this run once it is loaded", key, given)
        ignored = [*PARTS_LEFT_OUT, *([] if keep_all else ["state/optimizers"])]
        return {"load_path": given, "load_weights_only": False, "load_ignore_keys": ignored}
    if keep_all:
        loading = {"load_path": given, "load_ignore_keys": [*PARTS_LEFT_OUT, "state/callbacks"]}
    own_is_remote = "://" in (cfg.get("save_folder") or "") and cfg.get("autoresume")
    if own_is_remote and not Path(given).exists():  # it is needed unless the host finds this run's own
        return loading
    source, optimizer = read_source(key, given), cfg["optimizer"]["name"]
    compare(key, source, record_of(cfg), block.get("accept", []))
    path, before = source.path, value_at(json.loads(source.record.get("run_config") or "{}"), "optimizer.name")
    if (path / "config.json").is_file():
        return {}
    if keep_all and (not source.has_moments or before not in (None, optimizer)):
        has = f"moments of {before}, not of {optimizer}" if source.has_moments else "no optimizer moments"
        raise ValueError(f"{key}: {path} holds {has}; give a whole checkpoint of the same optimizer, or set "
                         "callbacks.ettin_phase.keep=weights to start the optimizer anew")
    if path.is_dir() != (value_at(cfg, "fsdp_config.state_dict_type") == "sharded"):
        kind, other = ("a sharded checkpoint", "sharded") if path.is_dir() else ("one file", "full")
        raise ValueError(f"{key}: {path} is {kind}; set fsdp_config.state_dict_type={other}, as its run had it")
    return {**loading, "load_path": str(path)}


def check_resume(then: Mapping[str, Any], now: Mapping[str, Any], *, place: str, own: bool,
                 accept: Sequence[str] = ()) -> Differences:
    """What a run does otherwise than the checkpoint that it goes on from; refuses what `accept` does not list.

    then, now: records. own: the checkpoint lies in the run's own save folder; else a branch begins, whose optimizer's
    settings, schedule and length may differ unasked.
    """
    pairs = {"run_name": (then.get("run_name"), now.get("run_name"))} if own else {}
    if then.get("objective_schedule"):
        pairs["model.objective"] = (run_config.open_ended(then["objective_schedule"]),
                                    run_config.open_ended(now["objective_schedule"]))
    found = {key: (old, new) for key, (old, new) in pairs.items() if old and new and old != new}
    found |= {key if key == "tokenizer" else f"model.{key}": values
              for key, values in _compare_models(then, now, place).items()}
    found |= compare_configs(then, now)
    free = (*accept, *(() if own else ("optimizer", "scheduler", "max_duration")))
    if refused := [key for key in found if not key.startswith(free)]:
        differ = "; ".join(f"{key} must be {found[key][0]!r}, got {found[key][1]!r}" for key in refused)
        raise ValueError(f"{differ}: so it was in the checkpoint that this run resumes ({place}); restore it, or "
                         f"allow it from now on: callbacks.ettin_clock.accept=[{','.join([*accept, *refused])}] (other "
                         "rows or shapes need another name and save_folder, and callbacks.ettin_phase or ettin_cross)")
    return found


def compare_configs(then: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """What differs between the configs in two records and can change learning."""
    old, new = configs = [json.loads(record.get("run_config") or "{}") for record in (then, now)]
    if "max_duration" not in old or "max_duration" not in new:  # not written by a whole run
        return {}
    runs = [parse_time("max_duration", config["max_duration"]) for config in configs]
    # the run's length is compared below
    was, here = (run_config.settings(config, runs[0]) for config in configs)
    found = {key: (was.get(key), here.get(key)) for key in dict.fromkeys((*here, *was))
             if was.get(key) != here.get(key) and not _FREE_KEYS.match(key)
             and not any(re.fullmatch(pattern, key) for pattern in run_config.NO_EFFECT)}
    if found.get("optimizer.max_lr") == found.get("optimizer.lr"):
        found.pop("optimizer.max_lr", None)  # lr, by default
    for key in (f"callbacks.{name}.source" for name in STARTS):
        a, b = was.get(key), here.get(key)
        if a and b and Path(a).resolve() != Path(b).resolve():
            found[key] = (a, b)
    if runs[0] != runs[1] and _lr_jumps(old["scheduler"], runs, then):
        found["max_duration"] = (old["max_duration"], new["max_duration"])
    return found


def _lr_jumps(scheduler: Mapping[str, Any], runs: Sequence[tuple[float, str]], then: Mapping[str, Any]) -> bool:
    """Whether the learning rate where a record ends depends on the run's length; yes, for a scheduler of the host."""
    now = {"tok": then.get("tokens", 0), "ba": then.get("batch", 0)}
    return scheduler["name"] not in REGISTRY["schedulers"] or len(
        {run_config.lr_factor(run_config.filled(scheduler), run, now.__getitem__) for run in runs}) > 1
