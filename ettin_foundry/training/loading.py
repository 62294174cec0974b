"""Reading checkpoints of Composer: nothing pickled runs, and no bytes become addresses.

mosaicml 0.32.1 unpickles whatever it loads, and torch does so with `.metadata` and byte entries of sharded checkpoints;
torch 2.7 believes what a pickle says of a tensor's length unless the file is mapped. Here each file is opened once,
checked, and read through the same descriptor, by unpicklers that know plain data only. `make_safe` has Composer do so.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import datetime
import functools
import io
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

_LARGEST_METADATA = 2**28  # bytes
# what torch 2.7 writes into .metadata: plain data types and their constructors
_METADATA_TYPES = re.compile(
    r"torch\.(Size|serialization\._get_layout|bool|(bfloat|float|int|uint|complex)\d+(_e\dm\d\w*)?)|pathlib\.\w*Path|"
    r"torch\.distributed\.checkpoint\.(filesystem\._Storage(Info|Prefix)|metadata\.((Bytes|Chunk|Tensor)StorageMetadata|"
    r"Metadata|MetadataIndex|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING))")


class _Numbers(np.ndarray):
    """numpy's array and dtype (of an empty one) in a pickle, of plain numbers: with numpy's own, a pickle can set flags
    and pass bytes off as pointers to objects."""

    def __new__(cls, kind: Any, *_: Any) -> _Numbers:
        return super().__new__(cls, 0, kind if re.fullmatch("[biuf][1248]", str(kind)) else np.uint8)

    def __setstate__(self, state: Any) -> None:
        if len(state) == 5:  # an array's; a dtype's has the byte order, which this machine's is
            super().__setstate__((*state[:2], state[2].dtype, *state[3:]))

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


_DATA_TYPES: list[Any] = [
    datetime.timedelta, TorchVersion, codecs.encode, (object, "numpy.ndarray"), (_Numbers, "numpy.dtype"),
    (_Numbers, "numpy._core.multiarray._reconstruct"), (_Numbers, "numpy.core.multiarray._reconstruct")]


@contextlib.contextmanager
def opened(path: Path, _mode: str = "rb") -> Iterator[IO[bytes]]:
    """A file to check and then to read; a ValueError names it and what its pickle asks for beside data types."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file, \
                torch.serialization.safe_globals(_DATA_TYPES):
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("a pipe or device")
            yield file
    except FileNotFoundError:
        raise
    except Exception as error:  # unpicklers fail in any way
        why = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0] or type(error).__name__
        what = f"not a whole archive of plain data as torch.save writes it ({why:.99})"
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"its pickle asks for {found[1]}, which could run code"
        raise ValueError(f"{path}: {what}; give another checkpoint, or, if you trust its origin, its weights as "
                         "safetensors") from error


def _load(file: IO[bytes]) -> Any:
    """An archive of torch.save, its tensors mapped; what it holds is not longer than itself."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type for entry in entries) or \
            sum(entry.file_size for entry in entries) > file.seek(0, os.SEEK_END):
        raise ValueError("entries that are compressed or too large")
    return torch.load(f"/dev/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Composer `.pt` file as a dict (`state`, `rng`), on the CPU, its tensors mapped from the file."""
    with opened(Path(path).resolve()) as file:
        return _load(file)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if not _METADATA_TYPES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        found = super().find_class(module, name)
        # a pickle can set attributes of what it is given: of these, which live as long as it is read
        if dataclasses.is_dataclass(found):
            return type(name, (), {"__new__": lambda *_: object.__new__(found)})  # type: ignore[arg-type]
        return found if isinstance(found, torch.dtype) else lambda *values: found(*values)


def read_metadata(path: Path) -> Any:
    """torch.distributed.checkpoint's Metadata, whose file names stay in the folder."""
    with opened(path) as file:
        metadata = _MetadataUnpickler(io.BytesIO(file.read(_LARGEST_METADATA))).load()
        names = {str(info.relative_path) for info in metadata.storage_data.values()}
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{path}: it points to {outside[0]!r}, outside its folder; give another checkpoint")
    return metadata


@functools.cache
def _sharded_reader() -> Any:
    import torch.distributed.checkpoint as dcp  # here: it imports torch's compiler, which takes longer than torch

    class Reader(dcp.FileSystemReader):
        def __init__(self, path: Any):
            super().__init__(path)
            self.fs.create_stream = opened  # type: ignore[method-assign]

        def read_metadata(self) -> Any:
            return read_metadata(Path(self.path, ".metadata"))

        def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
            plain = io.BytesIO()  # written anew, since torch trusts it
            with open(os.memfd_create("entry"), "r+b") as entry:
                file.seek(sinfo.offset)
                entry.write(file.read(sinfo.length))
                torch.save(_load(entry), plain)
            plain.seek(0)
            return plain

    return Reader


def load_sharded(path: Path, into: dict[str, Any]) -> None:
    """Fills `into` from a sharded checkpoint; an error is that of the first rank."""
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(into, storage_reader=_sharded_reader()(path))
    except dcp.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def make_safe(checkpoint: Any) -> None:
    """Has the module `composer.utils.checkpoint` read by the functions here, and unpack nothing."""
    checkpoint._torch_load_with_validation = lambda path, map_location: load_checkpoint(path)
    checkpoint.FileSystemReaderWithValidation.__bases__ = (_sharded_reader(),)
    checkpoint.is_tar = checkpoint.is_compressed_pt = lambda name: False
