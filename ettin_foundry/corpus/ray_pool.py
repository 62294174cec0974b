"""The workers of executors.py on a Ray cluster, whose machines can import the package, in the same version.

Ray starts processes and carries pickles. Its own retries are off: they would be neither counted nor logged.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

from ettin_foundry.corpus.executors import ONE_CORE, Key, WorkerLost, sendable

__all__ = ["RayPool"]

_CONNECT_SECONDS = 10.0
_GRACE_SECONDS = 3.0
_STORE_BYTES = 80 << 20  # about the least that Ray takes


class RayPool:
    """Workers of one CPU each on a Ray cluster; the methods are those of `executors._LocalPool`.

    Takes the Ray of this process, the cluster at `address` (as of `ray.init`) or RAY_ADDRESS, or starts one with
    `workers` CPUs here and stops it at the end. Raises ValueError without Ray, ConnectionError without a cluster.
    """

    def __init__(self, work: Any, workers: int, address: str | None) -> None:
        try:
            self.ray: Any = importlib.import_module("ray")
            queues: Any = importlib.import_module("ray.util.queue")
        except ImportError as error:
            raise ValueError(f"--executor must be local, or ray where that is installed ({error}): "
                             "pip install 'ettin-foundry[ray]'") from error
        self.begun_here = not self.ray.is_initialized()
        if self.begun_here:
            self._connect(workers, address or os.environ.get("RAY_ADDRESS"))
        self.setup = self.ray.put(pickle.dumps(work))
        self.mail = queues.Queue(actor_options={"num_cpus": 0})
        self.attempt = self.ray.remote(num_cpus=1, max_retries=0)(_attempt)
        self.references: dict[Future[Any], Any] = {}

    def _connect(self, workers: int, address: str | None) -> None:
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "num_cpus": workers, "include_dashboard": False,
            "object_store_memory": _STORE_BYTES}
        try:
            host, _, port = (address or "").removeprefix("ray://").rpartition(":")
            if host and port.isdecimal():  # else Ray would try for minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
            self.ray.init(**options, logging_level=logging.WARNING)
        except Exception as error:  # a bare Exception where starting takes too long
            raise ConnectionError("--ray-address must be HOST:PORT of a running cluster's head, auto on one of "
                                  f"its machines, or left out to start Ray, got {address}: {error}") from error

    def submit(self, task: Any, key: Key) -> Future[Any]:
        reference = self.attempt.remote(self.setup, pickle.dumps(task), key, self.mail)
        future = reference.future()
        self.references[future] = reference
        return future

    def result(self, future: Future[Any]) -> Any:
        del self.references[future]
        try:
            return pickle.loads(future.result())
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            raise WorkerLost(f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}") from error

    def ticks(self) -> Iterator[Any]:
        while number := self.mail.qsize():
            yield from self.mail.get_nowait_batch(number)

    def stop(self) -> None:
        try:
            references = list(self.references.values())
            for force in (False, True):  # first without force, so that half-written files go
                for reference in references:
                    self.ray.cancel(reference, force=force)
                if references and not force:
                    self.ray.wait(references, num_returns=len(references), timeout=_GRACE_SECONDS)
            self.mail.shutdown(force=True)
        finally:
            if self.begun_here:
                self.ray.shutdown()


def _attempt(setup: bytes, task: bytes, key: Key, mail: Any) -> bytes:
    """Does a task in a process of Ray's."""
    for name, value in ONE_CORE.items():
        os.environ.setdefault(name, value)

    try:
        return pickle.dumps(pickle.loads(setup)(pickle.loads(task), lambda tick: mail.put_nowait((key, tick))))
    except Exception as error:
        raise sendable(error) from error.__cause__
