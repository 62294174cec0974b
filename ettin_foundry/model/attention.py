"""Attention over a flat stream of documents: one signature; flash kernels, flex_attention and a reference path.

Windows are flash-attn's: (left, right), both ends included, -1 for no limit; causal is right == 0. The reference path,
SDPA on any device and dtype, defines the meaning. Flash kernels are flash-attn's 3 and 2, where installed, and torch's
`varlen_attn` (torch >= 2.11). flex_attention (torch >= 2.7) skips blocks of keys that a block of queries does not see.
backends.py chooses. Shapes: N tokens, D documents, H heads, K head dimension, W block width, B blocks of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLEX_BLOCK = 128  # queries or keys: what kernels of flex_attention are tuned for


class Documents:
    """Where documents lie in a flat stream: (D + 1,) int32 offsets; the longest's length, a Python int (reading it from
    the device would stall the step); (N,) int64, the place of each token in its own document."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, position_ids: Tensor) -> None:
        self.cu_seqlens, self.max_seqlen, self.position_ids = cu_seqlens, max_seqlen, position_ids
        self._cache: dict[object, Any] = {}  # masks are the same in every layer of one forward

    def cached(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """make(self, *arguments), made once."""
        key = (make.__name__, *arguments)
        if key not in self._cache:
            self._cache[key] = make(self, *arguments)
        return self._cache[key]


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window_size: tuple[int, int],
              backend: str = "reference") -> Tensor:
    """(N, H, K) softmax attention inside each document, scale K ** -0.5.

    q, k, v: (N, H, K), of one dtype, bf16 or fp16 for the flash backends. backend: `flash_attn_3`, `flash_attn_2`,
    `varlen_attn`, `flex_attention`, `reference`, or `padded`, for documents that attend by themselves (hub/parity.py).
    """
    if q.shape[0] == 0:  # flash kernels refuse it; returned as it is, so that every rank has gradients to reduce
        return q
    if backend == "padded":
        return documents.attend(q, k, v, window_size)  # type: ignore
    if backend == "reference":
        return (_reference_global if window_size[0] < 0 else _reference_local)(q, k, v, documents, window_size)
    if backend == "flex_attention":  # for compiled code: as it is, and in a backward on a CPU, it makes (N, N) scores
        from torch.nn.attention.flex_attention import flex_attention

        options = {"BLOCKS_ARE_CONTIGUOUS": True, "FORCE_USE_FLEX_ATTENTION": True}  # not its kernel for decoding
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, N, K) each
        out: Any = flex_attention(q, k, v, block_mask=documents.cached(block_mask, window_size), kernel_options=options)
        return out.squeeze(0).transpose(0, 1)  # indexed, a gradient would be copied into zeros
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
        lengths = [n for n in documents.cu_seqlens.diff().tolist() if n]
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

    mask = documents.cached(local_mask, window_size, q.dtype)
    queries = F.pad(q, (0, 0, 0, 0, 0, blocks * width - num_tokens)).view(blocks, width, heads, dim).transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys(k), keys(v), attn_mask=mask)
    return out.transpose(1, 2).reshape(blocks * width, heads, dim)[:num_tokens]


def _block_shape(window_size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """W, and how many blocks of keys to the left and to the right of a query's own can be visible."""
    return max(*window_size, 16), (1, 1 if window_size[1] else 0)


def local_mask(documents: Documents, window_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """(blocks, 1, W, (1 + sum(sides)) * W), 0 where a key is visible and -inf elsewhere."""
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


def block_mask(documents: Documents, window_size: tuple[int, int]) -> Any:
    """flex_attention's BlockMask of a stream with tokens, without a read from its device.

    Every token sees an interval of keys around itself, whose ends never go back from one token to the next. So what a
    block of queries sees is one interval of blocks, and so is what sees a block of keys: first and number say all.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (left, right), num_tokens = window_size, documents.position_ids.shape[0]
    token = torch.arange(num_tokens, device=documents.position_ids.device, dtype=torch.int32)
    low, high = token - documents.position_ids.int(), token
    low = low if left < 0 else torch.maximum(low, token - left)
    if right:
        high = documents.cu_seqlens[torch.searchsorted(documents.cu_seqlens, token, right=True)] - 1
        high = high if right < 0 else torch.minimum(high, token + right)
    # kernels look up to the end of the last block: there is memory, and no token is visible
    rest = -num_tokens % FLEX_BLOCK
    low, high = F.pad(low, (0, rest), value=num_tokens), F.pad(high, (0, rest), value=num_tokens - 1)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= low[query]) & (key <= (high[query] if right else query))

    first, last = low[::FLEX_BLOCK] // FLEX_BLOCK, high[FLEX_BLOCK - 1::FLEX_BLOCK] // FLEX_BLOCK  # (B,) blocks of keys
    block = torch.arange(len(first), device=token.device, dtype=torch.int32)
    first_query = torch.searchsorted(last, block, out_int32=True)
    last_query = torch.searchsorted(first, block, right=True, out_int32=True) - 1
    of_keys, of_queries = (((end - start + 1)[None, None], start[None, None, :, None])  # (1, 1, B) and (1, 1, B, 1)
                           for start, end in ((first, last), (first_query, last_query)))
    return BlockMask((num_tokens, num_tokens), *of_keys, None, None, *of_queries, None, None,
                     BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK), mask_mod=mask_mod)
