"""Refuses a run that would fail late, train something else than it says, or ignore a setting, before any work is done.

`check_config` is a config transform of LLM-Foundry, so stock `llmfoundry train` is protected as `train.py` is; runs
without our model and loader are left alone. A refusal is one ValueError (FileNotFoundError for files) that says the key
as one types it, what is allowed, what was given, what to do. What a part checks when it is built is not repeated here.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ettin_foundry.data.cache import fetch_tokenizer
from ettin_foundry.data.stream import DATASET_KEYS, check_warmup
from ettin_foundry.model.config import did_you_mean
from ettin_foundry.objectives.schedule import MASKED_OBJECTIVES, MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.training import run_config
from ettin_foundry.training.run_config import PARAMETERS, loaders, parse_time, require, total_tokens, value_at, walk
from ettin_foundry.training.sources import check_start, prepare_start

_BLOCKS = ("model", "tokenizer", "optimizer", "scheduler", "train_loader")
_LOGGERS = ("wandb", "tensorboard", "mlflow", "inmemory", "in_memory_logger", "mosaicml", "ettin_console")
_BESIDE_CONSOLE = {"progress_bar": False, "log_to_console": False}  # the second is the host's default
_NEEDED = (*_BLOCKS, "max_duration", "max_seq_len", "global_train_batch_size", "device_train_microbatch_size")


def _is_ours(cfg: dict[str, Any]) -> bool:
    blocks = [cfg.get("model"), *(block for _, block in loaders(cfg))]
    return any(isinstance(b, dict) and b.get("name") in ("ettin", "ettin_text", "ettin_contrastive") for b in blocks)


def check_settings(cfg: dict[str, Any]) -> None:
    """Refuses a config (plain containers, resolved) that no machine could run as written; reads no file, no device."""
    if _is_ours(cfg):
        for check in (_check_presence, _check_leaves, _check_blocks, _check_keys, _check_objectives,
                      _check_times, _check_effect, check_start):
            check(cfg)


def _check_presence(cfg: dict[str, Any]) -> None:
    for key in _NEEDED:
        require(cfg.get(key) is not None, key, "given", None, "start from a complete recipe in yamls/")
    for key in _BLOCKS:
        require(isinstance(value_at(cfg, f"{key}.name"), str), key, "a block with a name", cfg[key], "see yamls/")
    for key in sorted(set(cfg) - set(run_config.HOST), key=str):
        near = did_you_mean(key, run_config.HOST) or "; your own values belong under variables"
        raise ValueError(f"{key}: unknown key{near}")
    require(not set(str(cfg.get("run_name"))) & set("{}[]"), "run_name", "a name without brackets", cfg.get("run_name"),
            "set variables.label or run_name")
    require(str(cfg.get("precision")).lower() != "amp_fp16", "precision", "amp_bf16 or fp32", cfg.get("precision"),
            "in fp16 the loss underflows")
    packed = cfg["train_loader"].get("packing", True)
    require(not packed or cfg.get("accumulate_train_batch_on_tokens", True) is not False,
            "accumulate_train_batch_on_tokens", "true with packing, whose rows hold unequal numbers of targets", False,
            "remove it, or unpack as well (yamls/phases/original.yaml)")


def _check_blocks(cfg: dict[str, Any]) -> None:
    """The loaders belong to the model, each to its role, and all have one length."""
    name = cfg["model"]["name"]
    for key, block in loaders(cfg):
        loader = block.get("name")
        require((name == "ettin") is (loader == "ettin_text"), f"{key}.name", "ettin_text with model.name: ettin, and "
                "text with others (the shards are plain MDS)", loader, f"model.name is {name}")
        require(value_at(block, "dataset.local"), f"{key}.dataset", "{local: folder, split: name}",
                block.get("dataset"), "local is what ettin convert wrote; quote a name such as null")
        endless, shuffle = key == "train_loader", block.get("shuffle", True)
        require(shuffle is endless, f"{key}.shuffle", str(endless).lower(), shuffle,
                "training is endless, evaluation is not")
    for key, block in (("model", cfg["model"]), *loaders(cfg)):
        require(block.get("max_seq_len") == cfg["max_seq_len"], f"{key}.max_seq_len",
                f"{cfg['max_seq_len']!r}, as max_seq_len is", block.get("max_seq_len"),
                "set it once: variables.max_seq_len=...")


def _check_objectives(cfg: dict[str, Any]) -> None:
    """Shape, and objectives and mask rates of model and loaders over the whole run, agree."""
    run_config.model_config(cfg)
    train, objective = cfg["train_loader"], cfg["model"]["objective"]
    require(train.get("objective") == objective, "train_loader.objective", f"{objective!r}, as model.objective is",
            train.get("objective"), "set it once: variables.objective=...")
    check_together(run_config.objective_schedule(cfg), _mask_rate(cfg), "train_loader.")
    for key, block in _evaluations(cfg):
        rate = block.get("mask_rate", 0.0)
        require(not isinstance(rate, list), f"{key}.mask_rate", "one rate, so that losses can be compared", rate,
                "give one such as 0.15")
        check_together(ObjectiveSchedule.parse(block["objective"]), MaskRate.parse(rate, key=f"{key}.mask_rate"),
                       f"{key}.")


def _mask_rate(cfg: dict[str, Any]) -> MaskRate:
    rate = cfg["train_loader"].get("mask_rate", 0.0)
    return MaskRate.parse(rate, total=total_tokens(cfg), key="train_loader.mask_rate")


def _evaluations(cfg: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, block) of each evaluation: a loader under each objective of its name, list of names, or schedule."""
    for key, block in list(loaders(cfg))[1:]:
        value = block.get("objective")
        parts = value if isinstance(value, list) and value and all(isinstance(part, str) for part in value) else [value]
        names = [name for part in parts for name in
                 ObjectiveSchedule.parse(part, total=total_tokens(cfg), key=f"{key}.objective").objectives]
        require(len(set(names)) == len(names), f"{key}.objective", "a list in which each objective stands once", value,
                "remove one")
        for name in names:
            unused = {"mask_rate"} if len(names) > 1 and name not in MASKED_OBJECTIVES else ()
            label = {"label": f"{block['label']}/{name}" if block.get("label") else name} if len(names) > 1 else {}
            yield key, {**{k: v for k, v in block.items() if k not in unused}, "objective": name, **label}


def _check_times(cfg: dict[str, Any]) -> None:
    duration, scheduler, spent = cfg["max_duration"], cfg["scheduler"], 0.0
    total, unit = parse_time("max_duration", duration)
    require(unit in ("tok", "ba"), "max_duration", "in tok or ba", duration, "give it in tokens")
    intervals = {"save_interval": cfg.get("save_interval")} if cfg.get("save_folder") else {}
    if len(list(loaders(cfg))) > 1 and (interval := cfg.get("eval_interval", 1)) != 0:  # 1, an epoch: the default
        intervals["eval_interval"] = interval
    for key, value in intervals.items():
        require(value is None or parse_time(key, value)[1] != "dur", key, "in tok or ba", value,
                "the host takes shares of a run only where the loader ends, and this one never does")
    for name in ("t_warmup", "t_decay"):
        value, its_unit = parse_time(f"scheduler.{name}", scheduler.get(name, "0tok"))
        # tokens are counted in a run of batches too; whether they fit into it is not known before
        require(not value or its_unit in ("dur", "tok", unit), f"scheduler.{name}",
                f"in {unit} or dur, as max_duration ({duration}) is", scheduler.get(name), "change one of the two")
        spent += value if its_unit == "dur" else value / total if its_unit == unit else 0.0
    require(value or not {"t_decay", "alpha_f"} <= set(scheduler), "scheduler.alpha_f", "left out where t_decay is 0",
            scheduler.get("alpha_f"), "remove it or give t_decay")
    # shares such as 0.3dur + 0.7dur may sum to a hair above 1
    require(spent <= 1 + 1e-12, "scheduler", f"a warm-up and a decay that fit into max_duration ({duration})",
            scheduler, "shorten them or lengthen the run")


_FILLED = ("microbatch_size", "fixed_shapes")  # keys of loaders that the transform sets
def _check_leaves(cfg: Mapping[str, Any]) -> None:
    """Refuses names and paths that YAML took for numbers or blocks, and values of other kinds."""
    for key, value in walk({name: block for name, block in cfg.items() if name != "variables"}):
        *above, last = re.split(r"[.\[]", key)
        fits = last not in run_config.TEXT_KEYS or value is None or isinstance(value, str)
        require(fits and run_config.TEXT_KEYS.isdisjoint(above), key, "text", value, "put it in quotes")
    run_config.check_kinds(cfg)


def _check_keys(cfg: Mapping[str, Any]) -> None:
    """Refuses unknown keys in blocks of ours."""
    for key, block in loaders(cfg):
        odd = {*_FILLED, "batch_size_warmup" if key != "train_loader" else "label"}  # the last, of the other kind
        _check_known(key, block, [each for each in ("name", *PARAMETERS["ettin_text"], "label") if each not in odd])
        if isinstance(block.get("dataset"), Mapping):
            _check_known(f"{key}.dataset", block["dataset"], DATASET_KEYS)
    for key in ("model", "optimizer", "scheduler"):
        if (name := cfg[key]["name"]) in PARAMETERS:
            _check_known(key, cfg[key], ["name", *PARAMETERS[name]])
    callbacks = cfg.get("callbacks") or {}
    for name, block in (*callbacks.items(), *(cfg.get("loggers") or {}).items()):
        if name in PARAMETERS:
            _check_known(f"{'callbacks' if name in callbacks else 'loggers'}.{name}", block or {}, PARAMETERS[name])
    names = {f"{key}.name": cfg[key]["name"] for key in ("model", "optimizer", "scheduler", "train_loader")}
    for key, name in (*names.items(), *((f"callbacks.{name}", name) for name in callbacks)):
        if name not in PARAMETERS and (near := did_you_mean(name, PARAMETERS, 0.85)):  # the host's are less alike
            raise ValueError(f"{key}: {name!r} given{near}")

def _check_known(key: str, block: Mapping[str, Any], allowed: Any) -> None:
    if unknown := sorted(set(block) - set(allowed), key=str):
        known = did_you_mean(unknown[0], allowed) or f"; it takes {', '.join(allowed) or 'no key'}"
        raise ValueError(f"{key}.{unknown[0]}: unknown key{known}")


def _check_effect(cfg: Mapping[str, Any]) -> None:
    """Refuses features of the host that need another kind of model or data, and settings that would do nothing."""
    for key, instead in run_config.KEYS["host_only"].items():
        if value_at(cfg, key) is not None:
            raise ValueError(f"{key}: given; it does not work with model.name: {cfg['model']['name']}. Use {instead}")
    name = cfg.get("save_filename") or ".pt"
    require(name.endswith(".pt"), "save_filename", "a name that ends in .pt", name, "autoresume finds no other")
    for cause, nothing in run_config.KEYS["inert"].items():
        keys = [key for key, values in nothing.items() if cfg.get(key) is not None and cfg[key] not in values]
        # eval_loader: null says that nothing is evaluated
        given = cfg.get(cause) or cause == "eval_loader" and ("eval_loaders" in cfg or cause in cfg)
        if keys and not given:
            raise ValueError(f"{', '.join(keys)}: given without {cause}, so without effect; give {cause}, or set "
                             + " ".join(f"{key}=null" for key in keys))


def check_machine(cfg: dict[str, Any]) -> None:
    """Refuses what this machine, with this number of processes, cannot run: batch sizes, precision, missing folders."""
    if not _is_ours(cfg):
        return
    import torch

    world_size, cuda, fsdp = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), cfg.get("fsdp_config")
    check_files(cfg)
    check_loggers(cfg)
    for key, value, needed in (("precision", cfg.get("precision", "amp_bf16"), "fp32"),
                               ("model.init_device", cfg["model"].get("init_device", "cpu"), "cpu")):
        require(cuda or value == needed, key, f"{needed}, since there is no GPU", value, f"set {key}={needed}")
    rows, micro = cfg["global_train_batch_size"], cfg["device_train_microbatch_size"]
    most = rows // world_size  # the host refuses a remainder
    require(type(micro) is int and 1 <= micro <= most or micro == "auto" and cuda, "device_train_microbatch_size",
            f"1 to {most}, since global_train_batch_size is {rows} on {world_size} process(es)", micro,
            "lower it (auto needs a GPU)")
    if (warmup := cfg["train_loader"].get("batch_size_warmup")) is not None:
        check_warmup(warmup, rows, world_size=world_size, microbatch=micro, total=total_tokens(cfg))
    require(not fsdp or world_size > 1 and os.environ.get("FSDP_VERSION") == "2", "fsdp_config", "used with several "
            "processes and FSDP2 (FSDP1 cuts tensors into pieces that ettin_stable_adamw cannot use)", fsdp,
            "remove it, or set FSDP_VERSION=2 in the environment")


def check_files(cfg: dict[str, Any]) -> None:
    """Refuses a run whose tokenizer or data is not here."""
    name = cfg["tokenizer"]["name"]
    for _, block in loaders(cfg):
        local, remote = block["dataset"]["local"], block["dataset"].get("remote")
        # the host builds the tokenizer before the loader, so that of a remote dataset must be here by now
        if remote and Path(name) == Path(local, "tokenizer") and not Path(name).exists():
            fetch_tokenizer(Path(local), remote)
    # a hub id has at most one slash; with more, or below a folder that exists here, a folder is meant
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer.name: {name!r} given; no such folder; ettin convert makes one "
                                "in the dataset: set variables.data=... to where that lies")
    for key, block in loaders(cfg):
        folder = Path(block["dataset"]["local"]) / block["dataset"].get("split", "")
        if not block["dataset"].get("remote") and not (folder / "manifest.json").is_file():
            without = "" if key == "train_loader" else ", or train without evaluation (eval_loader=null)"
            raise FileNotFoundError(f"{key}.dataset: {block['dataset']} given; {str(folder)!r} holds no split; run "
                                    f"ettin convert, or set variables.data=...{without}")


def check_loggers(cfg: dict[str, Any]) -> None:
    """Refuses loggers that LLM-Foundry has not, and W&B without a key; one not installed is refused by Composer."""
    for name, block in (cfg.get("loggers") or {}).items():
        require(name in _LOGGERS, f"loggers.{name}", f"one of {', '.join(_LOGGERS)}", block,
                "correct the name" + did_you_mean(name, _LOGGERS))
        if name == "ettin_console" and isinstance(interval := (block or {}).get("interval"), str):
            parse_time("loggers.ettin_console.interval", interval)
        if name == "wandb" and importlib.util.find_spec(name):
            import wandb

            mode = ((block or {}).get("init_kwargs") or {}).get("mode") or os.environ.get("WANDB_MODE", "online")
            require(mode in ("offline", "dryrun", "disabled") or wandb.api.api_key or wandb.api.api.disabled(),
                    "loggers.wandb", "given a key", block,
                    "run `wandb login`, or set WANDB_API_KEY=... or WANDB_MODE=offline")


def check_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config transform `ettin_checks`: every check above, safe loading, and the clock that every run needs.

    Top-level keys set to null are left out, so that they take the host's defaults.
    """
    if not _is_ours(cfg):
        return cfg
    cfg = run_config.without_nulls(cfg)
    text = run_config.config_text(cfg)
    check_settings(cfg)
    check_machine(cfg)
    cfg["loggers"] = {name: block for name, block in (cfg.get("loggers") or {}).items() if block is not None}
    if "ettin_console" in cfg["loggers"]:
        cfg = {**_BESIDE_CONSOLE, **cfg}
    cfg |= prepare_start(cfg)
    resolve_schedules(cfg)
    split_in_workers(cfg)
    if cfg.get("fsdp_config"):
        # the host's default would hand blocks a bf16 residual stream; this trains the same numbers as DDP does
        cfg["fsdp_config"] = {"mixed_precision": "FULL", **cfg["fsdp_config"]}
    others = dict(cfg.get("callbacks") or {})
    cfg["callbacks"] = {"ettin_clock": {"run_config": text, **(others.pop("ettin_clock", None) or {})},
                        "ettin_watch": {}, **others}
    return cfg


def resolve_schedules(cfg: dict[str, Any]) -> None:
    """Writes schedules in tokens, since model and loader do not know the run's length; a loader for each evaluation."""
    cfg["model"] = {**cfg["model"], "objective": run_config.objective_schedule(cfg).plain()}
    train = cfg["train_loader"] = {**cfg["train_loader"], "objective": cfg["model"]["objective"]}
    if "mask_rate" in train:
        train["mask_rate"] = _mask_rate(cfg).plain()
    if warmup := train.get("batch_size_warmup"):
        train["batch_size_warmup"] = check_warmup(warmup, cfg["global_train_batch_size"], total=total_tokens(cfg))
    evals = [block for _, block in _evaluations(cfg)]
    if len(evals) == 1 and "label" not in evals[0]:
        cfg["eval_loader"] = evals[0]
    elif evals:  # the host takes a label from a list only, and hands it on from a dict
        cfg.pop("eval_loader", None)
        cfg["eval_loaders"] = evals


def split_in_workers(cfg: dict[str, Any]) -> None:
    """Tells the loaders whether compiled code wants fixed shapes, and their microbatches, so that workers make them.

    Without a number (`auto`), the main process makes them.
    """
    from ettin_foundry.model.transformer import compiles  # imports torch

    micro = cfg["device_train_microbatch_size"]
    of_eval = cfg.get("device_eval_batch_size") or (1 if micro == "auto" else micro)  # the host's default
    fixed_shapes = compiles(cfg["model"].get("compile", "auto"))
    for key, block in loaders(cfg):
        size = micro if key == "train_loader" else of_eval
        block |= dict(zip(_FILLED, (None if size == "auto" else size, fixed_shapes)))
