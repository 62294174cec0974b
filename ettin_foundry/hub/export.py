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
    """Writes Hugging Face folders of the weights: of drawn ones before the first step, at an interval, and at the end.

    interval: a time in ba, tok or sp. folder: a local folder, in which folders are named as by `ettin export --every`;
    `{run_name}` is filled in.
    """

    def __init__(self, interval: str, folder: str):
        if "://" in folder:
            raise ValueError(f"callbacks.ettin_export.folder must be local, got {folder!r}; upload it afterwards")
        self.folder = folder
        self._due = interval_passed("callbacks.ettin_export.interval", interval, at_end=True)

    def init(self, state: State, logger: Logger) -> None:
        self._model: Any = state.model  # the model before DDP wraps it
        self._clock = next(callback for callback in state.callbacks if isinstance(callback, Clock))

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 0 and state.load_path is None and not self._clock.lineage:
            self._write(state)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._write(state)

    def _write(self, state: State) -> None:
        """Every rank gathers, rank 0 writes."""
        weights = get_model_state_dict(state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_global_rank() == 0:
            record = decode_record(self._clock.state_dict())
            name = revision_name(record.get("phase"), state.timestamp.batch.value)
            folder = Path(format_name_with_dist(self.folder, state.run_name)) / name
            export_model(weights, self._model.config, self._model.tokenizer, folder, objective=self._model.objective,
                         facts=facts_of(record), overwrite=True)
            log.info("wrote %s", folder)
