"""Tasks done by worker processes that may die, and how far they are: a death costs one try of its task, no result.

An exception in a task ends the run and is raised here. A task must write its result so that doing it again is harmless.
Workers are processes of this machine with a pipe each, so that a death is seen at once and it is known whose.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar, cast

log = logging.getLogger(__name__)

_GRACE_SECONDS = 3.0
_LOG_SECONDS = 10.0


class Tick(NamedTuple):
    """What a task has done so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # UTF-8
    file_bytes: int = 0  # on disk, compressed where the file is


class Board:
    """Counts over all tasks, of `num_bytes` to read (0 where unknown); a line of the log every ten seconds."""

    def __init__(self, title: str, num_bytes: int) -> None:
        self.title, self.num_bytes = title, num_bytes
        self._begin = self._shown = time.monotonic()
        self._ticks = dict[int, Tick]()

    def tick(self, task: int, tick: Tick) -> None:
        """A task got further."""
        self._ticks[task] = tick
        now = time.monotonic()
        if now - self._shown >= _LOG_SECONDS:
            self._shown, share = now, self.total.file_bytes / self.num_bytes if self.num_bytes else 0.0
            left = f", {timedelta(seconds=round((now - self._begin) * (1 / share - 1)))} left" if 0 < share < 1 else ""
            log.info("%s: %s%s%s", self.title, f"{share:.0%} of the files, " if share else "", str(self), left)

    @property
    def total(self) -> Tick:
        return Tick(*map(sum, zip(Tick(), *self._ticks.values())))

    def __str__(self) -> str:
        documents, tokens, text_bytes, _ = self.total
        seconds = max(time.monotonic() - self._begin, 1e-9)
        shown = f"{tokens:,} tokens ({tokens / seconds:,.0f}/s), " if tokens else ""
        return (f"{documents:,} documents ({documents / seconds:,.0f}/s), {shown}{text_bytes / 1e6:,.1f} MB "
                f"({text_bytes / 1e6 / seconds:,.1f} MB/s)")


Report = Callable[[Tick], None]
T = TypeVar("T", bound=Any)
R = TypeVar("R")


class _Outcome(NamedTuple):
    """How a task ended: with a result, an error and its traceback, or the death of its worker."""

    result: Any = None
    error: Exception | None = None
    trace: str = ""
    death: str = ""


def run_tasks(work: Callable[[T, Report], R], tasks: Sequence[T], *, workers: int, board: Board,
              tries: int = 3) -> list[R]:
    """Does every task in `workers` processes, a single one in this process; the results in the order of the tasks.

    `work(task, report)` returns the result, `report(Tick(...))` says how far it is; all must be picklable, and tasks
    have a `label` for messages. A task that kills `tries` workers raises ChildProcessError.
    """
    if workers == 1:
        return [work(task, functools.partial(board.tick, number)) for number, task in enumerate(tasks)]
    pending, running, results, deaths = deque(range(len(tasks))), 0, dict[int, R](), Counter[int]()
    pool = _Pool(work)
    try:
        while pending or running:
            while pending and running < workers:
                number, running = pending.popleft(), running + 1
                pool.submit(number, pickle.dumps(tasks[number]))
            for number, outcome in pool.ended(board.tick):
                running -= 1
                if outcome.error:
                    raise outcome.error from ChildProcessError(outcome.trace)
                if not outcome.death:
                    results[number] = outcome.result
                    continue
                deaths[number] += 1
                if deaths[number] == tries:
                    raise ChildProcessError(f"{tasks[number].label}: {tries} workers died in it, the last of "
                                            f"{outcome.death}; after SIGKILL use fewer workers: memory ran out")
                log.warning("a worker died (%s) in %s, which begins again", outcome.death, tasks[number].label)
                pending.append(number)  # last: memory that ran out is likely to be free by then
    finally:
        pool.stop()
    return [results[number] for number in range(len(tasks))]


class _Pool:
    """Worker processes of this machine that do one task at a time each."""

    def __init__(self, work: Any) -> None:
        self.work = pickle.dumps(work)
        self.workers = dict[Connection, Any]()  # processes, by the pipe to each
        self.busy = dict[Connection, int]()  # numbers of their tasks

    def submit(self, number: int, task: bytes) -> None:
        link = next((link for link in self.workers if link not in self.busy), None) or self._start()
        self.busy[link] = number
        with contextlib.suppress(OSError):  # it has just died, which `ended` finds out
            link.send_bytes(task)

    def _start(self) -> Connection:
        near, far = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(far, self.work))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C, which all of a terminal get, is not for it
        try:
            process.start()
            self.workers[near] = process
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            far.close()
        return near

    def ended(self, tick: Callable[[int, Tick], None]) -> Iterator[tuple[int, _Outcome]]:
        """Waits for news; passes on what running tasks report, and says which have ended."""
        for link in cast(list[Connection], multiprocessing.connection.wait([*self.busy])):
            try:
                news = link.recv()
            except (EOFError, OSError):
                link.close()
                process = self.workers.pop(link)
                process.join()
                status = process.exitcode or 0
                news = _Outcome(death=signal.Signals(-status).name if status < 0 else f"exit status {status}")
            if isinstance(news, Tick):
                tick(self.busy[link], news)
            else:
                yield self.busy.pop(link), news

    def stop(self) -> None:
        for process in self.workers.values():
            process.terminate()  # leaves through `finally` blocks, so that half-written files go
        end = time.monotonic() + _GRACE_SECONDS
        for link, process in self.workers.items():
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
            link.close()


# In the worker process:

def _serve(link: Connection, work: bytes) -> None:
    """The life of a worker of this machine."""
    threading.Thread(target=_end_with_parent, daemon=True).start()  # first: what the work imports takes seconds
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.suppress(EOFError, OSError):  # the main process is gone
        while True:
            link.send_bytes(_attempt(work, link.recv_bytes(), link.send))


def _end_with_parent() -> None:
    """Ends this process when the main one is gone, however that ended and whoever else holds its pipes."""
    parent: Any = multiprocessing.parent_process()
    while os.getppid() == parent.pid:
        parent.join(0.5)
    os._exit(1)


def _attempt(work: bytes, task: bytes, report: Report) -> bytes:
    """Does a task; its outcome."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what filters import; each worker has one core
    try:
        return pickle.dumps(_Outcome(pickle.loads(work)(pickle.loads(task), report)))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            outcome = pickle.dumps(_Outcome(error=error, trace=trace))
            pickle.loads(outcome)
            return outcome
        except Exception:  # it does not survive pickling
            return pickle.dumps(_Outcome(error=RuntimeError(f"{type(error).__name__}: {error}"), trace=trace))
