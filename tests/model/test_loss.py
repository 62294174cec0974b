"""The sliced loss equals torch's own cross-entropy on dense logits, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

import ettin_foundry.model.loss as module
from ettin_foundry.model.loss import linear_cross_entropy


@pytest.fixture(autouse=True)
def smallest_slices(monkeypatch):
    monkeypatch.setitem(module._SLICE_ELEMENTS, "cpu", 1)  # of 256 targets


def inputs(n, hidden=32, vocab=307):
    generator = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*shape, generator=generator) for shape in ((n, hidden), (vocab, hidden), (vocab,)))
    return h, w * 0.3, b, torch.randint(0, vocab, (n,), generator=generator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000])
def test_value_and_gradients_equal_cross_entropy_on_dense_logits(n, weighted):
    h, w, b, labels = inputs(n)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(9)) * 5 if weighted else None

    def naive(h, w, b, y, t):
        losses = F.cross_entropy((h @ w.T + b).double(), y, reduction="none")
        return (losses if t is None else losses * t.double()).sum(), None

    found = []
    for function in (linear_cross_entropy, naive):
        leaves = [x.clone().requires_grad_() for x in (h, w, b)]
        loss, _ = function(*leaves, labels, weights)
        (loss * 0.37).backward()
        found.append([loss.detach().float(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=5e-5)  # fp32 sums over up to 1,000 targets
    with torch.no_grad():
        loss, correct = linear_cross_entropy(h, w, b, labels, weights)
    torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=0)
    best, label = (h.double() @ w.double().T + b.double()).topk(2), labels[:, None]
    clear = best.values[:, 0] - best.values[:, 1] > 1e-4  # closer ones may be rounded to another order
    hits = (best.indices[:, :1] == label)[clear].sum()
    assert hits <= correct <= hits + (~clear).sum()


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=["fp32_weights", "bf16_weights"])
def test_under_autocast_products_are_bf16_and_sums_are_not(parameters):
    h, w, b, labels = inputs(2048)  # eight slices
    w, b = w.to(parameters), b.to(parameters)
    exact = [x.double().requires_grad_() for x in (h, w, b)]
    reference = F.cross_entropy(exact[0] @ exact[1].T + exact[2], labels, reduction="sum")
    reference.backward()
    leaves = [x.requires_grad_() for x in (h, w, b)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(*leaves, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() != pytest.approx(reference.item(), rel=1e-7)  # it did round to bf16
    assert loss.item() == pytest.approx(reference.item(), rel=1e-3)  # 0.4% a logit at most, 2,048 of them
    for ours, theirs in zip(leaves, exact):
        assert ours.grad.dtype == ours.dtype
        distance = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert distance < 5e-3  # one rounding to bf16 is 0.2%; sums kept in bf16 over eight slices give more
