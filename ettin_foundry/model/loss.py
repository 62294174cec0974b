"""Cross-entropy over target positions, with the vocabulary projection inside and never all logits at once.

A decoder predicts at every token: with 50,368 entries and 32k tokens, fp32 logits are 6.6 GB, kept twice by autograd.
Here projection, loss and gradients are done for a slice of targets at a time, in the forward pass; one (n, C) and one
(V, C) gradient are kept for backward. Shapes: n targets, s targets of a slice, C hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler at once, which takes seconds

from ettin_foundry.model import kernels

# logits alive at a time: large enough for full GEMM speed, small enough to be nothing beside the activations
_SLICE_ELEMENTS = {"cpu": 2**25, "cuda": 2**29}


@_disable_dynamo  # the number of slices depends on the batch; tracing the loop would recompile for each
def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,
                         target_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sum over targets of -log softmax(hidden @ weight.T + bias)[label], each times its weight: scalar fp32, in nats.

    Softmax and sums are in fp32 or wider, products in autocast's dtype if it is on. The second value, under no_grad
    only, is how many labels are the most probable entry: scalar int64.

    hidden: (n, C), n may be 0. weight: (V, C). bias: (V,). labels: (n,) int64. target_weights: (n,) fp32.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, target_weights), None  # type: ignore
    total = hidden.new_zeros((), dtype=torch.float32)
    correct = hidden.new_zeros((), dtype=torch.int64)
    with _in_compute_dtype(hidden, weight, bias) as (hidden, weight, bias):
        for logits, index, part in _slices(hidden, weight, bias, labels):
            logits = logits.float()
            losses = torch.logsumexp(logits, -1) - logits.gather(-1, index[:, None])[:, 0]
            total += (losses if target_weights is None else losses * target_weights[part]).sum()
            correct += (logits.argmax(-1) == index).sum()
    return total, correct


@contextlib.contextmanager
def _in_compute_dtype(*tensors: Tensor):
    """The tensors in autocast's dtype if it is on (each cast once, not once a slice), with autocast off inside."""
    kind = tensors[0].device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else tensors[0].dtype
    with torch.autocast(kind, enabled=False) if autocast else contextlib.nullcontext():
        yield tuple(t.to(dtype) for t in tensors)


def _slices(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor):
    """Yields (logits (s, V), labels (s,), slice); one buffer, since fresh memory costs more than the softmax."""
    step = max(256, _SLICE_ELEMENTS.get(hidden.device.type, 2**25) // weight.shape[0])
    buffer = hidden.new_empty(min(step, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        logits = torch.addmm(bias, hidden[part], weight.t(), out=buffer[:labels[part].shape[0]])
        yield logits, labels[part], part


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the sum are computed in forward and scaled in backward (the loss is a scalar)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor,  # type: ignore
                target_weights: Tensor | None) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        # sums over slices are never narrower than fp32, also where FSDP hands out the weights in bf16
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight, grad_bias = torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        with _in_compute_dtype(hidden, weight, bias) as (hidden_c, weight_c, bias_c):
            for logits, index, part in _slices(hidden_c, weight_c, bias_c, labels):
                weights = None if target_weights is None else target_weights[part]
                losses, gradient, part_of_bias = kernels.losses_and_gradient(logits, index, weights)
                total += losses.sum()
                grad_hidden[part] = gradient @ weight_c
                if weight_c.dtype == wide:
                    grad_weight.addmm_(gradient.t(), hidden_c[part])
                else:
                    grad_weight += gradient.t() @ hidden_c[part]
                grad_bias += part_of_bias
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):  # type: ignore
        # out of place: with retain_graph a second backward must find the same gradients
        return (*((g * grad_total).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes)), None, None)
