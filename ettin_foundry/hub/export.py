"""The callback `ettin_export`: Hugging Face folders of the weights in the course of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ettin_foundry.hub.folder import export_model, revision_name
from ettin_foundry.hub.load import facts_of
from ettin_foundry.training.callbacks import interval_passed
from ettin_foundry.training.checkpoints import decode_record
from ettin_foundry.training.clock import Clock

log = logging.getLogger(__name__)


class ExportHF(Callback):
    """Writes Hugging Face folders of the weights, named as by `ettin export --every`, at an interval and at the end.

    A run whose weights are drawn writes step0 before its first step.

    Args:
        interval: a time in ba, tok or sp. folder: a local folder; `{run_name}` is filled in.
    """

    def __init__(self, interval: str, folder: str):
        if "://" in folder:
            raise ValueError(f"callbacks.ettin_export.folder must be local, got {folder!r}; upload it afterwards")
        self.folder = folder
        self._due = interval_passed("callbacks.ettin_export.interval", interval)
        self._last_batch = -1

    def init(self, state: State, logger: Logger) -> None:
        self._model: Any = state.model  # the model before DDP wraps it
        self._clock = next(callback for callback in state.callbacks if isinstance(callback, Clock))

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 0 and state.load_path is None and not self._clock.lineage:
            self._write(state)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value != self._last_batch:
            self._write(state)

    def _write(self, state: State) -> None:
        """Every rank gathers, rank 0 writes; what fails there is raised on every rank, so that none waits for it."""
        failed: list[Exception | None] = [None]
        self._last_batch = state.timestamp.batch.value
        weights = get_model_state_dict(state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_global_rank() == 0:
            try:
                record = decode_record(self._clock.state_dict())
                name = "step0" if self._last_batch == 0 else revision_name(record.get("phase"), self._last_batch)
                folder = Path(format_name_with_dist(self.folder, state.run_name)) / name
                export_model(weights, self._model.config, self._model.tokenizer, folder,
                             objective=self._model.objective, facts=facts_of(record), overwrite=True)
                log.info("wrote %s", folder)
            except Exception as error:
                failed = [error]
        dist.broadcast_object_list(failed)
        if failed[0] is not None:
            raise failed[0]
