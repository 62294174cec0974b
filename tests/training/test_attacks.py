"""Files from elsewhere: nothing in them runs; one line names the file and, of a pickle, what it asks for."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import nano_run
import numpy as np
import parity
import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer.utils import checkpoint as host
from torch.distributed.checkpoint.metadata import MetadataIndex

from ettin_foundry.data import tokenizer
from ettin_foundry.hub.average import average_checkpoints
from ettin_foundry.hub.folder import export_checkpoint, export_model
from ettin_foundry.hub.load import load_model
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.training import clock, loading
from ettin_foundry.training.checkpoints import read_head
from ettin_foundry.training.run_config import read

pytestmark = pytest.mark.filterwarnings("ignore")
loading.make_safe(host)  # as the clock of any run of ours does


@pytest.fixture
def mark(tmp_path: Path):
    """A file that an attack makes if it runs; in the end it must not be there."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refused(says: tuple, reads: Any, *args: Any) -> None:
    with pytest.raises((ValueError, dcp.CheckpointException)) as error:
        reads(*args)
    assert all(str(word) in str(error.value) for word in says), error.value


def host_reads(path: Path, into: Any = None) -> Any:
    """As Composer: one file, or a folder into the state of a run."""
    if not path.is_dir():
        return host.safe_torch_load(path)
    return dcp.load(into, storage_reader=host.FileSystemReaderWithValidation(str(path)))


def put(content: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    if isinstance(content, list):
        return [put(each, place[1:], value) for each in content]
    return {**content, place[0]: put(content.get(place[0], {}), place[1:], value)}


PLACES = {"a weight": ("state", "model", "model.output_bias"), "a moment": ("state", "optimizers", "x", "state", "y"),
          "a callback": ("state", "callbacks", "Clock", "config"), "the rows": ("state", "dataset_state", "train"),
          "a generator": ("rng", 0, "python"), "a version": ("state", "metadata", "torch_version"), "all of it": ()}


@pytest.mark.parametrize("name", PLACES)
def test_a_payload_anywhere_in_a_checkpoint(name, rising_run, mark, tmp_path, data_set):
    place, pt, sharded, out = PLACES[name], tmp_path / "ba6.pt", tmp_path / "ba6", tmp_path / "out.pt"
    content = torch.load(next(rising_run[0].glob("ep*-ba6-rank0.pt")), weights_only=False)
    torch.save(put(content, place, Payload(mark)), pt)
    torch.load(pt, weights_only=False)  # the attack works
    mark.unlink()
    for reads, args in ((read_head, [pt]), (load_model, [pt]), (host_reads, [pt]), (evaluate, [pt, data_set]),
                        (export_checkpoint, [pt, out]), (average_checkpoints, [[pt, pt], out])):
        refused((f"{pt}: its pickle asks for ", "system"), reads, *args)
    if place:
        dcp.save(put(content, place, Payload(mark)), checkpoint_id=sharded)
        says = (f"{sharded}/__0_0.distcp: its pickle asks for ", "system")
        refused(says, host_reads, sharded, put(content, place, None))
        for reads in (read_head, load_model) if name == "a callback" else ():
            refused(says, reads, sharded)


NUMBER = b"c_codecs\nencode\nX\10\0\0\0AAAAAAAAX\6\0\0\0latin1\x86R"  # eight bytes
OPCODES = {  # a tuple of the command follows, and the call
    "a global": b"cos\nsystem\n", "a built-in": b"cbuiltins\neval\n", "an attribute": b"cbuiltins\ngetattr\n",
    "a pickle in a pickle": b"ctorch.storage\n_load_from_bytes\n", "an extension": b"\x82\1",
    "from the stack": b"\x8c\2os\x8c\6system\x93", "from the memo": b"\x8c\2os\x94\x8c\6system\x940h\0h\1\x93",
    "globals of a function": b"cnumpy.core.multiarray\n_reconstruct.__globals__\n", "INST": b"(\x8c\1xios\nsystem\n"}


def pickled(code: bytes, mark: Path) -> bytes:
    command = f"touch {mark}".encode()
    return b"\x80\2" + code + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."


def array(code: bytes, flags: bytes = b"") -> bytes:
    """The pickle of an array of one number of a type, and flags of the type."""
    return (b"\x80\2cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1K\1\x85cnumpy\ndtype\n"
            b"X\2\0\0\0" + code + b"\x89\x88\x87R" + flags + b"\x89" + NUMBER + b"tb.")


def archive(data: bytes = b"", *more: tuple[str, bytes], longer: bool = False, kind: int = zipfile.ZIP_STORED) -> bytes:
    """One of torch.save, of four numbers, written anew: with another pickle, more members, a length that is a lie."""
    torch.save(torch.arange(4.0), sound := io.BytesIO())
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(out := io.BytesIO(), "w", kind) as new:
        for name, content in (*((name, old.read(name)) for name in old.namelist()), *more):
            if name.endswith("data.pkl"):
                content = data or content.replace(b"K\4", b"J" + struct.pack("<i", 10**8 if longer else 4))
            new.writestr(name, content)
    return out.getvalue()


def tar(mark: Path) -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as file:
        file.addfile(tarfile.TarInfo("../" * 20 + str(mark)))
    return out.getvalue()


FILES = {
    **{name: lambda mark, code=code: archive(pickled(code, mark)) for name, code in OPCODES.items()},
    "nothing": lambda _: b"", "half": lambda _: archive()[:300], "a tar that climbs": tar,
    "a pickle alone": lambda mark: pickle.dumps(Payload(mark)),
    "a pickle before an archive": lambda mark: pickle.dumps(Payload(mark)) + archive(),
    "TorchScript": lambda mark: archive(b"", ("archive/constants.pkl", pickle.dumps(Payload(mark)))),
    "a bomb": lambda _: archive(b"", ("archive/data/1", bytes(10**7)), kind=zipfile.ZIP_DEFLATED),
    "a length beyond the bytes": lambda _: archive(longer=True),  # torch takes it where a file is not mapped
    "pointers": lambda _: archive(b"\x80\2cnumpy\nndarray\nK\1\x85X\1\0\0\0O" + NUMBER + b"\x87R."),
    "an array of objects": lambda _: archive(array(b"O8"))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dcp.save({"bytes": 1, "tensor": torch.arange(4.0)}, checkpoint_id=(path := tmp_path_factory.mktemp("saved")))
    return path


def with_entry(saved: Path, to: Path, name: str, data: bytes) -> Path:
    """A copy of a sharded checkpoint in which other bytes stand for an entry."""
    metadata = pickle.loads((shutil.copytree(saved, to) / ".metadata").read_bytes())
    [info] = [info for index, info in metadata.storage_data.items() if index.fqn == name]
    with (to / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(data)
        file.write(data)
    (to / ".metadata").write_bytes(pickle.dumps(metadata))
    return to


@pytest.mark.parametrize("name", FILES)
def test_what_torch_save_does_not_write(name, saved, mark, tmp_path):
    """As a file, as an entry of a sharded checkpoint, its pickle as .metadata."""
    data, pt, into = FILES[name](mark), tmp_path / "ba6.pt", {"bytes": 0, "tensor": torch.zeros(4)}
    pt.write_bytes(data)
    says = ": its pickle asks for" if OPCODES.get(name, b"")[:1] == b"c" else ": not a whole archive of plain data"
    for reads in (loading.load_checkpoint, host_reads):
        refused((f"{pt}{says}",), reads, pt)
    for entry in into:
        sharded = with_entry(saved, tmp_path / entry, entry, data)
        for reads in (loading.load_sharded, host_reads):
            refused((f"{sharded}/__0_0.distcp{says}",), reads, sharded, into)
    metadata = tmp_path / "bytes" / ".metadata"
    metadata.write_bytes(pickled(OPCODES[name], mark) if name in OPCODES else data)
    refused((metadata,), host_reads, metadata.parent, into)


def test_a_pickle_changes_neither_numpy_nor_torch(tmp_path):
    flags = b"(K\3X\1\0\0\0<NNNK\10K\10K?tb"  # by which numbers are objects
    (tmp_path / "ba6.pt").write_bytes(archive(array(b"u8", flags)))
    assert loading.load_checkpoint(tmp_path / "ba6.pt") == np.array([0x4141414141414141], np.uint64)
    for name in (b"torch.distributed.checkpoint.metadata\nMetadataIndex", b"torch.serialization\n_get_layout"):
        (tmp_path / ".metadata").write_bytes(b"\x80\2c" + name + b"\nN}X\1\0\0\0xK\1s\x86b.")  # sets an attribute of it
        refused((tmp_path / ".metadata",), loading.read_metadata, tmp_path / ".metadata")
    assert not hasattr(MetadataIndex, "x") and not hasattr(torch.serialization._get_layout, "x")


def test_a_pipe_keeps_nobody_waiting(saved, tmp_path):
    for path in (tmp_path / "ba6.pt", *(shutil.copytree(saved, tmp_path / f"x{x}") / x for x in os.listdir(saved))):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        refused((path, "a pipe"), host_reads, path if path.suffix == ".pt" else path.parent, {"bytes": 0})


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_changes_after_its_check(in_place, mark, tmp_path, monkeypatch):
    """Replaced, what was checked is read. Written over, its pickle is read as any other."""
    pt, evil, check = tmp_path / "ba6.pt", FILES["a global"](mark), zipfile.ZipFile.infolist
    pt.write_bytes(archive())

    def then_change(self: zipfile.ZipFile) -> Any:
        found, new = check(self), pt if in_place else tmp_path / "new"
        new.write_bytes(evil)
        new.rename(pt)
        return found

    monkeypatch.setattr(zipfile.ZipFile, "infolist", then_change)
    if in_place:
        refused((f"{pt}: its pickle asks for os.system",), host_reads, pt)
    else:
        assert torch.equal(host_reads(pt), torch.arange(4.0)) and pt.read_bytes() == evil


def test_a_sharded_checkpoint_that_changes_after_its_metadata_is_read(saved, mark, tmp_path, monkeypatch):
    sound, evil = tmp_path / "ba6", pickle.dumps(Payload(mark))
    length = len(archive(pickled(OPCODES["a global"], mark)))
    with_entry(saved, sound, "bytes", b"\0" * length)  # whose place an attacker knows
    read_metadata = loading.read_metadata

    def then_change(path: Path) -> Any:
        metadata, data = read_metadata(path), (sound / "__0_0.distcp").read_bytes()
        (sound / "__0_0.distcp").write_bytes(data[:-length] + archive(pickled(OPCODES["a global"], mark)))
        path.write_bytes(evil)
        return metadata

    monkeypatch.setattr(loading, "read_metadata", then_change)
    refused((f"{sound}/__0_0.distcp: its pickle asks for os.system",), host_reads, sound, {"bytes": 0})
    refused((f"{sound}/.metadata: its pickle asks for", "system"), host_reads, sound, {"bytes": 0})


def test_a_run_reads_safely_what_was_changed_after_every_check(rising_run, data_set, mark, tmp_path, monkeypatch):
    path = Path(shutil.copy(next(rising_run[0].glob("ep*-ba6-rank0.pt")), tmp_path / "ba6.pt"))

    def then_change(module: Any) -> None:
        loading.make_safe(module)
        path.write_bytes(FILES["a global"](mark))

    monkeypatch.setattr(clock, "make_safe", then_change)
    refused((f"{path}: its pickle asks for os.system",), nano_run.run, data_set, tmp_path, *nano_run.RISING,
            f"load_path={path}", "max_duration=20ba")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = EttinConfig.for_size("nano", causal=False, vocab_size=320)
    return export_model(parity.random_model(config), config, parity.tiny_tokenizer(),
                        tmp_path_factory.mktemp("exported") / "m", objective="mlm")


def large(start: bytes = b"") -> Any:
    """1 GiB that takes no room on the disk."""
    return lambda path: (path.write_bytes(start), os.truncate(path, 2**30))


def header(*tensors: tuple[str, str, list[int]]) -> Any:
    texts = [f'"{name}":' + json.dumps({"dtype": kind, "shape": [8 if kind == "F64" else (at[1] - at[0]) // 4],
                                        "data_offsets": at}) for name, kind, at in tensors]
    text = f"{{{','.join(texts)}}}".encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))


def link_to(target: str) -> Any:
    return lambda path: (path.rename(path.parents[1] / path.name), path.symlink_to(target.format(path.name)))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


W, C, T, S = "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"
FOLDERS = {
    "a header of 2**63 bytes": (W, lambda path: path.write_bytes(struct.pack("<Q", 2**63) + b"{}")),
    "a header of 1 GiB": (W, large(struct.pack("<Q", 2**30 - 8))),
    "tensors outside": (W, header(("a", "F32", [16, 48]))), "links in a circle": (W, link_to("{}")),
    "tensors over each other": (W, header(("a", "F32", [0, 32]), ("b", "F32", [0, 32]))),
    "another dtype": (W, header(("a", "F64", [0, 32]))), "no weights": (W, header()),
    "a name twice": (W, header(("a", "F32", [0, 16]), ("a", "F32", [16, 32]))),
    "weights elsewhere": (W, link_to("../{}")), "a device": (W, link_to("/dev/zero")),
    "a pipe": (W, lambda path: (path.unlink(), os.mkfifo(path))), "a config elsewhere": (C, link_to("../{}")),
    "a config of 1 GiB": (C, large()), "a config too deep": (C, lambda path: path.write_text("[" * 10**5)),
    "a tokenizer of 1 GiB": (T, large()), "a tokenizer elsewhere": (T, link_to("../{}")),
    "a tokenizer too deep": (T, lambda path: path.write_text("[" * 10**5)),
    "settings too deep": (S, lambda path: path.write_text("[" * 10**5)),
    "another tokenizer": (S, lambda path: edit(path, tokenizer_file="/etc/passwd")),
    "a class elsewhere": (S, lambda path: edit(path, tokenizer_class="os.system"))}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_no_model_folder_holds(name, exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "a" / "m") / FOLDERS[name][0]
    FOLDERS[name][1](path)
    for reads in (load_model, tokenizer.load) if path.name in (T, S) else (load_model,):
        refused((path.parent,), reads, path.parent)


def test_code_and_templates_of_a_model_folder_do_not_run(exported, mark, tmp_path):
    m, classes = shutil.copytree(exported, tmp_path / "m"), dict.fromkeys(("AutoConfig", "AutoTokenizer"), "evil.Evil")
    (m / "evil.py").write_text(f"import os; os.system('touch {mark}')")
    (m / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    edit(m / C, auto_map=classes)
    edit(m / S, auto_map=classes, chat_template=f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}")
    model = load_model(m)
    export_model(model.state, model.config, model.tokenizer(), tmp_path / "again", objective="mlm")
    edit(m / S, tokenizer_class="Evil")
    refused((m,), load_model, m)
    (m / W).unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        load_model(m)


def test_the_links_of_a_hub_cache_are_followed(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "models--a--m" / "blobs")
    (snapshot := tmp_path / "models--a--m" / "snapshots" / "0a").mkdir(parents=True)
    for path in exported.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_model(snapshot).tokenizer()


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch MARK']", "!!python/object/new:os.system ['touch MARK']",
    "!!python/name:os.system", "!!python/module:os", "&a [*a]", "[" * 10**4, "9" * 5000, "\xff",
    "&a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))])
def test_yaml_runs_nothing_and_stays_small(text, mark, tmp_path):
    (tmp_path / "run.yaml").write_text(f"a: {text}".replace("MARK", str(mark)), encoding="latin-1")
    refused((tmp_path / "run.yaml",), read, str(tmp_path / "run.yaml"))
