"""Does training in bf16 follow training in fp32? Curves of nano on a CPU: seeds in fp32, some of them in bf16.

    make data/nano/train/manifest.json
    python benchmarks/bf16_curve.py --data data/nano

bf16 is autocast, as `precision: amp_bf16` has it: products in bf16; weights, gradients of weights, residual stream and
optimizer in fp32. All runs read the same rows in the same order; a seed draws the weights.
Printed: the mean loss of the last fifth of the steps of each run, and how many bf16 runs lie inside the spread of the
fp32 seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from streams import machine, results_path  # noqa: E402

from ettin_foundry.data.batch import Collator, split_batch  # noqa: E402
from ettin_foundry.data.stream import open_stream  # noqa: E402
from ettin_foundry.data.tokenizer import load  # noqa: E402
from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.model.transformer import Ettin, batch_loss  # noqa: E402
from ettin_foundry.objectives.targets import TextVocab  # noqa: E402
from ettin_foundry.training.optimizer import StableAdamW  # noqa: E402

T, WARMUP, PEAK_LR = 256, 50, 3e-3


def curve(objective: str, seed: int, bf16: bool, args: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    stream = open_stream(dataset={"local": str(args.data), "split": "train"}, max_seq_len=T,
                         global_batch_size=args.rows, packing=True)
    tokenizer = load(args.data / "tokenizer")
    collate = Collator(objective, TextVocab.from_tokenizer(tokenizer), max_seq_len=T, seed=21,
                       mask_rate=0.0 if objective == "clm" else 0.3)
    torch.manual_seed(seed)
    model = Ettin(EttinConfig.for_size("nano", causal=objective == "clm", vocab_size=len(tokenizer))).train()
    optimizer = StableAdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), eps=1e-6, weight_decay=3e-4)
    losses = []
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP)
        batch = split_batch(collate(stream.rows_of(step)), args.rows)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = batch_loss(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "nano")
    parser.add_argument("--objectives", nargs="+", default=["mlm", "clm"], choices=("mlm", "clm"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=4, help="of 256 tokens, a step")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bf16-seeds", type=int, default=2)
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    path, curves, lines = results_path("bf16-curve", args.out), {}, [str(machine("cpu")), ""]
    for objective in args.objectives:
        ends: dict[bool, list[float]] = {False: [], True: []}
        for seed in range(args.seeds):
            for bf16 in (False, True)[:1 + (seed < args.bf16_seeds)]:
                started = time.perf_counter()
                losses = curve(objective, seed, bf16, args)
                curves[f"{objective} {seed} {'bf16' if bf16 else 'fp32'}"] = losses
                last = losses[-(args.steps // 5):]
                ends[bf16].append(sum(last) / len(last))
                print(f"{objective} seed {seed} {'bf16' if bf16 else 'fp32'}: {losses[0]:.3f} to {ends[bf16][-1]:.4f} "
                      f"in {time.perf_counter() - started:.0f} s", flush=True)
        low, high = min(ends[False]), max(ends[False])
        lines += [f"{objective}, {args.steps} steps of {args.rows} x {T}: fp32 {low:.4f} to {high:.4f}; bf16 "
                  + ", ".join(f"{mine:.4f} ({mine - theirs:+.4f})" for mine, theirs in zip(ends[True], ends[False]))
                  + f"; inside the spread: {sum(low <= mine <= high for mine in ends[True])} of {len(ends[True])}"]
        path.with_suffix(".json").write_text(json.dumps({"machine": machine("cpu"), "curves": curves}) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[2:]))


if __name__ == "__main__":
    main()
