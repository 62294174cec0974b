"""The same as pool.py on a Ray cluster: tasks on many machines, a worker that dies costs one try of its task.

Ray only starts processes and carries pickles. Its own retries are off, since those would not be counted or shown; ticks and
log records come back through one small actor. The package must be importable on every machine, of the same version. Ray
comes with the extra `ray` and is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ettin_foundry.corpus.executors import Report, Task, check_counts, death_error, raise_sent, repeat_record
from ettin_foundry.corpus.pool_worker import ONE_CORE, SendRecords, describe_error
from ettin_foundry.corpus.progress import Board, Tick, plain

__all__ = ["run_tasks_ray", "run_try"]

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Task)
R = TypeVar("R")

_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 3.0
_CONNECT_SECONDS = 10.0
_STORE_BYTES = 80 << 20  # about the least that Ray takes; only records go through it


def run_tasks_ray(work: Callable[[T, Report], R], tasks: Iterable[T], *, workers: int, board: Board,
                  address: str | None = None, tries: int = 3) -> Iterator[tuple[T, R]]:
    """Does every task once, on a Ray cluster; arguments, result and errors are those of `pool.run_tasks`.

    Args:
        workers: most tasks at a time, one CPU each. address: of a running cluster, as `ray.init` takes it; None: RAY_ADDRESS
            where that is set, else Ray is started on this machine with `workers` CPUs, and stopped again at the end.

    Raises:
        ValueError: Ray is not installed; workers or tries below 1. ConnectionError: no cluster at the address.
        Others: as `pool.run_tasks`.
    """
    check_counts(workers, tries)
    return _run(_import_ray(), work, list(tasks), workers, board, address or os.environ.get("RAY_ADDRESS"), tries)


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ValueError(f"--executor: ray given, but Ray cannot be imported ({error}); local and ray are possible. "
                         "Install it (pip install 'ettin-foundry[ray]'), or leave the option out to work on this "
                         "machine") from error


def _run(ray: Any, work: Any, tasks: list[Any], workers: int, board: Board, address: str | None,
         tries: int) -> Iterator[tuple[Any, Any]]:
    begun_here = not ray.is_initialized()
    if begun_here:
        _connect(ray, workers, address)
    try:
        run = _RayRun(ray, work, tasks, workers, board, tries)
        try:
            yield from run.results()
        finally:
            run.stop()
    finally:
        if begun_here:
            ray.shutdown()


def _connect(ray: Any, workers: int, address: str | None) -> None:
    if address is None:
        try:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, object_store_memory=_STORE_BYTES,
                     logging_level=logging.WARNING)
        except Exception as error:  # a bare Exception where it takes too long
            raise ConnectionError(f"--executor: ray given, but Ray could not be started on this machine ({error}); local "
                                  "and ray are possible. Try again when the machine is less busy, give --ray-address, or "
                                  "leave the option out") from error
        return
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():  # else Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"--ray-address: {address} given, and no Ray cluster answers there ({error}); HOST:PORT of a "
                              "cluster's head, or auto on one of its machines, is possible. Leave it out to start Ray on "
                              "this machine") from error


class _RayRun:
    def __init__(self, ray: Any, work: Any, tasks: list[Any], workers: int, board: Board, tries: int) -> None:
        self.ray, self.tasks, self.workers, self.board, self.tries = ray, tasks, workers, board, tries
        self.setup = ray.put(pickle.dumps((work, logging.getLogger().getEffectiveLevel())))
        self.pending = deque(range(len(tasks)))
        self.deaths = [0] * len(tasks)
        self.said: set[str] = set()
        self.running: dict[Any, tuple[int, int]] = {}
        """Ray's reference -> (task, try)."""
        self.names: dict[tuple[int, int], str] = {}
        """(task, try) -> `PID on HOST`, once it has said so."""
        # nested, hence sent whole: a machine that runs them needs no ettin_foundry before sys.path is set
        paths = [str(path) for path in sys.path]

        class Mailbox:
            def __init__(self) -> None:
                self.letters: list[Any] = []

            def put(self, *letter: Any) -> None:
                self.letters.append(letter)

            def take(self) -> list[Any]:
                letters, self.letters = self.letters, []
                return letters

        def attempt(setup: bytes, task: bytes, key: tuple[int, int], mailbox: Any) -> Any:
            sys.path.extend(path for path in paths if path not in sys.path)
            from ettin_foundry.corpus.ray_pool import run_try

            return run_try(setup, task, key, mailbox)

        self.mailbox = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mailbox).remote()
        self.attempt = ray.remote(num_cpus=1, max_retries=0)(attempt)

    def results(self) -> Iterator[tuple[Any, Any]]:
        unfinished = len(self.tasks)
        while unfinished:
            self._hand_out()
            ended, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_LOOK_SECONDS)
            self._read_mail()  # after waiting: a task that ended has posted everything
            self.board.check()
            for reference in ended:
                index, attempt = key = self.running.pop(reference)
                outcome = self._outcome(reference, key)
                name = self.names.pop(key, "")
                if outcome is None:
                    self.pending.append(index)
                    continue
                self.board.done(name)
                if not self.pending:
                    self.board.lost(name)
                self._hand_out()
                unfinished -= 1
                yield self.tasks[index], outcome

    def _hand_out(self) -> None:
        while self.pending and len(self.running) < self.workers:
            index = self.pending.popleft()
            key = index, self.deaths[index]
            reference = self.attempt.remote(self.setup, pickle.dumps(self.tasks[index]), key, self.mailbox)
            self.running[reference] = key

    def _read_mail(self) -> None:
        """Letters of tries that are not running any more are thrown away: their counts have been taken back."""
        alive = set(self.running.values())
        for key, kind, *content in self.ray.get(self.mailbox.take.remote()):
            if kind == "log":
                repeat_record(self.said, *content)
            elif key in alive and kind == "begin":
                self.names[key] = name = content[0]
                self.board.joined(name)
                self.board.began(name, self.tasks[key[0]].label)
            elif key in self.names and key in alive:
                self.board.tick(self.names[key], Tick(*content))

    def _outcome(self, reference: Any, key: tuple[int, int]) -> Any:
        """The result; None after a death that is forgiven. Raises what the task raised, or RuntimeError after the last."""
        index, label = key[0], self.tasks[key[0]].label
        name = self.names.get(key, "a worker that never began")
        try:
            kind, *content = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:  # not by the task, which sends its own: by what is around it
            raise RuntimeError(f"task {label}: Ray could not begin it on {name} ({error.cause!r}); every machine of the "
                               "cluster needs ettin_foundry and the module of each filter, in the same versions. Install "
                               "them there") from error
        except self.ray.exceptions.RayError as error:
            where = self.board.lost(name) or "an unknown file"
            how = f"{type(error).__name__} ({str(error).splitlines()[0][:200] if str(error) else 'no message'})"
            self.deaths[index] += 1
            if self.deaths[index] >= self.tries:
                raise death_error(label, where, how, self.deaths[index]) from error
            log.warning("worker %s died (%s) in %s; its task %s begins again, try %d of %d", name, how, plain(where), label,
                        self.deaths[index] + 1, self.tries)
            return None
        if kind == "error":
            raise_sent(*content, where=f"worker {name}, task {label}")
        return pickle.loads(content[0])

    def stop(self) -> None:
        """Ends what still runs: first politely, so that half-written files go."""
        for reference in self.running:
            self.ray.cancel(reference, force=False)
        if self.running:
            running = list(self.running)
            _, left = self.ray.wait(running, num_returns=len(running), timeout=_GRACE_SECONDS)
            for reference in left:
                self.ray.cancel(reference, force=True)
        self.ray.kill(self.mailbox)
        for name in self.names.values():
            self.board.lost(name)


def run_try(setup: bytes, task: bytes, key: tuple[int, int], mailbox: Any) -> tuple[Any, ...]:
    """Runs in a Ray worker: one try of one task.

    Args:
        setup, task: pickles. key: (task, try), on every letter. mailbox: the actor that the driver reads.

    Returns:
        ("done", pickled result), or ("error", ...) as `describe_error` gives it.
    """
    import ray

    for variable, value in ONE_CORE.items():
        os.environ.setdefault(variable, value)
    last: list[Any] = []

    def send(kind: str, *content: Any) -> None:
        last[:] = [mailbox.put.remote(key, kind, *content)]
        if kind != "log":  # where a worker was is wanted most when it dies the next moment
            ray.wait(last, timeout=_GRACE_SECONDS)

    send("begin", f"{os.getpid()} on {socket.gethostname()}")
    try:
        work, level = pickle.loads(setup)
        root = logging.getLogger()
        root.setLevel(level)
        root.handlers[:] = [SendRecords(send)]
        result = work(pickle.loads(task), lambda tick: send("tick", *tick))
        outcome: tuple[Any, ...] = "done", pickle.dumps(result)
    except Exception as error:
        outcome = "error", *describe_error(error)
    ray.wait(last, timeout=_GRACE_SECONDS)  # letters of one sender arrive in order: with the last all are there
    return outcome
