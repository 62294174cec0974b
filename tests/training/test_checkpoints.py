"""Checkpoints: payloads are refused without running, real ones pass, the newest complete one is found and linked."""

from __future__ import annotations

import os
import pickle
import pickletools
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("composer")

import torch.distributed.checkpoint as dcp  # noqa: E402
from composer import ComposerModel, Trainer  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from ettin_foundry.training import checkpoints as checkpoint  # noqa: E402
from ettin_foundry.training.optimizer import StableAdamW  # noqa: E402

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
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save folder of two batches under Composer's Trainer."""
    folder = tmp_path_factory.mktemp("run")
    model = Toy()
    trainer = Trainer(
        model=model, train_dataloader=DataLoader(torch.randn(8, 4), 4), max_duration="2ba", device="cpu",  # type: ignore[arg-type]
        optimizers=StableAdamW(model.parameters(), 1e-3), save_folder=str(folder), save_interval="1ba", progress_bar=False)
    trainer.fit()
    trainer.close()
    return folder


@pytest.fixture
def pt(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(run / "ep0-ba2-rank0.pt" if (run / "ep0-ba2-rank0.pt").exists() else run / "ep1-ba2-rank0.pt",
                            tmp_path / "ep0-ba2-rank0.pt"))


@pytest.fixture
def sharded(pt: Path, tmp_path: Path) -> Path:
    dcp.save(torch.load(pt, weights_only=False), checkpoint_id=tmp_path / "ep0-ba2")
    return tmp_path / "ep0-ba2"


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_real_checkpoint_passes_and_gives_its_weights(pt, sharded):
    expected = torch.load(pt, weights_only=False)
    loaded = checkpoint.load_checkpoint(pt)
    assert loaded["state"]["timestamp"] == expected["state"]["timestamp"]
    assert (loaded["rng"][0]["numpy"][1] == expected["rng"][0]["numpy"][1]).all()
    for path in (pt, sharded):
        weights, extras = checkpoint.load_model_state(path)
        assert extras == {}
        assert set(weights) == {"0.weight", "0.bias", "1.weight", "1.bias"}
        for name, value in weights.items():
            assert torch.equal(value, expected["state"]["model"][f"model.{name}"])


def test_what_the_clock_wrote_comes_back_from_both_formats(pt, tmp_path):
    state = torch.load(pt, weights_only=False)
    clock = {"config": {"hidden_size": 4, "causal": True}, "objective": "clm", "tokens": 12, "size": None,
             "lineage": ({"source": "a/b", "tokens": 3},)}
    state["state"]["callbacks"]["Clock"] = clock
    torch.save(state, tmp_path / "with.pt")
    dcp.save(state, checkpoint_id=tmp_path / "with")
    for path in (tmp_path / "with.pt", tmp_path / "with"):
        assert checkpoint.load_model_state(path)[1] == clock


def refused(path, says="os.system|posix.system"):
    with pytest.raises(ValueError, match=says):
        checkpoint.scan_pickle(path)


def test_a_payload_in_a_pt_file_is_named_and_not_run(pt, tmp_path):
    mark = tmp_path / "mark"
    state = torch.load(pt, weights_only=False)
    state["state"]["callbacks"]["X"] = Payload(mark)
    torch.save(state, pt)
    refused(pt)
    for read in (checkpoint.load_checkpoint, checkpoint.load_model_state):
        with pytest.raises(ValueError, match="system"):
            read(pt)
    assert not mark.exists()
    torch.load(pt, weights_only=False)  # what Composer would have done
    assert mark.exists()


def test_a_payload_in_metadata_is_named_and_not_run(sharded, tmp_path):
    mark = tmp_path / "mark"
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    refused(sharded)
    refused(sharded / ".metadata")
    with pytest.raises(ValueError, match="system"):
        checkpoint.load_model_state(sharded)
    assert not mark.exists()


def test_a_payload_in_a_sharded_byte_entry_is_named_and_not_run(pt, tmp_path):
    mark = tmp_path / "mark"
    state = torch.load(pt, weights_only=False)
    state["state"]["callbacks"]["Clock"] = {"config": Payload(mark)}
    dcp.save(state, checkpoint_id=tmp_path / "bad")
    refused(tmp_path / "bad")
    with pytest.raises(ValueError, match="system"):
        checkpoint.load_model_state(tmp_path / "bad")
    assert not mark.exists()


@pytest.mark.parametrize("mode", ["pt", "sharded"])
def test_composer_asks_before_it_loads(pt, sharded, mode, tmp_path, monkeypatch):
    """Its own loaders, with nothing but `install_validation` between a payload and its execution."""
    from composer.utils.checkpoint import FileSystemReaderWithValidation, safe_torch_load

    monkeypatch.delenv("CHECKPOINT_VALIDATION_FUNCTION", raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # undone with the test
    mark = tmp_path / "mark"
    torch.save({"state": Payload(mark)}, pt)
    (sharded / ".metadata").write_bytes(pickle.dumps(Payload(mark)))
    checkpoint.install_validation()
    with pytest.raises(ValueError, match="system"):
        if mode == "pt":
            safe_torch_load(pt)
        else:
            FileSystemReaderWithValidation(str(sharded)).read_metadata()
    assert not mark.exists()


def stack_global(*before: bytes) -> bytes:
    return b"\x80\x04" + b"".join(before) + b"\x93."


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


@pytest.mark.parametrize(("data", "says"), [
    (stack_global(text("os"), b"\x94", text("system"), b"\x94"), "os.system"),
    (stack_global(text("os"), b"\x94", b"0", text("system"), b"\x94", b"0", b"h\x00", b"h\x01"), "os.system"),
    (stack_global(text("os"), text("system"), text("torch"), text("Size"), b"0", b"0"), "computes the name"),
    (stack_global(text("torch"), text("Size"), text("os"), text("system"), b"2", b"0"), "computes the name"),
    (b"cos\nsystem\n.", "os.system"),
    (b"(ios\nsystem\n.", "os.system"),
    (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
    (b"ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
    (b"\x80\x02\x82\x01.", "extension registry"),
    (b"\x80\x04\x8c\x05ab", "cannot be read"),
    (b"", "cannot be read"),
], ids=["plain", "through the memo", "popped away", "duplicated", "GLOBAL", "INST", "getattr", "nested bytes", "EXT",
        "cut short", "empty"])
def test_disguised_globals_are_refused(tmp_path, data, says):
    path = tmp_path / ".metadata"
    path.write_bytes(data)
    refused(path, says)


def test_names_out_of_the_memo_are_followed(sharded):
    """`.metadata` repeats its module names through the memo; a scanner that could not follow would refuse it."""
    data = (sharded / ".metadata").read_bytes()
    assert any(op.name == "BINGET" for op, _, _ in pickletools.genops(data))
    checkpoint.scan_pickle(sharded)


def test_file_names_that_leave_the_folder_are_refused(sharded):
    metadata = pickle.loads((sharded / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (sharded / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(sharded, "outside its folder")


def rewrite(pt: Path, change) -> None:
    """Writes the archive anew with `change(members, out)` in between."""
    with zipfile.ZipFile(pt) as archive:
        members = OrderedDict((name, archive.read(name)) for name in archive.namelist())
    with zipfile.ZipFile(pt, "w") as out:
        change(members, out)


def test_archives_that_two_readers_could_read_differently_are_refused(pt, tmp_path):
    original = pt.read_bytes()
    with zipfile.ZipFile(pt) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
    root = name.split("/")[0]

    def copy(members, out, compress=zipfile.ZIP_STORED, **more):
        for member, data in {**members, **more}.items():
            out.writestr(member, data, compress_type=compress)

    cases = {
        "old format, archive behind": pickle.dumps(Payload(tmp_path / "mark")) + original,
        "archive before": original + original,
        "bytes behind": original + b"\x00" * 30,
        "half a file": original[: len(original) // 2],
        "nothing": b"",
        "a plain pickle": pickle.dumps({}),
    }
    for label, data in cases.items():
        pt.write_bytes(data)
        with pytest.raises(ValueError, match="archive|torch.save"):
            checkpoint.scan_pickle(pt)
            pytest.fail(label)
    changes = {
        "a second pickle": lambda m, o: copy(m, o, **{f"{root}/constants.pkl": b"N."}),
        "another root": lambda m, o: copy(m, o, **{"other/data": b""}),
        "compressed": lambda m, o: copy(m, o, zipfile.ZIP_DEFLATED),
        "one name twice": lambda m, o: (copy(m, o), o.writestr(name, b"N.")),
    }
    for label, change in changes.items():
        pt.write_bytes(original)
        rewrite(pt, change)
        with pytest.raises(ValueError, match="torch.save does not write"):
            checkpoint.scan_pickle(pt)
            pytest.fail(label)
    pt.write_bytes(original)
    rewrite(pt, copy)
    checkpoint.scan_pickle(pt)  # so it is not the rewriting that is refused
    assert not (tmp_path / "mark").exists()


def test_missing_files_and_models_are_named(pt, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.scan_pickle(tmp_path / "none.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load_model_state(tmp_path / "empty")
    torch.save({"state": {"model": {}}}, pt)
    with pytest.raises(ValueError, match="no tensor named model"):
        checkpoint.load_model_state(pt)


def test_the_newest_complete_checkpoint_is_found_and_linked(pt, sharded, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    assert checkpoint.newest_complete(folder) is None
    assert checkpoint.repair_latest(folder) is None
    assert checkpoint.newest_complete(tmp_path / "none") is None
    whole = pt.read_bytes()
    for name in ("ep0-ba9-rank0.pt", "ep0-ba10-rank0.pt"):
        (folder / name).write_bytes(whole)
    (folder / "ep0-ba11-rank0.pt").write_bytes(whole[:-40])  # killed while writing
    shutil.copytree(sharded, folder / "ep0-ba12")
    (folder / "ep0-ba12" / ".metadata").unlink()  # likewise
    (folder / "huggingface").mkdir()
    link = folder / "latest-rank0.pt"
    before = sorted(path.name for path in folder.iterdir())
    for state in ("missing", "dangling", "half a file"):
        link.unlink(missing_ok=True)
        if state != "missing":
            link.symlink_to("gone.pt" if state == "dangling" else "ep0-ba11-rank0.pt")
        assert checkpoint.newest_complete(folder) == folder / "ep0-ba10-rank0.pt"
        assert checkpoint.repair_latest(folder) == folder / "ep0-ba10-rank0.pt"
        assert os.readlink(link) == "ep0-ba10-rank0.pt"
    link.unlink()
    link.symlink_to("ep0-ba9-rank0.pt")
    assert checkpoint.repair_latest(folder) == (folder / "ep0-ba9-rank0.pt").resolve()  # a sound link is left alone
    link.unlink()
    assert sorted(path.name for path in folder.iterdir()) == before
    link.write_bytes(b"half")
    with pytest.raises(ValueError, match="damaged file"):
        checkpoint.repair_latest(folder)
    assert link.read_bytes() == b"half"
