"""Claims about whole runs, each through yamls/nano.yaml and LLM-Foundry's `train`, all in this one process."""

import json
from pathlib import Path

import nano_run
import numpy as np
import pytest
import torch

OBJECTIVES = {"mlm": [], "clm": nano_run.CLM, "mntp": ["variables.objective=mntp"]}
PAIR = ["mlm", "clm"]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def capture():
    return nano_run.register_capture()


@pytest.fixture(scope="module")
def data(data_set):
    """The fixtures' set; nano's vocabulary is set to the fixtures' tokenizer by `run`."""
    return data_set


def run(data, out, objective, *overrides):
    return nano_run.run(data, out, *OBJECTIVES[objective], "model.vocab_size=512", "callbacks.capture={}", *overrides)


def state_of(trainer):
    """Every tensor that training changes: parameters and optimizer moments, by name."""
    state = {f"model.{k}": v.clone() for k, v in trainer.state.model.state_dict().items()}
    names = {p: n for n, p in trainer.state.model.named_parameters()}
    for p, values in trainer.state.optimizers[0].state.items():
        state |= {f"{names[p]}.{k}": v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    return state


def rows_per_epoch(data):
    manifest = json.loads((data / "train" / "manifest.json").read_text())
    return sum(shard["rows"]["64"] for shard in manifest["shards"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("objective", PAIR)
def test_four_steps_resume_four_steps_equals_eight_steps_bitwise(objective, workers, data, capture, tmp_path):
    epoch_batch = rows_per_epoch(data) // 6  # eight steps of this cross the end of the epoch
    common = [f"variables.global_batch={epoch_batch}", "device_train_microbatch_size=32",
              f"train_loader.num_workers={workers}"]
    whole = run(data, tmp_path / "whole", objective, *common)
    expected, losses, lrs, tokens = state_of(whole), capture.losses, capture.lrs, capture.tokens
    assert int(whole.state.timestamp.sample) > rows_per_epoch(data)
    whole.close()

    first = run(data, tmp_path / "parts", objective, *common, "max_duration=4ba")
    assert capture.losses == losses[:4]
    first.close()
    second = run(data, tmp_path / "parts", objective, *common)
    assert int(second.state.timestamp.batch) == 8
    assert (capture.losses, capture.lrs, capture.tokens) == (losses[4:], lrs[4:], tokens[4:])
    resumed = state_of(second)
    second.close()
    assert resumed.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(expected[k], resumed[k])] == []


@pytest.mark.parametrize("objective", PAIR)
def test_microbatches_of_four_give_the_gradient_of_one_of_eight(objective, data, capture, tmp_path):
    grads, targets = [], []
    for microbatch in (8, 4):
        run(data, tmp_path / str(microbatch), objective, f"device_train_microbatch_size={microbatch}",
            "model.attn_out_dropout=0.0", "max_duration=1ba", "~save_folder", "~save_interval", "~autoresume",
            "~save_overwrite").close()
        grads.append(capture.gradients)
        targets.append([(row != -100).sum().item() for row in capture.batches[0]["labels"]])
    halves = sum(targets[0][:4]), sum(targets[0][4:])
    assert targets[0] == targets[1] and halves[0] != halves[1]  # the claim is empty if both halves weigh the same
    for name, gradient in grads[0].items():
        assert (gradient - grads[1][name]).abs().max() <= 1e-6 * gradient.abs().max(), name


def test_the_pair_reads_identical_rows_and_tokens_at_every_step(data, capture, tmp_path):
    seen = {}
    for objective in PAIR:
        run(data, tmp_path / objective, objective).close()
        seen[objective] = capture.batches
    for mlm, clm in zip(seen["mlm"], seen["clm"], strict=True):
        restored = torch.where(mlm["labels"] != -100, mlm["labels"], mlm["input_ids"])  # undo the masking
        assert torch.equal(restored, clm["input_ids"])
        assert torch.equal(mlm["sequence_id"], clm["sequence_id"])
        assert (mlm["step"], mlm["tokens_before"]) == (clm["step"], clm["tokens_before"])


@pytest.mark.parametrize("objective", PAIR)
def test_learning_rate_of_a_batch_is_that_of_the_tokens_before_it(objective, data, capture, tmp_path):
    trainer = run(data, tmp_path, objective, "variables.warmup=1500tok", "max_duration=6000tok",
                  "scheduler.t_decay=3000tok", "scheduler.alpha_f=0.02")
    trainer.close()
    assert capture.tokens[0] == 0 and len(capture.tokens) > 8
    for tokens, lr in zip(capture.tokens, capture.lrs):
        if tokens < 1500:
            factor = 1e-10 + (1 - 1e-10) * tokens / 1500
        elif tokens < 3000:
            factor = 1.0
        else:
            factor = 1 - (tokens - 3000) / 3000 * 0.98
        assert lr == pytest.approx(3e-3 * factor, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("objective", PAIR)
def test_losses_are_the_golden_ones(objective, data, capture, tmp_path):
    run(data, tmp_path, objective, "max_duration=20ba", "variables.warmup=5ba").close()
    path = GOLDEN / f"nano_{objective}_cpu_fp32.txt"
    golden = np.loadtxt(path)
    np.testing.assert_allclose(capture.losses, golden, rtol=0, atol=1e-4,
                               err_msg=f"the losses of {path.name} moved; a change that moves them says why")
    assert golden[-1] < golden[0] - 0.3  # losses of something that learns


@pytest.mark.parametrize("objective", ["mlm", "clm", "mntp"])
def test_validation_metrics_are_those_of_dense_logits(objective, data, capture, tmp_path):
    config = nano_run.configure(data, tmp_path, *OBJECTIVES[objective], "model.vocab_size=512")
    from omegaconf import OmegaConf
    recipe = OmegaConf.to_container(OmegaConf.load(nano_run.ROOT / "yamls" / "nano.yaml"))  # interpolations as they are
    labelled = {**recipe["eval_loader"], "label": "held_out"}
    config.eval_loader = labelled if objective == "mlm" else [labelled]  # both ways of writing it
    config.eval_interval = "2ba"
    config.max_duration = "2ba"
    import ettin_foundry
    ettin_foundry.register()
    from llmfoundry.command_utils import train
    trainer = train(config)
    metrics = {k: float(m.compute()) for k, m in trainer.state.eval_metrics["eval/held_out"].items()}
    from ettin_foundry.data.loader import flatten
    model = trainer.state.model.eval()
    nll, correct, number = 0.0, 0, 0
    with torch.no_grad():
        for batch in trainer.state.evaluators[0].dataloader.dataloader:
            flat = flatten(batch)
            hidden = model.model(flat["input_ids"], flat["position_ids"], flat["cu_seqlens"], flat["max_seqlen"])
            logits = model.model.predict(hidden[flat["target_positions"]])
            labels = flat["target_labels"]
            nll += torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
            correct += (logits.argmax(-1) == labels).sum().item()
            number += len(labels)
    trainer.close()
    assert number > 100
    assert metrics["TargetCrossEntropy"] == pytest.approx(nll / number, rel=1e-5)  # fp32 against float64
    assert metrics["TargetPerplexity"] == pytest.approx(np.exp(nll / number), rel=1e-4)
    assert metrics["TargetAccuracy"] == pytest.approx(correct / number, abs=1e-12)


@pytest.mark.parametrize(("source", "target"), [("mlm", "clm"), ("clm", "mntp")], ids=["enc_to_dec", "dec_to_enc"])
def test_nano_crosses_from_the_other_models_weights(source, target, data, capture, tmp_path):
    run(data, tmp_path / "source", source, "max_duration=2ba", "save_interval=2ba").close()
    checkpoint = next((tmp_path / "source").rglob("latest-rank0.pt"))
    weights = torch.load(checkpoint, weights_only=False)["state"]["model"]
    trainer = run(data, tmp_path / "crossed", target, "~autoresume", "max_duration=1ba",
                  f"callbacks.ettin_cross.source={checkpoint}", "variables.warmup=1ba")
    trainer.close()
    assert capture.tokens == [0]  # a fresh clock
    moved = {k: (v - weights[k]).abs().max().item() for k, v in trainer.state.model.state_dict().items()}
    # one step of at most lr (at most 1e-10 of the peak in the first step of a warm-up): still the source's weights
    assert max(moved.values()) < 1e-6
    assert trainer.state.model.config.causal == (target == "clm")


@pytest.mark.parametrize("objective", PAIR)
def test_a_batch_without_any_target_gives_zero_loss_and_training_goes_on(objective, data, capture, tmp_path):
    from composer import Callback
    from llmfoundry import registry

    class Blank(Callback):
        def after_dataloader(self, state, logger):
            if state.timestamp.batch == 1:
                state.batch["labels"].fill_(-100)
            elif state.timestamp.batch == 2:
                state.batch["labels"][:4] = -100  # the whole first microbatch

    registry.callbacks.register("blank", func=Blank)
    trainer = run(data, tmp_path, objective, "max_duration=3ba", "callbacks.blank={}")
    trainer.close()
    assert capture.losses[0] > 5 and capture.losses[1] == 0.0 and capture.losses[2] > 5
    assert all(p.isfinite().all() for p in trainer.state.model.parameters())
