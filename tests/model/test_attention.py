"""Attention equals a dense softmax over each document alone, for every window, on every reference path."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import ettin_foundry.model.attention as module
from ettin_foundry.model.attention import Documents, attention, select_backend

WINDOWS = {"encoder_global": (-1, -1), "encoder_local": (64, 64), "decoder_global": (-1, 0), "decoder_local": (63, 0),
           "decoder_original": (64, 0), "narrow": (3, 2)}
LENGTHS = [1, 70, 5, 64, 131]
every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())


def stream(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return q, k, v, Documents(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths), positions)


def naive(q, k, v, lengths, window):
    """One document at a time: softmax over all its keys, those outside of the window at minus infinity."""
    left, right = (math.inf if w < 0 else w for w in window)
    out = []
    for own_q, own_k, own_v in zip(q.split(lengths), k.split(lengths), v.split(lengths)):
        place = torch.arange(len(own_q), device=q.device)
        distance = place[None, :] - place[:, None]  # key - query
        scores = torch.einsum("ihk,jhk->hij", own_q, own_k) * q.shape[2] ** -0.5
        scores = scores.masked_fill((distance < -left) | (distance > right), -math.inf)
        out.append(torch.einsum("hij,jhk->ihk", scores.softmax(-1), own_v))
    return torch.cat(out)


@every_window
def test_reference_path_equals_a_naive_softmax_in_value_and_gradients(window):
    *qkv, documents = stream(LENGTHS)
    weight = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for function in (lambda *x: attention(*x, documents, window), lambda *x: naive(*x, LENGTHS, window)):
        inputs = [x.clone().requires_grad_() for x in qkv]
        out = function(*inputs)
        (out * weight).sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # float64: sums of at most 131 terms


@pytest.mark.parametrize("kind", ["encoder_global", "decoder_global"])  # local windows take one path on every device
def test_padded_path_of_other_devices_equals_the_per_document_path(kind, monkeypatch):
    q, k, v, documents = stream(LENGTHS)
    expected = attention(q, k, v, documents, WINDOWS[kind])
    searches, real_arange, real_search = [], torch.arange, torch.searchsorted

    class NotCPU(torch.Tensor):  # the branch is chosen by q.device.type: present a CPU tensor as another device
        device = torch.device("cuda")

    monkeypatch.setattr(module.torch, "arange", lambda *a, device=None, **kw: real_arange(*a, **kw))
    monkeypatch.setattr(module.torch, "searchsorted", lambda *a, **kw: searches.append(a) or real_search(*a, **kw))
    out = attention(q.as_subclass(NotCPU), k, v, documents, WINDOWS[kind]).as_subclass(torch.Tensor)
    assert len(searches) == 1  # only the padded path searches: it did run
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@every_window
def test_no_token_gives_no_result_and_keeps_the_graph(window):
    empty = torch.zeros(0, 2, 64, requires_grad=True)
    documents = Documents(torch.zeros(1, dtype=torch.int32), 0, torch.zeros(0, dtype=torch.int64))
    assert attention(empty, empty, empty, documents, window).requires_grad


@pytest.mark.parametrize("asked", [False, True])
def test_the_flash_backward_is_deterministic_where_that_is_asked_for(asked, monkeypatch):
    """torch's own varlen_attn obeys torch's switch by itself; flash-attn must be told."""
    seen = {}
    stub = SimpleNamespace(flash_attn_varlen_func=lambda q, *_, **options: seen.update(options) or q)
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: asked)
    attention(*stream(LENGTHS), (63, 0), "flash_attn_2")
    assert seen == {"causal": True, "window_size": (63, 0), "deterministic": asked}


def test_a_wish_that_cannot_be_met_is_an_error():
    for wish, words in (("flash", "got 'flash'.*CUDA"), ("flahs", "must be auto, flash or reference, got 'flahs'")):
        with pytest.raises(ValueError, match=words):
            select_backend(wish, "cpu", torch.float32)
    assert select_backend("auto", "cpu", torch.float32).name == "reference"
