"""Small corpora and conversions of them, for tests of converting and of what reads its output."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from conftest import CHUNK_LENGTH, make_documents

from ettin_foundry.corpus.convert import ConvertOptions, Summary, convert
from ettin_foundry.data.shards import MDSSplit

UNIT = 3_000  # bytes: several units for every corpus here
SOURCES = ("wiki", "code")


def run(out: Path | str, sources: list[Path | str], tokenizer: Path | None, **more: object) -> Summary:
    """Converts into small shards and units; one worker, in this process."""
    small = {"chunk_length": CHUNK_LENGTH, "validation": 0.0, "shard_size": "8kb", "workers": 1, "unit_size": UNIT,
             "cut_window": 0.1}
    options = {"sources": [*map(str, sources)], "out": out, "tokenizer": tokenizer, **small, **more}
    return convert(ConvertOptions(**options))  # type: ignore[arg-type]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A file with ids STEM-0, STEM-1, ..."""
    records = [{"id": f"{path.stem}-{i}", "text": text} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_corpus(folder: Path, *, files: int = 3, documents: int = 40, seed: int = 0, longest: int = 60,
                 first: int = 0) -> list[str]:
    """Writes files 0.jsonl, 1.jsonl, ..., or from `first` on; the texts in order."""
    lists = [make_documents(documents, seed=1000 * seed + file, longest=longest) for file in range(files)]
    for file, texts in enumerate(lists, first):
        write_jsonl(folder / f"{file}.jsonl", texts)
    return [text for texts in lists for text in texts]


def stored(split: Path) -> dict[str, np.ndarray]:
    """Document id -> its tokens, put together again from chunks found in order."""
    data, parts = MDSSplit(split), {}
    data.check_index()
    open_document = None
    for shard in range(data.num_shards):
        data.check_shard(shard)
        for index in range(int(data.samples[shard])):
            sample = data.sample(shard, index)
            pieces = parts.setdefault(sample["doc"], [])
            assert sample["part"] == len(pieces) and (open_document in (None, sample["doc"]))
            assert 0 < len(sample["tokens"]) <= data.chunk_length
            assert sample["source"] == data.sources[shard]
            open_document = None if sample["last"] else sample["doc"]
            pieces.append(sample["tokens"])
    assert open_document is None
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of every file, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.lru_cache(maxsize=4)
def whole_set(tokenizer_dir: Path, compression: str | None = None) -> Path:
    """Two sources, train and validation, several units and shards of each. Not to be changed."""
    folder = Path(tempfile.mkdtemp(dir=tokenizer_dir.parent))
    for number, name in enumerate(SOURCES):
        write_corpus(folder / "texts" / name, files=2, documents=25, seed=number, longest=250)
    run(folder / "set", [folder / "texts" / name for name in SOURCES], tokenizer_dir, validation=0.2, unit_size=6_000,
        shard_size="2kb", compression=compression, licence="cc-by-4.0")
    return folder / "set"


def copy_set(tokenizer_dir: Path, folder: Path, *, compression: str | None = None) -> Path:
    """A private copy, to be spoilt."""
    return Path(shutil.copytree(whole_set(tokenizer_dir, compression), folder / "set"))


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
