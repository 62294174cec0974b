"""Encoders by masks, batched, beside one row at a time: `python benchmarks/pseudo_likelihood.py ENCODER --data DIR`.

In the environment of `make eval-env`. The same requests of lm-evaluation-harness's tasks go through `ettin_eval`'s
model class and through a plain loop that runs each masked row alone, whole model and all logits. Rows asked and rows
run differ by the equal rows that choices of an item share. Seconds are the process's own on a CPU, else the wall's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from ettin_eval.generative import HARNESS, _yamls
from ettin_eval.harness import harness_task
from ettin_eval.pseudo_likelihood import PROTOCOLS, MaskedLikelihood
from ettin_eval.subject import read_subject


def requests_of(name: str, data: Path, items: int) -> list[Any]:
    """The harness's requests of the first items."""
    task = harness_task(_yamls(name)[0], data)
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=items)
    return task.instances


@torch.inference_mode()
def one_by_one(model: MaskedLikelihood, requests: list[Any]) -> tuple[list[float], int]:
    """The sums, and the number of rows."""
    totals, rows = [], 0
    for request in requests:
        context, continuation = model._encode_pair(*request.args)
        total = 0.0
        for place, token in enumerate(continuation):
            ids, at = model.row([*context, *continuation], len(context) + place)
            logits = model.model(input_ids=torch.tensor([ids], device=model.model.device)).logits[0, at]
            total += logits.float().log_softmax(-1)[token].item()
            rows += 1
        totals.append(total)
    return totals, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="as ettin-eval's")
    parser.add_argument("--tasks", default="arc_easy,piqa", help=f"of {', '.join(HARNESS)}")
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    subject = read_subject(options.model)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    print("| task | protocol | rows asked | rows run | one by one, s | batched, s | factor | largest difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.tasks.split(","):
        requests = requests_of(name, options.data, options.items)
        for protocol in PROTOCOLS:
            model, ran = MaskedLikelihood(subject, protocol=protocol, device=options.device), 0
            logits = model.logits

            def counted(batch: Any, logits: Any = logits) -> torch.Tensor:
                nonlocal ran
                ran += len(batch)
                return logits(batch)

            model.logits = counted
            model.loglikelihood(requests[:4])  # warm
            ran, started = 0, clock()
            found = model.loglikelihood(requests)
            batched = clock() - started
            started = clock()
            expected, asked = one_by_one(model, requests)
            alone = clock() - started
            apart = max(abs(value - other) for (value, _), other in zip(found, expected, strict=True))
            print(f"| {name} | {protocol} | {asked:,} | {ran:,} | {alone:.1f} | {batched:.1f} | "
                  f"{alone / batched:.1f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
