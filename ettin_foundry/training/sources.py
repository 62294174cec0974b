"""What a run starts from (nothing, its own checkpoints, or another run's), and whether it may.

All is compared before any work, by settings and records (`prepare_start`); the callbacks in start.py and clock.py compare
again, with what was built. Torch and the host are imported only once a file is read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.data import tokenizer
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import MaskRate
from ettin_foundry.training.run_config import config_text, model_config, must_be, objective_schedule, total_tokens, value_at

log = logging.getLogger(__name__)

STARTS = ("ettin_phase", "ettin_cross")
_SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
# what a phase may change unasked; causal follows from the objective, which is compared instead
_FREE_FIELDS = ("causal", "max_position_embeddings", "attn_out_dropout", "initializer_range", "initializer_cutoff_factor")
_ACCEPTABLE = (*(field.name for field in dataclasses.fields(EttinConfig)
                 if field.name not in (*_SHAPE_FIELDS, *_FREE_FIELDS)), "tokenizer")
# of a config: the same in every part of one run; the loader compares what the data is
_SAME = ("seed", "optimizer.name", "train_loader.packing", "train_loader.shuffle_seed", "train_loader.shuffle_window",
         "train_loader.dataset.split")
# the same too, unless a run of another name goes on from the checkpoint
_OPTIMIZER = tuple(f"optimizer.{key}" for key in ("lr", "max_lr", "betas", "eps", "weight_decay"))
PARTS_LEFT_OUT = ("state/timestamp", "state/dataset_state", "state/schedulers", "state/rank_zero_seed",
                  "state/train_metrics", "state/eval_metrics", "rng")
"""Of a checkpoint, what a phase that starts from it does not take."""

Differences = dict[str, tuple[Any, Any]]
"""{key: (the source's value, this run's)}."""


class Source(NamedTuple):
    """A checkpoint or Hugging Face folder to start from; `record` is as `Clock.state_dict`, or what config.json says."""

    path: Path
    record: Mapping[str, Any]
    has_moments: bool = False
    is_folder: bool = False


class Target(NamedTuple):
    """The run that starts: fields of its `EttinConfig`, objectives of its first batch, its tokenizer's fingerprint."""

    config: Mapping[str, Any]
    starts_with: tuple[str, ...]
    fingerprint: dict[str, Any] | None


def read_source(key: str, given: str) -> Source:
    """What a checkpoint (as for `checkpoints.locate`) or a Hugging Face folder says of itself; errors name the key."""
    from ettin_foundry.training.checkpoints import read_head

    try:
        if Path(given, "config.json").is_file():
            return _read_folder(Path(given))
        head = read_head(given)
        if not head.record.get("config"):
            raise ValueError(f"{head.path.name} does not say what model it holds; make one with `ettin import`")
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{key}: {given!r} given; {error}") from error
    return Source(head.path, head.record, head.has_moments)


def _read_folder(path: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    from ettin_foundry.model.hf_config import read_config, read_record

    config, objective = read_config(path / "config.json")
    for file in sorted(path.glob("*.safetensors")) or [path / "model.safetensors"]:
        try:
            with safe_open(file, "pt"):
                pass  # opening compares the header with the file's length
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); download or export it again") from error
    return Source(path, {**read_record(path), "config": dataclasses.asdict(config), "size": config.size,
                         "objective": objective, "tokenizer": str(path)}, is_folder=True)


def compare(key: str, source: Source, target: Target, accept: Sequence[str], *, crossing: bool) -> Differences:
    """A source's differences from the run that starts from it; refuses those that `accept` does not list.

    crossing: for `ettin_cross`, where objectives must differ; else for `ettin_phase`.
    """
    old, new = source.record["config"], target.config
    found = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    if shape := [f"{name} {was} (here {now})" for name, (was, now) in found.items() if name in _SHAPE_FIELDS]:
        raise ValueError(f"{key}.source: {source.path} has {', '.join(shape)}; its weights do not fit, so set model.size")
    free = (*_FREE_FIELDS, *(("window_left",) if crossing or old["causal"] != new["causal"] else ()))
    found = {name: values for name, values in found.items() if name not in free}
    found |= _compare_tokenizers(source, target) | _compare_objectives(key, source, target, accept, crossing)
    if refused := {name: values for name, values in found.items() if name not in accept}:
        pairs = ", ".join(f"{name} {was} (here {now})" for name, (was, now) in refused.items())
        raise ValueError(f"{key}.source: {source.path} has {pairs}; set the same here (rotary bases: "
                         f"variables.rope_theta=...), or allow it: {key}.accept=[{', '.join(refused)}]")
    return found


def _compare_tokenizers(source: Source, target: Target) -> Differences:
    old, new, named = source.record.get("tokenizer_fingerprint"), target.fingerprint, source.record.get("tokenizer")
    if not old and named and (Path(named) / "tokenizer.json").is_file():
        old = tokenizer.fingerprint(tokenizer.load(named))
    if old is None or new is None:
        if new is not None:
            log.warning("%s names no tokenizer that is here: whether it is this run's is not checked", source.path)
        return {}
    for name in ("vocab_size", "special_ids", "vocab_sha256", "probe_sha256"):
        if old.get(name) != new[name]:
            was, now = (f"{f.get('name')!r} with {name} {f.get(name)}" for f in (old, new))
            return {"tokenizer": (was, now)}
    return {}


def _compare_objectives(key: str, source: Source, target: Target, accept: Sequence[str], crossing: bool) -> Differences:
    old, new = source.record.get("objective"), " + ".join(target.starts_with)
    if crossing and old is None and target.starts_with != ("clm",) and not source.record["config"]["causal"]:
        raise ValueError(f"{key}.source: {source.path} does not say whether it predicts masks as mlm or mntp; run "
                         f"`ettin import {source.path} FILE.pt --objective mlm` (official encoders) and give FILE.pt")
    if crossing is not (old in target.starts_with):
        return {}
    trained = f"{key}.source: {source.path} was trained with {old}, and this run starts with {new}; "
    if crossing:
        raise ValueError(f"{trained}use callbacks.ettin_phase to go on with the same objective")
    decoder = "clm" in (old, *target.starts_with)
    if decoder or "objective" not in accept:
        raise ValueError(f"{trained}use callbacks.ettin_cross (yamls/phases/cross.yaml) to change it"
                         + ("" if decoder else f", or allow it: {key}.accept=[objective]"))
    return {"objective": (old, new)}


# ------------------------------------------------------------------ before work


def check_start(cfg: Mapping[str, Any]) -> None:
    """Refuses settings of the start that contradict each other; reads no file."""
    given = {f"callbacks.{name}": block or {} for name, block in (cfg.get("callbacks") or {}).items() if name in STARTS}
    if len(given) > 1:
        raise ValueError(" and ".join(f"{key}.source: {block.get('source')!r}" for key, block in given.items())
                         + " given; only one can give the weights (ettin_cross changes the objective)")
    for key, block in given.items():
        if not isinstance(block.get("source"), str) or not block["source"]:
            raise ValueError(f"{key}.source: not given; add variables.source=CHECKPOINT to the command line")
        for other in ("load_path", "load_ignore_keys"):
            if cfg.get(other):
                raise ValueError(f"{other}: {cfg[other]!r} given, and {key} takes the weights from {block['source']!r}; "
                                 "remove one of the two")
        possible, accept = (*_ACCEPTABLE, *(("objective",) if key.endswith("phase") else ())), block.get("accept", [])
        if not isinstance(accept, list) or not set(accept) <= set(possible):
            raise must_be(f"{key}.accept", f"a list of {', '.join(possible)}", accept, "no other key can differ")
        if block.get("keep", "all") not in ("all", "weights"):
            raise must_be(f"{key}.keep", "all (weights and optimizer moments) or weights", block["keep"], "correct it")
    if cfg.get("load_ignore_keys") and not given:
        raise ValueError(f"load_ignore_keys: {cfg['load_ignore_keys']!r} given; part of a checkpoint counts wrongly; use "
                         "callbacks.ettin_phase, or load_weights_only=true")
    for key in ("run_name", "save_folder"):
        if cfg.get("autoresume") and not (cfg.get(key) or (key == "run_name" and os.environ.get("RUN_NAME"))):
            raise ValueError(f"autoresume: given without {key}, by which it finds checkpoints; set it, or autoresume=false")


def prepare_start(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Scans what will be loaded, repairs the link that autoresume follows, and refuses what this run may not start from.

    Returns the keys to set in the config, by which the host loads the source of `ettin_phase`.
    """
    from ettin_foundry.training import checkpoints

    checkpoints.install_validation()  # also for files that the host downloads
    folder = (cfg.get("save_folder") or "").replace("{run_name}", cfg.get("run_name") or os.environ.get("RUN_NAME", ""))
    if cfg.get("autoresume") and "://" not in folder:
        rank, sharded = os.environ.get("RANK", "0"), _is_sharded(cfg)
        latest = cfg.get("save_latest_filename") or ("latest-sharded-rank{rank}" if sharded else "latest-rank{rank}.pt")
        latest = latest.replace("{rank}", rank if sharded else "0")
        if "{" not in folder + latest and (sharded or rank == "0"):
            checkpoints.repair_latest(folder, latest=latest)
        if own := checkpoints.newest_complete(folder):
            schedule = objective_schedule(cfg)
            now = {"run_name": cfg.get("run_name") or os.environ.get("RUN_NAME"), "objective": schedule.final,
                   "objective_schedule": schedule.plain(), "config": dataclasses.asdict(model_config(cfg)),
                   "run_config": config_text(cfg)}  # what Clock will say
            check_resume(checkpoints.read_head(own).record, now, place=str(own), own=True)
            return {}
    for name in STARTS:
        if name in (cfg.get("callbacks") or {}):
            return _prepare_source(cfg, name)
    path = cfg.get("load_path")
    if path and path.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.lzma")):
        raise must_be("load_path", "a .pt file", path, "the host unpacks archives without any check")
    if path and "://" not in path and "{" not in path:
        if not Path(path).exists():
            raise FileNotFoundError(f"load_path: {path!r} given; no such file")
        checkpoints.read_head(path) if Path(path, ".metadata").is_file() else checkpoints.load_checkpoint(path)
    return {}


def _is_sharded(cfg: Mapping[str, Any]) -> bool:
    return (cfg.get("fsdp_config") or {}).get("state_dict_type") == "sharded"


def _prepare_source(cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checks the source that a callback names; the keys by which the host loads it, none for `ettin_cross`."""
    key, block = f"callbacks.{name}", cfg["callbacks"][name]
    given, crossing, keep_all = block["source"], name == "ettin_cross", block.get("keep") != "weights"
    remote = "://" in given
    if remote and crossing:
        raise must_be(f"{key}.source", "a local file or folder", given, "download it first")
    # of a file that the host fetches, the record comes with the callbacks' state, and EnterPhase checks it
    loading: dict[str, Any] = {"load_weights_only": True} if not keep_all else {
        "load_ignore_keys": [*PARTS_LEFT_OUT, *(() if remote else ("state/callbacks",))]}
    own_is_remote = "://" in (cfg.get("save_folder") or "") and cfg.get("autoresume")
    if remote or (own_is_remote and not Path(given).exists()):  # then it is needed unless the host finds this run's own
        return {} if crossing else {"load_path": given, **loading}
    source = read_source(f"{key}.source", given)
    if not crossing:
        _check_loadable(key, source, keep_all, cfg["optimizer"]["name"], _is_sharded(cfg))
    target = Target(dataclasses.asdict(model_config(cfg)), tuple(objective_schedule(cfg).at(0)),
                    tokenizer.fingerprint(tokenizer.load(cfg["tokenizer"]["name"])))
    compare(key, source, target, block.get("accept", []), crossing=crossing)
    return {} if crossing else {"load_path": str(source.path), **loading}


def _check_loadable(key: str, source: Source, keep_all: bool, optimizer: str, sharded: bool) -> None:
    path, anew = source.path, f"set {key}.keep=weights to start the optimizer anew"
    if source.is_folder:
        raise ValueError(f"{key}.source: {path} is a Hugging Face folder, which holds no optimizer moments; use "
                         f"callbacks.ettin_cross, or `ettin import` it and {anew}")
    before = json.loads(source.record.get("run_config") or "{}").get("optimizer", {}).get("name", optimizer)
    if keep_all and (not source.has_moments or before != optimizer):
        has = f"moments of {before}, and optimizer.name is {optimizer}" if source.has_moments else "no optimizer moments"
        raise ValueError(f"{key}.source: {path} holds {has}; give a whole checkpoint of the same optimizer, or {anew}")
    if path.is_dir() != sharded:
        kind, other = ("a sharded checkpoint", "sharded") if path.is_dir() else ("one file", "full")
        raise ValueError(f"{key}.source: {path} is {kind}; set fsdp_config.state_dict_type={other}, as its run had it")


# ------------------------------------------------------------------ going on


def check_resume(then: Mapping[str, Any], now: Mapping[str, Any], *, place: str, own: bool) -> None:
    """Refuses to go on with what is another run, or another model, objective, mask rate, optimizer or order.

    then: the checkpoint's record. now: the same of this run, by the config or by `Clock`. place: the checkpoint.
    own: it lies in this run's own save folder, so run_name and optimizer must be the same.
    """
    pairs = [("run_name", now.get("run_name"), then.get("run_name"))] if own else []
    pairs += [("model.objective", _without_end(now.get(key)), _without_end(then.get(key)))
              for key in ("objective_schedule", "objective")]
    pairs += [(f"model.{key}", new, (then.get("config") or {}).get(key)) for key, new in (now.get("config") or {}).items()]
    if "run_config" in then:
        new_config, old_config = json.loads(now["run_config"]), json.loads(then["run_config"])
        for key in (*_SAME, *(_OPTIMIZER if own else ())):
            pairs.append((key, value_at(new_config, key), value_at(old_config, key)))
        pairs.append(("train_loader.mask_rate", _mask_rate(new_config), _mask_rate(old_config)))
        for key in (f"callbacks.{name}.source" for name in STARTS):
            new, old = value_at(new_config, key), value_at(old_config, key)
            if new and old and Path(new).resolve() != Path(old).resolve():
                pairs.append((key, new, old))
    for key, new, old in pairs:
        if new is not None and old is not None and new != old:
            raise ValueError(f"{key}: {new!r} in the config, {old!r} in the checkpoint that this run resumes ({place}); "
                             "restore it, or start a run of another name and save_folder: from load_path with another "
                             "learning rate, by callbacks.ettin_phase or ettin_cross with another phase or objective")


def _mask_rate(config: dict[str, Any]) -> Any:
    """Plain data in tokens, if there is one."""
    value, key = value_at(config, "train_loader.mask_rate"), "train_loader.mask_rate"
    return None if value is None else _without_end(MaskRate.parse(value, total=total_tokens(config), key=key).plain())


def _without_end(plain: Any) -> Any:
    """A schedule in plain data without the end of its last segment, which a longer max_duration moves; a slope keeps it."""
    if isinstance(plain, list) and "from" not in plain[-1]:
        return [*plain[:-1], {key: value for key, value in plain[-1].items() if key != "until"}]
    return plain
