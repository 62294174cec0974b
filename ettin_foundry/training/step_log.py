"""The callback `ettin_steps`: writes what each step read and gave to steps.jsonl (see steps.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from llmfoundry.interfaces import CallbackWithConfig

from ettin_foundry.data.stream import HASH_MODULUS
from ettin_foundry.training.run_config import must_be
from ettin_foundry.training.steps import STEPS, cut_steps


class StepLog(CallbackWithConfig):
    """Appends one line a step to `<folder>/steps.jsonl`, on rank 0; a resumed run cuts off those that it does again.

    The batch's hash is summed over ranks while the step computes. Metrics: data/mask_rate, and where the objective
    changes or is mixed, data/objective_NAME, the share of the step's rows that train it.

    Args:
        folder: a local folder; save_folder if not given. `{run_name}` is filled in.
    """

    def __init__(self, train_config: Mapping[str, Any], folder: str | None = None):
        super().__init__(dict(train_config))
        given = folder or train_config.get("save_folder")
        if not given or "://" in given:
            key = "callbacks.ettin_steps.folder"
            raise must_be(key if folder else "save_folder", f"a local folder, for {STEPS}", given,
                          f"set {key} to one, or remove callbacks.ettin_steps")
        self.folder: str = given
        self._file: TextIO | None = None
        self._hash = torch.zeros(1, dtype=torch.int64)
        self._summed: Any = None
        self._entry: dict[str, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            folder = Path(format_name_with_dist(self.folder, state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            cut_steps(folder / STEPS, state.timestamp.batch.value)
            self._file = (folder / STEPS).open("a", buffering=1, encoding="utf-8")  # each line reaches the disk's cache

    def batch_start(self, state: State, logger: Logger) -> None:
        batch: Any = state.batch
        self._hash = torch.tensor([batch["ids_hash"]], dtype=torch.int64)
        if dist.get_world_size() > 1:
            if state.device.name == "gpu":  # from pageable memory the copy would wait for the work that is queued there
                self._hash = self._hash.pin_memory().to(f"cuda:{torch.cuda.current_device()}", non_blocking=True)
            self._summed = torch.distributed.all_reduce(self._hash, async_op=True)
        self._entry = {"objective": batch["objective"], "mask_rate": batch["mask_rate"]}
        schedule = getattr(getattr(state.train_dataloader, "collate_fn", None), "objective", None)
        shares: dict[str, float] = {}
        if schedule is not None and len(schedule.objectives) > 1:
            now = schedule.at(batch["tokens_before"])
            shares = {f"data/objective_{name}": now.get(name, 0.0) for name in schedule.objectives}
        logger.log_metrics({"data/mask_rate": batch["mask_rate"], **shares})

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._entry["lr"] = state.optimizers[0].param_groups[0]["lr"]  # the clock has set it, at BATCH_START

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._summed is not None:
            self._summed.wait()
        before, now = state.previous_timestamp, state.timestamp
        if self._file is None or before is None:
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        line = {"step": before.batch.value, "tokens": before.token.value,
                "rows": now.sample.value - before.sample.value, **self._entry, "loss": loss,
                "ids_hash": f"{int(self._hash.item()) % HASH_MODULUS:012x}",
                "seconds": round(now.batch_wct.total_seconds(), 6)}
        self._file.write(json.dumps(line) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
