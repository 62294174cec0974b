"""Tasks done by worker processes that may die, and how far they are: a death costs one try of its task, no result.

A worker is a `ProcessPoolExecutor` of one process: when it dies, only its own task is lost, and it is known which. An
exception in a task ends the run and is raised here. A task must write its result so that doing it again is harmless. On
a Ray cluster, whose machines can import the package in the same version, Ray starts the processes and carries pickles;
its own retries are off, since they would be neither counted nor logged.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn, TypeVar, cast

from ettin_foundry.data.quantities import format_duration

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 3.0
_CONNECT_SECONDS = 10.0
_LOG_SECONDS = 10.0
_DRAW_SECONDS = 0.25


class Tick(NamedTuple):
    """What a task has done so far."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0  # UTF-8
    file_bytes: int = 0  # on disk, compressed where the file is


class Board:
    """Counts over all tasks, shown while it is entered: a bar on a terminal (or as `show` says), else lines of the log.

    `num_bytes` to read is 0 where unknown.
    """

    def __init__(self, title: str, num_bytes: int, *, show: bool | None = None) -> None:
        self.title, self.num_bytes, self._bar = title, num_bytes, cast(Any, None)
        self._begin = self._shown = time.monotonic()
        self._ticks = dict[Hashable, Tick]()
        if sys.stderr.isatty() if show is None else show:
            from rich import console, progress  # here: it takes 0.1 s, and workers show nothing

            texts = "{task.description}", "{task.fields[counts]}"
            name, counts = (progress.TextColumn(text, markup=False) for text in texts)
            self._bar = progress.Progress(name, progress.BarColumn(), progress.TaskProgressColumn(),
                                          progress.TimeRemainingColumn(), counts, console=console.Console(stderr=True))
            self._bar.add_task(title, total=num_bytes or None, counts="")

    def tick(self, key: Hashable, tick: Tick) -> None:
        """A task got further; shows it, where enough time has passed."""
        self._ticks[key] = tick
        now = time.monotonic()
        if now - self._shown < (_DRAW_SECONDS if self._bar else _LOG_SECONDS):
            return
        self._shown, share = now, self.total.file_bytes / self.num_bytes if self.num_bytes else 0.0
        if self._bar:
            self._draw()
        else:
            left = f", {format_duration((now - self._begin) * (1 / share - 1))} left" if 0 < share < 1 else ""
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

    def __enter__(self) -> Board:
        if self._bar:
            terminal = sys.stderr
            self._bar.start()  # replaces sys.stderr by a stream that writes above the bar; logs must go there too
            self._moved: list[Any] = [handler for handler in logging.getLogger().handlers
                                      if getattr(handler, "stream", None) is terminal]
            for handler in self._moved:
                handler.setStream(sys.stderr)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._draw()
            self._bar.stop()
            for handler in self._moved:
                handler.setStream(sys.stderr)
        if kind is None:
            log.info("%s: %s", self.title, self)

    def _draw(self) -> None:
        self._bar.update(self._bar.task_ids[0], completed=self.total.file_bytes, counts=str(self))


Report = Callable[[Tick], None]
T = TypeVar("T", bound=Any)
R = TypeVar("R")


class WorkerDeath(ChildProcessError):
    """A task has killed too many workers."""


class _WorkerLost(Exception):
    """The worker of a task has died; says how."""


def run_tasks(work: Callable[[T, Report], R], tasks: Sequence[T], *, workers: int, board: Board,
              tries: int = 3, ray: bool = False, ray_address: str | None = None) -> list[R]:
    """Does every task in `workers` processes, a single one in this process; the results in the order of the tasks.

    `work(task, report)` returns the result, `report(Tick(...))` says how far it is; all must be picklable, and tasks
    have a `label` for messages. A task that kills `tries` workers raises WorkerDeath.
    """
    if workers == 1 and not ray:
        return [work(task, functools.partial(board.tick, number)) for number, task in enumerate(tasks)]
    results = dict[int, R]()
    pool: Any = _RayPool(work, workers, ray_address) if ray else _LocalPool(work)
    pending, running, deaths = deque(range(len(tasks))), dict[Future[Any], int](), Counter[int]()
    try:
        while pending or running:
            while pending and len(running) < workers:
                number = pending.popleft()
                running[pool.submit(tasks[number], number)] = number
            ended, _ = wait(running, _LOOK_SECONDS, FIRST_COMPLETED)
            for number, tick in pool.ticks():  # after waiting: a task that ended has sent everything
                board.tick(number, tick)
            for future in ended:
                number = running.pop(future)
                try:
                    results[number] = pool.result(future)
                except _WorkerLost as error:
                    deaths[number] += 1
                    if deaths[number] == tries:
                        raise WorkerDeath(f"{tasks[number].label}: {tries} workers died in it, the last of {error}; "
                                          "SIGKILL mostly means that memory ran out: use fewer workers") from None
                    log.warning("a worker died (%s) in %s, which begins again", error, tasks[number].label)
                    pending.append(number)  # last: memory that ran out is likely to be free by then
    finally:
        pool.stop()
    return [results[number] for number in range(len(tasks))]


@dataclass
class _Worker:
    executor: ProcessPoolExecutor
    link: Connection  # its ticks
    process: Any = None

    def end(self) -> None:
        self.executor.shutdown(wait=True, cancel_futures=True)
        self.link.close()


class _LocalPool:
    """Worker processes of this machine that do one task at a time each. _RayPool has the same methods."""

    def __init__(self, work: Any) -> None:
        self.setup = pickle.dumps(work)
        self.idle: list[_Worker] = []
        self.busy: dict[Future[Any], _Worker] = {}

    def submit(self, task: Any, number: int) -> Future[Any]:
        while self.idle:
            worker = self.idle.pop()
            with contextlib.suppress(BrokenProcessPool):  # it died after its last task
                future = worker.executor.submit(_attempt, task, number)
                self.busy[future] = worker
                return future
            worker.end()
        near, far = multiprocessing.Pipe(duplex=False)  # one for each: no lock that a killed worker could hold
        spawn, others = multiprocessing.get_context("spawn"), {*multiprocessing.active_children()}
        worker = _Worker(ProcessPoolExecutor(1, spawn, _begin_worker, (far, self.setup)), near)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C, which all of a terminal get, is not for it
        try:
            future = worker.executor.submit(_attempt, task, number)
            self.busy[future] = worker
            worker.process, = set(multiprocessing.active_children()) - others
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            far.close()
        return future

    def result(self, future: Future[Any]) -> Any:
        """The result of a future that is done. Raises _WorkerLost if its worker died."""
        worker = self.busy.pop(future)
        if isinstance(future.exception(), (BrokenProcessPool, _Terminated)):
            worker.end()
            status = worker.process.exitcode or 0
            raise _WorkerLost(signal.Signals(-status).name if status < 0 else f"exit status {status}")
        self.idle.append(worker)
        return future.result()

    def ticks(self) -> Iterator[tuple[int, Tick]]:
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
            worker.end()


class _RayPool:
    """Workers of one CPU each on a Ray cluster; the methods are those of _LocalPool.

    Takes the Ray of this process, the cluster at `address` (as of `ray.init`) or RAY_ADDRESS, or starts one with
    `workers` CPUs here and stops it at the end. Raises ValueError without Ray, ConnectionError without a cluster.
    """

    def __init__(self, work: Any, workers: int, address: str | None) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
            queues: Any = importlib.import_module("ray.util.queue")
        except ImportError as error:
            raise ValueError(f"--executor must be local, got ray ({error}); pip install ray") from None
        self.begun_here = not self.ray.is_initialized()
        if self.begun_here:
            self._connect(workers, address or os.environ.get("RAY_ADDRESS"))
        self.setup = self.ray.put(pickle.dumps(work))
        self.mail = queues.Queue(actor_options={"num_cpus": 0})
        self.attempt = self.ray.remote(num_cpus=1, max_retries=0)(_ray_attempt)
        self.references: dict[Future[Any], Any] = {}

    def _connect(self, workers: int, address: str | None) -> None:
        own = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 80 << 20}  # about the least
        try:
            host, _, port = (address or "").removeprefix("ray://").rpartition(":")
            if host and port.isdecimal():  # else Ray would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
            self.ray.init(address=address or "local", logging_level=logging.WARNING, **({} if address else own))
        except Exception as error:  # a bare Exception where starting takes too long
            raise ConnectionError("--ray-address must be HOST:PORT of a running cluster's head, auto on one of its "
                                  f"machines or left out to start Ray, got {address}: {error}") from error

    def submit(self, task: Any, number: int) -> Future[Any]:
        reference = self.attempt.remote(self.setup, pickle.dumps(task), number, self.mail)
        self.references[future := reference.future()] = reference
        return future

    def result(self, future: Future[Any]) -> Any:
        del self.references[future]
        try:
            return pickle.loads(future.result())
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            raise _WorkerLost(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from error

    def ticks(self) -> Iterator[Any]:
        while number := self.mail.qsize():
            yield from self.mail.get_nowait_batch(number)

    def stop(self) -> None:
        try:
            references = list(self.references.values())
            for force in (False, True):  # first without force, so that half-written files go
                for reference in references:
                    self.ray.cancel(reference, force=force)
                if references and not force:  # Ray 2.60 ends this process if a task is cancelled that has just ended
                    _, references = self.ray.wait(references, num_returns=len(references), timeout=_GRACE_SECONDS)
            self.mail.shutdown(force=True)
        finally:
            if self.begun_here:
                self.ray.shutdown()


# In the worker process:

_work: Callable[[Any, Report], Any]
_link: Connection


class _Terminated(SystemExit):
    """SIGTERM."""


def _begin_worker(link: Connection, work: bytes) -> None:
    global _work, _link
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _use_one_core()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    _link, _work = link, pickle.loads(work)


def _use_one_core() -> None:
    """Where the user says nothing else; libraries read it when they are imported, which the work does first."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _attempt(task: Any, number: int) -> Any:
    try:
        return _work(task, lambda tick: _link.send((number, tick)))
    except Exception as error:
        raise _sendable(error) from error.__cause__


def _sendable(error: Exception) -> Exception:
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


def _ray_attempt(setup: bytes, task: bytes, number: int, mail: Any) -> bytes:
    """Does a task in a process of Ray's."""
    _use_one_core()
    try:
        return pickle.dumps(pickle.loads(setup)(pickle.loads(task), lambda tick: mail.put_nowait((number, tick))))
    except Exception as error:
        raise _sendable(error) from error.__cause__
