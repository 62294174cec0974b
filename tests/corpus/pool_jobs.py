"""Tasks for the tests of executors.py; workers import this module."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ettin_foundry.corpus.executors import Report, Tick


class Job(NamedTuple):
    """One task; `folder` is where it leaves traces, `text` what it may need."""

    number: int
    folder: str = ""
    text: str = ""

    @property
    def label(self) -> str:
        return f"job-{self.number}"


def jobs(number: int, folder: Path | str = "", text: str = "") -> list[Job]:
    return [Job(n, str(folder), text) for n in range(number)]


def in_steps(job: Job, report: Report) -> int:
    for n in range(1, 6):
        time.sleep(0.004)
        report(Tick(n, 10 * n, 100 * n, 1000 * n))
    return job.number ** 2


def dying(job: Job, report: Report) -> int:
    """Job 3 kills its worker."""
    report(Tick(1, 10, 100, 1000))
    if job.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number ** 2


class Awkward(Exception):
    """Cannot be unpickled: its argument is not the one that it was made with."""

    def __init__(self, number: int) -> None:
        super().__init__(f"awkward {number:d}")


def raising(job: Job, report: Report) -> int:
    """Job 2 raises when job 0 is under way."""
    report(Tick())
    if job.number == 2:
        while not list(Path(job.folder).glob("begun.0.*")):
            time.sleep(0.01)
        if job.text == "awkward":
            raise Awkward(7)
        if job.text == "unpicklable":
            return lambda: None  # type: ignore[return-value]
        raise FileNotFoundError(2, "no such corpus", "/data/corpus.jsonl")
    Path(job.folder, f"begun.{job.number}.{os.getpid()}").touch()
    for _ in range(400):
        time.sleep(0.05)
    return 0


def looking_around(job: Job, report: Report) -> tuple[list[str], dict[str, str]]:
    return sorted(sys.modules), dict(os.environ)
