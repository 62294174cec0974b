"""Conversions that are killed with SIGKILL again and again until they come to their end; a test and a benchmark use it.

Programs are forked from a server that has imported everything, so that a start costs 10 ms instead of 5 s.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from conftest import CHUNK_LENGTH, make_documents
from converting import files_of, stored
from pyarrow import parquet

FLAGS = ["--chunk-length", str(CHUNK_LENGTH), "--validation", "0.1", "--shard-size", "8kb", "--unit-size", "2kb"]


def write_mixed_corpus(folder: Path, *, documents: int, seed: int = 3) -> list[str]:
    """Six files of five kinds, some of them of many units, with a few texts that come twice; all texts."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    texts: list[str] = []
    for number in range(6):
        found = make_documents(documents, seed=100 * seed + number, longest=80)
        found += rng.sample(texts or found, max(1, documents // 20))
        records = [{"id": f"{folder.name}-{number}-{index}", "text": text} for index, text in enumerate(found)]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        path = folder / f"{folder.name}-{number}"
        if number == 2:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines))
        elif number == 3:
            found = [found[0]]
            path.with_suffix(".txt").write_text(found[0], encoding="utf-8")
        elif number == 4:
            parquet.write_table(pyarrow.Table.from_pylist(records), path.with_suffix(".parquet"))
        elif number == 5:
            path.with_suffix(".jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
        else:
            path.with_suffix(".jsonl").write_bytes(lines)
        texts += found
    return texts


def scenarios(corpus: Path, more: Path, tokenizer: Path) -> dict[str, list[list[list[str]]]]:
    """Name -> steps one after another, each of programs at the same time. `{out}` is the dataset."""
    one = [f"texts={corpus}", "--tokenizer", str(tokenizer), "--out", "{out}", *FLAGS]
    two = [f"more={more}", "--tokenizer", str(tokenizer), "--out", "{out}", *FLAGS, "--append"]
    return {"one process": [[[*one, "--workers", "1"]]],
            "two workers": [[[*one, "--workers", "2"]]],
            "unique": [[[*one, "--workers", "2", "--deduplicate", "--compression", "zstd"]]],
            "array": [[[*one, "--workers", "1", "--task-index", task, "--num-tasks", "2"] for task in "01"],
                      [["finalize", "{out}"]]],
            "append": [[[*one, "--workers", "2"]], [[*two, "--workers", "2"]]]}


def _program(words: list[str], log: str) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from ettin_foundry.cli.convert import main
    from ettin_foundry.corpus.finalize import finalize

    sys.exit(main(words) if words[0] != "finalize" else finalize(words[1]) and 0)


@dataclass
class Tally:
    """What happened, and what was wrong."""

    killed: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    conversions: int = 0
    lost: int = 0
    doubled: int = 0
    differing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (f"{self.killed.total()} kills {dict(self.killed)}, {self.starts} starts, {self.conversions} conversions: "
                f"{self.lost} documents lost, {self.doubled} doubled, {len(self.differing)} files differ")


class Killer:
    """Runs scenarios, undisturbed once and then killed: all processes, the main process alone, or one worker.

    Args:
        folder: for the datasets and their log. seed: of the lots.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.tally = folder, random.Random(seed), Tally()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["ettin_foundry.cli.convert", "ettin_foundry.corpus.card", "matplotlib.figure",
                                             "transformers.models.auto.tokenization_auto"])
        first = self.context.Process(target=int)
        first.start()
        first.join()  # the server has imported everything
        self.seconds: dict[str, float] = {}

    def undisturbed(self, name: str, steps: list[list[list[str]]]) -> int:
        """Converts without killing; the number of documents."""
        begin = time.monotonic()
        for step in steps:
            programs = self._start(step, self.folder / f"whole-{name}")
            assert self._ended(programs), (self.folder / "log").read_text()[-3000:]
        self.seconds[name] = (time.monotonic() - begin) / len(steps)
        return self._ids(self.folder / f"whole-{name}").total()

    def convert(self, name: str, steps: list[list[list[str]]], most_kills: int) -> None:
        """Converts with at most so many kills, and compares every file and document with the undisturbed ones."""
        out, whole = self.folder / "killed", self.folder / f"whole-{name}"
        limit = self.tally.killed.total() + most_kills
        for step in steps:
            while not self._try(step, out, 0.6 * self.seconds[name], limit):
                pass
        self.tally.conversions += 1
        found, wanted = self._ids(out), self._ids(whole)
        self.tally.lost += (wanted - found).total()
        self.tally.doubled += (found - wanted).total()
        files, expected = files_of(out), files_of(whole)
        self.tally.differing += [n for n in sorted(files.keys() | expected.keys()) if files.get(n) != expected.get(n)]
        shutil.rmtree(out)

    def _try(self, step: list[list[str]], out: Path, most_seconds: float, limit: int) -> bool:
        """One start of a step; whether it came to its end."""
        programs = self._start(step, out)
        worker_kills = 0
        while self.tally.killed.total() < limit:
            end = time.monotonic() + self.rng.uniform(0, most_seconds)
            for program in programs:
                program.join(max(0.0, end - time.monotonic()))
            if not any(program.is_alive() for program in programs):
                break
            what = self.rng.choice(("all", "all", "main", "worker", "worker"))
            workers = [pid for program in programs for pid in _children(program.pid)]
            with contextlib.suppress(ProcessLookupError):
                if what == "worker" and workers and worker_kills < 2:  # the third in one task would rightly end it
                    worker_kills += 1
                    os.kill(self.rng.choice(workers), signal.SIGKILL)
                    self.tally.killed["worker"] += 1
                    continue
                for program in [self.rng.choice(programs)] if what == "main" else programs:
                    (os.kill if what == "main" else os.killpg)(program.pid, signal.SIGKILL)
            self.tally.killed["main" if what == "main" else "all"] += 1
            break
        return self._ended(programs)

    def _start(self, step: list[list[str]], out: Path) -> list[Any]:
        self.tally.starts += 1
        programs = []
        for words in step:
            arguments = [word.replace("{out}", str(out)) for word in words], str(self.folder / "log")
            programs.append(self.context.Process(target=_program, args=arguments))
            programs[-1].start()
        return programs

    def _ended(self, programs: Sequence[Any]) -> bool:
        """Waits for all of them, and for what they started; whether all succeeded."""
        for program in programs:
            program.join()
        statuses = {program.exitcode for program in programs}
        assert statuses <= {0, -signal.SIGKILL}, (self.folder / "log").read_text()[-3000:]
        end = time.monotonic() + 5
        while left := [pid for program in programs for pid in _group(program.pid)]:
            assert time.monotonic() < end, f"processes {left} are left over"
            time.sleep(0.01)
        return statuses == {0}

    @staticmethod
    def _ids(out: Path) -> Counter[str]:
        return Counter(name for split in ("train", "validation") for name in stored(out / split))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _group(group: int) -> list[int]:
    """Processes of a process group that run; zombies do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, itself, *_ = path.read_text().rpartition(")")[2].split()
            if int(itself) == group and state != "Z":
                found.append(int(path.parent.name))
    return found
