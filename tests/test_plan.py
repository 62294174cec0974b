"""The plan's arithmetic against sums written out by hand."""

import copy
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf as om

from ettin_foundry import plan
from ettin_foundry.checks import model_config

ROOT = Path(__file__).resolve().parents[1]
NANO = om.to_container(om.load(ROOT / "yamls/nano.yaml"), resolve=True)


class Data:
    """Two shards in the shape of MDSSet: chunks of 1, 2 and 3 tokens, rows counted for length 8 only."""

    chunk_length, num_shards = 3, 2
    samples, tokens = np.array([3, 4]), np.array([6, 8])

    def rows(self, length):
        return np.array([2, 3]) if length == 8 else None

    def lengths(self, shard):
        return np.array([[0, 1, 1, 1], [0, 1, 2, 1]], dtype=np.uint32)[shard]


def pairs_by_mask(config, length):
    """Every layer's attention mask written out, and its ones counted."""
    i, j = np.mgrid[:length, :length]
    total = 0
    for layer in range(config.num_hidden_layers):
        left, right = (length, 0 if config.causal else length) if config.is_global(layer) else config.local_window
        total += int(((i - j <= left) & (j - i <= right)).sum())
    return total


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_data_facts_are_sums_over_documents(objective):
    cfg = copy.deepcopy(NANO)
    cfg["model"].update(objective=objective, local_attention=4)
    config = model_config(cfg)
    facts = plan.data_facts(Data(), config, 8, packing=True)  # type: ignore[arg-type]
    assert (facts.num_tokens, facts.num_chunks, facts.num_rows) == (14 + 2 * 7, 7, 5)
    assert facts.attended_pairs == sum(pairs_by_mask(config, n + 2) for n in (1, 2, 3, 1, 2, 2, 3))
    assert plan.data_facts(Data(), config, 8, packing=False).num_rows == 7  # type: ignore[arg-type]
    assert plan.data_facts(Data(), config, 16, packing=True) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("objective, rate, targets", [("mlm", 0.5, 7), ("clm", 0.0, 21)])
def test_a_plan_counts_real_tokens_steps_and_operations(tmp_path, monkeypatch, objective, rate, targets):
    cfg = copy.deepcopy(NANO)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/manifest.json").touch()
    monkeypatch.setattr(plan, "open_set", lambda folder: Data())
    cfg["model"].update(objective=objective, max_seq_len=8)
    cfg["train_loader"].update(mask_rate=rate, dataset={"local": str(tmp_path), "split": "train"})
    cfg.update(max_seq_len=8, global_train_batch_size=10, max_duration="1_000tok")
    result = plan.run_plan(cfg)
    assert result.measured and result.tokens_per_step == 56  # 28 tokens in 5 rows, 10 rows a step
    assert result.fill == 56 / 80
    assert result.num_steps == 18 and result.num_tokens == 18 * 56  # 17 steps are 952 tokens
    assert result.epochs == 18 * 56 / 28
    config = model_config(cfg)
    facts = plan.data_facts(Data(), config, 8, packing=True)  # type: ignore[arg-type]
    assert facts is not None
    c, layers = config.hidden_size, 4 * (4 * 128 * 128 + 3 * 128 * 192)
    work = 6 * layers * 28 + 6 * (c * c + c * 8192) * targets + 12 * c * facts.attended_pairs
    assert result.flops_per_token == round(work / 28)
    assert plan.run_plan({**cfg, "max_duration": "7ba"}).num_steps == 7


def test_without_data_rows_are_taken_to_be_full_and_the_report_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = plan.run_plan(NANO)  # type: ignore[arg-type]
    assert not result.measured and result.epochs is None and result.fill == 1
    assert result.num_steps == -(-4_000_000 // 8192)
    text = plan.report(NANO)  # type: ignore[arg-type]
    for words in ("1,631,488 parameters", "8,192 real tokens", "489 steps", "the data is not there yet", "reference:"):
        assert words in text


def test_a_run_of_another_model_has_no_report():
    assert plan.report({"model": {"name": "mpt_causal_lm"}}) == ""
