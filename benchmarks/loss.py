"""The loss alone, projection onto the vocabulary included, forward and backward: ours, plain torch, Liger's kernel.

    python3 benchmarks/loss.py                  shapes of 17m mlm and 150m clm, on a GPU
    python3 benchmarks/loss.py --device cpu     to try the program

bf16 autocast over fp32 weights, as in training. Liger's (liger-kernel, extra `gpu`) takes the output bias, and is left
out where it is not installed or there is no GPU. Cut cross-entropy (cut-cross-entropy 25.1.1) takes no bias, so it
cannot train this model. Printed: milliseconds, peak memory beyond what was there, how far the gradients are from those
in fp32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from streams import machine, results_path  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

from ettin_foundry.model.loss import linear_cross_entropy  # noqa: E402

SHAPES = {"17m mlm": (19_660, 256, 50_368), "150m clm": (65_472, 768, 50_368)}  # of 65,536 tokens: targets, C, V
TINY = {"tiny": (70, 32, 300)}
Loss = Callable[..., Tensor]  # of hidden, weight, bias, labels: the sum


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def contenders(device: str) -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": lambda *given: linear_cross_entropy(*given)[0], "plain torch": plain}
    try:
        if device == "cuda":
            from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore
                LigerFusedLinearCrossEntropyFunction as Liger,
            )

            found["liger"] = lambda hidden, weight, bias, labels: Liger.apply(
                hidden, weight, labels, bias, None, -100, 0.0, 0.0, "sum")[0]
    except ImportError as error:
        print(f"liger is left out: {error}")
    return found


def measure(loss: Loss, tensors: list[Tensor], labels: Tensor, exact: list[Tensor], device: str,
            repeats: int) -> dict[str, Any]:
    """{ms, peak_gib, off}: the last is the distance of the gradients from `exact`, over its length."""
    def step() -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16):
            total = loss(*tensors, labels)
        return torch.autograd.grad(total, tensors)

    found = {"ms": float("nan"), "peak_gib": float("nan"),
             "off": max(float((a.float() - b).norm() / b.norm()) for a, b in zip(step(), exact))}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found["ms"] = Timer("step()", globals={"step": step}).timeit(repeats).median * 1e3
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    torch.manual_seed(0)
    results, lines = [], ["| shape | loss | ms | peak GiB | gradients off fp32's by |", "|---|---|---|---|---|"]
    for shape, (targets, hidden, vocabulary) in (SHAPES if args.device == "cuda" else TINY).items():
        sizes = ((targets, hidden), (vocabulary, hidden), (vocabulary,))
        tensors = [torch.randn(size, device=args.device) * 0.1 for size in sizes]
        labels = torch.randint(vocabulary, (targets,), device=args.device)
        tensors = [tensor.requires_grad_() for tensor in tensors]
        exact = list(torch.autograd.grad(linear_cross_entropy(*tensors, labels)[0], tensors))  # in fp32
        for name, loss in contenders(args.device).items():
            try:
                found = measure(loss, tensors, labels, exact, args.device, args.repeats)
            except Exception as error:  # out of memory, or another version of the library
                found = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            results.append({"shape": shape, "loss": name, **found})
            cells = found.get("error") or f"{found['ms']:.2f} | {found['peak_gib']:.2f} | {found['off']:.2%}"
            lines.append(f"| {shape} | {name} | {cells} |")
            print(lines[-1], flush=True)
    path, facts = results_path(f"loss-{args.device}", args.out), {"machine": machine(args.device), "results": results}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{machine(args.device)}\n\n" + "\n".join(lines) + "\n")
    print(f"written to {path.with_suffix('.md')} and .json")
    if "error" in results[0]:
        sys.exit("ours failed")


if __name__ == "__main__":
    main()
