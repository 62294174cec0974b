"""Refuses keys that a config may not have: unknown, removed, of the host's that cannot act here, or without effect.

Keys and defaults of our blocks are read from signatures as source text, since importing them would import torch.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ettin_foundry import REGISTRY
from ettin_foundry.data.stream import DATASET_KEYS
from ettin_foundry.model.config import did_you_mean
from ettin_foundry.training.run_config import FIELDS, loaders, value_at, walk

_BY_HOST = ("self", "tokenizer", "train_config", "params", "device_batch_size")  # parameters that the host fills in


def _literal(node: ast.expr | None) -> Any:
    with contextlib.suppress(TypeError, ValueError):  # of no node, and of a name such as MISSING
        value = ast.literal_eval(node)  # type: ignore[arg-type]
        return list(value) if isinstance(value, tuple) else value
    return None


def read_parameters(target: str) -> dict[str, Any]:
    """{parameter: default, or None} of a function, a class's `__init__` or a dataclass, given as `module:name`."""
    module, name = target.split(":")
    package, *rest = module.split(".")
    spec: Any = importlib.util.find_spec(package)
    source = Path(spec.origin).parent.joinpath(*rest).with_suffix(".py").read_text(encoding="utf-8")
    node: Any = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    if isinstance(node, ast.ClassDef):
        fields = {item.target.id: _literal(item.value) for item in node.body
                  if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
        node = next((item for item in node.body if getattr(item, "name", None) == "__init__"), None)
        if node is None:
            return fields
    taken = node.args
    defaults = [*[None] * (len(taken.args) - len(taken.defaults)), *taken.defaults, *taken.kw_defaults]
    return {argument.arg: _literal(default) for argument, default in zip([*taken.args, *taken.kwonlyargs], defaults)
            if argument.arg not in _BY_HOST}


PARAMETERS: dict[str, dict[str, Any]] = {
    name: read_parameters(target)
    for registry in ("models", "dataloaders", "optimizers", "schedulers", "callbacks", "callbacks_with_config")
    for name, target in REGISTRY[registry].items()}
"""Of our blocks, by the name of their class: {key: default, or None}."""
PARAMETERS["ettin"] |= dict.fromkeys(FIELDS)
PARAMETERS["ettin_stable_adamw"] |= {"disable_grad": None, "param_groups": None}  # taken out by LLM-Foundry
DEFAULTS = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in PARAMETERS.items()}
_HOST = read_parameters("llmfoundry.utils.config_utils:TrainConfig")
HOST_KEYS = frozenset(_HOST)
HOST_DEFAULTS = {key: value for key, value in _HOST.items() if value is not None}

NO_EFFECT = {
    r"(train_loader|eval_loader(\[.*?\])?)\.(num_workers|prefetch_factor|pin_memory|persistent_workers|timeout|"
    r"dataset\.cache_limit)": "how rows are fetched; which ones follows from data and seed alone",
    r"model\.(attn_impl|compile|deterministic)": "the same function, up to rounding",
    r"(loggers|metadata|profiler)(\..*)?|progress_bar|log_to_console|console_log_interval|python_log_level|log_config|"
    r"flatten_metadata|dist_timeout|max_split_size_mb|expandable_segments|cuda_load_lazy":
        "logging, memory and time only",
    r"save_interval|save_filename|save_latest_filename|save_overwrite|save_num_checkpoints_to_keep|"
    r"only_composer_checkpoint|autoresume": "what is kept on disk; a run that resumes continues exactly",
    r"eval_interval|eval_first": "evaluating changes no weight",
    r"callbacks\.(speed_monitor|lr_monitor|runtime_estimator|scheduled_gc|memory_monitor|memory_snapshot|oom_observer|"
    r"optimizer_monitor|system_metrics_monitor|ettin_(clock|monitor|samples|export|steps))(\..*)?":
        "it observes or writes, and changes no weight",
    r"callbacks\.ettin_(phase|cross)\.accept(\[.*)?": "it lets a run begin, and has no further effect",
    r"fsdp_config\.(state_dict_type|activation_checkpointing|activation_cpu_offload|reshard_after_forward|verbose|"
    r"load_monolith_rank0_only)": "where tensors lie, not what they hold",
}
"""{pattern of a whole dotted key: why a difference in it cannot change what a run learns}."""

# pattern of key=value -> what to use instead
_REMOVED = {
    r"(.*\.)?objective\b.*\bmdlm\b.*": "masked diffusion was removed; use mlm, with a schedule of mask_rate if need be",
    r"model\.name=ettin_contrastive|(.*\.)?objective\b.*\bsimcse\b.*":
        "the contrastive stage was removed; export the model and train it with sentence-transformers (examples/)",
    r"algorithms\.ema\b.*": "removed; average a run's checkpoints with `ettin average SAVE_FOLDER OUT.pt --last 5`",
    r".*\.dataset\.on_bad_shard=.*": "removed; a damaged shard stops the run, so copy it again or convert it again",
}
# features of the host that act on a HuggingFaceModel, or load what was not checked -> what we have
_HOST_ONLY = {"icl_tasks": "eval_loader", "eval_gauntlet": "eval_loader", "only_hf_checkpoint": "`ettin export`",
              "callbacks.hf_checkpointer": "callbacks.ettin_export", "callbacks.load_checkpoint": "load_path",
              "callbacks.generate_callback": "callbacks.ettin_samples"}
# a key -> the keys that do nothing without it -> their values that ask for nothing
_INERT: dict[str, dict[str, tuple[Any, ...]]] = {
    "eval_loader": {"eval_interval": (0, "0ba", "0tok"), "eval_subset_num_batches": (-1,), "eval_first": (False,)},
    "save_folder": {"save_interval": (), "save_filename": (), "save_latest_filename": (), "save_overwrite": (False,),
                    "save_weights_only": (False,), "save_num_checkpoints_to_keep": (-1,), "save_ignore_keys": ()},
    "load_path": {"load_weights_only": (False,), "load_strict_model_weights": (True,)},
}


def check_removed(cfg: Mapping[str, Any]) -> None:
    """Refuses removed keys and values, naming what to use instead."""
    for key, value in walk({name: block for name, block in cfg.items() if name != "variables"}):
        for pattern, instead in _REMOVED.items():
            if re.fullmatch(pattern, f"{key}={value}"):
                raise ValueError(f"{key}: {value!r} given; {instead}")


def check_keys(cfg: Mapping[str, Any]) -> None:
    """Refuses unknown keys in blocks of ours."""
    for key, block in loaders(cfg):
        odd = {"batch_size_warmup"} if key != "train_loader" else {"label"}  # each belongs to one kind of loader
        _check(key, block, [each for each in ("name", *PARAMETERS["ettin_text"], "label") if each not in odd])
        if isinstance(block.get("dataset"), Mapping):
            _check(f"{key}.dataset", block["dataset"], DATASET_KEYS)
    for key in ("model", "optimizer", "scheduler"):
        if (name := cfg[key]["name"]) in PARAMETERS:
            _check(key, cfg[key], ["name", *PARAMETERS[name]])
    callbacks = cfg.get("callbacks") or {}
    for name, block in callbacks.items():
        if name in PARAMETERS:
            _check(f"callbacks.{name}", block or {}, PARAMETERS[name])
    names = {f"{key}.name": cfg[key]["name"] for key in ("model", "optimizer", "scheduler", "train_loader")}
    for key, name in (*names.items(), *((f"callbacks.{name}", name) for name in callbacks)):
        if name not in PARAMETERS and (near := did_you_mean(name, PARAMETERS, 0.85)):  # the host's are less alike
            raise ValueError(f"{key}: {name!r} given{near}")


def _check(key: str, block: Mapping[str, Any], allowed: Any) -> None:
    if unknown := sorted(set(block) - set(allowed)):
        known = did_you_mean(unknown[0], allowed) or f"; it takes {', '.join(allowed) or 'no key'}"
        raise ValueError(f"{key}.{unknown[0]}: unknown key{known}")


def check_effect(cfg: Mapping[str, Any]) -> None:
    """Refuses features of the host that need another kind of model or data, and settings that would do nothing."""
    for key, instead in _HOST_ONLY.items():
        if value_at(cfg, key) is not None:
            raise ValueError(f"{key}: given; it does not work with model.name: {cfg['model']['name']}. Use {instead}")
    for cause, nothing in _INERT.items():
        keys = [key for key, values in nothing.items() if cfg.get(key) is not None and cfg[key] not in values]
        # eval_loader: null says that nothing is evaluated
        given = cfg.get(cause) or cause == "eval_loader" and ("eval_loaders" in cfg or cause in cfg)
        if keys and not given:
            raise ValueError(f"{', '.join(keys)}: given without {cause}, so without effect; give {cause}, or set "
                             + " ".join(f"{key}=null" for key in keys))
