"""The ComposerModel that LLM-Foundry builds from `model: {name: ettin, ...}`: batch in, loss and metrics out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils.reproducibility import configure_deterministic_mode
from torch import Tensor
from torchmetrics import Metric

from ettin_foundry.model.backends import candidates
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.inference import Predictor
from ettin_foundry.model.transformer import Block, Ettin, batch_loss, compiles, init_parameters
from ettin_foundry.objectives.schedule import ObjectiveSchedule

log = logging.getLogger(__name__)


class TargetMean(Metric):
    """A mean over targets, exact over microbatches and ranks.

    of: the sum and its divisor among what `batch_loss` returns. function: of the mean.
    """

    full_state_update = False
    total: Tensor
    number: Tensor

    def __init__(self, *of: str, function: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.of, self.function = of, function
        for name in ("total", "number"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor, number: int) -> None:
        self.total += total.detach()
        self.number += number

    def compute(self) -> Tensor:
        return self.function(self.total / self.number.clamp(min=1))


class EttinModel(ComposerModel):
    """An Ettin encoder or decoder under Composer.

    tokenizer: the host's, for samples, export and a check of the vocabulary. size: a name in `config.SIZES`.
    objective: `mlm` or `mntp` (encoder), `clm` (decoder), or a schedule of them (objectives/schedule.py), whose
        last one, kept as `.objective`, decides what the model is. Rows of `clm` are causal whatever the model is.
    max_seq_len: longest document in tokens; becomes `max_position_embeddings`.
    attn_impl: `auto`, `flash`, `flex` or `reference`. init_device: the host's, which builds this under it.
    compile: `blocks`, `none`, or `auto`, which compiles blocks where there is a GPU.
    deterministic: torch's deterministic algorithms, in the whole process.
    overrides: fields of `EttinConfig` by name (`vocab_size`, `global_rope_theta`, `window_left`, ...).
    """

    def __init__(self, tokenizer: Any = None, *, size: str, objective: Any, max_seq_len: int, attn_impl: str = "auto",
                 compile: str = "auto", init_device: str = "cpu", deterministic: bool = False,
                 **overrides: Any) -> None:
        super().__init__()
        if deterministic:
            configure_deterministic_mode()
        self.objective_schedule = ObjectiveSchedule.parse(objective, key="model.objective")
        self.objective = self.objective_schedule.final
        config = EttinConfig.for_size(size, causal=self.objective == "clm", max_position_embeddings=max_seq_len,
                                      **overrides)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(f"model.vocab_size must be at least the {len(tokenizer)} entries of the tokenizer, got "
                             f"{config.vocab_size}")
        if attn_impl != "auto":  # a wish that can never be met here is refused before any work
            candidates(attn_impl, "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, compiles(compile))
        self.config, self.tokenizer = config, tokenizer
        # an explicit window belongs to rows of clm, also where the model ends as an encoder
        window = -1 if config.causal else overrides.get("window_left", -1)
        self.model = Ettin(config, attn_impl, config.with_causal(not config.causal, window))
        if compiles(compile):
            self.model.compile_blocks()
        log.info("blocks are %s (model.compile: %s)", "compiled" if self.model.compiled else "not compiled", compile)
        # read by Composer from the ComposerModel's direct children: what to shard, what to recompute, how to draw
        self.model.fsdp_wrap_fn = lambda module: isinstance(module, Block)  # type: ignore[assignment]
        self.model.activation_checkpointing_fn = self.model.fsdp_wrap_fn  # type: ignore[assignment]
        self.model.param_init_fn = init_parameters  # type: ignore[assignment]
        self._metrics = {"TargetCrossEntropy": TargetMean("nll", "num_loss_tokens"),  # in nats
                         "TargetPerplexity": TargetMean("nll", "num_loss_tokens", function=torch.exp),
                         "TargetAccuracy": TargetMean("correct", "num_targets")}

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`batch_loss` of a microbatch as `data.batch.split_batch` makes it."""
        if self.training and not set(batch["objective"].split("+")) <= set(self.objective_schedule.objectives):
            raise ValueError(f"model.objective must include the batch's {batch['objective']!r}, got "
                             f"{self.objective_schedule}; give the loader the same objective")
        return batch_loss(self.model, batch)

    @property
    def predictor(self) -> Predictor:
        return Predictor(self.model, self.tokenizer, self.objective)

    def loss(self, outputs: Mapping[str, Any], batch: Any) -> Tensor:
        """Mean over the microbatch's targets; the host weights microbatches by what they were divided by."""
        return outputs["loss"]

    def eval_forward(self, batch: Any, outputs: Any = None) -> dict[str, Any]:
        return outputs if outputs is not None else self.forward(batch)

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {} if is_train else self._metrics  # a training step counts nothing

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        metric.update(*(outputs[name] for name in metric.of))  # type: ignore[union-attr]

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Useful floating-point operations of a step on a batch of the loader; divided by the peak, the host's MFU."""
        pairs = sum(int((number * self.model.configs[causal].attended_pairs(length)).sum())
                    for causal, (length, number) in batch["document_lengths"].items())
        return self.config.flops(batch["num_tokens"], batch["num_targets"], pairs)
