"""How the order of rows behaves on a set of two trillion tokens: start-up, memory, and rows at any step.

    python benchmarks/order_at_scale.py                        2.8e9 chunks in 70,000 shards, sources as in pretraining
    python benchmarks/order_at_scale.py --set runs/demo/data   lengths of a converted dataset

No shard exists. A shard's histogram of chunk lengths is drawn from that of real text: the standard library's files,
counted in words and signs and cut as chunks are (or lengths.npy of a converted set). To keep the preparation short
there are `--kinds` different histograms, which the shards share; the order does not know that. Sources have shards in
the proportions of data_prep/sources.yaml. What reading a real shard costs is not in these figures: the lengths of a
shard's chunks come from a random permutation of its histogram.

Each place is measured in a process of its own: `start` makes the order, `first row` is what a resumed run then waits
for (tokens before the row, and the row), `first step` all rows of one step, `later` a row of the step after that.
`peak` is what the process took beyond its imports and the simulated set. `manifest` opens a manifest.json of as many
shards as a set has. Prints a table and writes nothing (the manifest lies in a temporary folder meanwhile).
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from corpora import library_texts  # noqa: E402

from ettin_foundry.data.order import Order  # noqa: E402
from ettin_foundry.data.packing import SPECIALS_PER_PIECE, pack_lengths, piece_counts  # noqa: E402
from ettin_foundry.data.shards import MDSSplit  # noqa: E402

PLACES = (0.0, 0.01, 0.5, 0.99)


class SimulatedSet:
    """What an order asks for. K histograms of M + 1 lengths, S shards."""

    def __init__(self, histograms: np.ndarray, rows: np.ndarray, kinds: np.ndarray, sources: list[str]) -> None:
        self.histograms, self.kinds, self.sources = histograms, kinds, sources
        self.samples = histograms.sum(axis=1)[kinds]
        self.tokens = (histograms @ np.arange(histograms.shape[1]))[kinds]
        self._rows = rows[kinds]

    def rows(self, max_seq_len: int) -> np.ndarray:
        return self._rows

    def lengths(self, shard: int) -> np.ndarray:
        return self.histograms[self.kinds[shard]]

    def sample_lengths(self, shard: int) -> np.ndarray:
        counts = self.lengths(shard)
        return np.random.default_rng(shard).permutation(np.repeat(np.arange(counts.size), counts))


def stdlib_histogram(chunk_length: int) -> np.ndarray:
    """(chunk_length + 1,) chunks of each length in the standard library's files."""
    counts = np.zeros(chunk_length + 1, np.int64)
    for text in library_texts():
        whole, rest = divmod(len(re.findall(r"\w+|[^\w\s]", text)), chunk_length)
        counts[chunk_length] += whole
        counts[rest] += 1
    counts[0] = 0
    return counts


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """The arrays of a SimulatedSet."""
    import yaml

    if options.set:
        counts = np.load(options.set / "train" / "lengths.npy", allow_pickle=False).sum(axis=0, dtype=np.int64)
    else:
        counts = stdlib_histogram(options.max_seq_len - SPECIALS_PER_PIECE)
    rng = np.random.default_rng(0)
    per_shard = round(options.chunks / options.shards)
    histograms = rng.multinomial(per_shard, counts / counts.sum(), options.kinds)
    rows = np.array([pack_lengths(piece_counts(row), options.max_seq_len).num_rows for row in histograms])
    budgets = yaml.safe_load((ROOT / "data_prep" / "sources.yaml").read_text())["phases"]["pretrain"]
    ends = np.round(np.cumsum(list(budgets.values())) / sum(budgets.values()) * options.shards).astype(int)
    sources = np.repeat(list(budgets), np.diff(ends, prepend=0)).tolist()
    return {"histograms": histograms, "rows": rows, "kinds": rng.integers(0, options.kinds, options.shards),
            "sources": sources}


def write_manifest(folder: Path, table: dict[str, Any], max_seq_len: int) -> None:
    """A manifest.json that states the simulated shards."""
    data = SimulatedSet(**table)
    entries = []
    for shard, (samples, tokens, rows, source) in enumerate(zip(
            data.samples.tolist(), data.tokens.tolist(), data.rows(max_seq_len).tolist(), data.sources)):
        raw = {"basename": f"shard.{shard:05d}.000.mds", "bytes": 100 * samples + 2 * tokens, "xxh64": f"{shard:016x}"}
        entries.append({"raw": raw, "zip": None, "samples": samples, "tokens": tokens, "documents": samples // 2,
                        "source": source, "rows": {str(max_seq_len): rows}})
    totals = {key: sum(entry[key] for entry in entries) for key in ("documents", "samples", "tokens")}
    (folder / "manifest.json").write_text(json.dumps({
        "format": "ettin-mds", "version": 1, "split": "train", "chunk_length": data.histograms.shape[1] - 1,
        "compression": None, "tokenizer": {"name": "none", "vocab_size": 50368}, "options": {}, "code_version": "0",
        "columns": {"tokens": "ndarray:uint16", "doc": "str", "part": "int", "last": "int", "source": "str"},
        "lengths": {"basename": "lengths.npy", "bytes": 1, "xxh64": "0" * 16}, "sources": {}, "shards": entries,
        "totals": totals}))


def peak_bytes() -> int:
    """Most memory that this process has had; getrusage's begins with that of the process it was forked from."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def measure(case: dict[str, Any]) -> dict[str, float]:
    """One place of the stream, in a fresh process."""
    if "manifest" in case:
        before, begin = peak_bytes(), time.perf_counter()
        data: Any = MDSSplit(case["manifest"])
        assert data.rows(case["max_seq_len"]) is not None and data.fingerprint and data.sources
        return {"start": time.perf_counter() - begin, "peak": peak_bytes() - before}
    data = SimulatedSet(**case["table"])
    before, begin = peak_bytes(), time.perf_counter()
    order = Order(data, case["max_seq_len"], packing=True, shuffle=True, seed=21, window=case["window"])
    start = time.perf_counter() - begin
    step = round(case["place"] * (order.rows_per_epoch // case["step_rows"]))
    row = step * case["step_rows"]
    begin = time.perf_counter()
    order.tokens_before(row)
    order.row(row)
    first = time.perf_counter() - begin
    for number in range(row, row + case["step_rows"]):
        order.row(number)
    whole = time.perf_counter() - begin
    begin = time.perf_counter()
    for number in range(row + case["step_rows"], row + 2 * case["step_rows"]):
        order.row(number)
    later = (time.perf_counter() - begin) / case["step_rows"]
    begin = time.perf_counter()
    ahead = order.shards_ahead(row)
    seconds = time.perf_counter() - begin
    tokens, rows = order.tokens_per_epoch, order.rows_per_epoch
    return {"step": step + 1, "start": start, "first": first, "whole": whole, "later": later, "ahead": seconds,
            "num_ahead": len(ahead), "tokens": tokens, "rows": rows, "fill": tokens / (rows * case["max_seq_len"]),
            "peak": peak_bytes() - before}


def in_process(case: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child"]
    return json.loads(subprocess.run(command, input=pickle.dumps(case), stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=70_000)
    parser.add_argument("--chunks", type=float, default=2.8e9)
    parser.add_argument("--kinds", type=int, default=256, help="different histograms")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--step-rows", type=int, default=2816, help="rows of a step over all ranks")
    parser.add_argument("--set", type=Path, help="a converted set whose lengths are drawn from")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(pickle.load(sys.stdin.buffer))))
        return
    table = simulate(options)
    case = {"table": table, "max_seq_len": options.max_seq_len, "window": options.window,
            "step_rows": options.step_rows}
    results = [in_process({**case, "place": place}) for place in PLACES]
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), table, options.max_seq_len)
        size = (Path(folder) / "manifest.json").stat().st_size
        opened = in_process({"manifest": folder, "max_seq_len": options.max_seq_len})
    report(options, table, results, opened, size)


def report(options: argparse.Namespace, table: dict[str, Any], results: list[dict[str, float]],
           opened: dict[str, float], size: int) -> None:
    first = results[0]
    num_chunks = int(SimulatedSet(**table).samples.sum())
    print(f"{num_chunks:,} chunks in {options.shards:,} shards of {len(set(table['sources']))} sources, "
          f"{first['tokens'] / 1e12:.3f}T tokens with BOS and EOS, {first['rows']:,} rows of {options.max_seq_len:,} "
          f"({first['fill']:.2%} full); window {options.window}")
    print(f"{'step':>12} {'start s':>9} {'first row s':>12} {'first step s':>13} {'later us/row':>13} {'ahead ms':>9} "
          f"{'shards':>7} {'peak MB':>8}")
    for found in results:
        print(f"{found['step']:>12,.0f} {found['start']:>9.3f} {found['first']:>12.3f} {found['whole']:>13.3f} "
              f"{found['later'] * 1e6:>13.1f} {found['ahead'] * 1e3:>9.2f} {found['num_ahead']:>7.0f} "
              f"{found['peak'] / 1e6:>8.1f}")
    print(f"manifest of {size / 1e6:.1f} MB: opened in {opened['start']:.3f} s, peak {opened['peak'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
