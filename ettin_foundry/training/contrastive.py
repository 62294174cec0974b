"""The contrastive stage: unsupervised SimCSE on any trunk, as the ComposerModel of `model: {name: ettin_contrastive, ...}`.

A text is embedded twice with different dropout masks; the two embeddings are each other's positive, and the second
embeddings of the batch's other texts are the negatives (SimCSE, Gao et al. 2021, arXiv 2104.08821; the settings are those of
LLM2Vec, arXiv 2404.05961). The loss is sentence-transformers' MultipleNegativesRankingLoss of pairs (text, text).

The trunk and its weights are those of `composer_model.EttinModel`, so that checkpoints of every objective can be entered
from and the trunk can be exported; head and output bias are carried along untouched. Writing a sentence-transformers folder
is the work of sentence_export.py.

Letters: D texts (one a row of the batch), N tokens, C hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from ettin_foundry.hub.sentence_export import POOLINGS
from ettin_foundry.model.composer import EttinModel, _TargetMetric
from ettin_foundry.model.config import CONTRASTIVE
from ettin_foundry.objectives.schedule import ObjectiveSchedule

__all__ = ["Alignment", "ContrastiveLoss", "EttinContrastive", "Uniformity", "contrastive_loss"]


class ContrastiveLoss(_TargetMetric):
    """Mean loss over texts, in nats. It grows with the number of negatives, so with device_eval_batch_size."""

    def compute(self) -> Tensor:
        return self.mean()


class Alignment(_TargetMetric):
    """Mean squared distance of a text's two views on the unit sphere, 0 to 4 (Wang and Isola 2020, arXiv 2005.10242)."""

    def compute(self) -> Tensor:
        return self.mean()


class Uniformity(_TargetMetric):
    """log of the mean of exp(-2 d ** 2) over pairs of different texts, d their distance on the unit sphere; 0 when all
    texts fall on one point, -4 at best (Wang and Isola 2020). Pairs are those within an evaluation batch of a rank."""

    def compute(self) -> Tensor:
        return self.mean().log()


def contrastive_loss(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Mean over texts of -log softmax(scale * cos(first_i, second_j))[j = i], a scalar.

    Args:
        first, second: (D, C), fp32 or wider, the two embeddings of each text.
        scale: what cosines are multiplied by, 1 / temperature.
    """
    with torch.autocast(first.device.type, enabled=False):  # bf16 would round a score of 20 to steps of 0.125
        scores = scale * F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).t()
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class EttinContrastive(EttinModel):
    """An Ettin trunk trained to tell texts apart.

    The negatives of a text are the other rows of ONE microbatch on one rank; the checks hold the microbatch to be the whole
    device batch, since gathering gradients over smaller ones would be another loss.

    Args:
        tokenizer, size, max_seq_len, attn_impl, init_device, overrides: as for `EttinModel`.
        objective: `simcse`; the loader's is the same.
        scale: what cosine similarities are multiplied by (LLM2Vec: 20).
        attn_out_dropout: what makes the two views differ (LLM2Vec: 0.3). It acts after the output projection of attention,
            the trunk's only dropout; LLM2Vec puts it on the attention probabilities.
        pooling: `mean` over all tokens of a row, BOS and EOS included, as sentence-transformers takes it over its attention
            mask; or `last`, the hidden state of EOS.
        causal: keep a decoder's attention. False lets every token see both sides, as LLM2Vec does with decoders.

    Raises:
        ValueError: an objective, scale, pooling or causal that is none; and what `EttinModel` refuses.
    """

    def __init__(self, tokenizer: Any = None, *, size: str, objective: str, max_seq_len: int, scale: float = 20.0,
                 attn_out_dropout: float = 0.3, pooling: str = "mean", causal: bool = False, attn_impl: str = "auto",
                 init_device: str = "cpu", **overrides: Any) -> None:
        if objective != CONTRASTIVE:
            raise ValueError(f"model.objective: {objective!r} given; model.name: ettin_contrastive trains {CONTRASTIVE} "
                             "only. Start from yamls/phases/contrastive.yaml, or set model.name=ettin")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
            raise ValueError(f"model.scale: {scale!r} given; a number above 0 is needed. LLM2Vec uses 20")
        if pooling not in POOLINGS:
            raise ValueError(f"model.pooling: {pooling!r} is unknown; choose one of {', '.join(POOLINGS)}")
        if not isinstance(causal, bool):
            raise ValueError(f"model.causal: {causal!r} given; true (a decoder's attention) or false is needed")
        super().__init__(tokenizer, size=size, objective="clm" if causal else "mlm", max_seq_len=max_seq_len,
                         attn_impl=attn_impl, init_device=init_device, attn_out_dropout=attn_out_dropout, **overrides)
        self.schedule, self.objective = ObjectiveSchedule.parse(CONTRASTIVE), CONTRASTIVE
        self.scale, self.pooling = float(scale), pooling
        # nothing here predicts tokens: DDP waits for gradients of every parameter that asks for them
        self.model.head.requires_grad_(False)
        self.model.output_bias.requires_grad_(False)
        self._metrics = {kind.__name__: kind() for kind in (ContrastiveLoss, Alignment, Uniformity)}

    def embed(self, batch: Mapping[str, Any], views: int = 1) -> Tensor:
        """Embeddings of a flat microbatch's texts, not normalized.

        Returns:
            (views, D, C), fp32 or wider. In training mode every view has dropout masks of its own.
        """
        num_tokens, bounds = batch["num_tokens"], batch["cu_seqlens"]
        num_texts = len(bounds) - 1
        # one pass over the stream repeated: masks are drawn for each token, so no two views share one
        offsets = num_tokens * torch.arange(views, dtype=bounds.dtype, device=bounds.device)[:, None]
        bounds = torch.cat([(bounds[:-1] + offsets).flatten(), bounds.new_full((1,), views * num_tokens)])
        causal = (views * num_texts, views * num_tokens) if self.config.causal else (0, 0)
        hidden = self.model(batch["input_ids"].repeat(views), batch["position_ids"].repeat(views), bounds,
                            batch["max_seqlen"], causal=causal)                                      # (views * N, C)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "last":
            pooled = hidden.index_select(0, bounds[1:] - 1)
        else:  # not index_add: on a GPU that sums in no fixed order, and a resumed run would differ in the last bits
            pooled = torch.segment_reduce(hidden, "mean", lengths=bounds.diff().long(), axis=0, unsafe=True)
        return pooled.view(views, num_texts, -1)

    def forward(self, batch: Mapping[str, Any], count: bool = False) -> dict[str, Any]:
        """One flat microbatch, one text a row, to {loss, views}; views as `embed` gives them.

        Raises:
            ValueError: a batch that was not made flat, rows of another objective or of several texts, or fewer than two.
        """
        del count
        num_texts = self._check_batch(batch)
        if num_texts < 2:
            raise ValueError(f"train_loader: a microbatch of {num_texts} text(s) given; at least 2 are needed, for the "
                             "negatives of a text are the others. Raise global_train_batch_size")
        views = self.embed(batch, views=2)
        return {"loss": contrastive_loss(views[0], views[1], self.scale), "views": views}

    def _check_batch(self, batch: Mapping[str, Any]) -> int:
        """The number of texts."""
        if "cu_seqlens" not in batch:
            raise ValueError("the batch has no cu_seqlens: pass it through ettin_foundry.data.loader.split_batch (or flatten) "  # noqa: E501
                             "before the model, as the trainer does")
        if batch["objective"] != CONTRASTIVE:
            raise ValueError(f"train_loader.objective: {batch['objective']!r} given; model.name: ettin_contrastive needs "
                             f"{CONTRASTIVE}. Start from yamls/phases/contrastive.yaml")
        num_texts = len(batch["cu_seqlens"]) - 1
        if num_texts != batch["num_rows"]:
            raise ValueError(f"train_loader.packing: {num_texts} texts in {batch['num_rows']} rows; one text a row is "
                             "needed. Set packing: false")
        return num_texts

    def eval_forward(self, batch: Any, outputs: Any = None) -> dict[str, Any]:
        """Sums for the metrics: {metric's name: (sum, number of terms)}. The same each time: dropout masks of the two views
        are seeded by the batch's place in the evaluation. Uniformity is of the embeddings that users get, without dropout.
        """
        del outputs  # of a training step, where there is nothing to reuse
        num_texts = self._check_batch(batch)
        if num_texts < 2:  # what the last rows of an evaluation may leave: no negatives, no pairs
            nothing = torch.zeros((), device=batch["input_ids"].device)
            return {name: (nothing, 0) for name in self._metrics}
        was_training, device = self.training, batch["input_ids"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(batch["step"])
            try:
                views = self.train().embed(batch, views=2)
                plain = F.normalize(self.eval().embed(batch)[0].double(), dim=-1)
            finally:
                self.train(was_training)
        first, second = F.normalize(views.double(), dim=-1)
        num_pairs = num_texts * (num_texts - 1) // 2
        return {
            "ContrastiveLoss": (num_texts * contrastive_loss(views[0], views[1], self.scale), num_texts),
            "Alignment": ((first - second).square().sum(), num_texts),
            "Uniformity": (F.pdist(plain).square().mul(-2).exp().sum(), num_pairs),
        }

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        assert isinstance(metric, _TargetMetric)
        metric.update(*outputs[type(metric).__name__])

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """As for `EttinModel`, of two passes without targets."""
        return 2 * super().flops_per_batch(batch)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a model of the contrastive stage predicts no tokens, its head is no longer that of its trunk; use "
                         "`ettin export --sentence-transformers`, or a checkpoint from before")

    fill_mask = generate
