"""Fuzzes the readers of files and holds parts to independent references, with examples drawn from a seed.

    python benchmarks/fuzz [TARGET ...] [--minutes M | --examples N] [--seed S] [--example NUMBER]

Targets of readers.py damage sound files; each example runs in a process with bounded memory and time, which may write
nothing outside of its folder, start no process and open no connection. Targets of properties.py are hypothesis tests.
A line a target says what was found; exit status 1 where something was. `--example` shows one example of a reader.
"""

from __future__ import annotations

import argparse
import builtins
import json
import logging
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from mutate import damage  # noqa: E402
from properties import PROPERTIES, run_property  # noqa: E402
from readers import READERS, Reader  # noqa: E402

CPU_SECONDS, WALL_SECONDS, MEMORY = 20, 120, 2 << 30  # of an example; memory beyond that of the process before it
PER_PROCESS = 300  # examples
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
          "shutil.rmtree", "shutil.move")
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect",
             "socket.getaddrinfo")
OWN = {ValueError, *(kind for kind in vars(builtins).values()
                     if isinstance(kind, type) and issubclass(kind, OSError))}


class Guard:
    """Notes what an example does that a reader must not, through Python's audit events."""

    def __init__(self, inside: Path) -> None:
        self.inside, self.seen, self.armed = str(inside), list[str](), False
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.check(event, arguments[:1])
        elif event in WRITES:
            self.check(event, arguments[:2] if event in ("os.rename", "shutil.move") else arguments[:1])
        elif event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")

    def check(self, event: str, paths: tuple[Any, ...]) -> None:
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.abspath(os.fsdecode(path))
                if not place.startswith((self.inside, "/dev/null")):
                    self.seen.append(f"{event} {place}")


def try_example(reader: Reader, sound: Path, work: Path, rng: Random, guard: Guard | None) -> tuple[str, str]:
    """(outcome, details): `accepted`, `refused`, or `WRONG`."""
    folder = work / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    files = sorted(path for pattern in [reader.files] for found in folder.glob(pattern)
                   for path in ([found] if found.is_file() else found.rglob("*")) if path.is_file())
    others = [path for path in sorted(sound.rglob("*")) if path.is_file()]
    how = [damage(path, rng, others) for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2))))]
    if reader.seal and rng.random() < 0.6:
        try:
            reader.seal(folder)
            how.append("sealed")
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError):
            pass  # what is to be sealed is damaged itself
    where = "; ".join(how)
    if guard:
        guard.seen.clear()
        guard.armed = True
    try:
        reader.read(folder)
        outcome = "accepted", where
    except BaseException as error:
        text = str(error)
        named = str(folder) in text or re.match(reader.keys, text)
        fine = type(error) in OWN and text.strip() and "\n" not in text and named
        outcome = ("refused", f"{where} -> {text:.400}") if fine else (
            "WRONG", f"{where} -> {''.join(traceback.format_exception(error, limit=-6))}")
    finally:
        if guard:
            guard.armed = False
    if guard and guard.seen:
        outcome = "WRONG", f"{where} -> {'; '.join(guard.seen[:3])}"
    return outcome


def work_through(reader: Reader, name: str, sound: Path, work: Path, seed: int, first: int, pipe: int) -> None:
    """The child: examples from `first` on, each announced, then its outcome."""
    log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.disable(logging.CRITICAL)
    os.chdir(work)
    tempfile.tempdir = str(work)
    guard = Guard(work)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, first + PER_PROCESS):
        os.write(pipe, f"{json.dumps([number])}\n".encode())
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # their default action ends the process
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        outcome = try_example(reader, sound, work, Random(f"{seed} {name} {number}"), guard)
        os.write(pipe, f"{json.dumps([number, *outcome])}\n".encode())


def fuzz_reader(name: str, reader: Reader, *, seed: int, examples: int | None,
                end: float) -> tuple[Counter[str], set[str]]:
    """The tally of a target, and the kinds of what went wrong."""
    tally, wrong, number = Counter[str](), dict[str, str](), 0
    with tempfile.TemporaryDirectory(prefix="ettin-fuzz-") as scratch:
        sound, work = Path(scratch, "sound"), Path(scratch, "work")
        work.mkdir()
        sound.parent.mkdir(exist_ok=True)
        reader.make(sound)
        reader.read(Path(shutil.copytree(sound, work / "folder")))  # sound files are read
        while (examples is None or number < examples) and time.monotonic() < end:
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                try:
                    work_through(reader, name, sound, work, seed, number, writing)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            os.close(writing)
            number, died = follow(child, reading, number, examples, end, tally, wrong, name)
            if died:
                kind = f"died: {died}; {(work / 'log').read_text(errors='replace')[-1500:]}"
                tally["WRONG"] += 1
                note(wrong, name, number, kind)
                number += 1
    return tally, set(wrong)


def follow(child: int, reading: int, number: int, examples: int | None, end: float, tally: Counter[str],
           wrong: dict[str, str], name: str = "") -> tuple[int, str]:
    """Reads what a child says until it ends; (the number of the next or deadly example, how it died)."""
    busy, stopped = False, False
    with os.fdopen(reading, "rb") as lines:
        while True:
            ready = select.select([lines], [], [], WALL_SECONDS + 30)[0]
            line = lines.readline() if ready else b""
            if not line:
                break
            number, *outcome = json.loads(line)
            busy = not outcome
            if outcome:
                number, kind = number + 1, outcome[0]
                tally[kind] += 1
                if kind == "WRONG":
                    note(wrong, name, number - 1, outcome[1])
            elif examples is not None and number >= examples or time.monotonic() > end:
                stopped = True
                break
    if stopped or busy:
        try:
            os.kill(child, signal.SIGKILL if stopped else 0)
        except ProcessLookupError:
            pass
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return number, "" if stopped or not busy else signal.Signals(-status).name if status < 0 else f"status {status}"


def note(wrong: dict[str, str], name: str, number: int, details: str) -> None:
    """Prints what went wrong where nothing of its kind did before: the same place in the same kind of error."""
    places = [line.strip() for line in details.splitlines() if line.strip().startswith("File ")]
    last = details.strip().splitlines()[-1]
    kind = f"{places[-1] if places else ''} {last.split(':')[0]}"[:200] if places else last[:60]
    if kind not in wrong:
        wrong[kind] = details
        print(f"--- example {number}: {details}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*READERS, *PROPERTIES]
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=1.0, help="of each target")
    parser.add_argument("--examples", type=int, help="of each target, whatever the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--example", type=int, help="shows one example of a reader, with its traceback")
    options = parser.parse_args(argv)
    if unknown := set(options.targets) - set(names):
        parser.error(f"TARGET must be one of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    failed = False
    for name in options.targets or names:
        begin = time.monotonic()
        end = begin + (60 * options.minutes if options.examples is None else 1e9)
        if name in PROPERTIES:
            tally, wrong = run_property(name, seed=options.seed, examples=options.examples, end=end)
        elif options.example is not None:
            with tempfile.TemporaryDirectory(prefix="ettin-fuzz-") as scratch:
                READERS[name].make(Path(scratch, "sound"))
                rng = Random(f"{options.seed} {name} {options.example}")
                print(*try_example(READERS[name], Path(scratch, "sound"), Path(scratch), rng, None), sep="\n")
            continue
        else:
            tally, wrong = fuzz_reader(name, READERS[name], seed=options.seed, examples=options.examples, end=end)
        failed |= bool(wrong)
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(tally.items()))
        minutes = (time.monotonic() - begin) / 60
        print(f"{name}: {tally.total()} examples in {minutes:.1f} minutes, seed {options.seed}: {counts}; "
              f"{len(wrong)} kinds of failure", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
