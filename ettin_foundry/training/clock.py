"""The callback that is in every run: it ties a step to the tokens before it, and guards what is loaded.

checks.py adds it to each config, so that what it protects holds under stock `llmfoundry train` too. Callbacks that a
recipe asks for by name are in callbacks.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, ensure_tuple, format_name_with_dist, is_tar
from llmfoundry.interfaces import CallbackWithConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training import checkpoints as checkpoint
from ettin_foundry.training.optimizer import StableAdamW, fsdp2_gradient_factor
from ettin_foundry.training.starts import check_resume, config_hash, config_text

__all__ = ["Clock"]

log = logging.getLogger(__name__)

# optimizer.param_groups key -> key in the recipe's optimizer block
_SETTINGS = {"initial_lr": "lr", "max_lr": "max_lr", "weight_decay": "weight_decay", "beta1": "betas", "beta2": "betas",
             "betas": "betas", "eps": "eps"}


class Clock(CallbackWithConfig):
    """Ties a step to the tokens before it: learning rate, data position, randomness; and guards what is loaded.

    - lr of batch k is exactly f(tokens before batch k), also after a resume. Composer evaluates schedules before it adds
      the finished batch to its clock, so its own value is one batch late.
    - The batch says how many tokens precede it in the stream; that must be Composer's token count.
    - torch's default generators are seeded from (seed, batch, rank) before each batch, so that dropout is a function of
      the step: Composer 0.32.1 restores no generator when it resumes mid-epoch with a dataset that has state.
    - Before loading: checkpoints are scanned (checkpoint.py) and a broken `latest` link is repaired.
    - After loading at token 0 (a new phase), lr, max_lr, weight decay, betas and eps are the recipe's; Composer would keep
      the checkpoint's. After loading in the middle of a run, a recipe that differs is refused, as is another run's folder.
    - Gradients under FSDP2 on gloo are averaged (see `optim.fsdp2_gradient_factor`).
    - Initial weights, drawn and not loaded, are written to `<save_folder>/initial/step0.pt`, which autoresume never sees.
    - What this package logs is shown at the run's python_log_level.
    - Every checkpoint says what it is: model, objective, tokenizer, tokens, where the weights came from, the config.

    Args:
        train_config: the run's config, given by LLM-Foundry.
        run_config: the same as the user's files say it, as canonical JSON, given by the checks; by default made of
            train_config.
    """

    def __init__(self, train_config: Mapping[str, Any], run_config: str | None = None):
        super().__init__(dict(train_config))
        self._run = train_config
        self._run_config = run_config or config_text(train_config)
        level = getattr(logging, str(train_config.get("python_log_level")).upper(), logging.WARNING)
        if level < logging.WARNING:  # the host lets its own modules speak, and no others
            logging.getLogger("ettin_foundry").setLevel(level)
        self._state: State | None = None
        self._model: Any = None
        self._given: list[dict[str, Any]] = []
        self.loaded: dict[str, Any] | None = None
        self._gradient_factor = 1.0
        # a tuple: torch's sharded checkpoints flatten lists of dicts into keys, which must then be there on loading
        self.lineage: tuple[dict[str, Any], ...] = ()

    def init(self, state: State, logger: Logger) -> None:
        self._state, self._model = state, state.model  # the model before DDP wraps it

    def before_load(self, state: State, logger: Logger) -> None:
        checkpoint.install_validation()
        load_path = self._run.get("load_path")
        if load_path and is_tar(load_path):
            raise ValueError(f"load_path: {load_path!r} given; archives are unpacked without any check, so only .pt files "
                             "and sharded checkpoint folders are loaded. Unpack it yourself and give the file inside")
        folder = self._run.get("save_folder")
        if self._run.get("autoresume") and folder and "://" not in folder:
            if dist.get_global_rank() == 0:
                latest = self._run.get("save_latest_filename") or "latest-rank{rank}.pt"
                checkpoint.repair_latest(format_name_with_dist(folder, state.run_name),
                                         latest=format_name_with_dist(latest, state.run_name))
            dist.barrier()
        self._given = [_settings(group) for optimizer in state.optimizers for group in optimizer.param_groups]

    def after_load(self, state: State, logger: Logger) -> None:
        if self.loaded is not None:
            self._check_loaded(state, self.loaded)
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        if state.timestamp.batch == 0:
            for group, given in zip(groups, self._given):
                group.update(given)
                group["lr"] = given.get("initial_lr", group["lr"])
            for scheduler in state.schedulers:
                scheduler.base_lrs = [group["initial_lr"] for group in groups]
            return
        for group, given in zip(groups, self._given):
            for key, value in given.items():
                if group.get(key) != value:
                    raise ValueError(f"optimizer.{_SETTINGS[key]}: {value} in the config, {group.get(key)} in the "
                                     f"checkpoint that this run resumes (batch {state.timestamp.batch.value}); in the "
                                     "middle of a run only the same is allowed. Restore the value, or enter a new phase "
                                     "with callbacks.ettin_phase")

    def _check_loaded(self, state: State, loaded: dict[str, Any]) -> None:
        """Refuses another objective, and in the middle of a run all that would make it another run."""
        now = checkpoint.decode_record(self.state_dict())
        if state.timestamp.batch > 0:
            own = state.load_path != self._run.get("load_path")  # then autoresume has found it
            check_resume(loaded, now, place=f"{state.load_path}, batch {state.timestamp.batch.value}", own=own)
        elif loaded.get("objective") not in (None, now["objective"]):
            raise ValueError(f"load_path: the checkpoint's objective is {loaded['objective']}, this run's is "
                             f"{now['objective']}; only the same is allowed. Give the checkpoint as "
                             "callbacks.ettin_cross.source instead")

    def fit_start(self, state: State, logger: Logger) -> None:
        if any(isinstance(module, FullyShardedDataParallel) for module in state.model.modules()) and any(
                isinstance(optimizer, StableAdamW) for optimizer in state.optimizers):
            raise ValueError("fsdp_config: FSDP1 cuts parameters into flat pieces, and ettin_stable_adamw needs a mean over "
                             "each whole tensor; only FSDP2 is allowed. Set the environment variable FSDP_VERSION=2")
        self._gradient_factor = fsdp2_gradient_factor(state.model)
        if self._gradient_factor != 1.0:
            log.info("this backend sums FSDP2's gradients; they are multiplied by %s", self._gradient_factor)
        self._write_initial(state)

    def _write_initial(self, state: State) -> None:
        """The weights before the first step, once, as `hf.weights_checkpoint` lays them out; every rank gathers."""
        folder, config = self._run.get("save_folder"), getattr(self._model, "config", None)
        drawn = state.load_path is None and not self.lineage and state.timestamp.batch == 0
        if not drawn or not folder or "://" in folder or not isinstance(config, EttinConfig):
            return
        from ettin_foundry.model.weights import weights_checkpoint

        weights: Any = get_model_state_dict(state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_global_rank() == 0:
            path = Path(format_name_with_dist(folder, state.run_name)) / "initial" / "step0.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = weights_checkpoint({name.removeprefix("model."): value for name, value in weights.items()}, config,
                                         objective=self._model.objective)
            content["state"]["callbacks"]["Clock"] = self.state_dict()
            torch.save(content, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._check_position(state)
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        for scheduler in state.schedulers:
            lrs = [base * factor(scheduler.last_epoch)  # type: ignore[attr-defined]
                   for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]  # type: ignore[attr-defined]
            for group, lr in zip(groups, lrs):
                group["lr"] = lr
            scheduler._last_lr = lrs
        words = (state.rank_zero_seed, state.timestamp.batch.value, dist.get_global_rank())
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))  # and every CUDA device

    def _check_position(self, state: State) -> None:
        batch = state.batch
        if isinstance(batch, Mapping) and "tokens_before" in batch:
            stream, clock = int(batch["tokens_before"]), state.timestamp.token.value
            if stream != clock:
                raise ValueError(f"train_loader: its next batch comes after {stream} tokens of the stream, but the trainer "
                                 f"has counted {clock} at batch {state.timestamp.batch.value}; they must be equal. Resume a "
                                 "whole checkpoint with the same data and global batch, or enter it with "
                                 "callbacks.ettin_phase, which starts both anew")

    def before_backward(self, state: State, logger: Logger) -> None:
        """Scales gradients at their source, so that accumulation, clipping and the optimizer all see averages."""
        if self._gradient_factor == 1.0:
            return
        loss: Any = state.loss
        if isinstance(loss, dict) and "total" in loss:  # Composer then differentiates this entry alone
            loss = loss["total"]
        for part in loss.values() if isinstance(loss, dict) else ensure_tuple(loss):
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient * self._gradient_factor)

    @functools.cached_property
    def _tokenizer(self) -> dict[str, Any]:
        """Name and fingerprint; reading a vocabulary takes a moment, so once."""
        from ettin_foundry.data.tokenizer import fingerprint

        tokens = getattr(self._model, "tokenizer", None)
        return {"tokenizer": getattr(tokens, "name_or_path", None),
                "tokenizer_fingerprint": json.dumps(None if tokens is None else fingerprint(tokens))}

    def state_dict(self) -> dict[str, Any]:
        """What makes a checkpoint readable by itself: plain data only, nested lists as JSON text.

        config, size, objective (what the model ends as), objective_schedule, tokenizer (its name) and its fingerprint;
        tokens and batch of this run; run_name, phase, run_config (`starts.config_text`) and run_hash, its sha256; lineage,
        oldest first: what the weights were started from.
        """
        config = getattr(self._model, "config", None)
        plain = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else None
        schedule = getattr(self._model, "objective_schedule", None)
        time = None if self._state is None else self._state.timestamp
        return {
            "config": plain, "size": getattr(config, "size", None), "objective": getattr(self._model, "objective", None),
            "objective_schedule": json.dumps(None if schedule is None else ObjectiveSchedule.parse(schedule).plain()),
            **self._tokenizer,
            "tokens": 0 if time is None else time.token.value, "batch": 0 if time is None else time.batch.value,
            "run_name": None if self._state is None else self._state.run_name,
            "phase": (self._run.get("variables") or {}).get("phase"), "run_config": self._run_config,
            "run_hash": config_hash(self._run_config), "lineage": self.lineage,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = checkpoint.decode_record(state)
        self.lineage = tuple(state.get("lineage", ()))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: group[key] for key in _SETTINGS if key in group}
    settings.setdefault("initial_lr", group["lr"])  # there once a scheduler is attached
    return settings
