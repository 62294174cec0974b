"""What a checkpoint's pickle asks for, read from its opcodes without executing any, against an allow-list."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

# what Composer 0.32 and torch 2.7 write (read from real checkpoints); every entry is a plain data type or its constructor
ALLOWED_GLOBALS = frozenset({
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *(f"torch {name}" for name in vars(torch) if name.endswith("Storage")), "torch.storage UntypedStorage",
    "_codecs encode", "collections OrderedDict", "datetime timedelta", "numpy dtype", "numpy ndarray",
    "numpy._core.multiarray _reconstruct", "numpy.core.multiarray _reconstruct", "torch Size", "torch device",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor_v2", "torch.torch_version TorchVersion",
})
_STRINGS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING")


class UnsafePickleError(ValueError):
    """A checkpoint whose pickle could run code, or that is not what torch.save writes."""

    def __init__(self, path: Path, found: str):
        super().__init__(f"{path}: {found}; loading it could run code, so only checkpoints of tensors and plain data are "
                         "read. If you trust its origin, write its weights anew, as safetensors")


def scan_opcodes(data: bytes, path: Path) -> None:
    """One pass over a pickle's opcodes; executes nothing.

    STACK_GLOBAL takes its two names from the stack. They are known for certain only when the two opcodes before it push
    strings; anything else there is refused, so no emulation of the stack is needed.

    Raises:
        UnsafePickleError: a global that is not allowed, or a pickle that cannot be read.
    """
    pushed: list[str | None] = []  # what the latest two opcodes pushed, memo opcodes left out; None: not a string
    memo: dict[int, str | None] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            kind: Any = opcode.name
            if kind in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if kind == "MEMOIZE" else int(argument)] = pushed[-1] if pushed else None  # type: ignore[arg-type]
                continue
            name = str(argument) if kind in ("GLOBAL", "INST") else None
            if kind == "STACK_GLOBAL":
                if len(pushed) < 2 or None in pushed:
                    raise UnsafePickleError(path, "its pickle computes the name of a global")
                name = f"{pushed[0]} {pushed[1]}"
            if kind in ("EXT1", "EXT2", "EXT4"):
                raise UnsafePickleError(path, "its pickle uses the extension registry")
            if name is not None and name not in ALLOWED_GLOBALS:
                raise UnsafePickleError(path, f"its pickle asks for {name.replace(' ', '.')}")
            if kind in ("GET", "BINGET", "LONG_BINGET"):
                pushed.append(memo.get(int(argument)))  # type: ignore[arg-type]
            else:
                pushed.append(str(argument) if kind in _STRINGS else None)
            del pushed[:-2]
    except UnsafePickleError:
        raise
    except (ValueError, IndexError) as error:
        raise UnsafePickleError(path, f"its pickle cannot be read ({error})") from error


def scan_archive(path: Path) -> None:
    """Checks the zip archive that torch.save writes, and the pickle in it.

    Python and torch read zip files with different code, so an archive that the two could read differently is refused:
    bytes before or after it, a comment, two members of one name, compression, more than one pickle.

    Raises:
        UnsafePickleError: it is not such an archive, or as for `scan_opcodes`.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 22))
        if start != b"PK\x03\x04" or file.read(4) != b"PK\x05\x06":
            raise UnsafePickleError(path, "it is not a whole archive as torch.save writes it")
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                names = [member.filename for member in members]
                pickles = [name for name in names if name.endswith(".pkl")]
                plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
                first = min((member.header_offset for member in members), default=-1)
                if len(set(names)) != len(names) or not plain or first != 0 or len(pickles) != 1 or (
                        pickles[0].split("/")[1:] != ["data.pkl"]) or len({name.split("/")[0] for name in names}) != 1:
                    raise UnsafePickleError(path, "it is a zip archive that torch.save does not write")
                data = archive.read(pickles[0])
        except (zipfile.BadZipFile, EOFError) as error:
            raise UnsafePickleError(path, f"it is a damaged archive ({error})") from error
    scan_opcodes(data, path)
