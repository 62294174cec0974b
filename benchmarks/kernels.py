"""The Triton kernels alone: milliseconds and GB/s by counted bytes, beside what the compiler makes of the definitions.

    python3 benchmarks/kernels.py                     shapes of 150m, 65,536 tokens, on a GPU
    python3 benchmarks/kernels.py --device cpu        every line at a tiny size, in Triton's interpreter

Bytes are what kernels read and write if no cache helps, counted from the code that the compiler writes and from ours;
an element is one of (N, I), a logit, or one of q. GELU x gate moves the same bytes either way, but the compiler takes
182 instructions an element, for it computes both halves of the gradient everywhere, and the kernel 55 (sm_90). What the
compiler does as well is not in Triton: the forward pass of GELU x gate, and rotary, listed to see how near to its bytes
it comes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
if "cpu" in sys.argv[1:]:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
from streams import machine, results_path  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402

from ettin_foundry.model import kernels  # noqa: E402
from ettin_foundry.model.transformer import _rotate, rotary  # noqa: E402

Case = tuple[str, int, float, float, Callable[[], Any], Callable[[], Any]]  # name, elements, bytes of each, steps


def milliseconds(args: argparse.Namespace, step: Callable[[], Any]) -> float:
    """Median of one call on the device; none on a CPU, where the interpreter's time says nothing."""
    if args.device == "cpu":
        return float("nan")
    return Timer("step()", globals={"step": step}).timeit(args.repeats).median * 1e3


def few_passes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss in the form that compiles to the least traffic: one kernel, three times over a row."""
    scores = logits.float()
    log_total = torch.logsumexp(scores, -1, keepdim=True)
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    losses = log_total - scores.gather(-1, labels[:, None])
    return losses[:, 0], ((scores - log_total).exp() - is_label.float()).to(logits.dtype)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device == "cuda"
    tensor = functools.partial(torch.randn, device=args.device, dtype=torch.bfloat16)
    compiled = functools.partial(torch.compile, dynamic=False) if gpu else lambda function: function
    back = functools.partial(torch.autograd.grad, retain_graph=True)

    rows, width = (65_536, 1152) if gpu else (5, 65)
    x, grad, functions = tensor(rows, 2 * width, requires_grad=True), tensor(rows, width), []
    for switch in (False, True):
        kernels.ENABLED = switch  # read while the function is traced
        functions.append(functools.partial(back, compiled(lambda x: kernels.gelu_gate(x))(x), x, grad))
    yield "gelu x gate, backward", rows * width, 10, 10, *functions

    rows, width = (10_240, 50_368) if gpu else (66, 2100)
    logits, labels, function = tensor(rows, width), torch.arange(rows, device=args.device), compiled(few_passes)
    place = logits.clone()  # after the first call it holds gradients

    def definition() -> tuple[Tensor, ...]:
        losses, gradient = function(logits, labels)
        return losses, gradient, gradient.sum(0, dtype=torch.float32)

    yield ("loss, gradient, bias", rows * width, 6 + 2 + 2, 2 + 2 + 2 + 8 / 64, definition,
           lambda: kernels.losses_and_gradient(place, labels, None))

    rows, heads = (65_536, 12) if gpu else (7, 2)
    qkv, (cos, sin) = tensor(rows, 3 * heads, 64, requires_grad=True), rotary(labels.new_ones(rows), 1e4, 64)

    def rotated(qkv: Tensor) -> tuple[Tensor, ...]:
        qk, v = qkv.split((2 * heads, heads), dim=1)
        return *_rotate(qk, cos, sin).chunk(2, dim=1), v

    forward = functools.partial(compiled(rotated), qkv)
    backward = functools.partial(back, forward(), qkv, [tensor(rows, heads, 64) for _ in range(3)])
    yield "rotary, forward", rows * heads * 64, 8, 8, forward, forward
    yield "rotary, backward", rows * heads * 64, 12, 12, backward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    kernels.load()
    if args.device == "cpu":
        kernels.fused = lambda x: kernels._module if kernels.ENABLED else None
    torch._functorch.config.donated_buffer = False  # a backward is run again and again
    torch.manual_seed(0)
    results, lines = [], ["| pass | elements | bytes each, before | after | ms before | after | GB/s before | after | "
                          "difference |", "|---|---|---|---|---|---|---|---|---|"]
    for name, count, *counted, before, after in cases(args):
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (before(), after())))
        apart = max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
        ms = [milliseconds(args, step) for step in (before, after)]
        cells = [f"{x:.1f}" for x in counted] + [f"{x:.3f}" for x in ms]
        cells += [f"{each * count / x / 1e6:.0f}" for each, x in zip(counted, ms)]
        lines.append(f"| {name} | {count:,} | {' | '.join(cells)} | {apart:.1e} |")
        results.append({"pass": name, "elements": count, "bytes": counted, "ms": ms, "difference": apart})
    path, text = results_path(f"kernels-{args.device}", args.out), "\n".join(lines)
    facts = {"machine": machine(args.device), "arguments": vars(args), "results": results}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"{machine(args.device)}\n\n{text}\n")
    print(f"{text}\nwritten to {path.with_suffix('.md')} and .json")
    if not kernels._module or any(r["difference"] > 0.02 for r in results):  # bf16 rounds once or twice, 0.4% each
        sys.exit("the kernels cannot be imported, or their results are not those of the definitions")


if __name__ == "__main__":
    main()
