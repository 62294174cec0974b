"""The options of a conversion, and its command line. What they mean is done in convert.py and unit_worker.py."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ettin_foundry.corpus.encoder import Engine
from ettin_foundry.corpus.filters import FilterOptions
from ettin_foundry.corpus.readers import ReadOptions
from ettin_foundry.corpus.units import parse_size
from ettin_foundry.data.manifest import MAX_CHUNK_LENGTH
from ettin_foundry.data.packing import SPECIALS_PER_PIECE

__all__ = ["ConvertOptions", "make_parser", "options_from"]

_EXECUTORS = ("local", "ray")
_COMPRESSIONS = (None, "zstd")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to convert, and how.

    Raises:
        ValueError: an option out of range, or two that contradict each other; the message names them.
    """

    sources: Sequence[str]
    """Files, folders, URLs, Hugging Face dataset ids or `python-stdlib`, each optionally as NAME=SOURCE."""
    out: str | os.PathLike[str]
    """Folder or URL of the set; new, or one in which the same conversion was started before."""
    tokenizer: str | os.PathLike[str] | None = None
    """Folder or Hugging Face id; may be left out with `append`."""
    train_tokenizer: int | None = None
    """Entries of a tokenizer to train on the corpus, instead of `tokenizer`."""
    chunk_length: int = 1024 - SPECIALS_PER_PIECE
    """Most tokens in a chunk, BOS and EOS not counted; the row length of training minus 2."""
    cut_window: float = 0.1
    """Share of `chunk_length` within which a chunk may end early, at a paragraph or sentence end; 0 never does."""
    validation: float = 0.005
    """Share of the documents that goes to validation, chosen by a hash of the text; 0 writes no validation split."""
    text_field: str = "text"
    id_field: str | None = None
    max_document_bytes: int | str = ReadOptions.max_document_bytes
    """Documents of more UTF-8 bytes are dropped, and counted as `oversized`."""
    shard_size: int | str = "64mb"
    unit_size: int | str = "256mb"
    """Input bytes of a unit of work: what is done again after an interruption, and what workers share out."""
    compression: str | None = None
    """`zstd` or None."""
    limit_bytes: int | None = None
    """Stop each source after so many UTF-8 bytes of text; the source is then one unit."""
    seed: int = 0
    """Of the split's hash: another seed chooses other validation documents."""
    licence: str | None = None
    """Licence of files and folders, for the manifest."""
    filters: FilterOptions = field(default_factory=FilterOptions)
    append: bool = False
    """Add the sources to a finished set."""
    workers: int | None = None
    """Processes (CPUs under Ray); None takes every core that this process may use."""
    engine: Engine = "auto"
    """What tokenizes: `fast` (fastokens), `tokenizers`, or fast where it gives the same ids; the ids are the same."""
    executor: str = "local"
    ray_address: str | None = None
    """A running Ray cluster; None starts Ray on this machine."""
    task_index: int | None = None
    """Of a job array: do units task_index, task_index + num_tasks, ... and leave the rest to `ettin finalize`."""
    num_tasks: int | None = None
    progress: bool | None = None
    """Live progress line; None shows it on a terminal only."""

    def __post_init__(self) -> None:
        if not self.sources or isinstance(self.sources, str):
            raise ValueError(f"sources: {self.sources!r} given; a list of at least one source is needed")
        given = [name for name in ("tokenizer", "train_tokenizer") if getattr(self, name) is not None]
        if len(given) == 2 or (not given and not self.append):
            raise ValueError(f"--tokenizer {self.tokenizer} and --train-tokenizer {self.train_tokenizer} given; "
                             "exactly one of the two is needed (neither with --append)")
        if self.append and self.train_tokenizer is not None:
            raise ValueError(f"--train-tokenizer: {self.train_tokenizer} given with --append, where it has no effect: a "
                             "set keeps its tokenizer. Leave it out")
        parse_size("--unit-size", self.unit_size)
        most = 2**31 - 1 if self.compression else 2**32 - 1  # offsets in a shard are uint32; the zstd package takes an int
        if parse_size("--shard-size", self.shard_size) > most:
            raise ValueError(f"--shard-size: {self.shard_size} given; at most {most} bytes are possible, 64mb is usual")
        if not 1 <= self.chunk_length <= MAX_CHUNK_LENGTH:
            raise ValueError(f"--chunk-length: {self.chunk_length} given; 1 to {MAX_CHUNK_LENGTH} tokens are possible. "
                             f"Use the row length of training minus {SPECIALS_PER_PIECE}")
        if not 0.0 <= self.cut_window <= 0.5:
            raise ValueError(f"--cut-window: {self.cut_window} given; a share from 0 (cut as late as possible) to 0.5 is "
                             "possible. 0.1 is usual")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"--validation: {self.validation} given; a share of at least 0 and below 1 is needed")
        if self.limit_bytes is not None and self.limit_bytes < 1:
            raise ValueError(f"--limit-bytes: {self.limit_bytes} given; at least 1 is needed. Leave it out for all")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed: {self.seed} given; 0 to 2**63 - 1 is possible")
        if self.compression not in _COMPRESSIONS:
            raise ValueError(f"--compression: {self.compression!r} given; zstd is possible. Leave it out for plain shards")
        self._check_execution()

    def _check_execution(self) -> None:
        if self.engine not in get_args(Engine):
            raise ValueError(f"--engine: {self.engine!r} given; {', '.join(get_args(Engine))} are possible")
        if self.executor not in _EXECUTORS:
            raise ValueError(f"--executor: {self.executor!r} given; {' or '.join(_EXECUTORS)} is possible")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers: {self.workers} given; at least 1 is needed. Leave it out for all cores")
        if self.ray_address is not None and self.executor != "ray":
            raise ValueError(f"--ray-address: {self.ray_address} given with --executor {self.executor}, where it has no "
                             "effect. Add --executor ray, or leave it out")
        if (self.task_index is None) != (self.num_tasks is None):
            raise ValueError(f"--task-index {self.task_index} and --num-tasks {self.num_tasks} given; both are needed, or "
                             "neither")
        if self.task_index is not None and self.num_tasks is not None and not 0 <= self.task_index < self.num_tasks:
            raise ValueError(f"--task-index: {self.task_index} given; 0 to {self.num_tasks - 1} is possible with "
                             f"--num-tasks {self.num_tasks}. Number the array from 0")
        if self.task_index is not None and self.train_tokenizer is not None:
            raise ValueError(f"--train-tokenizer: {self.train_tokenizer} given with --task-index; every task would train "
                             "it. Train it first (convert a sample into another folder), then pass --tokenizer "
                             "FOLDER/tokenizer")
        if self.task_index is not None and self.filters.deduplicate:
            raise ValueError("--deduplicate: given with --task-index; all documents must be compared before the first is "
                             "written, which separate tasks cannot. Use --executor ray, or one machine")

    def record(self) -> dict[str, Any]:
        """The options that shape the data, without places on this machine."""
        keys = ("train_tokenizer", "chunk_length", "cut_window", "validation", "text_field", "id_field", "compression",
                "limit_bytes", "seed")
        limit = parse_size("--max-document-bytes", self.max_document_bytes)
        return {**{key: getattr(self, key) for key in keys},
                # left out at its default, so that the record is the one of conversions that began before there was a limit
                **({} if limit == ReadOptions.max_document_bytes else {"max_document_bytes": limit}),
                "shard_size": parse_size("--shard-size", self.shard_size),
                "unit_size": parse_size("--unit-size", self.unit_size), "filters": self.filters.record()}


_HELP: dict[str, tuple[type, str]] = {
    "chunk_length": (int, "tokens per chunk at most: row length of training minus 2"),
    "cut_window": (float, "share of a chunk to find a paragraph or sentence end in; 0: as late as possible"),
    "validation": (float, "share of the documents, by a hash of their text"),
    "text_field": (str, "key or column of the text"), "id_field": (str, "key or column of a document's id"),
    "max_document_bytes": (str, "drop larger documents, e.g. 16mb"),
    "shard_size": (str, "bytes per shard"), "unit_size": (str, "input bytes per unit of work"),
    "compression": (str, "zstd, or leave it out for plain shards"),
    "limit_bytes": (int, "stop each source after so much text"), "seed": (int, "of the validation split"),
    "licence": (str, "licence of files, for the manifest"),
    "workers": (int, "processes; all cores if left out"),
    "engine": (str, "what tokenizes: fast, tokenizers, or fast where its ids are the same (auto)"),
    "executor": (str, "local or ray"),
    "ray_address": (str, "a running Ray cluster; one is started here if left out"),
    "task_index": (int, "number of this task in a job array, from 0"), "num_tasks": (int, "tasks of the job array"),
}


def make_parser() -> argparse.ArgumentParser:
    """The command line of data_prep/convert.py."""
    parser = argparse.ArgumentParser(
        prog="convert", description="Turn text into a data set (MDS with a manifest). Interrupted, the same command goes on "
        "where it was; the result is the same whatever the workers and machines.")
    parser.add_argument("sources", nargs="+", metavar="[NAME=]SOURCE", help="a .jsonl, .json, .txt or .parquet file "
                        "(plain, .gz, .zst), a folder or URL of them, a Hugging Face dataset id (owner/name[:config]), or "
                        "python-stdlib")
    parser.add_argument("--out", required=True, help="folder or URL of the set: new, or one where this was begun")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", help="folder or Hugging Face id")
    which.add_argument("--train-tokenizer", type=int, metavar="ENTRIES", help="train one on the corpus, e.g. 8192")
    defaults = {f.name: f.default for f in dataclasses.fields(ConvertOptions)}
    for name, (kind, text) in _HELP.items():
        shown = "" if defaults[name] is None else f" (default {defaults[name]})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=defaults[name], help=text + shown)
    parser.add_argument("--append", action="store_true", help="add these sources to a finished set")
    gates = parser.add_argument_group("filters, all off unless given; what each drops is counted")
    gates.add_argument("--deduplicate", action="store_true", help="keep the first of exactly equal documents")
    gates.add_argument("--min-characters", type=int, help="drop shorter documents")
    gates.add_argument("--max-characters", type=int, help="drop longer documents")
    gates.add_argument("--filter", action="append", default=[], metavar="MODULE:FUNCTION", dest="predicates",
                       help="keep documents for which FUNCTION(text, id) is true; may be repeated")
    return parser


def options_from(arguments: argparse.Namespace) -> ConvertOptions:
    """The parsed command line as options."""
    given = vars(arguments).copy()
    filters = FilterOptions(
        min_characters=given.pop("min_characters"), max_characters=given.pop("max_characters"),
        predicates=tuple(given.pop("predicates")), deduplicate=given.pop("deduplicate"))
    return ConvertOptions(**given, filters=filters)
