"""Checkpoints without surprises: nothing pickled runs before it was checked, and the newest complete one is found.

mosaicml 0.32.1 unpickles whatever it loads (`torch.load(weights_only=False)`; fixed after its last release), and torch 2.7
does the same with the `.metadata` and the byte entries of sharded checkpoints. `scan_pickle` reads the pickle's opcodes
without executing any and refuses every global that training does not write; `install_validation` makes Composer ask it
before each load, also of files it downloaded. Reading for our own purposes goes through `load_checkpoint`.

What is not here: saving (Composer's), and Hugging Face folders (hf.py).
"""

from __future__ import annotations

import codecs
import datetime
import io
import logging
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.torch_version import TorchVersion

__all__ = [
    "install_validation",
    "is_complete",
    "load_checkpoint",
    "load_model_state",
    "newest_complete",
    "repair_latest",
    "scan_pickle",
    "validate",
]

log = logging.getLogger(__name__)

_DTYPES = {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {f"torch {name}" for name in vars(torch) if name.endswith("Storage")} | {"torch.storage UntypedStorage"}
_RECONSTRUCT = np.empty(0).__reduce__()[0]

# what Composer 0.32 and torch 2.7 write (read from real checkpoints); every entry is a plain data type or its constructor
ALLOWED_GLOBALS = frozenset(_DTYPES | _STORAGES | {
    "_codecs encode", "collections OrderedDict", "datetime timedelta", "numpy dtype", "numpy ndarray",
    "numpy._core.multiarray _reconstruct", "numpy.core.multiarray _reconstruct", "torch Size", "torch device",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2", "torch.torch_version TorchVersion",
})
_DCP = "torch.distributed.checkpoint"
ALLOWED_METADATA_GLOBALS = frozenset(_DTYPES | {
    "pathlib PosixPath", "pathlib WindowsPath", "pathlib Path", "torch Size", "torch.serialization _get_layout",
    f"{_DCP}.filesystem _StorageInfo", f"{_DCP}.filesystem _StoragePrefix",
    *(f"{_DCP}.metadata {name}" for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
})

_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING"}
_PUTS = {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}


def scan_pickle(path: str | Path) -> None:
    """Refuses a checkpoint whose pickles name anything but the data types of a checkpoint; executes nothing.

    Args:
        path: a Composer `.pt` file, a `.metadata` file, or the folder of a sharded checkpoint.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a global outside the allow-list (the message names it), or a file that is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a .pt file or the folder of a sharded checkpoint")
    if path.is_dir():
        metadata = _read_metadata(path / ".metadata")
        for index, info in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                validate(path / info.relative_path, [(info.offset, info.length)])
    elif path.name == ".metadata":
        _read_metadata(path)
    else:
        validate(path)


def validate(path: str | Path, specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """The same check in the form that Composer calls before it reads a file (CHECKPOINT_VALIDATION_FUNCTION).

    Args:
        path: the file about to be read.
        specs: (offset, length) in bytes of the entries about to be read, for the data files of a sharded checkpoint.

    Returns:
        True. A refusal is an error that says why, where a False would only say "invalid".
    """
    path = Path(path)
    if path.name == ".metadata":
        _read_metadata(path)
        return True
    with path.open("rb") as file:
        for offset, length in specs if specs is not None else [(0, path.stat().st_size)]:
            _scan_archive(_Slice(file, offset, length), path)
    return True


def install_validation() -> None:
    """Has Composer call `validate` before it loads anything in this process; a user's own function stays in place."""
    ours = f"{__name__}.validate"
    if os.environ.setdefault("CHECKPOINT_VALIDATION_FUNCTION", ours) != ours:
        log.warning("CHECKPOINT_VALIDATION_FUNCTION is %s: checkpoints are checked by that, not by ettin_foundry",
                    os.environ["CHECKPOINT_VALIDATION_FUNCTION"])


def _refuse(path: Path, found: str) -> ValueError:
    return ValueError(f"{path}: {found}. Loading it could run code, so only checkpoints made of tensors and plain data are "
                      "read. If you trust its origin, write its weights anew: as safetensors, or with torch.save of tensors")


def _scan_opcodes(data: bytes, path: Path, allowed: frozenset[str]) -> None:
    """One pass over the pickle's opcodes.

    STACK_GLOBAL takes its two names from the stack. They are known for certain only when the two opcodes before it push
    strings; anything else there is refused, so no emulation of the stack is needed.
    """
    pushed: list[str | None] = []  # what the latest opcodes pushed, memo opcodes left out; None: not a string
    memo: dict[int, str | None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = None
            if opcode.name in _PUTS:
                key = len(memo) if opcode.name == "MEMOIZE" else int(argument)  # type: ignore[arg-type]
                memo[key] = pushed[-1] if pushed else None
                continue
            if opcode.name in ("GLOBAL", "INST"):
                name = str(argument)
            elif opcode.name == "STACK_GLOBAL":
                names = pushed[-2:]
                if len(names) < 2 or None in names:
                    raise _refuse(path, "its pickle computes the name of a global, which no checkpoint writer does")
                name = f"{names[0]} {names[1]}"
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                raise _refuse(path, "its pickle uses the extension registry")
            if name is not None and name not in allowed:
                raise _refuse(path, f"its pickle asks for {name.replace(' ', '.')}")
            if opcode.name in _GETS:
                pushed.append(memo.get(int(argument)))  # type: ignore[arg-type]
            else:
                pushed.append(str(argument) if opcode.name in _STRINGS else None)
            del pushed[:-2]
    except (UnicodeDecodeError, IndexError) as error:
        raise _refuse(path, f"its pickle cannot be read ({error})") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise _refuse(path, f"its pickle cannot be read ({error})") from error


class _Slice(io.RawIOBase):
    """A stretch of a file as a file of its own, without reading it into memory."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.offset + self.position)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.position)])  # type: ignore[attr-defined]
        self.position += count
        return count


def _scan_archive(file: _Slice, path: Path) -> None:
    """Checks the zip archive that torch.save writes.

    Python and torch read zip files with different code, so an archive that the two could read differently is refused:
    bytes before or after it, a comment, two members of one name, compression, more than one pickle.
    """
    start = file.read(4)
    file.seek(-22, io.SEEK_END)
    if start != b"PK\x03\x04" or file.read(4) != b"PK\x05\x06":
        raise _refuse(path, "it is not a whole archive as torch.save writes it (an old format, a tar, or a file cut short)")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            pickles = [name for name in names if name.endswith(".pkl")]
            plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            first = min((member.header_offset for member in members), default=-1)
            if len(set(names)) != len(names) or not plain or first != 0 or len(pickles) != 1 or (
                    pickles[0].split("/")[1:] != ["data.pkl"]) or len({name.split("/")[0] for name in names}) != 1:
                raise _refuse(path, "it is a zip archive that torch.save does not write")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError) as error:
        raise _refuse(path, f"it is a damaged archive ({error})") from error
    _scan_opcodes(data, path, ALLOWED_GLOBALS)


def _read_metadata(path: Path) -> Any:
    """torch.distributed.checkpoint's Metadata, unpickled only after the scan; its file names must stay in the folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; a folder without .metadata is no complete sharded checkpoint")
    data = path.read_bytes()
    _scan_opcodes(data, path, ALLOWED_METADATA_GLOBALS)
    metadata = pickle.loads(data)
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != str(info.relative_path):
            raise _refuse(path, f"it points to {info.relative_path!r}, outside its folder")
    return metadata


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Composer `.pt` file as a dict (`state`, `rng`), on the CPU, tensors mapped from the file rather than read.

    Raises:
        FileNotFoundError, ValueError: as `scan_pickle`.
    """
    scan_pickle(path)
    dtypes = [type(np.dtype(name)) for name in ("uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")]
    allowed: list[Any] = [
        datetime.timedelta, TorchVersion, np.ndarray, np.dtype, codecs.encode, *dtypes,
        (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def load_model_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights in a Composer checkpoint, and what `callbacks.Clock` wrote about the run.

    Args:
        path: a `.pt` file, the folder of a sharded checkpoint, or a save folder (then its newest complete checkpoint).
            With torch.distributed started, every rank must call it for a sharded one.

    Returns:
        ({name without the `model.` prefix: tensor on the CPU}, {config, objective, size, tokenizer, tokens, lineage}); the
        second is empty for a checkpoint of a run without Clock.

    Raises:
        FileNotFoundError, ValueError: as `scan_pickle`, or there is no model in the checkpoint.
    """
    path = Path(path)
    if path.is_dir() and not (path / ".metadata").exists():
        newest = newest_complete(path)
        if newest is None:
            raise FileNotFoundError(f"{path}: no complete checkpoint in this folder; give one that holds a .pt file or a "
                                    "sharded checkpoint with its .metadata")
        path = newest
    state = (_load_sharded(path) if path.is_dir() else load_checkpoint(path)).get("state", {})
    weights = {name.removeprefix("model."): value for name, value in state.get("model", {}).items()
               if name.startswith("model.")}
    if not weights:
        raise ValueError(f"{path}: no tensor named model.* in it; a checkpoint that Composer's Trainer saved is needed")
    return weights, dict(state.get("callbacks", {}).get("Clock", {}))


def _load_sharded(folder: Path) -> dict[str, Any]:
    """Model and Clock entries of a sharded checkpoint as one nested dict."""
    scan_pickle(folder)
    metadata = _read_metadata(folder / ".metadata")
    wanted: dict[str, Any] = {}
    for name, keys in (metadata.planner_data or {}).items():
        entry = metadata.state_dict_metadata[name]
        if isinstance(entry, TensorStorageMetadata) and keys[:2] == ("state", "model"):
            value = torch.empty(entry.size, dtype=entry.properties.dtype)
        elif keys[:3] == ("state", "callbacks", "Clock"):
            value = None
        else:
            continue
        place = wanted
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = value
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder))
    return wanted


def is_complete(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a zip file's directory and a sharded one's .metadata come last."""
    if path.is_dir():
        return (path / ".metadata").is_file()
    return path.is_file() and zipfile.is_zipfile(path)


def newest_complete(save_folder: str | Path) -> Path | None:
    """The checkpoint with the highest batch number (`ba123` in its name), then the latest time, that is complete.

    Reads no pickle. Links are not followed: what they point to is looked at under its own name.
    """
    folder = Path(save_folder)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_symlink() or not (path.suffix == ".pt" or path.is_dir()) or not is_complete(path):
            continue
        batch = re.search(r"ba(\d+)", path.name)
        found.append((int(batch[1]) if batch else -1, path.stat().st_mtime_ns, path))
    return max(found)[2] if found else None


def repair_latest(save_folder: str | Path, *, latest: str = "latest-rank0.pt") -> Path | None:
    """Points the link that autoresume follows at the newest complete checkpoint, if it leads nowhere.

    Composer removes the link and then makes it anew, and writes checkpoints under their final name: killed in between,
    there is no link, or it leads to half a file, and the run would start over or fail. Deletes nothing but that link.

    Returns:
        The checkpoint that the link leads to now; None when there is none to lead to.

    Raises:
        ValueError: `latest` is a file, not a link, and damaged.
    """
    link = Path(save_folder) / latest
    if link.exists() and is_complete(link):
        return link.resolve()
    if link.exists() and not link.is_symlink():
        raise ValueError(f"{link}: a damaged file where a link to the latest checkpoint should be; move it away to resume "
                         "from the newest complete checkpoint")
    newest = newest_complete(save_folder)
    if newest is None:
        return None
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(newest.name)
    os.replace(fresh, link)  # atomic: a kill here leaves the old link or the new one
    log.warning("%s was missing or broken; it leads to %s now, the newest complete checkpoint", link, newest.name)
    return newest
