"""Tokens per second of the real job on one GPU: `train.py` with each size's recipe, beside the original's figure.

    python benchmarks/real_job.py                                    every size and objective, within --budget-seconds
    python benchmarks/real_job.py --device cpu --sizes nano --steps 2      to try the program

Each case is a process of its own: LLM-Foundry, Composer's Trainer, loader workers, callbacks, all as the recipe has
them; only evaluation and saving are left out, and a step has 352 rows (an eighth of the recipe's batch, as on each of
8 GPUs). The figure is the median over the steps after the first four, from the run's own steps.jsonl; seconds until
the first step are told beside it. The most wanted cases come first, and results are written after each. The data is
the standard library's source, converted once into --data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from streams import machine, results_path  # noqa: E402

ANCHORS = {"17m": 985e3, "32m": 655e3, "68m": 463e3, "150m": 296e3, "400m": 146e3, "1b": 64e3}
"""The original's tokens/s per H100, from its published GPU hours."""
WANTED = ["17m mlm", "150m clm", "150m mlm", "17m clm", "1b clm", "68m mlm", "400m mlm", "32m mlm", "400m clm",
          "68m clm", "1b mlm", "32m clm", "nano mlm", "nano clm"]
ROWS, UNTIMED = 352, 4


def convert(data: Path) -> None:
    if not (data / "train" / "manifest.json").exists():
        subprocess.run([sys.executable, str(ROOT / "data_prep" / "convert.py"), "python-stdlib", "--out", str(data),
                        "--train-tokenizer", "32768", "--chunk-length", "1022", "--validation", "0.01"], check=True)


def run(size: str, objective: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run of the recipe; {tokens_per_second, until_first_step, setting} or {error}."""
    recipe = [f"yamls/ettin-{'dec' if objective == 'clm' else 'enc'}-{size}.yaml"]
    if size == "nano":
        recipe = ["yamls/nano.yaml", *(["yamls/options/decoder.yaml"] if objective == "clm" else [])]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"variables.data={args.data.resolve()}", f"max_duration={args.steps}ba", "eval_loader=null",
                     "save_folder=null", "save_interval=null", "save_overwrite=null", "autoresume=null",
                     f"callbacks.ettin_steps.folder={folder}", "progress_bar=false", f"model.compile={args.compile}"]
        if size != "nano":
            overrides.append(f"global_train_batch_size={ROWS}")
        begun = time.time()
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *recipe, *overrides], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=args.case_seconds)
        path = Path(folder, "steps.jsonl")
        steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if done.returncode or len(steps) < args.steps:
            said = done.stdout.strip().splitlines() or ["no output"]
            return {"error": said[-1][:300], "output": said[-60:]}
        tokens = [after["tokens"] - before["tokens"] for before, after in zip(steps, steps[1:])]
        speeds = [number / step["seconds"] for number, step in zip(tokens, steps)][min(UNTIMED, args.steps - 2):]
        return {"tokens_per_second": statistics.median(speeds), "first_loss": steps[0]["loss"],
                "last_loss": steps[-1]["loss"], "seconds": time.time() - begun,
                "until_second_step": time.time() - begun - sum(step["seconds"] for step in steps[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "real-job")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", nargs="+", default=list(ANCHORS), choices=(*ANCHORS, "nano"))
    parser.add_argument("--objectives", nargs="+", default=["mlm", "clm"], choices=("mlm", "clm"))
    parser.add_argument("--compile", default="auto", choices=("auto", "none", "blocks"), help="model.compile")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--case-seconds", type=float, default=150, help="a case is stopped after this")
    parser.add_argument("--budget-seconds", type=float, default=240, help="no case is started after this")
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    started, results = time.perf_counter(), []
    path = results_path(f"real-job-{args.device}", args.out)
    convert(args.data)
    left_out = []
    for case in (case.split() for case in WANTED):
        size, objective = case
        if size not in args.sizes or objective not in args.objectives:
            continue
        if time.perf_counter() - started > args.budget_seconds:
            left_out.append(f"{size} {objective}")
            continue
        try:
            found = run(size, objective, args)
        except subprocess.TimeoutExpired:
            found = {"error": f"not done after {args.case_seconds:.0f} s"}
        results.append({"size": size, "objective": objective, **found})
        speed = found.get("tokens_per_second")
        beside = f", {speed / ANCHORS[size]:.2f} of the original's on an H100" if speed and size in ANCHORS else ""
        said = f"{speed:,.0f} tokens/s{beside}; {found['until_second_step']:.0f} s to the second step" if speed else (
            f"failed: {found['error']}")
        print(f"{time.perf_counter() - started:5.0f} s  {size} {objective}: {said}", flush=True)
        facts = {"machine": machine(args.device), "arguments": {k: str(v) for k, v in vars(args).items()},
                 "left_out": left_out, "results": results}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")  # kept if a later case is killed
    if left_out:
        print(f"left out, the budget of {args.budget_seconds:.0f} s was spent: {', '.join(left_out)}")
    print(f"written to {path.with_suffix('.json')}")
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
