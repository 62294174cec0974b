"""The log of steps as a file: what is read, what is cut off before a resume, where two runs differ."""

import json

import pytest

from ettin_foundry.training.steps import STEPS, compare_steps, cut_steps, read_steps


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
    with pytest.raises(FileNotFoundError, match="nowhere.*callbacks.ettin_steps and a local save_folder"):
        read_steps(tmp_path / "nowhere")
    for wrong in ("{broken\n", "[]\n", '{"steps": 3}\n'):
        write(tmp_path, lines(0, 2), wrong + '{"step": 3}\n')
        with pytest.raises(ValueError, match=f"{STEPS} line 3: .*each line is a JSON object with a step"):
            read_steps(tmp_path)


@pytest.mark.parametrize(("step", "rest", "left"), [
    (5, "", 5), (9, "", 9), (30, "", 9), (0, "", 0), (9, '{"step": 9, "to', 9), (4, '{"step": 9, "to', 4),
    (9, "{}\n", 9), (9, "\0\0\0", 9)])
def test_lines_of_steps_that_are_done_again_are_cut_off(tmp_path, step, rest, left):
    path = write(tmp_path, lines(0, 9), rest)
    assert cut_steps(path, step) == left
    assert read_steps(path) == lines(0, left)
    assert cut_steps(tmp_path / "none", 3) == 0


@pytest.mark.parametrize(("other", "first"), [
    (lines(0, 6), None), (lines(0, 6, loss=9.0), None), ([*lines(0, 3), *lines(3, 6, ids_hash="0" * 12)], 3),
    ([*lines(0, 5), *lines(5, 6, rows=4)], 5), ([*lines(0, 2), *lines(2, 6, tokens=7)], 2), (lines(0, 4), 4),
    (lines(0, 8), 6), ([*lines(0, 2), *lines(3, 6)], 2), ([], 0)])
def test_the_first_step_that_read_other_rows_is_named(tmp_path, other, first):
    write(tmp_path / "a", lines(0, 6))
    write(tmp_path / "b", other)
    assert compare_steps(tmp_path / "a", tmp_path / "b") == first
    assert compare_steps(tmp_path / "b", tmp_path / "a") == first
