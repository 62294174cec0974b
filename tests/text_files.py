"""Corpora as files of every format, and reading them back, for the tests of sources, readers and conversions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import zstandard
from pyarrow import parquet

from ettin_foundry.corpus.readers import Document, ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Source, find_source, plan_parts

TEXTS = ["One text.", "Zwei \u00dc\u00dfe \U0001f600\nlines\r\n", "  three  ", "four \u2028 \u0000 five", "\ufeffsix"]


def content(kind: str, texts: list[str]) -> bytes:
    records = [{"id": f"id-{i}", "text": text, "other": i} for i, text in enumerate(texts)]
    if kind in (".jsonl", ".json"):
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    return table_bytes(pyarrow.Table.from_pylist(records))


def table_bytes(table: pyarrow.Table) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress,
                                                ".zst": lambda data: zstandard.ZstdCompressor().compress(data)}
FORMATS = [*((kind, packing) for kind in (".jsonl", ".json", ".txt") for packing in PACKERS), (".parquet", "")]


def read_all(source: Source, meter: Meter | None = None, **options: Any) -> list[Document]:
    """Every document of a source."""
    parts = [part for unit in plan_parts(source, 1 << 62) for part in unit]
    return list(read_parts(source, parts, meter or Meter(), ReadOptions(**options)))


def read(location: Path | str, **options: Any) -> list[tuple[str, str]]:
    """(id, text) of every document, after checking that the progress meter arrives at the end."""
    meter, source = Meter(), find_source(str(location))
    found = read_all(source, meter, **options)
    assert meter.position() == sum(source.files.values())
    return [(document.id, document.text) for document in found]
