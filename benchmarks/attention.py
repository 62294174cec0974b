"""Attention alone: milliseconds by backend, kind of layer and row length, and what `auto` takes by such figures.

    python3 benchmarks/attention.py                   150m and 17m, rows of 1,024 and 8,192, on a GPU
    python3 benchmarks/attention.py --device cpu      every line at a tiny size, to try the program

Documents are those of `streams.py`, in one stream of `--tokens`. flex_attention is compiled, as it is in blocks; its
list of blocks is made once a forward for all layers of a kind, and its time stands in a column of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from streams import document_lengths, machine, results_path  # noqa: E402

from ettin_foundry.model.attention import Documents, attention, block_mask  # noqa: E402
from ettin_foundry.model.backends import candidates, fastest  # noqa: E402
from ettin_foundry.model.config import EttinConfig  # noqa: E402

CPU_NAMES = ["reference", "flex_attention"]

def seconds(args: argparse.Namespace, step: Any) -> float:
    found = []  # of one call, with what it queues on the device
    for _ in range(args.warmup + args.repeats):
        getattr(torch, args.device).synchronize()
        begin = time.perf_counter()
        step()
        getattr(torch, args.device).synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[args.warmup:])


def measure(args: argparse.Namespace, name: str, config: EttinConfig, window: tuple[int, int]) -> dict[str, float]:
    """{forward, backward, mask} in ms."""
    torch._dynamo.reset()  # or windows measured before count against its limit of recompilations
    lengths = document_lengths(args.tokens, config.max_position_embeddings, seed=args.seed)
    places = torch.cat([torch.arange(n) for n in lengths]).to(args.device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(args.device)
    documents = Documents(cu_seqlens, config.max_position_embeddings, places)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    shape = (args.tokens, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    q, k, v, weight = (torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for _ in range(4))
    function: Any = attention
    if name == "flex_attention":
        documents.cached(block_mask, window)
        function = torch.compile(attention, dynamic=False, backend="inductor" if args.device == "cuda" else "aot_eager")

    def forward() -> torch.Tensor:
        return function(q, k, v, documents, window, name)

    both = seconds(args, lambda: torch.autograd.grad(forward(), (q, k, v), weight))
    alone = seconds(args, forward)
    mask = seconds(args, lambda: block_mask(documents, window)) if name == "flex_attention" else 0.0
    return {"forward": alone * 1e3, "backward": (both - alone) * 1e3, "mask": mask * 1e3}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    for name, number in (("--tokens", 65_536), ("--repeats", 10), ("--warmup", 3), ("--seed", 21)):
        parser.add_argument(name, type=int, default=number)
    parser.add_argument("--budget-seconds", type=float, default=90, help="no case is started after this")
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    args.sizes, args.lengths = ["150m", "17m"], [1024, 8192]
    if args.device == "cpu":
        args.sizes, args.lengths, args.tokens, args.repeats, args.warmup = ["nano"], [128, 256], 512, 2, 1
    elif not torch.cuda.is_available():
        parser.error("--device: cuda given (the default), but this machine has no CUDA device; --device cpu tries it")
    return args


def kinds(args: argparse.Namespace, names: list[str], size: str, causal: bool, length: int) -> list[dict[str, Any]]:
    """One record a backend and kind of layer, and one of what is taken."""
    config = EttinConfig.for_size(size, causal=causal, max_position_embeddings=length)
    common, records = {"size": size, "length": length, "causal": causal}, []

    def measured(name: str, is_global: bool) -> float:
        found = measure(args, name, config, config.windows[is_global])
        records.append({**common, "layers": "global" if is_global else "local", "backend": name, **found})
        return found["forward"] + found["backward"]

    taken, why = fastest(names, measured)
    return [*records, {**common, "layers": "both", "backend": f"taken: {taken[True]}, {taken[False]}", "why": why}]


def main() -> None:
    args = parse()
    started, results, left_out = time.perf_counter(), [], []
    path = results_path(f"attention-{args.device}", args.out)
    names = candidates("auto", "cuda", torch.bfloat16, True)[0] if args.device == "cuda" else CPU_NAMES
    lines = ["| size | causal | rows | layers | backend | forward ms | backward ms | list of blocks ms |",
             "|---|---|---|---|---|---|---|---|"]
    for case in [(size, causal, n) for n in args.lengths for size in args.sizes for causal in (False, True)]:
        if time.perf_counter() - started > args.budget_seconds:
            left_out.append(case)
            continue
        for record in kinds(args, names, *case):
            results.append(record)
            times = [f"{record[key]:.3f}" if key in record else "" for key in ("forward", "backward", "mask")]
            lines.append("| " + " | ".join([*map(str, case), record["layers"], record["backend"], *times]) + " |")
            print(lines[-1], record.get("why", ""), flush=True)
        facts = {"machine": machine(args.device), "arguments": vars(args), "left_out": left_out, "results": results}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")  # kept if a later case is killed
        path.with_suffix(".md").write_text(f"{machine(args.device)}\n\n" + "\n".join(lines) + "\n")
    print(f"left out, the budget was spent: {left_out}\nwritten to {path.with_suffix('.md')} and .json")


if __name__ == "__main__":
    main()
