"""What a person sees of a run: in a log, on a terminal, and by `ettin watch`."""

import contextlib
import json
import logging
import os
import pty
import re
import sys
import threading

import nano_run
import pytest

import ettin_foundry
from ettin_foundry.training.checkpoints import newest_complete
from ettin_foundry.training.steps import STEPS, read_steps

EVALUATES = ["variables.label=seen", "eval_interval=4ba"]


@pytest.fixture(scope="module")
def logged(data_set, tmp_path_factory):
    """A run of eight steps whose standard error is a file: its lines, its trainer, its folder."""
    folder, root, ours = tmp_path_factory.mktemp("logged"), logging.getLogger(), logging.getLogger("ettin_foundry")
    before, sys.stderr = (sys.stderr, root.handlers, ours.level), (folder / "err").open("w")
    ettin_foundry.register()
    try:
        trainer = nano_run.run(data_set, folder, *EVALUATES, "loggers.ettin_console={interval: 2ba}",
                               "loggers.inmemory={}", evaluate=True)
        trainer.close()
    finally:
        written, (sys.stderr, root.handlers, level) = sys.stderr, before
        ours.setLevel(level)
        written.close()
    return (folder / "err").read_text(), trainer, folder / "nano-seen-pretrain"


def test_a_log_has_a_line_an_interval_an_evaluation_and_a_checkpoint_and_nothing_else(logged):
    text, trainer, folder = logged
    assert not re.search("\r|\x1b| object at 0x|Warning", text)
    lines = [line[20:] for line in text.splitlines()]  # after date and time
    lines = [line for line in lines if not line.startswith("attention ")]  # told by a process's first run alone
    kinds = ["blocks", "start", "train", "train", "train", "eval", "saved", "train", "train", "eval",
             "saved", "finished"]
    assert [line.split()[0] for line in lines] == kinds
    told = [dict(word.split("=", 1) for word in line.split()[1:] if "=" in word) for line in lines]
    steps, [loss] = read_steps(folder), [float(m.compute()) for k, m in trainer.state.eval_metrics["eval"].items()
                                         if k == "TargetCrossEntropy"]
    for entry in (entry for kind, entry in zip(kinds, told) if kind == "train"):
        step = steps[int(entry["step"]) - 1]
        assert (entry["loss"], entry["lr"]) == (f"{step['loss']:.4f}", f"{step['lr']:.3e}")
        assert entry["objective"] == "mlm" and int(entry["tokens"]) > step["tokens"]
    assert float(told[-3]["loss"]) == pytest.approx(loss, abs=5e-5)  # as printed
    newest = newest_complete(folder)
    assert told[-2]["path"] == str(newest) and told[-2]["MB"] == f"{newest.stat().st_size / 1e6:.1f}"
    assert told[-1]["folder"] == told[1]["folder"] == str(folder) and told[-1]["step"] == "8"
    beside = trainer.logger.destinations[-1]  # other loggers are given what the host gives them
    assert {"n_params", "train_loader"} <= beside.hyperparameters.keys() and len(beside.data["loss/train/total"]) == 8


def at_the_end(output):
    """The lines on a terminal of unlimited height, where a line is wiped out before it is written again."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[^\x1b\n]+|\n", output):
        row += {"\n": 1, "\x1b[1A": -1}.get(part, 0)
        lines += [""] * (row + 1 - len(lines))
        lines[row] = "" if part == "\x1b[2K" else lines[row] + part.strip("\r\n") * (part[0] != "\x1b")
    return [line.strip() for line in lines if line.strip()]


def test_a_terminal_shows_a_bar_below_whole_lines_and_no_warning(data_set, tmp_path, monkeypatch):
    from composer import Callback
    from llmfoundry.registry import callbacks

    class Chatty(Callback):  # another library's logger, and a print, in each step
        def batch_end(self, state, logger):
            logging.getLogger("other").warning("words " * 25 + "of step %d", state.timestamp.batch)
            print("printed", state.timestamp.batch.value)

    callbacks.register("chatty", func=Chatty)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERM", "xterm")
    root, ours = logging.getLogger(), logging.getLogger("ettin_foundry")
    before, (ours_end, end) = (root.handlers, ours.level), pty.openpty()
    chunks: list[bytes] = []

    def read():
        with contextlib.suppress(OSError):  # the terminal is closed
            while chunk := os.read(ours_end, 65536):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    ettin_foundry.register()
    try:
        with open(end, "w", buffering=1) as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            patch.setattr(sys, "stdout", terminal)
            nano_run.run(data_set, tmp_path, *EVALUATES, "loggers.ettin_console={}", "callbacks.chatty={}",
                         evaluate=True).close()
    finally:
        root.handlers = before[0]
        ours.setLevel(before[1])
        reader.join()
        os.close(ours_end)
    output = b"".join(chunks).decode()
    assert re.search(r"━.*%.*tokens.*loss [0-9.]+ .*lr", output)
    seen = at_the_end(output)
    assert not [line for line in seen if re.search("━| object at 0x|UserWarning", line)]
    assert len(seen) < 40  # 16 of them are made here
    for step in range(1, 9):
        assert sum(line.endswith(f"warning other: {'words ' * 25}of step {step}") for line in seen) == 1
        assert f"printed {step}" in seen
    assert sum("eval " in line for line in seen) == sum("saved path" in line for line in seen) == 2
    assert re.search("finished run=nano-seen-pretrain tokens=[0-9]+ step=8 loss=", seen[-1])


def test_watch_shows_a_run_while_it_is_written_and_says_whether_it_lives(logged, ettin, tmp_path):
    steps, lines = read_steps(logged[2]), (logged[2] / STEPS).read_bytes().splitlines(keepends=True)
    code, shown, _ = ettin("watch", logged[2] / STEPS)
    assert code == 0 and re.search("nano-seen-pretrain +finished .*100% .* mlm ", shown)
    assert "loss of nano-seen-pretrain over tokens" in shown
    growing = tmp_path / "a" / STEPS
    growing.parent.mkdir()
    (tmp_path / "a" / "run.json").write_text(json.dumps({"max_duration": "16ba", "finished": False}))
    growing.write_bytes(b"".join(lines[:4]) + lines[4][:20])
    speed = (steps[3]["tokens"] - steps[0]["tokens"]) / sum(step["seconds"] for step in steps[:3])
    loss = sum(step["loss"] for step in steps[:4]) / 4
    seen = ettin("watch", tmp_path)[1].splitlines()[1].split()  # as the root of a suite
    assert seen[:2] == ["a", "running"] and seen[3:5] == ["25%", f"{loss:.4f}"] and seen[7] == f"{speed:,.0f}"
    os.utime(growing, (0, 0))
    assert ettin("watch", tmp_path)[1].splitlines()[1].split()[:2] == ["a", "stopped"]
    assert "no steps.jsonl there" in ettin("watch", tmp_path / "none")[2]
