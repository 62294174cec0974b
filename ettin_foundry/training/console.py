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
from composer.core import Event, State, Timestamp, TimeUnit
from composer.loggers import Logger, LoggerDestination, ProgressBarLogger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column

from ettin_foundry.data.inspect import format_count

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


def _folder(state: State) -> str | None:
    saver = next((each for each in state.callbacks if isinstance(each, CheckpointSaver)), None)
    return saver and format_name_with_dist(saver.folder, state.run_name)


class RunConsole(LoggerDestination):
    """Tells on standard error, on rank 0, what runs where, how far and how fast it is, and what it has made.

    A line is a record of Python's logging: `time kind key=value ...`, where kind is start, train, eval, saved (by
    `CheckpointSaver`) or finished. On a terminal a bar stands below them in place of the train lines. This package's
    records are shown from INFO on, those of others as the host's `python_log_level` says.

    interval: between two train lines where there is no terminal: seconds, or a time in sec, ba, tok or sp.
    """

    def __init__(self, interval: int | str = "300sec") -> None:
        every = f"{interval}sec" if isinstance(interval, int) else interval
        self._due = create_interval_scheduler(every, include_end_of_training=False)
        self._speaks = dist.get_global_rank() == 0
        self._terminal = Console(stderr=True) if self._speaks and sys.stderr.isatty() else None
        self._bar: Progress | None = None
        self._drawn, self._finished = 0.0, False
        self._metrics, self._step = dict[str, float](), dict[str, Any]()
        self._recent = deque[Timestamp](maxlen=_STEPS + 1)  # from after the first step of this process, which compiles
        # every rank's would print the whole config as well; the package's attribute `train` is a function
        host: Any = importlib.import_module("llmfoundry.command_utils.train")
        host.log_config = Logger.log_hyperparameters
        if self._speaks:
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
        # a recipe says how many batches are evaluated at most, and small data has fewer; there is no state to restore
        warnings.filterwarnings("ignore", "DataloaderNumBatchesWarning|RunConsole is not in the state_dict")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._metrics.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        if not self._speaks:
            return
        model: Any = getattr(state.model, "module", state.model)  # DDP wraps it
        device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
        _say("start", {
            "run": state.run_name, "model": getattr(getattr(model, "config", None), "size", None),
            "objective": getattr(model, "objective", None), "parameters": sum(p.numel() for p in model.parameters()),
            "devices": f"{dist.get_world_size()}x{device}", "host": socket.gethostname(), "folder": _folder(state),
            "until": state.max_duration and state.max_duration.to_timestring(), "from": state.load_path,
            "tokens": state.timestamp.token.value})
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
        self._step = {"objective": batch.get("objective"), "lr": f"{state.optimizers[0].param_groups[0]['lr']:.3e}"}

    def batch_end(self, state: State, logger: Logger) -> None:
        now, end = state.timestamp, state.max_duration
        if not self._speaks or end is None:
            return
        self._recent.append(now)
        done, then = now.get(end.unit).value, self._recent[0]
        values = {"tokens": now.token.value, "step": now.batch.value, **self._step,
                  "loss": f"{state.total_loss_dict['loss/train/total']:.4f}"}
        if seconds := (now.total_wct - then.total_wct).total_seconds():
            left = max(0, end.value - done) * seconds / (done - then.get(end.unit).value)
            values |= {"tokens/s": round((now.token.value - then.token.value) / seconds),
                       "mfu": self._metrics.get("throughput/device/mfu"), "left": timedelta(seconds=round(left))}
        share = min(1.0, done / end.value)
        if self._bar:
            of = f"/{format_count(end.value)}" if end.unit == TimeUnit.TOKEN else ""
            values["tokens"] = format_count(now.token.value) + of
            self._show(share, "  ".join(f"{key} {value}" for key, value in values.items() if value is not None))
        elif then is now or self._due(state, Event.BATCH_CHECKPOINT):
            _say("train", {"done": f"{share:.1%}", **values})

    def _show(self, share: float, text: str) -> None:
        if self._bar and time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._bar.update(self._bar.task_ids[0], completed=share, description=text, refresh=True)
            self._drawn = time.monotonic()

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        done, number = state.eval_timestamp.batch.value, int(state.dataloader_len or 1)
        self._show(done / number, f"evaluating {state.dataloader_label}: {done} of {number} batches")

    def eval_end(self, state: State, logger: Logger) -> None:
        found = {key: float(state.eval_metric_values[key]) for key in state.eval_metrics[str(state.dataloader_label)]}
        ours = {name: f"{found[key]:.4f}" for key, name in _METRICS.items() if key in found}
        if self._speaks:
            _say("eval", {"label": state.dataloader_label, "tokens": state.timestamp.token.value, **(ours or found),
                          "seconds": f"{state.eval_timestamp.total_wct.total_seconds():.1f}"})

    def fit_end(self, state: State, logger: Logger) -> None:
        self._finished = True  # an evaluation may follow

    def close(self, state: State, logger: Logger) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
        now, seconds = state.timestamp, state.timestamp.total_wct.total_seconds()
        if self._speaks and self._finished and self._recent:
            self._finished = False
            _say("finished", {"run": state.run_name, "tokens": now.token.value, "step": now.batch.value,
                              "loss": f"{state.total_loss_dict['loss/train/total']:.4f}",
                              "tokens/s": round(now.token.value / seconds),
                              "training": timedelta(seconds=round(seconds)), "folder": _folder(state)})
