"""What one worker process of pool.py runs: takes tasks from its socket, does them, sends back what happens.

It ends when its parent does, whatever becomes of that: the kernel sees to it on Linux, a thread elsewhere. SIGTERM leaves
through `finally` blocks, so that half-written files go; SIGUSR1 prints the stack. Ctrl-C is the parent's business.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from ettin_foundry.corpus.progress import Tick

__all__ = ["HEADER", "ONE_CORE", "SendRecords", "describe_error", "serve"]

HEADER = struct.Struct("<Q")
"""Before each message: the number of its bytes, a pickle."""
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false"}
"""Environment of a worker, where the user has not set these: there is a worker for each core."""

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
_LOOK_SECONDS = 1.0


class _Terminated(SystemExit):
    """SIGTERM, or a parent that is gone."""


class _Link:
    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._stream = self._socket.makefile("rb")
        self._lock = threading.Lock()

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: there is none any more.
        """
        header = self._stream.read(HEADER.size)
        size = HEADER.unpack(header)[0] if len(header) == HEADER.size else 0
        content = self._stream.read(size)
        if not size or len(content) < size:
            raise EOFError
        return pickle.loads(content)

    def send(self, *message: Any) -> None:
        content = pickle.dumps(message)
        try:
            with self._lock:
                self._socket.sendall(HEADER.pack(len(content)) + content)
        except OSError as error:
            raise _Terminated from error

    def report(self, tick: Tick) -> None:
        self.send("tick", tick)


class SendRecords(logging.Handler):
    """Log records go to the parent's logging: one log, in which a live picture is not torn.

    Args:
        send: called as send("log", name of the logger, level, text).
    """

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send("log", record.name, record.levelno, self.format(record))


def serve(descriptor: int, parent: int) -> None:
    """Runs the worker until the parent closes the socket.

    Args:
        descriptor: of the socket. parent: process id; the worker ends when that is not its parent any more.
    """
    os.set_inheritable(descriptor, False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGTERM, _on_terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _end_with(parent)
    link = _Link(descriptor)
    try:
        _serve(link)
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # so that the exit status tells


def _serve(link: _Link) -> None:
    try:
        try:
            work, level = link.receive()
        except EOFError:
            return
        except Exception as error:
            raise ValueError(f"work: a worker cannot load it ({type(error).__name__}: {error}); workers are fresh "
                             "interpreters and do not run the script. Functions and classes must be at the top of an "
                             "importable module") from error
        root = logging.getLogger()
        root.setLevel(level)
        root.handlers[:] = [SendRecords(link.send)]
        link.send("ready")
        while True:
            try:
                task = link.receive()
            except EOFError:
                return
            link.send("done", work(task, link.report))
            del task
    except Exception as error:
        link.send("error", *describe_error(error))


def describe_error(error: Exception) -> tuple[bytes | None, str, str, str]:
    """The exception as a pickle, None where that is not possible; its type's name, its message, its traceback."""
    try:
        pickled = pickle.dumps(error)
    except Exception:
        pickled = None
    return pickled, type(error).__name__, str(error), "".join(traceback.format_exception(error))


def _on_terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _end_with(parent: int) -> None:
    """Arranges that this process ends at once when its parent is gone, even if killed with -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    if os.getppid() != parent:  # it was gone before the line above
        os._exit(1)
    threading.Thread(target=watch, name="parent", daemon=True).start()
