"""What a conversion shows while it runs: counts, speeds, time left, workers alive, the slowest file, stalled workers.

`Board` gathers the ticks of all workers. On a terminal it is a live picture of two lines; elsewhere (a log file, a
cluster's console) a log line every ten seconds, since silence looks like a hang. A worker that says nothing for a minute
is named in a warning, with its process and file. `Progress` is the same for one pass in one process. Nothing here starts
or ends a worker: that is pool.py and ray_pool.py.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol

__all__ = ["Board", "Progress", "Tick"]

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0
_DRAW_SECONDS = 0.25
_WINDOW_SECONDS = 60.0  # speeds and the time left are those of the last minute: files differ
_WIDEST_NAME = 60


class Tick(NamedTuple):
    """What was done since the last tick. `where` is the file being read, and does not add up."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of text."""
    file_bytes: int = 0
    """Bytes on disk, compressed where the file is."""
    where: str = ""

    def plus(self, other: Tick, sign: int = 1) -> Tick:
        """The sum of the counts, or the difference with sign -1; `where` is this one's."""
        return Tick(self.documents + sign * other.documents, self.tokens + sign * other.tokens,
                    self.text_bytes + sign * other.text_bytes, self.file_bytes + sign * other.file_bytes, self.where)


@dataclass
class _Job:
    """What one worker is doing now; times in seconds of `time.monotonic`."""

    where: str
    entered: float
    heard: float
    warn_after: float
    done: Tick = Tick()


class Board:
    """Counts of all workers. A context manager: entered, it shows them; not entered, it is silent and only counts.

    A worker is its process id, or text such as `PID on HOST`. Methods may be called from any thread.

    Args:
        title: what is being done. total_file_bytes: bytes on disk of all files, 0 where unknown. workers: wanted number.
        show: a live picture; None: on a terminal only, else log lines. already: file bytes that an earlier run finished;
            they count in the share, not in the speed. stall_seconds: silence after which a worker is named.
    """

    def __init__(self, title: str, total_file_bytes: int, workers: int, *, show: bool | None = None, already: int = 0,
                 stall_seconds: float = 60.0) -> None:
        self.title = title
        self.total_file_bytes = total_file_bytes
        self.workers = workers
        self.already = already
        self.stall_seconds = stall_seconds
        self.total = Tick()
        """Of finished tasks and of those in work."""
        self.alive: set[int | str] = set()
        self.slowest: tuple[float, str] = (0.0, "")
        """Seconds and name of the file that took longest, among those left behind."""
        self.on_stall: Callable[[int | str], None] | None = None
        """Called with a stalled worker when it is named, so that the pool can ask it where it is."""
        self._show = sys.stderr.isatty() if show is None else show
        self._jobs: dict[int | str, _Job] = {}
        self._lock = threading.RLock()
        self._begin = time.monotonic()
        self._history: deque[tuple[float, Tick]] = deque([(self._begin, self.total)])
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Any = None
        self._moved: list[logging.StreamHandler[Any]] = []

    # what the pool says

    def joined(self, worker: int | str) -> None:
        """A worker lives."""
        with self._lock:
            self.alive.add(worker)

    def began(self, worker: int | str, label: str) -> None:
        """A worker has been given a task."""
        with self._lock:
            now = time.monotonic()
            self._jobs[worker] = _Job(label, now, now, self.stall_seconds)

    def tick(self, worker: int | str, tick: Tick) -> None:
        """A worker got further in its task."""
        with self._lock:
            self.total = self.total.plus(tick)
            job = self._jobs.get(worker)
            if job is None:
                return
            now = time.monotonic()
            if tick.where and tick.where != job.where:
                self._leave(job, now)
                job.where, job.entered = tick.where, now
            job.done = job.done.plus(tick)
            job.heard, job.warn_after = now, self.stall_seconds

    def done(self, worker: int | str) -> None:
        """A worker finished its task."""
        with self._lock:
            if job := self._jobs.pop(worker, None):
                self._leave(job, time.monotonic())

    def lost(self, worker: int | str) -> str:
        """A worker is gone. What its unfinished task had counted is taken back.

        Returns:
            the file it was in, or "".
        """
        with self._lock:
            self.alive.discard(worker)
            job = self._jobs.pop(worker, None)
            if job:
                self.total = self.total.plus(job.done, -1)
            return job.where if job else ""

    def check(self) -> None:
        """Names each worker that has said nothing for `stall_seconds`, again after twice as long, and so on."""
        stalled: list[tuple[int | str, str, float]] = []
        with self._lock:
            now = time.monotonic()
            for worker, job in self._jobs.items():
                if now - job.heard >= job.warn_after:
                    job.warn_after *= 2
                    stalled.append((worker, job.where, now - job.heard))
        for worker, where, seconds in stalled:
            log.warning("%s: worker %s has said nothing for %.0f s; it is in %s. If it hangs, end it (kill -9): its task "
                        "is then given to a new worker", self.title, worker, seconds, plain(where))
            if self.on_stall:
                self.on_stall(worker)

    def _leave(self, job: _Job, now: float) -> None:
        self.slowest = max(self.slowest, (now - job.entered, job.where))

    # what is shown

    def __str__(self) -> str:
        return self._counts(self._begin, Tick())

    def _counts(self, begin: float, before: Tick) -> str:
        total, seconds = self.total, max(time.monotonic() - begin, 1e-9)
        speed = [max(0, n) / seconds for n in total.plus(before, -1)[:4]]
        tokens = f"{total.tokens:,} tokens ({speed[1]:,.0f}/s), " if total.tokens else ""
        return (f"{total.documents:,} documents ({speed[0]:,.0f}/s), {tokens}{total.text_bytes / 1e6:,.1f} MB "
                f"({speed[2] / 1e6:,.1f} MB/s)")

    def line(self) -> str:
        """Counts, speeds of the last minute, time left, workers, and the file that a worker has been in longest."""
        with self._lock:
            now, (begin, before) = time.monotonic(), self._history[0]
            parts = [self._counts(begin, before)]
            speed = (self.total.file_bytes - before.file_bytes) / max(now - begin, 1e-9)
            left = self.total_file_bytes - self.already - self.total.file_bytes
            if self.total_file_bytes and left > 0:
                parts.append(f"{_clock(left / speed)} left" if speed > 0 else "time left unknown")
            if self.workers > 1:
                parts.append(f"{len(self.alive)} of {self.workers} workers")
            if self._jobs:
                job = min(self._jobs.values(), key=lambda job: job.entered)
                parts.append(f"slowest {plain(job.where)} {now - job.entered:.0f} s")
            return ", ".join(parts)

    def __enter__(self) -> Board:
        if self._show:
            terminal = sys.stderr
            self._live = _picture(self)
            self._live.start()  # puts something in place of sys.stderr that writes above the picture; logs must go there too
            self._moved = [handler for handler in logging.getLogger().handlers
                           if isinstance(handler, logging.StreamHandler) and handler.stream is terminal]
            for handler in self._moved:
                handler.setStream(sys.stderr)
        self._thread = threading.Thread(target=self._loop, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self._live:
            self._live.stop()
            for handler in self._moved:
                handler.setStream(sys.stderr)
        if kind is None:
            slow = f", slowest {plain(self.slowest[1])} {self.slowest[0]:.0f} s" if self.slowest[0] >= 1 else ""
            log.info("%s: %s%s", self.title, self, slow)

    def _loop(self) -> None:
        logged = time.monotonic()
        while not self._stop.wait(_DRAW_SECONDS):
            now = time.monotonic()
            with self._lock:
                if now - self._history[-1][0] >= 1:
                    self._history.append((now, self.total))
                while now - self._history[0][0] > _WINDOW_SECONDS and len(self._history) > 1:
                    self._history.popleft()
            if self._live:
                self._live.refresh()
            elif now - logged >= _LOG_SECONDS:
                logged = now
                log.info("%s: %s%s", self.title, f"{self.share:.0%} of the files, " if self.total_file_bytes else "",
                         self.line())

    @property
    def share(self) -> float:
        """Of the files' bytes, 0 to 1; 0 where the total is not known."""
        done = self.already + self.total.file_bytes
        return min(1.0, max(0.0, done / self.total_file_bytes)) if self.total_file_bytes else 0.0


def plain(name: str) -> str:
    """A file's name fit for a terminal and a log: no control characters, at most 60 characters, its end kept."""
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return name if len(name) <= _WIDEST_NAME else "..." + name[3 - _WIDEST_NAME:]


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(min(seconds, 3.6e9)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def _picture(board: Board) -> Any:
    """The live picture: a bar, and the line of counts below it. Refreshed by the board's own thread."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    title = TextColumn("{task.description}", markup=False)
    bar = RichProgress(title, BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    task = bar.add_task(board.title, total=board.total_file_bytes or None)

    def picture() -> Group:
        bar.update(task, completed=board.share * board.total_file_bytes)
        return Group(bar, Text(board.line()))

    return Live(get_renderable=picture, console=Console(stderr=True), auto_refresh=False)


class _Position(Protocol):
    def position(self) -> int: ...


class Progress(Board):
    """Of one pass in one process, as the tokenizer's training; `update` adds to the counts.

    Args:
        title: what is being done. meter: says how far the reading is, in bytes on disk. total_bytes: of all files; 0
            where unknown. show: as of Board.
    """

    def __init__(self, title: str, meter: _Position, total_bytes: int, *, show: bool | None = None) -> None:
        super().__init__(title, total_bytes, 1, show=show)
        self.meter = meter

    def __enter__(self) -> Progress:
        super().__enter__()
        return self

    def update(self, *, documents: int, num_bytes: int, tokens: int = 0) -> None:
        """Adds to the counts."""
        self.tick(0, Tick(documents, tokens, num_bytes, self.meter.position() - self.total.file_bytes))
