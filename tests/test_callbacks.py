"""The clock under Composer's own Trainer, crossing objectives, exports, samples and data figures."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("composer")
pytest.importorskip("llmfoundry")

from composer import Callback, ComposerModel, DataSpec, Trainer  # noqa: E402
from composer.core import Precision, Time, Timestamp  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from ettin_foundry import checkpoint  # noqa: E402
from ettin_foundry.callbacks import Clock, CrossObjective, DataMonitor, ExportHF, LogSamples  # noqa: E402
from ettin_foundry.composer_model import EttinModel  # noqa: E402
from ettin_foundry.optim import StableAdamW, WarmupStableDecay, warmup_stable_decay  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

LR, TOTAL = 0.01, 60


def tokens_of(step: int) -> int:
    return (3, 7, 4, 9, 5, 6, 8, 2, 6, 6, 6, 6)[step]  # uneven, as real tokens per batch are


class Stream(IterableDataset):
    """Batches that know their place, endless, resumed by state, as the real loader's."""

    def __init__(self, start: int = 0):
        self.start = start

    def __iter__(self):
        for step in range(self.start, 12):
            yield {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(step)), "count": tokens_of(step),
                   "tokens_before": sum(tokens_of(s) for s in range(step))}

    def state_dict(self, num_samples, from_beginning):
        return {"start": num_samples // 2}

    def load_state_dict(self, state):
        self.start = state["start"]


class Toy(ComposerModel):
    objective = "clm"
    config = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def forward(self, batch):
        return self.model(batch["x"])

    def loss(self, outputs, batch):
        return outputs.square().mean()


class Recorder(Callback):
    def __init__(self):
        self.lrs: dict[int, list[float]] = {}

    def after_train_batch(self, state, logger):
        self.lrs[state.timestamp.batch.value] = [group["lr"] for group in state.optimizers[0].param_groups]


def trainer(folder=None, *, lr=LR, decay=1e-4, clock=None, stream=None, duration=f"{TOTAL}tok", callbacks=(), model=None,
            **kwargs):
    model = model or Toy()
    data = DataSpec(
        DataLoader(stream or Stream(), batch_size=None), split_batch=lambda batch, size: [batch],
        get_num_samples_in_batch=lambda batch: 2,
        get_num_tokens_in_batch=lambda batch, token_type="total": batch["count"])
    config = {"save_folder": str(folder) if folder else None, **{k: kwargs.get(k) for k in ("load_path", "autoresume")}}
    saving = {"save_folder": str(folder), "save_interval": "4ba", "save_overwrite": True} if folder else {}
    return Trainer(
        model=model, train_dataloader=data, device_train_microbatch_size=2, max_duration=duration, device="cpu", seed=5,
        optimizers=StableAdamW(model.parameters(), lr, weight_decay=decay), run_name="toy", progress_bar=False,
        schedulers=WarmupStableDecay("10tok", "20tok", t_max=f"{TOTAL}tok", alpha_f=0.1),
        callbacks=[clock or Clock(config), *callbacks], **saving, **kwargs)


def fit(**kwargs):
    recorder = Recorder()
    run = trainer(callbacks=[recorder], **kwargs)
    run.fit()
    run.close()
    return run, recorder


@pytest.fixture(autouse=True)
def _validation(monkeypatch):
    """Clock sets it for the whole process; here each test starts without."""
    monkeypatch.delenv("CHECKPOINT_VALIDATION_FUNCTION", raising=False)
    yield
    os.environ.pop("CHECKPOINT_VALIDATION_FUNCTION", None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of its own to the end, with its save folder."""
    folder = tmp_path_factory.mktemp("whole")
    return (*fit(folder=folder), folder)


def test_the_lr_of_each_batch_is_the_schedule_at_the_tokens_before_it(whole):
    _, recorder, _ = whole
    assert len(recorder.lrs) > 8
    for step, lrs in recorder.lrs.items():
        t = sum(tokens_of(s) for s in range(step))
        expected = LR * warmup_stable_decay(t, warmup=10, decay=20, total=TOTAL, alpha_f=0.1)
        assert lrs == [expected, expected]


def test_a_resumed_run_equals_one_that_never_stopped_bitwise(whole, tmp_path):
    """Parameters after dropout, and the lr of every batch; autoresume finds the checkpoint though its link is gone."""
    run, recorder, _ = whole
    fit(folder=tmp_path, duration="23tok")  # the tokens of batches 0 to 3
    (tmp_path / "latest-rank0.pt").unlink()
    (tmp_path / "ep0-ba6-rank0.pt").write_bytes(b"PK half a file")
    resumed, again = fit(folder=tmp_path, autoresume=True)
    assert min(again.lrs) == 4
    assert again.lrs == {step: lrs for step, lrs in recorder.lrs.items() if step >= 4}
    for a, b in zip(run.state.model.parameters(), resumed.state.model.parameters()):
        assert torch.equal(a, b)


def test_a_stream_at_another_place_than_the_clock_is_refused():
    with pytest.raises(ValueError, match=r"after 14 tokens of the stream.*counted 0 at batch 0"):
        fit(stream=Stream(start=3))


@pytest.mark.parametrize(("change", "says"), [
    ({"lr": 0.02}, r"optimizer.lr: 0.02 in the config, 0.01 in the checkpoint"),
    ({"decay": 2e-4}, r"optimizer.weight_decay: 0.0002 in the config, 0.0001"),
])
def test_a_changed_setting_in_the_middle_of_a_run_is_refused(whole, change, says):
    with pytest.raises(ValueError, match=says):
        trainer(load_path=str(whole[2] / "ep0-ba4-rank0.pt"), **change)


def test_a_new_phase_takes_the_recipes_values_and_keeps_the_moments(whole):
    clock = Clock({})
    run = trainer(load_path=str(whole[2] / "ep0-ba4-rank0.pt"), lr=0.02, decay=2e-4, clock=clock,
                  load_ignore_keys=["state/timestamp", "state/dataset_state", "rng"])
    groups = run.state.optimizers[0].param_groups
    assert [(g["initial_lr"], g["max_lr"], g["weight_decay"]) for g in groups] == [(0.02, 0.02, 2e-4), (0.02, 0.02, 0.0)]
    assert run.state.schedulers[0].base_lrs == [0.02, 0.02]  # type: ignore[attr-defined]
    assert int(groups[0]["step"]) == 4
    assert clock.lineage == ({"objective": "clm", "tokens": sum(tokens_of(s) for s in range(4))},)
    run.close()


def test_another_objective_is_refused_and_pointed_to_the_cross_callback(whole):
    model = Toy()
    model.objective = "mlm"
    for ignored in ([], ["state/timestamp", "state/dataset_state", "rng"]):
        with pytest.raises(ValueError, match="objective is clm, this run's is mlm.*ettin_cross"):
            trainer(model=model, load_path=str(whole[2] / "ep0-ba4-rank0.pt"), load_ignore_keys=ignored)


def test_a_changed_model_function_in_the_middle_of_a_run_is_refused():
    clock = Clock({})
    model = EttinModel(size="nano", objective="clm", max_seq_len=64, vocab_size=512)
    clock.init(SimpleNamespace(model=model, timestamp=Timestamp()), None)  # type: ignore[arg-type]
    saved = clock.state_dict()
    assert saved["size"] == "nano" and saved["config"]["vocab_size"] == 512 and saved["objective"] == "clm"
    saved["config"]["global_rope_theta"] = 1.0
    clock._check_loaded(saved, new_phase=True)
    with pytest.raises(ValueError, match=r"model.global_rope_theta: 10000.0 in the config, 1.0 in the checkpoint"):
        clock._check_loaded(saved, new_phase=False)


def test_a_payload_given_as_load_path_is_refused_and_not_run(tmp_path):
    from test_checkpoint import Payload

    torch.save({"state": Payload(tmp_path / "mark")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="system"):
        trainer(load_path=str(tmp_path / "bad.pt"))
    with pytest.raises(ValueError, match="archives are unpacked"):
        trainer(load_path=str(tmp_path / "bad.tar.gz"))
    assert not (tmp_path / "mark").exists()


def test_gradients_are_scaled_at_the_loss_whatever_its_form():
    clock = Clock({})
    clock._gradient_factor = 0.25
    for wrap in (lambda a: a, lambda a: {"total": a, "part": a.detach()}, lambda a: (a,), lambda a: {"only": a}):
        x = torch.ones(1, requires_grad=True)
        loss = x * 8
        clock.before_backward(SimpleNamespace(loss=wrap(loss)), None)  # type: ignore[arg-type]
        loss.mul_(0.5)  # as Composer weights a microbatch, in place
        loss.backward()
        assert x.grad == 1.0 and loss == 4.0


# ------------------------------------------------------------------ crossing objectives


def ettin(objective, **kwargs):
    return EttinModel(**{"size": "nano", "objective": objective, "max_seq_len": 64, "vocab_size": 512, **kwargs})


def crossing(model, source, **kwargs):
    clock, cross = Clock({}), CrossObjective(str(source))
    run = Trainer(model=model, device="cpu", callbacks=[cross, clock], run_name="cross", progress_bar=False,
                  optimizers=StableAdamW(model.parameters(), LR), **kwargs)
    run.close()
    return run, clock, cross


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A decoder's checkpoint, as Composer and Clock write it."""
    folder = tmp_path_factory.mktemp("decoder")
    model = ettin("clm")
    with torch.no_grad():  # every model of a seed starts alike: without this, weights that were never loaded look loaded
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    run = Trainer(model=model, device="cpu", callbacks=Clock({}), progress_bar=False)
    path = run.save_checkpoint(str(folder / "ep0-ba7-rank0.pt"))
    run.close()
    return run.state.model, Path(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["file", "save folder"])
def test_an_encoder_starts_from_a_decoders_weights_with_a_fresh_clock(decoder, kind):
    old, path = decoder
    run, clock, _ = crossing(ettin("mntp", global_rope_theta=160000.0), path if kind == "file" else path.parent)
    for (name, a), (_, b) in zip(old.named_parameters(), run.state.model.named_parameters()):
        assert torch.equal(a, b), name
    assert run.state.timestamp.batch == 0 and not run.state.optimizers[0].state
    assert [(e["objective"], e["tokens"]) for e in clock.lineage] == [("clm", 0)]
    assert run.state.model.config.global_rope_theta == 160000.0


@pytest.mark.parametrize(("change", "says"), [
    ({"vocab_size": 576}, "has vocab_size 512, this run's model has 576"),
    ({"size": "17m"}, "has hidden_size 128, this run's model has 256"),
    ({"num_hidden_layers": 5}, r"lacks 6 tensor\(s\)"),
    ({"intermediate_size": 256}, r"of shape \(384, 128\), this run's model \(512, 128\)"),
])
def test_weights_of_another_shape_are_refused_with_both_values(decoder, change, says):
    with pytest.raises(ValueError, match=says):
        crossing(ettin("mlm", **change), decoder[1])


def test_crossing_refuses_a_load_path_and_leaves_a_resumed_run_alone(decoder, tmp_path):
    with pytest.raises(ValueError, match="only one can give the weights"):
        crossing(ettin("clm"), decoder[1], load_path=str(decoder[1]))
    cross = CrossObjective("nowhere")
    cross.load_state_dict({"source": "nowhere"})  # Composer does this when autoresume found this run's checkpoint
    cross.after_load(SimpleNamespace(timestamp=Timestamp(batch=4), load_path="own.pt"), None)  # type: ignore[arg-type]


def test_an_exported_folder_is_written_at_intervals_and_crosses_back(tokenizer_dir, tmp_path):
    from ettin_foundry import tokenizer

    model = ettin("mlm", tokenizer=tokenizer.load(str(tokenizer_dir)))
    clock, export = Clock({}), ExportHF("2ba", str(tmp_path / "{run_name}"))
    run = Trainer(model=model, device="cpu", callbacks=[clock, export], run_name="exported", progress_bar=False,
                  max_duration="5ba")
    clock.lineage = ({"objective": "clm", "tokens": 5},)
    for _ in range(5):
        run.state.previous_timestamp = run.state.timestamp
        run.state.timestamp = run.state.timestamp.to_next_batch(tokens=10)
        export.batch_checkpoint(run.state, run.logger)
    export.fit_end(run.state, run.logger)
    run.close()
    folder = tmp_path / "exported"
    assert sorted(path.name for path in folder.iterdir()) == ["ba2", "ba4", "ba5"]
    assert '"tokens": 55' in (folder / "ba5" / "config.json").read_text()
    crossed, clock, _ = crossing(ettin("clm"), folder / "ba5")
    for a, b in zip(model.parameters(), crossed.state.model.parameters()):
        assert torch.equal(a, b)
    assert clock.lineage[-1]["objective"] == "mlm"


# ------------------------------------------------------------------ samples and figures


class Sampler(nn.Module):
    """Draws random numbers and must be in eval mode."""

    objective = "clm"

    def generate(self, prompts, max_new_tokens):
        assert not self.training
        torch.randn(100)
        return [f"{prompt} {max_new_tokens}" for prompt in prompts]

    def fill_mask(self, texts, top_k):
        return [[("a", 0.5)] * top_k for _ in texts]


def sample(callback, model, batch=2):
    tables = []
    state = SimpleNamespace(
        model=model, fsdp_enabled=False, precision=Precision.FP32, max_duration=Time.from_timestring("10ba"),
        timestamp=Timestamp(batch=batch), previous_timestamp=Timestamp(batch=batch - 1),
        get_elapsed_duration=lambda: Time(0.2, "dur"))
    callback.init(state, None)
    callback.batch_end(state, SimpleNamespace(log_table=lambda columns, rows, name: tables.append(rows)))
    return tables


def test_samples_leave_mode_and_random_state_as_they_were(caplog):
    model = Sampler().train()
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        tables = sample(LogSamples("2ba", ["once"], max_new_tokens=9), model)
    assert tables == [[["once", "'once 9'"]]] and "once 9" in caplog.text
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert sample(LogSamples("2ba", ["once"]), model, batch=3) == []
    model.objective = "mlm"
    assert sample(LogSamples("2ba", ["[MASK]"], top_k=2), model) == [[["[MASK]", "'a' 0.500, 'a' 0.500"]]]


@pytest.mark.parametrize(("make", "says"), [
    (lambda: LogSamples("1ep", ["a"]), "interval: '1ep'"),
    (lambda: LogSamples("0ba", ["a"]), "interval: '0ba'"),
    (lambda: LogSamples("1ba", []), "prompts"),
    (lambda: LogSamples("1ba", "a"), "prompts"),  # type: ignore[arg-type]
    (lambda: ExportHF("1dur", "x"), "interval: '1dur'"),
    (lambda: ExportHF("1ba", "s3://x"), "only a local folder"),
])
def test_settings_without_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_samples_of_a_sharded_model_are_refused():
    with pytest.raises(ValueError, match="sharded"):
        LogSamples("1ba", ["a"]).fit_start(SimpleNamespace(fsdp_enabled=True), None)  # type: ignore[arg-type]


def test_data_figures_of_a_batch():
    logged = {}
    batch = {"sequence_id": torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1]]),
             "labels": torch.tensor([[5, -100, 7, -100], [-100] * 4])}
    DataMonitor().batch_start(SimpleNamespace(batch=batch), SimpleNamespace(log_metrics=logged.update))  # type: ignore[arg-type]
    assert logged == {"data/fill": 3 / 8, "data/documents": 2, "data/targets": 2, "data/target_rate": 2 / 3}


def test_a_checkpoint_says_what_it_holds(whole):
    weights, extras = checkpoint.load_model_state(whole[2])
    assert extras["objective"] == "clm" and extras["tokens"] >= TOTAL and extras["lineage"] == ()
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
