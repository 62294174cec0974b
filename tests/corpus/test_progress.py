"""What a long run shows: sums that are right after deaths, time left, who stalls, and no torn or forged lines."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ettin_foundry.corpus import progress
from ettin_foundry.corpus.progress import Board, Progress, Tick, plain


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_counts_of_a_lost_worker_are_taken_back_and_those_of_finished_tasks_stay(clock: Clock) -> None:
    board = Board("test", 1000, 2)
    for worker in (7, 8):
        board.joined(worker)
        board.began(worker, "unit")
        board.tick(worker, Tick(1, 20, 300, 40, "a"))
    board.done(7)
    board.began(7, "next unit")
    board.tick(7, Tick(5, 5, 5, 5, "b"))
    assert board.total == Tick(7, 45, 605, 85) and board.alive == {7, 8}
    assert board.lost(7) == "b" and board.lost(8) == "a" and board.lost(9) == ""
    assert board.total == Tick(1, 20, 300, 40) and board.alive == set()


def test_many_threads_may_tick_at_once() -> None:
    board = Board("test", 0, 4)

    def tick(worker: int) -> None:
        board.began(worker, "unit")
        for _ in range(2000):
            board.tick(worker, Tick(1, 2, 3, 4))

    threads = [threading.Thread(target=tick, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert board.total == Tick(8000, 16_000, 24_000, 32_000)


def test_line_has_speeds_time_left_workers_and_the_slowest_file(clock: Clock) -> None:
    board = Board("test", 1_000_000, 3, already=100_000)
    for worker, where in ((1, "slow.jsonl"), (2, "quick.jsonl")):
        board.joined(worker)
        board.began(worker, "unit")
        board.tick(worker, Tick(where=where))
        clock.now += 10
    board.tick(2, Tick(200, 40_000, 4_000_000, 300_000, "quick.jsonl"))
    assert board.line() == ("200 documents (10/s), 40,000 tokens (2,000/s), 4.0 MB (0.2 MB/s), 0:00:40 left, "
                            "2 of 3 workers, slowest slow.jsonl 20 s")
    assert board.share == pytest.approx(0.4)


def test_time_left_is_unknown_at_first_and_not_said_without_a_total(clock: Clock) -> None:
    assert Board("test", 100, 1).line() == "0 documents (0/s), 0.0 MB (0.0 MB/s), time left unknown"
    assert Board("test", 0, 1).line() == "0 documents (0/s), 0.0 MB (0.0 MB/s)" and Board("test", 0, 1).share == 0


def test_a_silent_worker_is_named_again_after_twice_the_time_until_it_speaks(clock: Clock,
                                                                             caplog: pytest.LogCaptureFixture) -> None:
    board, asked = Board("convert", 0, 2), []
    board.on_stall = asked.append
    board.began("41 on node7", "unit 3")
    board.tick("41 on node7", Tick(where="a.jsonl"))
    board.began(42, "unit 4")
    said = []
    for _ in range(300):
        clock.now += 1
        board.tick(42, Tick(1))
        caplog.clear()
        board.check()
        said += [(clock.now - 1000, record.getMessage()) for record in caplog.records]
    assert [second for second, _ in said] == [60, 120, 240] and asked == ["41 on node7"] * 3
    assert "convert: worker 41 on node7 has said nothing for 60 s; it is in a.jsonl." in said[0][1]
    board.tick("41 on node7", Tick(1))
    clock.now += 59
    caplog.clear()
    board.check()
    assert not caplog.records
    clock.now += 1
    board.check()
    assert "41 on node7" in caplog.text


@pytest.mark.parametrize("name, shown", [
    ("plain.jsonl", "plain.jsonl"), ("a\nERROR forged line", "a\\nERROR forged line"), ("\x1b[2Jwipe", "\\x1b[2Jwipe"),
    ("\u202etxt.exe", "\\u202etxt.exe"), ("x" * 200 + "/end.jsonl", "..." + "x" * 47 + "/end.jsonl")])
def test_names_cannot_forge_lines_or_move_the_cursor(name: str, shown: str) -> None:
    assert plain(name) == shown and len(shown) <= 60


def test_log_lines_come_while_it_runs_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.2)
    monkeypatch.setattr(progress, "_DRAW_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    with Board("convert", 1000, 2, show=False) as board:
        board.tick(1, Tick(1, 2, 3, 500, "a"))
        end = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < end:
            time.sleep(0.02)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) >= 3 and all(text.startswith("convert: 50% of the files, 1 documents") for text in texts[:-1])
    assert texts[-1].startswith("convert: 1 documents (") and "left" not in texts[-1]


def test_an_error_ends_the_thread_and_claims_no_success(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = threading.active_count()
    with contextlib.suppress(KeyError), Board("convert", 0, 1, show=False):
        assert threading.active_count() == before + 1
        raise KeyError
    assert threading.active_count() == before and not caplog.records


def test_progress_of_one_pass_follows_the_meter() -> None:
    position = iter((10, 30, 100))
    pass_ = Progress("tokenizer", SimpleNamespace(position=lambda: next(position)), 200, show=False)
    for _ in range(3):
        pass_.update(documents=1, num_bytes=50)
    assert pass_.total == Tick(3, 0, 150, 100) and pass_.share == 0.5


PROGRAM = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from ettin_foundry.corpus.progress import Board, Tick
with Board("convert [bold]", 400, 2) as board:
    board.joined(1)
    board.began(1, "unit")
    for number in range(4):
        time.sleep(0.3)
        board.tick(1, Tick(10, 1000, 5000, 100, "dir/[red]x.jsonl"))
        logging.warning("warning %d", number)
"""


def screen(data: str) -> list[str]:
    """The lines on a terminal after `data`: as much of one as a live picture uses, written anew from the standard."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|.", data, re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token[0] == "\x1b":
            row = max(0, row - int(re.sub(r"\D", "", token) or 1))
        elif token.endswith("K") and token[0] == "\x1b":
            lines[row] = ""
        elif token[0] != "\x1b":
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + 1:]
            column += 1
    return lines


def test_a_terminal_keeps_every_warning_above_the_picture() -> None:
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 132, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    for name in ("COLUMNS", "LINES"):  # would win over the size of the terminal
        environment.pop(name, None)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=far, stdin=far, env=environment)
    os.close(far)
    data = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while more := os.read(near, 1 << 16):
            data += more
    os.close(near)
    assert process.wait() == 0
    lines = [line.rstrip() for line in screen(data.decode()) if line.strip()]
    assert lines[:4] == [f"warning {number}" for number in range(4)]
    assert lines[4].startswith("convert [bold] ") and "100%" in lines[4]
    assert lines[5].startswith("40 documents (") and re.search(r"slowest dir/\[red\]x\.jsonl \d s$", lines[5])
    assert lines[6].startswith("convert [bold]: 40 documents (") and len(lines) == 7
    assert data.rindex(b"\x1b[?25h") > data.rindex(b"\x1b[?25l")  # the cursor is back
