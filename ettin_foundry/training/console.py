"""The logger `ettin_console`: what a person sees of a run, on a terminal or in the log of a scheduler."""

from __future__ import annotations

import importlib
import logging
import shlex
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination, ProgressBarLogger
from composer.utils import dist, format_name_with_dist
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from ettin_foundry.data.inspect import format_count
from ettin_foundry.training.callbacks import interval_passed
from ettin_foundry.training.run_config import require

log = logging.getLogger(__name__)

_STEPS = 100  # whose mean speed is told
_REDRAW_SECONDS = 0.1
_METRICS = {"TargetCrossEntropy": "loss", "TargetAccuracy": "accuracy"}  # the model's third is exp(loss)


class _Format(logging.Formatter):
    """Marks a record that is no part of this package's account of the run."""

    def format(self, record: logging.LogRecord) -> str:
        ours = record.name.startswith("ettin_foundry") and record.levelno == logging.INFO
        record.mark = "" if ours else f"{record.levelname.lower()} {record.name}: "
        return super().format(record)


def _say(kind: str, values: Mapping[str, Any]) -> None:
    told = (f"{key}={shlex.quote(str(value))}" for key, value in values.items() if value is not None)
    log.info("%-5s %s", kind, " ".join(told))


class RunConsole(LoggerDestination):
    """Tells on standard error, on rank 0, what runs where, how far and how fast it is, and what it has made.

    A line is a record of Python's logging: `time kind key=value ...`, where kind is start, train, eval, saved (by
    `CheckpointSaver`) or finished. On a terminal a bar stands below them in place of the train lines. This package's
    records are shown from INFO on, those of others as the host's `python_log_level` says.

    interval: between two train lines where there is no terminal: seconds, or a time in sec, ba, tok or sp.
    """

    def __init__(self, interval: int | str = "300sec") -> None:
        key, every = "loggers.ettin_console.interval", Time.from_input(interval, TimeUnit.SECOND)
        require(every.value >= 1, key, "at least 1", interval, "give a time such as 60sec or 100ba")
        self._every = every.value if every.unit == TimeUnit.SECOND else None
        self._passed: Any = None if self._every else interval_passed(key, str(interval))
        self._terminal = Console(stderr=True) if sys.stderr.isatty() else None
        self._model: Any = None
        self._bar: Progress | None = None
        self._metrics = dict[str, float]()
        self._objective, self._lr = None, 0.0
        self._recent = deque[tuple[float, int, int]](maxlen=_STEPS)  # seconds, tokens, units of max_duration
        self._steps, self._tokens, self._seconds = 0, 0, 0.0  # of this process
        self._begun = self._told = self._drawn = self._eval_begun = 0.0
        # every rank's would print the whole config as well; the package's attribute `train` is a function
        host: Any = importlib.import_module("llmfoundry.command_utils.train")
        host.log_config = Logger.log_hyperparameters
        if dist.get_global_rank() == 0:
            self._take_records()

    def _take_records(self) -> None:
        """All records for standard error go through one handler, above the bar where there is one."""
        if self._terminal:
            handler: logging.Handler = RichHandler(console=self._terminal, show_level=False, show_path=False,
                                                   log_time_format="%H:%M:%S", keywords=["saved", "finished"])
            handler.setFormatter(_Format("%(mark)s%(message)s"))
        else:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_Format("%(asctime)s %(mark)s%(message)s", "%Y-%m-%d %H:%M:%S"))
        root = logging.getLogger()
        root.handlers = [handler, *(each for each in root.handlers if getattr(each, "stream", None) is not sys.stderr)]
        logging.getLogger("ettin_foundry").setLevel(logging.INFO)
        # a recipe says how many batches are evaluated at most, and small data has fewer
        warnings.filterwarnings("ignore", "DataloaderNumBatchesWarning")

    def init(self, state: State, logger: Logger) -> None:
        self._model = state.model  # before DDP wraps it

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._metrics.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        config, now, end = getattr(self._model, "config", None), state.timestamp, state.max_duration
        device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
        _say("start", {
            "run": state.run_name, "model": getattr(config, "size", None) or type(self._model).__name__,
            "objective": getattr(self._model, "objective", None),
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "devices": f"{dist.get_world_size()}x{device}", "host": socket.gethostname(), "folder": _folder(state),
            "until": end and end.to_timestring(), "from": state.load_path, "tokens": now.token.value})
        self._begun = time.monotonic()
        if self._terminal and not any(isinstance(each, ProgressBarLogger) for each in state.callbacks):
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
            # drawn by this thread: a worker forked while another one draws would inherit its locks
            self._bar = Progress(BarColumn(None), TaskProgressColumn(), text, console=self._terminal, expand=True,
                                 auto_refresh=False, transient=True, redirect_stdout=sys.stdout.isatty())
            self._bar.start()
            self._bar.add_task("first step", total=1.0)
            self._bar.refresh()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        batch: Any = state.batch
        self._objective = batch.get("objective") if isinstance(batch, Mapping) else None
        self._lr = state.optimizers[0].param_groups[0]["lr"]

    def batch_end(self, state: State, logger: Logger) -> None:
        now, before, end = state.timestamp, state.previous_timestamp, state.max_duration
        if dist.get_global_rank() != 0 or before is None or end is None or now.batch_wct is None:
            return
        tokens, seconds = now.token.value - before.token.value, now.batch_wct.total_seconds()
        if self._steps:  # the first one of a process compiles
            self._recent.append((seconds, tokens, now.get(end.unit).value - before.get(end.unit).value))
        self._steps, self._tokens, self._seconds = self._steps + 1, self._tokens + tokens, self._seconds + seconds
        share, values = self._figures(state, end)
        if self._bar:
            of = f"/{format_count(end.value)}" if end.unit == TimeUnit.TOKEN else ""
            left = "".join(f"  {values[key]}{unit}" for key, unit in (("tokens/s", " tok/s"), ("mfu", " MFU"),
                                                                      ("left", " left")) if values.get(key) is not None)
            self._show(share, f"{format_count(now.token.value)}{of} tokens  {self._objective or ''} loss "
                              f"{values['loss']}  lr {values['lr']}{left}")
        elif self._steps == 1 or self._is_due(state):
            self._told = time.monotonic()
            _say("train", {"done": f"{share:.1%}", **values})

    def _is_due(self, state: State) -> bool:
        if self._every is None:
            return self._passed(state, Event.BATCH_CHECKPOINT)
        return time.monotonic() - self._told >= self._every

    def _figures(self, state: State, end: Time) -> tuple[float, dict[str, Any]]:
        """(share of the run that is done, {name: value} of the last step and the speed)."""
        now, loss = state.timestamp, state.total_loss_dict.get("loss/train/total")
        done = now.get(end.unit).value
        values = {"tokens": now.token.value, "step": now.batch.value, "objective": self._objective,
                  "loss": None if loss is None else f"{loss:.4f}", "lr": f"{self._lr:.3e}"}
        seconds, tokens, units = map(sum, zip(*self._recent)) if self._recent else (0, 0, 0)
        if seconds and units:
            values["tokens/s"] = round(tokens / seconds)
            mfu = self._metrics.get("throughput/device/mfu")
            values["mfu"] = None if mfu is None else f"{mfu:.3f}"
            values["left"] = timedelta(seconds=round(max(0, end.value - done) * seconds / units))
        return min(1.0, done / end.value), values

    def _show(self, share: float, text: str) -> None:
        if self._bar and time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._bar.update(self._bar.task_ids[0], completed=share, description=text, refresh=True)
            self._drawn = time.monotonic()

    def eval_start(self, state: State, logger: Logger) -> None:
        self._eval_begun = time.monotonic()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        done, number = state.eval_timestamp.batch.value, int(state.dataloader_len or 0)
        self._show(done / max(1, number), f"evaluating {state.dataloader_label}: {done} of {number} batches")

    def eval_end(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() != 0:
            return
        prefix = f"metrics/{state.dataloader_label}/"
        found = {key.removeprefix(prefix): value for key, value in self._metrics.items() if key.startswith(prefix)}
        ours = {name: f"{float(found[key]):.4f}" for key, name in _METRICS.items() if key in found}
        _say("eval", {"label": state.dataloader_label, "tokens": state.timestamp.token.value, **(ours or found),
                      "seconds": f"{time.monotonic() - self._eval_begun:.1f}"})

    def fit_end(self, state: State, logger: Logger) -> None:
        """The last line: loggers hear of the end after the callbacks, so the last checkpoint is on the disk."""
        self.close(state, logger)
        if dist.get_global_rank() != 0 or state.max_duration is None:
            return
        values = self._figures(state, state.max_duration)[1]
        _say("finished", {"run": state.run_name, **{key: values[key] for key in ("tokens", "step", "loss")},
                          "tokens/s": round(self._tokens / self._seconds) if self._seconds else None,
                          "time": timedelta(seconds=round(time.monotonic() - self._begun)), "folder": _folder(state)})

    def close(self, state: State, logger: Logger) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _folder(state: State) -> str | None:
    saver = next((each for each in state.callbacks if isinstance(each, CheckpointSaver)), None)
    return saver and format_name_with_dist(saver.folder, state.run_name)
