"""Kernels in Triton for CUDA, where the compiler moves more bytes than needed, each beside its definition in torch.

The definition is what runs on other devices, in float64, and where Triton cannot be imported. `benchmarks/kernels.py`
counts the bytes. N tokens, I the width of the GLU, s targets, V vocabulary.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

ENABLED = True  # False: the definitions everywhere, to compare with on a GPU
_module: Any = None  # `triton_kernels` once imported, False where that failed


def load() -> None:
    """Imports the kernels, for Triton takes seconds, or logs why there are none; before code with them is compiled."""
    global _module
    if _module is None:
        try:
            _module = importlib.import_module("ettin_foundry.model.triton_kernels")
        except Exception as error:  # a broken Triton raises anything
            log.warning("Triton cannot be used, plain torch is, which is slower: %s: %s", type(error).__name__, error)
            _module = False


def fused(x: Tensor) -> Any:
    """The module `triton_kernels` if this tensor can go through it, else None."""
    if not (ENABLED and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)):
        return None
    if not torch.compiler.is_compiling():
        load()
    return _module or None


def gelu_gate(x: Tensor) -> Tensor:
    """(N, 2I) to (N, I): exact GELU of the first half times the second half, as in the reference."""
    if (module := fused(x)) is not None:  # the compiler's own backward computes both halves for every element
        return module.gelu_gate(x.contiguous())
    activated, gate = x.chunk(2, dim=-1)
    return F.gelu(activated) * gate


def losses_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of (s, V) logits: (s,) fp32 losses, gradients of their sum by logits and by the bias.

    The logits' storage is free to be used. The gradients are (s, V) in the logits' dtype and (V,) in fp32 or wider.
    labels: (s,) int64. weights: (s,) fp32 factors of losses and gradients, or None.
    """
    if (module := fused(logits)) is not None:
        losses, grad_bias = module.losses_and_gradient(logits, labels, weights)
        return losses, logits, grad_bias
    scores = logits.float()
    top = scores.amax(-1, keepdim=True)
    label_scores = scores.gather(-1, labels[:, None])
    gradient = scores.sub_(top).exp_()  # one exp for loss and gradient
    total = gradient.sum(-1, keepdim=True)
    losses = (top + total.log() - label_scores)[:, 0]
    gradient.div_(total)
    gradient.scatter_add_(-1, labels[:, None], gradient.new_full((1, 1), -1.0).expand(labels.shape[0], 1))
    gradient = gradient.to(logits.dtype)
    if weights is not None:
        losses = losses * weights
        gradient.mul_(weights[:, None])
    return losses, gradient, gradient.sum(0, dtype=torch.promote_types(logits.dtype, torch.float32))
