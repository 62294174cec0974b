"""Callbacks that start from another run: entering a phase with weights and moments, or crossing objectives with weights.

Each is one checked step (entry.py compares, before work and again here), and writes down where the weights came from. For
`ettin_phase` the host loads, told by load_path and load_ignore_keys what to take; `clock.Clock` then sets the recipe's
learning rate everywhere. A run that finds its own checkpoint enters nothing: the clock starts anew exactly once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ettin_foundry.data import tokenizer
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training import checkpoints as checkpoint
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.entry import Differences, Source, Target, compare, read_source

__all__ = ["CrossObjective", "EnterPhase"]

log = logging.getLogger(__name__)

# of a config: what a phase may change of the training, besides its length; said once on entering
_TOLD = ("model.", "optimizer.", "train_loader.mask_rate", "train_loader.objective", "train_loader.packing",
         "train_loader.dataset.", "train_loader.batch_size_warmup", "max_seq_len", "global_train_batch_size", "precision",
         "accumulate_train_batch_on_tokens", "seed")
_UNTOLD = ("model.max_seq_len", "model.objective")  # said under another key


class _Start(Callback):
    """What both callbacks do once the weights are there."""

    key = ""

    def __init__(self, source: str, accept: Sequence[str] = ()):
        self.source, self.accept = source, list(accept)

    def _compare(self, state: State, source: Source) -> Differences:
        model: Any = state.model
        tokens = getattr(model, "tokenizer", None)
        target = Target(dataclasses.asdict(model.config), tuple(ObjectiveSchedule.parse(model.objective_schedule).at(0)),
                        None if tokens is None else tokenizer.fingerprint(tokens))
        return compare(self.key, source, target, self.accept, crossing=isinstance(self, CrossObjective))

    def _remember(self, state: State, source: Source, accepted: Differences) -> None:
        """Where the weights come from, for every later checkpoint and the exported card."""
        clock = next((c for c in state.callbacks if isinstance(c, Clock)), None)
        if clock is None:
            return
        path, record = source.path.resolve(), source.record
        clock.lineage = (*record.get("lineage", ()), {
            "source": f"{path.parent.name}/{path.name}",
            **{key: record.get(key) for key in ("objective", "tokens", "phase", "run_hash")},
            "accepted": ", ".join(f"{name} {was} -> {now}" for name, (was, now) in accepted.items()) or None})


class EnterPhase(_Start):
    """Enters a phase: weights and optimizer moments of the phase before, everything else as this run's recipe says.

    KEPT: weights, and the optimizer's moments and step count (not with keep: weights). ANEW, once: clock, schedule, data
    order, generators. CHANGED: what the recipe changes; theta and the like only if `accept` lists them. One line says all
    of it. A run that resumes its own checkpoint is left alone, so a phase that is killed and started again is entered once.

    Args:
        source: a Composer checkpoint (file, sharded folder or save folder) of the same objective.
        accept: fields of the model that this phase may change (`global_rope_theta`), `tokenizer`, or `objective` between
            encoders. What is listed and does not differ is no error: an overlay says what its phase may change.
        keep: `all`, or `weights` to start the optimizer anew.

    Raises:
        ValueError: see `compare`; or nothing was loaded.
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
            raise ValueError(f"{self.key}.source: {self.source} was not loaded; the config transform ettin_checks tells the "
                             "host to, so run it through train.py or llmfoundry train")
        if self.keep == "all" and not any(optimizer.state for optimizer in state.optimizers):
            raise ValueError(f"{self.key}.source: {self.source} gave no moments to {type(state.optimizers[0]).__name__}. "
                             f"Take the optimizer that it was trained with, or set {self.key}.keep=weights to start it anew")
        clock = next(c for c in state.callbacks if isinstance(c, Clock))
        if "://" in state.load_path:
            record = clock.loaded or {}
            if not record.get("config"):
                raise ValueError(f"{self.key}.source: {self.source} does not say what model it holds, so nothing could be "
                                 "checked. Download it, and give the file")
            source = Source(Path(state.load_path), record, has_moments=True, is_folder=False)
        else:
            source = read_source(f"{self.key}.source", state.load_path)
        accepted = self._compare(state, source)
        self._remember(state, source, accepted)
        record, now = source.record, clock.state_dict()
        kept = "weights" if self.keep == "weights" else "weights, optimizer moments"
        changed = _changes(record, now)
        log.info("entering %s from %s (%s, batch %s, %s tokens): kept %s; new clock, schedule, data order, generators%s; "
                 "changed: %s", now["phase"] or "a phase", source.path, record.get("objective"), record.get("batch"),
                 record.get("tokens"), kept, "" if "moments" in kept else ", optimizer", ", ".join(changed) or "nothing")


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What the two configs say differently about training, as `key old -> new`."""
    from ettin_foundry.training.run_config import walk

    if "run_config" in then:
        old, new = (dict(walk(json.loads(record["run_config"]))) for record in (then, now))
    else:  # of an earlier version
        old, new = ({f"model.{key}": value for key, value in (record["config"] or {}).items()} for record in (then, now))
    keys = [key for key in dict.fromkeys((*old, *new)) if key.startswith(_TOLD) and key not in _UNTOLD]
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


class CrossObjective(_Start):
    """Continues from the weights of another kind of model: an encoder from a decoder, a decoder from an encoder, or one
    encoder's objective from another's.

    Head, output bias and tied matrix come along; clock, optimizer and data start anew. Nothing happens when autoresume has
    already loaded a checkpoint of this very run.

    Args:
        source: a Composer checkpoint (file, sharded folder or save folder), or a Hugging Face folder, also an official one.
        accept: fields of the model that may differ (`global_rope_theta`, `local_rope_theta`), or `tokenizer`.

    Raises:
        ValueError: see `compare`; missing or unknown tensors; or a `load_path` besides.
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
            raise ValueError(f"load_path: {state.load_path} was loaded, and callbacks.ettin_cross.source is {self.source}; "
                             "only one can give the weights. Remove one of them")
        source = read_source(f"{self.key}.source", self.source)
        accepted = self._compare(state, source)
        weights = _read_weights(source)
        options = StateDictOptions(full_state_dict=True, cpu_offload=False, strict=True)
        _check_tensors(source.path, weights, get_model_state_dict(state.model))
        named: dict[str, Any] = {f"model.{name}": tensor for name, tensor in weights.items()}
        set_model_state_dict(state.model, named, options=options)
        self._remember(state, source, accepted)
        model: Any = state.model
        old, new = source.record["config"], dataclasses.asdict(model.config)
        changed = [f"model.{name} {old[name]} -> {new[name]}" for name in new if name in old and old[name] != new[name]]
        log.info("crossing from %s (%s, %s tokens) to %s: kept weights; new clock, schedule, data order, generators, "
                 "optimizer; changed: %s", source.path, source.record.get("objective") or "objective unknown",
                 source.record.get("tokens"), ObjectiveSchedule.parse(model.objective_schedule),
                 ", ".join(changed) or "nothing")

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = True


def _read_weights(source: Source) -> dict[str, torch.Tensor]:
    """Under our names. Every rank reads: mapped from the file, not copied."""
    if source.is_folder:
        from ettin_foundry.model import weights as hf

        return hf.import_folder(source.path)[0]
    return checkpoint.load_model_state(source.path)[0]


def _check_tensors(path: Path, weights: Mapping[str, torch.Tensor], current: Mapping[str, Any]) -> None:
    """Names and shapes must be the model's; `current` is its state dict, possibly sharded (shapes are then global)."""
    own = {name.removeprefix("model."): tuple(value.shape) for name, value in current.items() if name.startswith("model.")}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if given != own:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise ValueError(f"callbacks.ettin_cross.source: {path} has {len(wrong)} tensor(s) that are not this run's model's, "
                         f"the first {wrong[0]} of shape {given.get(wrong[0])} (here {own.get(wrong[0])}); all must match. "
                         "Choose a model of the same size")
