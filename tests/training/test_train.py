"""Claims about whole runs, each through yamls/nano.yaml and LLM-Foundry's `train`, all in this one process."""

from pathlib import Path

import nano_run
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ettin_foundry.model.composer import EttinModel
from ettin_foundry.tools.pair import compare_steps
from ettin_foundry.training import checks, run_config
from ettin_foundry.training.run_config import resolved
from ettin_foundry.training.steps import read_steps

OBJECTIVES = {"mlm": [], "clm": nano_run.CLM, "mntp": ["variables.objective=mntp"],
    "biphasic": ["variables.objective=[{until: 1500, objective: clm}, {objective: mlm}]", "variables.label=biphasic",
                 "variables.warmup=400tok", "variables.eval_mask_rate=0.15", "max_duration=4000tok"],
    "mixture": ["variables.objective={mntp: 0.5, clm: 0.5}", "variables.label=mixture", "variables.mask_rate=0.15"]}
PAIR = ["mlm", "clm"]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
UNSAVED = ["~save_folder", "~save_interval", "~autoresume", "~save_overwrite"]


def run(data, out, objective, *overrides, **kwargs):
    return nano_run.run(data, out, *OBJECTIVES[objective], "callbacks.capture={}", *overrides, **kwargs)


@pytest.mark.parametrize("objective", PAIR)
def test_losses_are_the_golden_ones(objective, data_set, capture, tmp_path):
    run(data_set, tmp_path, objective, "max_duration=20ba", "variables.warmup=5ba").close()
    path = GOLDEN / f"nano_{objective}_cpu_fp32.txt"
    golden = np.loadtxt(path)
    np.testing.assert_allclose(capture.losses, golden, rtol=0, atol=1e-4,
                               err_msg=f"the losses of {path.name} moved; a change that moves them says why")
    assert golden[-1] < golden[0] - 0.3  # losses of something that learns


@pytest.mark.parametrize("objective", ["mlm", "clm", "mntp"])
def test_validation_metrics_are_those_of_dense_logits(objective, data_set, capture, tmp_path):
    trainer = run(data_set, tmp_path, objective, "eval_interval=2ba", "max_duration=2ba", "eval_loader.label=held_out",
                  "eval_subset_num_batches=-1", evaluate=True)
    metrics = {k: float(m.compute()) for k, m in trainer.state.eval_metrics["eval/held_out"].items()}
    model = trainer.state.model.eval()
    nll, correct, number = 0.0, 0, 0
    with torch.no_grad():
        for flat in (part for batch in trainer.state.evaluators[0].dataloader.dataloader
                     for part in batch["microbatches"].unpack()):
            hidden = model.model(flat["input_ids"], flat["position_ids"], flat["cu_seqlens"], flat["max_seqlen"])
            logits = model.model.predict(hidden[flat["target_positions"]])
            labels = flat["target_labels"]
            nll += F.cross_entropy(logits.double(), labels, reduction="sum").item()
            correct += (logits.argmax(-1) == labels).sum().item()
            number += len(labels)
    trainer.close()
    assert number > 100
    assert metrics["TargetCrossEntropy"] == pytest.approx(nll / number, rel=1e-5)  # fp32 against float64
    assert metrics["TargetPerplexity"] == pytest.approx(np.exp(nll / number), rel=1e-4)
    assert metrics["TargetAccuracy"] == pytest.approx(correct / number, abs=1e-12)


# ------------------------------------------------------------------ objectives that change or are mixed


def test_a_biphasic_run_is_the_clm_run_up_to_the_switch(data_set, capture, tmp_path):
    run(data_set, tmp_path / "clm", "clm", "variables.warmup=400tok", "max_duration=4000tok").close()
    clm, clm_lrs = capture.losses, capture.lrs
    trainer = run(data_set, tmp_path / "both", "biphasic")
    losses, lrs, tokens = capture.losses, capture.lrs, capture.tokens
    trainer.close()
    [one], [other] = ([*(tmp_path / name).iterdir()] for name in ("clm", "both"))
    assert compare_steps(one, other) is None  # they read the same documents
    objectives = [entry["objective"] for entry in read_steps(other)]
    steps = sum(t < 1500 for t in tokens)
    assert objectives == ["clm"] * steps + ["mlm"] * (len(tokens) - steps) and 2 <= steps <= len(tokens) - 3
    assert losses[:steps] == clm[:steps] and lrs == clm_lrs and losses[steps] != clm[steps]
    assert trainer.state.model.objective == "mlm" and not trainer.state.model.config.causal


def weighted_sum_gradient(weights, batch):
    """Gradients of the mixture's loss from dense logits: each row through a model of its own kind; float64 sums."""
    fields = {"size": "nano", "max_seq_len": 64, "vocab_size": 512, "attn_out_dropout": 0.0}
    models = {kind: EttinModel(objective="clm" if kind else "mlm", **fields).train() for kind in (False, True)}
    total, divisor = torch.zeros((), dtype=torch.float64), 0
    for model in models.values():
        model.load_state_dict(weights)
    for row, causal in enumerate(batch["causal"].tolist()):
        for number in range(int(batch["sequence_id"][row].max()) + 1):
            here = batch["sequence_id"][row] == number
            ids, labels = batch["input_ids"][row][here], batch["labels"][row][here]
            inner = models[causal].model
            hidden = inner(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids))
            nll = F.cross_entropy(inner.predict(hidden).double(), labels, ignore_index=-100, reduction="sum")
            total = total + nll * (1.0 if causal else 1 / 0.15)
            divisor += int((labels != -100).sum()) if causal else len(ids) - 2  # all but BOS and EOS could be masked
    (total / divisor).backward()
    parts = [dict(model.named_parameters()) for model in models.values()]
    return (total / divisor).item(), {name: sum(p[name].grad.double() for p in parts if p[name].grad is not None)
                                      for name in parts[0]}


@pytest.mark.parametrize("microbatch", [8, 3])
def test_a_mixture_has_the_gradient_of_the_weighted_sum(microbatch, data_set, capture, tmp_path):
    """Whatever the microbatches; against float64 sums over dense logits."""
    run(data_set, tmp_path, "mixture", f"device_train_microbatch_size={microbatch}", "model.attn_out_dropout=0.0",
        "max_duration=1ba", *UNSAVED).close()
    [batch] = capture.batches
    assert 2 <= int(batch["causal"].sum()) <= 6 and batch["objective"] == "mntp+clm"
    loss, gradients = weighted_sum_gradient(capture.weights, batch)
    assert capture.losses[0] == pytest.approx(loss, rel=1e-5)  # fp32 against float64
    for name, gradient in gradients.items():
        distance = (capture.gradients[name].double() - gradient).norm()
        assert distance <= 2e-5 * gradient.norm(), name  # fp32 sums of a few hundred targets


OPTIONS = {"biphasic": ("mlm", ["clm", "mlm"]), "alternating": ("clm", ["clm", "mlm"]), "mask-steps": ("mlm", ["mlm"]),
           "mixture": ("mntp", ["mntp", "clm"])}


@pytest.mark.parametrize("recipe", ["ettin-enc-400m", "nano"])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_of_objectives_is_a_valid_run_that_evaluates_what_it_trains(option, recipe):
    cfg = resolved([str(nano_run.ROOT / "yamls" / name) for name in (f"{recipe}.yaml", f"options/{option}.yaml")])
    checks.check_settings(cfg)
    final, evaluated = OPTIONS[option]
    assert run_config.objective_schedule(cfg).final == final and run_config.model_config(cfg).causal == (final == "clm")
    checks.resolve_schedules(cfg)
    blocks = cfg.get("eval_loaders") or [cfg["eval_loader"]]
    assert [block["objective"] for block in blocks] == evaluated
    assert all(("mask_rate" in block) == (block["objective"] != "clm") for block in blocks)
