"""The GPU path: flash kernels, flex_attention, torch.compile, bf16, and a step that never waits for the device.

Needs a CUDA device, torch >= 2.11 (or flash-attn), numpy and pytest; the last test also needs the host.
"""

import gc
import os

import pytest
import torch
import torch.nn.functional as F
from test_attention import every_window, naive
from test_transformer import stream, targets

from ettin_foundry.model.attention import Documents, attention, block_mask
from ettin_foundry.model.backends import candidates
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.loss import linear_cross_entropy
from ettin_foundry.model.transformer import Ettin

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need, from the first on
DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = [1, 70, 200, 5, 64, 131, 300, 129]  # shorter than, equal to and beyond windows and kernel tiles
both_kinds = pytest.mark.parametrize("objective", ["mlm", "clm"])


@pytest.fixture(autouse=True)
def settings_of_torch():
    """fp32 references must not be made with TF32's 10 bits; what a test sets ends with it."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def bf16():
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)


def batch_of(lengths, objective, seed=0):
    """Arguments of Ettin.forward, on the device."""
    *tensors, longest = stream(lengths, seed)
    ids, positions, cu_seqlens, *of_targets = (
        x.to(DEVICE) for x in (*tensors, *targets(lengths, objective == "clm", seed)))
    return ids, positions, cu_seqlens, longest, *of_targets


def model_of(objective, attn_impl, dropout=0.0):
    torch.manual_seed(0)
    config = EttinConfig.for_size("nano", causal=objective == "clm", vocab_size=320, attn_out_dropout=dropout)
    model = Ettin(config, attn_impl).to(DEVICE)
    if attn_impl == "flex":
        model.compile_blocks()
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(*batch).nll / len(batch[-1])
    loss.backward()
    return loss.detach().float(), torch.cat([p.grad.float().flatten() for p in model.parameters()])


def distance(x, y):
    """Relative distance of two vectors in the 2-norm."""
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("path", ["flash", "flex", "reference"])
@every_window
def test_attention_in_bf16_equals_a_float64_softmax_forward_and_backward(window, path):
    torch.manual_seed(0)
    _, positions, cu_seqlens, longest, *_ = batch_of(LENGTHS, "mlm")
    q, k, v, weight = (torch.randn(sum(LENGTHS), 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    rounded = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = naive(*exact, LENGTHS, window)
    expected.backward(weight.double())
    [backend, *_], _ = candidates(path, "cuda", torch.bfloat16, compiled=True)
    documents, function = Documents(cu_seqlens, longest, positions), attention
    if path == "flex":
        function, _ = torch.compile(attention, dynamic=False), documents.cached(block_mask, window)
    out = function(*rounded, documents, window, backend)
    out.backward(weight)
    # bf16 keeps 8 bits: outputs and probabilities are off by 2^-9 each. A wide window off by one gives above 0.05 here
    assert distance(out.detach().double(), expected.detach()) < 0.008
    for name, x, y in zip("qkv", rounded, exact):
        assert distance(x.grad.double(), y.grad) < 0.016, f"gradient of {name}"  # differences of such products


@both_kinds
def test_a_step_in_bf16_is_that_in_fp32_up_to_rounding(objective):
    """Step by step: curves of many steps drift apart in any precision."""
    model, exact = model_of(objective, "flash"), model_of(objective, "reference")  # of the same seed
    with torch.no_grad():  # at the initial 0.02 attention hardly shows
        for parameter in (*model.parameters(), *exact.parameters()):
            parameter.mul_(5 if parameter.ndim == 2 else 1)
    for seed in range(3):
        batch = batch_of(LENGTHS, objective, seed)
        with bf16():
            loss, gradient = loss_and_gradients(model, batch)
        expected, expected_gradient = loss_and_gradients(exact, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)  # 2^-9 a logit, over hundreds of targets
        assert distance(gradient, expected_gradient) < 0.02  # on a CPU 0.008; half the window gives 0.1


@pytest.mark.parametrize("attn_impl", ["flash", "flex"])
@both_kinds
def test_gradients_are_the_same_bits_again_where_deterministic_algorithms_are_asked_for(objective, attn_impl):
    model, batch = model_of(objective, attn_impl), batch_of(LENGTHS * 8, objective)
    torch.use_deterministic_algorithms(True)
    with bf16():
        first, second = (loss_and_gradients(model, batch) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("attn_impl", ["flash", "flex"])
@both_kinds
def test_compiled_blocks_equal_eager_ones_without_recompiling_for_other_documents(objective, attn_impl):
    torch._dynamo.reset()
    model, compiled = model_of(objective, "flash"), model_of(objective, attn_impl)  # of the same seed
    if attn_impl == "flash":
        compiled.compile_blocks()
    with bf16():
        for number, lengths in enumerate([LENGTHS, LENGTHS[::-1], [300] * 3, [50] * 18]):  # 900 tokens each
            ids, positions, cu_seqlens, _, *targets = batch_of(lengths, objective, seed=number)
            batch = (ids, positions, cu_seqlens, 512, *targets)
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                loss, gradient = loss_and_gradients(compiled, batch)
            eager_loss, eager_gradient = loss_and_gradients(model, batch)
            # fused kernels keep fp32 where eager rounds to bf16 between two operations
            torch.testing.assert_close(loss, eager_loss, rtol=2e-3, atol=0)
            assert distance(gradient, eager_gradient) < 0.03


@pytest.mark.parametrize("attn_impl", ["flash", "flex", "reference"])
@both_kinds
def test_step_reads_nothing_back_from_the_device(objective, attn_impl):
    model = model_of(objective, attn_impl, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batch = batch_of([*LENGTHS * 4, 512], objective)  # above 3,072 tokens the embedding's backward sorts
    for forbidden in (False, True):  # once to warm up: kernels are chosen and compiled with reads of their own
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
        with bf16():
            loss = model(*batch).nll / len(batch[-1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(RuntimeError):  # the guard itself works
        loss.item()


@pytest.mark.parametrize(("in_bf16", "of_loss", "of_gradients"), [
    (False, 1e-5, 1e-4),  # fp32 sums over 16,384 targets or 50,368 entries in another order
    (True, 1e-3, 0.02)], ids=["fp32", "bf16"])  # bf16 products; in the loss their errors average
def test_lean_loss_equals_plain_cross_entropy_and_needs_less_memory(in_bf16, of_loss, of_gradients):
    n, width, vocab = 16_384, 256, 50_368
    hidden, weight = torch.randn(n, width, device=DEVICE), torch.randn(vocab, width, device=DEVICE) * 0.05
    bias, labels = torch.randn(vocab, device=DEVICE) * 0.1, torch.randint(vocab, (n,), device=DEVICE)
    found, peaks, lean = {}, {}, linear_cross_entropy

    def plain(hidden, weight, bias, labels):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum"), None

    for name, function, enabled in (("exact", plain, False), ("plain", plain, in_bf16), ("warm up", lean, in_bf16),
                                    ("lean", lean, in_bf16)):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            loss, _ = function(*inputs, labels)
        (loss / n).backward()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        found[name] = [loss.detach(), *(x.grad for x in inputs)]
    torch.testing.assert_close(found["lean"][0], found["exact"][0], rtol=of_loss, atol=0)
    for ours, exact in zip(found["lean"][1:], found["exact"][1:]):
        assert distance(ours, exact) < of_gradients
    assert peaks["lean"] < peaks["plain"] / 3


@both_kinds
def test_trainer_runs_nano_on_the_gpu_in_bf16_with_flash(objective, tmp_path, request):
    pytest.importorskip("llmfoundry", exc_type=ImportError)
    import nano_run

    import ettin_foundry

    ettin_foundry.register()  # its entry points are not there where the package lies on the path only
    capture, kind = nano_run.register_capture(), nano_run.CLM if objective == "clm" else []
    trainer = nano_run.run(request.getfixturevalue("data_set"), tmp_path / "out", *kind, "model.vocab_size=512",
                           "precision=amp_bf16", "model.attn_impl=flash", "callbacks.capture={}")
    assert len(capture.losses) == 8 and capture.losses[-1] < capture.losses[0]
    model = trainer.state.model
    model = getattr(model, "module", model).model
    assert model.output_bias.is_cuda and model.attn_impl == "flash"  # which is refused where there is none
    trainer.close()
