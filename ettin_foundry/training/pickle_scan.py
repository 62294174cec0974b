"""What a pickle asks for, read from its opcodes without executing any; the allow-lists of checkpoints are here too.

When and on which files this is done is the work of checkpoint.py.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["ALLOWED_GLOBALS", "ALLOWED_METADATA_GLOBALS", "Slice", "refuse", "scan_archive", "scan_opcodes"]

_DTYPES = {f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {f"torch {name}" for name in vars(torch) if name.endswith("Storage")} | {"torch.storage UntypedStorage"}

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


def refuse(path: Path, found: str) -> ValueError:
    return ValueError(f"{path}: {found}. Loading it could run code, so only checkpoints made of tensors and plain data are "
                      "read. If you trust its origin, write its weights anew: as safetensors, or with torch.save of tensors")


def scan_opcodes(data: bytes, path: Path, allowed: frozenset[str]) -> None:
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
                    raise refuse(path, "its pickle computes the name of a global, which no checkpoint writer does")
                name = f"{names[0]} {names[1]}"
            elif opcode.name in ("EXT1", "EXT2", "EXT4"):
                raise refuse(path, "its pickle uses the extension registry")
            if name is not None and name not in allowed:
                raise refuse(path, f"its pickle asks for {name.replace(' ', '.')}")
            if opcode.name in _GETS:
                pushed.append(memo.get(int(argument)))  # type: ignore[arg-type]
            else:
                pushed.append(str(argument) if opcode.name in _STRINGS else None)
            del pushed[:-2]
    except (UnicodeDecodeError, IndexError) as error:
        raise refuse(path, f"its pickle cannot be read ({error})") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise refuse(path, f"its pickle cannot be read ({error})") from error


class Slice(io.RawIOBase):
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


def scan_archive(file: Slice, path: Path) -> None:
    """Checks the zip archive that torch.save writes.

    Python and torch read zip files with different code, so an archive that the two could read differently is refused:
    bytes before or after it, a comment, two members of one name, compression, more than one pickle.
    """
    start = file.read(4)
    file.seek(-22, io.SEEK_END)
    if start != b"PK\x03\x04" or file.read(4) != b"PK\x05\x06":
        raise refuse(path, "it is not a whole archive as torch.save writes it (an old format, a tar, or a file cut short)")
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            pickles = [name for name in names if name.endswith(".pkl")]
            plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            first = min((member.header_offset for member in members), default=-1)
            if len(set(names)) != len(names) or not plain or first != 0 or len(pickles) != 1 or (
                    pickles[0].split("/")[1:] != ["data.pkl"]) or len({name.split("/")[0] for name in names}) != 1:
                raise refuse(path, "it is a zip archive that torch.save does not write")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, EOFError) as error:
        raise refuse(path, f"it is a damaged archive ({error})") from error
    scan_opcodes(data, path, ALLOWED_GLOBALS)
