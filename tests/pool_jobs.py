"""Work for the tests of pool.py and ray_pool.py: workers import it by name, as they do a converter's."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from ettin_foundry.corpus.executors import Report
from ettin_foundry.corpus.progress import Tick

log = logging.getLogger("pool_jobs")


class Job(NamedTuple):
    """One task; `folder` is where it leaves traces, `text` what it may need."""

    number: int
    folder: str = ""
    text: str | bytes = ""

    @property
    def label(self) -> str:
        return f"job-{self.number}"

    def trace(self, kind: str) -> int:
        """Leaves a file of a new name; how many of that kind this job has left."""
        before = len(list(Path(self.folder).glob(f"{kind}.{self.number}.*")))
        (Path(self.folder) / f"{kind}.{self.number}.{before}.{os.getpid()}").touch()
        return before + 1


def square(job: Job, report: Report) -> int:
    report(Tick(1, 10, 100, 1000, f"file-{job.number}"))
    return job.number ** 2


def leaving_word(job: Job, report: Report) -> int:
    job.trace("over")
    return job.number ** 2


def in_steps(job: Job, report: Report) -> tuple[int, int]:
    for _ in range(5):
        time.sleep(0.004)
        report(Tick(1, 10, 100, 1000, f"file-{job.number}"))
    return job.number ** 2, os.getpid()


def dying(job: Job, report: Report) -> int:
    """Job 3 kills its worker as `text` says, each time; job 5 only the first time."""
    report(Tick(1, 10, 100, 1000, f"file-{job.number}"))
    if job.number == 3 or (job.number == 5 and job.trace("death") == 1):
        job.trace("try")
        if str(job.text).startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, str(job.text)))
            time.sleep(5)
        os._exit(int(job.text))
    return job.number ** 2


def leaving_a_child(job: Job, report: Report) -> int:
    """Dies the first time, while a child of its own keeps the worker's socket open."""
    if job.number == 1 and job.trace("death") == 1:
        if os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        os._exit(9)
    return job.number ** 2


def dying_afterwards(job: Job, report: Report) -> int:
    """Is done, and the first time kills its worker shortly after that."""
    if job.trace("done") == 1:
        threading.Timer(0.03, os._exit, (9,)).start()
    return job.number ** 2


class Awkward(Exception):
    """Cannot be unpickled: its argument is not the one that it was made with."""

    def __init__(self, number: int) -> None:
        super().__init__(f"awkward {number:d}")


def raising(job: Job, report: Report) -> int:
    """Job 2 raises when job 0 is under way; the others say in their folder when they were ended tidily."""
    report(Tick(1, 10, 100, 1000, f"file-{job.number}"))
    if job.number == 2:
        while job.text != "alone" and not list(Path(job.folder).glob("begun.0.*")):
            time.sleep(0.01)
        time.sleep(0.1)
        if job.text == "awkward":
            raise Awkward(7)
        if job.text == "unpicklable":
            return lambda: None  # type: ignore[return-value]
        raise FileNotFoundError(2, "no such corpus", "/data/corpus.jsonl")
    try:
        job.trace("begun")
        for _ in range(400):  # Ray cannot interrupt one long sleep
            time.sleep(0.05)
        return 0
    finally:
        job.trace("tidied")


def sleeping(job: Job, report: Report) -> int:
    report(Tick(where=f"file-{job.number}"))
    Path(job.folder, f"pid.{os.getpid()}").touch()
    time.sleep(20)
    return 0


def standing_still(job: Job, report: Report) -> int:
    """Job 1 hangs the first time: asleep, or stopped so that it cannot even say where it is."""
    report(Tick(1, 10, 100, 1000, f"file-{job.number}"))
    if job.number == 1 and job.trace("hang") == 1:
        if job.text == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1.2 if job.text == "slow" else 20)
    return job.number ** 2


def logging_and_modules(job: Job, report: Report) -> tuple[float, list[str], dict[str, str]]:
    begun = time.time()
    log.debug("unheard %d", job.number)
    log.info("job %d\nsays so", job.number)
    log.info("all say so")
    try:
        raise ValueError("of the worker")
    except ValueError:
        log.warning("caught", exc_info=True)
    return begun, sorted(sys.modules), dict(os.environ)


def echo(job: Job, report: Report) -> bytes:
    return bytes(job.text)[::-1]  # type: ignore[arg-type]


def with_helper(job: Job, report: Report) -> str:
    """A task may use processes of its own, and Ctrl-C reaches these."""
    program = "import signal; print(signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
