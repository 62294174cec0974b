"""The plan's arithmetic against sums written out by hand."""

import copy
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf as om

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.tools import plan
from ettin_foundry.training.checks import model_config

ROOT = Path(__file__).resolve().parents[2]
NANO = om.to_container(om.load(ROOT / "yamls/nano.yaml"), resolve=True)


CHUNKS = (1, 2, 3, 1, 2, 2, 3)
"""Lengths of the chunks of `Data`."""


class Data:
    """Two shards in the shape of MDSSplit: chunks of 1, 2 and 3 tokens, rows counted for length 8 only."""

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
    facts = plan.data_facts(Data(), 8, packing=True)  # type: ignore[arg-type]
    assert (facts.num_tokens, facts.num_chunks, facts.num_rows) == (14 + 2 * 7, 7, 5)
    assert facts.attended_pairs(config) == sum(pairs_by_mask(config, n + 2) for n in CHUNKS)
    assert facts.documents == ((3, 2), (4, 3), (5, 2))
    assert plan.data_facts(Data(), 8, packing=False).num_rows == 7  # type: ignore[arg-type]
    assert plan.data_facts(Data(), 16, packing=True) is None  # type: ignore[arg-type]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """nano.yaml on `Data`: rows of 8, 10 a step, 1,000 tokens."""
    cfg = copy.deepcopy(NANO)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/manifest.json").touch()
    monkeypatch.setattr(plan, "open_split", lambda folder: Data())
    cfg["model"].update(max_seq_len=8)
    cfg["train_loader"].update(dataset={"local": str(tmp_path), "split": "train"})
    cfg.update(max_seq_len=8, global_train_batch_size=10, max_duration="1_000tok")
    return cfg


def work_per_token(cfg, targets, pairs):
    """Operations by hand: 6 for each weight of the layers, 6 for each of the head at a target, 12 C a pair."""
    c, layers = 128, 4 * (4 * 128 * 128 + 3 * 128 * 192)
    return 6 * layers + 6 * (c * c + c * cfg["model"]["vocab_size"]) * targets + 12 * c * pairs


@pytest.mark.parametrize("objective, rate, targets", [("mlm", 0.5, 7), ("clm", 0.0, 21)])
def test_a_plan_counts_real_tokens_steps_and_operations(small, objective, rate, targets):
    cfg = small
    cfg["model"].update(objective=objective)
    cfg["train_loader"].update(mask_rate=rate)
    result = plan.run_plan(cfg)
    assert result.measured and result.tokens_per_step == 56  # 28 tokens in 5 rows, 10 rows a step
    assert result.fill == 56 / 80
    assert result.num_steps == 18 and result.num_tokens == 18 * 56  # 17 steps are 952 tokens
    assert result.epochs == 18 * 56 / 28
    pairs = sum(pairs_by_mask(model_config(cfg), n + 2) for n in CHUNKS)
    assert result.flops_per_token == round(work_per_token(cfg, targets / 28, pairs / 28))
    assert result.targets_per_token == pytest.approx(targets / 28, rel=1e-12)
    assert result.flops_6n == 6 * result.parameters * result.num_tokens
    assert plan.run_plan({**cfg, "max_duration": "7ba"}).num_steps == 7


def test_a_schedule_is_weighed_by_its_tokens(small):
    """A quarter clm, then rows of mntp and clm; a rate from 0.4 to 0.2: each kind with its own mask."""
    objective = [{"until": 250, "objective": "clm"}, {"objective": {"mntp": 0.75, "clm": 0.25}}]
    small["model"].update(objective=objective, local_attention=4)
    small["train_loader"].update(objective=objective, mask_rate=[{"from": 0.4, "to": 0.2}])
    result = plan.run_plan(small)
    tokens = result.num_tokens
    assert tokens == 18 * 56
    causal = (250 + 0.25 * (tokens - 250)) / tokens
    assert result.shares == pytest.approx({"clm": causal, "mntp": 1 - causal}, rel=1e-12)
    rates = [0.4 - 0.2 * min(1.0, t / 1000) for t in range(tokens)]
    targets = causal * 21 / 28 + sum(0.75 * rate * 14 / 28 for rate in rates[250:]) / tokens
    assert result.targets_per_token == pytest.approx(targets, rel=1e-12)
    kinds = {kind: EttinConfig.for_size("nano", causal=kind, local_attention=4, vocab_size=8192) for kind in (True, False)}
    pairs = {kind: sum(pairs_by_mask(config, n + 2) for n in CHUNKS) / 28 for kind, config in kinds.items()}
    work = work_per_token(small, targets, causal * pairs[True] + (1 - causal) * pairs[False])
    assert result.flops_per_token == round(work)
    assert not result.causal and result.size == "nano"  # a mixture ends as the objective that it names first



@pytest.mark.parametrize("warmup_tokens, max_tokens", [(20_000, 100_000), (20_000, 9_000), (1_000, 100_000), (300, 50_000)])
def test_steps_with_a_batch_size_warm_up_are_those_of_a_walk(small, warmup_tokens, max_tokens):
    """Sizes 4, 8, ... 40, each for the same number of steps, one step after the other."""
    small["train_loader"]["batch_size_warmup"] = {"min_size": 4, "tokens": f"{warmup_tokens}tok"}
    small.update(global_train_batch_size=40, max_duration=f"{max_tokens}tok")
    each = max(1, round(warmup_tokens / (28 / 5 * 4 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9))))
    rows, steps, warm = 0, 0, 0
    while rows * 28 / 5 < max_tokens:
        size = min(40, 4 * (steps // each + 1))
        warm += size < 40
        rows, steps = rows + size, steps + 1
    result = plan.run_plan(small)
    assert (result.num_steps, result.warmup_steps, result.num_tokens) == (steps, warm, round(rows * 28 / 5))
    assert (result.first_rows, result.rows_per_step) == (4, 40)
    text = plan.aligned(plan.lines(small, result))
    assert f"after {warm} steps of 4 rows and more" in text
    share = {"min_size": 4, "tokens": f"{warmup_tokens / max_tokens}dur"}
    small["train_loader"]["batch_size_warmup"] = share
    assert plan.run_plan(small) == result


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
