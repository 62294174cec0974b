"""The sliced loss equals torch's own cross-entropy on dense logits, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

import ettin_foundry.loss as module
from ettin_foundry.loss import count_correct, linear_cross_entropy


def inputs(n, hidden=32, vocab=307, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return (make(n, hidden), make(vocab, hidden) * 0.3, make(vocab), torch.randint(0, vocab, (n,), generator=generator))


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_value_and_gradients_equal_cross_entropy_on_dense_logits(n, monkeypatch):
    monkeypatch.setitem(module._SLICE_ELEMENTS, "cpu", 1)  # the smallest slices, so that n takes one or several
    h, w, b, labels = inputs(n)
    grads = []
    for function in (linear_cross_entropy, lambda h, w, b, y: F.cross_entropy(h @ w.T + b, y, reduction="sum")):
        leaves = [x.clone().requires_grad_() for x in (h, w, b)]
        loss = function(*leaves, labels)
        (loss * 0.37).backward()
        grads.append([loss.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)  # fp32 sums over up to 1,000 targets


def test_without_gradients_the_value_is_the_same():
    h, w, b, labels = inputs(300)
    with torch.no_grad():
        quiet = linear_cross_entropy(h, w, b, labels)
    loud = linear_cross_entropy(h.requires_grad_(), w, b, labels)
    torch.testing.assert_close(quiet, loud.detach(), rtol=1e-6, atol=0)  # fp32, same sums in another order


def test_no_target_gives_zero_loss_and_zero_gradients():
    h, w, b, labels = inputs(0)
    leaves = [x.requires_grad_() for x in (h, w, b)]
    loss = linear_cross_entropy(*leaves, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() == 0 for x in leaves)
    assert count_correct(h, w, b, labels).item() == 0


def test_backward_can_run_twice_when_the_graph_is_kept():
    h, w, b, labels = inputs(10)
    w.requires_grad_()
    loss = linear_cross_entropy(h, w, b, labels)
    (first,) = torch.autograd.grad(loss, w, torch.tensor(2.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, w, torch.tensor(2.0))
    assert torch.equal(first, second)


def test_correct_counts_equal_argmax_of_dense_logits():
    h, w, b, labels = inputs(500)
    assert count_correct(h, w, b, labels).item() == ((h @ w.T + b).argmax(-1) == labels).sum().item()


def test_autocast_products_are_bf16_and_the_sum_is_fp32():
    h, w, b, labels = inputs(200)
    exact = F.cross_entropy(h.double() @ w.double().T + b.double(), labels, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(h, w.requires_grad_(), b, labels)
    assert loss.dtype == torch.float32
    assert loss.item() != pytest.approx(exact.item(), rel=1e-6)  # it did round to bf16
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)  # bf16 has 8 bits: 0.4% per logit, less on a mean
