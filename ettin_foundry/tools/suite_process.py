"""The process of one stage: started, watched, and ended with all that it started, whatever happens to us.

Its output goes to suite.log in the stage's folder; how far it is, is read from the steps.jsonl that every run writes. Which
stages run, and in which order, is in suite_run.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ettin_foundry.tools.suite import Stage
from ettin_foundry.training.checks import parse_time
from ettin_foundry.training.steps import STEPS

__all__ = ["LOG", "Stopped", "run_process", "say", "signals", "time_text"]

LOG = "suite.log"  # in each stage's folder
_POLL_SECONDS = 0.25
_TOLD_SECONDS = 10.0  # between lines where there is no terminal: silence looks like a hang
_STOP_SECONDS = 40.0  # Composer's launcher gives its processes 30 s to end
_SPEED_STEPS = 20


class Stopped(KeyboardInterrupt):
    """This process was told to end. Attributes: signum."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM, which schedulers send, raise `Stopped`."""
    def stop(signum: int, _: Any) -> None:
        raise Stopped(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_process(stage: Stage, words: Sequence[str], title: str) -> str | None:
    """Trains a stage in a process of its own, and leaves only when that has ended.

    Args:
        words: its command line. title: what the line that shows its progress begins with.

    Returns:
        None if it ended with 0, else how it ended and the lines of its log that say why.

    Raises:
        ValueError: another process trains in the stage's folder, or the command cannot be started.
        Stopped: this process was told to end; the stage's was ended before.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    path = stage.folder / LOG
    with _locked(stage) as lock, path.open("ab") as output:
        output.write(f"\n$ {shlex.join(words)}\n".encode())
        output.flush()
        begin = output.tell()
        # the commands of this Python's environment first, whether or not it is activated
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                       env={**os.environ, "PATH": places}, start_new_session=True, pass_fds=[lock])
        except OSError as error:
            raise ValueError(f"command: {words[0]!r} cannot be started ({error}). Correct the suite's command") from error
        try:
            _watch(process, stage, title)
        finally:
            _end(process)
    if process.returncode == 0:
        return None
    how = (f"exit code {process.returncode}" if process.returncode > 0 else
           f"ended by {signal.Signals(-process.returncode).name}")
    return f"{how}; {path}:\n{_reason(path, begin)}"


@contextlib.contextmanager
def _locked(stage: Stage) -> Iterator[int]:
    """A lock on the stage's folder. The process inherits it, so that it holds as long as that lives, whatever becomes of us.
    """
    with (stage.folder / ".suite.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"stages.{stage.name}: another process trains in {stage.folder}. Wait for it, or end "
                             "it") from None
        yield file.fileno()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started: asked first, then made to."""
    for signum, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


_ERROR = re.compile(r"(error: |[A-Za-z_.]*(Error|Exception|Interrupt)\b)")


def _reason(path: Path, begin: int, most: int = 12) -> str:
    """The lines of a log that say why its process ended: the last error if there is one, else the last lines.

    Args:
        begin: place in the file where this process's lines begin. most: lines.
    """
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - 1_000_000))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if _ERROR.match(line)]
    chosen = lines[errors[-1]:errors[-1] + most] if errors else lines[-most:]
    return "\n".join("  " + line[:2000] for line in chosen) or "  it is empty"


# ------------------------------------------------------------------ what people see


def _watch(process: subprocess.Popen[bytes], stage: Stage, title: str) -> None:
    """Shows one line about the stage until its process ends."""
    from rich.console import Console

    console = Console(stderr=True)
    amount, unit = parse_time("max_duration", stage.config()["max_duration"])
    steps, told, said = _Steps(stage.folder / STEPS), time.monotonic(), ""
    with console.status(f"{title}: starting") if console.is_terminal else contextlib.nullcontext() as status:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            line = f"{title}: {steps.line(amount, unit)}"
            if status is not None:
                status.update(line)
            elif line != said and time.monotonic() - told >= _TOLD_SECONDS:
                told, said = time.monotonic(), line
                say(line)


class _Steps:
    """What has been written to a steps.jsonl since this was made; it may be cut off meanwhile, when a run resumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = path.stat().st_size if path.exists() else 0
        self.last: deque[dict[str, Any]] = deque(maxlen=_SPEED_STEPS)

    def line(self, amount: float, unit: str) -> str:
        """How far, how fast, how long still; amount in `unit` (tok or ba)."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self.place if self.path.stat().st_size >= self.place else 0)
                for text in file.read().split(b"\n")[-_SPEED_STEPS:]:
                    with contextlib.suppress(ValueError):  # begun or ended in the middle of a line
                        self.last.append(json.loads(text))
                self.place = file.tell()
        if not self.last:
            return "starting"
        now, first = self.last[-1], self.last[0]
        seconds = sum(step["seconds"] for step in list(self.last)[1:])
        speed = (now["tokens"] - first["tokens"]) / seconds if seconds else 0.0
        share = (now["tokens"] if unit == "tok" else now["step"]) / amount
        left = f", {time_text((1 - share) / share * now['tokens'] / speed)} left" if speed and share else ""
        return (f"{share:4.0%}, {now['tokens']:,} tokens, {speed:,.0f} tokens/s, loss {now['loss']:.3f} ({now['objective']})"
                f"{left}")


def time_text(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say(text: str) -> None:
    """One line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)
