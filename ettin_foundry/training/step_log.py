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
from ettin_foundry.training.run_config import require
from ettin_foundry.training.steps import STEPS, cut_steps


class StepLog(CallbackWithConfig):
    """Appends one line a step to `<folder>/steps.jsonl`, on rank 0; a resumed run cuts off those that it does again.

    Metric: data/mask_rate.

    Args:
        folder: a local folder; save_folder if not given. `{run_name}` is filled in.
    """

    def __init__(self, train_config: Mapping[str, Any], folder: str | None = None):
        super().__init__(dict(train_config))
        given = folder or train_config.get("save_folder")
        key = "callbacks.ettin_steps.folder"
        require(given and "://" not in given, key if folder else "save_folder", f"a local folder, for {STEPS}", given,
                f"set {key} to one, or remove callbacks.ettin_steps")
        self.folder = str(given)
        self._file: TextIO | None = None
        self._entry: dict[str, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            folder = Path(format_name_with_dist(self.folder, state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            cut_steps(folder / STEPS, state.timestamp.batch.value)
            self._file = (folder / STEPS).open("a", buffering=1, encoding="utf-8")  # each line reaches the disk's cache

    def batch_start(self, state: State, logger: Logger) -> None:
        self._entry = {key: state.batch[key] for key in ("objective", "mask_rate", "ids_hash")}
        logger.log_metrics({"data/mask_rate": self._entry["mask_rate"]})

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._entry["lr"] = state.optimizers[0].param_groups[0]["lr"]  # the clock has set it, at BATCH_START

    def batch_end(self, state: State, logger: Logger) -> None:
        ids_hash = state.device.tensor_to_device(torch.tensor([self._entry.pop("ids_hash")], dtype=torch.int64))
        dist.all_reduce(ids_hash)
        before, now = state.previous_timestamp, state.timestamp
        if self._file is None or before is None:
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        line = {"step": before.batch.value, "tokens": before.token.value,
                "rows": now.sample.value - before.sample.value, **self._entry, "loss": loss,
                "ids_hash": f"{int(ids_hash.item()) % HASH_MODULUS:012x}",
                "seconds": round(now.batch_wct.total_seconds(), 6)}
        self._file.write(json.dumps(line) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
