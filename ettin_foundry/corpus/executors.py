"""Tasks done by worker processes, and how far they are. An exception in a task, or a worker's death, is raised here."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
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


def run_tasks(work: Callable[[T, Report], R], tasks: Sequence[T], *, workers: int, board: Board) -> list[R]:
    """Does every task in `workers` processes, a single one in this process; the results in the order of the tasks.

    `work(task, report)` returns the result, `report(Tick(...))` says how far it is; all must be picklable, and tasks
    have a `label`: a ChildProcessError names those that were under way when a worker died.
    """
    if workers == 1:
        return [work(task, functools.partial(board.tick, number)) for number, task in enumerate(tasks)]
    context, width = multiprocessing.get_context("spawn"), 1 + len(Tick._fields)
    counts = context.RawArray("q", width * len(tasks))  # of each task whether it has begun, and its Tick; no lock
    pool, futures = ProcessPoolExecutor(workers, context, _begin, (pickle.dumps(work), counts)), list[Future[R]]()
    try:
        futures += [pool.submit(_do, number, task) for number, task in enumerate(tasks)]
        left = {*futures}
        while left:
            done, left = wait(left, _LOOK_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what was raised
            for number in range(len(tasks)):
                if counts[width * number]:
                    board.tick(number, Tick(*counts[width * number + 1:width * (number + 1)]))
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        begun = [tasks[number].label for number, future in enumerate(futures)
                 if counts[width * number] and future.exception()]
        raise ChildProcessError(f"a worker died (under way: {', '.join(begun) or 'nothing'}); the same command goes "
                                "on; if memory ran out (dmesg), give fewer --workers") from error
    finally:
        for process in multiprocessing.active_children():
            process.terminate()  # what it has half written lies in a scratch folder
        pool.shutdown(cancel_futures=True)


# In the worker process:

_here: dict[str, Any] = {}  # the work, and the counts of all tasks


def _begin(work: bytes, counts: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C, which all processes of a terminal get, is not for it
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
