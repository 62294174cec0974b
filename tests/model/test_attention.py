"""Attention equals a naive softmax that loops over queries, for every window, on every reference path."""

import math

import pytest
import torch

from ettin_foundry.model.attention import Documents, attention, select_backend

WINDOWS = {"encoder_global": (-1, -1), "encoder_local": (64, 64), "decoder_global": (-1, 0), "decoder_local": (63, 0),
           "decoder_original": (64, 0), "narrow": (3, 2)}
LENGTHS = [1, 70, 200, 5, 64, 131]


def stream(lengths, heads=2, dim=64, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), heads, dim, generator=generator, dtype=dtype) for _ in range(3))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    return q, k, v, Documents(cu_seqlens, max(lengths), positions)


def naive(q, k, v, lengths, window):
    """One query at a time, one head at a time: softmax over the keys it may see."""
    left, right = (math.inf if w < 0 else w for w in window)
    out, start = torch.zeros_like(q), 0
    for n in lengths:
        for i in range(n):
            seen = [start + j for j in range(n) if i - left <= j <= i + right]
            for h in range(q.shape[1]):
                weights = torch.softmax(k[seen, h] @ q[start + i, h] * q.shape[2] ** -0.5, 0)
                out[start + i, h] = weights @ v[seen, h]
        start += n
    return out


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_reference_path_equals_a_naive_softmax(window):
    q, k, v, documents = stream(LENGTHS)
    torch.testing.assert_close(attention(q, k, v, documents, window), naive(q, k, v, LENGTHS, window),
                               rtol=1e-12, atol=1e-12)  # float64: rounding of sums of at most 200 terms


@pytest.mark.parametrize("kind", ["encoder_global", "decoder_global"])  # local windows take one path on every device
def test_padded_path_of_other_devices_equals_the_per_document_path(kind, monkeypatch):
    window = WINDOWS[kind]
    q, k, v, documents = stream(LENGTHS)
    expected = attention(q, k, v, documents, window)
    import ettin_foundry.model.attention as module

    class NotCPU(torch.Tensor):  # the branch is chosen by q.device.type: present a CPU tensor as another device
        @property
        def device(self):
            return torch.device("cuda") if asked[0] else torch.Tensor.device.__get__(self)

    asked, searches = [True], []
    real_arange, real_search = torch.arange, torch.searchsorted
    monkeypatch.setattr(module.torch, "arange", lambda *a, device=None, **kw: real_arange(*a, **kw))
    monkeypatch.setattr(module.torch, "searchsorted", lambda *a, **kw: searches.append(a) or real_search(*a, **kw))
    out = attention(q.as_subclass(NotCPU), k, v, documents, window)
    asked[0] = False
    assert len(searches) == 1  # only the padded path searches: it did run
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_window_lets_exactly_the_stated_positions_through(window):
    length, at = 300, 150
    _, _, v, documents = stream([length])  # queries of 0: every visible key has the same weight
    onehot = torch.eye(length, dtype=v.dtype)[:, None].repeat(1, 2, 1)  # the value says which key it is
    pad = torch.zeros(length, 2, length, dtype=v.dtype)
    weights = attention(pad, pad, onehot, documents, window)[at, 0]
    left, right = (length if w < 0 else w for w in window)
    visible = [j for j in range(length) if at - left <= j <= at + right]
    assert weights.nonzero()[:, 0].tolist() == visible
    torch.testing.assert_close(weights[visible], torch.full((len(visible),), 1 / len(visible), dtype=v.dtype))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
def test_gradients_are_those_of_the_naive_softmax(window):
    lengths = [20, 3, 90]
    q, k, v, documents = stream(lengths)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    grads = []
    for function in (lambda *x: attention(*x, documents, window), lambda *x: naive(*x, lengths, window)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        (function(*inputs) * weight).sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # float64


def test_an_empty_stream_gives_an_empty_result_that_still_carries_gradients():
    empty = torch.zeros(0, 2, 64, requires_grad=True)
    documents = Documents(torch.zeros(1, dtype=torch.int32), 0, torch.zeros(0, dtype=torch.int64))
    for window in WINDOWS.values():
        out = attention(empty, empty, empty, documents, window)
        assert out.shape == (0, 2, 64) and out.requires_grad


def test_a_wish_that_cannot_be_met_is_an_error():
    for wish, words in (("flash", "got 'flash'.*CUDA"), ("flahs", "must be auto, flash or reference, got 'flahs'")):
        with pytest.raises(ValueError, match=words):
            select_backend(wish, "cpu", torch.float32)
    assert select_backend("auto", "cpu", torch.float32).name == "reference"
