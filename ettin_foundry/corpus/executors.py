"""Tasks done by worker processes that may die, and how far they are: a death costs tries of what was under way.

An exception in a task ends the run and is raised here. A task must write its result so that doing it again is harmless.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
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


def run_tasks(work: Callable[[T, Report], R], tasks: Sequence[T], *, workers: int, board: Board,
              tries: int = 3) -> list[R]:
    """Does every task in `workers` processes, a single one in this process; the results in the order of the tasks.

    `work(task, report)` returns the result, `report(Tick(...))` says how far it is; all must be picklable, and tasks
    have a `label` for messages. After a death there are half as many workers, for memory that ran out; a
    ChildProcessError names the tasks that were under way at `tries` deaths.
    """
    if workers == 1:
        return [work(task, functools.partial(board.tick, number)) for number, task in enumerate(tasks)]
    results, deaths = dict[int, R](), Counter[str]()
    while len(results) < len(tasks):
        deaths.update(under_way := _run_pool(work, tasks, results, workers, board))
        if given_up := [label for label in under_way if deaths[label] >= tries]:
            raise ChildProcessError(f"{', '.join(given_up[:4])}: {tries} workers died while this was under way; see "
                                    "whether memory runs out (dmesg), and give fewer --workers")
        if under_way:
            workers = max(1, workers // 2)
            log.warning("a worker died (under way: %s); it goes on with %d workers", ", ".join(under_way), workers)
    return [results[number] for number in range(len(tasks))]


def _run_pool(work: Any, tasks: Sequence[Any], results: dict[int, Any], workers: int, board: Board) -> list[str]:
    """Does the tasks without results; the labels of those that were under way when a worker died."""
    context, width = multiprocessing.get_context("spawn"), 1 + len(Tick._fields)
    counts = context.RawArray("q", width * len(tasks))  # of each task whether it has begun, and its Tick; no lock
    pool, numbers, broken = ProcessPoolExecutor(workers, context, _begin, (pickle.dumps(work), counts)), {}, False
    begun: list[int] = []
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C, which all of a terminal get, is not for it
        with contextlib.suppress(BrokenProcessPool):
            for number in (number for number in range(len(tasks)) if number not in results):
                numbers[pool.submit(_do, number, tasks[number])] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        left = {*numbers}
        while left and not broken:
            done, left = wait(left, _LOOK_SECONDS, FIRST_EXCEPTION)
            for future in done:
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                else:
                    results[numbers[future]] = future.result()
            begun = [number for number in numbers.values() if counts[width * number]]
            for number in begun:
                board.tick(number, Tick(*counts[width * number + 1:width * (number + 1)]))
        under_way = [tasks[number].label for number in begun if number not in results]
        return under_way or ["nothing"] if broken or not numbers else []
    finally:
        for process in multiprocessing.active_children():
            process.terminate()  # what it has half written lies in a scratch folder
        pool.shutdown(cancel_futures=True)


# In the worker process:

_here: dict[str, Any] = {}  # the work, and the counts of all tasks


def _begin(work: bytes, counts: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()  # first: what the work imports takes seconds
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what is imported now; each worker has one core
    _here.update(work=pickle.loads(work), counts=counts)


def _end_with_parent() -> None:
    """Ends this process when the main one is gone, however that ended and whoever else holds its pipes."""
    parent: Any = multiprocessing.parent_process()
    while os.getppid() == parent.pid:
        parent.join(0.5)
    os._exit(1)


def _do(number: int, task: Any) -> Any:
    """Does a task; what cannot be pickled of an error is told in words."""
    def report(tick: Tick) -> None:
        counts[begin:begin + 1 + len(tick)] = 1, *tick

    counts, begin = _here["counts"], number * (1 + len(Tick._fields))
    report(Tick())
    try:
        return _here["work"](task, report)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
