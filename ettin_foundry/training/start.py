"""Callbacks that start from another run: entering a phase with its moments, or crossing objectives with weights alone.

A run that finds its own checkpoint enters nothing, so the clock starts anew exactly once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ettin_foundry.model.weights import import_folder
from ettin_foundry.training.checkpoints import decode_record, load_model_state
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.sources import Source, compare, compare_configs, describe, read_source

log = logging.getLogger(__name__)


class _Start(Callback):
    key = ""

    def __init__(self, source: str, accept: Sequence[str] = ()):
        self.source, self.accept = source, list(accept)

    def _accept(self, state: State, source: Source) -> str:
        """Compares the source with what was built, adds it to the lineage, and says what differs."""
        now = decode_record(_clock(state).state_dict())
        accepted = describe(compare(self.key, source, now, self.accept))
        _clock(state).extend_lineage(source.record, source.path, accepted or None, source.record.get("tokens"))
        return describe(compare_configs(source.record, now)) or "nothing"


def _clock(state: State) -> Clock:
    return next(each for each in state.callbacks if isinstance(each, Clock))  # the checks add it to every run


class EnterPhase(_Start):
    """Enters a phase: weights and optimizer moments of the phase before, everything else as this run's recipe says.

    The host loads, told by load_path and load_ignore_keys what to take. A resumed run is left alone.

    source: a Composer checkpoint (file, sharded folder or save folder) of the same objective. accept: fields of the
    model that may differ, `tokenizer`, or `objective` between encoders. keep: `all`, or `weights` for a new optimizer.
    """

    key = "callbacks.ettin_phase"

    def __init__(self, source: str, accept: Sequence[str] = (), keep: str = "all"):
        super().__init__(source, accept)
        self.keep = keep

    def after_load(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch > 0:
            log.info("resuming this run: %s is not entered again", self.source)
            return
        if state.load_path is None:
            raise ValueError(f"{self.key}.source: {self.source} was not loaded; the config transform ettin_checks makes"
                             " the host load it: run it through train.py or llmfoundry train")
        if self.keep == "all" and not any(optimizer.state for optimizer in state.optimizers):
            raise ValueError(f"{self.key}.source: {self.source} gave no moments to {type(state.optimizers[0]).__name__}"
                             f"; take the optimizer that it was trained with, or set {self.key}.keep=weights")
        clock = _clock(state)
        if "://" not in state.load_path:
            source = read_source(f"{self.key}.source", state.load_path)
        elif clock.loaded and clock.loaded.get("config"):
            source = Source(Path(state.load_path), clock.loaded)
        else:
            raise ValueError(f"{self.key}.source: {self.source} does not say what model it holds; download it first")
        changed, record = self._accept(state, source), source.record
        parts = ("weights", ", optimizer") if self.keep == "weights" else ("weights, optimizer moments", "")
        log.info("entering %s from %s (%s, batch %s, %s tokens): kept %s; new clock, schedule, data order, "
                 "generators%s; changed: %s", clock.state_dict()["phase"] or "a phase", source.path,
                 record.get("objective"), record.get("batch"), record.get("tokens"), *parts, changed)


class CrossObjective(_Start):
    """Continues from the weights of another kind of model: encoder and decoder, or mlm and mntp.

    Head, output bias and tied matrix come along; clock, optimizer and data start anew. A resumed run is left alone.

    source: a Composer checkpoint (file, sharded folder or save folder), or a Hugging Face folder. accept: fields of the
    model that may differ (`global_rope_theta`), or `tokenizer`.
    """

    key = "callbacks.ettin_cross"

    def __init__(self, source: str, accept: Sequence[str] = ()):
        super().__init__(source, accept)
        self._resumed = False

    def after_load(self, state: State, logger: Logger) -> None:
        if self._resumed and state.timestamp.batch > 0:
            log.info("resuming this run: weights of %s are not loaded again", self.source)
            return
        if state.load_path is not None:
            raise ValueError(f"load_path: {state.load_path} and {self.key}.source given; only one can give the weights")
        source = read_source(f"{self.key}.source", self.source)
        changed = self._accept(state, source)
        # every rank reads: tensors are mapped from the file, not copied
        weights = import_folder(source.path)[0] if source.is_folder else load_model_state(source.path)[0]
        named: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights.items()}
        given, own = ({name: tuple(tensor.shape) for name, tensor in tensors.items()}  # type: ignore[union-attr]
                      for tensors in (named, get_model_state_dict(state.model)))
        if wrong := sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name)):
            raise ValueError(f"{self.key}.source: {source.path} has {len(wrong)} tensor(s) that are not this run's "
                             f"model's, the first {wrong[0]} of shape {given.get(wrong[0])} (here {own.get(wrong[0])})")
        set_model_state_dict(state.model, named, options=StateDictOptions(full_state_dict=True, strict=True))
        log.info("crossing from %s (%s, %s tokens): kept weights; new clock, schedule, data order, generators, "
                 "optimizer; changed: %s", source.path, source.record.get("objective") or "objective unknown",
                 source.record.get("tokens"), changed)

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = True
