"""What a long run shows: sums that are right after deaths, who stalls, and no torn or forged lines."""

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

import pytest

from ettin_foundry.corpus import progress
from ettin_foundry.corpus.progress import Board, Tick


def test_counts_of_a_lost_task_are_taken_back_and_those_of_finished_ones_stay() -> None:
    board = Board("test", 1000)
    for key in (7, 8):
        board.tick(key, Tick(1, 20, 300, 40))
    board.end(7)
    board.tick(7, Tick(1, 1, 1, 1))
    assert board.total == Tick(3, 41, 601, 81)
    for key in (7, 8, 9):
        board.end(key, done=False)
    assert board.total == Tick(1, 20, 300, 40)


def test_log_lines_come_while_it_runs_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.2)
    monkeypatch.setattr(progress, "_DRAW_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    with Board("convert", 1000, show=False) as board:
        board.tick(1, Tick(1, 2, 3, 500))
        end = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < end:
            time.sleep(0.02)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) >= 3 and all(text.startswith("convert: 50% of the files, 1 documents") for text in texts[:-1])
    assert texts[-1].startswith("convert: 1 documents (")
    caplog.clear()
    before = threading.active_count()
    with contextlib.suppress(KeyError), Board("convert", 0, show=False):
        raise KeyError
    assert threading.active_count() == before and not caplog.records  # an error claims no success


PROGRAM = """
import logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from ettin_foundry.corpus.progress import Board, Tick
with Board("convert [bold]", 400) as board:
    for number in range(4):
        time.sleep(0.3)
        board.tick(1, Tick(10, 1000, 5000, 100))
        logging.warning("warning %d", number)
"""


def test_a_terminal_keeps_every_warning_above_the_bar() -> None:
    near, far = pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
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
    # a line that is drawn over begins anew after an erasure
    drawn = [line.rpartition("\x1b[2K")[2] for line in data.decode().splitlines()]
    plain_lines = [re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", line).strip() for line in drawn]
    assert [line for line in plain_lines if line.startswith("warning")] == [f"warning {n}" for n in range(4)]
    bars = [line for line in plain_lines if line.startswith("convert [bold] ")]
    assert "100%" in bars[-1] and "40 documents (" in bars[-1]
    assert plain_lines[-1].startswith("convert [bold]: 40 documents (")
    assert data.rindex(b"\x1b[?25h") > data.rindex(b"\x1b[?25l")  # the cursor is back
