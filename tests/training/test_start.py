"""Entering phases and crossing objectives: a chain of real nano runs, killed and started again; crossing by itself."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shutil
from types import SimpleNamespace

import nano_run
import pytest
import torch
from composer import Callback, Trainer
from llmfoundry import registry
from omegaconf import OmegaConf as om
from s3_server import S3Server

from ettin_foundry.data import tokenizer
from ettin_foundry.hub.folder import export_model
from ettin_foundry.model.composer import EttinModel
from ettin_foundry.training import checkpoints
from ettin_foundry.training.callbacks import CrossObjective, EnterPhase
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.optimizer import StableAdamW
from ettin_foundry.training.run_config import config_text
from ettin_foundry.training.steps import EVALS, read_steps

pytestmark = pytest.mark.filterwarnings("ignore")

PEAK, WEIGHT_DECAY, WARMUP = 2e-3, 3e-4, 1500
SEEN = ("losses", "lrs", "tokens", "batches", "groups", "weights", "moments", "seed")
TOKENS = {"pretrain": 3000, "extend": 3000, "decay": 4000, "cross": 3000}


CAPTURE = nano_run.register_capture()


def arguments(phase, *overrides):
    """What `nano_run.run` is given to run a phase of nano on the fixtures' data."""
    overlay = [] if phase == "pretrain" else [str(nano_run.ROOT / f"yamls/phases/{phase}.yaml")]
    return [*overlay, "variables.extend_data=${variables.data}",
            "variables.decay_data=${variables.data}", f"max_duration={TOKENS[phase]}tok", "callbacks.capture={}",
            f"variables.warmup={WARMUP}tok", *overrides]


@pytest.fixture(scope="module")
def chain(data_set, tmp_path_factory):
    """pretrain, extend and decay of an encoder, one after the other: what was seen, and written."""
    out, done, source = tmp_path_factory.mktemp("chain"), {}, None
    for phase in ("pretrain", "extend", "decay"):
        args = arguments(phase, *([f"variables.source={source}"] if source else []), *["seed=99"] * (phase == "decay"))
        trainer = nano_run.run(data_set, out, *args)
        config = om.to_container(nano_run.configure(data_set, out, *args), resolve=True)
        source = out / config["run_name"]
        done[phase] = SimpleNamespace(**{name: getattr(CAPTURE, name) for name in SEEN}, config=config, folder=source,
                                      end=int(trainer.state.timestamp.token))
        trainer.close()
    return done


def formula(phase, t):
    """The learning rate after t tokens, in float64, as the recipe states it."""
    if phase == "pretrain":
        return PEAK * (1e-10 + (1 - 1e-10) * t / WARMUP if t < WARMUP else 1.0)
    x = min(1.0, t / TOKENS[phase])
    fallen = 1 - math.sqrt(x)
    return PEAK * (0.5 + 0.5 * fallen) if phase == "extend" else PEAK / 2 * (0.04 + 0.96 * fallen)


@pytest.mark.parametrize("phase", ["pretrain", "extend", "decay"])
def test_lr_and_weight_decay_of_every_batch_of_every_phase_are_their_formulas(phase, chain):
    """Also initial_lr and base_lrs, from which a scheduler computes; decay is relative to the peak of pretraining."""
    run = chain[phase]
    assert len(run.tokens) > 5 and run.tokens[0] == 0
    for tokens, groups in zip(run.tokens, run.groups):
        lr, peak = formula(phase, tokens), PEAK / 2 if phase == "decay" else PEAK
        for group, decay in zip(groups, (WEIGHT_DECAY, 0)):  # matrices, norms
            assert group["lr"] == pytest.approx(lr, rel=1e-12)
            assert (group["initial_lr"], group["base_lr"], group["max_lr"]) == (peak, peak, PEAK)
            assert group["weight_decay"] == decay


def saved_state(run):
    return torch.load(checkpoints.newest_complete(run.folder), weights_only=False)["state"]


@pytest.mark.parametrize(("before", "phase"), [("pretrain", "extend"), ("extend", "decay")])
def test_each_phase_starts_at_token_0_of_its_data_with_weights_and_moments_of_the_phase_before(before, phase, chain):
    state, run = saved_state(chain[before]), chain[phase]
    assert all(torch.equal(value, state["model"][name]) for name, value in run.weights.items())
    stored = state["optimizers"]["StableAdamW"]
    assert run.moments.keys() == stored["state"].keys() and len(run.moments) > 20
    for name, value in run.moments.items():
        assert torch.equal(value, stored["state"][name]["exp_avg_sq"]) and value.abs().max() > 0, name
    assert [g["step"] for g in run.groups[0]] == [int(g["step"]) for g in stored["param_groups"]]
    assert run.tokens[0] == run.batches[0]["tokens_before"] == 0
    assert run.batches[0]["ids_hash"] == chain["pretrain"].batches[0]["ids_hash"]  # the same data, so the same rows
    assert run.seed == (99 if phase == "decay" else 21)  # the host would have kept the checkpoint's


def test_every_checkpoint_says_where_its_weights_came_from_and_by_which_config(chain, data_set):
    for phase, run in chain.items():
        head = checkpoints.read_head(run.folder)
        record = head.record
        assert record["run_config"] == config_text(run.config)
        assert record["run_hash"] == hashlib.sha256(record["run_config"].encode()).hexdigest()
        assert (record["run_name"], record["phase"], record["objective"]) == (f"nano-mlm-{phase}", phase, "mlm")
        assert (record["batch"], record["tokens"]) == (len(run.tokens), run.end)
        assert record["tokenizer_fingerprint"] == tokenizer.fingerprint(tokenizer.load(str(data_set / "tokenizer")))
        assert head.has_moments and head.data["rows"] == 8 * len(run.tokens)
    first, second = record["lineage"]
    newest = checkpoints.locate(chain["extend"].folder)
    assert second == {"source": f"{newest.parent.name}/{newest.name}", "objective": "mlm", "phase": "extend",
                      "accepted": None, "tokens": chain["extend"].end,
                      "run_hash": checkpoints.read_head(newest).record["run_hash"]}
    assert first["accepted"] == "global_rope_theta 10000.0 -> 160000.0, local_rope_theta 10000.0 -> 160000.0"


def test_initial_weights_are_kept_where_they_were_drawn_and_nowhere_else(chain):
    weights, record = checkpoints.load_model_state(chain["pretrain"].folder / "initial" / "step0.pt")
    first = chain["pretrain"].weights
    assert {f"model.{name}" for name in weights} == set(first)
    assert all(torch.equal(value, first[f"model.{name}"]) for name, value in weights.items())
    assert (record["tokens"], record["batch"], record["objective"], record["phase"]) == (0, 0, "mlm", "pretrain")
    assert not (chain["extend"].folder / "initial").exists()
    assert "step0" not in checkpoints.locate(chain["pretrain"].folder).name


def test_a_phase_killed_before_and_after_its_first_checkpoint_is_entered_once(chain, data_set, tmp_path, caplog):
    """Killed at batch 3, saved at batch 4, killed at batch 6, then let live; by then its source is gone."""
    source, whole = tmp_path / "extend", chain["decay"]
    logging.getLogger("ettin_foundry.training.callbacks").addHandler(caplog.handler)  # the host takes the root's away
    shutil.copytree(chain["extend"].folder, source)
    for die_at, begins, says in ((3, 0, ("entering decay from", "kept weights, optimizer moments", "seed 21 -> 99",
                                         "optimizer.lr 0.002 -> 0.001")),
                                 (6, 0, ("entering decay",)), (-1, 4, ("is not entered again",))):
        args = arguments("decay", f"variables.source={source}", "seed=99", "save_interval=4ba", "eval_interval=1ba",
                         "eval_subset_num_batches=1", f"callbacks.capture.die_at={die_at}")
        caplog.clear()
        with caplog.at_level(logging.INFO, "ettin_foundry.training.callbacks"):
            if die_at < 0:
                shutil.rmtree(source)
            with pytest.raises(RuntimeError, match="killed") if die_at > 0 else contextlib.nullcontext():
                nano_run.run(data_set, tmp_path / "runs", *args, evaluate=True).close()
        assert all(words in caplog.text for words in says) and "theta" not in caplog.text
        for name in ("losses", "lrs", "tokens", "groups"):  # to the last bit
            assert getattr(CAPTURE, name) == getattr(whole, name)[begins:None if die_at < 0 else die_at], name
    record = checkpoints.read_head(folder := tmp_path / "runs" / "nano-mlm-decay").record
    assert [entry["phase"] for entry in record["lineage"]] == ["pretrain", "extend"]  # not once more
    assert [line["step"] for line in read_steps(folder / EVALS)] == [line["step"] for line in read_steps(folder)]


def test_a_cross_run_logs_the_losses_of_both_objectives_at_its_interval(chain, data_set, tmp_path):
    source = chain["decay"].folder
    args = arguments("cross", f"variables.source={source}", "variables.cross_objective=clm", "loggers.inmemory={}",
                     "variables.decay_mask_rate=0.0", "variables.source_objective=mlm", "eval_interval=2ba",
                     "variables.cross_warmup=500tok", "variables.cross_decay=500tok", "device_eval_batch_size=16")
    trainer = nano_run.run(data_set, tmp_path, *args, evaluate=True)
    values = next(d for d in trainer.logger.destinations if type(d).__name__ == "InMemoryLogger").data
    for objective in ("clm", "mlm"):
        logged = values[f"metrics/eval/{objective}/TargetCrossEntropy"]
        assert len(logged) >= 3 and all(0 < value < 8 for _, value in logged)
        assert [(line["step"] + 1, line["tokens"], line["TargetCrossEntropy"])
                for line in read_steps(tmp_path / "nano-clm-cross" / EVALS) if line["data"] == f"eval/{objective}"
                ] == [(time.batch.value, time.token.value, value) for time, value in logged]
    assert CAPTURE.tokens[0] == 0 and CAPTURE.moments == {}
    state = saved_state(chain["decay"])["model"]
    assert all(torch.equal(value, state[name]) for name, value in CAPTURE.weights.items())
    record = checkpoints.read_head(tmp_path / "nano-clm-cross").record
    assert [(e["phase"], e["objective"]) for e in record["lineage"]] == [
        ("pretrain", "mlm"), ("extend", "mlm"), ("decay", "mlm")]
    assert (record["objective"], record["phase"]) == ("clm", "cross") and record["config"]["causal"]
    trainer.close()


@pytest.mark.parametrize("given", ["all", "weights", "load_path"])
def test_weights_come_from_an_object_store_and_leave_their_lineage(given, chain, data_set, tmp_path, monkeypatch):
    source = checkpoints.newest_complete(chain["pretrain"].folder)
    with S3Server() as server:
        server.connect(monkeypatch)
        server.put("a/last.pt", source.read_bytes())
        url = server.url("a/last.pt")
        args = arguments("extend", f"variables.source={url}", f"callbacks.ettin_phase.keep={given}")
        if given == "load_path":
            args = arguments("pretrain", f"load_path={url}", "load_weights_only=true")
            with pytest.raises(ValueError, match=r"load_path: .* has local_attention 128 \(here 64\).*clock.accept"):
                nano_run.run(data_set, tmp_path, *args, "model.local_attention=64")
        nano_run.run(data_set, tmp_path, *args).close()
    state = saved_state(chain["pretrain"])["model"]
    assert all(torch.equal(value, state[name]) for name, value in CAPTURE.weights.items())
    assert CAPTURE.tokens[0] == 0 and bool(CAPTURE.moments) is (given == "all")
    [entry] = checkpoints.read_head(next(tmp_path.glob("nano-mlm-*"))).record["lineage"]
    assert entry["phase"] == "pretrain" and entry["tokens"] == chain["pretrain"].end


def test_a_run_logs_to_wandb_offline_and_evaluates_nothing(data_set, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    args = arguments("pretrain", "loggers.wandb.project=p", "eval_loader=null", "max_duration=2ba")
    nano_run.run(data_set, tmp_path / "runs", *args, evaluate=True).close()
    assert checkpoints.locate(tmp_path / "runs/nano-mlm-pretrain") and list(tmp_path.glob("wandb/offline-run-*"))


# ------------------------------------------------------------------ going on from the middle of a run


def test_another_lr_is_refused_unless_accepted_or_in_a_branch_and_recorded(chain, data_set, tmp_path):
    """With the same clock, rows and moments; the learning rate is then the new recipe's in every place."""
    source, before = chain["pretrain"].folder, chain["pretrain"]
    shutil.copytree(source, tmp_path / source.name)
    args = arguments("pretrain", "max_duration=5000tok", "variables.peak_lr=1e-3")
    with pytest.raises(ValueError, match="optimizer.lr must be 0.002, got 0.001.*ettin_clock.accept=.optimizer.lr."):
        nano_run.run(data_set, tmp_path, *args)
    for name, more in (("lower", [f"load_path={source}"]),
                       (source.name, ["callbacks.ettin_clock.accept=[optimizer.lr]"])):
        nano_run.run(data_set, tmp_path, *args, f"run_name={name}", *more).close()
        assert CAPTURE.tokens[0] == CAPTURE.batches[0]["tokens_before"] == before.end and len(CAPTURE.tokens) > 2
        assert min(g["step"] for g in CAPTURE.groups[0]) == len(before.tokens)
        for group in sum(CAPTURE.groups, []):
            assert {group[key] for key in ("lr", "initial_lr", "max_lr", "base_lr")} == {1e-3}
        [entry] = checkpoints.read_head(tmp_path / name).record["lineage"]
        assert entry["accepted"] == (f"optimizer.lr 0.002 -> 0.001 from batch {len(before.tokens)} "
                                     f"({before.end:,} tokens) on") and entry["tokens"] is None
    nano_run.run(data_set, tmp_path, *args, "max_duration=6500tok").close()  # no difference any more
    assert len(checkpoints.read_head(tmp_path / source.name).record["lineage"]) == 1
    with pytest.raises(ValueError, match="model.objective must be 'mlm', got 'mntp'.*ettin_cross"):
        nano_run.run(data_set, tmp_path, *args, "run_name=other", "variables.objective=mntp", f"load_path={source}")


@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_what_is_not_finite_stops_a_run_before_it_is_saved(what, data_set, tmp_path):
    class Overflow(Callback):
        """In step 5: the loss of the first of two microbatches, or a gradient whose square is infinite."""

        done = False

        def after_loss(self, state, logger):
            if state.timestamp.batch == 5 and what == "loss" and not self.done:
                state.loss, self.done = state.loss * float("nan"), True

        def after_backward(self, state, logger):
            if state.timestamp.batch == 5 and what == "gradients":
                next(p for p in state.model.parameters() if p.grad is not None).grad.view(-1)[3] = 1e20

    registry.callbacks.register("overflow", func=Overflow)
    args = arguments("pretrain", "save_interval=1ba", "callbacks.overflow={}", "eval_interval=1ba")
    with pytest.raises(ValueError, match=rf"{what} must be finite.* at step 5, after 2,\d+ tokens.* Go on from \S+"
                                         r"ep0-ba5-rank0.pt .*peak_lr.*ettin_clock.accept=.optimizer.lr."):
        nano_run.run(data_set, tmp_path, *args)
    assert checkpoints.locate(tmp_path / "nano-mlm-pretrain").name == "ep0-ba5-rank0.pt"
    steps = (tmp_path / "nano-mlm-pretrain" / "steps.jsonl").read_text().splitlines()
    assert len(steps) == 5
    # as the message says
    nano_run.run(data_set, tmp_path, *arguments("pretrain"), "variables.peak_lr=1e-3",
                 "callbacks.ettin_clock.accept=[optimizer.lr]").close()
    assert CAPTURE.tokens[0] > 2000 and CAPTURE.lrs[0] == 1e-3


def test_checkpoints_of_earlier_processes_count_among_those_to_keep(data_set, tmp_path):
    args = arguments("pretrain", "save_interval=1ba", "save_num_checkpoints_to_keep=3")
    folder = tmp_path / "nano-mlm-pretrain"
    for die_at in (3, 5, -1):
        if die_at > 0:
            with pytest.raises(RuntimeError, match="killed"):
                nano_run.run(data_set, tmp_path, *args, f"callbacks.capture.die_at={die_at}")
            (folder / "mine-ba1.pt").touch()  # a file of the user's
        else:
            nano_run.run(data_set, tmp_path, *args).close()
    last = max(int(path.name.split("-")[1][2:]) for path in folder.glob("ep*.pt"))
    assert {path.name for path in folder.glob("*.pt")} == {
        *(f"ep0-ba{batch}-rank0.pt" for batch in (last - 2, last - 1, last)), "latest-rank0.pt", "mine-ba1.pt"}
    assert last > 5


def test_a_stream_at_another_place_than_the_clock_is_refused(data_set, tmp_path):
    class Displaced(Callback):
        def after_dataloader(self, state, logger):
            state.batch["tokens_before"] += 14

    registry.callbacks.register("displaced", func=Displaced)
    with pytest.raises(ValueError, match=r"after 14 tokens of the stream.*counted 0 at batch 0"):
        nano_run.run(data_set, tmp_path, *arguments("pretrain", "callbacks.displaced={}"))


# ------------------------------------------------------------------ under a plain Trainer


def started(path, objective, tokenizer_dir, *, start=CrossObjective, **fields):
    """A model that starts from `path`, told what to load as the checks tell the host."""
    model = EttinModel(tokenizer.load(str(tokenizer_dir)), size="nano", objective=objective, max_seq_len=64,
                       vocab_size=512, **fields)
    told = {"load_path": str(path), "load_weights_only": True} if path.is_file() else {}
    clock, optimizer = Clock({}), StableAdamW(model.parameters(), PEAK)
    return clock, Trainer(model=model, device="cpu", callbacks=[start(str(path)), clock], run_name="plain",
                          progress_bar=False, optimizers=optimizer, **told)


@pytest.mark.parametrize("through", ["checkpoint", "folder"])
def test_there_and_back_without_training_gives_equal_weights(through, chain, tokenizer_dir, tmp_path):
    path = checkpoints.newest_complete(chain["pretrain"].folder)
    clock, there = started(path, "clm", tokenizer_dir)
    decoder, onward = there.state.model, tmp_path / through
    assert there.state.timestamp.batch == 0 and not there.state.optimizers[0].state and decoder.config.causal
    if through == "checkpoint":
        there.save_checkpoint(str(onward))
    else:
        export_model(decoder, decoder.config, decoder.tokenizer, onward, objective="clm",
                     facts={"lineage": list(clock.lineage)})
    clock, back = started(onward, "mlm", tokenizer_dir)
    weights = saved_state(chain["pretrain"])["model"]
    assert all(torch.equal(value, weights[name]) for name, value in back.state.model.named_parameters())
    assert [entry["objective"] for entry in clock.lineage] == ["mlm", "clm"]


def test_what_was_built_is_compared_again(chain, tokenizer_dir, tmp_path):
    path = checkpoints.newest_complete(chain["pretrain"].folder)
    with pytest.raises(ValueError, match=r"global_rope_theta 10000.0 \(here 160000.0\).*accept=\[global_rope_theta\]"):
        started(path, "clm", tokenizer_dir, global_rope_theta=160000.0)
    with pytest.raises(ValueError, match="gave no moments to StableAdamW.*keep=weights"):
        started(path, "mlm", tokenizer_dir, start=EnterPhase)
    content = torch.load(path, weights_only=False)
    del content["state"]["model"]["model.output_bias"]
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(RuntimeError, match="output_bias"):
        started(tmp_path / "other.pt", "clm", tokenizer_dir)
