"""Memory of one device in a training step, from what this implementation keeps: the terms are those of model.py,
attention.py, loss.py and optim.py, tensor by tensor.

What has been held against measurements: the tensors that autograd keeps, on the CPU, in fp32 with the reference attention
and in bf16 autocast with flash attention's own saved tensors in its place (tests/test_plan_memory.py), and the peak of a
whole step of 17m on a CPU (benchmarks/plan_memory.py). The sums for a GPU come from the same terms; none has been measured
there. Not counted: the CUDA context, kernels' workspaces and what the allocator cannot use (SLACK_GIB stands for them).

Letters, per token unless said: C hidden, I GLU width, H heads, V vocabulary, e bytes of an element in matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

from ettin_foundry.model.config import EttinConfig

__all__ = ["SLACK_GIB", "SLICE_ELEMENTS", "Memory", "Step", "saved_bytes", "step_memory"]

SLICE_ELEMENTS = {False: 2**25, True: 2**28}
"""{on a GPU: logits that the loss has at a time}; loss.py's table, which cannot be read without torch."""

SLACK_GIB = 2.0
"""Left free when a microbatch is called fitting."""

_FP32 = 4


@dataclass(frozen=True)
class Step:
    """One microbatch on one device, and what stands around it."""

    config: EttinConfig
    """Of the kind, causal or not, that the microbatch has."""
    tokens: int
    targets: int
    """0 for a model that predicts none (contrastive)."""
    flash: bool = True
    """Flash attention; else the reference path, which keeps other tensors on a GPU than on a CPU."""
    on_gpu: bool = True
    half: bool = True
    """amp_bf16 or amp_fp16; else fp32."""
    mean_document: float = 1024.0
    """Tokens: the reference path on a GPU pads every document to the longest."""
    longest_document: int = 1024
    ranks: int = 1
    sharded: bool = False
    """fsdp_config: parameters, gradients and moments are divided over the ranks; else every rank has all (DDP)."""
    recompute: bool = False
    """fsdp_config.activation_checkpointing: a layer keeps its input only."""
    accumulates: bool = True
    """Several microbatches a step, so that gradients of earlier ones are there during the forward pass."""
    averages: int = 0
    """Copies of the weights kept by weight averaging."""

    @property
    def element(self) -> int:
        return 2 if self.half else _FP32


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    gradients: int
    moments: int
    copies: int
    """DDP's buckets of gradients, FSDP's gathered parameters and their gradients, averaged weights."""
    activations: int
    """What autograd keeps of one microbatch, with weights cast to 16 bits."""
    loss: int
    """What comes on top in the worst moment of the loss or of the first layer's backward."""
    update: int
    """Temporaries at the end of backward and in the optimizer, when the activations are gone."""

    @property
    def resident(self) -> int:
        return self.parameters + self.gradients + self.moments + self.copies

    @property
    def total(self) -> int:
        """The peak."""
        return self.resident + max(self.activations + self.loss, self.update)


def _blocks(step: Step) -> tuple[int, int]:
    """Of the reference path's local layers: tokens of a block, and blocks of keys that a block of queries sees."""
    left, right = step.config.local_window
    return max(left, right, 16), 3 if right else 2


def _attention_bytes(step: Step, layer: int) -> float:
    """Of a token in one layer: what attention keeps between rotation and the output projection."""
    config, e, c = step.config, step.element, step.config.hidden_size
    lse = _FP32 * config.num_attention_heads
    if step.flash:  # Wqkv's output (v is a part of it, so all stays), rotated q and k, and out, which Wo multiplies
        return e * (3 * c + 2 * c + c) + lse
    if not config.is_global(layer):
        width, seen = _blocks(step)
        filled = -(-step.tokens // width) * width / max(1, step.tokens)
        return filled * (e * (c + 2 * c * seen + c) + lse)  # q, k and v for each block that sees them, and out, for Wo too
    if not step.on_gpu:  # Wqkv's output, rotated q and k, out of each document, and all of them joined for Wo
        return e * (3 * c + 2 * c + c + c) + lse
    padded = max(1.0, step.longest_document / step.mean_document)
    mask = e * step.longest_document if config.causal else 0  # (D, 1, M, M), as a bias
    # padded q, k, v and out, the place that each came from; out of real tokens, and two places each to find it
    return padded * (e * 4 * c + lse + 8 + mask) + e * c + 16


def _layer_bytes(step: Step, layer: int) -> float:
    """Of a token in one layer."""
    c, i, e = step.config.hidden_size, step.config.intermediate_size, step.element
    norm = _FP32 * c + 2 * _FP32  # the residual stream, which stays fp32, with mean and deviation
    dropout = c * (1 if step.on_gpu else e) if step.config.attn_out_dropout else 0  # a mask of bools, or of numbers
    return ((norm if layer else 0) + e * c          # norm (the first layer has none), what Wqkv multiplies
            + _attention_bytes(step, layer) + dropout
            + norm + e * c                          # norm, what Wi multiplies
            + e * (2 * i + i + i))                  # Wi's output, gelu of its half, the product that Wo multiplies


def _target_bytes(step: Step) -> int:
    """Of a target: its place, and the head's dense input, output, norm input with mean and deviation."""
    c, e = step.config.hidden_size, step.element
    norm = c * (_FP32 if step.on_gpu else e)  # autocast widens norms on a GPU
    return 8 + 2 * e * c + norm + 2 * _FP32


def saved_bytes(step: Step) -> dict[str, int]:
    """Bytes that autograd keeps of one microbatch, parameters not counted, by what they belong to."""
    config, e, c = step.config, step.element, step.config.hidden_size
    num_layers, matrices = config.num_hidden_layers, 4 * c * c + 3 * c * config.intermediate_size
    angles = 4 * config.head_dim * len({config.global_rope_theta, config.local_rope_theta})  # cos and sin, fp32
    around = 8 + 2 * (_FP32 * c + 2 * _FP32) + angles  # ids, embedding norm and final norm
    mask = 0
    if not step.flash and num_layers > 1:
        width, seen = _blocks(step)
        mask = -(-step.tokens // width) * width * e * width * seen  # one for all local layers, of every block
    if step.recompute:
        layers = num_layers * _FP32 * c + max(_layer_bytes(step, layer) for layer in range(num_layers))
    else:
        layers = sum(_layer_bytes(step, layer) for layer in range(num_layers))
    loss = 0
    if step.targets:  # gradients that the loss has made in forward: of its input, the output matrix and bias
        grad_hidden = step.targets * c * (_FP32 if step.on_gpu else e)
        loss = grad_hidden + _FP32 * config.vocab_size * (c + 1)
    return {"layers": round(layers * step.tokens), "around": around * step.tokens + mask,
            "head": step.targets * _target_bytes(step), "loss": loss,
            "cast weights": 2 * (num_layers * matrices + (c * c if step.targets else 0)) if step.half else 0}


def _loss_bytes(step: Step, saved: dict[str, int]) -> int:
    """What the worst of three moments adds to the saved tensors."""
    config, e = step.config, step.element
    matrix = _FP32 * config.vocab_size * config.hidden_size
    backward = step.tokens * (_FP32 * config.hidden_size + 5 * e * config.intermediate_size)  # of the last layer's GLU
    if not step.targets:
        return backward
    rows = min(step.targets, max(256, SLICE_ELEMENTS[step.on_gpu] // config.vocab_size))
    logits = rows * config.vocab_size * (8 if step.half else _FP32)  # half: logits, scores in fp32, gradient
    forward = logits + rows * config.hidden_size * e + (matrix if step.half else 0)  # half: the matrix cast, and a product
    scaled = matrix + _FP32 * step.targets * config.hidden_size  # backward of the loss copies both gradients
    later = matrix + backward - saved["head"] - saved["loss"]  # the matrix's gradient waits for that of the embedding
    return max(forward, scaled, later)


def step_memory(step: Step) -> Memory:
    """The peak of a step, in its terms."""
    config = step.config
    num_bytes, shards = _FP32 * config.num_parameters, step.ranks if step.sharded else 1
    own = -(-num_bytes // shards)
    matrix = _FP32 * config.vocab_size * config.hidden_size
    copies = step.averages * own
    if step.sharded:
        # whole while in use, and their gradients: what is outside of the blocks, and two blocks (one fetched ahead)
        block = _FP32 * config.num_layer_parameters // config.num_hidden_layers
        outside = num_bytes - _FP32 * config.num_layer_parameters
        copies += 2 * (outside + 2 * block)
    elif step.ranks > 1:
        copies += num_bytes
    saved = saved_bytes(step)
    gradients = own if step.accumulates else 0
    # the tied matrix's two gradients before they are added; the optimizer needs as much for the same matrix
    update = 2 * -(-matrix // shards) + (0 if step.accumulates else own)
    return Memory(own, gradients, 2 * own, copies, sum(saved.values()), _loss_bytes(step, saved), update)
