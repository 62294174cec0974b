"""One contender of train_step.py in a process of its own: it times steps and takes one apart by kernel.

    python benchmarks/step_worker.py TREE      reads one JSON object a line from train_step.py, answers with one

Model, batches and optimizer are made by TREE's own benchmarks/train_step.py, so that other revisions can be compared;
the step around them is the same for all.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

_ATTENTION = r"flash|fmha|attn|attention|dot_do_o|triton_tem_fused(_zeros)?_\d"  # the last: flex_attention's template
GROUPS = (  # the first pattern that a kernel's name holds decides
    ("attention", _ATTENTION),
    ("matrix products", r"nvjet|gemm|xmma|splitk|cublas|addmm|bmm|::mm\b|::matmul|::linear\b"),
    ("optimizer", r"multi_tensor_apply|lpnorm|_foreach_|adam"),
    ("loss", r"softmax|logsumexp|losses|nll|cross_entropy|reduce_kernel|amax|_exp_|::exp_?\b"),
    ("GELU x gate", r"gelu|glu"),
    ("rotary", r"rotat|rotary|(?<![a-z])(rope|roll|cat)(?![a-z])|roll_cuda|catarray"),
    ("embedding, gather", r"embedding|index|gather|scatter"),
    ("norms, residual, casts",
     r"norm|_to_copy|copy_kernel|::copy_|dropout|elementwise|triton_\w*(add|mul)|::add|::mul"),
    ("memory copies", r"memcpy|memset"))
OTHER = "other"


def group_of(kernel: str) -> str:
    """What a kernel does, by its name: a name of `GROUPS`, attention with direction and, where told, kind of layer."""
    name = next((group for group, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)
    if name != "attention":
        return name
    direction = "backward" if re.search(r"backward|bwd|dot_do_o|convert_d", kernel) else "forward"
    # FlashAttention 2 instantiates kernels by <traits, has dropout, is causal, is local, ...>
    local = re.search(r">, (?:\(bool\))?[a-z01]+, (?:\(bool\))?[a-z01]+, (?:\(bool\))?(true|false|0|1)", kernel)
    kind = {"true": ", local", "1": ", local", "false": ", global", "0": ", global"}[local[1]] if local else ""
    return f"attention {direction}{kind}"


_FLASH = "void pytorch_flash::flash_{}_kernel<Traits<64, cutlass::bfloat16_t> >, false, false, {}, true>(Params)"
KNOWN = {  # kernels of real profiles: their groups
    "nvjet_tst_256x128": "matrix products", _FLASH.format("fwd", "true"): "attention forward, local",
    _FLASH.format("bwd_dq_dk_dv_loop_seqk_parallel", "false"): "attention backward, global",
    "flash_bwd_dot_do_o_kernel<true>": "attention backward",
    "triton_tem_fused_flex_attention_backward_3": "attention backward",
    "triton_poi_fused_cat_gelu_gelu_backward_mul_split_5": "GELU x gate", "Memcpy HtoD": "memory copies",
    "triton_poi_fused_cat_mul_neg_slice_2": "rotary", "_softmax_gradient_kernel": "loss", "new": OTHER,
    "triton_poi_fused__to_copy_2": "norms, residual, casts", "multi_tensor_apply_kernel<4>": "optimizer"}


def by_kernel(events: Iterable[dict[str, Any]], kinds: tuple[str, ...]) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of a trace's events, the longest first; what runs in another counts once."""
    found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    running: dict[Any, list[dict[str, Any]]] = defaultdict(list)  # on each thread or stream
    chosen = (event for event in events if event.get("cat") in kinds and "dur" in event)
    for event in sorted(chosen, key=lambda event: (event["ts"], -event["dur"])):
        outer, end = running[event["pid"], event["tid"]], event["ts"] + event["dur"]
        while outer and end > outer[-1]["ts"] + outer[-1]["dur"]:
            outer.pop()
        if outer:
            found[outer[-1]["name"]][1] -= event["dur"] / 1e3
        outer.append(event)
        found[event["name"]][0] += 1
        found[event["name"]][1] += event["dur"] / 1e3
    return sorted(((name, int(calls), ms) for name, (calls, ms) in found.items()), key=lambda row: -row[2])


def profile_table(kernels: Iterable[tuple[str, int, float]], wall_ms: float) -> list[str]:
    """Lines of a table by group, of kernels of one step that takes `wall_ms` when nothing is traced."""
    assert {kernel: group_of(kernel) for kernel in KNOWN} == KNOWN
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in kernels:
        groups[group_of(row[0])].append(row)
    total = sum(ms for rows in groups.values() for *_, ms in rows)
    lines = ["| group | ms | share | calls | its largest kernels: ms, calls |", "|---|---|---|---|---|"]
    for name, rows in sorted(groups.items(), key=lambda item: -sum(ms for *_, ms in item[1])):
        ms, largest = sum(ms for *_, ms in rows), sorted(rows, key=lambda row: -row[2])[:3]
        said = "; ".join(f"`{short(kernel)}` {spent:.2f}, {calls:g}" for kernel, calls, spent in largest)
        lines.append(f"| {name} | {ms:.2f} | {ms / total:.1%} | {sum(row[1] for row in rows):g} | {said} |")
    idle = max(0.0, 1 - total / wall_ms)
    return [*lines, f"| all kernels | {total:.2f} | of {wall_ms:.2f} ms: idle {idle:.1%} | | |"]


def short(kernel: str) -> str:
    """A kernel's name without its return type, namespaces and template arguments."""
    plain = re.sub(r"^void |\(anonymous namespace\)::|(at|native|pytorch_flash|cutlass|std)::", "", kernel)
    return (plain.split("<")[0] if not plain.startswith("vectorized") else plain)[:60].replace("|", "/")


class Contender:
    """Model, batches and optimizer of one case, and what is asked of them."""

    def __init__(self, tree: Path) -> None:
        self.parts = importlib.import_module("train_step")
        with contextlib.suppress(ImportError):  # now, while others import, too: it takes seconds
            importlib.import_module("ettin_foundry.training.optimizer")
        import ettin_foundry

        assert tree in Path(ettin_foundry.__file__).parents, f"{ettin_foundry.__file__} lies outside {tree}"
        self.step: Callable[[], torch.Tensor] | None = None

    def prepare(self, case: list[Any], tokens: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Builds and warms up; halves the microbatch where the device has too little memory."""
        args = self.args = argparse.Namespace(**arguments)
        torch.set_float32_matmul_precision("high")  # acts on nothing under autocast but keeps compilers quiet
        if self.args.kernels == "off":
            importlib.import_module("ettin_foundry.model.kernels").ENABLED = False  # type: ignore[attr-defined]
        while True:
            try:
                return self.build(tuple(case), tokens, args)
            except torch.OutOfMemoryError:
                if tokens // 2 < case[3]:
                    return {"error": f"out of memory with {tokens} tokens"}
                tokens //= 2
            finally:
                self.clear()

    def build(self, case: Any, tokens: int, args: Any) -> dict[str, Any]:
        torch._dynamo.reset()  # or blocks of earlier sizes count against dynamo's limit of recompilations
        torch.manual_seed(args.seed)
        started = time.perf_counter()
        model, total, note = (self.parts.our_model if case[0] == "ours" else self.parts.their_model)(case, args)
        batches = self.parts.microbatches(case, args, tokens)
        num_targets = sum(b["num_targets"] for b in batches)
        optimizer, optimizer_name = self.parts.make_optimizer(model, args.device)

        def step() -> torch.Tensor:
            loss = torch.zeros((), device=args.device)
            for batch in batches:
                with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.device == "cuda"):
                    part = total(batch) / num_targets
                part.backward()
                loss += part.detach()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        losses = [step() for _ in range(args.warmup)]
        found: dict[str, Any] = {key: sum(b[key] for b in batches) for key in ("num_tokens", "flops")}
        if case[0] != "ours":
            found["padded_tokens"] = sum(b["padded_tokens"] for b in batches)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        losses.append(step())
        if args.device == "cuda":
            torch.cuda.synchronize()
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.step = step
        return {**found, "microbatch_tokens": tokens, "losses": [float(loss) for loss in losses], "setting": note,
                "prepare_seconds": time.perf_counter() - started, "optimizer": optimizer_name}

    def turn(self) -> dict[str, Any]:
        """Seconds of each of `repeats` steps, after one that takes memory again."""
        assert self.step is not None
        self.step()
        if self.args.device == "cpu":
            marks = [time.perf_counter()]
            for _ in range(self.args.repeats):
                self.step()
                marks.append(time.perf_counter())
            return {"seconds": [b - a for a, b in zip(marks, marks[1:])]}
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.args.repeats + 1)]
        stream = torch.cuda.current_stream()
        events[0].record(stream)
        for event in events[1:]:
            self.step()
            event.record(stream)
        torch.cuda.synchronize()
        self.clear()  # another contender's turn needs the memory
        return {"seconds": [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]}

    def profile(self, steps: int = 2) -> dict[str, Any]:
        """Kernels of a step (on a CPU operators): name, calls, milliseconds."""
        assert self.step is not None
        self.step()
        on_gpu, kind = self.args.device == "cuda", torch.profiler.ProfilerActivity
        kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
        with torch.profiler.profile(activities=[kind.CUDA if on_gpu else kind.CPU]) as profiler:
            for _ in range(steps):
                self.step()
            if on_gpu:
                torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            rows = by_kernel(json.loads(path.read_text(errors="replace"))["traceEvents"], kinds)
        self.clear()
        if not rows:
            return {"error": "the profiler saw no kernel"}
        return {"kernels": [(name[:400], calls / steps, ms / steps) for name, calls, ms in rows]}

    def drop(self) -> dict[str, Any]:
        self.step = None
        self.clear()
        return {}

    def clear(self) -> None:
        gc.collect()
        if self.args.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    tree, own = Path(sys.argv[1]).resolve(), sys.path.pop(0)
    sys.path[:0] = [str(tree / "benchmarks"), str(tree)]
    sys.path.append(own)
    contender = Contender(tree)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(contender, request.pop("do"))(**request)
        except Exception as error:  # the figures of the others must not be lost; train_step --strict stops at it
            said = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {said[0][:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
