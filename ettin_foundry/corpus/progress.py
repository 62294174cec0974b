"""What a conversion shows while it runs: counts, speeds, time left, and workers that say nothing."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ettin_foundry.data.quantities import format_duration

__all__ = ["Board", "Tick", "plain"]

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_DRAW_SECONDS = 0.25
_WIDEST_NAME = 60


class Tick(NamedTuple):
    """What was done since the last tick. `where` is the file being read."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of text."""
    file_bytes: int = 0
    """Bytes on disk, compressed where the file is."""
    where: str = ""

    def plus(self, other: Tick, sign: int = 1) -> Tick:
        """The sum of the counts, or the difference with sign -1; `where` is this one's."""
        return Tick(*(mine + sign * theirs for mine, theirs in zip(self[:4], other[:4])), self.where)


@dataclass
class _Job:
    """A task in work; times in seconds of `time.monotonic`."""

    worker: str
    where: str
    heard: float
    warn_after: float
    done: Tick = Tick()


class Board:
    """Counts over all workers. Entered as a context manager it shows them; otherwise it only counts.

    On a terminal it shows a bar; elsewhere, such as in a log file, it logs a line every ten seconds. A task is known
    by the key that it began with. Methods may be called from any thread.

    Args:
        title: what is being done. total_file_bytes: bytes on disk of all files, 0 where unknown.
        show: whether to show the bar; None shows it on a terminal. stall_seconds: silence after which a worker is named.
    """

    def __init__(self, title: str, total_file_bytes: int, *, show: bool | None = None,
                 stall_seconds: float = 60.0) -> None:
        self.title, self.total_file_bytes, self.stall_seconds = title, total_file_bytes, stall_seconds
        self.total = Tick()
        """Of finished tasks and of those in work."""
        self._show = sys.stderr.isatty() if show is None else show
        self._jobs: dict[Hashable, _Job] = {}
        self._lock = threading.RLock()
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)

    def began(self, key: Hashable, where: str, worker: str) -> None:
        """A worker begins a task."""
        with self._lock:
            self._jobs[key] = _Job(worker, where, time.monotonic(), self.stall_seconds)

    def tick(self, key: Hashable, tick: Tick) -> None:
        """A task got further; ticks of tasks that are not in work are ignored."""
        with self._lock:
            if job := self._jobs.get(key):
                self.total, job.done = self.total.plus(tick), job.done.plus(tick)
                job.where = tick.where or job.where
                job.heard, job.warn_after = time.monotonic(), self.stall_seconds

    def done(self, key: Hashable) -> None:
        """A task is finished."""
        with self._lock:
            self._jobs.pop(key, None)

    def lost(self, key: Hashable) -> tuple[str, str]:
        """A task has ended unfinished: takes back what it had counted. Returns its worker and the file it was in."""
        with self._lock:
            job = self._jobs.pop(key, None)
            if job is None:
                return "that never began", "an unknown file"
            self.total = self.total.plus(job.done, -1)
            return job.worker, plain(job.where)

    def check(self) -> None:
        """Names each worker that has said nothing for `stall_seconds`, again after twice as long, and so on."""
        with self._lock:
            for job in self._jobs.values():
                silent = time.monotonic() - job.heard
                if silent >= job.warn_after:
                    job.warn_after *= 2
                    log.warning("%s: worker %s has said nothing for %.0f s; it is in %s. If it hangs, end it (kill -9): "
                                "its task is then given to a new worker", self.title, job.worker, silent, plain(job.where))

    def __str__(self) -> str:
        total, seconds = self.total, max(time.monotonic() - self._begin, 1e-9)
        tokens = f"{total.tokens:,} tokens ({total.tokens / seconds:,.0f}/s), " if total.tokens else ""
        return (f"{total.documents:,} documents ({total.documents / seconds:,.0f}/s), {tokens}"
                f"{total.text_bytes / 1e6:,.1f} MB ({total.text_bytes / 1e6 / seconds:,.1f} MB/s)")

    def __enter__(self) -> Board:
        from rich.console import Console  # here: workers import this module and show nothing
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        terminal = sys.stderr
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
                             TimeRemainingColumn(), TextColumn("{task.fields[counts]}", markup=False),
                             console=Console(stderr=True), disable=not self._show, auto_refresh=False)
        self._task = self._bar.add_task(self.title, total=self.total_file_bytes or None, counts="")
        self._bar.start()  # replaces sys.stderr by a stream that writes above the bar; log records must go there too
        self._moved: list[Any] = [handler for handler in logging.getLogger().handlers
                                  if isinstance(handler, logging.StreamHandler) and handler.stream is terminal]
        for handler in self._moved:
            handler.setStream(sys.stderr)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._draw()
        self._bar.stop()
        for handler in self._moved:
            handler.setStream(sys.stderr)
        if kind is None:
            log.info("%s: %s", self.title, self)

    def _loop(self) -> None:
        logged = time.monotonic()
        while not self._stop.wait(_DRAW_SECONDS):
            self.check()
            self._draw()
            if not self._show and time.monotonic() - logged >= _LOG_SECONDS:
                logged, task = time.monotonic(), self._bar.tasks[0]
                share = f"{task.percentage:.0f}% of the files, " if task.total else ""
                left = "" if task.time_remaining is None else f", {format_duration(task.time_remaining)} left"
                log.info("%s: %s%s%s", self.title, share, self, left)

    def _draw(self) -> None:
        with self._lock:
            self._bar.update(self._task, completed=self.total.file_bytes, counts=str(self))
        self._bar.refresh()


def plain(name: str) -> str:
    """A file's name fit for a terminal and a log: no control characters, at most 60 characters, its end kept."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return name if len(name) <= _WIDEST_NAME else "..." + name[3 - _WIDEST_NAME:]
