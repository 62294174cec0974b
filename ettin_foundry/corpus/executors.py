"""Tasks done by worker processes that may die, and how far they are: a death costs one try of its task, no result.

An exception in a task ends the run and is raised here. A task must write its result so that doing it again is harmless.
Workers are processes of this machine with a pipe each, so that a death is seen at once and it is known whose, or those
of a Ray cluster, whose own retries are off, since they would be neither counted nor logged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
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
              tries: int = 3, ray: bool = False, ray_address: str | None = None) -> list[R]:
    """Does every task in `workers` processes, a single one in this process; the results in the order of the tasks.

    `work(task, report)` returns the result, `report(Tick(...))` says how far it is; all must be picklable, and tasks
    have a `label` for messages. A task that kills `tries` workers raises ChildProcessError.
    """
    if workers == 1 and not ray:
        return [work(task, functools.partial(board.tick, number)) for number, task in enumerate(tasks)]
    pending, running, results, deaths = deque(range(len(tasks))), 0, dict[int, R](), Counter[int]()
    pool = _RayPool(work, workers, ray_address) if ray else _LocalPool(work)
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


class _LocalPool:
    """Worker processes of this machine that do one task at a time each. _RayPool has the same methods."""

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


class _RayPool:
    """Workers of one CPU each on a Ray cluster, which report when they end; the methods are those of _LocalPool.

    Takes the Ray of this process, the cluster at `address` (as of `ray.init`) or RAY_ADDRESS, or starts one with
    `workers` CPUs here and stops it at the end. Raises ValueError without Ray, ConnectionError without a cluster.
    """

    def __init__(self, work: Any, workers: int, address: str | None) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise ValueError(f"--executor must be local, got ray ({error}); pip install ray") from None
        self.begun_here = not self.ray.is_initialized()
        if self.begun_here:
            self._connect(workers, address or os.environ.get("RAY_ADDRESS"))
        self.work = self.ray.put(pickle.dumps(work))
        self.attempt = self.ray.remote(num_cpus=1, max_retries=0)(_ray_attempt)
        self.running = dict[Any, int]()  # reference -> number of the task

    def _connect(self, workers: int, address: str | None) -> None:
        own = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 80 << 20}  # about the least
        try:
            host, _, port = (address or "").removeprefix("ray://").rpartition(":")
            if host and port.isdecimal():  # else Ray would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            self.ray.init(address=address or "local", logging_level=logging.WARNING, **({} if address else own))
        except Exception as error:  # a bare Exception where starting takes too long
            raise ConnectionError("--ray-address must be HOST:PORT of a running cluster's head, auto on one of its "
                                  f"machines or left out to start Ray, got {address}: {error}") from error

    def submit(self, number: int, task: bytes) -> None:
        self.running[self.attempt.remote(self.work, task)] = number

    def ended(self, tick: Callable[[int, Tick], None]) -> Iterator[tuple[int, _Outcome]]:
        for reference in self.ray.wait([*self.running])[0]:
            number = self.running.pop(reference)
            try:
                data, last = self.ray.get(reference)
                tick(number, Tick(*last))
                yield number, pickle.loads(data)
            except self.ray.exceptions.RayError as error:
                yield number, _Outcome(death=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")

    def stop(self) -> None:
        try:
            references = list(self.running)
            for force in (False, True):  # first without force, so that half-written files go
                for reference in references:
                    self.ray.cancel(reference, force=force)
                if references and not force:  # Ray 2.60 ends this process if a task is cancelled that has just ended
                    _, references = self.ray.wait(references, num_returns=len(references), timeout=_GRACE_SECONDS)
        finally:
            if self.begun_here:
                self.ray.shutdown()


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


def _ray_attempt(work: bytes, task: bytes) -> tuple[bytes, Sequence[int]]:
    """Does a task; its outcome, and how far it was."""
    ticks = deque([Tick()], maxlen=1)
    return _attempt(work, task, ticks.append), tuple(ticks[0])


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
