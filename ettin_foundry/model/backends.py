"""Which implementation of attention.py attends in global and in local layers: one asked for, or the fastest here."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ettin_foundry.model.attention import Documents, attention, block_mask
from ettin_foundry.model.config import EttinConfig

log = logging.getLogger(__name__)


def candidates(wish: str, device_type: str, dtype: torch.dtype, compiled: bool) -> tuple[list[str], str]:
    """What may attend here, the best by the rule first, and why; a ValueError where `model.attn_impl` cannot be met.

    compiled: whether blocks are; if not, flex_attention would be compiled for every length of a stream.
    """
    if wish not in ("auto", "flash", "flex", "reference"):
        raise ValueError(f"model.attn_impl must be auto, flash, flex or reference, got {wish!r}")
    if wish == "reference":
        return ["reference"], "asked for by model.attn_impl"
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        capability, version = torch.cuda.get_device_capability(), tuple(map(int, torch.__version__.split(".")[:2]))
        runs = {"flash_attn_3": find_spec("flash_attn_interface") and capability[0] == 9,
                "flash_attn_2": find_spec("flash_attn"),
                "varlen_attn": version >= (2, 11),  # 2.10 has it, but without windows
                "flex_attention": version >= (2, 7) and compiled}
        found = [name for name, can in runs.items() if can and capability >= (8, 0)
                 and (wish == "auto" or (wish == "flex") == (name == "flex_attention"))]
        if found:
            return found, f"the first of {', '.join(found)} that {wish} may take"
    obstacle = (f"this is {device_type} in {dtype}; kernels need bf16 or fp16 on a CUDA device, Ampere or newer: flash "
                "with flash-attn or torch >= 2.11, flex_attention with torch >= 2.7 and model.compile: blocks")
    if wish != "auto":
        raise ValueError(f"model.attn_impl must be auto or reference here, got {wish!r}: {obstacle}")
    return ["reference"], obstacle


@functools.cache
def choose(wish: str, device_type: str, dtype: torch.dtype, config: EttinConfig, compiled: bool,
           deterministic: bool) -> dict[bool, str]:
    """{is global: name} of what attends in layers of each kind: of several in `auto` the fastest, else the first.

    Deterministic runs take the first, too, for a measurement may end otherwise where such a run goes on. All can add
    gradients up in a fixed order: flash kernels by a switch, flex_attention always.
    """
    if wish == "flex" and not compiled:  # samples of a compiled run are made without
        wish = "auto"
    found, reason = candidates(wish, device_type, dtype, compiled)
    names = {True: found[0], False: found[0]}
    if wish == "auto" and len(found) > 1 and not deterministic:
        # the first rank measures and others read, from the store, for a broadcast would hang where only the first comes
        store = dist.distributed_c10d._get_default_store() if dist.is_available() and dist.is_initialized() else None
        key = f"attention by {found} on {torch.cuda.get_device_name()} in {dtype}: {config}"
        if store is None or dist.get_rank() == 0:
            names, reason = fastest(found, lambda *case: milliseconds(case, config, device_type, dtype))
            if store:
                store.set(key, json.dumps([*names.values(), reason]))
        else:
            names[True], names[False], reason = json.loads(store.get(key))
    log.info("attention in %s: %s in global layers, %s in local ones; %s", dtype, *names.values(), reason)
    return names


def fastest(found: Iterable[str], measure: Callable[[str, bool], float]) -> tuple[dict[bool, str], str]:
    """({is global: name}, why): the least of `measure(name, is global)`; `reference` where all raise."""
    names, said = {}, []
    for is_global, layers in ((True, "global layers"), (False, "local layers")):
        times = {}
        for name in found:
            try:
                times[name] = measure(name, is_global)
                said.append(f"{name} takes {times[name]:.2f} ms in {layers}")
            except Exception as error:  # compilers and kernels fail in many ways
                said.append(f"{name} is left out of {layers}: {type(error).__name__}: {str(error).strip()[:200]}")
        names[is_global] = min(times, key=lambda name: times[name], default="reference")
    return names, "; ".join(said)


def milliseconds(case: tuple[str, bool], config: EttinConfig, device: str, dtype: torch.dtype,
                 numbers: int = 2**25) -> float:
    """Of attention by (name, is global), forward and backward, where q has so many numbers; rows of 4 documents."""
    from torch.utils.benchmark import Timer

    (name, is_global), longest, heads = case, config.max_position_embeddings, config.num_attention_heads
    window = config.windows[is_global]
    lengths = [longest // 2, longest // 4, longest // 8, longest // 8] * -(-numbers // (config.hidden_size * longest))
    places = torch.cat([torch.arange(n, device=device) for n in lengths])
    documents = Documents(F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device), longest, places)
    if name == "flex_attention":  # as before a compiled block
        documents.cached(block_mask, window)
    function: Any = torch.compile(attention, dynamic=False) if name == "flex_attention" else attention
    generator = torch.Generator(device).manual_seed(0)  # what the run draws stays as it is
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        q, k, v, weight = (torch.randn(len(places), heads, config.hidden_size // heads, device=device, dtype=dtype,
                                       generator=generator, requires_grad=True) for _ in range(4))

        def step() -> tuple[Tensor, ...]:
            out = function(q, k, v, documents, window, name)
            return out, *torch.autograd.grad(out, (q, k, v), weight)

        alone = [x[:longest].detach().requires_grad_() for x in (q, k, v)]  # a row's documents see nobody else
        row = Documents(documents.cu_seqlens[:5], longest, places[:longest])
        exact = attention(alone[0], alone[1], alone[2], row, window)
        for mine, theirs in zip(step(), (exact, *torch.autograd.grad(exact, alone, weight[:longest]))):
            # bf16 rounds by less than 1%; a window of 64 that is one off changes 9%
            if (off := float((mine[:longest] - theirs).norm() / theirs.norm())) > 0.03 or not math.isfinite(off):
                raise ArithmeticError(f"it is {off:.1%} off the reference path")
        return Timer("step()", globals={"step": step}).timeit(10).mean * 1e3  # calls it twice before
