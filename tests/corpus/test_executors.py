"""Workers that die, raise, hang or lose their parent: every result once, nothing left behind, and words that help."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pool_jobs
import pytest
from pool_jobs import Job

from ettin_foundry.corpus import executors as pool
from ettin_foundry.corpus import progress
from ettin_foundry.corpus.executors import WorkerTraceback, run_tasks
from ettin_foundry.corpus.progress import Board, Tick

HEAVY = {"torch", "transformers", "streaming", "boto3", "ray", "matplotlib", "rich", "numpy", "pyarrow", "tokenizers",
         "pytest"}


def board(workers: int = 2, **options: float) -> Board:
    return Board("test", 0, workers, **options)  # type: ignore[arg-type]


def jobs(number: int, folder: Path | str = "", text: str | bytes = "") -> list[Job]:
    return [Job(n, str(folder), text) for n in range(number)]


def children() -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
    return {int(pid) for pid in found.split() if Path(f"/proc/{pid}/exe").exists()}


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, whose parent has not looked yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], object], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def end_the_named(caplog: pytest.LogCaptureFixture) -> None:
    """Does what the warning about the worker in file-1 advises."""
    named = re.compile(r"worker (\d+) has said nothing for \d+ s; it is in file-1\.")
    wait_until(lambda: named.search(caplog.text))
    time.sleep(0.2)  # for its stack to be printed
    os.kill(int(named.findall(caplog.text)[0]), signal.SIGKILL)


@pytest.fixture(autouse=True)
def _no_process_left_and_no_hang() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError("this test hangs")

    before, handler = children(), signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert children() <= before


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_result_arrives_once_and_the_board_counts_every_tick(workers: int) -> None:
    shown = board(workers)
    found = list(run_tasks(pool_jobs.square, jobs(200), workers=workers, board=shown))
    assert sorted(found) == [(job, job.number ** 2) for job in jobs(200)]
    assert shown.total == Tick(200, 2000, 20_000, 200_000) and not shown.alive


def test_no_task_and_one_task(tmp_path: Path) -> None:
    assert list(run_tasks(pool_jobs.square, [], workers=3, board=board())) == []
    assert [result for _, result in run_tasks(pool_jobs.square, iter(jobs(1)), workers=3, board=board())] == [0]


def test_workers_killed_at_random_moments_cost_no_result_and_double_none(caplog: pytest.LogCaptureFixture) -> None:
    shown, rng, killed, done = board(3), random.Random(7), [], threading.Event()

    def kill() -> None:
        while len(killed) < 25 and not done.is_set():
            time.sleep(rng.uniform(0, 0.06))
            with contextlib.suppress(IndexError, ProcessLookupError, RuntimeError):
                pid = rng.choice(list(shown.alive))
                os.kill(pid, rng.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT]))
                killed.append(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = list(run_tasks(pool_jobs.in_steps, jobs(150), workers=3, board=shown, tries=1000))
    finally:
        done.set()
        killer.join()
    assert len(killed) > 10, "too few kills to prove anything"
    assert sorted((job, square) for job, (square, _) in found) == [(job, job.number ** 2) for job in jobs(150)]
    assert shown.total == Tick(750, 7500, 75_000, 750_000)  # what the dead had counted of unfinished tasks is taken back
    assert "SIGSEGV" in caplog.text and "SIGKILL" in caplog.text


def test_a_task_that_kills_one_worker_is_done_by_the_next(tmp_path: Path) -> None:
    tasks = [job for job in jobs(8, tmp_path, "SIGKILL") if job.number != 3]
    assert sorted(run_tasks(pool_jobs.dying, tasks, workers=2, board=board())) == [(job, job.number ** 2) for job in tasks]
    assert len(list(tmp_path.glob("try.5.*"))) == 1


@pytest.mark.parametrize("how, named", [("SIGKILL", "signal 9, SIGKILL"), ("SIGSEGV", "signal 11, SIGSEGV"),
                                        ("7", "exit status 7"), ("0", "exit status 0")])
def test_a_task_that_kills_every_worker_is_given_up_after_its_tries(tmp_path: Path, how: str, named: str) -> None:
    found, work = [], run_tasks(pool_jobs.dying, jobs(8, tmp_path, how), workers=2, board=board(), tries=2)
    with pytest.raises(RuntimeError, match=f"task job-3: 2 workers died in it, the last of {named} in file-3") as raised:
        found.extend(work)
    assert "fewer workers" in str(raised.value)
    assert len(list(tmp_path.glob("try.3.*"))) == 2
    numbers = [job.number for job, _ in found]
    assert len(numbers) >= 5 and 3 not in numbers and len(set(numbers)) == len(numbers)  # job-5 and one more may be at work
    assert all(result == job.number ** 2 for job, result in found)


def test_a_death_is_seen_although_a_child_of_the_worker_lives_on(tmp_path: Path) -> None:
    begin = time.monotonic()
    found = list(run_tasks(pool_jobs.leaving_a_child, jobs(4, tmp_path), workers=2, board=board()))
    assert sorted(result for _, result in found) == [0, 1, 4, 9] and time.monotonic() - begin < 8


def test_a_worker_that_dies_after_its_result_does_not_bring_it_twice(tmp_path: Path) -> None:
    """The caller is slow, so that the result and the end of its worker are found together."""
    found = []
    for job, result in run_tasks(pool_jobs.dying_afterwards, jobs(8, tmp_path), workers=2, board=board(), tries=1000):
        found.append((job.number, result))
        time.sleep(0.08)
    assert sorted(found) == [(number, number ** 2) for number in range(8)]


def test_an_exception_comes_back_as_it_was_and_the_other_workers_leave_tidily(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such corpus") as raised:
        list(run_tasks(pool_jobs.raising, jobs(9, tmp_path), workers=3, board=board()))
    assert raised.value.filename == "/data/corpus.jsonl" and raised.value.errno == 2
    cause = raised.value.__cause__
    assert isinstance(cause, WorkerTraceback) and "job-2" in str(cause) and "in raising" in str(cause)
    begun, tidied = ({path.name.split(".")[1] for path in tmp_path.glob(f"{kind}.*")} for kind in ("begun", "tidied"))
    assert "0" in begun and begun <= tidied <= {"0", "1"}


@pytest.mark.parametrize("text, kind, message", [("awkward", RuntimeError, "Awkward: awkward 7"),
                                                 ("unpicklable", (AttributeError, Exception), "pickle")])
def test_what_cannot_be_pickled_is_an_error_and_no_hang(tmp_path: Path, text: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        list(run_tasks(pool_jobs.raising, jobs(3, tmp_path, text), workers=3, board=board()))


def test_an_exception_in_this_process_is_the_original(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such corpus"):
        list(run_tasks(pool_jobs.raising, [Job(2, str(tmp_path), "alone")], workers=1, board=board()))


def test_closing_early_ends_the_workers(tmp_path: Path) -> None:
    work = run_tasks(pool_jobs.in_steps, jobs(50), workers=3, board=board())
    next(work)
    assert len(children()) >= 3
    work.close()  # type: ignore[attr-defined]


def test_closing_ends_also_a_worker_that_cannot_hear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_GRACE_SECONDS", 0.3)
    work = run_tasks(pool_jobs.standing_still, jobs(2, tmp_path, "stopped"), workers=2, board=board())
    assert next(work)[1] == 0
    wait_until(lambda: list(tmp_path.glob("hang.1.*")))
    pid = int(next(tmp_path.glob("hang.1.*")).suffix[1:])
    wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
    work.close()  # type: ignore[attr-defined]
    assert not alive(pid)


def test_a_hanging_worker_is_named_prints_its_stack_and_its_task_survives_its_end(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    user = threading.Thread(target=end_the_named, args=(caplog,))
    user.start()
    shown = board(stall_seconds=0.3)
    found = list(run_tasks(pool_jobs.standing_still, jobs(4, tmp_path), workers=2, board=shown))
    user.join()
    assert sorted(result for _, result in found) == [0, 1, 4, 9] and shown.total == Tick(4, 40, 400, 4000)
    assert "in standing_still" in capfd.readouterr().err


def test_a_stopped_worker_is_named_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = run_tasks(pool_jobs.standing_still, jobs(2, tmp_path, "stopped"), workers=2, board=board(stall_seconds=0.2))
    assert next(work)[1] == 0
    user = threading.Thread(target=end_the_named, args=(caplog,))
    user.start()
    assert next(work)[1] == 1
    user.join()


def test_one_process_names_itself_when_it_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                capfd: pytest.CaptureFixture[str]) -> None:
    assert [result for _, result in run_tasks(pool_jobs.standing_still, jobs(2, tmp_path, "slow"), workers=1,
                                              board=board(stall_seconds=0.3))] == [0, 1]
    assert f"worker {os.getpid()} has said nothing" in caplog.text and "it is in file-1" in caplog.text


def test_a_slow_consumer_is_no_stall(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """While the caller takes its hour, the other worker says that it is done, and nobody reads that until later."""
    hours = [0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * hours[0]))
    for _ in run_tasks(pool_jobs.leaving_word, jobs(2, tmp_path), workers=2, board=board()):
        wait_until(lambda: len(list(tmp_path.glob("over.*"))) == 2)
        time.sleep(0.2)
        hours[0] += 1
    assert hours == [2] and "said nothing" not in caplog.text


def test_workers_start_light_with_one_thread_each_and_log_through_the_parent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    begin = time.time()
    found = [result for _, result in run_tasks(pool_jobs.logging_and_modules, jobs(2), workers=2, board=board())]
    for begun, modules, environment in found:
        assert begun - begin < 1.0  # about 0.06 s on an idle core; the bound only catches a heavy import
        assert not HEAVY & set(modules)
        assert environment["RAYON_NUM_THREADS"] == "1" and environment["TOKENIZERS_PARALLELISM"] == "false"
    said = [record.getMessage() for record in caplog.records if record.name == "pool_jobs"]
    assert {"job 0\nsays so", "job 1\nsays so"} <= set(said) and "unheard" not in caplog.text
    assert said.count("all say so") == 1
    assert any("caught" in text and "ValueError: of the worker" in text for text in said)


def test_large_tasks_and_results_pass_whole() -> None:
    payload = random.Random(1).randbytes(7_000_001)
    found = list(run_tasks(pool_jobs.echo, jobs(3, text=payload), workers=2, board=board()))
    assert [result == payload[::-1] for _, result in found] == [True] * 3


def test_a_task_may_run_programs_whose_signals_are_as_usual() -> None:
    (_, text), _ = run_tasks(pool_jobs.with_helper, jobs(2), workers=2, board=board())
    assert text.split() == ["0", "set()"] or "SIG_DFL" in text and "set()" in text


def test_a_file_in_the_working_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pickle", "socket", "json", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert len(list(run_tasks(pool_jobs.square, jobs(4), workers=2, board=board()))) == 4
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("options", [{"workers": 0}, {"workers": 2, "tries": 0}])
def test_numbers_below_one_are_refused_at_once(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="0 given; at least 1 is needed"):
        run_tasks(pool_jobs.square, jobs(1), board=board(), **options)


# programs of their own: they are interrupted, killed, or have no module to import from

HEADER = f"""
import sys
sys.path[:0] = {[str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]!r}
import pool_jobs
from ettin_foundry.corpus.executors import run_tasks
from ettin_foundry.corpus.progress import Board
"""


@contextlib.contextmanager
def program(text: str, folder: Path, workers: int) -> Iterator[subprocess.Popen[str]]:
    """Runs a program in a session of its own and waits until its workers are at work; at the end none of it is left."""
    process = subprocess.Popen([sys.executable, "-c", HEADER + text], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True, cwd=folder)
    try:
        wait_until(lambda: len(list(folder.glob("pid.*"))) == workers)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def pids(folder: Path) -> list[int]:
    return [int(path.suffix[1:]) for path in folder.glob("pid.*")]


SLEEP = """
jobs = [pool_jobs.Job(n, ".") for n in range(9)]
list(run_tasks(pool_jobs.sleeping, jobs, workers={workers}, board=Board("test", 0, {workers})))
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_ctrl_c_leaves_no_process_and_one_traceback(tmp_path: Path, workers: int) -> None:
    with program(SLEEP.format(workers=workers), tmp_path, workers) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=8)
        assert process.returncode == -signal.SIGINT and errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1
        assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize("death_signal", [True, False])
def test_workers_end_when_their_parent_is_killed(tmp_path: Path, death_signal: bool) -> None:
    """With the kernel's help (Linux), and without."""
    without = "import ettin_foundry.corpus.executors as p; p._BOOT = p._BOOT.replace('serve(int', " \
              "'import ettin_foundry.corpus.pool_worker as w; w._SET_DEATH_SIGNAL = 0; serve(int')\n"
    with program(("" if death_signal else without) + SLEEP.format(workers=2), tmp_path, 2) as process:
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(alive, pids(tmp_path))), 0.5 if death_signal else 3.0)


def test_a_program_without_a_main_guard_works_also_from_stdin(tmp_path: Path) -> None:
    text = HEADER + """
jobs = [pool_jobs.Job(n) for n in range(4)]
print(sorted(n for _, n in run_tasks(pool_jobs.square, jobs, workers=2, board=Board("", 0, 2))))
"""
    done = subprocess.run([sys.executable, "-"], input=text, capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[0, 1, 4, 9]\n", "")


def test_work_of_the_script_itself_is_refused_with_advice(tmp_path: Path) -> None:
    text = HEADER + "work = type('Work', (), {'__call__': lambda self, job, report: 0})\n" \
        "Work = work; Work.__qualname__ = 'Work'; Work.__name__ = 'Work'\n" \
        "list(run_tasks(Work(), [pool_jobs.Job(0)], workers=2, board=Board('', 0, 2)))\n"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "work: a worker cannot load it" in done.stderr and "importable module" in done.stderr
