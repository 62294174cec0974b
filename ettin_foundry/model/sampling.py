"""Samples, as methods of `EttinModel`: continuations of a decoder, filled masks of an encoder. No key-value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def generate(model: Any, prompts: list[str], max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """Continuations of the prompts, BOS before each, until EOS or `max_new_tokens` or the context is full.

    Temperature 0 takes the most probable token; above 0, samples are drawn with `seed`.
    """
    if not model.config.causal:
        raise ValueError(f"generate needs a decoder, and this model is an encoder ({model.objective}); use fill_mask")
    tokenizer = _tokenizer_of(model)
    starts = [[tokenizer.bos_token_id, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    documents, unfinished = [list(s) for s in starts], set(range(len(starts)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        unfinished = {i for i in unfinished if len(documents[i]) < model.config.max_position_embeddings}
        if not unfinished:
            break
        order = sorted(unfinished)
        logits = _logits_at(model, [documents[i] for i in order], [len(documents[i]) - 1 for i in order]).cpu()
        chosen = logits.argmax(-1) if temperature <= 0 else torch.multinomial(
            (logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        for i, token in zip(order, chosen.tolist()):
            if token == tokenizer.eos_token_id:
                unfinished.discard(i)
            else:
                documents[i].append(token)
    return [tokenizer.decode(d[len(s):]) for d, s in zip(documents, starts)]


def fill_mask(model: Any, texts: list[str], top_k: int = 5) -> list[list[tuple[str, float]]]:
    """The `top_k` most probable tokens, with probabilities, for the first mask token of each text."""
    if model.config.causal:
        raise ValueError("fill_mask needs an encoder, and this model is a decoder; use generate")
    tokenizer = _tokenizer_of(model)
    documents = [[tokenizer.cls_token_id, *tokenizer.encode(t, add_special_tokens=False), tokenizer.sep_token_id]
                 for t in texts]
    longest = model.config.max_position_embeddings
    for text, document in zip(texts, documents):
        if tokenizer.mask_token_id not in document or len(document) > longest:
            raise ValueError(f"texts must have a {tokenizer.mask_token} and at most {longest} tokens, got {text[:80]!r} of "
                             f"{len(document)} tokens")
    shift = 1 if model.objective == "mntp" else 0  # mntp is trained to predict one position before the mask
    logits = _logits_at(model, documents, [d.index(tokenizer.mask_token_id) - shift for d in documents])
    top = logits.softmax(-1).topk(top_k)
    return [[(tokenizer.decode([i]), p) for i, p in zip(ids, ps)]
            for ids, ps in zip(top.indices.tolist(), top.values.tolist())]


def _logits_at(model: Any, documents: list[list[int]], positions: list[int]) -> Tensor:
    """(len(documents), V) fp32 logits of one position in each document; documents may not be empty."""
    device = model.model.output_bias.device
    lengths = [len(d) for d in documents]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)
    ids = torch.tensor([token for d in documents for token in d], device=device)
    position_ids = torch.cat([torch.arange(n, device=device) for n in lengths])
    at = cu_seqlens[:-1] + torch.tensor(positions, device=device)
    # flash kernels have no fp32: samples taken outside the trainer run in the precision that training uses
    lower = device.type == "cuda" and model.model.attn_impl != "reference"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=lower):
            return model.model.predict(model.model(ids, position_ids, cu_seqlens.int(), max(lengths))[at]).float()
    finally:
        model.train(was_training)


def _tokenizer_of(model: Any) -> Any:
    if model.tokenizer is None:
        raise ValueError("samples need a model with a tokenizer; pass one to EttinModel(tokenizer=...)")
    return model.tokenizer
