"""Tasks done by worker processes that may die: every result comes once, a death costs one try of its task.

A worker is a `ProcessPoolExecutor` of one process: when it dies, only its own task is lost, and it is known
which. An exception in a task ends the run and is raised here. A task must write its result so that doing it
again is harmless. Workers on many machines are in ray_pool.py.
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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from ettin_foundry.corpus.progress import Board, Tick

__all__ = ["ONE_CORE", "Report", "WorkerDeath", "WorkerLost", "run_tasks", "sendable"]

log = logging.getLogger(__name__)

Report = Callable[[Tick], None]
Key = tuple[int, int]
"""Number of a task, number of its try."""
T = TypeVar("T")
R = TypeVar("R")

ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of a worker, where the user has not set these: there is a worker for each core."""
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 3.0


class WorkerDeath(RuntimeError):
    """A task has killed too many workers."""


class WorkerLost(Exception):
    """The worker of a task has died; the text says how."""


def run_tasks(work: Callable[[T, Report], R], tasks: Sequence[T], *, workers: int, board: Board,
              tries: int = 3, ray: bool = False, ray_address: str | None = None) -> list[R]:
    """Does every task in `workers` processes; the results in the order of the tasks.

    Args:
        work: `work(task, report)` returns the result; `report(Tick(...))` says how far it is. It, the tasks
            and the results are pickled and must come from importable modules.
        tasks: each has a `label` for messages. workers: one works in this process. tries: workers that a task
            may kill. ray: run on a Ray cluster, `ray_address` or one that is started here.

    Raises:
        WorkerDeath: a task killed `tries` workers. Exception: whatever `work` raised.
    """
    results: dict[int, R] = {}
    if workers == 1 and not ray:
        for number, task in enumerate(tasks):
            results[number] = work(task, functools.partial(board.tick, number))
            board.end(number)
        return list(results.values())
    from ettin_foundry.corpus.ray_pool import RayPool  # here: it needs this module

    pool: Any = RayPool(work, workers, ray_address) if ray else _LocalPool(work)
    pending, running = deque(range(len(tasks))), dict[Future[Any], Key]()
    deaths = Counter[int]()
    try:
        while pending or running:
            while pending and len(running) < workers:
                number = pending.popleft()
                key = number, deaths[number]
                running[pool.submit(tasks[number], key)] = key
            ended, _ = wait(running, _LOOK_SECONDS, FIRST_COMPLETED)
            for key, tick in pool.ticks():  # after waiting: a task that ended has sent everything
                if key in running.values():
                    board.tick(key, tick)
            for future in ended:
                key = number, _ = running.pop(future)
                try:
                    results[number] = pool.result(future)
                    board.end(key)
                except WorkerLost as error:
                    board.end(key, done=False)
                    deaths[number] += 1
                    if deaths[number] == tries:
                        raise WorkerDeath(f"{tasks[number].label}: {tries} workers died in it, the last of {error}; "
                                          "SIGKILL mostly means that memory ran out: take fewer workers, and start "
                                          "again, which goes on after the finished tasks") from None
                    log.warning("a worker died (%s) in %s, which begins again", error, tasks[number].label)
                    pending.append(number)  # last: memory that ran out is likely to be free by then
    finally:
        pool.stop()
    return [results[number] for number in range(len(tasks))]


@dataclass
class _Worker:
    executor: ProcessPoolExecutor
    link: Connection
    process: Any = None

    def end(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)
        self.link.close()


class _LocalPool:
    """Worker processes of this machine that do one task at a time each. RayPool has the same methods."""

    def __init__(self, work: Any) -> None:
        self.setup = pickle.dumps(work)
        self.idle: list[_Worker] = []
        self.busy: dict[Future[Any], _Worker] = {}

    def submit(self, task: Any, key: Key) -> Future[Any]:
        """Begins a task, in an idle worker or a new one."""
        while self.idle:
            worker = self.idle.pop()
            with contextlib.suppress(BrokenProcessPool):  # it died after its last task
                future = worker.executor.submit(_attempt, task, key)
                self.busy[future] = worker
                return future
            worker.end()
        near, far = multiprocessing.Pipe(duplex=False)  # one for each: no lock that a killed worker could hold
        spawn, others = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
        worker = _Worker(ProcessPoolExecutor(1, spawn, _begin_worker, (far, self.setup)), near)
        with _starting(), far:
            future = worker.executor.submit(_attempt, task, key)
            self.busy[future] = worker
            worker.process, = set(multiprocessing.active_children()) - others
        return future

    def result(self, future: Future[Any]) -> Any:
        """The result of a future that is done. Raises WorkerLost if its worker died."""
        worker = self.busy.pop(future)
        if isinstance(future.exception(), (BrokenProcessPool, _Terminated)):
            worker.end()
            status = worker.process.exitcode or 0
            raise WorkerLost(signal.Signals(-status).name if status < 0 else f"exit status {status}")
        self.idle.append(worker)
        return future.result()

    def ticks(self) -> Iterator[tuple[Key, Tick]]:
        """What workers have sent, with the key of their task."""
        for worker in (*self.idle, *self.busy.values()):
            with contextlib.suppress(EOFError, OSError):  # it died
                while worker.link.poll():
                    yield worker.link.recv()

    def stop(self) -> None:
        """Ends all workers, whatever they do."""
        for worker in self.busy.values():
            worker.process.terminate()  # leaves through `finally` blocks, so that half-written files go
        wait(self.busy, _GRACE_SECONDS)
        for future, worker in self.busy.items():
            if not future.done():
                worker.process.kill()
        for worker in (*self.idle, *self.busy.values()):
            worker.end()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """A process started inside has its environment, and is deaf to Ctrl-C, which all of a terminal get."""
    added = {name: value for name, value in ONE_CORE.items() if name not in os.environ}
    os.environ.update(added)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for name in added:
            del os.environ[name]


# In the worker process:

_work: Callable[[Any, Report], Any]
_link: Connection


class _Terminated(SystemExit):
    """SIGTERM."""


def _begin_worker(link: Connection, work: bytes) -> None:
    global _work, _link
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    _link, _work = link, pickle.loads(work)


def _attempt(task: Any, key: Key) -> Any:
    try:
        return _work(task, lambda tick: _link.send((key, tick)))
    except Exception as error:
        raise sendable(error) from error.__cause__


def sendable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its name where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _end_with_parent() -> None:
    """Ends this process when the main process is gone, even if it was killed with -9."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)
