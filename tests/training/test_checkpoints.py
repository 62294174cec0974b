"""Checkpoints: payloads are refused without running, real ones pass, the newest complete one is found and linked."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer import ComposerModel, Trainer
from torch import nn
from torch.utils.data import DataLoader

from ettin_foundry.training import checkpoints
from ettin_foundry.training.optimizer import StableAdamW

pytestmark = pytest.mark.filterwarnings("ignore")


class Toy(ComposerModel):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, batch):
        return self.model(batch)

    def loss(self, outputs, batch):
        return outputs.square().mean()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two batches under Composer's Trainer."""
    folder, model = tmp_path_factory.mktemp("run"), Toy()
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(torch.randn(8, 4), 4), max_duration="2ba", device="cpu",  # type: ignore[arg-type]
        optimizers=StableAdamW(model.parameters(), 1e-3), save_folder=str(folder), save_interval="1ba", progress_bar=False)
    trainer.fit()
    trainer.close()
    return next(folder.glob("ep*-ba2-rank0.pt"))


@pytest.fixture
def pt(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(saved, tmp_path / "ep0-ba2-rank0.pt"))


@pytest.fixture
def sharded(pt: Path, tmp_path: Path) -> Path:
    """The same checkpoint as FSDP2 with `state_dict_type: sharded` writes it."""
    dcp.save(torch.load(pt, weights_only=False), checkpoint_id=tmp_path / "ep0-ba2")
    return tmp_path / "ep0-ba2"


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_real_checkpoint_of_either_kind_gives_its_weights_and_record(pt, sharded, tmp_path):
    expected = torch.load(pt, weights_only=False)
    loaded = checkpoints.load_checkpoint(pt)
    assert loaded["state"]["timestamp"] == expected["state"]["timestamp"]
    assert (loaded["rng"][0]["numpy"][1] == expected["rng"][0]["numpy"][1]).all()
    for path in (pt, sharded):
        weights, record = checkpoints.load_model_state(path)
        assert record == {} and set(weights) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        for name, value in weights.items():
            assert torch.equal(value, expected["state"]["model"][f"model.{name}"])
        assert set(checkpoints.load_model_state(path, names=["1.bias"])[0]) == {"1.bias"}
    clock = {"config": {"hidden_size": 4, "causal": True}, "objective": "clm", "lineage": ({"tokens": 3},)}
    expected["state"]["callbacks"]["Clock"] = clock
    torch.save(expected, tmp_path / "with.pt")
    dcp.save(expected, checkpoint_id=tmp_path / "with")
    for path in (tmp_path / "with.pt", tmp_path / "with"):
        head = checkpoints.read_head(path)
        assert head.record == checkpoints.load_model_state(path)[1] == clock and head.has_moments
    del expected["state"]["optimizers"]
    dcp.save(expected, checkpoint_id=tmp_path / "bare")
    assert not checkpoints.read_head(tmp_path / "bare").has_moments


def test_a_payload_is_named_and_not_run(pt, tmp_path, monkeypatch):
    """Neither by our readers nor by Composer's, with nothing but `install_validation` before it."""
    from composer.utils.checkpoint import FileSystemReaderWithValidation, safe_torch_load

    monkeypatch.setattr(os, "environ", {**os.environ})  # undone with the test
    os.environ.pop("CHECKPOINT_VALIDATION_FUNCTION", None)
    checkpoints.install_validation()
    mark, sharded = tmp_path / "mark", tmp_path / "ep0-ba2"
    state = torch.load(pt, weights_only=False)
    dcp.save(state, checkpoint_id=sharded)
    state["state"]["callbacks"]["Clock"] = {"config": Payload(mark)}
    torch.save(state, pt)
    dcp.save(state, checkpoint_id=tmp_path / "bytes")
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    wanted = {"state": {"callbacks": {"Clock": {"config": None}}}}
    for read, paths in (
            (checkpoints.load_checkpoint, [pt]), (checkpoints.load_model_state, [pt, sharded, tmp_path / "bytes"]),
            (checkpoints.read_head, [pt, sharded, tmp_path / "bytes"]), (safe_torch_load, [pt]),
            (lambda path: dcp.load(wanted, storage_reader=FileSystemReaderWithValidation(str(path))),
             [sharded, tmp_path / "bytes"])):
        for path in paths:
            with pytest.raises((ValueError, dcp.CheckpointException), match="system"):
                read(path)
    assert not mark.exists()
    torch.load(pt, weights_only=False)  # what Composer would have done
    assert mark.exists()


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


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def rewritten(pt: Path, data: bytes | None = None, *more: tuple[str, bytes], compress: int = zipfile.ZIP_STORED) -> None:
    """Writes the archive anew: with another pickle, with more members, compressed."""
    with zipfile.ZipFile(pt) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(pt, "w") as out:
        for member, content in (*members.items(), *more):
            pickled = member.endswith("data.pkl") and data is not None
            out.writestr(member, data if pickled else content, compress_type=compress)


CALL = b"\x85R."  # a tuple of the argument, then the call


@pytest.mark.parametrize("code", [
    b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x94\x93",
    b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x94\x93" + b"0h\x00h\x01\x93",
    b"cos\nsystem\n", b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n",
    b"ctorch.storage\n_load_from_bytes\n", b"cnumpy.core.multiarray\n_reconstruct.__globals__\n", b"\x82\x01",
    b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", b"(" + text("x") + b"ios\nsystem\n",
], ids=["plain", "memo", "GLOBAL", "posix", "eval", "getattr", "nested bytes", "attributes", "extension", "rebuild", "INST"])
def test_a_pickle_that_calls_something_is_refused_and_not_run(code, pt, tmp_path):
    mark = tmp_path / "mark"
    rewritten(pt, b"\x80\x02" * (not code.startswith(b"\x80")) + code + text(f"touch {mark}") + CALL)
    with pytest.raises(ValueError, match="could run code"):
        checkpoints.load_checkpoint(pt)
    assert not mark.exists()


@pytest.mark.parametrize("change", [
    lambda pt, mark: pt.write_bytes(pickle.dumps(Payload(mark)) + pt.read_bytes()),  # the old format, an archive behind it
    lambda pt, mark: pt.write_bytes(pickle.dumps(Payload(mark))),
    lambda pt, mark: pt.write_bytes(pt.read_bytes()[:5000]),
    lambda pt, mark: pt.write_bytes(b""),
    lambda pt, mark: rewritten(pt, None, (f"{pt.stem}/constants.pkl", pickle.dumps(Payload(mark)))),  # TorchScript
    lambda pt, mark: rewritten(pt, b"\x80\x04\x8c\x05ab"),
], ids=["old format", "a plain pickle", "half a file", "nothing", "TorchScript", "pickle cut short"])
def test_what_torch_save_does_not_write_is_refused(change, pt, tmp_path):
    change(pt, tmp_path / "mark")
    with pytest.raises(ValueError):
        checkpoints.load_checkpoint(pt)
    assert not (tmp_path / "mark").exists()


def test_missing_files_and_models_are_named(pt, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, says in ((tmp_path / "none.pt", "no such checkpoint"), (tmp_path / "empty", "no complete checkpoint")):
        with pytest.raises(FileNotFoundError, match=says):
            checkpoints.load_model_state(path)
    torch.save({"state": {"model": {}}}, pt)
    with pytest.raises(ValueError, match="no tensor named model"):
        checkpoints.load_model_state(pt)


def test_the_newest_complete_checkpoint_is_found_and_linked(pt, sharded, tmp_path):
    folder, whole = tmp_path / "runs", pt.read_bytes()
    folder.mkdir()
    checkpoints.repair_latest(folder)
    assert checkpoints.newest_complete(folder) is None is checkpoints.newest_complete(tmp_path / "none")
    for batch in (9, 10):
        (folder / f"ep0-ba{batch}-rank0.pt").write_bytes(whole)
    (folder / "ep0-ba11-rank0.pt").write_bytes(whole[:-40])  # killed while writing
    shutil.copytree(sharded, folder / "ep0-ba12", ignore=lambda *_: [".metadata"])  # likewise
    (folder / "huggingface").mkdir()
    link, before = folder / "latest-rank0.pt", sorted(path.name for path in folder.iterdir())
    for target in (None, "gone.pt", "ep0-ba11-rank0.pt"):  # missing, dangling, to half a file
        link.unlink(missing_ok=True)
        if target:
            link.symlink_to(target)
        assert checkpoints.newest_complete(folder) == folder / "ep0-ba10-rank0.pt"
        checkpoints.repair_latest(folder)
        assert os.readlink(link) == "ep0-ba10-rank0.pt"
    link.unlink()
    link.symlink_to("ep0-ba9-rank0.pt")
    checkpoints.repair_latest(folder)
    assert os.readlink(link) == "ep0-ba9-rank0.pt"  # a sound link is left alone
    link.unlink()
    assert sorted(path.name for path in folder.iterdir()) == before
    link.write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged file"):
        checkpoints.repair_latest(folder)
    assert link.read_bytes() == b"half"
    shutil.copy(sharded / ".metadata", folder / "ep0-ba12")
    checkpoints.repair_latest(folder, latest="latest-sharded-rank1")
    assert os.readlink(folder / "latest-sharded-rank1") == "ep0-ba12" and checkpoints.locate(folder) == folder / "ep0-ba12"
