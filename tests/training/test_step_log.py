"""steps.jsonl: written in whole runs, also of batches that grow; read, cut off before a resume, compared."""

import json

import pytest

from ettin_foundry.tools.pair import compare_steps
from ettin_foundry.training.callbacks import StepLog
from ettin_foundry.training.steps import STEPS, cut_steps, read_steps


def test_each_line_says_what_its_step_read_and_gave(rising_run):
    folder, seen = rising_run
    steps = read_steps(folder)
    rows = [2, 2, 4, 4, 6, 6, *[8] * (len(steps) - 6)]
    assert [entry["rows"] for entry in steps] == [len(batch["input_ids"]) for batch in seen["batches"]] == rows
    assert [entry["step"] for entry in steps] == [batch["step"] for batch in seen["batches"]] == list(range(len(steps)))
    assert [entry["tokens"] for entry in steps] == seen["tokens"]
    for key, values in (("lr", seen["lrs"]), ("loss", seen["losses"])):
        assert [entry[key] for entry in steps] == values
    assert [entry["ids_hash"] for entry in steps] == [f"{batch['ids_hash']:012x}" for batch in seen["batches"]]
    assert len({entry["ids_hash"] for entry in steps}) == len(steps) > 8
    assert all(entry["seconds"] > 0 for entry in steps)
    assert {(entry["objective"], entry["mask_rate"]) for entry in steps} == {("mlm", 0.3)}
    for before, lr in zip(seen["tokens"], seen["lrs"]):  # the clock counts tokens, whatever the batch sizes
        assert lr == pytest.approx(2e-3 * min(1.0, 1e-10 + (1 - 1e-10) * before / 2000), rel=1e-9)


def test_a_run_without_a_local_folder_is_told_what_to_do():
    for config, folder, words in (({}, None, "save_folder must be a local folder.*None.*callbacks.ettin_steps.folder"),
                                  ({"save_folder": "s3://bucket/run"}, None, "save_folder must be.*s3://bucket/run"),
                                  ({"save_folder": "x"}, "gs://b/c", "callbacks.ettin_steps.folder must be.*gs://b/c")):
        with pytest.raises(ValueError, match=words):
            StepLog(config, folder)


# ------------------------------------------------------------------ the file


def lines(first, last, **changes):
    return [{"step": step, "tokens": 100 * step, "rows": 8, "ids_hash": f"{step:012x}", "loss": 1.5, **changes}
            for step in range(first, last)]


def write(folder, entries, rest=""):
    folder.mkdir(exist_ok=True)
    path = folder / STEPS
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + rest)
    return path


def test_steps_are_read_from_file_or_folder_and_an_unfinished_line_is_passed_over(tmp_path):
    path = write(tmp_path, lines(0, 4), '{"step": 4, "tok')
    assert read_steps(path) == read_steps(tmp_path) == lines(0, 4)
    with pytest.raises(FileNotFoundError, match="nowhere.*callbacks.ettin_steps"):
        read_steps(tmp_path / "nowhere")
    for wrong in ("{broken\n", "[]\n", '{"steps": 3}\n'):
        write(tmp_path, lines(0, 2), wrong + '{"step": 3}\n')
        with pytest.raises(ValueError, match=f"{STEPS} line 3 must be"):
            read_steps(tmp_path)


def test_lines_of_steps_that_are_done_again_are_cut_off(tmp_path):
    for step, rest, left in ((5, "", 5), (9, "", 9), (30, "", 9), (0, "", 0), (9, '{"step": 9, "to', 9),
                             (4, '{"step": 9, "to', 4), (9, "{}\n", 9), (9, "\0\0\0", 9)):
        path = write(tmp_path, lines(0, 9), rest)
        cut_steps(path, step)
        assert read_steps(path) == lines(0, left)
    cut_steps(tmp_path / "none", 3)  # a file that does not exist has none


def test_the_first_step_that_read_other_rows_is_named(tmp_path):
    write(tmp_path / "a", lines(0, 6))
    for other, first in ((lines(0, 6, loss=9.0), None), ([*lines(0, 3), *lines(3, 6, ids_hash="0" * 12)], 3),
                         ([*lines(0, 5), *lines(5, 6, rows=4)], 5), ([*lines(0, 2), *lines(2, 6, tokens=7)], 2),
                         (lines(0, 4), 4), (lines(0, 8), 6), ([*lines(0, 2), *lines(3, 6)], 2), ([], 0)):
        write(tmp_path / "b", other)
        assert compare_steps(tmp_path / "a", tmp_path / "b") == compare_steps(tmp_path / "b", tmp_path / "a") == first
