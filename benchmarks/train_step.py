"""Training speed per size, objective and row length on one GPU, and where a step's time goes.

    python3 benchmarks/train_step.py                              the whole plan, within --budget-seconds
    python3 benchmarks/train_step.py --sizes 17m --profile        with a table by group of kernels
    python3 benchmarks/train_step.py --variants kernels=off compile=none attn_impl=flash      the same tree otherwise
    python3 benchmarks/train_step.py --compare REVISION           or a folder: another tree
    python3 benchmarks/train_step.py --device cpu --sizes nano    to try the program

A step is forward, backward and optimizer over about 180,000 tokens in the recipe's microbatches, bf16 autocast over
fp32 weights, documents packed into one stream; the batches lie on the device already, so the loader is not part of it.
Each contender is a process of its own (step_worker.py); they take turns of a few steps, timed by CUDA events; reported
are medians. transformers (--contenders) gets the same documents padded to the longest, sdpa (flash-attn where
installed), sparse_prediction for mlm, ModernBertDecoder for clm, and its layers compiled like ours: its best setting.

Tokens per second count real tokens. MFU = useful FLOPs / seconds / peak, useful FLOPs being EttinConfig.flops: 6 per
layer weight and token, 6 per weight of head and vocabulary and target, 12 x hidden_size per (query, key) pair that
the windows let through; padding counts nothing. `x Ettin` compares with the original's tokens/s per H100, from its
published GPU hours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import yaml  # noqa: E402
from cpu_vs_transformers import VOCAB_SIZE, hf_model  # noqa: E402
from real_job import ANCHORS, GOALS, WANTED  # noqa: E402
from step_worker import profile_table  # noqa: E402
from streams import flat_stream, machine, padded_batch, results_path, synthetic_documents, tree_of  # noqa: E402

from ettin_foundry.model.backends import choose  # noqa: E402
from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.model.transformer import Ettin  # noqa: E402

PEAK_FLOPS = 989e12  # H100 and H200 SXM, dense bf16
STEP_TOKENS = 176 * 1024  # half of the real job's step
Case = tuple[str, str, str, int]  # ours or transformers, size, objective, row length


def plan(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(size, objective, row length), the most wanted first, since the budget may end the run."""
    cases = [case.split() for case in WANTED]
    return [(size, objective, length) for length in sorted(args.lengths) for size, objective in cases
            if size in args.sizes and objective in args.objectives]


def microbatch_tokens(size: str, objective: str, step_tokens: int) -> int:
    """The recipe's, so that compiled code is that of the real job."""
    if size == "nano":
        return step_tokens
    path = ROOT / "yamls" / f"ettin-{'dec' if objective == 'clm' else 'enc'}-{size}.yaml"
    return min(step_tokens, yaml.safe_load(path.read_text())["variables"]["microbatch_tokens"])


def config_of(size: str, objective: str, length: int) -> EttinConfig:
    return EttinConfig.for_size(size, causal=objective == "clm", max_position_embeddings=length, vocab_size=VOCAB_SIZE)


def microbatches(case: Case, args: argparse.Namespace, tokens: int) -> list[dict[str, Any]]:
    """Different documents in each, on the device; `flops` and `num_tokens` are those of the documents."""
    contender, size, objective, length = case
    config, out = config_of(size, objective, length), []
    for number in range(max(1, args.step_tokens // tokens)):
        documents = synthetic_documents(tokens, length, VOCAB_SIZE, seed=args.seed + number)
        batch = flat_stream(documents, objective, VOCAB_SIZE - 1, seed=args.seed)
        lengths = batch["lengths"]
        flops = config.flops(batch["num_tokens"], batch["num_targets"], sum(map(config.attended_pairs, lengths)))
        facts = {"flops": flops, "num_tokens": batch["num_tokens"], "num_targets": batch["num_targets"]}
        if contender != "ours":
            batch = padded_batch(documents, objective, VOCAB_SIZE - 1, seed=args.seed)
            facts["padded_tokens"] = batch["input_ids"].numel()
        out.append({**{k: v.to(args.device) if torch.is_tensor(v) else v for k, v in batch.items()}, **facts})
    return out


def our_model(case: Case, args: argparse.Namespace) -> tuple[torch.nn.Module, Callable[[dict], torch.Tensor], str]:
    _, size, objective, length = case
    with torch.device(args.device):
        model = Ettin(config_of(size, objective, length), args.attn_impl).train()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.compile:
        model.compile_blocks()
    backends = choose(args.attn_impl, args.device, dtype, model.config, model.compiled, False)
    note = " and ".join(dict.fromkeys(backends.values())) + (", blocks compiled" if args.compile else "")

    def total(b: dict) -> torch.Tensor:
        # the row's length in place of the longest document's, as the loader gives it to compiled blocks
        return model(b["input_ids"], b["position_ids"], b["cu_seqlens"], length, b["target_positions"],
                     b["target_labels"]).nll

    return model, total, note


def their_model(case: Case, args: argparse.Namespace) -> tuple[torch.nn.Module, Callable[[dict], torch.Tensor], str]:
    _, size, objective, length = case
    flash = args.device == "cuda" and importlib.util.find_spec("flash_attn") is not None
    attention = "flash_attention_2" if flash else "sdpa"
    with torch.device(args.device):
        model: Any = hf_model(size, objective, length, sparse=True, attention=attention).train()
    note = attention + (", sparse_prediction" if objective == "mlm" else "")
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
        note += ", layers compiled"

    def total(b: dict) -> torch.Tensor:
        out = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], labels=b["labels"])
        return out.loss * b["num_targets"]

    return model, total, note


def make_optimizer(model: torch.nn.Module, device: str) -> tuple[Any, str]:
    """The recipes' own, or torch's where the host is missing."""
    try:
        from ettin_foundry.training.optimizer import StableAdamW
    except ImportError:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True), "torch's fused AdamW"
    return StableAdamW(model.parameters(), lr=1e-4, weight_decay=1e-5), "ours"


class Worker:
    """A contender's process: one request, one answer. What fails or is late answers {error} from then on."""

    def __init__(self, tree: Path, kind: str, settings: dict[str, Any], seconds: float) -> None:
        self.kind, self.settings, self.seconds, self.error = kind, settings, seconds, ""
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(ROOT / "benchmarks" / "step_worker.py"), str(tree)]
        self.process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        if self.error:
            return {"error": self.error}
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], self.seconds)[0]:
                self.end(f"no answer to {do} after {self.seconds:.0f} s")
            elif line := self.process.stdout.readline():
                return json.loads(line)
            else:
                self.end("its process ended; see its messages above")
        except BrokenPipeError:
            self.end("its process ended; see its messages above")
        return {"error": self.error}

    def end(self, error: str) -> None:
        self.error = error
        self.process.kill()
        self.process.wait()


def measure(case: tuple[str, str, int], workers: dict[str, Worker], args: argparse.Namespace,
            late: Callable[[], bool]) -> list[dict[str, Any]]:
    """One result for each contender that is ready before it is late; all timed in turns."""
    size, objective, length = case
    found: dict[str, dict[str, Any]] = {}
    tokens = args.microbatch_tokens or microbatch_tokens(size, objective, args.step_tokens)
    for name, worker in workers.items():
        if late() and found:
            break
        arguments = {**vars(args), **worker.settings}
        found[name] = worker.ask("prepare", case=[worker.kind, *case], tokens=tokens, arguments=arguments)
        tokens = found[name].get("microbatch_tokens", tokens)  # all have what the first could hold
    ready = [name for name, facts in found.items() if "error" not in facts]
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(args.turns):
        for name in ready:
            answer = workers[name].ask("turn")
            seconds[name] += answer.get("seconds", [])
            found[name].update({k: v for k, v in answer.items() if k == "error"})
    for name in ready[:1] if args.profile else []:
        found[name]["profile"] = workers[name].ask("profile")
    for name in found:
        workers[name].ask("drop")
    for name, facts in found.items():
        if "error" not in facts:
            median = statistics.median(seconds[name])
            facts |= {"seconds": seconds[name], "median_seconds": median, "mfu": facts["flops"] / median / PEAK_FLOPS,
                      "tokens_per_second": facts["num_tokens"] / median}
    return [{"size": size, "objective": objective, "length": length, "contender": name, **facts}
            for name, facts in found.items()]


def rows(results: list[dict[str, Any]]) -> Iterator[str]:
    yield ("| size | objective | row | contender | tokens/s | MFU | peak GiB | microbatch | x Ettin per H100 (goal) | "
           "ours is faster by | setting |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    ours = {(r["size"], r["objective"], r["length"]): r.get("tokens_per_second") for r in results
            if r["contender"] == "ours"}
    for r in results:
        name = f"| {r['size']} | {r['objective']} | {r['length']} | {r['contender']} | "
        if "error" in r:
            yield f"{name}failed | | | | | | {r['error']} |"
            continue
        anchor, beside, mine = "", "", ours.get((r["size"], r["objective"], r["length"]))
        if r["size"] in ANCHORS and r["length"] == 1024:
            anchor = f"{r['tokens_per_second'] / ANCHORS[r['size']]:.2f} ({GOALS[r['objective']][r['size']]:g})"
        if r["contender"] != "ours" and mine:
            beside = f"{mine / r['tokens_per_second']:.2f}x"
        memory = f"{r['peak_memory_gib']:.1f}" if "peak_memory_gib" in r else ""
        yield (f"{name}{r['tokens_per_second']:,.0f} | {100 * r['mfu']:.1f}% | {memory} | {r['microbatch_tokens']:,} | "
               f"{anchor} | {beside} | {r['setting']}, optimizer {r['optimizer']} |")


def profiles(results: list[dict[str, Any]]) -> Iterator[str]:
    for r in results:
        if "profile" in r:
            yield f"\nOne step of {r['size']} {r['objective']}, rows of {r['length']}, {r['num_tokens']:,} tokens:\n"
            if "error" in r["profile"]:
                yield r["profile"]["error"]
            else:
                yield from profile_table(r["profile"]["kernels"], 1e3 * r["median_seconds"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="training speed on one GPU", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", nargs="+", default=list(ANCHORS), choices=(*ANCHORS, "nano"))
    parser.add_argument("--objectives", nargs="+", default=["mlm", "clm"], choices=("mlm", "clm"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024])
    parser.add_argument("--contenders", nargs="+", default=["ours"], choices=("ours", "transformers"))
    parser.add_argument("--variants", nargs="+", default=[], metavar="SETTING=VALUE",
                        help="contenders besides ours: kernels=off, compile=none, attn_impl=flash|flex|reference")
    parser.add_argument("--compare", metavar="REVISION", help="or a folder: one more contender, from that tree")
    parser.add_argument("--profile", action="store_true", help="where the time of ours goes, by group of kernels")
    parser.add_argument("--turns", type=int, default=3, help="of each contender")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--microbatch-tokens", type=int, help="instead of the recipe's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--budget-seconds", type=float, default=280, help="no case is started after this")
    parser.add_argument("--case-seconds", type=float, default=150, help="a contender that takes longer is given up")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda given (the default), but this machine has no CUDA device; --device cpu "
                     "--sizes nano tries the program")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    for variant in args.variants:
        if variant.split("=")[0] not in ("kernels", "compile", "attn_impl") or variant.count("=") != 1:
            parser.error(f"--variants: {variant!r} given; kernels=off, compile=none or attn_impl=NAME is possible")
    return args


def start(args: argparse.Namespace, folder: str) -> dict[str, Worker]:
    """{contender: its process}; they import what they need side by side."""
    usual = {"kernels": "on", "attn_impl": "auto"}
    found = {name: (ROOT, name, usual) for name in args.contenders}
    for variant in args.variants:
        key, value = variant.split("=")
        found[variant] = (ROOT, "ours", {**usual, key: value if key != "compile" else value != "none"})
    if args.compare and (tree := tree_of(args.compare, folder)):
        found[args.compare] = (tree, "ours", usual)
    return {name: Worker(*facts, args.case_seconds) for name, facts in found.items()}


def main() -> None:
    args = parse()
    started, results, left_out = time.perf_counter(), [], []
    path = results_path(f"train-step-{args.device}", args.out)

    def late() -> bool:
        return time.perf_counter() - started > args.budget_seconds

    with tempfile.TemporaryDirectory() as folder:
        workers = start(args, folder)
        for case in plan(args):
            if late():
                left_out.append(" ".join(map(str, case)))
                continue
            found = measure(case, workers, args, late)
            results += found
            for r in found:
                said = r.get("error") or (f"{r['tokens_per_second']:,.0f} tokens/s, MFU {100 * r['mfu']:.1f}%, ready "
                                          f"after {r['prepare_seconds']:.0f} s")
                print(f"{time.perf_counter() - started:6.0f} s  {' '.join(map(str, case))}, {r['contender']}: {said}",
                      flush=True)
            print("\n".join(profiles(found)), flush=True)
            facts = {"machine": machine(args.device), "arguments": vars(args), "left_out": left_out, "results": results}
            path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")  # kept if a later case is killed
            text = "\n".join([str(machine(args.device)), "", *rows(results), *profiles(results)])
            path.with_suffix(".md").write_text(text + "\n")
        for worker in workers.values():
            worker.end("done")
    if left_out:
        print(f"left out, the budget of {args.budget_seconds:.0f} s was spent: {'; '.join(left_out)}")
    print("\n".join(rows(results)) + f"\nwritten to {path.with_suffix('.md')} and .json")
    if any("error" in result for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
