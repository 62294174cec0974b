"""The ComposerModel that LLM-Foundry builds from `model: {name: ettin, ...}`: batch in, loss and metrics out.

It branches on Python scalars of a microbatch only: forward, loss and backward read nothing back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from ettin_foundry.model import sampling
from ettin_foundry.model.attention import select_backend
from ettin_foundry.model.config import EttinConfig, objective_names
from ettin_foundry.model.transformer import Block, Ettin, TargetLoss, init_parameters


class _TargetMetric(Metric):
    """A mean over targets, exact over microbatches and ranks."""

    full_state_update = False
    total: Tensor
    num_targets: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "num_targets"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, num_targets: int) -> None:
        self.total += total.detach()
        self.num_targets += num_targets

    def compute(self) -> Tensor:
        return self.total / self.num_targets.clamp(min=1)


class TargetCrossEntropy(_TargetMetric):
    """Mean -log p(label), in nats."""


class TargetPerplexity(_TargetMetric):
    def compute(self) -> Tensor:
        return super().compute().exp()


class TargetAccuracy(_TargetMetric):
    """Share of targets whose label is the most probable entry."""


class EttinModel(ComposerModel):
    """An Ettin encoder or decoder under Composer.

    Args:
        tokenizer: the host's tokenizer, used for samples and export and to check the vocabulary; None in tools.
        size: a name in `config.SIZES`.
        objective: `mlm` or `mntp` (encoder), `clm` (decoder), or a schedule of them (objectives/schedule.py), whose
            last one, kept as `.objective`, decides what the model is. Rows of `clm` are causal whatever the model is.
        max_seq_len: longest document in tokens; becomes `max_position_embeddings`.
        attn_impl: `auto`, `flash` or `reference`. init_device: acted on by the host, which builds this under it.
        overrides: single fields of `EttinConfig` by name (`vocab_size`, `global_rope_theta`, `window_left`, ...).
    """

    generate = sampling.generate
    fill_mask = sampling.fill_mask

    def __init__(self, tokenizer: Any = None, *, size: str, objective: Any, max_seq_len: int, attn_impl: str = "auto",
                 init_device: str = "cpu", **overrides: Any) -> None:
        super().__init__()
        self.objective_schedule = objective
        self.objectives, self.objective = objective_names(objective)
        config = EttinConfig.for_size(size, causal=self.objective == "clm", max_position_embeddings=max_seq_len, **overrides)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(f"model.vocab_size must be at least the {len(tokenizer)} entries of the tokenizer, got "
                             f"{config.vocab_size}")
        if attn_impl != "auto":  # a wish that can never be met here is refused before any work
            select_backend(attn_impl, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
        self.config, self.tokenizer = config, tokenizer
        # an explicit window belongs to rows of clm, also where the model ends as an encoder
        window = -1 if config.causal else overrides.get("window_left", -1)
        self.model = Ettin(config, attn_impl, config.with_causal(not config.causal, window))
        # read by Composer from the ComposerModel's direct children: what to shard, what to recompute, how to draw
        self.model.fsdp_wrap_fn = lambda module: isinstance(module, Block)  # type: ignore[assignment]
        self.model.activation_checkpointing_fn = self.model.fsdp_wrap_fn  # type: ignore[assignment]
        self.model.param_init_fn = init_parameters  # type: ignore[assignment]
        self._metrics = {kind.__name__: kind() for kind in (TargetCrossEntropy, TargetPerplexity, TargetAccuracy)}

    def forward(self, batch: Mapping[str, Any], count: bool = False) -> dict[str, Any]:
        """One microbatch as `data.batch.split_batch` makes it to {loss, nll, correct, num_targets, num_loss_tokens}."""
        if self.training and not set(batch["objective"].split("+")) <= set(self.objectives):
            raise ValueError(f"model.objective is {self.objective_schedule}, but the batch is of {batch['objective']!r}")
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

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {} if is_train else self._metrics  # in training, counting would cost a second projection

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        names = ("correct", "num_targets") if isinstance(metric, TargetAccuracy) else ("nll", "num_loss_tokens")
        metric.update(*(outputs[name] for name in names))

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Useful floating-point operations of a step on this (B, T) batch; the host divides by the peak for MFU."""
        sequence_id = batch["sequence_id"].cpu()
        one_kind = torch.full((len(sequence_id),), batch["objective"] == "clm")
        causal = batch.get("causal", one_kind).cpu()
        rows = torch.arange(sequence_id.shape[0]).unsqueeze(1) * (sequence_id.shape[1] + 1)
        tokens, pairs = 0, 0
        for is_causal, config in self.model.configs.items():
            real = (sequence_id >= 0) & (causal == is_causal)[:, None]
            lengths = np.bincount((sequence_id + rows)[real].numpy())
            lengths, counts = np.unique(lengths[lengths > 0], return_counts=True)
            tokens += int((lengths * counts).sum())
            pairs += sum(int(n) * config.attended_pairs(int(length)) for length, n in zip(lengths, counts))
        return self.config.flops(tokens, int((batch["labels"] != -100).sum()), pairs)
