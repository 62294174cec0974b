"""Training speed on a CPU: our model beside transformers' ModernBERT of the same shape, on the same documents, in one
run.

    python benchmarks/cpu_vs_transformers.py [--sizes 17m nano] [--tokens 4096] [--rounds 7] [--data DIR]
        [--decoder-path DIR]   a folder with transformers >= 4.54 (pip install --target), for the causal twin
        [--compare REVISION]   or a folder: ours of another tree too, by its own copy of this program

A step is forward, backward and AdamW in fp32 with 2 threads. Each contender lives in its own process; one step of
each in turn, so that a disturbance of the machine meets all of them; reported are medians and ratios of medians. The
ratio in CPU time (work of all threads) is less disturbed by other programs; where the two differ, trust neither.
Contenders:
  ours            documents packed into rows, one flat stream, head and vocabulary at targets only
  hf default      ModernBertForMaskedLM as it comes (sdpa), documents padded to the longest, head at every position
  hf sparse       the same with sparse_prediction=True: head at targets only
  hf alone        sparse, and one document per forward, so that nothing is padded: its best where rows are long
  hf decoder      ModernBertDecoderForCausalLM (sdpa), padded; `alone` as above
All see the same documents and the same targets; tokens per second count real tokens, never padding.
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

VOCAB_SIZE = 50368
CONTENDERS = {"mlm": ("ours", "hf default", "hf sparse", "hf alone"), "clm": ("ours", "hf decoder", "hf alone")}
GOALS = {("mlm", "hf default"): 3.0, ("mlm", "hf sparse"): 1.3, ("mlm", "hf alone"): 1.3,
         ("clm", "hf decoder"): 1.3, ("clm", "hf alone"): 1.3}


def documents_of(args: argparse.Namespace) -> list[Any]:
    from streams import stored_documents, synthetic_documents

    if args.data:
        return stored_documents(args.data, args.tokens, args.row_length)
    return synthetic_documents(args.tokens, args.row_length, VOCAB_SIZE, seed=args.seed)


def our_step(args: argparse.Namespace, objective: str) -> Any:
    """A model, and a function without arguments that makes one loss."""
    import torch
    from streams import flat_stream

    from ettin_foundry.model.config import EttinConfig
    from ettin_foundry.model.transformer import Ettin

    torch.manual_seed(args.seed)
    config = EttinConfig.for_size(args.size, causal=objective == "clm", max_position_embeddings=args.row_length,
                                  vocab_size=VOCAB_SIZE)
    model = Ettin(config).train()
    s = flat_stream(documents_of(args), objective, VOCAB_SIZE - 1, seed=args.seed)
    inputs = [s[k] for k in ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "target_positions",
                             "target_labels")]

    def losses():
        yield model(*inputs).nll / s["num_targets"]

    return model, losses


def hf_model(size: str, objective: str, row_length: int, *, sparse: bool, attention: str = "sdpa") -> Any:
    """transformers' model with the shape of ours."""
    from ettin_foundry.model.config import SIZES

    shape = {**SIZES[size], "vocab_size": VOCAB_SIZE, "max_position_embeddings": row_length,
             "local_attention": 128, "pad_token_id": 0, "attn_implementation": attention}
    if objective == "clm":
        from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM  # type: ignore  # 4.54 or later

        return ModernBertDecoderForCausalLM._from_config(ModernBertDecoderConfig(**shape, use_cache=False))
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM._from_config(ModernBertConfig(**shape, sparse_prediction=sparse))


def hf_step(args: argparse.Namespace, objective: str, contender: str) -> Any:
    import torch
    from streams import padded_batch

    torch.manual_seed(args.seed)
    sparse = objective == "mlm" and contender != "hf default"
    model = hf_model(args.size, objective, args.row_length, sparse=sparse).train()
    batch = padded_batch(documents_of(args), objective, VOCAB_SIZE - 1, seed=args.seed)
    batches = [batch]
    if contender == "hf alone":
        lengths = batch["attention_mask"].sum(1).tolist()
        batches = [{k: v[i:i + 1, :n] for k, v in batch.items()} for i, n in enumerate(lengths)]
    num_targets = [int((b["labels"] != -100).sum()) for b in batches]

    def losses():
        for b, n in zip(batches, num_targets):
            if n:
                yield model(**b).loss * (n / sum(num_targets))

    return model, losses


def worker(args: argparse.Namespace) -> None:
    """Builds one contender, then makes one timed step for each line read."""
    import torch

    torch.set_num_threads(args.threads)
    objective, contender = args.worker.split(":")
    model, losses = our_step(args, objective) if contender == "ours" else hf_step(args, objective, contender)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": parameters}), flush=True)
    for _ in sys.stdin:
        start, cpu_start, total = time.perf_counter(), time.process_time(), 0.0
        for loss in losses():
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start, "loss": total}
        print(json.dumps(answer), flush=True)


def start(args: argparse.Namespace, size: str, name: str, tree: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name.startswith("clm:hf"):
        env["PYTHONPATH"] = os.pathsep.join(p for p in (args.decoder_path, env.get("PYTHONPATH")) if p)
    if tree != ROOT:
        env["PYTHONPATH"], name = str(tree), name.split(":")[0] + ":ours"
    command = [sys.executable, str(tree / "benchmarks" / "cpu_vs_transformers.py"), "--size", size, "--worker", name,
               "--tokens", str(args.tokens), "--row-length", str(args.row_length), "--threads", str(args.threads),
               "--seed", str(args.seed), *(["--data", args.data] if args.data else [])]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen, line: str = "") -> dict[str, Any]:
    assert process.stdin and process.stdout
    if line:
        process.stdin.write(line)
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("a contender's process ended; its error stands above")
    return json.loads(answer)


def measure(args: argparse.Namespace, size: str, objective: str, other: Path | None) -> dict[str, dict[str, Any]]:
    """Seconds per step of every contender of one objective, one step of each in turn."""
    found = {}
    trees = dict.fromkeys(args.contenders or CONTENDERS[objective], ROOT)
    if other:
        trees[f"ours at {args.compare}"] = other
    processes = {name: start(args, size, f"{objective}:{name}", tree) for name, tree in trees.items()
                 if name in CONTENDERS[objective] or tree == other}
    try:
        for name, process in processes.items():
            found[name] = {"parameters": ask(process)["parameters"], "seconds": [], "cpu_seconds": []}
        for number in range(args.rounds + 1):
            for name, process in processes.items():
                answer = ask(process, "step\n")
                if number == 0:
                    found[name]["first_loss"] = answer["loss"]  # ln(vocabulary) when untrained; the step warms up
                else:
                    for key in ("seconds", "cpu_seconds"):
                        found[name][key].append(answer[key])
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    for name in found:
        found[name]["median_seconds"] = statistics.median(found[name]["seconds"])
        found[name]["tokens_per_second"] = args.tokens / found[name]["median_seconds"]
    return found


def table(results: dict[str, Any]) -> str:
    lines = ["| size | objective | contender | tokens/s | seconds a step: median (min - max) | ours is faster by | "
             "goal | in CPU time |",
             "|---|---|---|---|---|---|---|---|"]
    for case, found in results["cases"].items():
        size, objective = case.split()
        for name, row in found.items():
            ratio = row["median_seconds"] / found["ours"]["median_seconds"]
            cpu = statistics.median(row["cpu_seconds"]) / statistics.median(found["ours"]["cpu_seconds"])
            goal = f"{GOALS[objective, name]:g}x" if (objective, name) in GOALS and size == "17m" else ""
            lines.append(f"| {size} | {objective} | {name} | {row['tokens_per_second']:,.0f} | "
                         f"{row['median_seconds']:.2f} ({min(row['seconds']):.2f} - {max(row['seconds']):.2f}) | "
                         + ("| | |" if name == "ours" else f"{ratio:.2f}x | {goal} | {cpu:.2f}x |"))
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU training speed beside transformers' ModernBERT")
    parser.add_argument("--sizes", nargs="+", default=["17m", "nano"], choices=("nano", "17m", "32m", "68m", "150m"))
    parser.add_argument("--objectives", nargs="+", default=["mlm", "clm"], choices=tuple(CONTENDERS))
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens of a step")
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", help="a converted set (folder with train/); synthetic documents without it")
    parser.add_argument("--contenders", nargs="+", help="some of them, ours among them")
    parser.add_argument("--compare", metavar="REVISION", help="or a folder: ours of that tree is a contender, too")
    parser.add_argument("--decoder-path", help="folder with transformers >= 4.54 for the causal twin")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--out", help="folder for the result; benchmarks/results without it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.worker:
        worker(args)
        return
    from streams import machine, results_path, tree_of

    lengths = [len(d) for d in documents_of(args)]
    args.tokens = sum(lengths)
    about = (f"{len(lengths)} documents, {args.tokens} tokens a step (mean {args.tokens / len(lengths):.0f}, longest "
             f"{max(lengths)}), padded to {len(lengths) * max(lengths)} for transformers, {args.threads} threads, "
             f"fp32, {args.rounds} rounds, {'converted data' if args.data else 'synthetic documents'}")
    results: dict[str, Any] = {"about": about, "command": sys.argv, "machine": machine("cpu"), "cases": {}}
    print(about, flush=True)
    path = results_path("cpu", args.out)
    with tempfile.TemporaryDirectory() as folder:
        other = tree_of(args.compare, folder) if args.compare else None
        for size in args.sizes:
            for objective in args.objectives:
                found = measure(args, size, objective, other)
                results["cases"][f"{size} {objective}"] = found
                results["load"] = [round(load, 1) for load in os.getloadavg()]
                path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
                facts = f"{about}; {results['machine']}; load of the machine with this run {results['load']}"
                text = f"`python {' '.join(sys.argv)}`\n\n{facts}\n\n{table(results)}\n"
                path.with_suffix(".md").write_text(text)
                print(table({"cases": {f"{size} {objective}": found}}), flush=True)
    print(f"written to {path.with_suffix('.md')} and .json")


if __name__ == "__main__":
    main()
