"""Refuses a run that would fail late, train something else than it says, or ignore a setting, before any work is done.

`check_config` is a config transform of LLM-Foundry, so stock `llmfoundry train` is protected as `train.py` is. It leaves
runs without our model and loader alone. Every refusal is one ValueError (FileNotFoundError for files): the key as one
types it, what was given, what is allowed, what to do. What a part checks itself when it is built (numbers of the
optimizer, the data's files, the tokenizer against the data) is not repeated here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ettin_foundry.config import OBJECTIVES, EttinConfig
from ettin_foundry.keys import FIELDS, check_host_only, check_inert, check_keys

__all__ = ["check_config", "check_machine", "check_settings", "model_config", "parse_time"]

_NEEDED = ("model", "tokenizer", "optimizer", "scheduler", "train_loader", "max_duration", "max_seq_len",
           "global_train_batch_size", "device_train_microbatch_size")
_BLOCKS = ("model", "tokenizer", "optimizer", "scheduler", "train_loader")
_TIME = re.compile(r"([0-9._]+(?:e[+-]?[0-9]+)?)(tok|ba|dur|ep|sp|sec|iter)", re.IGNORECASE)
_NO_RUN_TIMES = ("variables", "loggers", "metadata", "run_name")  # holds text that only looks like a time


def _refusal(key: str, given: Any, allowed: str, advice: str) -> ValueError:
    return ValueError(f"{key}: {given!r} given; {allowed}. {advice}")


def parse_time(key: str, value: Any) -> tuple[float, str]:
    """A time such as `3_000_000_000tok` as (number, unit).

    Raises:
        ValueError: not a time, or one in epochs; it names `key`.
    """
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if (isinstance(value, int) and not isinstance(value, bool)) or (match and match[2].lower() == "ep"):
        raise _refusal(key, value, "it means epochs, and our loader is endless: its one epoch never ends",
                       "Give tokens or batches, such as 8_500_000_000tok or 3000ba")
    try:
        return float(match[1]), match[2].lower()  # type: ignore[index]
    except (TypeError, ValueError):
        raise _refusal(key, value, "a number with its unit is needed: tok, ba or dur",
                       "Write it like 8_500_000_000tok, 3000ba or 0.2dur") from None


def model_config(cfg: dict[str, Any]) -> EttinConfig:
    """The shape that a config's model block asks for.

    Raises:
        ValueError: an unknown size or objective, or a field out of range; it names the key.
    """
    model = cfg["model"]
    if model.get("objective") not in OBJECTIVES:
        raise _refusal("model.objective", model.get("objective"), f"one of {', '.join(OBJECTIVES)} is needed",
                       "clm makes a decoder, mlm and mntp an encoder")
    fields = {key: value for key, value in model.items() if key in FIELDS}
    return EttinConfig.for_size(model.get("size"), causal=model["objective"] == "clm",
                                max_position_embeddings=cfg["max_seq_len"], **fields)


def _loaders(cfg: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, block) of every loader, the training loader first."""
    yield "train_loader", cfg.get("train_loader") or {}
    evals = cfg.get("eval_loaders") or cfg.get("eval_loader") or []  # the host renames a list to eval_loaders
    if isinstance(evals, dict):
        yield "eval_loader", evals
    else:
        yield from ((f"eval_loader[{i}]", block) for i, block in enumerate(evals))


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _walk(item, f"{key}[{i}]")
    else:
        yield key, value


def _is_ours(cfg: dict[str, Any]) -> bool:
    blocks = [cfg.get("model"), *(block for _, block in _loaders(cfg))]
    return any(isinstance(b, dict) and b.get("name") in ("ettin", "ettin_text") for b in blocks)


# ------------------------------------------------------------------ settings


def _check_presence(cfg: dict[str, Any]) -> None:
    for key in _NEEDED:
        if cfg.get(key) is None:
            raise ValueError(f"{key}: not given; every run needs it. Start from a complete recipe in yamls/")
    for key in _BLOCKS:
        if not isinstance(cfg[key], dict) or not isinstance(cfg[key].get("name"), str):
            raise _refusal(key, cfg[key], "a block with a name is needed", "See yamls/nano.yaml for one of each")
    for key, value in _walk({k: v for k, v in cfg.items() if k != "variables"}):
        if value == "???":
            raise ValueError(f"{key}: no value given. Add {key}=... to the command line")
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS

    if unknown := sorted(set(cfg) - TRAIN_CONFIG_KEYS):
        raise ValueError(f"{unknown[0]}: unknown key; LLM-Foundry takes {', '.join(sorted(TRAIN_CONFIG_KEYS))}. "
                         "Values of your own belong under variables")


def _check_pairing(cfg: dict[str, Any]) -> None:
    ours = cfg["model"]["name"] == "ettin"
    for key, block in _loaders(cfg):
        if ours and block.get("name") != "ettin_text":
            raise _refusal(f"{key}.name", block.get("name"), "model.name: ettin reads batches of ettin_text only",
                           f"Set {key}.name=ettin_text on data made by data_prep/convert.py")
        if not ours and block.get("name") == "ettin_text":
            raise _refusal(f"{key}.name", "ettin_text", f"its batches are for model.name: ettin, not "
                           f"{cfg['model']['name']!r}", "Use name: text for other models: the shards are plain MDS")


def _check_blocks(cfg: dict[str, Any]) -> None:
    check_keys(cfg, list(_loaders(cfg)))
    for key, block in (("model", cfg["model"]), *_loaders(cfg)):
        if block.get("max_seq_len") != cfg["max_seq_len"]:
            raise _refusal(f"{key}.max_seq_len", block.get("max_seq_len"), f"max_seq_len is {cfg['max_seq_len']!r} and "
                           "must be the same everywhere", "Set it once: variables.max_seq_len=...")
    longest = (cfg["tokenizer"].get("kwargs") or {}).get("model_max_length", cfg["max_seq_len"])
    if longest < cfg["max_seq_len"]:
        raise _refusal("tokenizer.kwargs.model_max_length", longest, f"at least max_seq_len ({cfg['max_seq_len']}) is "
                       "needed", "Set it once: variables.max_seq_len=...")
    model_config(cfg)


def _check_objectives(cfg: dict[str, Any]) -> None:
    objective = cfg["model"]["objective"]
    for key, block in _loaders(cfg):
        if block.get("objective") != objective:
            raise _refusal(f"{key}.objective", block.get("objective"), f"model.objective is {objective!r} and must be "
                           "the same", "Set it once: variables.objective=...")
        rate = block.get("mask_rate", 0.0)
        if objective == "clm" and rate != 0:
            raise _refusal(f"{key}.mask_rate", rate, "clm masks nothing: only 0.0 is possible",
                           "Set variables.mask_rate=0.0 and variables.eval_mask_rate=0.0, or another objective")
        if objective != "clm" and not (isinstance(rate, (int, float)) and 0 < rate <= 1):
            raise _refusal(f"{key}.mask_rate", rate, f"{objective} needs a share above 0 and up to 1",
                           "The recipes train with 0.3 and 0.15")
        _check_loader_role(key, block)


def _check_loader_role(key: str, block: dict[str, Any]) -> None:
    if not isinstance(block.get("dataset"), dict) or not block["dataset"].get("local"):
        raise _refusal(f"{key}.dataset", block.get("dataset"), "{local: folder, split: name} is needed",
                       "local is the folder that data_prep/convert.py wrote")
    endless = key == "train_loader"
    if block.get("shuffle", True) is not endless:
        raise _refusal(f"{key}.shuffle", block.get("shuffle", True), "shuffle: true is an endless stream for training, "
                       "shuffle: false a finite one for evaluation", f"Set {key}.shuffle={str(endless).lower()}")


def _check_times(cfg: dict[str, Any]) -> None:
    total, unit = parse_time("max_duration", cfg["max_duration"])
    if unit not in ("tok", "ba"):
        raise _refusal("max_duration", cfg["max_duration"], "only tok and ba are possible", "Give it in tokens")
    for key, value in _walk({k: v for k, v in cfg.items() if k not in _NO_RUN_TIMES}):
        if isinstance(value, str) and (match := _TIME.fullmatch(value)) and match[2].lower() == "ep":
            parse_time(key, value)
    if cfg.get("save_folder") and cfg.get("save_interval") is not None:
        parse_time("save_interval", cfg["save_interval"])
    if any(True for key, _ in _loaders(cfg) if key != "train_loader"):
        interval = cfg.get("eval_interval", 1)  # 1, an epoch, is the host's default
        if interval != 0:
            parse_time("eval_interval", interval)
    spent = 0.0
    for name in ("t_warmup", "t_decay"):
        if name in cfg["scheduler"]:
            value, its_unit = parse_time(f"scheduler.{name}", cfg["scheduler"][name])
            if its_unit not in ("dur", unit) and value:
                raise _refusal(f"scheduler.{name}", cfg["scheduler"][name], f"max_duration ({cfg['max_duration']}) is in "
                               f"{unit}", f"Give both in {unit}, or this one in dur")
            spent += value if its_unit == "dur" else value / total
            if name == "t_decay" and value == 0 and "alpha_f" in cfg["scheduler"]:
                raise _refusal("scheduler.alpha_f", cfg["scheduler"]["alpha_f"], "it is the end of a decay, and t_decay "
                               "is 0", "Remove it or give t_decay")
    if spent > 1 + 1e-12:  # shares such as 0.3dur + 0.7dur may sum to a hair above 1
        raise _refusal("scheduler", {k: v for k, v in cfg["scheduler"].items() if k != "name"}, "warm-up and decay must "
                       f"fit into max_duration ({cfg['max_duration']})", "Shorten them or lengthen the run")


def _check_amounts(cfg: dict[str, Any]) -> None:
    rows = cfg["global_train_batch_size"]
    if not isinstance(rows, int) or rows < 1:
        raise _refusal("global_train_batch_size", rows, "a whole number of at least 1 row is needed", "Correct it")
    if cfg.get("train_subset_num_batches", -1) != -1:
        raise _refusal("train_subset_num_batches", cfg["train_subset_num_batches"], "an endless loader has no subset",
                       "Use max_duration")


def _check_weighting(cfg: dict[str, Any]) -> None:
    packed = [key for key, block in _loaders(cfg) if block.get("packing", True)]
    if cfg.get("accumulate_train_batch_on_tokens", True) is False and "train_loader" in packed:
        raise _refusal("accumulate_train_batch_on_tokens", False, "with packing, microbatches must be weighted by their "
                       "targets", "Remove it, or unpack as well (yamls/phases/original.yaml)")


def _check_start(cfg: dict[str, Any]) -> None:
    cross = (cfg.get("callbacks") or {}).get("ettin_cross")
    if cross is not None and cfg.get("load_path"):
        raise _refusal("load_path", cfg["load_path"], "callbacks.ettin_cross already takes the weights from "
                       f"{cross.get('source')!r}", "Remove one of the two")
    if "ettin_cross" in (cfg.get("callbacks") or {}) and not (cross or {}).get("source"):
        raise ValueError("callbacks.ettin_cross.source: not given; a checkpoint or Hugging Face folder of the other "
                         "model is needed. Add variables.cross_source=... to the command line")
    for key in ("run_name", "save_folder"):
        if cfg.get("autoresume") and not (cfg.get(key) or (key == "run_name" and os.environ.get("RUN_NAME"))):
            raise ValueError(f"autoresume: True given without {key}; it looks for this run's checkpoints in save_folder. "
                             f"Set {key}, or autoresume=false")


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
    for check in (_check_blocks, _check_objectives, _check_times, check_host_only, check_inert, _check_amounts,
                  _check_weighting, _check_start):
        check(cfg)


# ------------------------------------------------------------------ machine and files


def _check_batch(cfg: dict[str, Any], world_size: int, cuda: bool) -> None:
    rows, micro = cfg["global_train_batch_size"], cfg["device_train_microbatch_size"]
    if not isinstance(rows, int) or rows < 1 or rows % world_size:
        raise _refusal("global_train_batch_size", rows, f"a multiple of the number of processes ({world_size}) is needed",
                       "Change it or the number of processes")
    if micro == "auto":
        if not cuda:
            raise _refusal("device_train_microbatch_size", micro, "a CPU cannot find it by running out of memory",
                           "Give a number of rows")
    elif not isinstance(micro, int) or not 1 <= micro <= rows // world_size:
        raise _refusal("device_train_microbatch_size", micro, f"1 to {rows // world_size} is possible: "
                       f"global_train_batch_size is {rows} on {world_size} process(es)", "Lower it")


def _check_sharding(cfg: dict[str, Any], world_size: int, cuda: bool) -> None:
    if cfg.get("fsdp_config") and world_size == 1:
        raise _refusal("fsdp_config", cfg["fsdp_config"], "one process has nothing to shard, so it would do nothing",
                       "Remove it, or start several processes")
    if cfg.get("fsdp_config") and os.environ.get("FSDP_VERSION") != "2":
        raise _refusal("fsdp_config", cfg["fsdp_config"], "the host would shard with FSDP1, which cuts tensors into flat "
                       "pieces that ettin_stable_adamw cannot use", "Set the environment variable FSDP_VERSION=2")
    if cfg["model"].get("init_device", "cpu") != "cpu" and not cuda:
        raise _refusal("model.init_device", cfg["model"]["init_device"], "the host fills such parameters on a GPU, and "
                       "there is none", "Set model.init_device=cpu")


def _fetch_tokenizer(name: str, dataset: dict[str, Any]) -> None:
    """The host builds the tokenizer before the loader, so that of a remote set must be here by now."""
    if dataset.get("remote") and Path(name) == Path(dataset["local"], "tokenizer") and not Path(name).exists():
        from ettin_foundry.remote import fetch_tokenizer

        fetch_tokenizer(Path(dataset["local"]), dataset["remote"])


def _check_files(cfg: dict[str, Any]) -> None:
    for _, block in _loaders(cfg):
        _fetch_tokenizer(cfg["tokenizer"]["name"], block["dataset"])
    name = cfg["tokenizer"]["name"]
    # a hub id has at most one slash; with more, or below a folder that exists here, a folder is meant
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and Path(name).parent.is_dir())
    if is_path and not Path(name).is_dir():
        raise FileNotFoundError(f"tokenizer.name: {name!r} given; no such folder. data_prep/convert.py makes one beside "
                                "the data; if the data lies elsewhere, set variables.data=...")
    for key, block in _loaders(cfg):
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
    _check_files(cfg)
    if not cuda and (precision := cfg.get("precision", "amp_bf16")) != "fp32":
        raise _refusal("precision", precision, "there is no GPU, and a CPU trains in fp32 only", "Set precision=fp32")
    _check_batch(cfg, world_size, cuda)
    _check_sharding(cfg, world_size, cuda)


def _guard_checkpoints(cfg: dict[str, Any]) -> None:
    """Scans what will be loaded, and mends the link that autoresume follows."""
    from ettin_foundry import checkpoint  # imports torch

    checkpoint.install_validation()  # also for files that the host downloads
    folder = (cfg.get("save_folder") or "").replace("{run_name}", cfg.get("run_name") or os.environ.get("RUN_NAME", ""))
    resumed = None
    if cfg.get("autoresume") and "://" not in folder:
        sharded = (cfg.get("fsdp_config") or {}).get("state_dict_type") == "sharded"
        rank = int(os.environ.get("RANK", "0"))
        latest = cfg.get("save_latest_filename") or ("latest-sharded-rank{rank}" if sharded else "latest-rank{rank}.pt")
        latest = latest.replace("{rank}", str(rank if sharded else 0))
        if "{" not in folder + latest and (sharded or rank == 0):
            checkpoint.repair_latest(folder, latest=latest)
        resumed = checkpoint.newest_complete(folder)
    path = cfg.get("load_path")
    if path and resumed is None and "://" not in path and "{" not in path:
        if not Path(path).exists():
            raise FileNotFoundError(f"load_path: {path!r} given; no such file. Give a checkpoint of the phase before, such "
                                    "as runs/NAME/latest-rank0.pt")
        checkpoint.scan_pickle(path)


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
    check_settings(cfg)
    check_machine(cfg)
    _guard_checkpoints(cfg)
    if "label" in (cfg.get("eval_loader") or {}):  # the host takes a label from a list only, and hands it on from a dict
        cfg["eval_loaders"] = [cfg.pop("eval_loader")]
    if cfg.get("fsdp_config"):
        # the host's default would hand blocks a bf16 residual stream; this trains the same numbers as DDP does
        cfg["fsdp_config"] = {"mixed_precision": "FULL", **cfg["fsdp_config"]}
    cfg["callbacks"] = {"ettin_clock": {}, **(cfg.get("callbacks") or {})}
    return cfg
