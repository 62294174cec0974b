"""Conversions that are killed with SIGKILL again and again until they come to their end; a test and a benchmark use it.

Programs are forked from a server that has imported everything, so that a start costs 10 ms instead of 5 s.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import CHUNK_LENGTH
from converting import files_of, stored

FLAGS = ["--chunk-length", str(CHUNK_LENGTH), "--validation", "0.1", "--shard-size", "8kb", "--unit-size", "2kb"]
Steps = Sequence[Sequence[Sequence[str]]]  # one after another, each of programs that run at the same time


def scenarios(corpus: Path, more: Path, tokenizer: Path) -> dict[str, Steps]:
    """Ways to convert; `{out}` is the dataset."""
    one = [f"texts={corpus}", "--tokenizer", str(tokenizer), "--out", "{out}", *FLAGS]
    two = [f"more={more}", "--tokenizer", str(tokenizer), "--out", "{out}", *FLAGS, "--append"]
    return {"one process": [[[*one, "--workers", "1"]]],
            "two workers": [[[*one, "--workers", "2"]]],
            "compressed": [[[*one, "--workers", "2", "--compression", "zstd"]]],
            "array": [[[*one, "--workers", "1", "--task-index", task, "--num-tasks", "2"] for task in "01"],
                      [["finalize", "{out}"]]],
            "append": [[[*one, "--workers", "2"]], [[*two, "--workers", "2"]]]}


def _program(words: list[str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from ettin_foundry.cli.main import main

    main(words if words[0] == "finalize" else ["convert", *words])


class Killer:
    """Runs scenarios, undisturbed once and then killed: all processes, the main process alone, or one worker."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.seconds = folder, random.Random(seed), dict[str, float]()
        self.killed, self.conversions = Counter[str](), 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([
            "ettin_foundry.cli.main", "ettin_foundry.corpus.convert", "transformers.models.auto.tokenization_auto"])
        first = self.context.Process(target=int)  # when it has ended, the server has imported everything
        first.start()
        first.join()

    def undisturbed(self, name: str, steps: Steps) -> int:
        """Converts without killing; the number of documents."""
        begin = time.monotonic()
        assert all(self._ended(self._start(step, self.folder / f"whole-{name}")) for step in steps)
        self.seconds[name] = (time.monotonic() - begin) / len(steps)
        return len(_ids(self.folder / f"whole-{name}"))

    def convert(self, name: str, steps: Steps, most_kills: int) -> list[str]:
        """Converts with at most so many kills; files that differ and documents lost or doubled."""
        out, whole = self.folder / "killed", self.folder / f"whole-{name}"
        limit = self.killed.total() + most_kills
        for step in steps:
            while not self._try(step, out, 0.6 * self.seconds[name], limit):
                pass
        self.conversions += 1
        found, wanted, files, expected = _ids(out), _ids(whole), files_of(out), files_of(whole)
        shutil.rmtree(out)
        return [*(n for n in sorted(files.keys() | expected.keys()) if files.get(n) != expected.get(n)),
                *(f"lost {n}" for n in Counter(wanted) - Counter(found)),
                *(f"doubled {n}" for n in Counter(found) - Counter(wanted))]

    def _try(self, step: Sequence[Sequence[str]], out: Path, most_seconds: float, limit: int) -> bool:
        """One start of a step; whether it came to its end."""
        programs, worker_kills = self._start(step, out), 0
        while self.killed.total() < limit:
            end = time.monotonic() + self.rng.uniform(0, most_seconds)
            for program in programs:
                program.join(max(0.0, end - time.monotonic()))
            if not any(program.is_alive() for program in programs):
                break
            what = self.rng.choice(("all", "all", "main", "worker", "worker"))
            workers = [pid for program in programs for pid in running(program.pid) if pid != program.pid]
            with contextlib.suppress(ProcessLookupError):
                if what == "worker" and workers and not worker_kills:  # which ends the program by an error
                    worker_kills += 1
                    os.kill(self.rng.choice(workers), signal.SIGKILL)
                    self.killed["worker"] += 1
                    continue
                for program in [self.rng.choice(programs)] if what == "main" else programs:
                    (os.kill if what == "main" else os.killpg)(program.pid, signal.SIGKILL)
            self.killed["main" if what == "main" else "all"] += 1
            break
        return self._ended(programs)

    def _start(self, step: Sequence[Sequence[str]], out: Path) -> list[Any]:
        programs = [self.context.Process(target=_program, args=(
            [word.replace("{out}", str(out)) for word in words], str(self.folder / "log"))) for words in step]
        for program in programs:
            program.start()
        return programs

    def _ended(self, programs: Sequence[Any]) -> bool:
        """Waits for all of them, and for what they started; whether all succeeded."""
        for program in programs:
            program.join()
        statuses = {program.exitcode for program in programs}
        log = (self.folder / "log").read_text()[-3000:] if statuses - {0, -signal.SIGKILL} else ""
        assert statuses <= {0, 1, -signal.SIGKILL} and (1 not in statuses or "a worker died" in log), log
        end = time.monotonic() + 30  # a worker that is still starting looks for its parent afterwards
        while left := [pid for program in programs for pid in running(program.pid)]:
            assert time.monotonic() < end, f"processes {left} are left over"
            time.sleep(0.05)
        return statuses == {0}


def _ids(out: Path) -> list[str]:
    return [name for split in ("train", "validation") for name in stored(out / split)]


def running(group: int) -> list[int]:
    """Processes of a process group; zombies do not count."""
    listed = subprocess.run(["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(pid) for own, pid, state in rows if own == str(group) and not state.startswith("Z")]
