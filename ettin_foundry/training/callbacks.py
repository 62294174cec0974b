"""Callbacks that a recipe asks for by name: samples, figures of the data."""

from __future__ import annotations

import logging
from typing import Any

import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from ettin_foundry.training.run_config import require

log = logging.getLogger(__name__)


def interval_passed(key: str, value: str, *, at_end: bool = False) -> Any:
    """Composer's function of (state, event) that says when an interval has passed, or the training ended."""
    time = Time.from_input(value, TimeUnit.EPOCH)
    require(time.unit in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE) and time.value >= 1, key,
            "at least 1, in ba, tok or sp", value, "give a time such as 1000ba")
    return create_interval_scheduler(value, include_end_of_training=at_end)


class LogSamples(Callback):
    """Logs what the model makes of a few prompts: continuations of a decoder, filled masks of an encoder.

    Mode and random state are as before. Rank 0 samples alone, so sharded models are refused. interval: a time in ba,
    tok or sp. prompts: texts; for encoders each with one mask token. top_k: candidates for a mask.
    """

    def __init__(self, interval: str, prompts: list[str], max_new_tokens: int = 32, top_k: int = 3):
        require(not isinstance(prompts, str) and prompts, "callbacks.ettin_samples.prompts",
                "a list of at least one text", prompts, "write a YAML list")
        self.prompts, self.max_new_tokens, self.top_k = list(prompts), max_new_tokens, top_k
        self._due = interval_passed("callbacks.ettin_samples.interval", interval)
        self._model: Any = None

    def init(self, state: State, logger: Logger) -> None:
        if state.fsdp_config is not None:
            raise ValueError("callbacks.ettin_samples: given with fsdp_config; one rank cannot run a sharded model")
        self._model = state.model

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self._due(state, Event.BATCH_CHECKPOINT) or dist.get_global_rank() != 0:
            return
        was_training, predictor = self._model.training, self._model.predictor
        self._model.eval()
        with torch.random.fork_rng(), torch.no_grad(), get_precision_context(state.precision):
            if self._model.objective == "clm":
                texts = [repr(text) for text in predictor.generate(self.prompts, max_new_tokens=self.max_new_tokens)]
            else:
                texts = [", ".join(f"{token!r} {share:.3f}" for token, share in candidates)
                         for candidates in predictor.fill_mask(self.prompts, top_k=self.top_k)]
        self._model.train(was_training)
        for prompt, text in zip(self.prompts, texts):
            log.info("batch %d: %r -> %s", state.timestamp.batch.value, prompt, text)
        logger.log_table(["prompt", "output"], [list(row) for row in zip(self.prompts, texts)], name="samples")


class DataMonitor(Callback):
    """Logs of rank 0's share of the batch: data/fill (real tokens over positions),
    data/targets and data/documents (counts), data/target_rate (targets over tokens).
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        batch: Any = state.batch
        logger.log_metrics({"data/fill": batch["num_tokens"] / batch["num_positions"],
                            "data/targets": batch["num_targets"], "data/documents": batch["num_documents"],
                            "data/target_rate": batch["num_targets"] / max(1, batch["num_tokens"])})
