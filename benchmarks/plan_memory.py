"""Peak memory of a training step beside what `ettin plan` says: `python benchmarks/plan_memory.py`.

Each case runs in a process of its own, on the CPU in fp32 with one thread: the model, its optimizer, two steps of two
microbatches of synthetic documents, and nothing of the host. The peak is the kernel's (VmHWM) less what the process
held before the model was built (VmRSS after imports and a first small matrix product). glibc is told to give freed
blocks back at once (MALLOC_MMAP_THRESHOLD_), as the CUDA allocator hands them on at once; the last column is with its
default, which keeps many of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

CASES = (("17m", "mlm", 2048), ("17m", "mlm", 8192), ("17m", "clm", 2048), ("17m", "clm", 4096), ("32m", "mlm", 2048))
LENGTH, VOCAB_SIZE = 1024, 50368


def _status(name: str) -> int:
    """Bytes, of this process."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name + ":")).split()[1]) * 1024


def measure(size: str, objective: str, tokens: int) -> dict[str, Any]:
    """Two steps in this process: bytes of the peak, and the plan's."""
    import torch
    from streams import flat_stream, synthetic_documents

    from ettin_foundry.model.config import EttinConfig
    from ettin_foundry.model.transformer import Ettin
    from ettin_foundry.tools.plan import memory_bytes
    from ettin_foundry.training.optimizer import StableAdamW

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = EttinConfig.for_size(size, causal=objective == "clm", max_position_embeddings=LENGTH)
    batches = [flat_stream(synthetic_documents(tokens, LENGTH, VOCAB_SIZE, seed=seed), objective, VOCAB_SIZE - 1,
                           seed=seed) for seed in range(2)]
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # what the library allocates once
    before = _status("VmRSS")
    model = Ettin(config, "reference").train()
    optimizer = StableAdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-5)
    for _ in range(2):
        for b in batches:
            model(b["input_ids"], b["position_ids"], b["cu_seqlens"], b["max_seqlen"], b["target_positions"],
                  b["target_labels"]).nll.backward()
        optimizer.step()
        optimizer.zero_grad()
    targets = max(b["num_targets"] for b in batches)
    memory = memory_bytes(config, tokens, targets / tokens, half=False)
    return {"measured": _status("VmHWM") - before, "planned": sum(memory.values()), **memory, "targets": targets}


def run(case: tuple[str, str, int], *, give_back: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if give_back:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, "--case", *map(str, case)], env=environment, check=True,
                          capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="planned and measured peak memory", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, metavar=("SIZE", "OBJECTIVE", "TOKENS"), help="one case, in this process")
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], args.case[1], int(args.case[2]))))
        return
    from streams import machine, results_path

    results = []
    lines = ["| size | objective | tokens a microbatch | planned MB | measured MB | planned / measured | measured with "
             "glibc's default |", "|---|---|---|---|---|---|---|"]
    for case in CASES:
        result, default = run(case, give_back=True), run(case, give_back=False)
        results.append({"case": case, **result, "measured_default": default["measured"]})
        planned, measured = result["planned"] / 1e6, result["measured"] / 1e6
        lines.append(f"| {case[0]} | {case[1]} | {case[2]:,} | {planned:,.0f} | {measured:,.0f} | "
                     f"{planned / measured:.3f} | {default['measured'] / 1e6:,.0f} |")
        print(lines[-1], flush=True)
    facts = {**machine("cpu"), "threads": 1}
    path = results_path("plan-memory", args.out)
    path.with_suffix(".json").write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"`python benchmarks/plan_memory.py`, {facts}\n\n" + "\n".join(lines) + "\n")
    print(f"written to {path.with_suffix('.md')} and .json")


if __name__ == "__main__":
    main()
