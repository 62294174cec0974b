"""What a unit of work needs beside the work: its documents, read ahead in a thread, its files, and telling how far it is."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ettin_foundry.corpus.progress import Tick
from ettin_foundry.corpus.readers import Document, ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Source
from ettin_foundry.corpus.units import Unit
from ettin_foundry.data.storage import Storage

__all__ = ["Ticker", "ahead", "documents_of", "local_copy"]

T = TypeVar("T")

_READ_AHEAD = 2  # items
_TICK_SECONDS = 0.5


class Ticker:
    """Tells the board how far the unit is, about twice a second."""

    def __init__(self, report: Callable[[Tick], None], meter: Meter, unit: Unit) -> None:
        self.report, self.meter, self.where = report, meter, unit.label
        self.told, self.position = 0.0, 0
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, *, documents: int, tokens: int, text_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        if time.monotonic() - self.told > _TICK_SECONDS:
            self.flush()

    def flush(self) -> None:
        position = self.meter.position()
        self.report(Tick(documents=self.documents, tokens=self.tokens, text_bytes=self.text_bytes,
                         file_bytes=position - self.position, where=self.where))
        self.told, self.position = time.monotonic(), position
        self.documents = self.tokens = self.text_bytes = 0


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, made in a thread up to `_READ_AHEAD` before they are asked for."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(_READ_AHEAD)
    stopped = threading.Event()

    def put(kind: str, item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, item), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed to the thread that asks
            put("error", error)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def local_copy(storage: Storage, name: str) -> Path:
    """A file of the set as a local one: itself, or a copy that is removed when the process ends."""
    path = storage.local_path(name)
    if path is None:
        path = storage.scratch() / name
        if not path.exists():
            storage.get_file(name, path)
    return path


def documents_of(unit: Unit, source: Source, options: Mapping[str, Any], meter: Meter) -> Iterator[Document]:
    """The unit's documents in order, up to the one in which `limit_bytes` of the plan's options are reached."""
    num_bytes = 0
    for document in read_parts(source, unit.parts, meter, ReadOptions.of(options)):
        yield document
        if options["limit_bytes"] is not None:
            num_bytes += len(document.text.encode())
            if num_bytes >= options["limit_bytes"]:
                return
