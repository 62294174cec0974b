"""Saving: what a file holds while training goes on, the order of file, link and removal, errors, where it cannot be."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import nano_run
import pytest
import torch

from ettin_foundry.training import checkpoints, saving

pytestmark = pytest.mark.filterwarnings("ignore")
PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "save_kill.py"


@pytest.fixture(params=["file", "sharded"])
def saves(request, rising_run, tmp_path) -> Any:
    """A saver without a run, whose first two checkpoints are there."""
    spec: Any = importlib.util.spec_from_file_location("save_kill", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    content = torch.load(next(rising_run[0].glob("ep*-ba6-rank0.pt")), weights_only=False)["state"]
    made = module.Saves(content, tmp_path, request.param == "sharded")
    made.restore(damaged=True)
    return made


def present(saves) -> set[str]:
    return {path.name for path in saves.folder.iterdir() if not path.is_symlink()}


def test_a_save_holds_its_step_then_latest_leads_to_it_then_older_ones_go(saves, monkeypatch):
    """While it is written, training changes tensors in place, unless it waits, and what was there stays."""
    write, saver, allowed = saving.write_whole, saves.saver, threading.Event()
    earlier, seen = {path.name for path in saves.paths[1:]}, []

    def look(*args: Any) -> None:
        assert saves.sharded or allowed.wait(60)
        stale = saves.sharded and checkpoints.is_complete(saves.paths[3])  # the record of what is written over
        link = next(path for path in saves.folder.iterdir() if path.is_symlink())
        seen.append((present(saves) == earlier, stale, os.path.realpath(link) == str(saves.paths[2])))

    def save_sharded(*args: Any, **kwargs: Any) -> Any:
        look()
        return save(*args, **kwargs)

    save = saving.checkpoint.save_checkpoint
    monkeypatch.setattr(saving.checkpoint, "save_checkpoint", save_sharded)
    monkeypatch.setattr(saving, "write_whole", lambda *args: (look(), write(*args)))
    saver.num_checkpoints_to_keep = 0  # in a folder of this machine the newest stays
    model = saves.contents[3]["model"]
    expected = {name: value.clone() for name, value in model.items()}
    saver._save_checkpoint(saves.state, saves.logger)
    for value in model.values():
        value.add_(1)
    allowed.set()
    saver.fit_end(None, None)  # as the next save, it waits
    weights, _ = checkpoints.load_model_state(saves.folder)
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in weights.items())
    assert seen == [(True, False, True)] and present(saves) == {saves.paths[3].name}


def test_a_failed_save_stops_the_run_at_its_next_step_and_removes_nothing(saves, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = present(saves)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"ba3\S*: not saved: .*No space left on device.*before it are whole: make room"):
        saves.saver._save_checkpoint(saves.state, saves.logger)
        for _ in range(600):
            saves.saver.batch_end(saves.state, saves.logger)
            time.sleep(0.1)
    monkeypatch.undo()
    assert present(saves) == before and checkpoints.repair_latest(saves.folder) == saves.paths[2]
    shutil.rmtree(saves.paths[1]) if saves.sharded else saves.paths[1].unlink()  # by hand, while the run goes on
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed there
    saves.saver.num_checkpoints_to_keep = 1
    saves.save()
    assert checkpoints.complete_checkpoints(saves.folder) == [saves.paths[3]]


def test_a_run_that_is_finished_says_so_and_ends_well(rising_run, data_set, tmp_path, capsys):
    shutil.copytree(rising_run[0], tmp_path / rising_run[0].name, symlinks=True)
    recipe = [arg for arg in (*nano_run.SMALL, *nano_run.RISING) if not arg.startswith("~")]
    argv = [str(nano_run.ROOT / "yamls/nano.yaml"), *recipe, "eval_loader=null", f"variables.data={data_set}",
            f"variables.save_root={tmp_path}"]
    assert nano_run.program().main(argv) == 0
    assert re.search(r"^finished: .*ep0-ba10-rank0.pt holds 3,\d+ tokens, 10 steps", capsys.readouterr().out, re.M)


def test_a_save_folder_that_cannot_be_written_to_is_refused_before_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "circle", Path("/proc/none")):
        with pytest.raises(ValueError, match=f"save_folder must be a folder to write to, got '{folder}'"):
            checkpoints.check_folder(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as on a full disk, names can be made and no bytes
    try:
        with pytest.raises(ValueError, match="make room"):
            checkpoints.check_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.check_folder(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
