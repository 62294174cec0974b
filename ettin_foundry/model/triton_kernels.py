"""Triton kernels of `kernels.py`: what they compute and when they are used is said there.

Imported on a GPU only, for Triton takes seconds. Math is fp32, storage the tensors' dtype; no atomics, so every result
is the same bits again. `TRITON_INTERPRET=1` before the import runs them on CPU tensors.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

_ROWS = 64  # rows whose bias gradient one program sums: partial sums are 8 / 64 bytes a logit


@library.triton_op("ettin::gelu_gate", mutates_args=())
def gelu_gate(x: Tensor) -> Tensor:
    activated, gate = x.chunk(2, dim=-1)
    return F.gelu(activated) * gate  # compiled, each byte is moved once: only the backward needs a kernel


@triton.jit
def _gelu_gate_backward_kernel(x, grad_out, grad_x, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                               COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, place = (row < rows) & (column < WIDTH), row * (2 * WIDTH) + column
    a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_out + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    cdf = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
    tl.store(grad_x + place, grad * gate * (cdf + a * density), mask=inside)
    tl.store(grad_x + place + WIDTH, grad * a * cdf, mask=inside)


@library.triton_op("ettin::gelu_gate_backward", mutates_args=())
def gelu_gate_backward(x: Tensor, grad_out: Tensor) -> Tensor:
    grad_x, (rows, width) = torch.empty_like(x), grad_out.shape
    columns = min(1024, max(64, width & -width))  # divides the width where it is even enough: accesses of 16 bytes
    grid = (triton.cdiv(rows, 1024 // columns), triton.cdiv(width, columns))
    kernel = _gelu_gate_backward_kernel
    kernel = library.wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel  # or interpreted
    if rows:
        kernel[grid](x, grad_out, grad_x, rows, WIDTH=width, ROWS=1024 // columns, COLUMNS=columns)
    return grad_x


gelu_gate.register_autograd(
    lambda ctx, grad: gelu_gate_backward(*ctx.saved_tensors, grad.contiguous()),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@triton.jit
def _softmax_kernel(logits, labels, weights, losses, tops, scales, vocabulary, BLOCK: tl.constexpr):
    """One row: its loss, its largest logit and what its exponentials are multiplied with."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocabulary
    top, total = -3.0e38, 0.0  # finite, so that a tile of -inf gives no NaN
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        old, top = top, tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(old - top) + tl.sum(tl.exp(x - top), 0)
    loss = tl.log(total) + (top - tl.load(logits + tl.load(labels + row)).to(tl.float32))
    weight = tl.load(weights + row) if weights is not None else 1.0
    tl.store(losses + row, loss * weight)
    tl.store(tops + row, top)
    tl.store(scales + row, weight / total)


@triton.jit(do_not_specialize=["rows"])
def _softmax_gradient_kernel(logits, labels, weights, tops, scales, partial, rows, vocabulary,
                             ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of columns of ROWS rows: the gradient in place of the logits, and its sum over these rows."""
    column, block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    inside = column < vocabulary
    place = logits + (block * ROWS).to(tl.int64) * vocabulary + column
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(block * ROWS, tl.minimum(block * ROWS + ROWS, rows)):
        x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
        weight = tl.load(weights + row) if weights is not None else 1.0
        gradient = tl.exp(x - tl.load(tops + row)) * tl.load(scales + row)
        gradient = tl.where(column == tl.load(labels + row), gradient - weight, gradient)
        tl.store(place, gradient, mask=inside)
        total += gradient
        place += vocabulary
    tl.store(partial + block.to(tl.int64) * vocabulary + column, total, mask=inside)


def losses_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    (rows, vocabulary), new = logits.shape, logits.new_empty
    losses, tops, scales = (new(rows, dtype=torch.float32) for _ in range(3))
    blocks = triton.cdiv(rows, _ROWS)
    partial = new(blocks, vocabulary, dtype=torch.float32)
    if rows:
        _softmax_kernel[(rows,)](logits, labels, weights, losses, tops, scales, vocabulary, BLOCK=4096, num_warps=8)
        _softmax_gradient_kernel[(triton.cdiv(vocabulary, 2048), blocks)](
            logits, labels, weights, tops, scales, partial, rows, vocabulary, ROWS=_ROWS, BLOCK=2048)
    return losses, partial.sum(0)
