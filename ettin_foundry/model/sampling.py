"""Samples of a model: continuations of a decoder, filled masks of an encoder. Small, without a key-value cache.

Both functions are methods of `EttinModel`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["fill_mask", "generate"]


def generate(model: Any, prompts: list[str], max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """Continues each prompt, BOS before it, until EOS or `max_new_tokens` or the context is full.

    Args:
        temperature: 0 takes the most probable token; above 0, samples are drawn with `seed`.

    Returns:
        the continuations, without their prompts.

    Raises:
        ValueError: the model is an encoder, or has no tokenizer.
    """
    if not model.config.causal:
        raise ValueError(f"generate needs a decoder, and this model was built for {model.objective}; use fill_mask "
                         "(on the command line: fill-mask)")
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
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        for i, token in zip(order, chosen.tolist()):
            if token == tokenizer.eos_token_id:
                unfinished.discard(i)
            else:
                documents[i].append(token)
    return [tokenizer.decode(d[len(s):]) for d, s in zip(documents, starts)]


def fill_mask(model: Any, texts: list[str], top_k: int = 5) -> list[list[tuple[str, float]]]:
    """The `top_k` most probable tokens, with probabilities, for the first mask token of each text.

    An `mntp` model is read one position before the mask, where it was trained to predict it.

    Raises:
        ValueError: the model is a decoder or has no tokenizer, or a text has no mask token or is too long.
    """
    if model.config.causal:
        raise ValueError("fill_mask needs an encoder, and this model was built for clm; use generate")
    tokenizer = _tokenizer_of(model)
    documents = [[tokenizer.cls_token_id, *tokenizer.encode(t, add_special_tokens=False), tokenizer.sep_token_id]
                 for t in texts]
    for text, document in zip(texts, documents):
        if tokenizer.mask_token_id not in document:
            raise ValueError(f"{text!r} has no {tokenizer.mask_token}; put one where a token shall be predicted")
        if len(document) > model.config.max_position_embeddings:
            raise ValueError(f"{text[:40]!r}... has {len(document)} tokens; this model takes at most "
                             f"{model.config.max_position_embeddings}")
    shift = 1 if model.objective == "mntp" else 0
    logits = _logits_at(model, documents, [d.index(tokenizer.mask_token_id) - shift for d in documents])
    top = logits.softmax(-1).topk(top_k)
    return [[(tokenizer.decode([i]), p) for i, p in zip(ids, ps)]
            for ids, ps in zip(top.indices.tolist(), top.values.tolist())]


def _logits_at(model: Any, documents: list[list[int]], positions: list[int]) -> Tensor:
    """(len(documents), V) fp32 logits of one position in each document; documents may not be empty."""
    device = model.model.output_bias.device
    lengths = torch.tensor([len(d) for d in documents])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.tensor([token for d in documents for token in d])
    position_ids = torch.cat([torch.arange(len(d)) for d in documents])
    at = cu_seqlens[:-1] + torch.tensor(positions)
    # flash kernels have no fp32: samples taken outside the trainer run in the precision that training uses
    lower = device.type == "cuda" and model.model.attn_impl != "reference"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=lower):
            hidden = model.model(ids.to(device), position_ids.to(device), cu_seqlens.int().to(device), int(lengths.max()))
            return model.model.predict(hidden[at.to(device)]).float()
    finally:
        model.train(was_training)


def _tokenizer_of(model: Any) -> Any:
    if model.tokenizer is None:
        raise ValueError("this model was built without a tokenizer; pass one to EttinModel(tokenizer=...)")
    return model.tokenizer
