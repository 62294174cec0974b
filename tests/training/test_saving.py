"""Saving: what a file holds while training goes on, the order of file, link and removal, errors, folders and stores."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import threading
import time
from pathlib import Path

import nano_run
import pytest
import torch
from s3_server import S3Server

from ettin_foundry.training import checkpoints, saving, sources

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=["file", "sharded"])
def saves(request, rising_run, tmp_path, monkeypatch):
    """A run's saver that has saved twice, and something damaged in the third's place."""
    monkeypatch.syspath_prepend(nano_run.ROOT / "benchmarks")
    import save_kill

    content = torch.load(rising_run[0] / "ep0-ba6-rank0.pt", weights_only=False)["state"]
    made = save_kill.Saves(content, tmp_path, request.param == "sharded")
    made.restore(damaged=True)
    return made


def present(saves):
    return {path for path in saves.folder.iterdir() if not path.is_symlink()}


def test_a_save_holds_its_step_then_latest_leads_to_it_then_older_ones_go(saves, monkeypatch):
    """While a file is written, training goes on and changes tensors in place; what was there stays until the end."""
    allowed, link, seen = threading.Event(), next(path for path in saves.folder.iterdir() if path.is_symlink()), []
    module, name = (saving.checkpoint, "save_checkpoint") if saves.sharded else (saving, "write_whole")
    write = getattr(module, name)

    def looked(*args, **kwargs):
        assert saves.sharded or allowed.wait(60)
        stale = saves.sharded and checkpoints.is_complete(saves.paths[3])  # half of it could be new
        seen.append((present(saves), stale, os.path.realpath(link)))
        return write(*args, **kwargs)

    monkeypatch.setattr(module, name, looked)
    saves.saver.num_checkpoints_to_keep, saves.saver.saved_checkpoints = 0, []  # the newest stays, in this folder
    saves.saver.fit_start(saves.state, None)  # of a new process
    model = saves.contents[3]["model"]
    expected = {name: value.clone() for name, value in model.items()}
    saves.saver._save_checkpoint(saves.state, saves.logger)
    for value in model.values():
        value.add_(1)
    allowed.set()
    saves.saver.fit_end(None, None)  # as the next save, it waits
    weights, _ = checkpoints.load_model_state(link)
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in weights.items())
    assert seen == [({*saves.paths[1:]}, False, str(saves.paths[2]))] and present(saves) == {saves.paths[3]}


def test_a_failed_save_stops_the_run_at_its_next_step_and_removes_nothing(saves, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"ba3.*: not saved: .*No space left on device.*before it are whole: make room"):
        saves.saver._save_checkpoint(saves.state, saves.logger)
        for _ in range(600):
            saves.saver.batch_end(saves.state, saves.logger)
            time.sleep(0.1)
    monkeypatch.undo()
    assert present(saves) == {*saves.paths[1:]} and checkpoints.repair_latest(saves.folder) == saves.paths[2]
    shutil.rmtree(saves.paths[1]) if saves.sharded else saves.paths[1].unlink()  # by hand, while the run goes on
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed there
    saves.saver.num_checkpoints_to_keep = 1
    saves.save()
    assert checkpoints.complete_checkpoints(saves.folder) == [saves.paths[3]]


def test_a_finished_run_started_again_says_so_and_ends_well(rising_run, data_set, tmp_path, capsys):
    shutil.copytree(rising_run[0], tmp_path / rising_run[0].name, symlinks=True)
    recipe = [arg for arg in (*nano_run.SMALL, *nano_run.RISING) if not arg.startswith("~")]
    assert nano_run.program().main([str(nano_run.ROOT / "yamls/nano.yaml"), *recipe, "eval_loader=null",
                                    f"variables.data={data_set}", f"variables.save_root={tmp_path}"]) == 0
    assert re.search(r"^finished: .*ep0-ba10-rank0.pt holds 3,\d+ tokens, 10 steps", capsys.readouterr().out, re.M)


def test_a_run_in_a_store_goes_on_from_what_latest_names_there(rising_run, data_set, capture, tmp_path, monkeypatch):
    """The host, which keeps what it downloads, would take the first of these each time."""
    monkeypatch.chdir(tmp_path)
    with S3Server() as server:
        server.connect(monkeypatch)
        for batch, says in ((3, "killed"), (6, "killed"), (10, "batch 10 has come to max_duration=3000tok")):
            name = f"runs/ep0-ba{batch}-rank0.pt"
            server.put(name, (rising_run[0] / Path(name).name).read_bytes())
            server.put("runs/latest-rank0.pt.symlink", name.encode())
            with pytest.raises((RuntimeError, sources.Finished), match=says):
                nano_run.run(data_set, tmp_path, *nano_run.RISING, f"save_folder={server.url('runs')}",
                             "~callbacks.ettin_steps", f"callbacks.capture.die_at={batch}")
            assert capture.losses == []


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
