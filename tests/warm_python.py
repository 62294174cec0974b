"""An interpreter that has imported everything, and forks a copy for each program: a start costs 10 ms instead of 5 s.

Tests that start and kill conversions dozens of times use it. What it starts are processes like any other: with arguments,
environment, working folder, output and process group of their own; they can be killed, and their end is noticed.

`shared()` gives the one of this test run. As a program, `python warm_python.py SOCKET ARGUMENTS...` does what `python
ARGUMENTS...` would, by way of the warm interpreter that listens there; if it is killed, what it has started is killed too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("ettin_foundry.corpus.convert", "ettin_foundry.cli.data", "ettin_foundry.corpus.finalize", "ettin_foundry.corpus.card",  # noqa: E501
           "transformers.tokenization_utils_fast", "transformers.models.auto.tokenization_auto", "matplotlib.figure",
           "matplotlib.backends.backend_svg", "typer")


class Program:
    """A program that runs; `pid` is also its process group."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self.pid = int(self._receive(None) or 0)
        self.status: int | None = None

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit status, -N after signal N; None if it still runs after `seconds`."""
        if self.status is None and (line := self._receive(seconds)) is not None:
            self.status = int(line)
        return self.status

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        """Signals the program and all that it has started."""
        os.killpg(self.pid, number)

    def _receive(self, seconds: float | None) -> bytes | None:
        self._link.settimeout(seconds)
        try:
            return self._link.recv(32)
        except TimeoutError:
            return None


class WarmPython:
    """A running warm interpreter. `path` is its socket."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self.path = self.folder / "socket"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen([sys.executable, __file__, "--serve", str(self.path)], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.read(1) == b"r", "it could not start"

    def start(self, arguments: Sequence[str | Path], *, cwd: Path, log: Path) -> Program:
        """Starts what `python ARGUMENTS` would. Output and errors are added to `log`."""
        with open(log, "ab") as file, open(os.devnull, "rb") as nothing:
            return _start(self.path, [str(argument) for argument in arguments], str(cwd), dict(os.environ),
                          [nothing.fileno(), file.fileno(), file.fileno()])

    def interpreter(self) -> Path:
        """An executable to be used in place of `python`."""
        path = self.folder / "python"
        path.write_text(f"#!/bin/sh\nexec '{sys.executable}' -S '{__file__}' '{self.path}' \"$@\"\n")
        path.chmod(0o755)
        return path

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.lru_cache(maxsize=1)
def shared() -> WarmPython:
    """The one of this process, started when it is first asked for."""
    warm = WarmPython()
    atexit.register(warm.close)
    return warm


def _start(path: Path, arguments: list[str], cwd: str, environment: dict[str, str], descriptors: list[int]) -> Program:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.connect(str(path))
    request = tempfile.TemporaryFile()  # a message has a largest size, an environment has not
    request.write(json.dumps([arguments, cwd, environment]).encode())
    request.flush()
    socket.send_fds(link, [b"start"], [request.fileno(), *descriptors])
    return Program(link)


def _serve(path: str) -> None:
    """Forks until its own parent is gone."""
    for module in MODULES:
        __import__(module)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        running: dict[int, socket.socket] = {}
        os.write(1, b"r")
        while True:
            for key, _ in selector.select(0.005):
                if key.fileobj == 0:
                    return
                if key.fileobj is listener:
                    link, _ = listener.accept()
                    pid = _fork(link, [listener, *running.values()])
                    running[pid] = link
                    selector.register(link, selectors.EVENT_READ, pid)
                    link.send(str(pid).encode())
                else:  # who asked for it is gone
                    selector.unregister(key.fileobj)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(key.data, signal.SIGKILL)
            for pid in list(running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    link = running.pop(pid)
                    with link, contextlib.suppress(KeyError, OSError):
                        selector.unregister(link)
                        link.send(str(os.waitstatus_to_exitcode(status)).encode())


def _fork(link: socket.socket, others: list[socket.socket]) -> int:
    """Forks the program that is asked for on `link`; its pid."""
    _, descriptors, _, _ = socket.recv_fds(link, 16, 4)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    try:
        os.setsid()
        for other in (link, *others):
            other.close()
        with os.fdopen(descriptors[0], "rb") as request:
            request.seek(0)
            arguments, cwd, environment = json.loads(request.read())
        for number, descriptor in enumerate(descriptors[1:]):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        status = _run(arguments)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(arguments: list[str]) -> int:
    """What the interpreter does with its arguments, which are SCRIPT ... or -m MODULE ...; the exit status."""
    try:
        if arguments[0] == "-m":
            sys.argv[:] = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(end.code + "\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _main(arguments: list[str]) -> int:
    if arguments[0] == "--serve":
        _serve(arguments[1])
        return 0
    program = _start(Path(arguments[0]), arguments[1:], os.getcwd(), dict(os.environ), [0, 1, 2])
    signal.signal(signal.SIGTERM, lambda *_: program.kill_all(signal.SIGTERM))
    return program.wait() or 0


if __name__ == "__main__":
    status = _main(sys.argv[1:])
    sys.exit(status if status >= 0 else 128 - status)
