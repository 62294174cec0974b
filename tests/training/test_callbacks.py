"""Samples and figures of the data."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from composer.core import Precision, Time, Timestamp

from ettin_foundry.training.callbacks import DataMonitor, LogSamples


class Sampler:
    """Answers with what it is asked."""

    objective = "clm"
    predictor = property(lambda self: self)

    def generate(self, prompts, max_new_tokens):
        return [f"{prompt} {max_new_tokens}" for prompt in prompts]

    def fill_mask(self, texts, top_k):
        return [[("a", 0.5)] * top_k for _ in texts]


def sample(callback, model, batch=2):
    tables = []
    state = SimpleNamespace(model=model, fsdp_config=None, precision=Precision.FP32, timestamp=Timestamp(batch=batch),
                            max_duration=Time(10, "ba"), previous_timestamp=Timestamp(batch=batch - 1),
                            get_elapsed_duration=lambda: Time(0.2, "dur"))
    callback.init(state, None)
    callback.batch_end(state, SimpleNamespace(log_table=lambda columns, rows, name: tables.append(rows)))
    return tables


def test_samples_are_logged_when_they_are_due(caplog):
    model = Sampler()
    with caplog.at_level(logging.INFO):
        tables = sample(LogSamples("2ba", ["once"], max_new_tokens=9), model)
    assert tables == [[["once", "'once 9'"]]] and "once 9" in caplog.text
    assert sample(LogSamples("2ba", ["once"]), model, batch=3) == []
    model.objective = "mlm"
    assert sample(LogSamples("2ba", ["[MASK]"], top_k=2), model) == [[["[MASK]", "'a' 0.500, 'a' 0.500"]]]


def test_settings_without_sense_are_refused():
    for interval, prompts, says in (("1ep", ["a"], "interval must be .*'1ep'"), ("0ba", ["a"], "interval must be"),
                                    ("1ba", [], "prompts"), ("1ba", "a", "prompts"), ("1ba", ["a"], "sharded")):
        with pytest.raises(ValueError, match=says):
            LogSamples(interval, prompts).init(SimpleNamespace(fsdp_config={}), None)  # type: ignore[arg-type]


def test_data_figures_of_a_batch():
    logged = {}
    batch = {"num_tokens": 3, "num_positions": 8, "num_targets": 2, "num_documents": 1}
    DataMonitor().batch_start(SimpleNamespace(batch=batch), SimpleNamespace(log_metrics=logged.update))  # type: ignore[arg-type]
    assert logged == {"data/fill": 3 / 8, "data/documents": 1, "data/targets": 2, "data/target_rate": 2 / 3}
