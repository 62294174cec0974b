"""Refuses a run that would fail late, train something else than it says, or ignore a setting, before any work is done.

`check_config` is a config transform of LLM-Foundry, so stock `llmfoundry train` is protected as `train.py` is; runs without
our model and loader are left alone. Every refusal is one ValueError (FileNotFoundError for files): the key as one types it,
what is allowed, what was given, what to do. What a part checks itself when it is built is not repeated here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ettin_foundry.data.stream import check_warmup
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.training import run_config
from ettin_foundry.training.keys import HOST_KEYS, MODEL_KEYS, check_effect, check_keys
from ettin_foundry.training.run_config import loaders, model_config, must_be, objective_schedule, parse_time, total_tokens
from ettin_foundry.training.sources import check_start, prepare_start

_BLOCKS = ("model", "tokenizer", "optimizer", "scheduler", "train_loader")
_NEEDED = (*_BLOCKS, "max_duration", "max_seq_len", "global_train_batch_size", "device_train_microbatch_size")


def _is_ours(cfg: dict[str, Any]) -> bool:
    blocks = [cfg.get("model"), *(block for _, block in loaders(cfg))]
    return any(isinstance(b, dict) and b.get("name") in (*MODEL_KEYS, "ettin_text", "ettin_contrastive") for b in blocks)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# ------------------------------------------------------------------ settings


def check_settings(cfg: dict[str, Any]) -> None:
    """Refuses a config (plain containers, resolved) that no machine could run as written; reads no file and no device."""
    if _is_ours(cfg):
        for check in (_check_presence, _check_pairing, check_keys, _check_lengths, _check_objectives, _check_times,
                      check_effect, _check_amounts, check_start):
            check(cfg)


def _check_presence(cfg: dict[str, Any]) -> None:
    for key in _NEEDED:
        if cfg.get(key) is None:
            raise ValueError(f"{key}: not given; every run needs it, so start from a complete recipe in yamls/")
        if key in _BLOCKS and not (isinstance(cfg[key], dict) and isinstance(cfg[key].get("name"), str)):
            raise must_be(key, "a block with a name", cfg[key], "see yamls/nano.yaml for one of each")
    if unknown := sorted(set(cfg) - HOST_KEYS):
        raise ValueError(f"{unknown[0]}: unknown key; LLM-Foundry takes {', '.join(sorted(HOST_KEYS))}. Values of your own "
                         "belong under variables")
    if set(str(cfg.get("run_name") or "")) & set("{}[]"):
        raise must_be("run_name", "a name without brackets", cfg["run_name"], "set variables.label=... or run_name=...")


def _check_pairing(cfg: dict[str, Any]) -> None:
    """The loaders belong to the model, and each to its role."""
    model = cfg["model"]["name"]
    for key, block in loaders(cfg):
        if model in MODEL_KEYS and block.get("name") != "ettin_text":
            raise must_be(f"{key}.name", f"ettin_text with model.name: {model}", block.get("name"), "set it")
        if model not in (*MODEL_KEYS, "ettin_contrastive") and block.get("name") == "ettin_text":
            raise must_be("model.name", f"{' or '.join(MODEL_KEYS)} with {key}.name: ettin_text", model,
                          "for other models use name: text, since the shards are plain MDS")
        if not isinstance(block.get("dataset"), dict) or not block["dataset"].get("local"):
            raise must_be(f"{key}.dataset", "{local: folder, split: name}", block.get("dataset"),
                          "local is the folder that data_prep/convert.py wrote")
        endless, given = key == "train_loader", block.get("shuffle", True)
        if given is not endless:
            raise must_be(f"{key}.shuffle", f"{str(endless).lower()}", given, "training is endless, evaluation is not")


def _check_lengths(cfg: dict[str, Any]) -> None:
    for key, block in (("model", cfg["model"]), *loaders(cfg)):
        if block.get("max_seq_len") != cfg["max_seq_len"]:
            raise must_be(f"{key}.max_seq_len", f"{cfg['max_seq_len']!r}, as max_seq_len is", block.get("max_seq_len"),
                          "set it once: variables.max_seq_len=...")
    model_config(cfg)


def _check_objectives(cfg: dict[str, Any]) -> None:
    """Objectives and mask rates of model and loaders agree, over the whole run."""
    schedule, train = objective_schedule(cfg), cfg["train_loader"]
    if train.get("objective") != cfg["model"]["objective"]:
        raise must_be("train_loader.objective", f"{cfg['model']['objective']!r}, as model.objective is",
                      train.get("objective"), "set it once: variables.objective=...")
    rate = MaskRate.parse(train.get("mask_rate", 0.0), total=total_tokens(cfg), key="train_loader.mask_rate")
    check_together(schedule, rate, "train_loader.")
    for key, block in list(loaders(cfg))[1:]:
        names, rate = _evaluated(cfg, key, block), block.get("mask_rate", 0.0)
        if isinstance(rate, list):
            raise must_be(f"{key}.mask_rate", "one rate, so that losses can be compared", rate, "give a number such as 0.15")
        # of several names, one may mask: the rate is for those that do
        shares: Any = {name: 1 / len(names) for name in names} if len(names) > 1 else names[-1]
        check_together(ObjectiveSchedule.parse(shares), MaskRate.parse(rate, key=f"{key}.mask_rate"), f"{key}.")


def _evaluated(cfg: dict[str, Any], key: str, block: dict[str, Any]) -> list[str]:
    """The objectives that an evaluation loader asks for: a name, a list of names, or all of a schedule."""
    value = block.get("objective")
    parts = value if isinstance(value, list) and value and all(isinstance(name, str) for name in value) else [value]
    names = [name for part in parts for name in
             ObjectiveSchedule.parse(part, total=total_tokens(cfg), key=f"{key}.objective").objectives]
    if len(set(names)) < len(names):
        raise must_be(f"{key}.objective", "a list in which each objective stands once", value, "remove one")
    return names


def _check_times(cfg: dict[str, Any]) -> None:
    total, unit = parse_time("max_duration", cfg["max_duration"])
    if unit not in ("tok", "ba"):
        raise must_be("max_duration", "in tok or ba", cfg["max_duration"], "give it in tokens")
    if cfg.get("save_folder") and cfg.get("save_interval") is not None:
        parse_time("save_interval", cfg["save_interval"])
    if len(list(loaders(cfg))) > 1 and (interval := cfg.get("eval_interval", 1)) != 0:  # 1, an epoch: the host's default
        parse_time("eval_interval", interval)
    block, spent = cfg["scheduler"], 0.0
    for name in ("t_warmup", "t_decay"):
        value, its_unit = parse_time(f"scheduler.{name}", block.get(name, "0tok"))
        # tokens are counted in a run of batches too; whether they fit into it is not known before
        if value and its_unit not in ("dur", "tok", unit):
            raise must_be(f"scheduler.{name}", f"in {unit} or dur, as max_duration ({cfg['max_duration']}) is", block[name],
                          "change one of the two")
        spent += value if its_unit == "dur" else value / total if its_unit == unit else 0.0
        if name in block and name == "t_decay" and value == 0 and "alpha_f" in block:
            raise must_be("scheduler.alpha_f", "left out where t_decay is 0", block["alpha_f"], "remove it or give t_decay")
    if spent > 1 + 1e-12:  # shares such as 0.3dur + 0.7dur may sum to a hair above 1
        raise must_be("scheduler", f"a warm-up and a decay that fit into max_duration ({cfg['max_duration']})", block,
                      "shorten them or lengthen the run")


def _check_amounts(cfg: dict[str, Any]) -> None:
    if not _is_count(rows := cfg["global_train_batch_size"]):
        raise must_be("global_train_batch_size", "a whole number of at least 1 row", rows, "correct it")
    if cfg.get("accumulate_train_batch_on_tokens", True) is False and cfg["train_loader"].get("packing", True):
        raise must_be("accumulate_train_batch_on_tokens", "true with packing, so that microbatches are weighted by their "
                      "targets", False, "remove it, or unpack as well (yamls/phases/original.yaml)")


# ------------------------------------------------------------------ machine and files


def check_machine(cfg: dict[str, Any]) -> None:
    """Refuses what this machine, with this number of processes, cannot run: batch sizes, precision, missing folders."""
    if not _is_ours(cfg):
        return
    import torch

    world_size, cuda, fsdp = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), cfg.get("fsdp_config")
    check_files(cfg)
    for key, value, needed in (("precision", cfg.get("precision", "amp_bf16"), "fp32"),
                               ("model.init_device", cfg["model"].get("init_device", "cpu"), "cpu")):
        if not cuda and value != needed:
            raise must_be(key, f"{needed}, since there is no GPU", value, f"set {key}={needed}")
    rows, micro = cfg["global_train_batch_size"], cfg["device_train_microbatch_size"]
    if rows % world_size:
        raise must_be("global_train_batch_size", f"a multiple of the number of processes ({world_size})", rows,
                      "change it or the number of processes")
    if not (_is_count(micro) and micro <= rows // world_size or micro == "auto" and cuda):
        raise must_be("device_train_microbatch_size", f"1 to {rows // world_size}, since global_train_batch_size is {rows} "
                      f"on {world_size} process(es)", micro, "lower it (auto needs a GPU)")
    if (warmup := cfg["train_loader"].get("batch_size_warmup")) is not None:
        check_warmup(warmup, rows, world_size=world_size, microbatch=micro, total=total_tokens(cfg))
    if fsdp and (world_size == 1 or os.environ.get("FSDP_VERSION") != "2"):
        raise must_be("fsdp_config", "used with several processes and FSDP2 (FSDP1 cuts tensors into pieces that "
                      "ettin_stable_adamw cannot use)", fsdp, "remove it, or set the environment variable FSDP_VERSION=2")


def check_files(cfg: dict[str, Any]) -> None:
    """Refuses a run whose tokenizer or data is not here."""
    name = cfg["tokenizer"]["name"]
    for _, block in loaders(cfg):
        local, remote = block["dataset"]["local"], block["dataset"].get("remote")
        # the host builds the tokenizer before the loader, so that of a remote dataset must be here by now
        if remote and Path(name) == Path(local, "tokenizer") and not Path(name).exists():
            from ettin_foundry.data.cache import fetch_tokenizer

            fetch_tokenizer(Path(local), remote)
    # a hub id has at most one slash; with more, or below a folder that exists here, a folder is meant
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer.name: {name!r} given; no such folder. data_prep/convert.py makes one beside the "
                                "data; set variables.data=... to where that lies")
    for key, block in loaders(cfg):
        folder = Path(block["dataset"]["local"]) / block["dataset"].get("split", "")
        if not block["dataset"].get("remote") and not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{key}.dataset: {block['dataset']} given; {str(folder)!r} holds no split; run "
                                    "data_prep/convert.py, or set variables.data=...")


# ------------------------------------------------------------------ the config transform


def check_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config transform `ettin_checks`: every check above, safe loading, and the clock that every run needs.

    Top-level keys set to null are left out, so that they take the host's defaults.
    """
    if not _is_ours(cfg):
        return cfg
    cfg = {key: value for key, value in cfg.items() if value is not None}
    clock = (cfg.get("callbacks") or {}).get("ettin_clock") or {"run_config": run_config.config_text(cfg)}
    check_settings(cfg)
    check_machine(cfg)
    cfg |= prepare_start(cfg)
    resolve_schedules(cfg)
    if cfg.get("fsdp_config"):
        # the host's default would hand blocks a bf16 residual stream; this trains the same numbers as DDP does
        cfg["fsdp_config"] = {"mixed_precision": "FULL", **cfg["fsdp_config"]}
    others = {name: block for name, block in (cfg.get("callbacks") or {}).items() if name != "ettin_clock"}
    cfg["callbacks"] = {"ettin_clock": clock, **others}
    return cfg


def resolve_schedules(cfg: dict[str, Any]) -> None:
    """Writes schedules in tokens, since model and loader do not know the run's length, and a loader for each evaluation."""
    total = total_tokens(cfg)
    cfg["model"] = {**cfg["model"], "objective": objective_schedule(cfg).plain()}
    train = cfg["train_loader"] = {**cfg["train_loader"], "objective": cfg["model"]["objective"]}
    if "mask_rate" in train:
        train["mask_rate"] = MaskRate.parse(train["mask_rate"], total=total, key="train_loader.mask_rate").plain()
    if warmup := train.get("batch_size_warmup"):
        train["batch_size_warmup"] = {**warmup, "tokens": check_warmup(warmup, cfg["global_train_batch_size"], total=total)}
    evals = []
    for key, block in list(loaders(cfg))[1:]:
        names, label = _evaluated(cfg, key, block), f"{block['label']}/" if block.get("label") else ""
        for name in names:
            evals.append({**block, "objective": name})
            if len(names) > 1:
                evals[-1]["label"] = label + name
                if name not in MASKED_OBJECTIVES:
                    evals[-1].pop("mask_rate", None)
    if len(evals) == 1 and "label" not in evals[0]:
        cfg["eval_loader"] = evals[0]
    elif evals:  # the host takes a label from a list only, and hands it on from a dict
        cfg.pop("eval_loader", None)
        cfg["eval_loaders"] = evals
