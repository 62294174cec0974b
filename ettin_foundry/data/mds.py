"""Reads one split of a converted set without trusting it: random access to its chunks, local or remote.

Shards are plain MDS files; `manifest.json` beside them states what they must be. The manifest is checked when a set is
opened (manifest.py), and all of a shard before one of its tokens is handed out, at every opening (shard_format.py): its
size, hash, header, offsets, sample layout and token range. A shard that fails is fetched or expanded once more where that
is possible (remote.py). If it fails again the run stops with its name, or goes on with a recorded substitute that leaves
rows, token counts and clocks as they are. No iteration order lives here (order.py).
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.manifest import COLUMNS, INDEX, LENGTHS, MANIFEST, SplitFacts, read_json, read_manifest, refuse
from ettin_foundry.data.packing import pack_lengths, piece_counts
from ettin_foundry.data.quantities import parse_bytes
from ettin_foundry.data.remote import fetch_manifest, fetch_table
from ettin_foundry.data.shard_files import ShardFiles
from ettin_foundry.data.shards import (
    COLUMN_NAMES,
    Buffer,
    Shard,
    check_content,
    check_hash,
    expand_all,
    map_file,
    parse_shard,
    read_columns,
    read_lengths,
)
from ettin_foundry.data.substitutes import make_substitute, note

__all__ = ["MDSSet", "SUBSTITUTIONS"]

log = logging.getLogger(__name__)

SUBSTITUTIONS = "substitutions.jsonl"
ON_BAD_SHARD = ("stop", "skip")

_LIMITED: weakref.WeakSet[MDSSet] = weakref.WeakSet()


def _unmap_after_fork() -> None:
    """A forked child would keep its parent's shards from being removed from a limited cache; it maps its own."""
    for data in list(_LIMITED):
        data._open.clear()


os.register_at_fork(after_in_child=_unmap_after_fork)


class MDSSet(SplitFacts):
    """One split folder: its manifest, and random access to its chunks.

    Safe to pickle and to inherit through fork: open files are per process. At most `max_open` shards stay mapped, the
    least recently used is dropped; all of a shard is checked each time it is mapped.

    Args:
        local: the split's folder, e.g. `data/train`.
        verify_hashes: compare every file's xxh64 with the manifest before use. False still checks size and structure.
        max_open: shards kept mapped at a time.
        remote: folder or URL of the same split; its files are then fetched into `local`, shards when they are needed.
        cache_limit: most bytes that fetched or expanded shards may take in `local`, such as "200gb"; the least recently
            used ones are removed.
        on_bad_shard: "stop", or "skip": read, in place of an unreadable shard, chunks of the same lengths made from the
            next good one of its source: chunk i has the tokens of chunk i modulo the number of that shard's chunks, cut or
            cyclically repeated, and ends no document. Each such shard is logged and noted in substitutions.jsonl.

    Raises:
        FileNotFoundError: no such folder, or it holds no manifest.
        ValueError: a file is not what the manifest says, the manifest is not one of ours, or an argument is out of range;
            it names the file or the key.
        OSError: the remote place cannot be reached.
    """

    def __init__(self, local: str | os.PathLike[str], verify_hashes: bool = True, *, max_open: int = 32,
                 remote: str | None = None, cache_limit: int | str | None = None, on_bad_shard: str = "stop") -> None:
        if on_bad_shard not in ON_BAD_SHARD:
            raise ValueError(f"dataset.on_bad_shard: {on_bad_shard!r} given; {' or '.join(ON_BAD_SHARD)} is needed. "
                             "Correct it")
        self.local, self.remote = Path(local), remote
        self.verify_hashes, self.max_open, self.on_bad_shard = verify_hashes, max_open, on_bad_shard
        limit = parse_bytes("dataset.cache_limit", cache_limit)
        if remote is not None:
            fetch_manifest(self.local, remote)
        super().__init__(read_manifest(self.local))
        self._files = ShardFiles(self.local, self.manifest["shards"], remote=remote, cache_limit=limit)
        if remote is not None:
            fetch_table(self.local, remote, LENGTHS, self.manifest["lengths"]["bytes"])
            fetch_table(self.local, remote, INDEX)
        self._lengths: np.ndarray | None = None
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._bad: dict[int, str] = {}  # shard -> why it cannot be read
        self._noted: set[int] = set()
        self._good: set[int] = set()  # opened before by this process
        if limit is not None:
            _LIMITED.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lengths": None, "_open": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._files.cache_limit is not None:
            _LIMITED.add(self)

    @property
    def fetches(self) -> bool:
        """Whether shards are fetched or expanded before they are read, so that `prefetch` does something."""
        return self._files.fetches

    def lengths(self, shard: int) -> np.ndarray:
        """(chunk_length + 1,) uint32: number of chunks of each length in this shard.

        Raises:
            ValueError: lengths.npy is altered, or its row contradicts the manifest's counts.
        """
        if self._lengths is None:
            self._lengths = self._read_lengths()
        row = self._lengths[shard]
        samples, tokens = int(row.sum()), int(np.dot(row.astype(np.int64), np.arange(len(row))))
        if row[0] or samples != self._samples[shard] or tokens != self._tokens[shard]:
            raise refuse(self.local / LENGTHS,
                         f"row {shard} counts {samples} chunks, {tokens} tokens ({int(row[0])} chunks of length 0)",
                         f"the manifest states {self._samples[shard]} chunks, {self._tokens[shard]} tokens")
        return row

    def sample_lengths(self, shard: int) -> np.ndarray:
        """(samples,) int32: tokens of each chunk of this shard, in stored order (in a substitute: ascending)."""
        return self._shard(shard).lengths

    def last(self, shard: int) -> np.ndarray:
        """(samples,) bool: whether each chunk ends its document."""
        return self._shard(shard).last

    def chunk(self, shard: int, index: int) -> np.ndarray:
        """(L,) uint16: the plain tokens of one chunk, a copy.

        Raises:
            IndexError: no such chunk. ValueError, OSError: see the class.
        """
        opened = self._shard(shard)
        if not 0 <= index < len(opened.lengths):
            raise IndexError(f"chunk {index} of shard {shard}: the shard has {len(opened.lengths)} chunks")
        return np.frombuffer(opened.buffer, "<u2", int(opened.lengths[index]), int(opened.token_starts[index])).copy()

    def sample(self, shard: int, index: int) -> dict[str, Any]:
        """All columns of one chunk: tokens (L,) uint16, doc str, part int, last int, source str."""
        tokens, opened = self.chunk(shard, index), self._shard(shard)
        if opened.donor is not None:
            taken = self.sample(opened.donor, index % int(self._samples[opened.donor]))
            name = self._files.path(shard).name
            return {**taken, "tokens": tokens, "doc": f"{taken['doc']} (for chunk {index} of {name})", "last": 0}
        doc, part, source = read_columns(opened, index, self._files.path(shard))
        return {"tokens": tokens, "doc": doc, "part": part, "last": int(opened.last[index]), "source": source}

    def prefetch(self, shards: Sequence[int]) -> None:
        """Announces the shards of the next rows, in order of need, so that they are fetched in the background.

        Also raises `max_open` to their number, and with a cache limit unmaps others, so that they can make room.
        """
        self.max_open = max(self.max_open, len(shards))
        if self._files.cache_limit is not None and not self._open.keys() <= set(shards):
            for shard in self._open.keys() - set(shards):
                del self._open[shard]
        self._files.prefetch([shard for shard in shards if shard not in self._bad])

    def check_room(self, shards: Collection[int]) -> None:
        """Refuses a cache limit too small for so many shards at a time; see `ShardFiles.check_room`."""
        self._files.check_room(shards)

    @property
    def files(self) -> ShardFiles:
        """Where its files are and what room they may take."""
        return self._files

    def check_shard(self, shard: int) -> int:
        """Checks all that can be known of one shard, without keeping anything; may run in several threads.

        Files are read where they are: those of a remote split that are not here are read into memory.

        Returns:
            Bytes read and hashed.

        Raises:
            FileNotFoundError, OSError: a file cannot be read. ValueError: the first lie found, naming its file.
        """
        return self._check(shard)[0]

    def _check(self, shard: int) -> tuple[int, int]:
        """Bytes read and documents ended, see `check_shard`."""
        entry, path = self.manifest["shards"][shard], self._files.path(shard)
        raw, zipped = entry["raw"], entry["zip"]
        num_bytes = 0
        buffer: Buffer | None = None
        if os.path.lexists(path) or (zipped is None and self.remote is None):
            buffer = map_file(path, raw["bytes"], raw["xxh64"])
            num_bytes += len(buffer)
        if zipped is not None and (buffer is None or os.path.lexists(self.local / zipped["basename"])):
            packed = self._read(zipped)
            content = expand_all(packed, self.local / zipped["basename"], raw["bytes"])
            check_hash(content, path, raw["xxh64"])
            buffer, num_bytes = content, num_bytes + len(packed) + len(content)
        if buffer is None:
            buffer = self._read(raw)
            num_bytes += len(buffer)
        opened = self._parse(shard, buffer)
        check_content(opened, path, entry["source"])
        documents = int(opened.last.sum())
        if documents != entry.get("documents", documents):
            raise refuse(self.local / MANIFEST, f"shards[{shard}] states {entry['documents']} documents",
                         f"{documents} end in it")
        for length, stated in entry["rows"].items():
            if (found := pack_lengths(piece_counts(self.lengths(shard)), int(length)).num_rows) != stated:
                raise refuse(self.local / MANIFEST, f"shards[{shard}] states {stated} rows of {length}",
                             f"its chunks fill {found}")
        return num_bytes, documents

    def verify(self) -> None:
        """Checks every file of the split in full: hashes, layout, counts, packed rows, token range, stock index.json.

        Raises:
            ValueError: the first lie found, naming its file.
        """
        self._check_index()
        documents = sum(self._check(shard)[1] for shard in range(self.num_shards))
        if documents != self.manifest["totals"]["documents"]:
            raise refuse(self.local / MANIFEST, f"totals.documents is {self.manifest['totals']['documents']}",
                         f"{documents} documents end in its shards")

    # -------------------------------------------------------------- files

    def _read(self, file: dict[str, Any]) -> Buffer:
        """A file of the split, of the stated size and hash; a remote one that is not here is not kept."""
        path = self.local / file["basename"]
        if os.path.lexists(path) or self.remote is None:
            return map_file(path, file["bytes"], file["xxh64"])
        data = self._files.read_remote(file["basename"], file["bytes"])
        check_hash(data, path, file["xxh64"])
        return data

    def _read_lengths(self) -> np.ndarray:
        entry, path = self.manifest["lengths"], self.local / LENGTHS
        shape = (self.num_shards, self.chunk_length + 1)
        xxh64 = entry["xxh64"] if self.verify_hashes else None
        try:
            return read_lengths(map_file(path, entry["bytes"], xxh64), path, shape)
        except ValueError as error:
            if self.remote is None:
                raise
            log.warning("%s: it is fetched once more", error)
        fetch_table(self.local, self.remote, LENGTHS, entry["bytes"], again=True)
        return read_lengths(map_file(path, entry["bytes"], xxh64), path, shape)

    def _parse(self, shard: int, buffer: Buffer) -> Shard:
        path = self._files.path(shard)
        opened = parse_shard(buffer, path, num_samples=int(self._samples[shard]), chunk_length=self.chunk_length,
                             vocab_size=self.tokenizer["vocab_size"])
        if not np.array_equal(np.bincount(opened.lengths, minlength=self.chunk_length + 1), self.lengths(shard)):
            raise refuse(path, "its chunk lengths differ from the manifest's histogram",
                         f"row {shard} of {LENGTHS} must match")
        return opened

    def _shard(self, shard: int) -> Shard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if not 0 <= shard < self.num_shards:
            raise IndexError(f"shard {shard}: the set {self.local} has {self.num_shards} shards")
        if shard not in self._bad:
            try:
                self._open[shard] = self._load(shard)
            except (ValueError, FileNotFoundError) as error:
                if self.on_bad_shard == "stop" or shard in self._good:  # rows were planned from its chunks: no stand-in fits
                    raise
                self._bad[shard] = str(error)
            else:
                self._good.add(shard)
        opened = self._open[shard] = self._substitute(shard) if shard in self._bad else self._open[shard]
        while len(self._open) > self.max_open:
            self._open.popitem(last=False)
        return opened

    def _load(self, shard: int) -> Shard:
        """Opens a shard and checks all of it; one that fails is made once more where that is possible."""
        raw, path, renewed = self.manifest["shards"][shard]["raw"], self._files.path(shard), False
        xxh64 = raw["xxh64"] if self.verify_hashes else None
        while True:
            self._files.ensure(shard, self._release)
            try:
                return self._parse(shard, map_file(path, raw["bytes"], xxh64, shared=self._files.cache_limit is not None))
            except FileNotFoundError:
                if not self._files.fetches:
                    raise
                # else removed to make room between the two lines above
            except ValueError as error:
                if renewed or not self._files.renew(shard, self._release):
                    raise
                renewed = True
                log.warning("%s: it was made once more", error)

    def _release(self) -> bool:
        """Unmaps the least recently used shard; False when none is mapped."""
        if self._open:
            self._open.popitem(last=False)
            return True
        return False

    def _substitute(self, shard: int) -> Shard:
        """What is read in place of a bad shard; see the class for the rule."""
        sources, path = self.sources, self._files.path(shard)
        others = [(shard + step) % self.num_shards for step in range(1, self.num_shards)]
        for donor in (other for other in others if sources[other] == sources[shard]):
            if donor in self._bad:
                continue
            try:
                taken = self._load(donor)
            except (ValueError, FileNotFoundError) as error:
                self._bad[donor] = str(error)
                continue
            if shard not in self._noted:
                log.warning("%s: its %d chunks are replaced by tokens of %s, because: %s", path, self._samples[shard],
                            self._files.path(donor).name, self._bad[shard])
                note(self.local / SUBSTITUTIONS, {
                    "shard": path.name, "replaced_by": self._files.path(donor).name, "samples": int(self._samples[shard]),
                    "tokens": int(self._tokens[shard]), "reason": self._bad[shard]})
                self._noted.add(shard)
            return make_substitute(self.lengths(shard), taken, donor)
        raise refuse(path, f"cannot be read ({self._bad[shard]})", f"source {sources[shard]!r} has no other shard that can, "
                     "which on_bad_shard: skip needs")

    def _check_index(self) -> None:
        """index.json is what stock readers trust; it must say what the manifest says."""
        path = self.local / INDEX
        index = read_json(path)
        encodings = [COLUMNS[name] for name in COLUMN_NAMES]

        def file(entry: dict[str, Any] | None) -> tuple[str, int] | None:
            return None if entry is None else (entry["basename"], entry["bytes"])

        expected = [(file(s["raw"]), file(s["zip"]), s["samples"], COLUMN_NAMES, encodings) for s in self.manifest["shards"]]
        try:
            found = [(file(s["raw_data"]), file(s["zip_data"]), s["samples"], s["column_names"], s["column_encodings"])
                     for s in index["shards"]]
        except (KeyError, TypeError) as error:
            raise refuse(path, f"is not an MDS index ({error!r})", "the writer's index is needed") from None
        if found != expected:
            at = next((i for i, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), len(expected))
            raise refuse(path, f"its shard {at} differs from {MANIFEST}", "both must list the same shards")
