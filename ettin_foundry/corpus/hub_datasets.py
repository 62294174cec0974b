"""Hugging Face datasets as a source: streamed at a fixed revision, in the data shards that the dataset itself has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ettin_foundry.corpus.sources import Source

__all__ = ["count_hub_shards", "read_hub_shard"]


def count_hub_shards(source: Source) -> int:
    """How many stretches the dataset can be read in.

    Raises:
        ValueError: the dataset cannot be opened.
    """
    return max(1, int(getattr(_open(source), "n_shards", 1)))


def read_hub_shard(source: Source, shard: int, number: int) -> Iterator[Any]:
    """The records of one of `number` data shards.

    Raises:
        ValueError: the dataset cannot be opened, or has another number of shards now.
    """
    records = _open(source)
    found = max(1, int(getattr(records, "n_shards", 1)))
    if found != number:
        raise ValueError(f"{source.location}: the dataset has {found} data shards; {number} were planned. Convert with the "
                         "version of `datasets` that the conversion began with, or begin again in another folder")
    return iter(records if number == 1 else records.shard(num_shards=number, index=shard))


def _open(source: Source) -> Any:
    from datasets import load_dataset

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    repo, _, config = source.location.partition(":")
    try:
        return load_dataset(repo, config or None, split="train", streaming=True, revision=source.revision)
    except Exception as error:
        raise ValueError(f"{source.location}: the dataset cannot be opened ({type(error).__name__}: "
                         f"{str(error)[:300]}); one with a train split and no code of its own is needed. Name a "
                         "configuration as owner/name:config, or download the files") from error
