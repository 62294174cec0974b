"""`python-stdlib`: the running Python's standard library as a corpus, real English and code on every machine.

One document per .py file, docstrings and all, without test suites; then one per built-in or extension module, holding
its docstrings, which exist in no .py file. Docstrings of .py files are not repeated as documents of their own: a text
must not be on both sides of the train/validation split.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["STDLIB", "read_docstrings", "read_module", "stdlib_facts"]

STDLIB = "python-stdlib"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_SKIPPED_MODULES = ("_test", "xx", "_xx", "_ctypes_test", "readline", "antigravity", "_tkinter")
"""Prefixes: test modules, and those whose import touches the terminal or needs a display library."""


def stdlib_facts() -> tuple[str, list[tuple[str, int]], dict[str, str]]:
    """The library's folder; (name in it, bytes) of the .py files in sorted order; licence and revision for the manifest."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    found = sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in files)
    return str(root), found, {"licence": "PSF-2.0", "revision": platform.python_version()}


def read_module(path: Path) -> str | None:
    """The text of a .py file; None for one that does not decode."""
    try:
        with tokenize.open(path) as stream:  # honours a file's coding line
            return stream.read()
    except (SyntaxError, UnicodeDecodeError):  # deliberately odd encodings, as in lib2to3's data
        return None


def read_docstrings() -> Iterator[tuple[str, str]]:
    """(text, document id) per module without a .py file."""
    for name in sorted(sys.stdlib_module_names):
        if (text := _docstrings(name)) is not None:
            yield text, f"docstrings/{name}"


def _docstrings(name: str) -> str | None:
    """Signatures and docstrings of a module without Python source; None for others and for those that do not load."""
    if name.startswith(_SKIPPED_MODULES):
        return None
    try:
        spec = importlib.util.find_spec(name)
        extension = bool(spec and spec.origin and spec.origin.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)))
        if name not in sys.builtin_module_names and not extension:
            return None
        with warnings.catch_warnings():  # some modules announce their removal when imported
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except (ImportError, ValueError):  # built without its C library
        return None
    parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
    for attribute, value in sorted(vars(module).items()):
        if inspect.isroutine(value) or inspect.isclass(value):
            parts.append(_described(f"{name}.{attribute}", value))
            if inspect.isclass(value) and value.__module__ == name:
                parts += [_described(f"{name}.{attribute}.{key}", member)
                          for key, member in sorted(vars(value).items()) if not key.startswith("_")]
    return "\n\n".join(part for part in parts if part).strip() + "\n"


def _described(name: str, value: Any) -> str:
    doc = value.__doc__ if isinstance(getattr(value, "__doc__", None), str) else ""
    return f"{name}{getattr(value, '__text_signature__', None) or ''}\n\n{inspect.cleandoc(doc)}" if doc else ""
