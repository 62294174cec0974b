"""Checkpoints: real ones pass, the newest complete one is found and linked."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ettin_foundry.training import checkpoints, loading

pytestmark = pytest.mark.filterwarnings("ignore")
PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "save_kill.py"


@pytest.fixture
def pt(rising_run: tuple, tmp_path: Path) -> Path:
    """A checkpoint that Composer's Trainer wrote."""
    return Path(shutil.copy(next(rising_run[0].glob("ep*-ba6-rank0.pt")), tmp_path / "ep0-ba6-rank0.pt"))


@pytest.fixture
def sharded(pt: Path, tmp_path: Path) -> Path:
    """The same checkpoint as FSDP2 with `state_dict_type: sharded` writes it."""
    dcp.save(torch.load(pt, weights_only=False), checkpoint_id=tmp_path / "ep0-ba6")
    return tmp_path / "ep0-ba6"


def test_a_real_checkpoint_of_either_kind_gives_its_weights_and_record(pt, sharded, tmp_path):
    expected = torch.load(pt, weights_only=False)
    loaded, state = loading.load_checkpoint(pt), expected["state"]
    assert loaded["state"]["timestamp"] == state["timestamp"]
    assert (loaded["rng"][0]["numpy"][1] == expected["rng"][0]["numpy"][1]).all()
    for path in (pt, sharded):
        weights, record = checkpoints.load_model_state(path)
        assert {f"model.{name}" for name in weights} == set(state["model"])
        assert all(torch.equal(value, state["model"][f"model.{name}"]) for name, value in weights.items())
        head = checkpoints.read_head(path)
        assert head.record == record == checkpoints.decode_record(state["callbacks"]["Clock"]) and record["batch"] == 6
        assert head.data["rows"] == state["dataset_state"]["train"]["rows"] > 0 and head.has_moments
    del state["optimizers"]
    dcp.save(expected, checkpoint_id=tmp_path / "bare")
    assert not checkpoints.read_head(tmp_path / "bare").has_moments


def test_a_sharded_checkpoint_that_is_partial_or_leaves_its_folder_is_refused(sharded):
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    data = next(sharded.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{data.name} is missing or cut short"):
        checkpoints.read_head(sharded)
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside its folder"):
        checkpoints.read_head(sharded)


def test_the_newest_complete_checkpoint_is_found_and_linked(pt, sharded, tmp_path, monkeypatch, caplog):
    folder, whole = tmp_path / "runs", pt.read_bytes()
    folder.mkdir()
    assert checkpoints.repair_latest(folder) is None is checkpoints.newest_complete(tmp_path / "none")
    for batch in (9, 10):
        (folder / f"ep0-ba{batch}-rank0.pt").write_bytes(whole)
    (folder / "ep0-ba11-rank0.pt").write_bytes(whole[:-40])  # killed while writing
    shutil.copytree(sharded, folder / "ep0-ba12", ignore=lambda *_: [".metadata"])  # likewise
    assert checkpoints.repair_latest(shutil.copytree(folder / "ep0-ba12", tmp_path / "first" / "ba1").parent) is None
    (folder / "ep0-ba13-rank0.pt").touch()
    caplog.clear()
    (folder / "huggingface").mkdir()
    link, before = folder / "latest-rank0.pt", sorted(path.name for path in folder.iterdir())
    os.utime(folder / "ep0-ba10-rank0.pt", (0, 0))  # the clock was set back
    # missing, dangling, half a file, old, in a circle
    for target in (None, "gone.pt", "ep0-ba11-rank0.pt", "ep0-ba9-rank0.pt", link.name):
        link.unlink(missing_ok=True)
        if target:
            link.symlink_to(target)
        assert checkpoints.newest_complete(folder) == folder / "ep0-ba10-rank0.pt"
        checkpoints.repair_latest(folder)
        assert os.readlink(link) == "ep0-ba10-rank0.pt"
    said = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    for line, path, why in zip(said, ("ep0-ba13-rank0.pt", "ep0-ba12", "ep0-ba11-rank0.pt"),
                               ("not a zip file", "No such file.*ba12/.metadata", "not a zip file")):
        assert re.search(f"{path} is passed over and kept: .*{why}", line)
    assert len(said) == 3 * 5
    link.unlink()
    assert sorted(path.name for path in folder.iterdir()) == before
    link.write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged file"):
        checkpoints.repair_latest(folder)
    assert link.read_bytes() == b"half"
    shutil.copy(sharded / ".metadata", folder / "ep0-ba12")
    monkeypatch.setenv("RANK", "1")
    caplog.clear()
    assert checkpoints.repair_latest(folder) == folder / "ep0-ba12" and "passed over" not in caplog.text
    assert os.readlink(folder / "latest-sharded-rank1") == "ep0-ba12"
    assert checkpoints.locate(folder) == folder / "ep0-ba12"


def test_a_save_that_ends_anywhere_leaves_a_whole_newest_checkpoint(rising_run, tmp_path):
    checkpoint = next(rising_run[0].glob("ep*-ba6-rank0.pt"))
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else tmp_path  # where fsync takes no time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run([sys.executable, PROGRAM, checkpoint, Path(folder, "saves"), "80"], text=True,
                              capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_damaged_checkpoint_is_passed_over_and_kept(rising_run, tmp_path, caplog):
    for batch in (3, 6):
        shutil.copy(rising_run[0] / f"ep0-ba{batch}-rank0.pt", tmp_path)
    before, newest = tmp_path / "ep0-ba3-rank0.pt", tmp_path / "ep0-ba6-rank0.pt"
    (tmp_path / "latest-rank0.pt").symlink_to(newest.name)
    for path in (newest, before):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        if path == newest:
            assert checkpoints.repair_latest(tmp_path) == before
            assert os.path.samefile(tmp_path / "latest-rank0.pt", before)
            assert f"{newest} is passed over and kept" in caplog.text
    with pytest.raises(ValueError, match="no checkpoint in .* is sound"):
        checkpoints.repair_latest(tmp_path)
    assert before.read_bytes() == content
    torch.save({}, newest)
    whole = newest.read_bytes()
    for at in range(len(whole)):  # flags and versions, too, which the reader refuses in its own ways
        newest.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1:])
        checkpoints.damage(newest) if checkpoints.is_complete(newest) else None  # raises nothing
