"""Averages of the weights held to a float64 formula, in the run, in its checkpoints, in evaluations and after a resume."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_clock import TOTAL, tokens_of, trainer

torch = pytest.importorskip("torch")
pytest.importorskip("composer")
pytest.importorskip("llmfoundry")

from composer import Callback, DataSpec  # noqa: E402
from composer.algorithms import EMA as ComposerEMA  # noqa: E402
from composer.core import Event, Time, Timestamp  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from ettin_foundry.training import checkpoints as checkpoint  # noqa: E402
from ettin_foundry.training import keys  # noqa: E402
from ettin_foundry.training.ema import EMA  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, SAVED = 11, 8
"""Of a run of TOTAL tokens; its last checkpoint before the end."""


class Weights(Callback):
    """The weights after each step, and those that an evaluation and the step after it see."""

    def __init__(self):
        self.after: dict[int, dict[str, torch.Tensor]] = {}
        self.at: dict[str, dict[str, torch.Tensor]] = {}

    def _take(self, state):
        return {name.split("model.")[-1]: p.detach().double().clone() for name, p in state.model.named_parameters()}

    def batch_start(self, state, logger):
        self.at["start"] = self._take(state)

    def batch_end(self, state, logger):
        self.after[state.timestamp.batch.value] = self._take(state)

    def eval_batch_start(self, state, logger):
        self.at["evaluation"] = self._take(state)


def fit(algorithm, **kwargs):
    seen = Weights()
    run = trainer(algorithms=algorithm, callbacks=[seen], **kwargs)
    run.fit()
    run.close()
    return seen, run


def average(seen, until, *, half_life=None, unit="tok", smoothing=None, first=1, every=1):
    """float64: from the formula in the class's docstring, over the weights after each step."""
    mean, since = None, 0
    for step in range(1, until + 1):
        since += tokens_of(step - 1) if unit == "tok" else 1
        if step < first:
            since = 0
            continue
        if mean is None:
            mean, since = dict(seen.after[step]), 0
        if step % every == 0:
            s = smoothing if smoothing is not None else 2 ** (-since / half_life)
            mean, since = {name: s * mean[name] + (1 - s) * w for name, w in seen.after[step].items()}, 0
    return mean


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in got.items():  # a dozen roundings to fp32 of values below 1
        assert (tensor.double() - expected[name]).abs().max() < 5e-7, name


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    return *fit(EMA(half_life="20tok"), folder=folder), folder


@pytest.mark.parametrize("batch", [4, SAVED, STEPS])
def test_averages_in_a_checkpoint_are_the_formula_and_its_model_is_what_was_trained(averaged, batch):
    seen, _, folder = averaged
    path = folder / f"ep0-ba{batch}-rank0.pt"
    trained, _ = checkpoint.load_model_state(path)
    raw = torch.load(path, weights_only=False)["state"]["model"]  # what the host hands to the next phase
    for name, tensor in trained.items():
        assert torch.equal(tensor.double(), seen.after[batch][name]) and torch.equal(raw[f"model.{name}"], tensor)
    mean, _ = checkpoint.load_model_state(path, ema=True)
    assert_close(mean, average(seen, batch, half_life=20))
    assert max((mean[n] - trained[n]).abs().max() for n in mean) > 1e-3  # so it is the average that was read


@pytest.mark.parametrize(("given", "expected"), [
    ({}, {"half_life": 1000, "unit": "ba"}),
    ({"half_life": "3ba", "ema_start": "4ba", "update_interval": "2ba"},
     {"half_life": 3, "unit": "ba", "first": 4, "every": 2}),
    ({"half_life": "20tok", "ema_start": "20tok", "update_interval": "3ba"}, {"half_life": 20, "first": 4, "every": 3}),
    ({"smoothing": 0.75, "ema_start": "0.5dur"}, {"smoothing": 0.75, "first": 6}),
], ids=str)
def test_every_setting_means_what_it_says(given, expected, tmp_path):
    seen, run = fit(EMA(**given), folder=tmp_path)
    mean, _ = checkpoint.load_model_state(tmp_path, ema=True)
    assert run.state.timestamp.batch == STEPS
    assert_close(mean, average(seen, STEPS, **expected))


def test_composers_own_class_stores_them_the_other_way_round(tmp_path):
    """Its checkpoints are read right all the same, and none of its meanings is lost: half lives in batches agree."""
    seen, run = fit(ComposerEMA(half_life="3ba"), folder=tmp_path)
    path = tmp_path / f"ep0-ba{SAVED}-rank0.pt"
    raw = torch.load(path, weights_only=False)["state"]["model"]
    assert_close({name.removeprefix("model."): t for name, t in raw.items()}, average(seen, SAVED, half_life=3, unit="ba"))
    trained, _ = checkpoint.load_model_state(path)
    assert all(torch.equal(t.double(), seen.after[SAVED][name]) for name, t in trained.items())
    assert_close(checkpoint.load_model_state(path, ema=True)[0], average(seen, SAVED, half_life=3, unit="ba"))


def test_a_resumed_run_has_the_same_averages_bitwise(averaged, tmp_path):
    fit(EMA(half_life="20tok"), folder=tmp_path, duration="23tok")  # four steps
    fit(EMA(half_life="20tok"), folder=tmp_path, autoresume=True)
    for ema in (False, True):
        whole, again = (checkpoint.load_model_state(folder, ema=ema)[0] for folder in (averaged[2], tmp_path))
        assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_evaluations_see_the_averages_and_training_never_does(tmp_path):
    evaluation = DataSpec(DataLoader([{"x": torch.zeros(2, 4)}], batch_size=None),  # type: ignore[arg-type]
                          split_batch=lambda batch, size: [batch], get_num_samples_in_batch=lambda batch: 2)
    seen, _ = fit(EMA(half_life="20tok"), eval_dataloader=evaluation, eval_interval="7ba", duration="44tok")  # eight steps
    assert_close(seen.at["evaluation"], average(seen, 8, half_life=20))  # once more at the end
    plain, _ = fit(None, duration="44tok")
    for step, weights in plain.after.items():
        assert all(torch.equal(seen.after[step][name], w) for name, w in weights.items()), step
    assert all(torch.equal(seen.at["start"][name], w) for name, w in seen.after[7].items())


def test_a_new_phase_averages_anew(averaged, tmp_path):
    source = str(averaged[2] / "ep0-ba4-rank0.pt")
    seen, run = fit(EMA(half_life="20tok", ema_start="7tok"), folder=tmp_path, load_path=source,
                    load_ignore_keys=["state/timestamp", "state/dataset_state", "rng", "state/callbacks"])
    assert min(seen.after) == 1
    mean, _ = checkpoint.load_model_state(tmp_path, ema=True)
    assert_close(mean, average(seen, STEPS, half_life=20, first=2))


def test_averages_go_on_when_the_number_of_processes_changes():
    """DDP puts `module.` before every name. A checkpoint from before, loaded into a wrapped model, must still be met."""
    bare = nn.Linear(3, 3)

    class Wrapped(nn.Module):  # names as DistributedDataParallel gives them
        def __init__(self):
            super().__init__()
            self.module = bare

    def state(model, batch):
        return SimpleNamespace(model=model, fsdp_config=None, callbacks=(), timestamp=Timestamp(batch=batch),
                               max_duration=Time.from_timestring("9ba"), get_elapsed_duration=lambda: Time(batch / 9, "dur"))

    def event(ema, name, at):
        if ema.match(name, at):
            ema.apply(name, at, None)

    saved = {}
    for model, batches in ((bare, (1, 2)), (Wrapped(), (3, 4)), (bare, (5,))):
        ema = EMA(smoothing=0.5)
        event(ema, Event.INIT, state(bare, batches[0] - 1))
        if saved:
            ema.load_state_dict(saved)
        event(ema, Event.FIT_START, state(model, batches[0] - 1))
        for batch in batches:
            with torch.no_grad():
                for p in bare.parameters():
                    p.fill_(batch)
            event(ema, Event.BATCH_END, state(model, batch))
        saved = ema.state_dict()
    mean = 1.0
    for batch in (2, 3, 4, 5):
        mean = (mean + batch) / 2
    stored = saved["ema_model"]["named_parameters_dict"]
    assert set(stored) == {"weight", "bias"} and all((t == mean).all() for t in stored.values())
    assert saved["repr"] == "EMA(update_interval='1ba', ema_start='0dur', smoothing=0.5)"


def test_a_checkpoint_without_averages_says_why(averaged, tmp_path):
    fit(EMA(half_life="20tok", ema_start="50tok"), folder=tmp_path / "late", duration="60tok")
    with pytest.raises(ValueError, match="ep0-ba4.*ema_start had not come"):
        checkpoint.load_model_state(tmp_path / "late" / "ep0-ba4-rank0.pt", ema=True)
    fit(None, folder=tmp_path / "none", duration="23tok")
    with pytest.raises(ValueError, match="no state of algorithms.ema.*Leave --ema out"):
        checkpoint.load_model_state(tmp_path / "none", ema=True)


@pytest.mark.parametrize(("given", "says"), [
    ({"half_life": "1ep"}, "half_life: '1ep' given; a time in tok or ba"),
    ({"half_life": 1000}, "half_life: 1000 given"),
    ({"half_life": "0ba"}, "half_life: '0ba' given; at least 1"),
    ({"half_life": "10ba", "smoothing": 0.9}, "half_life: '10ba' given with smoothing=0.9"),
    ({"smoothing": 1.0}, r"smoothing: 1.0 given.*above 0 and below 1"),
    ({"update_interval": "100tok"}, "update_interval: '100tok' given; a time in ba"),
    ({"ema_start": "1dur"}, "ema_start: '1dur' given.*below 1dur"),
    ({"ema_start": "later"}, "ema_start: 'later' given"),
])
def test_settings_without_sense_are_refused(given, says):
    with pytest.raises(ValueError, match=f"algorithms.ema.{says}"):
        EMA(**given)


def test_what_could_not_act_or_hold_is_refused_before_the_first_step(averaged):
    with pytest.raises(ValueError, match=f"ema_start: '{TOTAL}tok' given, and max_duration is {TOTAL}tok"):
        fit(EMA(ema_start=f"{TOTAL}tok"))
    with pytest.raises(ValueError, match="algorithms.ema: given with fsdp_config.*ettin merge"):
        EMA().match(Event.INIT, SimpleNamespace(fsdp_config={}))  # type: ignore[arg-type]
    config = {"model": {"name": "ettin"}, "optimizer": {"name": "x"}, "scheduler": {"name": "x"}}
    with pytest.raises(ValueError, match=r"algorithms.ema: \{\} given with fsdp_config \{'state_dict_type': 'full'\}"):
        keys.check_keys({**config, "algorithms": {"ema": None}, "fsdp_config": {"state_dict_type": "full"}}, [])
    with pytest.raises(ValueError, match="algorithms.ema.halflife: unknown key; the keys are half_life"):
        keys.check_keys({**config, "algorithms": {"ema": {"halflife": "1ba"}}}, [])
