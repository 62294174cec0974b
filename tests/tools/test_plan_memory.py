"""Planned memory against the tensors that autograd really keeps, counted through its hooks, and sums written out by hand."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from streams import flat_stream, synthetic_documents  # noqa: E402

from ettin_foundry.model import loss  # noqa: E402
from ettin_foundry.model import transformer as model
from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.tools.plan_memory import SLICE_ELEMENTS, Step, saved_bytes, step_memory  # noqa: E402

VOCAB_SIZE = 4096


class FlashStandIn(torch.autograd.Function):
    """Keeps what flash-attn 2.7.4's FlashAttnVarlenFunc keeps (flash_attn_interface.py): q, k, v, out, and fp32 lse."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.contiguous().clone()
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32))
        return out


def counted(config, objective, tokens, *, half, flash, monkeypatch):
    """(bytes of the storages that a forward pass leaves for backward, targets); parameters are not counted."""
    if flash:
        monkeypatch.setattr(model, "attention", lambda q, k, v, *rest: FlashStandIn.apply(q, k, v))
    net = model.Ettin(config, "reference").train()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    b = flat_stream(synthetic_documents(tokens, 512, VOCAB_SIZE, seed=1), objective, VOCAB_SIZE - 1, seed=1)
    kept = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=half):
        net(b["input_ids"], b["position_ids"], b["cu_seqlens"], b["max_seqlen"], b["target_positions"], b["target_labels"])
    sizes = [t.untyped_storage().nbytes() for address, t in kept.items() if address not in own]
    return sum(sizes), b["num_targets"]


@pytest.mark.parametrize("half, flash", [(False, False), (True, True)], ids=["fp32 reference", "bf16 flash"])
@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("size", ["nano", "17m"])
def test_saved_tensors_are_planned_to_the_byte(size, objective, half, flash, monkeypatch):
    config = EttinConfig.for_size(size, causal=objective == "clm", vocab_size=VOCAB_SIZE, local_rope_theta=9_000.0)
    for tokens in (260, 512):  # 260 is no multiple of the reference path's blocks of 64 and 63
        measured, targets = counted(config, objective, tokens, half=half, flash=flash, monkeypatch=monkeypatch)
        step = Step(config, tokens, targets, flash=flash, on_gpu=False, half=half)
        assert sum(saved_bytes(step).values()) == measured


def test_a_gpu_keeps_what_the_cpu_keeps_but_for_dropout_and_the_heads_norm():
    """By hand for one layer of bf16 with flash attention; not measured, for no GPU is here."""
    config = EttinConfig.for_size("nano", causal=False, num_hidden_layers=1)
    c, i, v, tokens, targets = 128, 192, 50368, 1000, 300
    saved = saved_bytes(Step(config, tokens, targets))
    layer = (2 * c                         # what Wqkv multiplies
             + 2 * 3 * c + 2 * 2 * c       # its output; q and k rotated
             + 2 * c + 4 * 2               # out, lse of two heads
             + c                           # dropout: a byte each
             + 4 * c + 8 + 2 * c           # norm's input, mean, deviation; what Wi multiplies
             + 2 * 2 * i + 2 * i + 2 * i)  # Wi's output, gelu, product
    assert saved["layers"] == layer * tokens
    assert saved["around"] == (8 + 2 * (4 * c + 8) + 2 * 32 * 4) * tokens  # ids, two norms, cos and sin of one theta
    assert saved["head"] == targets * (8 + 2 * c + 2 * c + 4 * c + 8)
    assert saved["loss"] == 4 * targets * c + 4 * v * c + 4 * v
    assert saved["cast weights"] == 2 * (4 * c * c + 3 * c * i + c * c)


def test_recomputed_layers_keep_their_inputs_and_one_layer_in_full():
    step = Step(EttinConfig.for_size("150m", causal=False), 4096, 1000)
    one = saved_bytes(dataclasses.replace(step, config=EttinConfig.for_size("150m", causal=False, num_hidden_layers=2)))
    first = saved_bytes(dataclasses.replace(step, config=EttinConfig.for_size("150m", causal=False, num_hidden_layers=1)))
    less = saved_bytes(dataclasses.replace(step, recompute=True))
    assert less["layers"] == 22 * 4 * 768 * 4096 + (one["layers"] - first["layers"])
    assert {k: v for k, v in less.items() if k != "layers"} == {k: v for k, v in saved_bytes(step).items() if k != "layers"}


def test_weights_gradients_and_moments_lie_whole_or_in_shares():
    step = Step(EttinConfig.for_size("400m", causal=True), 2048, 2047)
    whole, weights = step_memory(step), 4 * 395_881_664
    assert (whole.parameters, whole.gradients, whole.moments, whole.copies) == (weights, weights, 2 * weights, 0)
    assert step_memory(dataclasses.replace(step, ranks=4)).copies == weights  # DDP's buckets
    shared = step_memory(dataclasses.replace(step, ranks=4, sharded=True))
    assert (shared.parameters, shared.gradients, shared.moments) == (weights // 4, weights // 4, weights // 2)
    assert step_memory(dataclasses.replace(step, averages=1)).copies == weights
    assert step_memory(dataclasses.replace(step, accumulates=False)).gradients == 0
    assert whole.total == whole.resident + max(whole.activations + whole.loss, whole.update)


def test_the_slice_of_logits_is_the_losses():
    assert SLICE_ELEMENTS == {kind == "cuda": number for kind, number in loss._SLICE_ELEMENTS.items()}
