"""Whether the phases of one model go on from each other: clock, learning rate, weight decay, rotary theta, length, shape.

A phase keeps weights and moments under a new clock (callbacks.ettin_phase), takes weights only (callbacks.ettin_cross, or
load_weights_only), or goes on with everything that the checkpoint holds. `reset_time` and
`restart_override` are switches of the program that trained the original (orionw/bert24@9ca0df4, main.py); no run here can
have them, but a file of settings can.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ettin_foundry.tools.lint_report import ABSENT, UNFAIR, Difference, Report
from ettin_foundry.tools.meaning import Meaning, data_of, read_meaning
from ettin_foundry.tools.plan_course import learning_rates

__all__ = ["lint_chain"]

_SHAPE = ("model.size", "model.vocab_size", "model.global_attn_every_n_layers", "model.local_attention", "model.norm_eps")
_SET_DIRECTLY = ("warmup_stable_decay", "constant_with_warmup")  # restart_override gives these the config's lr


def lint_chain(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Report:
    """Compares each phase with the one before it.

    Args:
        runs: (name, config) of the phases of one model in the order in which they are run, configs as `lint_pair` takes
            them; a cross run follows the run whose weights it takes.

    Returns:
        What does not go on, at the phase where it happens; a change that a phase is for (data, budget, batch, mask rate,
        longer rows) is none.

    Raises:
        ValueError, FileNotFoundError: a config cannot be read, or a manifest is broken.
    """
    chain = [read_meaning(name, cfg) for name, cfg in runs]
    found, notes = [], []
    for i in range(1, len(chain)):
        past, now = chain[:i], chain[i]
        for check in (_shape, _kind, _tokenizer, _length, _theta, _clock, _rate, _decay):
            for key, before, after, reason in check(past, now):
                found.append(Difference(key, before, after, UNFAIR, reason, now.name))
        if _ends(now) is None or _ends(past[-1]) is None:
            notes.append(f"{now.name}: where the learning rate of {past[-1].get('scheduler.name')} ends and that of "
                         f"{now.get('scheduler.name')} begins is not known here, so it was not compared")
    return Report(("before", "now"), tuple(found), tuple(notes), "chain")


_Found = Iterator[tuple[str, Any, Any, str]]


def _changed(keys: Sequence[str], before: Meaning, now: Meaning, reason: str) -> _Found:
    for key in keys:
        if (old := before.get(key, ABSENT)) != (new := now.get(key, ABSENT)):
            yield key, old, new, reason


def _start(run: Meaning) -> str:
    """How a run begins: `scratch`, `weights` of another run, a new `phase`, or with all that the checkpoint holds: under a
    clock set back (`reset`), or not (`loaded`)."""
    if run.tells("callbacks.ettin_cross"):
        return "weights"
    if run.tells("callbacks.ettin_phase"):
        return "weights" if run.get("callbacks.ettin_phase.keep") == "weights" else "phase"
    if run.get("load_path") is None:
        return "scratch"
    if run.get("load_weights_only"):
        return "weights"
    if any(str(key).startswith("state/timestamp") for key in run.get("load_ignore_keys") or ()):
        return "phase"
    return "reset" if run.get("reset_time") else "loaded"


# ------------------------------------------------------------------ the model


def _shape(past: Sequence[Meaning], now: Meaning) -> _Found:
    keys = _SHAPE + (("model.window_left",) if past[-1].config.causal == now.config.causal else ())
    return _changed(keys, past[-1], now, "the weights belong to another model")


def _kind(past: Sequence[Meaning], now: Meaning) -> _Found:
    crosses = now.tells("callbacks.ettin_cross") or now.get("load_weights_only")
    if past[-1].config.causal != now.config.causal and not crosses:
        yield ("model.objective", past[-1].values["model.objective"], now.values["model.objective"],
               "encoder and decoder go on as each other with the weights alone, as callbacks.ettin_cross takes them")


def _tokenizer(past: Sequence[Meaning], now: Meaning) -> _Found:
    """By name where it has one of its own; beside the data, by what the manifests on this machine state."""
    names = [run.get("tokenizer.name", ABSENT) for run in (past[-1], now)]
    own = [str(run.cfg.get("tokenizer", {}).get("name")) for run in (past[-1], now)]
    if names[0] == names[1] and own[0] != own[1]:
        names = [data_of(run, "train_loader").tokenizer for run in (past[-1], now)]
    if None not in names and names[0] != names[1]:
        yield "tokenizer.name", own[0], own[1], "the embedding's rows would stand for other tokens"


def _length(past: Sequence[Meaning], now: Meaning) -> _Found:
    before, after = past[-1].values["max_seq_len"], now.values["max_seq_len"]
    if after < before:
        yield "max_seq_len", before, after, "rows shrink: what was learnt about long documents is not trained on"


def _theta(past: Sequence[Meaning], now: Meaning) -> _Found:
    """A theta may go up, once for the whole model: positions that were learnt under one are read under another."""
    before = past[-1]
    moved = {key: (before.values[key], now.values[key]) for key in ("model.global_rope_theta", "model.local_rope_theta")
             if before.values[key] != now.values[key]}
    for key, (old, new) in moved.items():
        history = list(dict.fromkeys(run.values[key] for run in past))
        if new in history:
            yield key, old, new, "rotary theta goes back to what it was in an earlier phase"
        elif new < old:
            yield key, old, new, "rotary theta goes down"
        elif len(history) > 1:
            yield key, old, new, "rotary theta goes up for a second time"
        elif key == "model.local_rope_theta" and len(moved) == 1:
            yield key, old, new, "local layers get another rotary theta in a phase that leaves global layers theirs"


# ------------------------------------------------------------------ clock and optimizer


def _clock(past: Sequence[Meaning], now: Meaning) -> _Found:
    start, spent, budget = _start(now), past[-1].values["max_duration"], now.values["max_duration"]
    if start == "scratch":
        yield "load_path", spent, ABSENT, "nothing is loaded: the phase would train a new model"
    if start == "loaded":
        yield ("load_path", spent, budget, "the checkpoint's clock is not set back: the phase is past its end, or begins in "
               "the middle of its schedule")


def _ends(run: Meaning) -> tuple[float, float] | None:
    """Learning rate at the first and after the last token; None for a scheduler of the host."""
    rates = learning_rates(dict(run.cfg), np.array([0.0, 1.0]))
    return None if rates is None else (float(rates[0]), float(rates[1]))


def _rate(past: Sequence[Meaning], now: Meaning) -> _Found:
    start, ends, last = _start(now), _ends(now), _ends(past[-1])
    if start == "scratch" or ends is None or last is None:
        return
    given, end = now.values["optimizer.lr"], last[1]
    if start in ("reset", "loaded"):
        # the host restores scheduler and optimizer, and with them the peak of the phase before
        acts, why = past[-1].values["optimizer.lr"], "the checkpoint's peak lr stays, and the config's does not act"
        if now.get("restart_override"):  # a ratio of this config's lr to the checkpoint's last, but for the schedules named
            why = "restart_override multiplies the checkpoint's peak lr by lr / its last lr"
            acts = given if now.get("scheduler.name") in _SET_DIRECTLY else acts * given / end if end else math.inf
        if not math.isclose(acts, given, rel_tol=1e-6):
            yield "optimizer.lr", given, float(f"{acts:.12g}"), f"{why}: {acts / given:g} times what is meant"
            return
    begin, warms_up = ends[0], ends[0] < 1e-6 * given
    if begin > end * (1 + 1e-6):
        yield "optimizer.lr", end, begin, "the learning rate jumps up from where the phase before ended"
    elif start != "weights" and not warms_up and begin < end * (1 - 1e-6):
        yield "optimizer.lr", end, begin, "the learning rate falls from where the phase before ended"


def _decay(past: Sequence[Meaning], now: Meaning) -> _Found:
    """Weight decay is weight_decay * lr / max_lr a step; where the optimizer is kept, one lr keeps one decay."""
    before, start = past[-1], _start(now)
    if start in ("scratch", "weights"):
        return
    yield from _changed(("optimizer.name", "optimizer.weight_decay"), before, now,
                        "the optimizer is kept, and would do something else")
    old, new = (run.get("optimizer.max_lr", run.values["optimizer.lr"]) for run in (before, now))
    if start == "phase" and old != new:  # else the checkpoint's stays
        yield "optimizer.max_lr", old, new, "weight decay is relative to max_lr: at one learning rate it would be another"
