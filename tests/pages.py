"""Reads a report as a browser would, without one."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class _Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.inside, self.ids, self.links, self.texts = list[str](), list[Any](), list[Any](), list[str]()
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        self.inside += [tag] * (tag not in ("meta", "link"))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.texts += [data] * (self.inside[-1:] != ["style"])


def read_page(path: Path) -> str:
    """The page's text. Its tags nest, ids are unique, links lead somewhere, and nothing comes from elsewhere."""
    page = _Page(source := path.read_text(encoding="utf-8"))
    assert not page.inside and len(set(page.ids)) == len(page.ids)
    for link in page.links:
        there = link[1:] in page.ids if link[0] == "#" else (path.parent / unquote(link)).exists()
        assert there or link == "data:,", link
    assert not re.search(r"https?:|<script|@import|\bnan\b|\bNone\b", source)
    return " ".join(" ".join(page.texts).split())
