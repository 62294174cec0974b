"""An exponential moving average of the weights while a run goes on: Composer's EMA, made to hold in this stack.

The averaging, the exchange of weights around an evaluation and the layout in checkpoints are Composer's. Different here:

- half_life may be in tokens, so that the average keeps its meaning when batches grow; `smoothing` may be given alone
  (Composer's constructor fails on it).
- A checkpoint's state/model is always what was trained, with the optimizer's moments that belong to it. Composer's class
  exchanges the weights before a save, so that the next phase would start from averages with foreign moments, and an export
  callback would see the one or the other depending on whether a checkpoint was due at its step.
- Averages carry the names of the bare model. Composer's carry `module.` under DDP; resumed on another number of
  processes, its averages stand still without a word.
- A new phase averages anew: token counts of the phase before say nothing on its clock.
- FSDP2 is refused: each rank would average its shards, and only rank 0's reach the checkpoint.

`checkpoint.load_model_state(ema=True)` reads the averages; averages of finished checkpoints are made by merge.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from composer.algorithms import EMA as ComposerEMA
from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger

__all__ = ["EMA"]


class EMA(ComposerEMA):
    """Keeps averages of the weights: average = s * average + (1 - s) * weights after every `update_interval`.

    With a half life h, s = 2 ** -(tokens or batches since the last update / h). The average starts as the weights at
    `ema_start`. Evaluations are done with the averages, training never sees them. One copy of the weights in memory.

    Args:
        half_life: in `tok` or `ba`; by default 1000ba. smoothing: s itself, in (0, 1), instead.
        ema_start: when the average starts, in `tok`, `ba` or `dur`. update_interval: in `ba`.

    Raises:
        ValueError: another unit, a value out of range, both of half_life and smoothing, an `ema_start` after the run's end,
            or a sharded model; each message names the key.
    """

    def __init__(self, half_life: str | None = None, smoothing: float | None = None, ema_start: str = "0dur",
                 update_interval: str = "1ba"):
        if half_life is not None and smoothing is not None:
            raise ValueError(f"algorithms.ema.half_life: {half_life!r} given with smoothing={smoothing}; they say the same "
                             "in two ways. Remove one of them")
        if smoothing is None:
            half_life = half_life or "1000ba"
        elif isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 < smoothing < 1:
            raise ValueError(f"algorithms.ema.smoothing: {smoothing!r} given; a number above 0 and below 1 is needed, such "
                             "as 0.999")
        units = {"half_life": (TimeUnit.TOKEN, TimeUnit.BATCH), "update_interval": (TimeUnit.BATCH,),
                 "ema_start": (TimeUnit.TOKEN, TimeUnit.BATCH, TimeUnit.DURATION)}
        times = {"half_life": half_life, "update_interval": update_interval, "ema_start": ema_start}
        parsed = {key: _time(key, value, units[key]) for key, value in times.items() if value is not None}
        # Composer's own checks know neither tokens nor smoothing alone; this combination of arguments passes them
        super().__init__(half_life=None, smoothing=smoothing or 0.5, ema_start=ema_start, update_interval=update_interval)
        self.half_life: Time | None = parsed.get("half_life")  # type: ignore[assignment]
        self._given = {key: value for key, value in {**times, "smoothing": smoothing}.items() if value is not None}
        self._model: Any = None
        self.updated_at = 0
        """Tokens or batches, as half_life has them, at the last update; in the checkpoint."""
        self.serialized_attributes.append("updated_at")

    def __repr__(self) -> str:
        """Its settings; Composer writes it into each checkpoint."""
        return f"EMA({', '.join(f'{key}={value!r}' for key, value in self._given.items())})"

    def match(self, event: Event, state: State) -> bool:
        if event == Event.INIT:
            if state.fsdp_config is not None:
                raise ValueError("algorithms.ema: given with fsdp_config; each rank would average its own shards, and "
                                 "checkpoints would hold rank 0's only. Remove fsdp_config, or merge checkpoints: ettin "
                                 "merge SAVE_FOLDER OUT.pt --last 5")
            self._model = state.model  # the model before DDP wraps it
        elif event == Event.AFTER_LOAD and state.timestamp.batch == 0:
            self.ema_started = False  # what a checkpoint of the phase before brought along
        elif event == Event.FIT_START:
            self._check_start(state)
        started = self.ema_started
        matched = super().match(event, self._view(state))
        if self.ema_started and not started:
            self.updated_at = self._now(state)
        return matched

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.BATCH_END and self.half_life is not None:
            now = self._now(state)
            self.smoothing = 2.0 ** -((now - self.updated_at) / self.half_life.value)
            self.updated_at = now
        super().apply(event, self._view(state), logger)

    def _view(self, state: State) -> Any:
        """All of the state that Composer's class looks at: the bare model, and no checkpoint to exchange weights for."""
        return SimpleNamespace(model=self._model, timestamp=state.timestamp, callbacks=(),
                               get_elapsed_duration=state.get_elapsed_duration)

    def _now(self, state: State) -> int:
        return 0 if self.half_life is None else state.timestamp.get(self.half_life.unit).value

    def _check_start(self, state: State) -> None:
        end: Any = state.max_duration
        if end is not None and self.ema_start.unit == end.unit and self.ema_start >= end:
            raise ValueError(f"algorithms.ema.ema_start: {self._given['ema_start']!r} given, and max_duration is "
                             f"{end.to_timestring()}; nothing would be averaged. Start earlier")


def _time(key: str, value: Any, units: tuple[TimeUnit, ...]) -> Time:
    try:
        time = Time.from_timestring(value)
    except (TypeError, ValueError):
        time = None
    names = " or ".join(unit.value for unit in units)
    if time is None or time.unit not in units:
        raise ValueError(f"algorithms.ema.{key}: {value!r} given; a time in {names} is needed. Correct it")
    least = 0 if key == "ema_start" else 1
    if time.value < least or (time.unit == TimeUnit.DURATION and time.value >= 1):
        raise ValueError(f"algorithms.ema.{key}: {value!r} given; at least {least} is needed, and below 1dur. Correct it")
    return time
