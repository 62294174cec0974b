"""Text to a data set: read, split by document, tokenize, cut into chunks, write; all or nothing.

Everything is written into a hidden folder beside the wanted one and moved into place when it is complete, so that a
folder of that name is a whole data set at any moment, also when the process is killed. Readers are in sources.py,
shards in split_writer.py, the tokenizer in tokenizer.py. One process; the same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from streaming.base.util import bytes_to_int

from ettin_foundry import tokenizer as tokenizers
from ettin_foundry.manifest import MAX_CHUNK_LENGTH
from ettin_foundry.packing import SPECIALS_PER_PIECE
from ettin_foundry.progress import Progress
from ettin_foundry.sources import Document, Meter, Source, find_source, read_source
from ettin_foundry.split_writer import SourceCounts, SplitWriter

__all__ = ["ConvertOptions", "Summary", "convert", "main"]

log = logging.getLogger(__name__)

_BATCH_BYTES = 1 << 20  # text tokenized at a time: enough for the tokenizer's threads, little enough to hold
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to convert, and how.

    Raises:
        ValueError: an option out of range, or two that contradict each other; the message names them.
    """

    sources: Sequence[str]
    """Files, folders, Hugging Face dataset ids or `python-stdlib`, each optionally as NAME=SOURCE."""
    out: str | os.PathLike[str]
    """Folder of the data set; must not exist, or be empty."""
    tokenizer: str | os.PathLike[str] | None = None
    """Folder or Hugging Face id."""
    train_tokenizer: int | None = None
    """Entries of a tokenizer to train on the corpus, instead of `tokenizer`."""
    chunk_length: int = 1024 - SPECIALS_PER_PIECE
    """Most tokens in a chunk, BOS and EOS not counted; the row length of training minus 2."""
    validation: float = 0.005
    """Share of the documents that goes to validation, chosen by a hash of the text; 0 writes no validation split."""
    text_field: str = "text"
    id_field: str | None = None
    shard_size: int | str = "64mb"
    limit_bytes: int | None = None
    """Stop each source after so many UTF-8 bytes of text."""
    seed: int = 0
    """Of the split's hash: another seed chooses other validation documents."""
    licence: str | None = None
    """Licence of files and folders, for the manifest."""
    progress: bool | None = None
    """Live progress line; None shows it on a terminal only."""

    def __post_init__(self) -> None:
        if not self.sources or isinstance(self.sources, str):
            raise ValueError(f"sources: {self.sources!r} given; a list of at least one source is needed")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError(f"--tokenizer {self.tokenizer} and --train-tokenizer {self.train_tokenizer} given; "
                             "exactly one of the two is needed")
        try:
            bytes_to_int(self.shard_size)
        except ValueError as error:
            raise ValueError(f"--shard-size: {self.shard_size!r} given; a number of bytes such as 64mb is needed") from error
        if not 1 <= self.chunk_length <= MAX_CHUNK_LENGTH:
            raise ValueError(f"--chunk-length: {self.chunk_length} given; 1 to {MAX_CHUNK_LENGTH} tokens are possible. "
                             f"Use the row length of training minus {SPECIALS_PER_PIECE}")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"--validation: {self.validation} given; a share of at least 0 and below 1 is needed")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise ValueError(f"--limit-bytes: {self.limit_bytes} given; at least 1 is needed. Leave it out for all")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed: {self.seed} given; 0 to 2**63 - 1 is possible")


@dataclass(frozen=True)
class Summary:
    """What was written. Counts of both splits together, per source; `bytes` are UTF-8 bytes of text."""

    out: Path
    sources: dict[str, SourceCounts]
    validation_documents: int
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.sources.values())

    def __str__(self) -> str:
        per_source = "; ".join(
            f"{name}: {c.documents:,} documents, {c.tokens:,} tokens, {c.bytes / 1e6:,.1f} MB"
            + "".join(f", {n:,} dropped ({reason})" for reason, n in c.dropped.items())
            for name, c in self.sources.items())
        return (f"{self.out}: {per_source}; {self.validation_documents:,} documents for validation; "
                f"{self.seconds:.1f} s, {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")


def convert(options: ConvertOptions) -> Summary:
    """Converts a corpus into OUT/tokenizer, OUT/train and OUT/validation.

    Raises:
        FileNotFoundError, ValueError: the input cannot be converted; names file and record. FileExistsError: OUT holds
            something. Nothing is left in OUT in either case.
    """
    begin = time.perf_counter()
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out {out}: it exists and is not an empty folder; nothing is ever written over. Name "
                              "another folder, or remove this one")
    sources = _find_sources(options)
    loaded = None if options.tokenizer is None else tokenizers.load(options.tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        tok = loaded or _train_tokenizer(sources, options)
        tok = tokenizers.with_template(tok, "encoder")
        tokenizers.save(tok, partial / "tokenizer")
        summary = _write_splits(sources, tok, partial, options)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dataclasses.replace(summary, out=out, seconds=time.perf_counter() - begin)


def _find_sources(options: ConvertOptions) -> list[Source]:
    sources = [find_source(text, licence=options.licence) for text in options.sources]
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"sources: {', '.join(sorted(twice))} is the name of more than one source; each needs a name "
                         "of its own in the manifest. Write NAME=SOURCE")
    return sources


def _documents(source: Source, meter: Meter, options: ConvertOptions) -> Iterator[tuple[Document, bytes]]:
    """A source's documents up to `limit_bytes`, each with its text in UTF-8.

    Raises:
        ValueError: the source holds no document at all.
    """
    num_bytes = 0
    for document in read_source(source, meter, text_field=options.text_field, id_field=options.id_field):
        encoded = document.text.encode()
        yield document, encoded
        num_bytes += len(encoded)
        if options.limit_bytes is not None and num_bytes >= options.limit_bytes:
            return
    if not num_bytes:
        raise ValueError(f"{source.location}: the corpus is empty, no document in it has any text; at least one is "
                         "needed. Name another source")


def _is_validation(encoded: bytes, options: ConvertOptions) -> bool:
    """By the text alone, so that copies of a document are on one side, wherever they come from."""
    return xxhash.xxh64_intdigest(encoded, seed=options.seed) < options.validation * 2**64


def _train_tokenizer(sources: list[Source], options: ConvertOptions) -> Any:
    """Trains on the documents of the training split only: validation text must be as new to it as to the model."""
    assert options.train_tokenizer is not None
    meter = Meter()
    with Progress("tokenizer", meter, sum(s.num_bytes for s in sources), show=options.progress) as progress:

        def texts() -> Iterator[str]:
            for source in sources:
                for document, encoded in _documents(source, meter, options):
                    progress.update(documents=1, num_bytes=len(encoded))
                    if not _is_validation(encoded, options):
                        yield document.text

        return tokenizers.train_bpe(texts(), options.train_tokenizer)


def _write_splits(sources: list[Source], tok: Any, folder: Path, options: ConvertOptions) -> Summary:
    names = ("train", "validation") if options.validation else ("train",)
    writers = {name: SplitWriter(folder / name, name, chunk_length=options.chunk_length, shard_size=options.shard_size)
               for name in names}
    meter = Meter()
    try:
        encoder = tokenizers.PlainEncoder(tok)
        with Progress("documents", meter, sum(s.num_bytes for s in sources), show=options.progress) as progress:
            for source in sources:
                counts = {name: writer.begin_source(source.name, SourceCounts(source.licence, source.revision))
                          for name, writer in writers.items()}
                for batch in _batches(_documents(source, meter, options)):
                    tokens = encoder([document.text for document, _ in batch])
                    for (document, encoded), ids in zip(batch, tokens):
                        split = "validation" if _is_validation(encoded, options) else "train"
                        if document.text.isspace() or not len(ids):
                            counts[split].dropped["empty"] = counts[split].dropped.get("empty", 0) + 1
                        else:
                            writers[split].write(document.id, ids, num_bytes=len(encoded))
                    progress.update(documents=len(batch), tokens=sum(map(len, tokens)),
                                    num_bytes=sum(len(encoded) for _, encoded in batch))
        _check_sides(writers, options)
        for writer in writers.values():
            writer.finish()
    except BaseException:
        for writer in writers.values():
            writer.abort()
        raise
    block, record = tokenizers.fingerprint(tok), _record(options)
    for writer in writers.values():  # last: until here neither split looks complete
        writer.write_manifest(block, record)
    return Summary(folder, _add_up(writers), writers["validation"].num_documents if options.validation else 0, 0.0)


def _batches(documents: Iterator[tuple[Document, bytes]]) -> Iterator[list[tuple[Document, bytes]]]:
    batch: list[tuple[Document, bytes]] = []
    num_bytes = 0
    for item in documents:
        batch.append(item)
        num_bytes += len(item[1])
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _check_sides(writers: dict[str, SplitWriter], options: ConvertOptions) -> None:
    total = sum(writer.num_documents for writer in writers.values())
    for name, writer in writers.items():
        if not writer.num_documents:
            raise ValueError(f"--validation: {options.validation} given; of {total} documents none fell to {name}, and "
                             "both sides need one. Give more text, another share (say 0.1 for a hundred documents), "
                             "or 0 for no validation split")


def _record(options: ConvertOptions) -> dict[str, Any]:
    """The options that shaped the data, without places on this machine."""
    keys = ("train_tokenizer", "validation", "text_field", "id_field", "shard_size", "limit_bytes", "seed")
    return {key: getattr(options, key) for key in keys}


def _add_up(writers: dict[str, SplitWriter]) -> dict[str, SourceCounts]:
    totals: dict[str, SourceCounts] = {}
    for writer in writers.values():
        for name, counts in writer.sources.items():
            total = totals.setdefault(name, SourceCounts(counts.licence, counts.revision))
            for key in ("documents", "chunks", "tokens", "bytes"):
                setattr(total, key, getattr(total, key) + getattr(counts, key))
            for reason, number in counts.dropped.items():
                total.dropped[reason] = total.dropped.get(reason, 0) + number
    return totals


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description="Turn text into a data set (MDS with a manifest).")
    parser.add_argument("sources", nargs="+", metavar="[NAME=]SOURCE", help="a .jsonl, .json, .txt or .parquet file "
                        "(plain, .gz, .zst), a folder of them, a Hugging Face dataset id (owner/name[:config]), or "
                        "python-stdlib")
    parser.add_argument("--out", required=True, help="folder of the data set; must not exist, or be empty")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", help="folder or Hugging Face id")
    which.add_argument("--train-tokenizer", type=int, metavar="ENTRIES", help="train one on the corpus, e.g. 8192")
    defaults = {f.name: f.default for f in dataclasses.fields(ConvertOptions)}
    helps: dict[str, tuple[type, str]] = {
        "chunk_length": (int, "tokens per chunk at most: row length of training minus 2"),
        "validation": (float, "share of the documents, by a hash of their text"),
        "text_field": (str, "key or column of the text"), "id_field": (str, "key or column of a document's id"),
        "shard_size": (str, "bytes per shard"), "limit_bytes": (int, "stop each source after so much text"),
        "seed": (int, "of the validation split"), "licence": (str, "licence of files, for the manifest")}
    for name, (kind, text) in helps.items():
        shown = "" if defaults[name] is None else f" (default {defaults[name]})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=defaults[name], help=text + shown)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 after one line that says what is wrong with the input."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        summary = convert(ConvertOptions(**vars(arguments)))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{summary}\n")
    return 0
