"""Reading checkpoints of Composer: nothing pickled runs.

mosaicml 0.32.1 unpickles whatever it loads, and torch does so with `.metadata` and byte entries of sharded checkpoints.
Here unpicklers know allow-listed types only, and `install_validation` makes Composer ask them before each load, also of
files it downloaded.
"""

from __future__ import annotations

import codecs
import contextlib
import datetime
import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_DATA_TYPES: list[Any] = [
    datetime.timedelta, TorchVersion, np.ndarray, np.dtype, codecs.encode,
    *(type(np.dtype(name)) for name in ("uint8", "int32", "uint32", "int64", "uint64", "float32", "float64")),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"), (_RECONSTRUCT, "numpy.core.multiarray._reconstruct")]
_DCP = "torch.distributed.checkpoint"
# what torch 2.7 writes into .metadata; every entry is a plain data type or its constructor
_METADATA_TYPES = frozenset({
    *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "torch.Size", "torch.serialization._get_layout",
    f"{_DCP}.filesystem._StorageInfo", f"{_DCP}.filesystem._StoragePrefix",
    *(f"{_DCP}.metadata.{name}" for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"))})


@contextlib.contextmanager
def _allow_data_only(path: Path) -> Iterator[None]:
    """torch.load inside reads data types only; a ValueError names what else a pickle asks for."""
    try:
        with torch.serialization.safe_globals(_DATA_TYPES):
            yield
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError,
            ValueError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"its pickle asks for {found[1]}" if found else "its pickle is not one of torch.save"
        raise ValueError(f"{path}: {what}; loading it could run code, so only tensors and plain data are read; if you "
                         "trust its origin, write its weights as safetensors") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _METADATA_TYPES:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Any:
    """torch.distributed.checkpoint's Metadata, whose file names stay in the folder."""
    with _allow_data_only(path):
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        names = {str(info.relative_path) for info in metadata.storage_data.values()}
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{path}: it points to {outside[0]!r}, outside its folder; give another checkpoint")
    return metadata


def load_sharded(path: Path, into: dict[str, Any]) -> None:
    """torch's reader of sharded checkpoints, with the checks of `validate`."""
    import torch.distributed.checkpoint as dcp  # here: it imports torch's compiler, which takes longer than torch

    class Reader(dcp.FileSystemReader):
        def read_metadata(self) -> Any:
            return read_metadata(Path(self.path, ".metadata"))

        def read_data(self, plan: Any, planner: Any) -> Any:
            for item in plan.items:
                info = self.storage_data[item.storage_index]
                validate(Path(self.path, info.relative_path), [(info.offset, info.length)])
            return super().read_data(plan, planner)

    dcp.load(into, storage_reader=Reader(path))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A Composer `.pt` file as a dict (`state`, `rng`), on the CPU, its tensors mapped from the file."""
    path = Path(path)
    if path.exists() and not is_archive(path):
        raise ValueError(f"{path}: not a whole archive as torch.save writes it; give another checkpoint")
    with _allow_data_only(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def validate(path: str | Path, specs: Sequence[tuple[int, int]] | None = None) -> bool:
    """Checks a file before Composer reads it; specs: (offset, length) of the entries wanted of a data file."""
    path = Path(path)
    if path.name == ".metadata":
        read_metadata(path)
    elif specs is None:
        load_checkpoint(path)
    else:
        with path.open("rb") as file, _allow_data_only(path):
            for offset, length in specs:
                file.seek(offset)
                torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    return True


def install_validation() -> None:
    """Has Composer call `validate` before it loads anything in this process, unless a user's own function is set."""
    os.environ.setdefault("CHECKPOINT_VALIDATION_FUNCTION", f"{__name__}.validate")


def is_archive(path: Path) -> bool:
    with contextlib.suppress(zipfile.BadZipFile):  # of one that says it spans disks
        return zipfile.is_zipfile(path)
    return False
