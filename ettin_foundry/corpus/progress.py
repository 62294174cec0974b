"""What a conversion shows while it runs: counts, speeds and the time left."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Hashable
from typing import Any, NamedTuple

from ettin_foundry.data.quantities import format_duration

__all__ = ["Board", "Tick"]

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_DRAW_SECONDS = 0.25


class Tick(NamedTuple):
    """What was done since the last tick."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of text."""
    file_bytes: int = 0
    """Bytes on disk, compressed where the file is."""

    def plus(self, other: Tick) -> Tick:
        return Tick(*map(sum, zip(self, other)))


class Board:
    """Counts over all workers. Entered as a context manager it shows them; otherwise it only counts.

    On a terminal it shows a bar (or as `show` says); elsewhere it logs a line every ten seconds. A task is known by
    a key of the caller's. `total_file_bytes` is 0 where unknown. Methods may be called from any thread.
    """

    def __init__(self, title: str, total_file_bytes: int, *, show: bool | None = None) -> None:
        self.title, self.total_file_bytes = title, total_file_bytes
        self._show = sys.stderr.isatty() if show is None else show
        self._finished = Tick()
        self._in_work: dict[Hashable, Tick] = {}
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)

    def tick(self, key: Hashable, tick: Tick) -> None:
        """A task got further."""
        with self._lock:
            self._in_work[key] = self._in_work.get(key, Tick()).plus(tick)

    def end(self, key: Hashable, *, done: bool = True) -> None:
        """A task has ended; where it is not done, what it had counted is taken back."""
        with self._lock:
            counted = self._in_work.pop(key, Tick())
            self._finished = self._finished.plus(counted) if done else self._finished

    @property
    def total(self) -> Tick:
        """Of finished tasks and of those in work."""
        with self._lock:
            return Tick(*map(sum, zip(self._finished, *self._in_work.values())))

    def __str__(self) -> str:
        documents, tokens, text_bytes, _ = self.total
        seconds = max(time.monotonic() - self._begin, 1e-9)
        shown = f"{tokens:,} tokens ({tokens / seconds:,.0f}/s), " if tokens else ""
        return (f"{documents:,} documents ({documents / seconds:,.0f}/s), {shown}{text_bytes / 1e6:,.1f} MB "
                f"({text_bytes / 1e6 / seconds:,.1f} MB/s)")

    def __enter__(self) -> Board:
        from rich.console import Console  # here: workers import this module and show nothing
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        terminal = sys.stderr
        title = TextColumn("{task.description}", markup=False)
        counts = TextColumn("{task.fields[counts]}", markup=False)
        self._bar = Progress(title, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), counts,
                             console=Console(stderr=True), disable=not self._show, auto_refresh=False)
        self._task = self._bar.add_task(self.title, total=self.total_file_bytes or None, counts="")
        self._bar.start()  # replaces sys.stderr by a stream that writes above the bar; logs must go there too
        self._moved: list[Any] = [handler for handler in logging.getLogger().handlers
                                  if getattr(handler, "stream", None) is terminal]
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
            self._draw()
            if not self._show and time.monotonic() - logged >= _LOG_SECONDS:
                logged, task = time.monotonic(), self._bar.tasks[0]
                share = f"{task.percentage:.0f}% of the files, " if task.total else ""
                left = "" if task.time_remaining is None else f", {format_duration(task.time_remaining)} left"
                log.info("%s: %s%s%s", self.title, share, self, left)

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self.total.file_bytes, counts=str(self))
        self._bar.refresh()
