"""A model asked rather than trained, without the host: continuations, filled masks. No key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ettin_foundry.model.transformer import Ettin


@dataclass(frozen=True)
class Predictor:
    """A model with what is needed to ask it; its mode (train or eval) is left as it was."""

    model: Ettin
    tokenizer: Any  # a fast one of transformers, with cls, sep, pad and mask
    objective: str  # what the head was trained on

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU, as in training, since flash kernels have no fp32; else the precision of the weights."""
        kind = self.model.output_bias.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda" and self.model.attn_impl != "reference")

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 40, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        """Continuations of the prompts, BOS before each, until EOS or `max_new_tokens` or the context is full.

        Temperature 0 takes the most probable token; above 0, samples are drawn with `seed`.
        """
        if not self.model.config.causal:
            raise ValueError(f"generate needs a decoder, got an encoder ({self.objective}); use fill-mask")
        tokenizer, longest = self.tokenizer, self.model.config.max_position_embeddings
        starts = [[tokenizer.cls_token_id, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
        documents, unfinished = [list(start) for start in starts], set(range(len(starts)))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            order = sorted(i for i in unfinished if len(documents[i]) < longest)
            if not order:
                break
            logits = self._logits_at([documents[i] for i in order], [len(documents[i]) - 1 for i in order]).cpu()
            chosen = logits.argmax(-1) if temperature <= 0 else torch.multinomial(
                (logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            for i, token in zip(order, chosen.tolist()):
                if token == tokenizer.sep_token_id:
                    unfinished.discard(i)
                else:
                    documents[i].append(token)
        return [tokenizer.decode(document[len(start):]) for document, start in zip(documents, starts)]

    def fill_mask(self, texts: Sequence[str], top_k: int = 5) -> list[list[tuple[str, float]]]:
        """The `top_k` most probable tokens, with probabilities, for the first mask token of each text."""
        if self.model.config.causal:
            raise ValueError("fill-mask needs an encoder, got a decoder; use generate")
        tokenizer, longest = self.tokenizer, self.model.config.max_position_embeddings
        documents = [[tokenizer.cls_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.sep_token_id]
                     for text in texts]
        for text, document in zip(texts, documents):
            if tokenizer.mask_token_id not in document or len(document) > longest:
                raise ValueError(f"texts must have a {tokenizer.mask_token} and at most {longest} tokens, got "
                                 f"{text[:80]!r} of {len(document)} tokens")
        shift = 1 if self.objective == "mntp" else 0  # mntp is trained to predict one position before the mask
        logits = self._logits_at(documents, [ids.index(tokenizer.mask_token_id) - shift for ids in documents])
        top = logits.softmax(-1).topk(top_k)
        return [[(tokenizer.decode([token]), share) for token, share in zip(*row)]
                for row in zip(top.indices.tolist(), top.values.tolist())]

    def _logits_at(self, documents: list[list[int]], positions: list[int]) -> Tensor:
        """(len(documents), V) fp32 logits of one position in each document; documents may not be empty."""
        device, lengths = self.model.output_bias.device, [len(ids) for ids in documents]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device)
        ids = torch.tensor([token for document in documents for token in document], device=device)
        position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])
        at = cu_seqlens[:-1] + torch.tensor(positions, device=device)
        was_training, was_compiled = self.model.training, self.model.compiled
        self.model.eval()
        # each token generated is another length, for which blocks would be compiled again
        stance = torch.compiler.set_stance("force_eager") if was_compiled else contextlib.nullcontext()
        self.model.compiled = False
        try:
            with torch.no_grad(), self.autocast(), stance:
                hidden = self.model(ids, position_ids, cu_seqlens.int(), max(lengths))
                return self.model.predict(hidden[at]).float()  # type: ignore[index]
        finally:
            self.model.train(was_training)
            self.model.compiled = was_compiled
