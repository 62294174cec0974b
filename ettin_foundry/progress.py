"""One live line while a corpus is read: documents, tokens, megabytes, speed, share of the files.

On a terminal it is a rich progress bar; elsewhere (a log file, a cluster's console) a log line every few seconds, since
silence looks like a hang.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from ettin_foundry.sources import Meter

__all__ = ["Progress"]

log = logging.getLogger(__name__)

_LOG_SECONDS = 10.0


class Progress:
    """Context manager; `update` adds to the counts.

    Args:
        title: what is being done. meter: moved by the readers. total_bytes: of all files; 0 where unknown.
        show: a live bar; None: on a terminal only, else log lines.
    """

    def __init__(self, title: str, meter: Meter, total_bytes: int, *, show: bool | None = None) -> None:
        self.title = title
        self.meter = meter
        self.total_bytes = total_bytes
        self.documents = self.tokens = self.num_bytes = 0
        self.begin = self.logged = time.perf_counter()
        self.bar = None
        if sys.stderr.isatty() if show is None else show:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                       TextColumn("{task.fields[text]}"), TimeElapsedColumn())
            self.bar = RichProgress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(title, total=total_bytes or None, text="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.bar:
            if kind is None:
                self.bar.update(self.task, completed=self.total_bytes or None, text=str(self))
            self.bar.stop()

    def __str__(self) -> str:
        seconds = max(time.perf_counter() - self.begin, 1e-9)
        tokens = f"{self.tokens:,} tokens, " if self.tokens else ""
        return (f"{self.documents:,} documents, {tokens}{self.num_bytes / 1e6:,.1f} MB, "
                f"{self.num_bytes / 1e6 / seconds:,.1f} MB/s")

    def update(self, *, documents: int, num_bytes: int, tokens: int = 0) -> None:
        """Adds to the counts and shows them."""
        self.documents += documents
        self.num_bytes += num_bytes
        self.tokens += tokens
        now = time.perf_counter()
        if self.bar:
            if now - self.logged > 0.1:  # per document is too often for the tokenizer's pass
                self.logged = now
                self.bar.update(self.task, completed=self.meter.position(), text=str(self))
        elif now - self.logged > _LOG_SECONDS:
            self.logged = now
            share = f", {self.meter.position() / self.total_bytes:.0%} of the files" if self.total_bytes else ""
            log.info("%s: %s%s", self.title, self, share)
