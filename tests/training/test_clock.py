"""The clock under Composer's own Trainer: learning rates, resumption, what is refused, what a checkpoint says."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("composer")
pytest.importorskip("llmfoundry")

from composer import Callback, ComposerModel, DataSpec, Trainer  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from ettin_foundry.training import checkpoints as checkpoint  # noqa: E402
from ettin_foundry.training.clock import Clock  # noqa: E402
from ettin_foundry.training.optimizer import StableAdamW, WarmupStableDecay, warmup_stable_decay  # noqa: E402

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
    run = trainer(load_path=str(whole[2] / "ep0-ba4-rank0.pt"), lr=0.02, decay=2e-4,
                  load_ignore_keys=["state/timestamp", "state/dataset_state", "rng"])
    groups = run.state.optimizers[0].param_groups
    assert [(g["initial_lr"], g["max_lr"], g["weight_decay"]) for g in groups] == [(0.02, 0.02, 2e-4), (0.02, 0.02, 0.0)]
    assert run.state.schedulers[0].base_lrs == [0.02, 0.02]  # type: ignore[attr-defined]
    assert int(groups[0]["step"]) == 4
    run.close()


def test_another_objective_is_refused_and_pointed_to_the_cross_callback(whole):
    model = Toy()
    model.objective = "mlm"
    for ignored, says in (([], "model.objective: 'mlm' in the config, 'clm' in the checkpoint.*ettin_cross"),
                          (["state/timestamp", "state/dataset_state", "rng"], "is clm, this run's is mlm.*ettin_cross")):
        with pytest.raises(ValueError, match=says):
            trainer(model=model, load_path=str(whole[2] / "ep0-ba4-rank0.pt"), load_ignore_keys=ignored)


def test_a_payload_given_as_load_path_is_refused_and_not_run(tmp_path):
    from test_checkpoints import Payload

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


def test_what_the_package_says_is_shown_at_the_level_of_the_run():
    """LLM-Foundry sets the level of its own loggers only, and the root's hides what is merely said."""
    package = logging.getLogger("ettin_foundry")
    before = package.level
    try:
        package.setLevel(logging.NOTSET)
        Clock({"python_log_level": "error"})
        assert package.level == logging.NOTSET
        Clock({"python_log_level": "info"})
        assert package.level == logging.INFO and logging.getLogger("ettin_foundry.training.start").isEnabledFor(logging.INFO)
    finally:
        package.setLevel(before)


def test_a_checkpoint_says_what_it_holds(whole):
    weights, extras = checkpoint.load_model_state(whole[2])
    assert extras["objective"] == "clm" and extras["tokens"] >= TOTAL and extras["lineage"] == ()
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
