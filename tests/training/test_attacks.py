"""Files from elsewhere: nothing in them runs; one line names the file and, of a pickle, what it asks for."""

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
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.training import clock, loading
from ettin_foundry.training.checkpoints import damage, read_head
from ettin_foundry.training.run_config import read

pytestmark = pytest.mark.filterwarnings("ignore")
loading.make_safe(host)  # as the clock of any run of ours does


@pytest.fixture
def mark(tmp_path):
    """A file that an attack makes if it runs; in the end it must not be there."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def refused(says, reads, *args):
    with pytest.raises((ValueError, FileNotFoundError, dcp.CheckpointException)) as error:
        reads(*args)
    assert says in str(error.value)


def host_reads(path, into: Any = None) -> Any:
    """As Composer: one file, or a folder into the state of a run."""
    if not path.is_dir():
        return host.safe_torch_load(path)
    return dcp.load(into, storage_reader=host.FileSystemReaderWithValidation(str(path)))


def put(content, place, value) -> Any:
    if not place:
        return value
    if isinstance(content, list):
        return [put(each, place[1:], value) for each in content]
    return {**content, place[0]: put(content.get(place[0], {}), place[1:], value)}


@pytest.mark.parametrize("place", [
    ("state", "model", "model.output_bias"), ("state", "optimizers", "x", "state", "y"), ("rng", 0, "python"),
    ("state", "callbacks", "Clock", "config"), ("state", "dataset_state", "train"), ("state", "run_name"), ()], ids=str)
def test_a_payload_anywhere_in_a_checkpoint(place, rising_run, mark, tmp_path, data_set):
    pt, sharded, out = tmp_path / "ba6.pt", tmp_path / "ba6", tmp_path / "out.pt"
    asks = ": its pickle asks for posix.system"
    content = torch.load(next(rising_run[0].glob("ep*-ba6-rank0.pt")), weights_only=False)
    torch.save(put(content, place, Payload(mark)), pt)
    torch.load(pt, weights_only=False)  # the attack works
    mark.unlink()
    for reads, args in ((read_head, [pt]), (load_model, [pt]), (host_reads, [pt]), (evaluate, [pt, data_set]),
                        (export_checkpoint, [pt, out]), (average_checkpoints, [[pt, pt], out])):
        refused(f"{pt}{asks}", reads, *args)
    if place:
        dcp.save(put(content, place, Payload(mark)), checkpoint_id=sharded)
        refused(f"{sharded}/__0_0.distcp{asks}", host_reads, sharded, put(content, place, None))
        for reads in (read_head, load_model) if "Clock" in place else ():
            refused(f"{sharded}/__0_0.distcp{asks}", reads, sharded)


EIGHT = b"c_codecs\nencode\nX\10\0\0\0AAAAAAAAX\6\0\0\0latin1\x86R"
OPCODES = [  # a tuple of the command follows, and the call
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"ctorch.storage\n_load_from_bytes\n", b"\x82\1",
    b"\x8c\2os\x8c\6system\x93", b"\x8c\2os\x94\x8c\6system\x940h\0h\1\x93",  # from the stack, and from the memo
    b"cnumpy.core.multiarray\n_reconstruct.__globals__\n", b"(\x8c\1xios\nsystem\n"]


def pickled(code, mark):
    command = f"touch {mark}".encode()
    return b"\x80\2" + code + b"X" + struct.pack("<I", len(command)) + command + b"\x85R."


def archive(data=b"", *more, longer=False, kind=zipfile.ZIP_STORED):
    """One of torch.save, of four numbers, written anew: with another pickle, more members, a length that is a lie."""
    torch.save(torch.arange(4.0), sound := io.BytesIO())
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(out := io.BytesIO(), "w", kind) as new:
        for name, content in (*((name, old.read(name)) for name in old.namelist()), *more):
            if name.endswith("data.pkl"):
                content = data or content.replace(b"K\4", b"J" + struct.pack("<i", 10**8 if longer else 4))
            new.writestr(name, content)
    return out.getvalue()


def tar(mark):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as file:
        file.addfile(tarfile.TarInfo("../" * 20 + str(mark)))
    return out.getvalue()


FILES = {
    **{str(code): lambda mark, code=code: archive(pickled(code, mark)) for code in OPCODES},
    "nothing": lambda _: b"", "half": lambda _: archive()[:300],
    "a pickle alone": lambda mark: pickle.dumps(Payload(mark)),
    "a pickle before an archive": lambda mark: pickle.dumps(Payload(mark)) + archive(),
    "TorchScript": lambda mark: archive(b"", ("archive/constants.pkl", pickle.dumps(Payload(mark)))),
    "a bomb": lambda _: archive(b"", ("archive/data/1", bytes(10**7)), kind=zipfile.ZIP_DEFLATED),
    "a length beyond the bytes": lambda _: archive(longer=True),  # torch takes it where a file is not mapped
    "bytes as pointers": lambda _: archive(b"\x80\2cnumpy\nndarray\nK\1\x85X\1\0\0\0O" + EIGHT + b"\x87R.")}
EVIL = FILES[str(OPCODES[0])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    dcp.save({"bytes": 1, "tensor": torch.arange(4.0)}, checkpoint_id=(path := tmp_path_factory.mktemp("saved")))
    return path


def with_entry(saved, to, name, data):
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
    says = ": its pickle asks for" if name.startswith("b'c") else ": not a whole archive of plain data"
    for reads in (loading.load_checkpoint, host_reads):
        refused(f"{pt}{says}", reads, pt)
    for entry in into:
        sharded = with_entry(saved, tmp_path / entry, entry, data)
        for reads in (loading.load_sharded, host_reads):
            refused(f"{sharded}/__0_0.distcp{says}", reads, sharded, into)
    for code in OPCODES if name == "nothing" else ():
        (tmp_path / "bytes" / ".metadata").write_bytes(pickled(code, mark))
        refused(f"{tmp_path}/bytes/.metadata: ", host_reads, tmp_path / "bytes", into)


def test_a_pickle_changes_neither_numpy_nor_torch(tmp_path):
    (tmp_path / "ba6.pt").write_bytes(archive(  # flags of a dtype by which numbers are pointers
        b"\x80\2cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1K\1\x85cnumpy\ndtype\nX\2\0\0\0u8"
        b"\x89\x88\x87R(K\3X\1\0\0\0<NNNK\10K\10K?tb\x89" + EIGHT + b"tb."))
    assert loading.load_checkpoint(tmp_path / "ba6.pt") == np.array([0x4141414141414141], np.uint64)
    for name in (b"torch.distributed.checkpoint.metadata\nMetadataIndex", b"torch.serialization\n_get_layout"):
        (tmp_path / ".metadata").write_bytes(b"\x80\2c" + name + b"\nN}X\1\0\0\0xK\1s\x86b.")  # sets an attribute of it
        refused(f"{tmp_path}/.metadata", loading.read_metadata, tmp_path / ".metadata")
    assert not hasattr(MetadataIndex, "x") and not hasattr(torch.serialization._get_layout, "x")


def test_a_pipe_keeps_nobody_waiting(saved, tmp_path):
    for name in (".metadata", "__0_0.distcp"):
        path = shutil.copytree(saved, tmp_path / f"x{name}") / name
        path.unlink()
        os.mkfifo(path)
        refused(f"{path}: ", host_reads, path.parent, {"bytes": 0})
        refused(f"{path}: ", host.safe_torch_load, path)
        path.rename(tmp_path / "ba6.pt")
        assert "a pipe" in str(damage(tmp_path / "ba6.pt"))


def test_a_checkpoint_of_a_newer_version_is_named(rising_run, tmp_path):
    content = torch.load(next(rising_run[0].glob("ep*-ba6-rank0.pt")), weights_only=False)
    content["state"]["callbacks"]["Clock"]["config"]["rope_kind"] = "new"
    torch.save(content, tmp_path / "ba6.pt")
    for reads in (read_head, load_model):
        refused("its record holds model.rope_kind, unknown to this version", reads, tmp_path / "ba6.pt")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_that_changes_after_its_check(in_place, mark, tmp_path, monkeypatch):
    """Replaced, what was checked is read. Written over, its pickle is read as any other."""
    pt, check = tmp_path / "ba6.pt", zipfile.ZipFile.infolist
    pt.write_bytes(archive())

    def then_change(self):
        found, new = check(self), pt if in_place else tmp_path / "new"
        new.write_bytes(EVIL(mark))
        new.rename(pt)
        return found

    monkeypatch.setattr(zipfile.ZipFile, "infolist", then_change)
    if in_place:
        refused(f"{pt}: its pickle asks for os.system", host_reads, pt)
    else:
        assert (host_reads(pt) == torch.arange(4.0)).all() and pt.read_bytes() == EVIL(mark)


def test_a_sharded_checkpoint_that_changes_after_its_metadata_is_read(saved, mark, tmp_path, monkeypatch):
    sound, evil, read_metadata = tmp_path / "ba6", EVIL(mark), loading.read_metadata
    with_entry(saved, sound, "bytes", bytes(len(evil)))  # whose place an attacker knows

    def then_change(path):
        metadata, data = read_metadata(path), sound / "__0_0.distcp"
        data.write_bytes(data.read_bytes()[:-len(evil)] + evil)
        path.write_bytes(pickle.dumps(Payload(mark)))
        return metadata

    monkeypatch.setattr(loading, "read_metadata", then_change)
    refused(f"{sound}/__0_0.distcp: its pickle asks for os.system", host_reads, sound, {"bytes": 0})
    refused(f"{sound}/.metadata: its pickle asks for posix.system", host_reads, sound, {"bytes": 0})


@pytest.mark.parametrize("name, attack, says", [("ba6.pt", EVIL, "its pickle asks for os.system"), (
    "ba6.tar.pt", tar, "not a whole archive")])  # which Composer unpacks
def test_a_run_reads_safely_what_was_changed_after_every_check(name, attack, says, rising_run, data_set, mark, tmp_path,
                                                               monkeypatch):
    path = Path(shutil.copy(next(rising_run[0].glob("ep*-ba6-rank0.pt")), tmp_path / name))
    monkeypatch.setattr(clock, "make_safe", lambda module: (loading.make_safe(module), path.write_bytes(attack(mark))))
    keys = (*nano_run.RISING, f"load_path={path}", "max_duration=9ba")
    refused(f"{path}: {says}", nano_run.run, data_set, tmp_path, *keys)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model, out = parity.nano("mlm"), tmp_path_factory.mktemp("exported") / "m"
    return export_model(model, model.config, parity.tiny_tokenizer(), out, objective="mlm")


W, C, T, S = "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"
ONE, DEEP, GIB = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}', b"[" * 10**5, 2**30
HEADERS = [f'{{"a":{ONE.replace("0,16", "16,32")}}}', f'{{"a":{ONE},"b":{ONE}}}', f'{{"a":{ONE.replace("32", "64")}}}',
           f'{{"a":{ONE},"a":{ONE.replace("0,16", "16,32")}}}']  # outside, over each other, another dtype, twice
BAD = {  # what stands in place of a file: bytes, so many zeros, a pipe, the target of a link
    W: [struct.pack("<Q", 2**63), struct.pack("<Q", GIB), *(struct.pack("<Q", len(text)) + text.encode() + bytes(16)
                                                            for text in HEADERS)],
    C: [DEEP, GIB], T: [DEEP, GIB], S: [DEEP, b'{"tokenizer_file": "/dev/zero"}', b'{"tokenizer_class": "os.system"}']}


@pytest.mark.parametrize("file, what", [(file, what) for file, bad in BAD.items() for what in (
    *bad, None, file, "../elsewhere", "/dev/zero")], ids=lambda value: str(value)[:40])
def test_what_no_model_folder_holds(file, what, exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "m") / file
    path.rename(tmp_path / "elsewhere")
    if isinstance(what, str):
        path.symlink_to(what)
    elif what is None:
        os.mkfifo(path)
    else:
        path.write_bytes(b"" if what == GIB else what)
        os.truncate(path, max(path.stat().st_size, what if what == GIB else 0))
    for reads in (load_model, tokenizer.load) if file in (T, S) else (load_model,):
        refused(str(path.parent), reads, path.parent)


def test_code_and_templates_of_a_model_folder_do_not_run(exported, mark, tmp_path):
    m, classes = shutil.copytree(exported, tmp_path / "m"), dict.fromkeys(("AutoConfig", "AutoTokenizer"), "evil.Evil")
    (m / "evil.py").write_text(f"import os; os.system('touch {mark}')")
    (m / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    for file in (C, S):
        content = {**json.loads((m / file).read_text()), "auto_map": classes, "chat_template": template}
        (m / file).write_text(json.dumps(content))
    model = load_model(m)
    export_model(model.state, model.config, model.tokenizer(), tmp_path / "again", objective="mlm")
    (m / S).write_text(json.dumps({**content, "tokenizer_class": "Evil"}))
    refused(str(m), load_model, m)
    (m / W).unlink()
    refused("pytorch_model.bin is a pickle", load_model, m)


def test_the_links_of_a_hub_cache_are_followed(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "models--a--m" / "blobs")
    (snapshot := tmp_path / "models--a--m" / "snapshots" / "0a").mkdir(parents=True)
    for path in exported.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert load_model(snapshot).tokenizer()


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch MARK']", "!!python/object/new:os.system ['touch MARK']", "&a [*a]",
    "!!python/name:os.system", "!!python/module:os", "[" * 10**4, "9" * 5000, "\xff",
    "&a [1, 1]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))])
def test_yaml_runs_nothing_and_stays_small(text, mark, tmp_path):
    (tmp_path / "run.yaml").write_text(f"a: {text}".replace("MARK", str(mark)), encoding="latin-1")
    refused(f"{tmp_path}/run.yaml: ", read, str(tmp_path / "run.yaml"))
