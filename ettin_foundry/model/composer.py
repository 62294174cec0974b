"""The ComposerModel that LLM-Foundry builds from `model: {name: ettin, ...}`: batch in, loss and metrics out.

It branches on the Python scalars of a microbatch only, never on tensor values, so that forward, loss and backward read
nothing back from the device (the host itself reads two numbers a batch: the count of targets and the loss). Text
generation and mask filling for samples stand here too: small, without a key-value cache.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from ettin_foundry.model.attention import select_backend
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.transformer import Block, Ettin, TargetLoss, init_parameters
from ettin_foundry.objectives.schedule import ObjectiveSchedule

__all__ = ["EttinModel", "TargetAccuracy", "TargetCrossEntropy", "TargetPerplexity"]

log = logging.getLogger(__name__)


class _TargetMetric(Metric):
    """A mean over targets, exact over microbatches and ranks."""

    full_state_update = False
    total: Tensor
    num_targets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_targets", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, num_targets: int) -> None:
        self.total += total.detach()
        self.num_targets += num_targets

    def mean(self) -> Tensor:
        return self.total / self.num_targets.clamp(min=1)


class TargetCrossEntropy(_TargetMetric):
    """Mean -log p(label) over targets, in nats."""

    def compute(self) -> Tensor:
        return self.mean()


class TargetPerplexity(_TargetMetric):
    """exp of the mean cross-entropy over targets."""

    def compute(self) -> Tensor:
        return self.mean().exp()


class TargetAccuracy(_TargetMetric):
    """Share of targets whose label is the most probable entry."""

    def compute(self) -> Tensor:
        return self.mean()


class EttinModel(ComposerModel):
    """An Ettin encoder or decoder under Composer.

    Args:
        tokenizer: the host's tokenizer, used for samples and export and to check the vocabulary; None in tools.
        size: a name in `config.SIZES`.
        objective: `mlm`, `mntp` or `mdlm` (encoder), `clm` (decoder), or a schedule of them (schedules.py), whose last one
            decides what the model is. Attention is causal exactly for rows of `clm`, whatever the model is.
        max_seq_len: longest document in tokens; becomes `max_position_embeddings`.
        attn_impl: `auto`, `flash` or `reference`.
        init_device: read by the host; `cpu`, `meta` or `mixed`.
        overrides: single fields of `EttinConfig` by name (`vocab_size`, `global_rope_theta`, `window_left`, ...).

    Raises:
        ValueError: an unknown size, objective or key, a vocabulary smaller than the tokenizer's, or an attention
            implementation that this machine cannot run; each message names the key and what is allowed.
    """

    def __init__(self, tokenizer: Any = None, *, size: str, objective: Any, max_seq_len: int, attn_impl: str = "auto",
                 init_device: str = "cpu", **overrides: Any) -> None:
        super().__init__()
        del init_device  # acted on by the host, which builds this under its own device context
        schedule = ObjectiveSchedule.parse(objective, key="model.objective")
        for key, instead in (("causal", "objective"), ("max_position_embeddings", "max_seq_len")):
            if key in overrides:
                raise ValueError(f"model.{key}: not a key of its own, it follows from model.{instead}; remove it")
        config = EttinConfig.for_size(size, causal=schedule.final == "clm", max_position_embeddings=max_seq_len, **overrides)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(f"model.vocab_size: {config.vocab_size} given, but the tokenizer "
                             f"{getattr(tokenizer, 'name_or_path', '')!r} has {len(tokenizer)} entries. Set "
                             f"model.vocab_size to at least {len(tokenizer)} (a multiple of 64 is fastest)")
        if attn_impl != "auto":  # a wish that can never be met here is refused before any work
            select_backend(attn_impl, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
        self.tokenizer = tokenizer
        self.schedule, self.objective = schedule, schedule.final
        self.config = config
        # an explicit window belongs to rows of clm, also where the model ends as an encoder
        window = -1 if config.causal else overrides.get("window_left", -1)
        self.model = Ettin(config, attn_impl, dataclasses.replace(config, causal=not config.causal, window_left=window))
        # read by Composer from the ComposerModel's direct children: what to shard, what to recompute, how to draw
        self.model.fsdp_wrap_fn = lambda module: isinstance(module, Block)  # type: ignore[assignment]
        self.model.activation_checkpointing_fn = lambda module: isinstance(module, Block)  # type: ignore[assignment]
        self.model.param_init_fn = init_parameters  # type: ignore[assignment]
        self._metrics: dict[str, Metric] = {kind.__name__: kind()
                                            for kind in (TargetCrossEntropy, TargetPerplexity, TargetAccuracy)}

    def forward(self, batch: Mapping[str, Any], count: bool = False) -> dict[str, Any]:
        """One microbatch as `data.split_batch` makes it to {loss, nll, correct, num_targets}.

        Raises:
            ValueError: labels of another objective, or a batch that was not made flat.
        """
        if "cu_seqlens" not in batch:
            raise ValueError("the batch has no cu_seqlens: pass it through ettin_foundry.data.loader.split_batch (or flatten) "  # noqa: E501
                             "before the model, as the trainer does")
        if self.training and not set(batch["objective"].split("+")) <= set(self.schedule.objectives):
            raise ValueError(f"model.objective is {self.schedule}, but the batch carries labels for "
                             f"{batch['objective']!r}. Set the objective of the loader and of model to the same value")
        out = self.model(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["max_seqlen"],
                         batch["target_positions"], batch["target_labels"], count=count,
                         causal=(batch["num_causal_documents"], batch["num_causal_tokens"]),
                         target_weights=batch.get("target_weights"))
        assert isinstance(out, TargetLoss)
        # max(1, n): a microbatch without any target has a loss of 0, not 0 / 0
        return {"loss": out.nll / max(1, batch["num_loss_tokens"]), "nll": out.nll, "correct": out.correct,
                "num_targets": batch["num_targets"], "num_loss_tokens": batch["num_loss_tokens"]}

    def loss(self, outputs: Mapping[str, Any], batch: Any) -> Tensor:
        """Mean over the microbatch's targets; the host weights microbatches by what they were divided by."""
        return outputs["loss"]

    def eval_forward(self, batch: Any, outputs: Any = None) -> dict[str, Any]:
        return outputs if outputs is not None else self.forward(batch, count=True)

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        if is_train:
            return {}  # the loss is logged anyway; counting would cost a second projection
        return self._metrics

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        assert isinstance(metric, _TargetMetric)
        if isinstance(metric, TargetAccuracy):
            metric.update(outputs["correct"], outputs["num_targets"])
        else:
            metric.update(outputs["nll"], outputs["num_loss_tokens"])

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Useful floating-point operations of a step on this (B, T) batch; the host divides by the peak for MFU."""
        sequence_id = batch["sequence_id"].cpu()
        causal = batch["causal"].cpu() if "causal" in batch else torch.full((len(sequence_id),), batch["objective"] == "clm")
        rows = torch.arange(sequence_id.shape[0]).unsqueeze(1) * (sequence_id.shape[1] + 1)
        tokens, pairs = 0, 0
        for kind in (False, True):
            real = (sequence_id >= 0) & (causal == kind)[:, None]
            lengths = np.bincount((sequence_id + rows)[real].numpy())
            lengths, counts = np.unique(lengths[lengths > 0], return_counts=True)
            tokens += int((lengths * counts).sum())
            pairs += sum(int(n) * self.model.kinds[kind].attended_pairs(int(length)) for length, n in zip(lengths, counts))
        return self.config.flops(tokens, int((batch["labels"] != -100).sum()), pairs)

    @property
    def n_total_params(self) -> int:
        return self.config.num_parameters

    # ------------------------------------------------------------------ samples

    def _logits_at_ends(self, documents: list[list[int]], places: list[int]) -> Tensor:
        """(len(documents), V) fp32 logits of one place in each document; documents may not be empty."""
        device = self.model.output_bias.device
        lengths = torch.tensor([len(d) for d in documents])
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = torch.tensor([token for d in documents for token in d])
        positions = torch.cat([torch.arange(len(d)) for d in documents])
        at = cu_seqlens[:-1] + torch.tensor(places)
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self._autocast(device):
                hidden = self.model(ids.to(device), positions.to(device), cu_seqlens.int().to(device),
                                    int(lengths.max()))
                return self.model.predict(hidden[at.to(device)]).float()
        finally:
            self.train(was_training)

    def _autocast(self, device: torch.device):
        # flash kernels have no fp32: samples taken outside the trainer run in the precision that training uses
        enabled = device.type == "cuda" and self.model.attn_impl != "reference"
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)

    def generate(self, prompts: list[str], max_new_tokens: int = 40, temperature: float = 0.0,
                 seed: int = 0) -> list[str]:
        """Continues each prompt, BOS before it, until EOS or `max_new_tokens` or the context is full.

        Args:
            temperature: 0 takes the most probable token; above, samples are drawn with `seed`.

        Returns:
            the continuations, without their prompts.

        Raises:
            ValueError: the model is an encoder, or has no tokenizer.
        """
        if not self.config.causal:
            raise ValueError(f"generate needs a decoder, and this model was built for {self.objective}; use fill_mask "
                             "(on the command line: fill-mask)")
        tokenizer = self._needed_tokenizer()
        starts = [[tokenizer.bos_token_id, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
        documents, open_ones = [list(s) for s in starts], set(range(len(starts)))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            open_ones = {i for i in open_ones if len(documents[i]) < self.config.max_position_embeddings}
            if not open_ones:
                break
            order = sorted(open_ones)
            logits = self._logits_at_ends([documents[i] for i in order], [len(documents[i]) - 1 for i in order]).cpu()
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1)
            for i, token in zip(order, chosen.tolist()):
                if token == tokenizer.eos_token_id:
                    open_ones.discard(i)
                else:
                    documents[i].append(token)
        return [tokenizer.decode(d[len(s):]) for d, s in zip(documents, starts)]

    def fill_mask(self, texts: list[str], top_k: int = 5) -> list[list[tuple[str, float]]]:
        """The `top_k` most probable tokens, with probabilities, for the first mask token of each text.

        An `mntp` model is read one position before the mask, where it was trained to predict it.

        Raises:
            ValueError: the model is a decoder or has no tokenizer, or a text has no mask token or is too long.
        """
        if self.config.causal:
            raise ValueError("fill_mask needs an encoder, and this model was built for clm; use generate")
        tokenizer = self._needed_tokenizer()
        documents = [[tokenizer.cls_token_id, *tokenizer.encode(t, add_special_tokens=False), tokenizer.sep_token_id]
                     for t in texts]
        for text, document in zip(texts, documents):
            if tokenizer.mask_token_id not in document:
                raise ValueError(f"{text!r} has no {tokenizer.mask_token}; put one where a token shall be predicted")
            if len(document) > self.config.max_position_embeddings:
                raise ValueError(f"{text[:40]!r}... has {len(document)} tokens; this model takes at most "
                                 f"{self.config.max_position_embeddings}")
        shift = 1 if self.objective == "mntp" else 0
        logits = self._logits_at_ends(documents, [d.index(tokenizer.mask_token_id) - shift for d in documents])
        top = logits.softmax(-1).topk(top_k)
        return [[(tokenizer.decode([i]), p) for i, p in zip(ids, ps)]
                for ids, ps in zip(top.indices.tolist(), top.values.tolist())]

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("this model was built without a tokenizer; pass one to EttinModel(tokenizer=...)")
        return self.tokenizer
