"""Small corpora and conversions of them, for tests of converting and of what reads its output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import CHUNK_LENGTH, make_documents

from ettin_foundry.corpus.convert import ConvertOptions, Summary, convert
from ettin_foundry.data.shards import MDSSplit

UNIT = 3_000  # bytes: several units for every corpus here


def options(out: Path | str, sources: list[Path | str], tokenizer: Path | None, **more: object) -> ConvertOptions:
    """Small shards and units; one worker, in this process."""
    small = {"chunk_length": CHUNK_LENGTH, "validation": 0.0, "shard_size": "8kb", "workers": 1,
             "unit_size": UNIT, **more}
    return ConvertOptions(sources=[*map(str, sources)], out=out, tokenizer=tokenizer, **small)  # type: ignore


def run(out: Path | str, sources: list[Path | str], tokenizer: Path | None, **more: object) -> Summary:
    """Converts with `options`."""
    return convert(options(out, sources, tokenizer, **more))


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


def is_finished(out: Path) -> bool:
    """Whether a reader would take anything in OUT for a dataset."""
    return bool(list(out.rglob("manifest.json")))
