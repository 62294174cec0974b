"""Training speed per size, objective and row length on one GPU, with transformers' ModernBERT of the same shape
beside it.

    python3 benchmarks/train_step.py                              the whole plan, within --budget-seconds
    python3 benchmarks/train_step.py --quick                      two sizes, rows of 1,024
    python3 benchmarks/train_step.py --device cpu --sizes nano    to try the program

A step is forward, backward and optimizer over about 131,072 tokens in microbatches, bf16 autocast over fp32 weights,
documents packed into one stream; the batches lie on the device already, so the loader is not part of it. transformers
gets the same documents padded to the longest, sdpa (flash-attn where installed), sparse_prediction for mlm,
ModernBertDecoder for clm, and its layers compiled like ours: its best setting here. Each figure is the median over
steps, timed by CUDA events.

Tokens per second count real tokens. MFU = useful FLOPs / seconds / peak, useful FLOPs being EttinConfig.flops: 6 per
layer weight and token, 6 per weight of head and vocabulary and target, 12 x hidden_size per (query, key) pair that
the windows let through; padding counts nothing. `x Ettin` compares with the original's tokens/s per H100, from its
published GPU hours.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from cpu_vs_transformers import VOCAB_SIZE, hf_model  # noqa: E402
from real_job import ANCHORS  # noqa: E402
from streams import flat_stream, machine, padded_batch, results_path, synthetic_documents  # noqa: E402

from ettin_foundry.model.backends import choose  # noqa: E402
from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.model.transformer import Ettin  # noqa: E402

PEAK_FLOPS = 989e12  # H100 and H200 SXM, dense bf16
STEP_TOKENS = 131_072
MICROBATCH_TOKENS = {"nano": 131_072, "17m": 131_072, "32m": 131_072, "68m": 65_536, "150m": 65_536, "400m": 32_768,
                     "1b": 16_384}
GOALS = {"17m": 2.5, "32m": 2.2, "68m": 2.0, "150m": 1.6, "400m": 1.5, "1b": 1.4}
Case = tuple[str, str, str, int]  # contender, size, objective, row length


def plan(args: argparse.Namespace) -> list[Case]:
    """The most wanted figures first, since the budget may end the run."""
    short, long = min(args.lengths), [n for n in sorted(args.lengths) if n > min(args.lengths)]
    return [(contender, size, objective, length)
            for lengths in ([short], long) for contender in args.contenders for length in lengths
            for objective in args.objectives for size in args.sizes]


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
        model = Ettin(config_of(size, objective, length)).train()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.compile:
        model.compile_blocks()
    backends = choose("auto", args.device, dtype, model.config, model.compiled, False)
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
    if importlib.util.find_spec("optimi"):
        import optimi

        return optimi.StableAdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=1e-5,
                                  decouple_lr=True, triton=device == "cuda"), "optimi StableAdamW"
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True), "torch fused AdamW"


def timed_steps(step: Callable[[], None], args: argparse.Namespace) -> list[float]:
    """Seconds of each of `args.repeats` steps."""
    if args.device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(args.repeats):
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in zip(marks, marks[1:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.repeats + 1)]
    stream = torch.cuda.current_stream()
    events[0].record(stream)
    for event in events[1:]:
        step()
        event.record(stream)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]


def measure(case: Case, args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    torch._dynamo.reset()  # or blocks of earlier sizes count against dynamo's limit of recompilations
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    model, total, note = (our_model if case[0] == "ours" else their_model)(case, args)
    batches = microbatches(case, args, tokens)
    num_targets = sum(b["num_targets"] for b in batches)
    optimizer, optimizer_name = make_optimizer(model, args.device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        loss = torch.zeros((), device=args.device)
        for batch in batches:
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
                part = total(batch) / num_targets
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)

    for _ in range(args.warmup):
        step()
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    prepared = time.perf_counter() - started
    seconds = timed_steps(step, args)
    median = statistics.median(seconds)
    num_tokens, flops = (sum(b[key] for b in batches) for key in ("num_tokens", "flops"))
    result = {"tokens_per_second": num_tokens / median, "mfu": flops / median / PEAK_FLOPS, "seconds": seconds,
              "step_tokens": num_tokens, "microbatch_tokens": tokens, "first_loss": float(losses[0]),
              "last_loss": float(losses[-1]), "prepare_seconds": prepared, "setting": note, "optimizer": optimizer_name,
              "parameters": sum(p.numel() for p in model.parameters())}
    if args.device == "cuda":
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if case[0] != "ours":
        result["padded_share"] = 1 - num_tokens / sum(b["padded_tokens"] for b in batches)
    return result


def clear(args: argparse.Namespace) -> None:
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def attempt(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measures; halves the microbatch when the device has too little memory, and reports any other failure."""
    tokens = min(args.microbatch_tokens or MICROBATCH_TOKENS[case[1]], args.step_tokens)
    while True:
        try:
            return measure(case, args, tokens)
        except torch.OutOfMemoryError:
            if tokens // 2 < case[3]:
                return {"error": f"out of memory with {tokens} tokens"}
            tokens //= 2
        except Exception as error:  # one contender's failure must not lose the figures of the others
            if args.strict:
                raise
            return {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
        finally:
            clear(args)


def rows(results: list[dict[str, Any]]) -> Iterator[str]:
    yield ("| size | objective | row | contender | tokens/s | MFU | peak GiB | microbatch | x Ettin per H100 (goal) | "
           "x transformers | setting |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    theirs = {(r["size"], r["objective"], r["length"]): r.get("tokens_per_second") for r in results
              if r["contender"] != "ours"}
    for r in sorted(results, key=lambda r: (r["length"], list(MICROBATCH_TOKENS).index(r["size"]), r["objective"])):
        name = f"| {r['size']} | {r['objective']} | {r['length']} | {r['contender']} | "
        if "error" in r:
            yield f"{name}failed | | | | | | {r['error']} |"
            continue
        anchor, beside = "", ""
        if r["contender"] == "ours":
            if r["size"] in ANCHORS and r["length"] == 1024:
                anchor = f"{r['tokens_per_second'] / ANCHORS[r['size']]:.2f} ({GOALS[r['size']]:g})"
            other = theirs.get((r["size"], r["objective"], r["length"]))
            beside = f"{r['tokens_per_second'] / other:.2f}" if other else ""
        memory = f"{r['peak_memory_gib']:.1f}" if "peak_memory_gib" in r else ""
        yield (f"{name}{r['tokens_per_second']:,.0f} | {100 * r['mfu']:.1f}% | {memory} | {r['microbatch_tokens']:,} | "
               f"{anchor} | {beside} | {r['setting']} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="training speed on one GPU", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", nargs="+", default=list(ANCHORS), choices=tuple(MICROBATCH_TOKENS))
    parser.add_argument("--objectives", nargs="+", default=["mlm", "clm"], choices=("mlm", "clm"))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192])
    parser.add_argument("--contenders", nargs="+", default=["ours", "transformers"], choices=("ours", "transformers"))
    parser.add_argument("--quick", action="store_true", help="17m and 150m at 1,024 only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--microbatch-tokens", type=int, help="instead of the table by size")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--budget-seconds", type=float, default=280, help="no case is started after this")
    parser.add_argument("--strict", action="store_true", help="stop at a contender's failure")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--out", help="folder for the results; benchmarks/results without it")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.lengths = ["17m", "150m"], [1024]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda given (the default), but this machine has no CUDA device; --device cpu "
                     "--sizes nano tries the program")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    return args


def main() -> None:
    args = parse()
    torch.set_float32_matmul_precision("high")  # acts on nothing under autocast but keeps compilers quiet
    started, results, left_out = time.perf_counter(), [], []
    path = results_path(f"train-step-{args.device}", args.out)
    for case in plan(args):
        if time.perf_counter() - started > args.budget_seconds:
            left_out.append(" ".join(map(str, case)))
            continue
        result = {**dict(zip(("contender", "size", "objective", "length"), case)), **attempt(case, args)}
        results.append(result)
        said = result.get("error") or (f"{result['tokens_per_second']:,.0f} tokens/s, MFU {100 * result['mfu']:.1f}%, "
                                       f"ready after {result['prepare_seconds']:.0f} s")
        print(f"{time.perf_counter() - started:6.0f} s  {' '.join(map(str, case))}: {said}", flush=True)
        facts = {"machine": machine(args.device), "arguments": vars(args), "left_out": left_out, "results": results}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")  # kept if a later case is killed
    text = "\n".join(rows(results))
    if left_out:
        text += f"\n\nLeft out, the budget of {args.budget_seconds:.0f} s was spent: {'; '.join(left_out)}"
    path.with_suffix(".md").write_text(f"{machine(args.device)}\n\n{text}\n")
    print(f"\n{text}\nwritten to {path.with_suffix('.md')} and .json")


if __name__ == "__main__":
    main()
