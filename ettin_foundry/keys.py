"""Which keys each block of a config takes, so that a misspelled one is named with the valid ones before any work.

Mirrors of signatures that cannot be read without importing torch and the host; a test holds each equal to its class.
Blocks of the host's own classes are left to the host.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ettin_foundry.config import EttinConfig

__all__ = ["BLOCK_KEYS", "CALLBACK_KEYS", "DATASET_KEYS", "LOADER_KEYS", "MODEL_KEYS", "check_keys"]

_DERIVED = ("causal", "max_position_embeddings")  # follow from objective and max_seq_len
FIELDS = tuple(f.name for f in dataclasses.fields(EttinConfig) if f.name not in _DERIVED)

MODEL_KEYS = ("size", "objective", "max_seq_len", "attn_impl", "init_device", *FIELDS)
LOADER_KEYS = ("dataset", "objective", "max_seq_len", "mask_rate", "packing", "shuffle", "shuffle_seed", "shuffle_window",
               "num_workers", "prefetch_factor", "pin_memory", "persistent_workers", "timeout")
DATASET_KEYS = ("local", "split")
_BY_HOST = ("disable_grad", "param_groups")  # of every optimizer, taken out by LLM-Foundry
BLOCK_KEYS = {
    "optimizer": {"ettin_stable_adamw": ("lr", "betas", "eps", "weight_decay", "max_lr", *_BY_HOST)},
    "scheduler": {"warmup_stable_decay": ("t_warmup", "t_decay", "t_max", "alpha_f"),
                  "one_minus_sqrt": ("t_decay", "t_max", "alpha_f")},
}
CALLBACK_KEYS = {"ettin_clock": (), "ettin_cross": ("source",), "ettin_export": ("interval", "folder"), "ettin_monitor": (),
                 "ettin_samples": ("interval", "prompts", "max_new_tokens", "top_k")}


def _check(key: str, block: Any, allowed: tuple[str, ...]) -> None:
    if unknown := sorted(set(block or {}) - set(allowed)):
        listed = f"the keys are {', '.join(allowed)}" if allowed else "it takes no key"
        raise ValueError(f"{key}.{unknown[0]}: unknown key; {listed}. Remove or correct it")


def check_keys(cfg: dict[str, Any], loaders: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuses an unknown key in any block whose class is ours.

    Raises:
        ValueError: naming the key and the valid ones.
    """
    _check("model", cfg["model"], ("name", *MODEL_KEYS))
    for key, block in loaders:
        _check(key, block, ("name", *LOADER_KEYS) if key == "train_loader" else ("name", *LOADER_KEYS, "label"))
        if isinstance(block.get("dataset"), dict):
            _check(f"{key}.dataset", block["dataset"], DATASET_KEYS)
    for key, classes in BLOCK_KEYS.items():
        if cfg[key]["name"] in classes:
            _check(key, cfg[key], ("name", *classes[cfg[key]["name"]]))
    for name, block in (cfg.get("callbacks") or {}).items():
        if name in CALLBACK_KEYS:
            _check(f"callbacks.{name}", block, CALLBACK_KEYS[name])
