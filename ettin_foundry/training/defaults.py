"""What the code takes for a key that is left out, as data.

The tables mirror signatures that cannot be read without importing torch and the host; a test holds each to its class.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DEFAULTS", "HOST_DEFAULTS", "HOST_KEYS"]

HOST_DEFAULTS: dict[str, Any] = {
    "seed": 17, "precision": "amp_bf16", "expandable_segments": True, "cuda_load_lazy": False, "dist_timeout": 600.0,
    "accumulate_train_batch_on_tokens": True, "eval_interval": 1, "progress_bar": False, "log_to_console": True,
    "python_log_level": "debug", "console_log_interval": "1ba", "log_config": True, "save_overwrite": False,
    "save_weights_only": False, "save_interval": "1000ba", "save_num_checkpoints_to_keep": -1, "load_weights_only": False,
    "load_strict_model_weights": True, "only_hf_checkpoint": False, "only_composer_checkpoint": False,
    "train_subset_num_batches": -1, "spin_dataloaders": True, "eval_subset_num_batches": -1, "eval_first": False,
    "flatten_metadata": True, "autoresume": False, "device_train_microbatch_size": "auto",
}
"""Of LLM-Foundry's TrainConfig; a key of HOST_KEYS that is not here is absent by default."""

HOST_KEYS = frozenset(HOST_DEFAULTS) | {
    "model", "tokenizer", "optimizer", "scheduler", "train_loader", "device_train_batch_size", "device_eval_batch_size",
    "max_duration", "max_seq_len", "code_paths", "max_split_size_mb", "fsdp_config", "tp_config", "eval_loader",
    "eval_loaders", "icl_tasks", "icl_tasks_str", "eval_gauntlet", "eval_gauntlet_str", "icl_subset_num_batches",
    "icl_seq_len", "loggers", "callbacks", "algorithms", "save_folder", "save_latest_filename", "save_filename",
    "load_path", "load_ignore_keys", "save_ignore_keys", "global_train_batch_size", "compile_config", "metadata",
    "run_name", "profiler", "variables", "n_gpus", "device_train_grad_accum",
}
"""Every key that a config may have at its top."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "ettin": {"attn_impl": "auto", "init_device": "cpu"},  # and EttinConfig's
    "ettin_text": {"mask_rate": 0.0, "packing": True, "shuffle": True, "shuffle_seed": 21, "num_workers": 0,
                   "pin_memory": True, "persistent_workers": False, "timeout": 0},
    "ettin_stable_adamw": {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.0},  # max_lr: lr
    "warmup_stable_decay": {"t_max": "1dur", "alpha_f": 0.0},
    "one_minus_sqrt": {"t_decay": "1dur", "t_max": "1dur", "alpha_f": 0.0},
    "ettin_phase": {"accept": [], "keep": "all"},
    "ettin_cross": {"accept": []},
}
"""Of our blocks, by the name of their class; a key whose default is None is absent by default."""
