"""Which keys a config may have: those of our blocks, not those of the host that cannot act here, none that does nothing.

So a misspelled or idle key is named, with the valid ones, before any work. The lists mirror signatures that cannot be read
without importing torch and the host; a test holds each equal to its class. Blocks of the host's own classes are left to
the host.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ettin_foundry.data.stream import DATASET_KEYS
from ettin_foundry.model.config import EttinConfig

__all__ = ["BLOCK_KEYS", "CALLBACK_KEYS", "LOADER_KEYS", "MODEL_KEYS", "check_host_only",
           "check_inert", "check_keys"]

_DERIVED = ("causal", "max_position_embeddings")  # follow from objective and max_seq_len
FIELDS = tuple(f.name for f in dataclasses.fields(EttinConfig) if f.name not in _DERIVED)

_MODEL = ("size", "objective", "max_seq_len", "attn_impl", "init_device", *FIELDS)
MODEL_KEYS = {"ettin": _MODEL}
LOADER_KEYS = ("dataset", "objective", "max_seq_len", "mask_rate", "packing", "shuffle", "shuffle_seed", "shuffle_window",
               "batch_size_warmup", "num_workers", "prefetch_factor", "pin_memory", "persistent_workers", "timeout")
_TRAINING_ONLY = ("batch_size_warmup",)
_BY_HOST = ("disable_grad", "param_groups")  # of every optimizer, taken out by LLM-Foundry
BLOCK_KEYS = {
    "optimizer": {"ettin_stable_adamw": ("lr", "betas", "eps", "weight_decay", "max_lr", *_BY_HOST)},
    "scheduler": {"warmup_stable_decay": ("t_warmup", "t_decay", "t_max", "alpha_f"),
                  "one_minus_sqrt": ("t_decay", "t_max", "alpha_f")},
}
CALLBACK_KEYS = {"ettin_clock": ("run_config",), "ettin_cross": ("source", "accept"), "ettin_monitor": (),
                 "ettin_phase": ("source", "accept", "keep"), "ettin_export": ("interval", "folder"),
                 "ettin_samples": ("interval", "prompts", "max_new_tokens", "top_k"), "ettin_steps": ("folder",)}

_REMOVED_ALGORITHMS = {"ema": "removed; use `ettin average SAVE_FOLDER OUT.pt --last 5` on a run's checkpoints"}
# Features of the host that act on a HuggingFaceModel, on Streaming's datasets or around our checks: what we have instead
_HOST_ONLY = {
    "eval_loader, or evaluate an exported folder": ("icl_tasks", "icl_tasks_str", "eval_gauntlet", "eval_gauntlet_str"),
    "`ettin export`": ("only_hf_checkpoint",),
    "data parallelism or fsdp_config: every Ettin size fits one GPU": ("tp_config",),
    "callbacks.ettin_export, or `ettin export` afterwards": ("callbacks.hf_checkpointer",),
    "callbacks.ettin_samples": ("callbacks.generate_callback", "callbacks.eval_output_logging"),
    "eval_loader": ("callbacks.loss_perp_v_len", "callbacks.async_eval"),
    "one run for each phase (yamls/phases)": ("callbacks.curriculum_learning", "callbacks.dataset_swap"),
    "load_path, whose file is scanned before it is read": ("callbacks.load_checkpoint",),
    "optimizer.lr": ("callbacks.global_lr_scaling",),
}
# a key -> the keys that do nothing without it -> their values that ask for nothing
_INERT: dict[str, dict[str, tuple[Any, ...]]] = {
    "eval_loader": {"eval_interval": (0, "0ba", "0tok"), "eval_subset_num_batches": (-1,), "eval_first": (False,)},
    "save_folder": {"save_interval": (), "save_filename": (), "save_latest_filename": (), "save_overwrite": (False,),
                    "save_weights_only": (False,), "save_num_checkpoints_to_keep": (-1,), "save_ignore_keys": ()},
    "load_path": {"load_weights_only": (False,), "load_ignore_keys": (), "load_strict_model_weights": (True,)},
    "icl_tasks": {"icl_seq_len": (), "icl_subset_num_batches": ()},
}


def _check(key: str, block: Any, allowed: tuple[str, ...]) -> None:
    if unknown := sorted(set(block or {}) - set(allowed)):
        listed = f"the keys are {', '.join(allowed)}" if allowed else "it takes no key"
        raise ValueError(f"{key}.{unknown[0]}: unknown key; {listed}. Remove or correct it")


def check_keys(cfg: dict[str, Any], loaders: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuses an unknown key in any block whose class is ours.

    Raises:
        ValueError: naming the key and the valid ones.
    """
    _check("model", cfg["model"], ("name", *MODEL_KEYS[cfg["model"]["name"]]))
    for key, block in loaders:
        others = LOADER_KEYS if key == "train_loader" else (*(k for k in LOADER_KEYS if k not in _TRAINING_ONLY), "label")
        _check(key, block, ("name", *others))
        if isinstance(block.get("dataset"), dict):
            _check(f"{key}.dataset", block["dataset"], DATASET_KEYS)
    for key, classes in BLOCK_KEYS.items():
        if cfg[key]["name"] in classes:
            _check(key, cfg[key], ("name", *classes[cfg[key]["name"]]))
    for name, block in (cfg.get("callbacks") or {}).items():
        if name in CALLBACK_KEYS:
            _check(f"callbacks.{name}", block, CALLBACK_KEYS[name])
    for name in set(cfg.get("algorithms") or {}) & set(_REMOVED_ALGORITHMS):
        raise ValueError(f"algorithms.{name}: {_REMOVED_ALGORITHMS[name]}")


def check_host_only(cfg: dict[str, Any]) -> None:
    """Refuses a feature of the host that needs another kind of model or data, naming ours.

    Raises:
        ValueError: naming the key and what to use instead.
    """
    callbacks = cfg.get("callbacks") or {}
    for instead, keys in _HOST_ONLY.items():
        for key in keys:
            name = key.removeprefix("callbacks.")
            if name in callbacks if key != name else cfg.get(key):
                raise ValueError(f"{key}: given; it does not work with model.name: {cfg['model']['name']}. Use {instead}")


def check_inert(cfg: dict[str, Any]) -> None:
    """Refuses a setting that would do nothing because the one it depends on is absent.

    Raises:
        ValueError: naming the settings and what they depend on.
    """
    for cause, nothing in _INERT.items():
        keys = [key for key, values in nothing.items() if cfg.get(key) is not None and cfg[key] not in values]
        if keys and not cfg.get(cause) and not (cause == "eval_loader" and cfg.get("eval_loaders")):
            given = ", ".join(f"{key}={cfg[key]}" for key in keys)
            raise ValueError(f"{keys[0]}: {given} given; without {cause} nothing of this acts. Give {cause}, or switch off "
                             "each of them (" + " ".join(f"{key}=null" for key in keys) + ")")
