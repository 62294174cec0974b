"""The clock under Composer's own Trainer: learning rates, resumption, what is refused, what a checkpoint says."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from composer import Callback, ComposerModel, DataSpec, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ettin_foundry.training import checkpoints
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.lr import warmup_stable_decay
from ettin_foundry.training.optimizer import StableAdamW, WarmupStableDecay

pytestmark = pytest.mark.filterwarnings("ignore")

LR, TOTAL = 0.01, 60
TOKENS = (3, 7, 4, 9, 5, 6, 8, 2, 6, 6, 6, 6)  # of each batch, uneven as real ones


class Stream(IterableDataset):
    """Batches that know their place, endless, resumed by state, as the real loader's."""

    def __init__(self, start: int = 0):
        self.start = start

    def __iter__(self):
        for step in range(self.start, 12):
            yield {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(step)), "count": TOKENS[step],
                   "tokens_before": sum(TOKENS[:step])}

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


def trainer(folder=None, *, lr=LR, decay=1e-4, stream=None, duration=f"{TOTAL}tok", callbacks=(), model=None, **kwargs):
    model = model or Toy()
    data = DataSpec(
        DataLoader(stream or Stream(), batch_size=None), split_batch=lambda batch, size: [batch],
        get_num_samples_in_batch=lambda batch: 2,
        get_num_tokens_in_batch=lambda batch, token_type="total": batch["count"])
    config = {"save_folder": str(folder) if folder else None, "optimizer": {"lr": lr},
              **{k: kwargs.get(k) for k in ("load_path", "autoresume")}}
    saving = {"save_folder": str(folder), "save_interval": "4ba", "save_overwrite": True} if folder else {}
    return Trainer(
        model=model, train_dataloader=data, device_train_microbatch_size=2, max_duration=duration, device="cpu", seed=5,
        optimizers=StableAdamW(model.parameters(), lr, weight_decay=decay), run_name="toy", progress_bar=False,
        schedulers=WarmupStableDecay("10tok", "20tok", t_max=f"{TOTAL}tok", alpha_f=0.1),
        callbacks=[Clock(config), *callbacks], **saving, **kwargs)


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
        expected = LR * warmup_stable_decay(sum(TOKENS[:step]), warmup=10, decay=20, total=TOTAL, alpha_f=0.1)
        assert lrs == [expected, expected]


def test_a_resumed_run_equals_one_that_never_stopped_bitwise(whole, tmp_path):
    """Parameters after dropout, and the lr of every batch."""
    run, recorder, _ = whole
    fit(folder=tmp_path, duration="23tok")  # the tokens of batches 0 to 3
    resumed, again = fit(folder=tmp_path, autoresume=True)
    assert min(again.lrs) == 4
    assert again.lrs == {step: lrs for step, lrs in recorder.lrs.items() if step >= 4}
    for a, b in zip(run.state.model.parameters(), resumed.state.model.parameters()):
        assert torch.equal(a, b)


def test_a_stream_at_another_place_than_the_clock_is_refused():
    with pytest.raises(ValueError, match=r"after 14 tokens of the stream.*counted 0 at batch 0"):
        fit(stream=Stream(start=3))


@pytest.mark.parametrize(("ignored", "steps"), [(["state/timestamp", "state/dataset_state", "rng"], 0), ([], 4)],
                         ids=["a new phase", "another run from the middle"])
def test_the_recipes_values_are_taken_and_the_moments_kept(ignored, steps, whole):
    run = trainer(load_path=str(whole[2] / "ep0-ba4-rank0.pt"), lr=0.02, decay=2e-4, load_ignore_keys=ignored)
    groups = run.state.optimizers[0].param_groups
    assert [(g["initial_lr"], g["max_lr"], g["weight_decay"]) for g in groups] == [(0.02, 0.02, 2e-4), (0.02, 0.02, 0.0)]
    assert run.state.schedulers[0].base_lrs == [0.02, 0.02]  # type: ignore[attr-defined]
    assert int(groups[0]["step"]) == 4 and run.state.timestamp.batch == steps
    run.close()


def test_another_lr_or_objective_is_not_gone_on_with(whole, tmp_path):
    fit(folder=tmp_path, duration="23tok")
    with pytest.raises(ValueError, match="optimizer.lr: 0.02 in the config, 0.01 in the checkpoint"):
        trainer(folder=tmp_path, lr=0.02, autoresume=True)
    model = Toy()
    model.objective = "mlm"
    with pytest.raises(ValueError, match="model.objective: 'mlm' in the config, 'clm' in the checkpoint.*ettin_cross"):
        trainer(model=model, load_path=str(whole[2] / "ep0-ba4-rank0.pt"))


def test_a_payload_given_as_load_path_is_refused_and_not_run(tmp_path):
    from test_checkpoints import Payload

    torch.save({"state": Payload(tmp_path / "mark")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="system"):
        trainer(load_path=str(tmp_path / "bad.pt"))
    assert not (tmp_path / "mark").exists()


def test_what_the_package_says_is_shown_at_the_level_of_the_run(monkeypatch):
    """LLM-Foundry sets the level of its own loggers only, and the root's hides what is merely said."""
    package = logging.getLogger("ettin_foundry")
    monkeypatch.setattr(package, "level", logging.NOTSET)
    Clock({"python_log_level": "error"})
    assert package.level == logging.NOTSET
    Clock({"python_log_level": "info"})
    assert package.level == logging.INFO


def test_a_checkpoint_says_what_it_holds(whole):
    weights, record = checkpoints.load_model_state(whole[2])
    assert record["objective"] == "clm" and record["tokens"] >= TOTAL and record["lineage"] == ()
    assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
