"""Claims about runs whose objective or mask rate changes, through yamls/nano.yaml and LLM-Foundry's `train`."""

import nano_run
import pytest
import torch
import torch.nn.functional as F

from ettin_foundry.model.composer import EttinModel

SWITCH = "variables.objective=[{until: 1500, objective: clm}, {objective: mlm}]"
BIPHASIC = [SWITCH, "variables.label=biphasic", "variables.warmup=400tok", "variables.mask_rate=0.3",
            "variables.eval_mask_rate=0.15", "max_duration=4000tok"]
CLM = [*nano_run.CLM, "variables.warmup=400tok", "max_duration=4000tok"]
MIXTURE = ["variables.objective={mntp: 0.5, clm: 0.5}", "variables.label=mixture", "variables.mask_rate=0.15"]


@pytest.fixture(scope="module")
def capture():
    return nano_run.register_capture()


def run(data, out, *overrides, **kwargs):
    return nano_run.run(data, out, "model.vocab_size=512", "callbacks.capture={}", *overrides, **kwargs)


def weights_of(trainer):
    return {k: v.clone() for k, v in trainer.state.model.state_dict().items()}


def test_a_biphasic_run_is_the_clm_run_up_to_the_switch_and_resumes_on_both_sides_of_it(data_set, capture, tmp_path):
    run(data_set, tmp_path / "clm", *CLM).close()
    clm, clm_lrs = capture.losses, capture.lrs
    trainer = run(data_set, tmp_path / "both", *BIPHASIC)
    losses, lrs, tokens = capture.losses, capture.lrs, capture.tokens
    objectives = [batch["objective"] for batch in capture.batches]
    final = weights_of(trainer)
    trainer.close()
    steps = sum(t < 1500 for t in tokens)
    assert objectives == ["clm"] * steps + ["mlm"] * (len(tokens) - steps) and 2 <= steps <= len(tokens) - 3
    assert losses[:steps] == clm[:steps] and lrs == clm_lrs and losses[steps] != clm[steps]
    assert trainer.state.model.objective == "mlm" and not trainer.state.model.config.causal
    for stop in (steps - 1, steps + 1):
        out = tmp_path / f"stopped{stop}"
        code = _stop_after(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            run(data_set, out, *BIPHASIC, "save_interval=1ba", f"callbacks.{code}={{}}")
        resumed = run(data_set, out, *BIPHASIC, "save_interval=1ba")
        assert capture.losses == losses[stop:]
        again = weights_of(resumed)
        assert all(torch.equal(again[k], final[k]) for k in final)
        resumed.close()


def _stop_after(batches):
    """Registers a callback that fails once that many batches are done and saved."""
    from composer import Callback
    from llmfoundry import registry

    class Stop(Callback):
        def batch_start(self, state, logger):
            if state.timestamp.batch == batches:
                raise RuntimeError("stopped")

    registry.callbacks.register(f"stop{batches}", func=Stop)
    return f"stop{batches}"


def test_all_objectives_read_the_same_rows(data_set, capture, tmp_path):
    hashes = {}
    for name, overrides in (("mlm", []), ("both", BIPHASIC), ("mixture", MIXTURE),
                            ("mdlm", ["variables.objective=mdlm", "variables.mask_rate=0.0"])):
        run(data_set, tmp_path / name, *overrides, "variables.warmup=400tok", "max_duration=4000tok", "~save_folder",
            "~save_interval", "~autoresume", "~save_overwrite").close()
        hashes[name] = [(batch["step"], batch["tokens_before"], batch["ids_hash"]) for batch in capture.batches]
        assert all(0 < loss < 20 for loss in capture.losses)
    assert len(hashes["mlm"]) > 5 and all(each == hashes["mlm"] for each in hashes.values())


def test_the_mask_rate_of_each_step_is_its_formula(data_set, capture, tmp_path):
    run(data_set, tmp_path, "variables.mask_rate=[{until: 0.5dur, from: 0.6, to: 0.2}, {rate: 0.1}]",
        "variables.eval_mask_rate=0.15", "variables.warmup=400tok", "max_duration=4000tok").close()
    for tokens, batch in zip(capture.tokens, capture.batches, strict=True):
        expected = 0.6 - 0.4 * tokens / 2000 if tokens < 2000 else 0.1
        assert batch["mask_rate"] == pytest.approx(expected, rel=1e-12)  # float64
        text = int((batch["sequence_id"] >= 0).sum()) - 2 * int((batch["sequence_id"].amax(1) + 1).sum())
        chosen = int((batch["labels"] != -100).sum())
        assert abs(chosen - expected * text) <= 5 * (text * expected * (1 - expected)) ** 0.5 + 8  # five deviations


def weighted_sum_gradient(weights, batch):
    """Gradients of the mixture's loss from dense logits: each row through a model of its own kind, summed in float64."""
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
    """Whatever the microbatches, one of which holds rows of both kinds; against float64 sums over dense logits."""
    from composer import Callback
    from llmfoundry import registry

    start = {}

    class Start(Callback):
        def fit_start(self, state, logger):
            start.update(weights_of(type("T", (), {"state": state})))

    registry.callbacks.register("start", func=Start)
    run(data_set, tmp_path, *MIXTURE, f"device_train_microbatch_size={microbatch}", "model.attn_out_dropout=0.0",
        "max_duration=1ba", "callbacks.start={}", "~save_folder", "~save_interval", "~autoresume", "~save_overwrite").close()
    [batch] = capture.batches
    assert 2 <= int(batch["causal"].sum()) <= 6 and batch["objective"] == "mntp+clm"
    loss, gradients = weighted_sum_gradient(start, batch)
    assert capture.losses[0] == pytest.approx(loss, rel=1e-5)  # fp32 against float64
    for name, gradient in gradients.items():
        distance = (capture.gradients[name].double() - gradient).norm()
        assert distance <= 2e-5 * gradient.norm(), name  # fp32 sums of a few hundred targets


def test_both_objectives_are_evaluated_and_named(data_set, capture, tmp_path):
    trainer = run(data_set, tmp_path, *BIPHASIC, "eval_interval=4ba", evaluate=True)
    found = {label: {name: float(metric.compute()) for name, metric in metrics.items()}
             for label, metrics in trainer.state.eval_metrics.items()}
    assert set(found) == {"eval/clm", "eval/mlm"}
    assert all(0 < metrics["TargetCrossEntropy"] < 7 for metrics in found.values())
    # the clm evaluation is that of a decoder with these weights, though the model ends as an encoder
    twin = EttinModel(objective="clm", size="nano", max_seq_len=64, vocab_size=512).eval()
    twin.load_state_dict(weights_of(trainer))
    loader = next(e.dataloader.dataloader for e in trainer.state.evaluators if e.label == "eval/clm")
    nll = count = 0
    with torch.no_grad():
        for batch in loader:
            for row in range(len(batch["labels"])):
                for number in range(int(batch["sequence_id"][row].max()) + 1):
                    here = batch["sequence_id"][row] == number
                    ids, labels = batch["input_ids"][row][here], batch["labels"][row][here]
                    ends = torch.tensor([0, len(ids)], dtype=torch.int32)
                    hidden = twin.model(ids, torch.arange(len(ids)), ends, len(ids))
                    nll += F.cross_entropy(twin.model.predict(hidden).double(), labels, reduction="sum").item()
                    count += int((labels != -100).sum())
    assert found["eval/clm"]["TargetCrossEntropy"] == pytest.approx(nll / count, rel=1e-5)  # fp32 against float64
    trainer.close()


@pytest.mark.parametrize(("overrides", "words"), [
    ([SWITCH, "max_duration=4000tok"], ["run_name", "variables.label"]),
    ([SWITCH, "variables.label=x", "variables.mask_rate=0.3", "max_duration=8ba"], ["max_duration", "8ba", "in tok"]),
    (["variables.objective=[{until: 0.5dur, objective: clm}, {until: 0.9dur, objective: mlm}]", "variables.label=x",
      "variables.warmup=1tok",
      "max_duration=4000tok"],
     ["model.objective[1].until", "0.9dur", "4,000"]),
    (["variables.objective=mdlm"], ["train_loader.mask_rate: 0.3", "mdlm"]),
    (["variables.mask_rate=[{rate: 0.3}]", "variables.warmup=1tok", "max_duration=4000tok"],
     ["eval_loader.mask_rate", "one rate"]),
    (["train_loader.objective=clm"], ["train_loader.objective", "'clm'", "'mlm'"]),
])
def test_schedules_that_cannot_be_are_refused_before_work(overrides, words, data_set, tmp_path):
    from omegaconf import OmegaConf

    from ettin_foundry.training import checks

    config = nano_run.configure(data_set, tmp_path, *overrides, evaluate=True)
    with pytest.raises(ValueError) as error:
        checks.check_settings(OmegaConf.to_container(config, resolve=True))
    for word in words:
        assert word in str(error.value)


OPTIONS = {"biphasic": ("mlm", ("clm", "mlm")), "alternating": ("clm", ("clm", "mlm")), "mixture": ("mntp", ("mntp", "clm")),
           "mask-steps": ("mlm", ("mlm",)), "mdlm": ("mdlm", ("mdlm", "mlm"))}


@pytest.mark.parametrize("recipe", ["ettin-enc-400m", "nano"])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_of_objectives_is_a_valid_run_that_evaluates_what_it_trains(option, recipe):
    from ettin_foundry.training import check_objectives, checks
    from ettin_foundry.training.recipes import resolved

    files = [str(nano_run.ROOT / "yamls" / name) for name in (f"{recipe}.yaml", f"options/{option}.yaml")]
    cfg = resolved(files)
    checks.check_settings(cfg)
    final, evaluated = OPTIONS[option]
    assert checks.objective_schedule(cfg).final == final
    assert checks.model_config(cfg).causal == (final == "clm")
    check_objectives.resolve_schedules(cfg)
    found = [block["objective"] for block in cfg.get("eval_loaders") or [cfg["eval_loader"]]]
    assert tuple(found) == evaluated
    assert all(("mask_rate" in block) == (block["objective"] == "mlm" or block["objective"] == "mntp")
               for block in cfg.get("eval_loaders") or [])
