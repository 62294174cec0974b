"""What a run starts from (nothing, its own checkpoints, or another run's), and what must be the same when it goes on.

`check_start` reads settings alone; `guard` also looks at the checkpoints on disk, before any work. How another run's
checkpoint is entered is in entry.py and phases.py. The resolved config and its hash, which every checkpoint carries, are
made here too. Nothing here imports torch or the host before a file is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import MaskRate

__all__ = ["FREE_FIELDS", "SHAPE_FIELDS", "check_resume", "check_start", "config_hash", "config_text", "guard"]

ENTRIES = ("ettin_phase", "ettin_cross")
SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Fields that the shapes of the tensors hang on: a source that differs in one cannot be loaded."""
FREE_FIELDS = ("causal", "max_position_embeddings", "attn_out_dropout", "initializer_range", "initializer_cutoff_factor")
"""Fields that a phase may change unasked: lengths and dropout are its business, the rest acts at initialisation only.
`causal` follows from the objective, which is compared instead."""
_ACCEPTABLE = (*(field.name for field in dataclasses.fields(EttinConfig)
                 if field.name not in (*SHAPE_FIELDS, *FREE_FIELDS)), "tokenizer")
_KEEP = ("all", "weights")
# what the host derives from the number of processes and writes into the config
_BY_HOST = ("n_gpus", "device_train_batch_size", "device_train_grad_accum")
# of a config: the same in every part of one run; the loader compares what the data is
_SAME = ("seed", *(f"optimizer.{key}" for key in ("name", "lr", "max_lr", "betas", "eps", "weight_decay")),
         *(f"train_loader.{key}" for key in ("packing", "shuffle_seed", "shuffle_window", "dataset.split")))


# ------------------------------------------------------------------ the config of a run, as text


def config_text(cfg: Mapping[str, Any]) -> str:
    """The resolved config as canonical JSON: keys sorted, without nulls and without what the host derives.

    So it is the same whatever the number of processes, and the same from `recipes.resolved` of a command line.

    Args:
        cfg: plain containers, interpolations resolved.
    """
    config = {key: value for key, value in cfg.items() if value is not None and key not in _BY_HOST}
    if "eval_loaders" in config:  # the host's name for a list
        config["eval_loader"] = config.pop("eval_loaders")
    micro = config.get("device_train_microbatch_size")
    if config.get("device_eval_batch_size") == (1 if micro == "auto" else micro):  # the host's default
        config.pop("device_eval_batch_size", None)
    if callbacks := config.get("callbacks"):
        config["callbacks"] = {name: block for name, block in callbacks.items() if name != "ettin_clock"}
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def config_hash(text: str) -> str:
    """sha256 of a `config_text`, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------ settings


def check_start(cfg: Mapping[str, Any]) -> None:
    """Refuses settings of the start that contradict each other; reads no file.

    Raises:
        ValueError: naming the key, what was given, what is allowed and what to do.
    """
    callbacks = cfg.get("callbacks") or {}
    given = [name for name in ENTRIES if name in callbacks]
    if len(given) > 1:
        sources = " and ".join(f"callbacks.{name}: {(callbacks[name] or {}).get('source')!r}" for name in given)
        raise ValueError(f"{sources} given; only one can give the weights. Keep ettin_phase to go on with the same "
                         "objective, ettin_cross to change it")
    for name in given:
        _check_entry(cfg, f"callbacks.{name}", callbacks[name] or {})
    if cfg.get("load_ignore_keys") and not given:
        raise ValueError(f"load_ignore_keys: {cfg['load_ignore_keys']!r} given; which parts of a checkpoint are taken is "
                         "one decision, and half of it gives a run that counts wrongly. Enter a phase with "
                         "callbacks.ettin_phase (yamls/phases), or take weights alone with load_weights_only=true")
    for key in ("run_name", "save_folder"):
        if cfg.get("autoresume") and not (cfg.get(key) or (key == "run_name" and os.environ.get("RUN_NAME"))):
            raise ValueError(f"autoresume: True given without {key}; it looks for this run's checkpoints in save_folder. "
                             f"Set {key}, or autoresume=false")


def _check_entry(cfg: Mapping[str, Any], key: str, block: Mapping[str, Any]) -> None:
    source, accept = block.get("source"), block.get("accept", [])
    if not isinstance(source, str) or not source:
        raise ValueError(f"{key}.source: not given; the checkpoint to start from is needed. Add variables.source=... to the "
                         "command line")
    for other in ("load_path", "load_ignore_keys"):
        if cfg.get(other):
            raise ValueError(f"{other}: {cfg[other]!r} given, and {key} already takes the weights from {source!r}. Remove "
                             "one of the two")
    if not isinstance(accept, list):
        raise ValueError(f"{key}.accept: {accept!r} given; a list of keys that may differ from the source is needed, such "
                         "as [global_rope_theta]. Correct it")
    possible = (*_ACCEPTABLE, *(("objective",) if key.endswith("ettin_phase") else ()))
    for name in accept:
        if name in SHAPE_FIELDS:
            raise ValueError(f"{key}.accept: {name!r} given; weights of another {name} cannot be loaded, so it must be the "
                             "same. Remove it")
        if name not in possible:
            raise ValueError(f"{key}.accept: {name!r} given; what may differ if it is listed is {', '.join(possible)}. "
                             "Correct or remove it")
    if block.get("keep", "all") not in _KEEP:
        raise ValueError(f"{key}.keep: {block['keep']!r} given; 'all' (weights and optimizer moments) or 'weights' is "
                         "possible")


# ------------------------------------------------------------------ checkpoints on disk


def guard(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Scans what will be loaded, mends the link that autoresume follows, and refuses what must not go on or be entered.

    Returns:
        Keys to set in the config, by which the host loads the source of `ettin_phase`.

    Raises:
        ValueError, FileNotFoundError: naming the key and both values.
    """
    from ettin_foundry.training import checkpoints as checkpoint  # imports torch

    checkpoint.install_validation()  # also for files that the host downloads
    folder = (cfg.get("save_folder") or "").replace("{run_name}", cfg.get("run_name") or os.environ.get("RUN_NAME", ""))
    if cfg.get("autoresume") and "://" not in folder:
        sharded = (cfg.get("fsdp_config") or {}).get("state_dict_type") == "sharded"
        rank = int(os.environ.get("RANK", "0"))
        latest = cfg.get("save_latest_filename") or ("latest-sharded-rank{rank}" if sharded else "latest-rank{rank}.pt")
        latest = latest.replace("{rank}", str(rank if sharded else 0))
        if "{" not in folder + latest and (sharded or rank == 0):
            checkpoint.repair_latest(folder, latest=latest)
        own = checkpoint.newest_complete(folder)
        if own is not None:
            head = checkpoint.read_head(own)
            check_resume(head.record, _describe(cfg), place=str(own), own=True)
            _check_data(cfg, head)
            return {}
    entry = next((name for name in ENTRIES if name in (cfg.get("callbacks") or {})), None)
    if entry is not None:
        from ettin_foundry.training.entry import prepare

        return prepare(cfg, entry)
    path = cfg.get("load_path")
    if path and "://" not in path and "{" not in path:
        if not Path(path).exists():
            raise FileNotFoundError(f"load_path: {path!r} given; no such file. Give a checkpoint such as "
                                    "runs/NAME/latest-rank0.pt")
        checkpoint.scan_pickle(path)
    return {}


def _describe(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What Clock will say of the run that a config describes."""
    from ettin_foundry.training.run_config import model_config, objective_schedule

    cfg = dict(cfg)
    schedule = objective_schedule(cfg)
    return {"run_name": cfg.get("run_name") or os.environ.get("RUN_NAME"), "objective": schedule.final,
            "objective_schedule": schedule.plain(), "config": dataclasses.asdict(model_config(cfg)),
            "run_config": config_text(cfg)}


def _check_data(cfg: Mapping[str, Any], head: Any) -> None:
    dataset = cfg["train_loader"]["dataset"]
    folder = Path(dataset["local"]) / dataset.get("split", "train")
    old = head.data.get("fingerprint")
    if old is None or dataset.get("remote"):
        return  # the loader compares, once the set is here
    from ettin_foundry.data.mixture import open_split

    if (new := open_split(folder).fingerprint) != old:
        raise ValueError(f"train_loader.dataset: {str(folder)!r} with fingerprint {new} given, {old} in the checkpoint that "
                         f"this run resumes ({head.path}); with other data rows would be skipped or repeated. Restore the "
                         "data, or choose another run_name and save_folder")


# ------------------------------------------------------------------ going on


def check_resume(then: Mapping[str, Any], now: Mapping[str, Any], *, place: str, own: bool) -> None:
    """Refuses to go on with what is another run, or another model, objective, mask rate, optimizer or order.

    Args:
        then: the checkpoint's record. now: the same of this run, by the config or by `Clock`.
        place: the checkpoint, for messages.
        own: it lies in this run's own save folder, so it must be of the same run_name.

    Raises:
        ValueError: the first difference, with both values.
    """
    def refuse(key: str, new: Any, old: Any, why: str, advice: str) -> ValueError:
        return ValueError(f"{key}: {new!r} in the config, {old!r} in the checkpoint that this run resumes ({place}); {why}. "
                          f"{advice}, or choose another run_name and save_folder to start a new run")

    if own and then.get("run_name") not in (None, now.get("run_name")):
        raise refuse("run_name", now.get("run_name"), then["run_name"], "the save_folder holds another run",
                     "Restore the name")
    for key in ("objective_schedule", "objective"):
        new, old = _without_end(now.get(key)), _without_end(then.get(key))
        if old is not None and new != old:
            raise refuse("model.objective", new, old, "in the middle of a run only the same is allowed",
                         "Restore it, give the checkpoint as callbacks.ettin_cross.source of a new run")
    for key, new in (now.get("config") or {}).items():
        old = (then.get("config") or {}).get(key, new)
        if old != new:
            raise refuse(f"model.{key}", new, old, "with another value the model would compute something else", "Restore it")
    if "run_config" not in then:
        return  # of an earlier version
    old_config, new_config = json.loads(then["run_config"]), json.loads(now["run_config"])
    pairs = [(key, _at(new_config, key), _at(old_config, key)) for key in _SAME]
    pairs.append(("train_loader.mask_rate", _mask_rate(new_config), _mask_rate(old_config)))
    for key, new, old in pairs:
        if new is not None and old is not None and new != old:
            raise refuse(key, new, old, "in the middle of a run only the same is allowed", "Restore the value")
    for name in ENTRIES:
        new, old = (_at(config, f"callbacks.{name}.source") for config in (new_config, old_config))
        if new and old and Path(new).resolve() != Path(old).resolve():
            raise refuse(f"callbacks.{name}.source", new, old, "the run has started from that one already, so another would "
                         "have no effect", "Restore it")


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _mask_rate(config: dict[str, Any]) -> Any:
    """Plain data in tokens; None without a loader of ours."""
    from ettin_foundry.training.run_config import total_tokens

    value = _at(config, "train_loader.mask_rate")
    if value is None:
        return None
    return _without_end(MaskRate.parse(value, total=total_tokens(config), key="train_loader.mask_rate").plain())


def _without_end(plain: Any) -> Any:
    """A schedule in plain data without the end of its last segment, which a longer max_duration moves; a slope keeps it."""
    if isinstance(plain, list) and "from" not in plain[-1]:
        return [*plain[:-1], {key: value for key, value in plain[-1].items() if key != "until"}]
    return plain
