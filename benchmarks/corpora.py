"""The texts that conversion benchmarks work on: the running Python's standard library, and as much more like it as
asked.

It is real English and code and on every machine. Copies of it would be easier than new text, because every word of
them has been seen before, so each copy is varied: one word in eight gets other letters at its end, always the same
ones for the same copy. Also here: the machine that a measurement was made on. No torch: these programs need none.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["ettin_tokenizer", "library_texts", "machine", "texts_of_size", "write_jsonl", "write_text_files"]

ROOT = Path(__file__).resolve().parents[1]
_ODD_FOLDERS = {"test", "tests", "idle_test", "lib2to3"}
_WORD = re.compile(r"[A-Za-z]{5,}")


def library_texts(*, everything: bool = False) -> list[str]:
    """UTF-8 sources of the standard library in sorted order; without test suites unless `everything`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts
        if "site-packages" in folders or (not everything and _ODD_FOLDERS.intersection(folders)):
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # deliberately odd encodings
            continue
    return texts


def texts_of_size(num_bytes: int) -> Iterator[str]:
    """Texts of together at least `num_bytes` UTF-8 bytes: the library, then varied copies of it."""
    originals = [text for text in library_texts() if text and not text.isspace()]
    size, copy = 0, 0
    while True:
        for text in originals:
            varied = _varied(text, copy) if copy else text
            yield varied
            size += len(varied.encode())
            if size >= num_bytes:
                return
        copy += 1


def _varied(text: str, copy: int) -> str:
    def change(match: re.Match[str]) -> str:
        word = match[0]
        number = zlib.crc32(word.encode(), copy)
        if number % 8:
            return word
        letters = "".join(chr(ord("a") + (number >> shift) % 26) for shift in (8, 14, 20))
        return word[:-2] + letters

    return _WORD.sub(change, text)


def write_jsonl(path: Path, texts: Iterator[str]) -> tuple[int, int]:
    """One record {"id", "text"} a line; returns the number of documents and their UTF-8 bytes."""
    number, size = 0, 0
    with path.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
            number, size = number + 1, size + len(text.encode())
    return number, size


def write_text_files(folder: Path, source: Path) -> None:
    """The documents of a .jsonl as one .txt file each, for converters that read nothing else."""
    folder.mkdir()
    with source.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            (folder / f"{number:07d}.txt").write_text(json.loads(line)["text"], encoding="utf-8", newline="")


def ettin_tokenizer() -> Path | None:
    """The folder of Ettin's tokenizer: ETTIN_TOKENIZER, or shared/data/ettin-tokenizer beside the project."""
    folder = Path(os.environ.get("ETTIN_TOKENIZER", ROOT.parent / "shared" / "data" / "ettin-tokenizer"))
    return folder if (folder / "tokenizer.json").is_file() else None


def machine() -> dict[str, Any]:
    """Processor, cores and Python of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "cpus": os.cpu_count(),
            "python": platform.python_version(), "system": platform.system()}
