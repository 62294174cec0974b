"""Converted datasets for the tests of verify, show and the data card, and ways to damage a copy of one."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

from converting import options, write_corpus

from ettin_foundry.corpus.convert import convert
from ettin_foundry.data.shards import MDSSplit

SOURCES = ("wiki", "code")


@functools.lru_cache(maxsize=4)
def whole_set(tokenizer_dir: Path, compression: str | None = None) -> Path:
    """Two sources, train and validation, several units and shards of each. Not to be changed."""
    folder = Path(tempfile.mkdtemp(dir=tokenizer_dir.parent))
    for number, name in enumerate(SOURCES):
        write_corpus(folder / "texts" / name, files=2, documents=25, seed=number, longest=250)
    convert(options(folder / "set", [folder / "texts" / name for name in SOURCES], tokenizer_dir, validation=0.2,
                    unit_size=6_000, shard_size="2kb", compression=compression, licence="cc-by-4.0"))
    return folder / "set"


def copy_set(tokenizer_dir: Path, folder: Path, *, compression: str | None = None) -> Path:
    """A private copy, to be spoilt."""
    out = folder / "set"
    shutil.copytree(whole_set(tokenizer_dir, compression), out)
    return out


def shards_of(split: Path) -> list[Path]:
    """Shard files in the order of the manifest."""
    manifest = json.loads((split / "manifest.json").read_text())
    return [split / (shard["zip"] or shard["raw"])["basename"] for shard in manifest["shards"]]


@functools.lru_cache(maxsize=8)
def samples_of(split: Path) -> list[dict]:
    """All samples in stored order, read from a copy."""
    with tempfile.TemporaryDirectory() as folder:
        data = MDSSplit(shutil.copytree(split, Path(folder) / "copy"))
        return [data.sample(shard, index) for shard in range(data.num_shards) for index in range(data.samples[shard])]
