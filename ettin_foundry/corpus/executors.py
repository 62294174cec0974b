"""Tasks done by worker processes that may die: each result arrives exactly once, and nobody waits for a dead worker.

A worker is a fresh interpreter (nothing is forked, no lock or thread is inherited) at the other end of a socket, over
which tasks go out, and ticks, log records and results come back. A worker that dies is replaced and its task is given out
again; an exception in a task ends everything and is raised here; workers end with this process, however it ends. Nothing
here knows what a task does: a task must write its result so that doing it again does no harm. Workers of many machines are
in ray_pool.py, what a worker runs is in pool_worker.py.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from ettin_foundry.corpus.pool_worker import HEADER, ONE_CORE
from ettin_foundry.corpus.progress import Board, Tick, plain

__all__ = ["Report", "Task", "WorkerDeath", "WorkerTraceback", "check_counts", "death_error", "raise_sent", "repeat_record",
           "run_tasks"]

log = logging.getLogger(__name__)

Report = Callable[[Tick], None]

_BOOT = """
import sys
sys.path[:] = sys.argv[3:]
from ettin_foundry.corpus.pool_worker import serve
serve(int(sys.argv[1]), parent=int(sys.argv[2]))
"""
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 3.0


class WorkerDeath(RuntimeError):
    """A task has killed too many workers; the text is for people."""


class Task(Protocol):
    """Anything that can be pickled and has a name for people."""

    @property
    def label(self) -> str: ...


T = TypeVar("T", bound=Task)
R = TypeVar("R")


class WorkerTraceback(Exception):
    """Cause of an exception that a worker raised: where in the worker, as text."""


def run_tasks(work: Callable[[T, Report], R], tasks: Iterable[T], *, workers: int, board: Board,
              tries: int = 3) -> Iterator[tuple[T, R]]:
    """Does every task once, in `workers` processes.

    Args:
        work: `work(task, report)` returns the result; `report(Tick(...))` says how far it is, best twice a second. It, the
            tasks and the results travel as pickles and must come from importable modules: workers do not run the script.
        tasks: in the order in which they are begun. workers: 1 works in this process, without protection from its death.
        board: shows the progress; the caller enters it. tries: workers that a task may kill before it is given up.

    Returns:
        an iterator of (task, result) in the order in which they end. Use it up or close it: then no process is left.

    Raises:
        ValueError: workers or tries below 1. RuntimeError: a task killed `tries` workers; names task, file and signal.
        Exception: whatever `work` raised, of the same type and message; other workers are ended.
    """
    check_counts(workers, tries)
    todo = list(tasks)
    if workers == 1:
        return _run_here(work, todo, board)
    return _Pool(work, todo, min(workers, len(todo)), board, tries).results()


def check_counts(workers: int, tries: int) -> None:
    """Raises ValueError for less than one worker or try."""
    if workers < 1:
        raise ValueError(f"workers: {workers} given; at least 1 is needed. One per core is usual")
    if tries < 1:
        raise ValueError(f"tries: {tries} given; at least 1 is needed. 3 forgives a worker that ran out of memory once")


def _run_here(work: Callable[[T, Report], R], tasks: list[T], board: Board) -> Iterator[tuple[T, R]]:
    me, stop = os.getpid(), threading.Event()

    def watch() -> None:
        while not stop.wait(_LOOK_SECONDS):
            board.check()

    def dump(_: int | str) -> None:
        with contextlib.suppress(Exception):  # a stderr without a file, as in a notebook
            faulthandler.dump_traceback()

    board.joined(me)
    board.on_stall = dump
    watcher = threading.Thread(target=watch, name="stalls", daemon=True)
    watcher.start()
    try:
        for task in tasks:
            board.began(me, task.label)
            result = work(task, lambda tick: board.tick(me, tick))
            board.done(me)
            yield task, result
    finally:
        stop.set()
        watcher.join()
        board.on_stall = None
        board.lost(me)


class _Worker:
    """The near end of one worker process. Neither reading nor writing ever waits."""

    def __init__(self) -> None:
        self.link, far = socket.socketpair()
        self.link.setblocking(False)
        self.task: int | None = None
        self.ready = self.ended = False
        self._inbox, self._outbox = bytearray(), bytearray()
        try:
            with far:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, str(far.fileno()), str(os.getpid()), *map(str, sys.path)],
                    pass_fds=[far.fileno()], stdin=subprocess.DEVNULL, env={**ONE_CORE, **os.environ})
        except BaseException:
            self.link.close()
            raise

    @property
    def wants(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0)

    def post(self, *messages: bytes) -> None:
        for message in messages:
            self._outbox += HEADER.pack(len(message)) + message
        self.flush()

    def flush(self) -> None:
        try:
            while self._outbox:
                del self._outbox[:self.link.send(self._outbox)]
        except BlockingIOError:
            pass
        except OSError:  # it is gone, which reading finds out after the last thing that it said
            self._outbox.clear()

    def messages(self) -> list[tuple[Any, ...]]:
        """Everything that has wholly arrived. A message cut off by the worker's death is never looked at."""
        try:
            while data := self.link.recv(1 << 20):
                self._inbox += data
            self.ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True
        found, at = [], 0
        while len(self._inbox) >= at + HEADER.size:
            end = at + HEADER.size + HEADER.unpack_from(self._inbox, at)[0]
            if len(self._inbox) < end:
                break
            found.append(pickle.loads(memoryview(self._inbox)[at + HEADER.size:end]))
            at = end
        del self._inbox[:at]
        return found

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def bury(self, until: float) -> int:
        """Waits until it is gone, with force after `until` (time.monotonic); its exit status."""
        self.link.close()
        try:
            return self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class _Pool:
    def __init__(self, work: Any, tasks: list[Any], workers: int, board: Board, tries: int) -> None:
        self.setup = pickle.dumps((work, logging.getLogger().getEffectiveLevel()))
        self.tasks, self.workers, self.board, self.tries = tasks, workers, board, tries
        self.pending = deque(range(len(tasks)))
        self.deaths = [0] * len(tasks)
        self.team: list[_Worker] = []
        self.said: set[str] = set()

    def results(self) -> Iterator[tuple[Any, Any]]:
        self.board.on_stall = self._ask
        try:
            unfinished = len(self.tasks)
            while unfinished:
                self._hand_out()
                paused = False
                for worker in self._wait():
                    for kind, *content in worker.messages():
                        if kind == "done":
                            task, worker.task = self.tasks[worker.task], None  # type: ignore[index]
                            self.board.done(worker.process.pid)
                            self._hand_out()  # before the caller gets its turn: no worker waits for it
                            unfinished -= 1
                            paused = True
                            yield task, content[0]
                        else:
                            self._heard(worker, kind, content)
                    if worker.ended:
                        self._mourn(worker)
                if not paused:  # else there may be words of workers that nobody has read while the caller had its turn
                    self.board.check()
        finally:
            self._stop()
            self.board.on_stall = None

    def _hand_out(self) -> None:
        """Pending tasks to idle workers, new workers where there are too few; workers without a task are let go."""
        idle = [worker for worker in self.team if worker.task is None and not worker.ended]
        while self.pending:
            if not idle and len(self.team) >= self.workers:
                return
            worker = idle.pop() if idle else self._start()
            index = worker.task = self.pending.popleft()
            self.board.began(worker.process.pid, self.tasks[index].label)
            worker.post(pickle.dumps(self.tasks[index]))

    def _start(self) -> _Worker:
        with _interrupts_wait():  # a process that is running but not in `team` would never be ended
            worker = _Worker()
            self.team.append(worker)
        self.board.joined(worker.process.pid)
        worker.post(self.setup)
        return worker

    def _wait(self) -> list[_Worker]:
        """Workers with something to read, and dead ones: the end of a socket shows late if a child of theirs holds it."""
        with selectors.DefaultSelector() as selector:
            for worker in self.team:
                selector.register(worker.link, worker.wants, worker)
            events = selector.select(_LOOK_SECONDS)
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
        found = [key.data for key, mask in events if mask & selectors.EVENT_READ]
        for worker in self.team:
            if worker not in found and worker.process.poll() is not None:
                worker.ended = True
                found.append(worker)
        return found

    def _heard(self, worker: _Worker, kind: str, content: list[Any]) -> None:
        if kind == "tick":
            self.board.tick(worker.process.pid, content[0])
        elif kind == "log":
            repeat_record(self.said, *content)
        elif kind == "ready":
            worker.ready = True
        else:
            raise_sent(*content, where=f"worker {worker.process.pid}" + (
                "" if worker.task is None else f", task {self.tasks[worker.task].label}"))

    def _mourn(self, worker: _Worker) -> None:
        status = worker.bury(time.monotonic() + _GRACE_SECONDS)
        self.team.remove(worker)
        where = self.board.lost(worker.process.pid)
        if worker.task is None:
            return
        self.deaths[worker.task] += 1
        label, deaths = self.tasks[worker.task].label, self.deaths[worker.task]
        if deaths >= self.tries:
            raise death_error(label, where, _how(status), deaths)
        log.warning("worker %d died (%s) in %s; its task %s begins again, try %d of %d", worker.process.pid, _how(status),
                    plain(where), label, deaths + 1, self.tries)
        self.pending.append(worker.task)  # last: memory that ran out is likely to be free by then

    def _ask(self, pid: int | str) -> None:
        """A stalled worker prints the stack of its threads on stderr, even if it hangs in a C function."""
        for worker in self.team:
            if worker.process.pid == pid and worker.ready:
                worker.signal(signal.SIGUSR1)

    def _stop(self) -> None:
        with _interrupts_wait():
            for worker in self.team:
                worker.link.close()
                if worker.task is not None:
                    worker.signal(signal.SIGTERM)
            until = time.monotonic() + _GRACE_SECONDS
            for worker in self.team:
                worker.bury(until)
                self.board.lost(worker.process.pid)
            self.team.clear()


def repeat_record(said: set[str], name: str, level: int, text: str) -> None:
    """Gives a worker's log record to this process's logging; what every worker says at its start (`said`) only once."""
    if level >= logging.WARNING or text not in said:
        logging.getLogger(name).log(level, "%s", text)
        said.add(text)


def raise_sent(pickled: bytes | None, name: str, message: str, trace: str, *, where: str) -> None:
    """Raises the exception that a worker sent; a RuntimeError with its name where it cannot be pickled."""
    try:
        error = pickle.loads(pickled) if pickled else None
    except Exception:
        error = None
    if not isinstance(error, BaseException):
        error = RuntimeError(f"{name}: {message}")
    raise error from WorkerTraceback(f"in {where}:\n{trace}")


def death_error(label: str, where: str, how: str, deaths: int) -> WorkerDeath:
    """What to raise when a task has killed too many workers."""
    return WorkerDeath(f"task {label}: {deaths} workers died in it, the last of {how} in {plain(where)}, so it is given "
                        "up. SIGKILL mostly means that memory ran out: take fewer workers, or look at that file. "
                        "Finished tasks are kept; the same command goes on from there")


def _how(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status}, {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C inside takes effect on leaving. A process started inside is born deaf to it: it comes to a whole terminal."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *event: came.append(event))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[-1])
