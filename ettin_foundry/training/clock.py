"""The callback that checks.py adds to every run: it ties a step to the tokens before it, and guards what is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import callbacks
from composer.core import State
from composer.loggers import Logger, LoggerDestination, WandBLogger
from composer.utils import checkpoint, dist, format_name_with_dist
from llmfoundry.interfaces import CallbackWithConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ettin_foundry.data.storage import atomic_file, atomic_folder
from ettin_foundry.data.tokenizer import fingerprint, save
from ettin_foundry.model.weights import weights_checkpoint
from ettin_foundry.training.checkpoints import check_folder, decode_record, newest_complete
from ettin_foundry.training.loading import make_safe
from ettin_foundry.training.run_config import config_text
from ettin_foundry.training.saving import CheckpointSaver, wait_for_write, write_whole
from ettin_foundry.training.sources import Finished, check_resume, describe, is_finished

log = logging.getLogger(__name__)


class Clock(CallbackWithConfig):
    """Ties a step to the tokens before it, guards what is loaded and saved, and writes into checkpoints what they are.

    - lr of batch k is exactly f(tokens before batch k); Composer's own value is one batch late.
    - The batch says how many tokens precede it in the stream; that must be Composer's token count.
    - torch's generators are seeded from (seed, batch, rank) before each batch; Composer restores none mid-epoch.
    - After loading, the optimizer's settings are the recipe's, and a resume is compared (`check_resume`).
    - A loss or gradient that is not finite stops every rank at the end of its step, before anything is saved.
    - Initial weights, drawn and not loaded, go to `<save_folder>/initial/step0.pt`, which autoresume never sees.

    Args:
        train_config: from LLM-Foundry. run_config: the same as in the user's files (`config_text`), from the checks.
        accept: keys that may differ from the checkpoint that a run goes on from, such as `optimizer.lr`.
    """

    def __init__(self, train_config: Mapping[str, Any], run_config: str | None = None, accept: Sequence[str] = ()):
        super().__init__(dict(train_config))
        self._run, self._accept = train_config, list(accept)
        self._run_config = run_config or config_text(train_config)
        level = getattr(logging, str(train_config.get("python_log_level")).upper(), logging.WARNING)
        if level < logging.WARNING:  # the host sets the level of its own loggers only
            logging.getLogger("ettin_foundry").setLevel(level)
        self._fingerprint = "null"  # the tokenizer's, as JSON
        self._state: Any = None
        self._model: Any = None
        self._tokenizer: str | None = None  # where its copy lies
        self._given: list[dict[str, Any]] = []
        self._squares = torch.zeros(())
        self.loaded: dict[str, Any] | None = None
        # a tuple: torch's sharded checkpoints flatten lists of dicts into keys, which must then be there on loading
        self.lineage: tuple[dict[str, Any], ...] = ()

    def init(self, state: State, logger: Logger) -> None:
        self._state, self._model = state, state.model  # the model before DDP wraps it
        if (folder := self._run.get("save_folder")) and "://" not in folder:
            check_folder(Path(format_name_with_dist(folder, state.run_name)))
        if self._model.tokenizer is not None:
            self._fingerprint = json.dumps(fingerprint(self._model.tokenizer))
        for destination in logger.destinations:
            if isinstance(destination, WandBLogger) and not destination._log_artifacts:
                # autoresume asks it, which fails offline; as a logger that holds no files answers
                destination.download_file = partial(LoggerDestination.download_file, destination)

    def before_load(self, state: State, logger: Logger) -> None:
        make_safe(checkpoint)
        checkpoint._write_checkpoint_file = write_whole
        for saver in (each for each in state.callbacks if type(each) is callbacks.CheckpointSaver):
            saver.__class__ = CheckpointSaver  # the host has made it
        self._given = [{"initial_lr": group["lr"], **{key: group[key] for key in group.keys() - {"params", "step"}}}
                       for group in state.optimizers[0].param_groups]

    def after_load(self, state: State, logger: Logger) -> None:
        if self.loaded is not None and state.timestamp.batch > 0:
            own = state.load_path != self._run.get("load_path")  # then autoresume has found it
            place, time = f"{state.load_path}, batch {state.timestamp.batch.value}", state.timestamp
            now = decode_record(self.state_dict())
            if changed := describe(check_resume(self.loaded, now, place=place, own=own, accept=self._accept)):
                changed += f" from batch {time.batch.value} ({time.token.value:,} tokens) on"
                self.extend_lineage(self.loaded, state.load_path, changed, None)  # its tokens are on this clock
                log.warning("going on from %s with %s", place, changed)
            if own and is_finished(now, self._run["max_duration"]):  # in a store, which the checks do not read
                raise Finished(f"{place} has come to max_duration={self._run['max_duration']}")
        for group, given in zip(state.optimizers[0].param_groups, self._given):
            group.update(given, lr=given["initial_lr"])
        for scheduler in state.schedulers:
            scheduler.base_lrs = [given["initial_lr"] for given in self._given]

    def extend_lineage(self, record: Mapping[str, Any], path: Any, accepted: str | None, tokens: int | None) -> None:
        """Adds what this run starts or goes on from to what stands in checkpoints and cards."""
        entry = {"source": "/".join(Path(path).resolve().parts[-2:]), "tokens": tokens, "accepted": accepted,
                 **{key: record.get(key) for key in ("objective", "phase", "run_hash")}}
        self.lineage = (*record.get("lineage", ()), entry)

    def fit_start(self, state: State, logger: Logger) -> None:
        folder, tokenizer = self._run.get("save_folder"), self._model.tokenizer
        if not folder or "://" in folder:
            return
        folder = Path(format_name_with_dist(folder, state.run_name))
        if tokenizer is not None:  # so that an export needs nothing else
            self._tokenizer = str((folder / "tokenizer").resolve())
            if dist.get_global_rank() == 0:
                with atomic_folder(folder / "tokenizer") as copy:
                    save(tokenizer, copy)
        if state.load_path is not None or self.lineage or state.timestamp.batch > 0:
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(state.model, options=options)  # every rank gathers
        if dist.get_global_rank() == 0:
            plain = {name.removeprefix("model."): value for name, value in weights.items()}
            content = weights_checkpoint(plain, self._model.config, objective=self._model.objective)
            content["state"]["callbacks"]["Clock"] = self.state_dict()
            with atomic_file(folder / "initial" / "step0.pt") as file:
                torch.save(content, file)

    def batch_start(self, state: State, logger: Logger) -> None:
        batch, time = state.batch, state.timestamp
        if isinstance(batch, Mapping) and "tokens_before" in batch:
            stream, clock = int(batch["tokens_before"]), time.token.value
            if stream != clock:
                raise ValueError(f"train_loader: its next batch comes after {stream} tokens of the stream, but the "
                                 f"trainer has counted {clock} at batch {time.batch.value}; resume a whole checkpoint "
                                 "with the same data and global batch, or enter it with callbacks.ettin_phase")
        for scheduler in state.schedulers:
            lrs = [base * factor(scheduler.last_epoch)  # type: ignore[attr-defined]
                   for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]  # type: ignore[attr-defined]
            for group, lr in zip(state.optimizers[0].param_groups, lrs):
                group["lr"] = lr
            scheduler._last_lr = lrs
        words = (state.rank_zero_seed, time.batch.value, dist.get_global_rank())
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed queues a call for each kind of device without use
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Sums the squares of all gradients; read at the end of the step, when nothing has to wait for it any more."""
        gradients: list[Any] = [p.grad for p in state.model.parameters() if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        self._squares = torch.stack(torch._foreach_norm(local)).square().sum()  # as the second moments, it may overflow
        if isinstance(gradients[0], DTensor):  # else every rank has the same
            torch.distributed.all_reduce(self._squares)

    def batch_end(self, state: State, logger: Logger) -> None:
        loss, squares = float(state.total_loss_dict["loss/train/total"]), float(self._squares)  # the host sums the loss
        if math.isfinite(loss) and math.isfinite(squares):
            return
        wait_for_write()  # the checkpoint that is then the newest
        folder = format_name_with_dist(self._run.get("save_folder") or "", state.run_name)
        newest = folder if "://" in folder else folder and newest_complete(folder)
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradients", f"a sum of squares of {squares}")
        advice = f"Go on from {newest} by the same command" if newest else "No checkpoint was saved before: start again"
        key, before = " callbacks.ettin_clock.accept=[optimizer.lr]" if newest else "", state.previous_timestamp
        assert before is not None
        raise ValueError(f"{what} must be finite, got {value} at step {before.batch.value}, after "
                         f"{before.token.value:,} tokens; nothing of it is saved. {advice} with a lower learning rate "
                         f"(variables.peak_lr=...{key})")

    def state_dict(self) -> dict[str, Any]:
        """What makes a checkpoint readable by itself (its record): plain data only, nested lists as JSON text."""
        model, time = self._model, self._state.timestamp
        return {
            "config": dataclasses.asdict(model.config), "size": model.config.size, "objective": model.objective,
            "objective_schedule": json.dumps(model.objective_schedule.plain()),
            "tokenizer": self._tokenizer or getattr(model.tokenizer, "name_or_path", None),
            "tokenizer_fingerprint": self._fingerprint,
            "tokens": time.token.value, "batch": time.batch.value, "run_name": self._state.run_name,
            "phase": (self._run.get("variables") or {}).get("phase"), "run_config": self._run_config,
            "run_hash": hashlib.sha256(self._run_config.encode()).hexdigest(), "lineage": self.lineage,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = decode_record(state)
        self.lineage = tuple(state.get("lineage", ()))
