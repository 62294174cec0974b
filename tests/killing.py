"""Conversions that are killed with SIGKILL again and again until they come to their end; tests and a benchmark use it.

What is compared in the end: every file of the set with those of a conversion that nobody disturbed, and the documents in it
with those that were written into the corpus. Killed is, by lot, everything that runs, the main process alone, or one worker
process; the last must not even end the conversion.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import zstandard
from conftest import CHUNK_LENGTH, make_documents
from converting import files_of, stored
from pyarrow import parquet
from warm_python import Program, WarmPython

ROOT = Path(__file__).resolve().parent.parent
CONVERT = [str(ROOT / "data_prep" / "convert.py")]
FINALIZE = ["-m", "ettin_foundry.cli.main", "finalize"]
FLAGS = ["--chunk-length", str(CHUNK_LENGTH), "--validation", "0.1", "--shard-size", "8kb", "--unit-size", "2kb"]


def write_mixed_corpus(folder: Path, *, documents: int, seed: int = 3) -> list[str]:
    """Eight files of five kinds, some of them of many units, with a few texts that come twice; all texts.

    Names and ids begin with the name of the folder: no two corpora have one in common.
    """
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    texts: list[str] = []
    for number in range(8):
        found = make_documents(documents, seed=100 * seed + number, longest=80)
        found += rng.sample(texts or found, max(1, documents // 20))
        records = [{"id": f"{folder.name}-{number}-{index}", "text": text} for index, text in enumerate(found)]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        name = f"{folder.name}-{number}"
        if number == 5:
            found = [found[0]]
            (folder / f"{name}.txt").write_text(found[0], encoding="utf-8")
        elif number == 6:
            table = pyarrow.Table.from_pylist(records)
            parquet.write_table(table, folder / f"{name}.parquet", row_group_size=documents // 4)
        elif number == 7:
            (folder / f"{name}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
        elif number == 2:
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines))
        else:
            (folder / f"{name}.jsonl").write_bytes(lines)
        texts += found
    return texts


@dataclass(frozen=True)
class Scenario:
    """Programs that make a set: steps one after another, the programs of a step at the same time. `{out}` is the set."""

    name: str
    steps: Sequence[Sequence[Sequence[str]]]
    unique: bool = False
    """Whether duplicates are dropped."""


def scenarios(corpus: Path, more: Path, tokenizer: Path, *, array: int = 3) -> list[Scenario]:
    """The ways of converting: one process, workers, with all that keeps state, an array of tasks, in two parts."""
    one = [*CONVERT, f"texts={corpus}", "--tokenizer", str(tokenizer), "--out", "{out}", *FLAGS]
    two = [*CONVERT, f"more={more}", "--tokenizer", str(tokenizer), "--out", "{out}", *FLAGS, "--append"]
    gates = ["--deduplicate", "--compression", "zstd", "--workers", "2"]
    tasks = [[*one, "--workers", "1", "--task-index", str(task), "--num-tasks", str(array)] for task in range(array)]
    return [Scenario("one process", [[[*one, "--workers", "1"]]]),
            Scenario("two workers", [[[*one, "--workers", "2"]]]),
            Scenario("two workers, no duplicates, zstd", [[[*one, *gates]]], unique=True),
            Scenario(f"array of {array} and finalize", [tasks, [[*FINALIZE, "{out}"]]]),
            Scenario("append", [[[*one, "--workers", "2"]], [[*two, "--workers", "2"]]])]


@dataclass
class Tally:
    """What happened: kills by what was killed and by how far the set was, starts, and what was wrong."""

    killed: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    conversions: int = 0
    lost: int = 0
    doubled: int = 0
    differing: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.killed.values())

    def __str__(self) -> str:
        def parts(counter: Counter[str]) -> str:
            return ", ".join(f"{number} {name}" for name, number in sorted(counter.items()))

        return (f"{self.kills} kills ({parts(self.killed)}; {parts(self.stages)}), {self.starts} starts, {self.conversions} "
                f"conversions: {self.lost} documents lost, {self.doubled} doubled, {len(self.differing)} files differ")


class Killer:
    """Runs scenarios, undisturbed once and then killed; keeps the tally.

    Args:
        python: starts the programs. folder: for the sets and their logs. seed: of the lots.
    """

    def __init__(self, python: WarmPython, folder: Path, seed: int) -> None:
        self.python, self.folder, self.rng = python, folder, random.Random(seed)
        self.tally = Tally()
        self._whole: dict[str, tuple[dict[str, bytes], list[float]]] = {}

    def undisturbed(self, scenario: Scenario, texts: Sequence[str]) -> None:
        """Converts without killing, counts the documents, and remembers files and times."""
        out, seconds = self._whole_folder(scenario), []
        for step in scenario.steps:
            begin = time.monotonic()
            for program in self._start(step, out):
                assert program.wait() == 0, self._log(out)
            seconds.append(time.monotonic() - begin)
        self._whole[scenario.name] = files_of(out), seconds  # before it is read, which unpacks shards
        found = self._ids(out).total()
        assert found == len(set(texts) if scenario.unique else texts), f"{scenario.name}: {found} documents undisturbed"

    def convert(self, scenario: Scenario, most_kills: int) -> None:
        """Converts with at most so many kills, and compares."""
        whole, seconds = self._whole[scenario.name]
        out, limit = self.folder / f"killed-{self.tally.conversions}", self.tally.kills + most_kills
        for step, usual in zip(scenario.steps, seconds):
            while not self._try(step, out, usual, limit):
                pass
        self.tally.conversions += 1
        self._compare(out, whole, self._ids(self._whole_folder(scenario)))
        shutil.rmtree(out)
        self._log_path(out).unlink()

    def _try(self, step: Sequence[Sequence[str]], out: Path, usual: float, limit: int) -> bool:
        """One start of a step; whether it came to its end."""
        programs = self._start(step, out)
        self.tally.starts += 1
        worker_kills = 0
        while self.tally.kills < limit:
            if self._wait_all(programs, self.rng.uniform(0, 0.6 * usual)):
                break
            what = self.rng.choice(("everything", "everything", "main", "worker", "worker"))
            workers = [pid for program in programs for pid in _children(program.pid)]
            stage = _stage(out)
            if what == "worker" and workers and worker_kills < 2:  # the third in one task would rightly end it
                worker_kills += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.rng.choice(workers), signal.SIGKILL)
            else:
                what = "everything" if what == "worker" else what
                for program in programs if what == "everything" else [self.rng.choice(programs)]:
                    with contextlib.suppress(ProcessLookupError):
                        program.kill_all() if what == "everything" else os.kill(program.pid, signal.SIGKILL)
            self.tally.killed[f"of {what}" if what != "worker" else "of a worker"] += 1
            self.tally.stages[stage] += 1
            if what != "worker":
                break
        return self._ended(programs, out)

    def _ended(self, programs: Sequence[Program], out: Path) -> bool:
        """Waits for all of them, and for what they started; whether all succeeded."""
        statuses = [program.wait() for program in programs]
        assert set(statuses) <= {0, -signal.SIGKILL}, f"{statuses}\n{self._log(out)}"
        end = time.monotonic() + 3
        while left := [pid for program in programs for pid in _group(program.pid)]:
            assert time.monotonic() < end, f"processes {left} are left over"
            time.sleep(0.01)
        return set(statuses) == {0}

    def _compare(self, out: Path, whole: dict[str, bytes], wanted: Counter[str]) -> None:
        found = files_of(out)
        names = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
        self.tally.differing += [f"{out.name}/{name}" for name in names]
        ids = self._ids(out)
        self.tally.lost += (wanted - ids).total()
        self.tally.doubled += (ids - wanted).total()

    @staticmethod
    def _ids(out: Path) -> Counter[str]:
        return Counter(name for split in ("train", "validation") for name in stored(out / split))

    @staticmethod
    def _wait_all(programs: Sequence[Program], seconds: float) -> bool:
        end = time.monotonic() + seconds
        return all(program.wait(max(0.001, end - time.monotonic())) is not None for program in programs)

    def _whole_folder(self, scenario: Scenario) -> Path:
        return self.folder / f"whole-{scenario.name.replace(' ', '-')}"

    def _start(self, step: Sequence[Sequence[str]], out: Path) -> list[Program]:
        return [self.python.start([word.replace("{out}", str(out)) for word in words], cwd=self.folder,
                                  log=self._log_path(out)) for words in step]

    def _log_path(self, out: Path) -> Path:
        return out.with_name(out.name + ".log")

    def _log(self, out: Path) -> str:
        return self._log_path(out).read_text()[-3000:]


def _stage(out: Path) -> str:
    """How far a conversion is, by its files."""
    if list(out.glob("*/manifest.json")):
        return "at the end"
    if list(out.glob("units/*.json")):
        return "among the units"
    return "before the first unit" if (out / "plan.json").exists() else "before the plan"


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _group(group: int) -> list[int]:
    """Processes of a process group that run; dead ones that nobody has looked at yet do not count."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, itself, *_ = path.read_text().rpartition(")")[2].split()
            if int(itself) == group and state != "Z":
                found.append(int(path.parent.name))
    return found
