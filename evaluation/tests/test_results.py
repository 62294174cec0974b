"""The result file: whole at any moment, and never a mixture of two models."""

from __future__ import annotations

import json
import statistics

import pytest
from ettin_eval.results import Results, mean_score


def test_mean_and_standard_error():
    items = [0.0, 1.0, 1.0, 0.5]
    score = mean_score("task", "acc", items)
    assert score.value == statistics.mean(items)
    # one rounding each of the sum, the square and the root
    assert score.stderr == pytest.approx(statistics.stdev(items) / 2, rel=1e-12)
    assert mean_score("task", "acc", [1.0]).stderr is None
    with pytest.raises(ValueError, match="at least one item, got none"):
        mean_score("task", "acc", [])


def test_a_file_goes_on_and_is_of_one_model(tmp_path):
    path, facts = tmp_path / "deep" / "out.json", {"model": "a", "kind": "encoder", "settings": {"seed": 0}}
    first = Results(path, facts)
    first.add("one", [mean_score("one", "acc", [1, 0, 1], shots=0)], 2.04)
    again = Results(path, facts)
    assert again.has("one") and not again.has("two")
    assert again.scores("one") == first.scores("one")
    assert again.content["created"] == first.content["created"]
    content = json.loads(path.read_text())
    assert content["tasks"]["one"]["seconds"] == 2.0
    assert {"transformers", "torch", "lm-eval", "mteb", "python"} <= set(content["versions"])
    with pytest.raises(ValueError, match="model must be 'b' as asked for, got 'a'; give another --out"):
        Results(path, {**facts, "model": "b"})
    with pytest.raises(ValueError, match="settings must be .* got .*; give another --out"):
        Results(path, {**facts, "settings": {"seed": 1}})
