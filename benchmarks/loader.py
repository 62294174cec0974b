"""Speed of one worker of the `ettin_text` loader, run in the main process: rows, masks, flat microbatches.

    python benchmarks/loader.py runs/demo/data                      this tree
    python benchmarks/loader.py runs/demo/data . ../other-tree      several trees in turn, and the ratio to the first

    python benchmarks/loader.py runs/demo/data --streaming          beside Streaming and transformers' collator

A round is 25 batches of 32 rows of 1,024, each split into microbatches of 8 rows. Each tree has a process of its own,
and the trees take turns round by round, so that other load on the machine meets all of them alike. Prints medians.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OBJECTIVES = {"mlm": 0.3, "clm": 0.0}  # with their mask rates
BATCHES, ROWS, MICROBATCH, MAX_SEQ_LEN = 25, 32, 8, 1024


def serve(dataset: str) -> None:
    """For each objective read from stdin, one round: prints tokens, CPU seconds and wall seconds."""
    import torch

    from ettin_foundry.data.loader import build_ettin_loader
    from ettin_foundry.data.tokenizer import load

    torch.set_num_threads(1)
    taken = inspect.signature(build_ettin_loader).parameters  # of an older tree, the main process splits batches
    as_in_a_run = {"microbatch_size": MICROBATCH, "fixed_shapes": True} if "microbatch_size" in taken else {}
    specs = {objective: build_ettin_loader(
        load(Path(dataset, "tokenizer")), ROWS, dataset={"local": dataset, "split": "train"}, objective=objective,
        mask_rate=rate, max_seq_len=MAX_SEQ_LEN, pin_memory=False, **as_in_a_run)
        for objective, rate in OBJECTIVES.items()}
    streams = {objective: iter(spec.dataloader) for objective, spec in specs.items()}
    for stream in streams.values():
        next(stream)  # opens the first shards
    print("ready", flush=True)
    for line in sys.stdin:
        spec, stream, tokens = specs[line.strip()], streams[line.strip()], 0
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(BATCHES):
            batch = next(stream)
            spec.split_batch(batch, MICROBATCH)
            tokens += spec.get_num_tokens_in_batch(batch)
        print(tokens, time.process_time() - cpu, time.perf_counter() - wall, flush=True)


def streaming(dataset: str, rounds: int) -> None:
    """Prints the same for StreamingDataset, one chunk a row, with transformers' collator, mlm; real tokens counted."""
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    from ettin_foundry.data.tokenizer import load

    torch.set_num_threads(1)
    tokenizer: Any = load(Path(dataset, "tokenizer"))
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=OBJECTIVES["mlm"])

    def rows(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate([{"input_ids": [tokenizer.cls_token_id, *sample["tokens"].tolist(), tokenizer.sep_token_id]}
                        for sample in samples])

    data = StreamingDataset(local=str(Path(dataset, "train")), batch_size=ROWS, shuffle=True, shuffle_seed=21)
    speeds, batches = [], iter(())
    for _ in range(rounds):
        tokens, cpu = 0, time.process_time()
        for _ in range(BATCHES):
            batch = next(batches, None)
            if batch is None:
                batches = iter(DataLoader(data, batch_size=ROWS, collate_fn=rows))
                batch = next(batches)
            tokens += int(batch["attention_mask"].sum())
        speeds.append(tokens / (time.process_time() - cpu))
    print(f"mlm  Streaming and transformers: {statistics.median(speeds) / 1e6:.2f}M tokens a CPU second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a converted dataset with chunks of at most 1,022 tokens")
    parser.add_argument("trees", nargs="*", default=["."], help="checkouts to compare")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--streaming", action="store_true", help="also Streaming's dataset with transformers' collator")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.dataset)
        return
    children = []
    for tree in options.trees:
        env = {**os.environ, "PYTHONPATH": str(Path(tree).resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", __file__, options.dataset, "--child"]
        children.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for objective in OBJECTIVES:
        speeds: list[list[tuple[float, float]]] = [[] for _ in children]
        for _ in range(options.rounds):
            for child, speed in zip(children, speeds):
                print(objective, file=child.stdin, flush=True)
                tokens, cpu, wall = map(float, child.stdout.readline().split())
                speed.append((tokens / cpu, tokens / wall))
        medians = [[statistics.median(column) for column in zip(*speed)] for speed in speeds]
        for tree, (cpu, wall) in zip(options.trees, medians):
            print(f"{objective}  {tree}: {cpu / 1e6:.2f}M tokens a CPU second, {wall / 1e6:.2f}M a second; "
                  f"{cpu / medians[0][0]:.2f} and {wall / medians[0][1]:.2f} of the first")
    for child in children:
        child.stdin.close()
        child.wait()
    if options.streaming:
        streaming(options.dataset, options.rounds)


if __name__ == "__main__":
    main()
