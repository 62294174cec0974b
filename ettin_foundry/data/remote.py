"""The small files of a remote set, put into its local folder: manifest, tables, tokenizer.

All processes of a node may do this at once; a lock lets one fetch. The local manifest must stay the remote one, or two nodes
could read different sets. Shards are fetched one by one when they are needed, see shard_files.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ettin_foundry.data.cache import CACHE, FETCHED, locked, own_folder
from ettin_foundry.data.manifest import INDEX, LENGTHS, MANIFEST, MAX_JSON_BYTES, open_plain, refuse
from ettin_foundry.data.storage import check_name, open_storage

__all__ = ["fetch_manifest", "fetch_table", "fetch_tokenizer"]

_TOKENIZER = "tokenizer"
_MAX_TOKENIZER_BYTES = 1 << 28


def fetch_manifest(local: Path, remote: str) -> None:
    """Puts the manifest of a remote split into its local folder, or makes sure that the one there is the same.

    Raises:
        ValueError: the local folder holds another set. FileNotFoundError, PermissionError, ConnectionError: from storage.
    """
    storage, path = open_storage(remote), local / MANIFEST
    try:
        size = storage.size(MANIFEST)
    except FileNotFoundError:
        raise FileNotFoundError(f"dataset.remote: {storage.where(MANIFEST)} is missing; a split of a set made by "
                                "data_prep/convert.py is needed there. Correct dataset.remote and dataset.split") from None
    if size > MAX_JSON_BYTES:
        raise refuse(storage.where(MANIFEST), f"has {size} bytes", f"at most {MAX_JSON_BYTES} are read")
    data = storage.read_bytes(MANIFEST)
    local.mkdir(parents=True, exist_ok=True)
    cache = own_folder(local / CACHE)
    with locked(cache / "lock"):
        if not os.path.lexists(path):
            (cache / FETCHED).write_text(remote + "\n")
            partial = cache / MANIFEST
            partial.unlink(missing_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
            return
        with open(open_plain(path), "rb") as stream:
            if stream.read() != data:
                raise ValueError(f"dataset.local: {str(local)!r} holds another set than dataset.remote {remote!r} (their "
                                 "manifests differ); both must be the same. Name another folder, or, to follow a remote set "
                                 f"that has grown, delete {MANIFEST}, {LENGTHS} and {INDEX} there; shards are kept")


def fetch_tokenizer(local: Path, remote: str) -> None:
    """Puts the tokenizer/ of a remote set into its local folder, unless one is there.

    Raises:
        FileNotFoundError: the set has none. ValueError: a file's name or size is none of a tokenizer's.
    """
    storage = open_storage(remote)
    local.mkdir(parents=True, exist_ok=True)
    cache = own_folder(local / CACHE)
    with locked(cache / "lock"):
        if os.path.lexists(local / _TOKENIZER):
            return
        if not (files := storage.list(f"{_TOKENIZER}/")):
            raise FileNotFoundError(f"{storage.where(_TOKENIZER)}: holds no file; the tokenizer that the set was made with "
                                    "is needed. Correct dataset.remote, or put it there")
        shutil.rmtree(own_folder(cache / _TOKENIZER))
        for name, size in files:
            if size > _MAX_TOKENIZER_BYTES:
                raise refuse(storage.where(name), f"has {size} bytes", f"at most {_MAX_TOKENIZER_BYTES} are fetched")
            storage.get_file(name, cache / check_name(name), num_bytes=size)
        os.replace(cache / _TOKENIZER, local / _TOKENIZER)


def fetch_table(local: Path, remote: str, name: str, num_bytes: int | None = None, *, again: bool = False) -> None:
    """Puts lengths.npy or index.json of a remote split into its local folder, unless it is there.

    Args:
        num_bytes: what it must measure. again: replace the one that is there.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: from storage. ValueError, OSError: it has another size.
    """
    storage = open_storage(remote)
    with locked(own_folder(local / CACHE) / "lock"):
        if again or not os.path.lexists(local / name):
            if num_bytes is None and (found := storage.size(name)) > MAX_JSON_BYTES:
                raise refuse(storage.where(name), f"has {found} bytes", f"at most {MAX_JSON_BYTES} are read")
            storage.get_file(name, local / name, num_bytes=num_bytes)
