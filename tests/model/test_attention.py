"""Attention equals a dense softmax over each document alone, for every window, on every reference path."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import ettin_foundry.model.attention as module
from ettin_foundry.model.attention import Documents, attention, block_mask

WINDOWS = {"encoder_global": (-1, -1), "encoder_local": (64, 64), "decoder_global": (-1, 0), "decoder_local": (63, 0),
           "decoder_original": (64, 0), "narrow": (3, 2)}
LENGTHS = [1, 70, 5, 64, 131]
BORDERS = [1, 127, 128, 129, 70, 128]  # of blocks of flex_attention, the last one a document of padding
every_window = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())


def stream(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    positions = torch.cat([torch.arange(n) for n in lengths])
    # the loader fills offsets up with empty documents
    return q, k, v, Documents(torch.tensor([0, *lengths, 0, 0]).cumsum(0).int(), max(lengths), positions)


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


@pytest.mark.parametrize(("backend", "lengths"), [("reference", LENGTHS), ("flex_attention", BORDERS)])
@every_window
def test_attention_equals_a_naive_softmax_in_value_and_gradients(window, backend, lengths):
    *qkv, documents = stream(lengths)
    weight = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for function in (lambda *x: attention(*x, documents, window, backend), lambda *x: naive(*x, lengths, window)):
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


@pytest.mark.parametrize("backend", ["reference", "flex_attention"])
@every_window
def test_no_token_gives_no_result_and_keeps_the_graph(window, backend):
    empty = torch.zeros(0, 2, 64, requires_grad=True)
    documents = Documents(torch.zeros(1, dtype=torch.int32), 0, torch.zeros(0, dtype=torch.int64))
    assert attention(empty, empty, empty, documents, window, backend).requires_grad


@pytest.mark.parametrize("asked", [False, True])
def test_the_flash_backward_is_deterministic_where_that_is_asked_for(asked, monkeypatch):
    """torch's own varlen_attn obeys torch's switch by itself; flash-attn must be told."""
    seen = {}
    stub = SimpleNamespace(flash_attn_varlen_func=lambda q, *_, **options: seen.update(options) or q)
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: asked)
    attention(*stream(LENGTHS), (63, 0), "flash_attn_2")
    assert seen == {"causal": True, "window_size": (63, 0), "deterministic": asked}


@pytest.mark.parametrize("window", [*WINDOWS.values(), (200, 300), (500, 0)])
def test_block_lists_hold_every_visible_pair_and_no_invisible_block(window):
    for lengths in (BORDERS, [1], [300, 127, 1, 129, 1, 1, 700, 2]):
        mask, size = block_mask(stream(lengths)[3], window), -(-sum(lengths) // 128)
        number, place = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.arange(sum(lengths))
        distance, (left, right) = place - place[:, None], (math.inf if w < 0 else w for w in window)
        visible = torch.zeros(size * 128, size * 128, dtype=torch.bool)  # nothing is beyond the last token
        visible[:len(place), :len(place)] = (number == number[:, None]) & (distance >= -left) & (distance <= right)
        index = torch.arange(size * 128)
        assert torch.equal(mask.mask_mod(None, None, index[:, None], index[:len(place)]), visible[:, :len(place)])
        seen = visible.view(size, 128, size, 128).any(3).any(1)
        of_keys, of_queries = (mask.kv_indices, mask.kv_num_blocks), (mask.q_indices, mask.q_num_blocks)
        for lists, blocks in ((of_keys, seen), (of_queries, seen.T)):
            first, count = (x.flatten()[:, None] for x in lists)
            assert torch.equal((index[:size] >= first) & (index[:size] < first + count), blocks)  # one after another
