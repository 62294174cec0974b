"""One optimizer step on a CPU: ours beside torch-optimi's StableAdamW and torch's AdamW, on a size's parameters.

    python benchmarks/optimizer.py [--sizes 17m 150m] [--rounds 15] [--threads 1]

Random gradients, one step of each in turn, medians; CPU time of all threads is less disturbed by other programs. Then a
step on meta tensors, which have shapes and no values, so that reading one back into Python fails: whether it does, and
the operators that PyTorch dispatches where it does not, which are those on a GPU. Of these, a `_foreach` whose lists
differ in shape (each tensor with a factor of its own) is run by CUDA tensor by tensor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import optimi  # noqa: E402
import torch  # noqa: E402
from streams import machine, results_path  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.model.transformer import Ettin  # noqa: E402
from ettin_foundry.training.optimizer import StableAdamW  # noqa: E402

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 1e-5}
KINDS = {
    "ours": lambda params: StableAdamW(params, **SETTINGS),
    "optimi StableAdamW, foreach": lambda params: optimi.StableAdamW(params, **SETTINGS, decouple_lr=True,
                                                                     foreach=True, triton=False),
    "torch AdamW, foreach": lambda params: torch.optim.AdamW(params, **SETTINGS, foreach=True),
}


class Calls(TorchDispatchMode):
    """Counts the operators that are called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = self.by_tensor = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = {str([t.shape for t in arg]) for arg in args if isinstance(arg, (list, tuple)) and arg
                  and all(torch.is_tensor(t) for t in arg)}
        self.number += 1
        self.by_tensor += len(shapes) > 1
        return func(*args, **(kwargs or {}))


def parameters(size: str, device: str) -> list[torch.nn.Parameter]:
    with torch.device("meta"):
        shapes = [p.shape for p in Ettin(EttinConfig.for_size(size, causal=False)).parameters()]
    made = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def without_values(kind: str, size: str) -> str:
    """A step on meta tensors, of a table: operators called, those that go tensor by tensor, whether values are read."""
    optimizer = KINDS[kind](parameters(size, "meta"))
    try:
        optimizer.step()  # makes the moments
        with Calls() as calls:
            optimizer.step()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return "| | read"
    return f"{calls.number} | {calls.by_tensor} | not read"


def measure(size: str, rounds: int) -> list[str]:
    optimizers = {name: make(parameters(size, "cpu")) for name, make in KINDS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for number in range(rounds + 1):
        for name, optimizer in optimizers.items():
            begun = time.process_time(), time.perf_counter()
            optimizer.step()
            if number:  # the first makes the moments
                seconds[name].append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
    lines = []
    for name, optimizer in optimizers.items():
        (cpu, wall), (of_ours, _) = ([1e3 * statistics.median(column) for column in zip(*seconds[kind])]
                                     for kind in (name, "ours"))
        number = sum(len(group["params"]) for group in optimizer.param_groups)
        lines.append(f"| {size} | {number} | {name} | {cpu:.1f} | {cpu / of_ours:.2f} | {wall:.1f} | "
                     f"{without_values(name, size)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["17m", "150m"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="folder for the result; benchmarks/results without it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["| size | tensors | optimizer | CPU ms a step | of ours | ms, wall | operators | by tensor | values |",
             "|---|---|---|---|---|---|---|---|---|"]
    for size in args.sizes:
        lines += measure(size, args.rounds)
    path = results_path("optimizer", args.out).with_suffix(".md")
    text = f"`python {' '.join(sys.argv)}` on {machine('cpu')}, load {os.getloadavg()[0]:.1f}\n\n" + "\n".join(lines)
    path.write_text(f"{text}\n")
    print(f"{text}\nwritten to {path}")


if __name__ == "__main__":
    main()
