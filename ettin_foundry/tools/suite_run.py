"""Runs the stages of a suite in order: skips finished ones, continues an interrupted one, stops when one fails.

Everything is checked before the first process starts: settings and data of every stage, that pairs are fair, and that
what lies in the stages' folders belongs to them. What a stage has reached is read from its newest complete checkpoint,
so a stage may as well be started alone, on another machine, or by a scheduler.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.tools import progress
from ettin_foundry.tools.pair import check_phase, compare_steps, lint_pair
from ettin_foundry.tools.suite import Stage, Suite
from ettin_foundry.training import checkpoints, checks, sources
from ettin_foundry.training.run_config import PREEMPTED
from ettin_foundry.training.steps import STEPS, read_steps

_SAY_SECONDS = 10.0, 600.0  # between lines, where a percent is done and where none is
_STOP_SECONDS = 40.0  # Composer's launcher gives its processes 30 s to end
_TELL_SECONDS = 10.0  # between tellings that a stage is to end; while it starts it takes no notice


class StageFailed(RuntimeError):
    """A stage ended without having finished its run."""


class State(NamedTuple):
    """How far a stage is."""

    checkpoint: Path | None = None  # the newest complete one
    tokens: int = 0  # of this run alone
    finished: bool = False


def say(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def stage_state(stage: Stage) -> State:
    """Reads a stage's newest complete checkpoint; a ValueError where the stage could not go on from it."""
    newest = checkpoints.newest_complete(stage.folder)
    if newest is None:
        return State()
    record, clock = checkpoints.read_head(newest).record, (stage.config.get("callbacks") or {}).get("ettin_clock") or {}
    with stage.named():
        sources.check_resume(record, sources.record_of(stage.config, read_tokenizer=False), own=True,
                             place=f"{newest}; root=ANOTHER keeps both", accept=clock.get("accept") or [])
    return State(newest, int(record.get("tokens") or 0), sources.is_finished(record, stage.config["max_duration"]))


def check_suite(suite: Suite, *, allow_unfair: bool = False) -> dict[str, dict[str, Any]]:
    """Refuses a suite of which some stage could not run as written, or whose pairs are unfair.

    Returns {pair: {fair, findings}} for the report; findings is the linter's text. Errors name stage and key.
    """
    for stage in suite.stages:
        config = stage.config
        with stage.named():
            checks.check_settings(config)
            if stage.source is not None:
                check_phase(stage.source, suite.stage(stage.source).config, config)
    reports = {f"pair {pair}: {first.name}, {other.name}": lint_pair(first.config, other.config,
                                                                     names=(first.name, other.name))
               for pair, (first, *others) in suite.pairs().items() for other in others}
    unfair = [f"{key}\n{report}" for key, report in reports.items() if not report.fair]
    if unfair and not allow_unfair:
        raise ValueError("\n".join([f"{suite.path}: its models could not be compared:", *unfair, "Make the settings "
                                    "equal, or pass --allow-unfair; the report then says that they differ"]))
    return {key: {"fair": report.fair, "findings": str(report)} for key, report in reports.items()}


# ------------------------------------------------------------------ running


def run_suite(suite: Suite, stages: Sequence[Stage] = ()) -> None:
    """Trains what is not finished of the stages (all, if none are given) of a checked suite, and compares pairs.

    Raises a StageFailed with the reason if a stage fails, a ValueError if a pair has read different rows, and
    SystemExit(PREEMPTED) when a stage was told to end and has saved.
    """
    stages = stages or suite.stages
    unfinished = [stage for stage in stages if not stage_state(stage).finished]
    for stage in unfinished:
        with stage.named():
            checks.check_files(stage.config)  # data of a late phase, before the first has run for weeks
    for number, stage in enumerate(stages, 1):
        title = f"{number}/{len(stages)} {stage.name}"
        if stage in unfinished:
            _train(suite, stage, title)
        else:
            say(f"{title}: finished, {stage_state(stage).tokens:,} tokens")
        if stage.pair is not None and isinstance(found := compare_pair(suite.pairs()[stage.pair]), str):
            say(f"pair {stage.pair}: {found}")


def _train(suite: Suite, stage: Stage, title: str) -> None:
    if stage.source is not None and not stage_state(suite.stage(stage.source)).finished:
        raise ValueError(f"stages.{stage.name}: starts from {stage.source}, which is not finished; run that first")
    begin = time.monotonic()
    failed = _run_process(stage, title)
    state = stage_state(stage)
    if failed is None and not state.finished:
        failed = f"exit code 0, but with {state.tokens:,} tokens of {stage.config['max_duration']}; see {stage.folder}"
    if failed is not None:
        raise StageFailed(f"{stage.name} failed: {failed}")
    say(f"{title}: done, {state.tokens:,} tokens in {timedelta(seconds=round(time.monotonic() - begin))}")


def compare_pair(members: Sequence[Stage]) -> int | str:
    """Steps at which the finished members of a pair read the same rows, by their logs, or why that is not known."""
    first, *others = [stage for stage in members if stage_state(stage).finished] or [members[0]]
    try:
        steps = [compare_steps(first.folder, other.folder) for other in others]
        number = len(read_steps(first.folder)) if others else 0
    except (OSError, ValueError) as error:
        return f"rows not compared: {error}"
    for other, step in zip(others, steps):
        if step is not None:
            raise ValueError(f"pair {first.pair}: {first.name} and {other.name} did not read the same rows at step "
                             f"{step} ({STEPS} of both); move the folder of the wrong one away and run the suite again")
    return number


# ------------------------------------------------------------------ the process of a stage


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Within it, Ctrl-C, SIGTERM and SIGUSR1 (from schedulers) raise KeyboardInterrupt with the signal's number."""
    def stop(signum: int, _: Any) -> None:
        raise KeyboardInterrupt(signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_process(stage: Stage, title: str) -> str | None:
    """Trains a stage in a process of its own; None if that ended with 0, else how it ended and the lines that say why.

    A ValueError where the command cannot be started. A run refuses a folder in which another one trains.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    path, words = stage.folder / "suite.log", stage.words
    # the environment of this interpreter comes first, whether or not it is activated
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    with path.open("ab") as output:
        begin = output.tell()
        output.write(f"$ {shlex.join(words)}\n".encode())
        output.flush()
        heeded = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited: it is for the ranks, not their launcher
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                       env={**os.environ, "PATH": places}, start_new_session=True)
        except OSError as error:
            raise ValueError(f"command must be a program that starts a run, got {words[0]!r} ({error})") from error
        finally:
            signal.signal(signal.SIGUSR1, heeded)
        try:
            told = _watch(process, stage, title)
        finally:
            _end(process)
    code = process.returncode
    if code == PREEMPTED or told and code == 0:
        say(f"{title}: told to end; {_last_error(path, begin).strip()}\nstopped. The same command continues.")
        raise SystemExit(PREEMPTED)
    if told:
        raise KeyboardInterrupt(told)
    how = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}" if code else ""
    return f"{how}; {path}:\n{_last_error(path, begin)}" if how else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started: SIGTERM, then SIGKILL."""
    for signum, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signum)
                process.wait(seconds)


def _last_error(path: Path, begin: int) -> str:
    """The last error in a log from byte `begin` on, or else its last lines; at most 12 lines."""
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - 1_000_000))
        text = re.sub(r"\x1b\[[0-9;]*[A-K]", "\n", file.read().decode(errors="replace"))  # bars move the cursor
    lines = [line for line in text.splitlines() if line.strip() and not re.search(r"[0-9]%\|", line)]
    errors = [i for i, line in enumerate(lines) if re.match(r"error: |[A-Za-z_.]*(Error|Exception|Interrupt)\b", line)]
    chosen = lines[errors[-1]:][:12] if errors else lines[-12:]
    return "\n".join("  " + line[:2000] for line in chosen) or "  it is empty"


def _watch(process: subprocess.Popen[bytes], stage: Stage, title: str) -> int:
    """Says how far the stage is until its process ends; returns the signal on which it had it save and end, if any."""
    begin, last, said = time.time(), 0.0, ""
    try:
        while process.poll() is None:
            time.sleep(0.25)
            if (since := time.monotonic() - last) >= _SAY_SECONDS[0]:
                line = _progress(stage, begin)
                if line[:4] != said[:4] or since >= _SAY_SECONDS[1]:
                    last, said = time.monotonic(), line
                    say(f"{title}: {line}")
    except KeyboardInterrupt as stop:
        if stop.args not in ((signal.SIGTERM,), (signal.SIGUSR1,)):
            raise
        while process.poll() is None:
            os.killpg(process.pid, signal.SIGUSR1)  # srun passes it on, while SIGTERM ends its job
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TELL_SECONDS)
        return stop.args[0]
    return 0


def _progress(stage: Stage, begin: float) -> str:
    """How far a stage is, how fast, and what is left, by a steps.jsonl that is newer than `begin`."""
    path = stage.folder / STEPS
    if not path.is_file() or path.stat().st_mtime < begin or (steps := progress.read(stage.folder)).empty:
        return "starting"
    found = {"done": "", "left": "unknown", **progress.row(stage.folder, steps)}
    return "{done:>4}, {tokens} tokens, loss {loss}, {tokens/s} tokens/s, {left} left".format_map(found)
