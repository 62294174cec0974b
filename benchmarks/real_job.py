"""Tokens per second of the real job on one GPU: `train.py` with each size's recipe, beside the original's figure.

    python benchmarks/real_job.py                                    every size and objective, within --budget-seconds
    python benchmarks/real_job.py --device cpu --sizes nano --steps 2      to try the program

Each case is a process of its own: LLM-Foundry, Composer's Trainer, loader workers, callbacks, all as the recipe has
them; only evaluation and saving are left out, and a step has 352 rows (an eighth of the recipe's batch, as on each of
8 GPUs; 176 at 1b). The process is forked from this one, which has imported train.py, so that imports are paid once;
where that would break CUDA, `train.py` is started instead. The figure is the median over the steps after the first few,
from the run's own steps.jsonl; seconds until the second step are told beside it. The most wanted cases come first, and
results are written after each. The data is the standard library's source, converted once into --data.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
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
GOALS = {"mlm": {"17m": 3.5, "32m": 3.0, "68m": 2.3, "150m": 1.8, "400m": 1.6, "1b": 1.4},
         "clm": {"17m": 2.2, "32m": 2.0, "68m": 1.8, "150m": 1.6, "400m": 1.5, "1b": 1.4}}
"""Factors over the original that are wanted."""
WANTED = ["17m mlm", "150m clm", "150m mlm", "17m clm", "1b clm", "400m mlm", "68m mlm", "32m mlm", "400m clm",
          "68m clm", "1b mlm", "32m clm", "nano mlm", "nano clm"]
SHORTEST_SECONDS = 20
STEPS = {"1b": (176, 6, 2), "400m": (352, 7, 3), "150m": (352, 9, 3)}  # rows of a step, steps, steps not timed
USUAL = (352, 20, 5)


def where(device: str) -> dict[str, Any]:
    """`machine`, without opening CUDA in this process."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return {**machine("cpu"), "device": device}
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {**machine("cpu"), "device": device, "gpu": answer}


def convert(data: Path) -> None:
    if not (data / "train" / "manifest.json").exists():
        subprocess.run([sys.executable, str(ROOT / "data_prep" / "convert.py"), "python-stdlib", "--out", str(data),
                        "--train-tokenizer", "32768", "--chunk-length", "1022", "--validation", "0.01"], check=True)


def train(argv: list[str], log: Path) -> None:
    """train.py in a process forked from this one; ends it with train.py's status, 99 where CUDA cannot be used."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    sys.exit(99 if torch.cuda._is_in_bad_fork() else importlib.import_module("train").main(argv))


def finished(argv: list[str], log: Path, args: argparse.Namespace, seconds: float) -> int | None:
    """Status of train.py; None if it was stopped after so many seconds."""
    if args.fork:
        process = multiprocessing.get_context("fork").Process(target=train, args=(argv, log))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        if process.exitcode != 99:
            return process.exitcode
        args.fork = False
        print("a forked process cannot use CUDA here; each case starts train.py, which takes longer", flush=True)
    with log.open("w") as stream:
        try:
            return subprocess.run([sys.executable, str(ROOT / "train.py"), *argv], cwd=ROOT, stdout=stream,
                                  stderr=subprocess.STDOUT, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return None


def run(size: str, objective: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One run of the recipe; {tokens_per_second, until_second_step, ...} or {error}."""
    recipe = [f"yamls/ettin-{'dec' if objective == 'clm' else 'enc'}-{size}.yaml"]
    if size == "nano":
        recipe = ["yamls/nano.yaml", *(["yamls/options/decoder.yaml"] if objective == "clm" else [])]
    rows, number, untimed = STEPS.get(size, USUAL)
    if args.steps:
        number, untimed = args.steps, min(untimed, args.steps - 2)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"variables.data={args.data.resolve()}", f"max_duration={number}ba", "eval_loader=null",
                     "save_folder=null", "save_interval=null", "save_overwrite=null", "autoresume=null",
                     f"callbacks.ettin_steps.folder={folder}", f"model.compile={args.compile}"]
        if size != "nano":
            overrides.append(f"global_train_batch_size={rows}")
        begun, log = time.time(), Path(folder, "log")
        status, path = finished([*recipe, *overrides], log, args, seconds), Path(folder, "steps.jsonl")
        steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        found: dict[str, Any] = {"steps": len(steps), "seconds": time.time() - begun}
        if len(steps) > untimed + 1:  # also of a run that was stopped
            tokens = [after["tokens"] - before["tokens"] for before, after in zip(steps, steps[1:])]
            speeds = [spent / step["seconds"] for spent, step in zip(tokens, steps)]
            found |= {"tokens_per_second": statistics.median(speeds[untimed:]), "first_loss": steps[0]["loss"],
                      "last_loss": steps[-1]["loss"],
                      "until_second_step": found["seconds"] - sum(step["seconds"] for step in steps[1:])}
        if status != 0:
            said = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            found |= {"error": f"stopped after {seconds:.0f} s" if status is None else said[-1][:300],
                      "output": said[-60:]}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "real-job")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", nargs="+", default=list(ANCHORS), choices=(*ANCHORS, "nano"))
    parser.add_argument("--objectives", nargs="+", default=["mlm", "clm"], choices=("mlm", "clm"))
    parser.add_argument("--compile", default="auto", choices=("auto", "none", "blocks"), help="model.compile")
    parser.add_argument("--steps", type=int, help="instead of the numbers by size")
    parser.add_argument("--fork", action=argparse.BooleanOptionalAction, default=True, help="import once, then fork")
    parser.add_argument("--case-seconds", type=float, default=100, help="a case is stopped after this")
    parser.add_argument("--budget-seconds", type=float, default=240, help="in all; what is running then is stopped")
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    started, results = time.perf_counter(), []
    path = results_path(f"real-job-{args.device}", args.out)
    convert(args.data)
    os.chdir(ROOT)  # recipes are named from here
    if args.fork:
        # torch asks the driver how many GPUs there are without opening CUDA, which no forked process could open again
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        for name in ("train", "llmfoundry.command_utils", "composer.trainer"):
            importlib.import_module(name)
        print(f"{time.perf_counter() - started:5.0f} s  data is there, imports are done", flush=True)
    left_out = []
    for case in (case.split() for case in WANTED):
        size, objective = case
        if size not in args.sizes or objective not in args.objectives:
            continue
        left = args.budget_seconds - (time.perf_counter() - started)
        if left < SHORTEST_SECONDS:
            left_out.append(f"{size} {objective}")
            continue
        found = run(size, objective, args, min(left, args.case_seconds))
        results.append({"size": size, "objective": objective, **found})
        args.fork = args.fork and bool(found["steps"])  # a run that took no step may have failed by being forked
        speed = found.get("tokens_per_second")
        beside = (f", {speed / ANCHORS[size]:.2f}x the original on an H100 (goal {GOALS[objective][size]:g}x)"
                  if speed and size in ANCHORS else "")
        said = f"{speed:,.0f} tokens/s{beside}; {found['until_second_step']:.0f} s to the second step" if speed else ""
        said += f" failed: {found['error']}" if "error" in found else ""
        print(f"{time.perf_counter() - started:5.0f} s  {size} {objective}: {said}", flush=True)
        facts = {"machine": where(args.device), "arguments": {k: str(v) for k, v in vars(args).items()},
                 "left_out": left_out, "results": results}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")  # kept if a later case is killed
    if left_out:
        print(f"left out, the budget of {args.budget_seconds:.0f} s was spent: {', '.join(left_out)}")
    print(f"written to {path.with_suffix('.json')}")
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
