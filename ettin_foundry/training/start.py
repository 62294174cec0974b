"""Callbacks that start from another run: entering a phase with its moments, or crossing objectives with weights alone.

The host loads, told by the checks what to take. A run that finds its own checkpoint enters nothing, so the clock starts
anew exactly once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ettin_foundry.model.weights import import_folder
from ettin_foundry.training.checkpoints import Head, decode_record
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.sources import compare, compare_configs, describe, read_source

log = logging.getLogger(__name__)


class EnterPhase(Callback):
    """Enters a phase: weights and optimizer moments of the phase before, everything else as this run's recipe says.

    source: a Composer checkpoint (file, sharded folder or save folder) of the same objective; the checks leave it out
    for weights that the user's load_path names. accept: fields of the model that may differ, `tokenizer`, or
    `objective` between encoders. keep: `all`, or `weights` for a new optimizer.
    """

    key = "callbacks.ettin_phase.source"

    def __init__(self, source: str | None = None, accept: Sequence[str] = (), keep: str = "all"):
        self.source, self.accept, self.keep = source, list(accept), keep

    def after_load(self, state: State, logger: Logger) -> None:
        key, path = self.key if self.source else "load_path", str(state.load_path or self.source)
        if state.timestamp.batch > 0:
            log.info("resuming this run: %s is not entered again", self.source or key)
            return
        if self.keep == "all" and not any(optimizer.state for optimizer in state.optimizers):
            raise ValueError(f"{key}: {path} gave no moments to {type(state.optimizers[0]).__name__}; take the "
                             "optimizer that it was trained with, or set callbacks.ettin_phase.keep=weights")
        clock = next(each for each in state.callbacks if isinstance(each, Clock))  # the checks add it to every run
        if "://" not in path:
            source = read_source(key, path)
        elif clock.loaded and clock.loaded.get("config"):
            source = Head(Path(path), clock.loaded, {}, False)
        else:
            raise ValueError(f"{key}: {path} does not say what model it holds; download it first")
        now, record = decode_record(clock.state_dict()), source.record
        accepted = describe(compare(key, source, now, self.accept))
        clock.extend_lineage(record, source.path, accepted or None, record.get("tokens"))
        if (source.path / "config.json").is_file():  # a Hugging Face folder, which the host cannot load
            found: dict[str, Any] = {f"model.{name}": value for name, value in import_folder(source.path)[0].items()}
            set_model_state_dict(state.model, found, options=StateDictOptions(full_state_dict=True, strict=True))
        log.info("entering %s from %s (%s, batch %s, %s tokens): kept %s, and nothing else; changed: %s",
                 now["phase"] or "a phase", source.path, record.get("objective") or "objective unknown",
                 record.get("batch"), record.get("tokens"),
                 "weights" if self.keep == "weights" else "weights, optimizer moments",
                 describe(compare_configs(record, now)) or "nothing")


class CrossObjective(EnterPhase):
    """Continues from the weights of another kind of model: encoder and decoder, or mlm and mntp.

    Head, output bias and tied matrix come along; clock, optimizer and data start anew.

    source: a Composer checkpoint (file, sharded folder or save folder), or a Hugging Face folder. accept: fields of the
    model that may differ (`global_rope_theta`), or `tokenizer`.
    """

    key = "callbacks.ettin_cross.source"

    def __init__(self, source: str, accept: Sequence[str] = ()):
        super().__init__(source, accept, "weights")
