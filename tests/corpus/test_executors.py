"""Workers that die, raise, hang or lose their parent: nothing is left behind; what is shown of them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pool_jobs
import pytest
from conftest import wait_until
from pool_jobs import jobs

from benchmarks.killing import running
from ettin_foundry.corpus import executors
from ettin_foundry.corpus.executors import Board, Tick, run_tasks

pytestmark = pytest.mark.timeout(60)
HEAVY = {"torch", "transformers", "streaming", "boto3", "matplotlib", "pyarrow", "tokenizers"}


@pytest.fixture(autouse=True)
def _no_process_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_the_board_counts_every_tick(workers):
    shown = Board("test", 0)
    assert run_tasks(pool_jobs.in_steps, jobs(40), workers=workers, board=shown) == [n ** 2 for n in range(40)]
    assert shown.total == Tick(200, 2000, 20_000, 200_000)
    assert run_tasks(pool_jobs.in_steps, [], workers=workers, board=shown) == []


def test_the_death_of_a_worker_ends_the_run_and_says_what_was_under_way(tmp_path):
    with pytest.raises(ChildProcessError, match=r"a worker died \(under way: .*job-3.*; the same command goes on"):
        run_tasks(pool_jobs.dying, jobs(8), workers=2, board=Board("test", 0))


def test_an_exception_comes_back_as_it_was_and_the_other_workers_are_ended(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such corpus") as raised:
        run_tasks(pool_jobs.raising, jobs(9, tmp_path), workers=3, board=Board("test", 0))
    assert raised.value.filename == "/data/corpus.jsonl" and "in raising" in str(raised.value.__cause__)
    assert list(tmp_path.glob("begun.0.*"))  # it was ended, see `_no_process_left`


@pytest.mark.parametrize("text, message", [("awkward", "Awkward: awkward 7"), ("unpicklable", "pickle")])
def test_what_cannot_be_pickled_is_an_error_and_no_hang(tmp_path, text, message):
    with pytest.raises(Exception, match=message):
        run_tasks(pool_jobs.raising, jobs(3, tmp_path, text), workers=3, board=Board("test", 0))


def test_workers_start_light_with_one_thread_each(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for modules, environment in run_tasks(pool_jobs.looking_around, jobs(2), workers=2, board=Board("test", 0)):
        assert not HEAVY & set(modules)
        assert environment["OMP_NUM_THREADS"] == "1"


PROGRAM = """
import os, sys, time
sys.path[:0] = {paths!r}
import pool_jobs
from ettin_foundry.corpus.executors import Board, run_tasks
class Forking(Board):
    def tick(self, task, tick):  # another process now holds the pipes to the workers
        os.fork() or time.sleep(60)
if __name__ == "__main__":
    run_tasks(pool_jobs.raising, pool_jobs.jobs(2, "."), workers={workers}, board={board}("", 0))
"""


@pytest.mark.parametrize("number, workers, board", [
    (signal.SIGINT, 1, "Board"), (signal.SIGINT, 2, "Board"), (signal.SIGKILL, 2, "Board"),
    (signal.SIGKILL, 2, "Forking")])
def test_no_worker_outlives_a_program_that_is_interrupted_or_killed(tmp_path, number, workers, board):
    """Ctrl-C goes to all of a terminal's processes; kill -9 here to the main process alone."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", PROGRAM.format(paths=paths, workers=workers, board=board)]
    with open(tmp_path / "errors", "w+") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, cwd=tmp_path)
        try:
            wait_until(lambda: len(list(tmp_path.glob("begun.*"))) == workers)
            pids = {int(path.suffix[1:]) for path in tmp_path.glob("begun.*")}
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            assert process.wait(timeout=20) == -number
            wait_until(lambda: pids.isdisjoint(running(process.pid)))
            assert (tmp_path / "errors").read_text().count("Traceback") == (number == signal.SIGINT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_log_lines_come_while_it_runs(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    shown = Board("convert", 1000)
    shown.tick(1, Tick(1, 2, 3, 250))  # too early
    monkeypatch.setattr(executors, "_LOG_SECONDS", 0.0)
    shown.tick(1, Tick(2, 4, 6, 500))
    shown.tick(2, Tick(1, 2, 3, 250))
    begins = [text.partition(" (")[0].removeprefix("convert: ") for text in caplog.messages]
    assert begins == ["50% of the files, 2 documents", "75% of the files, 3 documents"]
