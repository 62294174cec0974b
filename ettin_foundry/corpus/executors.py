"""Tasks done by worker processes that may die: every result is returned once, and a death costs one try of its task.

A worker is a `ProcessPoolExecutor` of one process: when it dies, only its own task is lost, and which one is known. An
exception in a task ends the whole run and is raised here. A task must write its result so that doing it again is harmless.
Workers on many machines are in ray_pool.py.
"""

from __future__ import annotations

import contextlib
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
from typing import Any, NoReturn, Protocol, TypeVar

from ettin_foundry.corpus.progress import Board, Tick

__all__ = ["ONE_CORE", "Report", "SendRecords", "Task", "WorkerDeath", "WorkerLost", "run_tasks", "sendable"]

log = logging.getLogger(__name__)

Report = Callable[[Tick], None]
Key = tuple[int, int]
"""Number of a task, number of its try."""

ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false"}
"""Environment of a worker, where the user has not set these: there is a worker for each core."""
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 3.0


class WorkerDeath(RuntimeError):
    """A task has killed too many workers."""


class WorkerLost(Exception):
    """The worker of a task has died; the text says how."""


class Task(Protocol):
    """Anything that can be pickled and has a name for messages."""

    @property
    def label(self) -> str: ...


T = TypeVar("T", bound=Task)
R = TypeVar("R")


class Pool(Protocol):
    """Workers, here or elsewhere, that do one task at a time each."""

    def submit(self, task: Any, key: Key) -> Future[Any]:
        """Begins a task."""

    def result(self, future: Future[Any]) -> Any:
        """The result of a future that is done. Raises WorkerLost if the worker died, else what the task raised."""

    def messages(self) -> Iterator[tuple[Any, ...]]:
        """What workers have sent: (key, "begin", worker), (key, "tick", Tick) or (key, "log", logger, level, text)."""

    def stop(self) -> None:
        """Ends all workers, whatever they do."""


def run_tasks(work: Callable[[T, Report], R], tasks: Sequence[T], *, workers: int, board: Board, tries: int = 3,
              ray: bool = False, ray_address: str | None = None) -> list[R]:
    """Does every task in `workers` processes; the results in the order of the tasks.

    Args:
        work: `work(task, report)` returns the result; `report(Tick(...))` says how far it is, best twice a second. It,
            the tasks and the results are pickled and must come from importable modules.
        workers: one works in this process, without protection from its death. board: is told of the progress; the
            caller enters it. tries: workers that a task may kill before the run ends.
        ray: run on a Ray cluster, `ray_address` or one that is started here.

    Raises:
        WorkerDeath: a task killed `tries` workers; names task, file and signal. Exception: whatever `work` raised.
    """
    if ray:
        from ettin_foundry.corpus.ray_pool import RayPool

        return _drive(RayPool(work, workers, ray_address), tasks, workers, board, tries)
    if workers > 1:
        return _drive(_LocalPool(work), tasks, workers, board, tries)
    results = []
    for number, task in enumerate(tasks):
        board.began(number, task.label, str(os.getpid()))
        results.append(work(task, lambda tick, number=number: board.tick(number, tick)))  # type: ignore[misc]
        board.done(number)
    return results


def _drive(pool: Pool, tasks: Sequence[T], workers: int, board: Board, tries: int) -> list[Any]:
    results: dict[int, Any] = {}
    pending, running = deque(range(len(tasks))), dict[Future[Any], Key]()
    deaths, said = Counter[int](), set[str]()
    try:
        while pending or running:
            while pending and len(running) < workers:
                number = pending.popleft()
                key = number, deaths[number]
                running[pool.submit(tasks[number], key)] = key
            ended, _ = wait(running, _LOOK_SECONDS, FIRST_COMPLETED)
            for key, kind, *content in pool.messages():  # after waiting: a task that ended has sent everything
                if kind == "log":
                    _repeat_record(said, *content)
                elif kind == "begin":
                    board.began(key, tasks[key[0]].label, content[0])
                else:
                    board.tick(key, Tick(*content[0]))
            for future in ended:
                key = number, _ = running.pop(future)
                try:
                    results[number] = pool.result(future)
                    board.done(key)
                except WorkerLost as error:
                    deaths[number] += 1
                    _mind_death(tasks[number].label, *board.lost(key), str(error), deaths[number], tries)
                    pending.append(number)  # last: memory that ran out is likely to be free by then
    finally:
        pool.stop()
    return [results[number] for number in range(len(tasks))]


def _mind_death(label: str, worker: str, where: str, how: str, deaths: int, tries: int) -> None:
    """Logs a death, or raises WorkerDeath after the last try."""
    if deaths >= tries:
        raise WorkerDeath(f"task {label}: {deaths} workers died in it, the last of {how} in {where}. SIGKILL mostly means "
                          "that memory ran out: take fewer workers, or look at that file. Finished tasks are kept; the same "
                          "command goes on from there")
    log.warning("worker %s died (%s) in %s; its task %s begins again, try %d of %d", worker, how, where, label, deaths + 1,
                tries)


def _repeat_record(said: set[str], name: str, level: int, text: str) -> None:
    """Gives a worker's log record to this process's logging; what every worker says at its start only once."""
    if level >= logging.WARNING or text not in said:
        logging.getLogger(name).log(level, "%s", text)
        said.add(text)


@dataclass
class _Worker:
    executor: ProcessPoolExecutor
    link: Connection
    process: Any = None


class _LocalPool:
    def __init__(self, work: Any) -> None:
        self.setup = pickle.dumps(work), logging.getLogger().getEffectiveLevel()
        self.idle: list[_Worker] = []
        self.busy: dict[Future[Any], _Worker] = {}

    def submit(self, task: Any, key: Key) -> Future[Any]:
        while self.idle:
            worker = self.idle.pop()
            with contextlib.suppress(BrokenProcessPool):  # it died after its last task
                future = worker.executor.submit(_attempt, task, key)
                self.busy[future] = worker
                return future
            self._end(worker)
        near, far = multiprocessing.Pipe(duplex=False)  # one for each worker: no lock that a killed worker could hold
        worker = _Worker(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_worker, (far, *self.setup)),
                         near)
        others = multiprocessing.active_children()
        with _starting(), far:
            future = worker.executor.submit(_attempt, task, key)
            self.busy[future] = worker
        worker.process, = set(multiprocessing.active_children()) - set(others)
        return future

    def result(self, future: Future[Any]) -> Any:
        worker = self.busy.pop(future)
        try:
            result = future.result()
        except (BrokenProcessPool, _Terminated):
            self._end(worker)
            status = worker.process.exitcode or 0
            name = signal.Signals(-status).name if -status in set(signal.Signals) else f"exit status {status}"
            raise WorkerLost(name) from None
        except BaseException:
            self.idle.append(worker)
            raise
        self.idle.append(worker)
        return result

    def messages(self) -> Iterator[tuple[Any, ...]]:
        for worker in (*self.idle, *self.busy.values()):
            with contextlib.suppress(EOFError, OSError):  # it died
                while worker.link.poll():
                    yield worker.link.recv()

    def stop(self) -> None:
        for worker in self.busy.values():
            worker.process.terminate()  # leaves through `finally` blocks, so that half-written files go
        wait(self.busy, _GRACE_SECONDS)
        for future, worker in self.busy.items():
            if not future.done():
                worker.process.kill()
        for worker in (*self.idle, *self.busy.values()):
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        worker.executor.shutdown(wait=True, cancel_futures=True)
        worker.link.close()


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """A process started inside has its environment, and begins deaf to Ctrl-C, which comes to a whole terminal."""
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


class _Terminated(SystemExit):
    """SIGTERM."""


class SendRecords(logging.Handler):
    """Sends log records to the main process: one log, which does not tear the progress bar."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", record.name, record.levelno, self.format(record))


_work: Callable[[Any, Report], Any]
_link: Connection
_lock = threading.Lock()


def _send(key: Key | None, kind: str, *content: Any) -> None:
    with _lock:  # the threads of a unit log as well
        _link.send((key, kind, *content))


def _begin_worker(link: Connection, work: bytes, level: int) -> None:
    global _work, _link
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    _link = link
    root = logging.getLogger()
    root.setLevel(level)
    root.handlers[:] = [SendRecords(lambda *message: _send(None, *message))]
    _work = pickle.loads(work)


def _attempt(task: Any, key: Key) -> Any:
    _send(key, "begin", str(os.getpid()))
    try:
        return _work(task, lambda tick: _send(key, "tick", tuple(tick)))
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
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
