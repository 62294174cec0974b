"""How full packed rows are, and where cuts fall, by `--cut-window`: `python benchmarks/packing.py --tokenizer DIR`.

Two corpora, each converted by data_prep/convert.py at both row lengths of the recipes: `python-stdlib`, whose files are
mostly longer than a row, and short texts made of its words, whose numbers of words are log-normal (median 45, about 60
tokens; sigma 1.2: from a few words to some paragraphs). `ettin show` prints the fill as well, to one decimal. Where a
cut falls is read from the text around it; ends of documents are no cuts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

PLACES = ("inside a word or before punctuation", "before a space", "line end", "sentence end", "paragraph end")
MEDIAN_WORDS, SIGMA = 45, 1.2


def write_short_texts(path: Path, number: int) -> None:
    from corpora import library_texts

    words, rng, at = " ".join(library_texts()).split(" "), np.random.default_rng(0), 0
    with path.open("w", encoding="utf-8") as stream:
        for count in np.ceil(rng.lognormal(np.log(MEDIAN_WORDS), SIGMA, number)).astype(int).tolist():
            stream.write(json.dumps({"text": " ".join(words[at:at + count])}) + "\n")
            at = (at + count) % (len(words) - 10_000)


def place(before: str, after: str) -> int:
    """The index in PLACES of a cut between two texts."""
    if re.search(r"\n\s*\n$", before):
        return 4
    if re.search(r"(?<![A-Z0-9])[.!?]['\")\]]*\s*$", before) and (before[-1].isspace() or after[0].isspace()):
        return 3
    return 2 if before[-1] == "\n" else int(after[0].isspace())


def measure(source: str, tokenizer: str, out: Path, row_length: int, window: float) -> str:
    """Converts, and gives a line of the table."""
    from ettin_foundry.corpus.chunking import token_bytes
    from ettin_foundry.data.shards import MDSSplit

    subprocess.run([sys.executable, ROOT / "data_prep/convert.py", source, "--out", out, "--tokenizer", tokenizer,
                    "--chunk-length", str(row_length - 2), "--cut-window", str(window), "--validation", "0"],
                   check=True, capture_output=True)
    split = MDSSplit(out / "train")
    chunks, tokens = int(split.samples.sum()), int(split.tokens.sum())
    rows = split.rows(row_length)
    assert rows is not None
    fill = (tokens + 2 * chunks) / (int(rows.sum()) * row_length)
    pieces = token_bytes((out / "tokenizer/tokenizer.json").read_text())
    places, samples = np.zeros(len(PLACES), int), [split.sample(shard, number) for shard in range(split.num_shards)
                                         for number in range(int(split.samples[shard]))]
    for chunk, following in zip(samples, samples[1:]):
        if not chunk["last"]:
            before, after = (b"".join(pieces[token] for token in some).decode("utf-8", "replace")
                             for some in (chunk["tokens"][-40:], following["tokens"][:2]))
            places[place(before, after)] += 1
    shares = [f"{count / max(1, places.sum()):.1%}" for count in places]
    return " | ".join([str(window), f"{fill:.2%}", f"{chunks:,}", f"{places.sum():,}", *shares])


def main() -> None:
    parser = argparse.ArgumentParser(description="fill of packed rows and places of cuts", epilog=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder of Ettin's tokenizer")
    parser.add_argument("--windows", nargs="+", type=float, default=[0.1, 0.05, 0.02, 0.01, 0.005, 0.0])
    parser.add_argument("--texts", type=int, default=50_000, help="short texts")
    args = parser.parse_args()
    print("| texts | rows of | window | fill | chunks | cuts | " + " | ".join(PLACES) + " |\n" + "|---" * 11 + "|")
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder, "short.jsonl")
        write_short_texts(short, args.texts)
        for name, source in (("python-stdlib", "python-stdlib"), ("short", str(short))):
            for length in (1024, 8192):
                for window in args.windows:
                    out = Path(folder, f"{name}-{length}-{window}")
                    line = measure(source, args.tokenizer, out, length, window)
                    print(f"| {name} | {length:,} | {line} |", flush=True)


if __name__ == "__main__":
    main()
