"""Attention over a flat stream of documents: one signature, a flash path and a reference path.

Windows are flash-attn's: (left, right), both ends included, -1 for no limit; causal is right == 0. The reference path,
SDPA on any device and dtype, defines the meaning. The flash path is flash-attn 3 or 2 if installed, else torch's
`varlen_attn` (torch >= 2.11). Shapes: N tokens, D documents, H heads, K head dimension, W block width.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once, which takes seconds


class Documents:
    """Where documents lie in a flat stream: (D + 1,) int32 offsets; the longest's length, a Python int (reading it from
    the device would stall the step); (N,) int64, the place of each token in its own document."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, position_ids: Tensor) -> None:
        self.cu_seqlens, self.max_seqlen, self.position_ids = cu_seqlens, max_seqlen, position_ids
        self._cache: dict[object, Any] = {}  # masks are the same in every layer of one forward

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


class Backend(NamedTuple):
    name: str  # flash_attn_3, flash_attn_2, varlen_attn or reference
    reason: str


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window_size: tuple[int, int],
              backend: str = "reference") -> Tensor:
    """(N, H, K) softmax attention inside each document, scale K ** -0.5.

    q, k, v: (N, H, K), of one dtype, bf16 or fp16 for the flash backends. backend: a `Backend.name`.
    """
    if q.shape[0] == 0:  # flash kernels refuse it; returned as it is, so that every rank has gradients to reduce
        return q
    if backend == "reference":
        return (_reference_global if window_size[0] < 0 else _reference_local)(q, k, v, documents, window_size)
    borders = (documents.cu_seqlens, documents.cu_seqlens, documents.max_seqlen, documents.max_seqlen)
    if backend == "varlen_attn":
        from torch.nn.attention.varlen import varlen_attn  # type: ignore

        return varlen_attn(q, k, v, *borders, window_size=window_size)
    if backend == "flash_attn_2":
        from flash_attn import flash_attn_varlen_func  # type: ignore
    else:
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore
    out = flash_attn_varlen_func(q, k, v, *borders, causal=window_size[1] == 0, window_size=window_size,
                                 deterministic=torch.are_deterministic_algorithms_enabled())
    return out[0] if isinstance(out, tuple) else out  # early flash-attn 3 returns (out, lse)


def _reference_global(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window_size: tuple[int, int]) -> Tensor:
    """Every key of the document (up to the query's place when causal)."""
    causal = window_size[1] == 0
    # on a CPU the borders are readable, so that no padding is computed; compiled code would depend on their values
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = documents.cached("lengths", lambda: [n for n in documents.cu_seqlens.diff().tolist() if n])
        # split, not one slice a document: the backward of a slice writes zeros for the whole stream
        parts = (x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q, k, v))  # (1, H, L, K) each
        out = [F.scaled_dot_product_attention(q_d, k_d, v_d, is_causal=causal) for q_d, k_d, v_d in zip(*parts)]
        return torch.cat(out, dim=2)[0].transpose(0, 1)
    # elsewhere: gather documents into a padded (D, max_seqlen) block; nothing is read back from the device
    place = torch.arange(documents.max_seqlen, device=q.device)
    starts, ends = documents.cu_seqlens[:-1, None], documents.cu_seqlens[1:, None]
    index = (starts + place).clamp(max=q.shape[0] - 1)                              # (D, M)
    # an empty document sees one key: not every kernel has finite gradients for a query without any
    visible = ((starts + place < ends) | (place == 0))[:, None, None, :]            # (D, 1, 1, M)
    if causal:
        visible = visible & (place[:, None] >= place)[None, None]                  # (D, 1, M, M)
    q_d, k_d, v_d = (x[index].transpose(1, 2) for x in (q, k, v))                   # (D, H, M, K)
    out = F.scaled_dot_product_attention(q_d, k_d, v_d, attn_mask=visible)
    tokens = torch.arange(q.shape[0], device=q.device, dtype=documents.cu_seqlens.dtype)
    document = torch.searchsorted(documents.cu_seqlens, tokens, right=True) - 1     # (N,)
    return out.transpose(1, 2)[document, documents.position_ids]


def _reference_local(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window_size: tuple[int, int]) -> Tensor:
    """Blocks of W queries against their own and the neighbouring blocks of keys, all documents at once.

    W is at least the window's reach, so one block to each side holds every visible key: N * 3W scores, not N ** 2.
    """
    (num_tokens, heads, dim), (width, sides) = q.shape, _block_shape(window_size)
    blocks = -(-num_tokens // width)

    def keys(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, sides[0] * width, blocks * width - num_tokens + sides[1] * width))
        x = x.view(blocks + sum(sides), width, heads, dim)
        return torch.cat([x[i:i + blocks] for i in range(sum(sides) + 1)], dim=1).transpose(1, 2)

    mask = local_mask(documents, window_size, q.dtype)
    queries = F.pad(q, (0, 0, 0, 0, 0, blocks * width - num_tokens)).view(blocks, width, heads, dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys(k), keys(v), attn_mask=mask)
    return out.transpose(1, 2).reshape(blocks * width, heads, dim)[:num_tokens]


def _block_shape(window_size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """W, and how many blocks of keys to the left and to the right of a query's own can be visible."""
    return max(*window_size, 16), (1, 1 if window_size[1] else 0)


def local_mask(documents: Documents, window_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(blocks, 1, W, (1 + sum(sides)) * W), 0 where a key is visible and -inf elsewhere; made once a stream."""
    return documents.cached(("local", window_size, dtype), lambda: _make_local_mask(documents, window_size, dtype))


def _make_local_mask(documents: Documents, window_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    (width, sides), num_tokens = _block_shape(window_size), documents.position_ids.shape[0]
    device = documents.position_ids.device
    blocks, span = -(-num_tokens // width), (1 + sum(sides)) * width
    start = torch.arange(num_tokens, device=device) - documents.position_ids        # where a token's document begins
    # padding is a document of its own, -1: a query without any key would give NaN gradients
    padded = F.pad(start, (sides[0] * width, blocks * width - num_tokens + sides[1] * width), value=-1)
    key_start = padded.unfold(0, span, width)                                       # (blocks, span)
    query_start = padded[sides[0] * width:][:blocks * width].view(blocks, width)
    # key place - query place
    distance = torch.arange(span, device=device) - torch.arange(width, device=device)[:, None] - sides[0] * width
    near = (distance >= -window_size[0]) & (distance <= window_size[1])
    visible = (key_start[:, None, :] == query_start[:, :, None]) & near
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))[:, None]


@_disable_dynamo
@functools.cache
def _flash_candidates() -> tuple[Backend, ...]:
    """The flash implementations that this environment and GPU can run, best first."""
    capability, found = torch.cuda.get_device_capability(), []
    if importlib.util.find_spec("flash_attn_interface") and capability[0] == 9:
        found.append(Backend("flash_attn_3", "flash-attn 3 is installed and this is a Hopper GPU"))
    if capability >= (8, 0) and importlib.util.find_spec("flash_attn"):
        found.append(Backend("flash_attn_2", "flash-attn 2 is installed"))
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if capability >= (8, 0) and version >= (2, 11):  # 2.10 has the function, but without windows
        found.append(Backend("varlen_attn", f"torch {torch.__version__} brings varlen_attn with windows"))
    return tuple(found)


def select_backend(wish: str, device_type: str, dtype: torch.dtype) -> Backend:
    """The attention implementation for this device and dtype; a `flash` that cannot be had is an error."""
    if wish not in ("auto", "flash", "reference"):
        raise ValueError(f"model.attn_impl must be auto, flash or reference, got {wish!r}")
    if wish == "reference":
        return Backend("reference", "asked for by model.attn_impl")
    if device_type != "cuda":
        obstacle = f"flash kernels need a CUDA device and this is {device_type}"
    elif dtype not in (torch.bfloat16, torch.float16):
        obstacle = f"flash kernels need bf16 or fp16 and this is {dtype}"
    elif not _flash_candidates():
        obstacle = "flash kernels need an Ampere GPU or newer with flash-attn, or torch >= 2.11"
    else:
        return _flash_candidates()[0]
    if wish == "flash":
        raise ValueError(f"model.attn_impl must be auto or reference here, got 'flash': {obstacle}")
    return Backend("reference", obstacle)
