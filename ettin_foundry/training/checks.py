"""Refuses a run that would fail late, train something else than it says, or ignore a setting, before any work is done.

`check_config` is a config transform of LLM-Foundry, so stock `llmfoundry train` is protected as `train.py` is. It leaves
runs without our model and loader alone. Every refusal is one ValueError (FileNotFoundError for files): the key as one
types it, what was given, what is allowed, what to do. What a part checks itself when it is built (numbers of the
optimizer, the data's files, the tokenizer against the data) is not repeated here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ettin_foundry.data.ramp import check_warmup
from ettin_foundry.training.check_objectives import check_objectives, resolve_schedules
from ettin_foundry.training.defaults import HOST_KEYS
from ettin_foundry.training.keys import MODEL_KEYS, check_host_only, check_inert, check_keys
from ettin_foundry.training.recipes import rows_from_tokens
from ettin_foundry.training.run_config import (
    TIME,
    loaders,
    model_config,
    objective_schedule,
    parse_time,
    refusal,
    total_tokens,
    walk,
)
from ettin_foundry.training.starts import check_start, config_text, guard

__all__ = ["check_config", "check_files", "check_machine", "check_settings", "model_config", "objective_schedule",
           "parse_time", "total_tokens"]

_NEEDED = ("model", "tokenizer", "optimizer", "scheduler", "train_loader", "max_duration", "max_seq_len",
           "global_train_batch_size", "device_train_microbatch_size")
_BLOCKS = ("model", "tokenizer", "optimizer", "scheduler", "train_loader")
_NO_RUN_TIMES = ("variables", "loggers", "metadata", "run_name")  # holds text that only looks like a time


def _is_ours(cfg: dict[str, Any]) -> bool:
    blocks = [cfg.get("model"), *(block for _, block in loaders(cfg))]
    return any(isinstance(b, dict) and b.get("name") in (*MODEL_KEYS, "ettin_text") for b in blocks)


# ------------------------------------------------------------------ settings


def _check_presence(cfg: dict[str, Any]) -> None:
    if set(str(cfg.get("run_name") or "")) & set("{}[]"):
        raise refusal("run_name", cfg["run_name"], "a name is needed, and the host reads brackets as placeholders",
                      "A schedule of objectives is no name: set variables.label=... (nano.yaml), or run_name=...")
    for key in _NEEDED:
        if cfg.get(key) is None:
            raise ValueError(f"{key}: not given; every run needs it. Start from a complete recipe in yamls/")
    for key in _BLOCKS:
        if not isinstance(cfg[key], dict) or not isinstance(cfg[key].get("name"), str):
            raise refusal(key, cfg[key], "a block with a name is needed", "See yamls/nano.yaml for one of each")
    for key, value in walk({k: v for k, v in cfg.items() if k != "variables"}):
        if value == "???":
            raise ValueError(f"{key}: no value given. Add {key}=... to the command line")
    if unknown := sorted(set(cfg) - HOST_KEYS):
        raise ValueError(f"{unknown[0]}: unknown key; LLM-Foundry takes {', '.join(sorted(HOST_KEYS))}. "
                         "Values of your own belong under variables")


def _check_pairing(cfg: dict[str, Any]) -> None:
    name = cfg["model"]["name"]
    ours = name in MODEL_KEYS
    for key, block in loaders(cfg):
        if ours and block.get("name") != "ettin_text":
            raise refusal(f"{key}.name", block.get("name"), f"model.name: {name} reads batches of ettin_text only",
                          f"Set {key}.name=ettin_text on data made by data_prep/convert.py")
        if not ours and block.get("name") == "ettin_text":
            raise refusal(f"{key}.name", "ettin_text", f"its batches are for model.name: {' or '.join(MODEL_KEYS)}, not "
                          f"{name!r}", "Use name: text for other models: the shards are plain MDS")


def _check_blocks(cfg: dict[str, Any]) -> None:
    check_keys(cfg, list(loaders(cfg)))
    for key, block in (("model", cfg["model"]), *loaders(cfg)):
        if block.get("max_seq_len") != cfg["max_seq_len"]:
            raise refusal(f"{key}.max_seq_len", block.get("max_seq_len"), f"max_seq_len is {cfg['max_seq_len']!r} and "
                          "must be the same everywhere", "Set it once: variables.max_seq_len=...")
    longest = (cfg["tokenizer"].get("kwargs") or {}).get("model_max_length", cfg["max_seq_len"])
    if longest < cfg["max_seq_len"]:
        raise refusal("tokenizer.kwargs.model_max_length", longest, f"at least max_seq_len ({cfg['max_seq_len']}) is "
                      "needed", "Set it once: variables.max_seq_len=...")
    model_config(cfg)


def _check_loader_roles(cfg: dict[str, Any]) -> None:
    for key, block in loaders(cfg):
        _check_loader_role(key, block)


def _check_loader_role(key: str, block: dict[str, Any]) -> None:
    if not isinstance(block.get("dataset"), dict) or not block["dataset"].get("local"):
        raise refusal(f"{key}.dataset", block.get("dataset"), "{local: folder, split: name} is needed",
                      "local is the folder that data_prep/convert.py wrote")
    endless = key == "train_loader"
    if block.get("shuffle", True) is not endless:
        raise refusal(f"{key}.shuffle", block.get("shuffle", True), "shuffle: true is an endless stream for training, "
                      "shuffle: false a finite one for evaluation", f"Set {key}.shuffle={str(endless).lower()}")


def _check_times(cfg: dict[str, Any]) -> None:
    total, unit = parse_time("max_duration", cfg["max_duration"])
    if unit not in ("tok", "ba"):
        raise refusal("max_duration", cfg["max_duration"], "only tok and ba are possible", "Give it in tokens")
    for key, value in walk({k: v for k, v in cfg.items() if k not in _NO_RUN_TIMES}):
        if isinstance(value, str) and (match := TIME.fullmatch(value)) and match[2].lower() == "ep":
            parse_time(key, value)
    if cfg.get("save_folder") and cfg.get("save_interval") is not None:
        parse_time("save_interval", cfg["save_interval"])
    if any(True for key, _ in loaders(cfg) if key != "train_loader"):
        interval = cfg.get("eval_interval", 1)  # 1, an epoch, is the host's default
        if interval != 0:
            parse_time("eval_interval", interval)
    spent = 0.0
    for name in ("t_warmup", "t_decay"):
        if name in cfg["scheduler"]:
            value, its_unit = parse_time(f"scheduler.{name}", cfg["scheduler"][name])
            if its_unit not in ("dur", unit) and value:
                raise refusal(f"scheduler.{name}", cfg["scheduler"][name], f"max_duration ({cfg['max_duration']}) is in "
                              f"{unit}", f"Give both in {unit}, or this one in dur")
            spent += value if its_unit == "dur" else value / total
            if name == "t_decay" and value == 0 and "alpha_f" in cfg["scheduler"]:
                raise refusal("scheduler.alpha_f", cfg["scheduler"]["alpha_f"], "it is the end of a decay, and t_decay "
                              "is 0", "Remove it or give t_decay")
    if spent > 1 + 1e-12:  # shares such as 0.3dur + 0.7dur may sum to a hair above 1
        raise refusal("scheduler", {k: v for k, v in cfg["scheduler"].items() if k != "name"}, "warm-up and decay must "
                      f"fit into max_duration ({cfg['max_duration']})", "Shorten them or lengthen the run")


def _check_amounts(cfg: dict[str, Any]) -> None:
    rows = cfg["global_train_batch_size"]
    if not isinstance(rows, int) or rows < 1:
        raise refusal("global_train_batch_size", rows, "a whole number of at least 1 row is needed", "Correct it")
    if cfg.get("train_subset_num_batches", -1) != -1:
        raise refusal("train_subset_num_batches", cfg["train_subset_num_batches"], "an endless loader has no subset",
                      "Use max_duration")


def _check_weighting(cfg: dict[str, Any]) -> None:
    packed = [key for key, block in loaders(cfg) if block.get("packing", True)]
    if cfg.get("accumulate_train_batch_on_tokens", True) is False and "train_loader" in packed:
        raise refusal("accumulate_train_batch_on_tokens", False, "with packing, microbatches must be weighted by their "
                      "targets", "Remove it, or unpack as well (yamls/phases/original.yaml)")


def check_settings(cfg: dict[str, Any]) -> None:
    """Refuses what no machine could run as written; reads no file and no device.

    Args:
        cfg: plain containers, interpolations resolved.

    Raises:
        ValueError: see the module docstring.
    """
    if not _is_ours(cfg):
        return
    _check_presence(cfg)
    _check_pairing(cfg)
    for check in (_check_blocks, check_objectives, _check_loader_roles, _check_times, check_host_only,
                  check_inert, _check_amounts, _check_weighting, check_start):
        check(cfg)


# ------------------------------------------------------------------ machine and files


def _check_batch(cfg: dict[str, Any], world_size: int, cuda: bool) -> None:
    rows, micro = cfg["global_train_batch_size"], cfg["device_train_microbatch_size"]
    if not isinstance(rows, int) or rows < 1 or rows % world_size:
        raise refusal("global_train_batch_size", rows, f"a multiple of the number of processes ({world_size}) is needed",
                      "Change it or the number of processes")
    if micro == "auto":
        if not cuda:
            raise refusal("device_train_microbatch_size", micro, "a CPU cannot find it by running out of memory",
                          "Give a number of rows")
    elif not isinstance(micro, int) or not 1 <= micro <= rows // world_size:
        raise refusal("device_train_microbatch_size", micro, f"1 to {rows // world_size} is possible: "
                      f"global_train_batch_size is {rows} on {world_size} process(es)", "Lower it")
    if (warmup := cfg["train_loader"].get("batch_size_warmup")) is not None:
        check_warmup(warmup, rows, world_size=world_size, microbatch=micro, total=total_tokens(cfg))


def _check_sharding(cfg: dict[str, Any], world_size: int, cuda: bool) -> None:
    if cfg.get("fsdp_config") and world_size == 1:
        raise refusal("fsdp_config", cfg["fsdp_config"], "one process has nothing to shard, so it would do nothing",
                      "Remove it, or start several processes")
    if cfg.get("fsdp_config") and os.environ.get("FSDP_VERSION") != "2":
        raise refusal("fsdp_config", cfg["fsdp_config"], "the host would shard with FSDP1, which cuts tensors into flat "
                      "pieces that ettin_stable_adamw cannot use", "Set the environment variable FSDP_VERSION=2")
    if cfg["model"].get("init_device", "cpu") != "cpu" and not cuda:
        raise refusal("model.init_device", cfg["model"]["init_device"], "the host fills such parameters on a GPU, and "
                      "there is none", "Set model.init_device=cpu")


def _fetch_tokenizer(name: str, dataset: dict[str, Any]) -> None:
    """The host builds the tokenizer before the loader, so that of a remote set must be here by now."""
    if dataset.get("remote") and Path(name) == Path(dataset["local"], "tokenizer") and not Path(name).exists():
        from ettin_foundry.data.cache import fetch_tokenizer

        fetch_tokenizer(Path(dataset["local"]), dataset["remote"])


def check_files(cfg: dict[str, Any]) -> None:
    """Refuses a run whose tokenizer or data is not here; looks at the loaders' folders only.

    Raises:
        FileNotFoundError: naming the key and the folder.
    """
    for _, block in loaders(cfg):
        _fetch_tokenizer(cfg["tokenizer"]["name"], block["dataset"])
    name = cfg["tokenizer"]["name"]
    # a hub id has at most one slash; with more, or below a folder that exists here, a folder is meant
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer.name: {name!r} given; no such folder. data_prep/convert.py makes one beside "
                                "the data; if the data lies elsewhere, set variables.data=...")
    for key, block in loaders(cfg):
        folder = Path(block["dataset"]["local"]) / block["dataset"].get("split", "")
        if not block["dataset"].get("remote") and not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{key}.dataset: {block['dataset']} given; {str(folder)!r} holds no converted split. "
                                    "Run data_prep/convert.py, or set variables.data=... to where its output lies")


def check_machine(cfg: dict[str, Any]) -> None:
    """Refuses what this machine, with this number of processes, cannot run: batch sizes, precision, missing folders.

    Raises:
        ValueError, FileNotFoundError: see the module docstring.
    """
    if not _is_ours(cfg):
        return
    import torch

    world_size, cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    check_files(cfg)
    if not cuda and (precision := cfg.get("precision", "amp_bf16")) != "fp32":
        raise refusal("precision", precision, "there is no GPU, and a CPU trains in fp32 only", "Set precision=fp32")
    _check_batch(cfg, world_size, cuda)
    _check_sharding(cfg, world_size, cuda)


def check_config(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config transform `ettin_checks`: every check above, safe loading, and the clock that every run needs.

    Args:
        cfg: plain containers, interpolations resolved.

    Returns:
        The config with `callbacks.ettin_clock`, and without top-level keys set to null, which then take the host's
        defaults. A run without our model and loader is returned as it came.

    Raises:
        ValueError, FileNotFoundError: see the module docstring.
    """
    if not _is_ours(cfg):
        return cfg
    cfg = {key: value for key, value in cfg.items() if value is not None}
    cfg |= rows_from_tokens(cfg)
    clock = (cfg.get("callbacks") or {}).get("ettin_clock") or {"run_config": config_text(cfg)}
    check_settings(cfg)
    check_machine(cfg)
    cfg |= guard(cfg)
    resolve_schedules(cfg)
    if cfg.get("fsdp_config"):
        # the host's default would hand blocks a bf16 residual stream; this trains the same numbers as DDP does
        cfg["fsdp_config"] = {"mixed_precision": "FULL", **cfg["fsdp_config"]}
    others = {name: block for name, block in (cfg.get("callbacks") or {}).items() if name != "ettin_clock"}
    cfg["callbacks"] = {"ettin_clock": clock, **others}
    return cfg
