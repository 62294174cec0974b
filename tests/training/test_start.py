"""Entering phases and crossing objectives: a chain of real nano runs, killed and started again; crossing by itself."""

from __future__ import annotations

import functools
import logging
import math
import shutil
from collections.abc import Callable

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
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.optimizer import StableAdamW
from ettin_foundry.training.run_config import config_hash, config_text
from ettin_foundry.training.sources import PARTS_LEFT_OUT
from ettin_foundry.training.start import CrossObjective, EnterPhase

pytestmark = pytest.mark.filterwarnings("ignore")

PEAK, WEIGHT_DECAY, WARMUP = 3e-3, 3e-4, 1500
TOKENS = {"pretrain": 3000, "extend": 3000, "decay": 4000, "cross": 3000}


class PhaseWatch(Callback):
    """What the optimizer does at each batch, and a death at a given one."""

    seen: list[dict] = []
    first: dict = {}

    def __init__(self, die_at: int = -1):
        self.die_at, PhaseWatch.seen, PhaseWatch.first = die_at, [], {}

    def before_train_batch(self, state, logger):
        groups = state.optimizers[0].param_groups
        PhaseWatch.seen.append({"tokens": int(state.timestamp.token), "before": state.batch["tokens_before"],
            "groups": [{key: g[key] for key in ("lr", "initial_lr", "max_lr", "weight_decay")} for g in groups],
            "base_lrs": list(state.schedulers[0].base_lrs)})
        if not PhaseWatch.first:
            names = {p: name for name, p in state.model.named_parameters()}
            moments = {names[p]: values["exp_avg_sq"].clone() for p, values in state.optimizers[0].state.items()}
            ids = torch.where(state.batch["labels"] != -100, state.batch["labels"], state.batch["input_ids"])
            PhaseWatch.first = {"moments": moments, "steps": [int(g["step"]) for g in groups], "ids": ids,
                                "weights": {n: p.detach().clone() for n, p in state.model.named_parameters()},
                                "seed": state.rank_zero_seed}

    def batch_end(self, state, logger):
        PhaseWatch.seen[-1]["loss"] = float(state.total_loss_dict["loss/train/total"])
        if state.timestamp.batch == self.die_at:
            raise RuntimeError("killed")


registry.callbacks.register("phase_watch", func=PhaseWatch)


def arguments(phase, *overrides):
    """What `nano_run.run` is given to run a phase of nano on the fixtures' data."""
    overlay = [] if phase == "pretrain" else [str(nano_run.ROOT / f"yamls/phases/{phase}.yaml")]
    return [*overlay, "model.vocab_size=512", "variables.extend_data=${variables.data}",
            "variables.decay_data=${variables.data}", f"max_duration={TOKENS[phase]}tok", "callbacks.phase_watch={}",
            f"variables.warmup={WARMUP}tok", *overrides]


@pytest.fixture(scope="module")
def chain(data_set, tmp_path_factory):
    """pretrain, extend and decay of an encoder, one after the other: what was seen, and written."""
    out, done, source = tmp_path_factory.mktemp("chain"), {}, None
    for phase in ("pretrain", "extend", "decay"):
        args = arguments(phase, *([f"variables.source={source}"] if source else []), *["seed=99"] * (phase == "decay"))
        trainer = nano_run.run(data_set, out, *args)
        config = om.to_container(nano_run.configure(data_set, out, *args), resolve=True)
        done[phase] = {"seen": PhaseWatch.seen, "first": PhaseWatch.first, "config": config,
                       "folder": out / config["run_name"], "tokens": int(trainer.state.timestamp.token)}
        trainer.close()
        source = done[phase]["folder"]
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
    seen = chain[phase]["seen"]
    assert len(seen) > 5 and seen[0]["tokens"] == 0
    for batch in seen:
        lr, peak = formula(phase, batch["tokens"]), PEAK / 2 if phase == "decay" else PEAK
        matrices, norms = batch["groups"]
        for group in (matrices, norms):
            assert group["lr"] == pytest.approx(lr, rel=1e-12)
            assert (group["initial_lr"], group["max_lr"]) == (peak, PEAK)
        assert batch["base_lrs"] == [peak, peak]
        removed = matrices["lr"] / matrices["max_lr"] * matrices["weight_decay"]
        assert removed == pytest.approx(WEIGHT_DECAY * lr / PEAK, rel=1e-12) and norms["weight_decay"] == 0


@pytest.mark.parametrize(("before", "phase"), [("pretrain", "extend"), ("extend", "decay")])
def test_each_phase_starts_at_token_0_of_its_data_with_weights_and_moments_of_the_phase_before(before, phase, chain):
    state = torch.load(checkpoints.newest_complete(chain[before]["folder"]), weights_only=False)["state"]
    first = chain[phase]["first"]
    for name, value in first["weights"].items():
        assert torch.equal(value, state["model"][name]), name
    stored = state["optimizers"]["StableAdamW"]
    assert first["moments"].keys() == stored["state"].keys() and len(first["moments"]) > 20
    for name, value in first["moments"].items():
        assert torch.equal(value, stored["state"][name]["exp_avg_sq"]) and value.abs().max() > 0, name
    assert first["steps"] == [int(g["step"]) for g in stored["param_groups"]] and min(first["steps"]) > 0
    assert (chain[phase]["seen"][0]["tokens"], chain[phase]["seen"][0]["before"]) == (0, 0)
    assert torch.equal(first["ids"], chain["pretrain"]["first"]["ids"])  # the same data here, so the same first rows
    assert first["seed"] == (99 if phase == "decay" else 21)  # the host would have kept the checkpoint's


def test_every_checkpoint_says_where_its_weights_came_from_and_by_which_config(chain, data_set):
    for phase, run in chain.items():
        head = checkpoints.read_head(run["folder"])
        record = head.record
        assert record["run_config"] == config_text(run["config"])
        assert record["run_hash"] == config_hash(record["run_config"])
        assert (record["run_name"], record["phase"], record["objective"]) == (f"nano-mlm-{phase}", phase, "mlm")
        assert (record["batch"], record["tokens"]) == (len(run["seen"]), run["tokens"])
        assert record["tokenizer_fingerprint"] == tokenizer.fingerprint(tokenizer.load(str(data_set / "tokenizer")))
        assert head.has_moments and head.data["rows"] == 8 * len(run["seen"])
    first, second = record["lineage"]
    newest = checkpoints.locate(chain["extend"]["folder"])
    assert second == {"source": f"{newest.parent.name}/{newest.name}", "objective": "mlm", "phase": "extend",
                      "accepted": None, "tokens": chain["extend"]["tokens"],
                      "run_hash": checkpoints.read_head(newest).record["run_hash"]}
    assert first["accepted"] == "global_rope_theta 10000.0 -> 160000.0, local_rope_theta 10000.0 -> 160000.0"


def test_initial_weights_are_kept_where_they_were_drawn_and_nowhere_else(chain):
    weights, record = checkpoints.load_model_state(chain["pretrain"]["folder"] / "initial" / "step0.pt")
    first = chain["pretrain"]["first"]["weights"]
    assert {f"model.{name}" for name in weights} == set(first)
    assert all(torch.equal(value, first[f"model.{name}"]) for name, value in weights.items())
    assert (record["tokens"], record["batch"], record["objective"], record["phase"]) == (0, 0, "mlm", "pretrain")
    assert not (chain["extend"]["folder"] / "initial").exists()
    assert "step0" not in checkpoints.locate(chain["pretrain"]["folder"]).name


def test_a_phase_killed_before_and_after_its_first_checkpoint_is_entered_once(chain, data_set, tmp_path, caplog):
    """Killed at batch 3, saved at batch 4, killed at batch 6, then let live; by then its source is gone."""
    source, whole = tmp_path / "extend", chain["decay"]["seen"]
    logging.getLogger("ettin_foundry.training.start").addHandler(caplog.handler)  # the host takes the root's away
    shutil.copytree(chain["extend"]["folder"], source)
    for die_at, begins, says in ((3, 0, ("entering decay from", "kept weights, optimizer moments", "seed 21 -> 99",
                                         "optimizer.lr 0.003 -> 0.0015")),
                                 (6, 0, ("entering decay",)), (-1, 4, ("is not entered again",))):
        args = arguments("decay", f"variables.source={source}", "seed=99", "save_interval=4ba",
                         f"callbacks.phase_watch.die_at={die_at}")
        caplog.clear()
        with caplog.at_level(logging.INFO, "ettin_foundry.training.start"):
            if die_at < 0:
                shutil.rmtree(source)
                nano_run.run(data_set, tmp_path / "runs", *args).close()
            else:
                with pytest.raises(RuntimeError, match="killed"):
                    nano_run.run(data_set, tmp_path / "runs", *args)
        assert all(words in caplog.text for words in says) and "theta" not in caplog.text
        assert PhaseWatch.seen == whole[begins:None if die_at < 0 else die_at]  # clock, lr and losses, to the last bit
    record = checkpoints.read_head(tmp_path / "runs" / "nano-mlm-decay").record
    assert [entry["phase"] for entry in record["lineage"]] == ["pretrain", "extend"]  # not once more


def test_a_cross_run_logs_the_losses_of_both_objectives_at_its_interval(chain, data_set, tmp_path):
    source = chain["decay"]["folder"]
    args = arguments("cross", f"variables.source={source}", "variables.cross_objective=clm", "loggers.inmemory={}",
                     "variables.decay_mask_rate=0.0", "variables.source_objective=mlm", "eval_interval=2ba",
                     "variables.cross_warmup=500tok", "variables.cross_decay=500tok", "device_eval_batch_size=16")
    trainer = nano_run.run(data_set, tmp_path, *args, evaluate=True)
    values = next(d for d in trainer.logger.destinations if type(d).__name__ == "InMemoryLogger").data
    for objective in ("clm", "mlm"):
        logged = values[f"metrics/eval/{objective}/TargetCrossEntropy"]
        assert len(logged) >= 3 and all(0 < value < 8 for _, value in logged)
    assert PhaseWatch.seen[0]["tokens"] == 0 and PhaseWatch.first["moments"] == {}
    state = torch.load(checkpoints.newest_complete(source), weights_only=False)["state"]["model"]
    assert all(torch.equal(value, state[name]) for name, value in PhaseWatch.first["weights"].items())
    record = checkpoints.read_head(tmp_path / "nano-clm-cross").record
    assert [(e["phase"], e["objective"]) for e in record["lineage"]] == [
        ("pretrain", "mlm"), ("extend", "mlm"), ("decay", "mlm")]
    assert (record["objective"], record["phase"]) == ("clm", "cross") and record["config"]["causal"]
    trainer.close()


@pytest.mark.parametrize("keep", ["all", "weights"])
def test_a_phase_is_entered_from_an_object_store(keep, chain, data_set, tmp_path, monkeypatch):
    source = checkpoints.newest_complete(chain["pretrain"]["folder"])
    with S3Server() as server:
        server.connect(monkeypatch)
        server.put("a/last.pt", source.read_bytes())
        args = arguments("extend", f"variables.source={server.url('a/last.pt')}", f"callbacks.ettin_phase.keep={keep}")
        nano_run.run(data_set, tmp_path, *args).close()
    state = torch.load(source, weights_only=False)["state"]["model"]
    assert all(torch.equal(value, state[name]) for name, value in PhaseWatch.first["weights"].items())
    assert PhaseWatch.seen[0]["tokens"] == 0 and bool(PhaseWatch.first["moments"]) is (keep == "all")
    assert checkpoints.read_head(tmp_path / "nano-mlm-extend").record["lineage"][0]["phase"] == "pretrain"


def test_a_run_logs_to_wandb_offline_and_evaluates_nothing(data_set, tmp_path, monkeypatch):
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    args = arguments("pretrain", "loggers.wandb.project=p", "eval_loader=null", "max_duration=2ba")
    nano_run.run(data_set, tmp_path / "runs", *args, evaluate=True).close()
    assert checkpoints.locate(tmp_path / "runs/nano-mlm-pretrain") and list(tmp_path.glob("wandb/offline-run-*"))


# ------------------------------------------------------------------ going on from the middle of a run


def test_another_lr_is_refused_unless_accepted_or_in_a_branch_and_recorded(chain, data_set, tmp_path):
    """With the same clock, rows and moments; the learning rate is then the new recipe's in every place."""
    source, before = chain["pretrain"]["folder"], chain["pretrain"]
    shutil.copytree(source, tmp_path / source.name)
    args = arguments("pretrain", "max_duration=5000tok", "variables.peak_lr=1e-3")
    with pytest.raises(ValueError, match="optimizer.lr must be 0.003, got 0.001.*ettin_clock.accept=.optimizer.lr."):
        nano_run.run(data_set, tmp_path, *args)
    for name, more in (("lower", [f"load_path={source}"]),
                       (source.name, ["callbacks.ettin_clock.accept=[optimizer.lr]"])):
        nano_run.run(data_set, tmp_path, *args, f"run_name={name}", *more).close()
        seen = PhaseWatch.seen
        assert seen[0]["tokens"] == seen[0]["before"] == before["tokens"] and len(seen) > 2
        assert min(PhaseWatch.first["steps"]) == len(before["seen"])
        for batch in seen:
            assert [(g["lr"], g["initial_lr"], g["max_lr"]) for g in batch["groups"]] == [(1e-3, 1e-3, 1e-3)] * 2
        [entry] = checkpoints.read_head(tmp_path / name).record["lineage"]
        assert entry["accepted"] == (f"optimizer.lr 0.003 -> 0.001 from batch {len(before['seen'])} "
                                     f"({before['tokens']:,} tokens) on") and entry["tokens"] is None
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
    assert PhaseWatch.seen[0]["tokens"] > 2000 and PhaseWatch.seen[0]["groups"][0]["lr"] == 1e-3


def test_checkpoints_of_earlier_processes_count_among_those_to_keep(data_set, tmp_path):
    args = arguments("pretrain", "save_interval=1ba", "save_num_checkpoints_to_keep=3")
    folder = tmp_path / "nano-mlm-pretrain"
    for die_at in (3, 5, -1):
        if die_at > 0:
            with pytest.raises(RuntimeError, match="killed"):
                nano_run.run(data_set, tmp_path, *args, f"callbacks.phase_watch.die_at={die_at}")
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


# ------------------------------------------------------------------ crossing, by itself


def ettin(objective, **kwargs):
    return EttinModel(**{"size": "nano", "objective": objective, "max_seq_len": 64, "vocab_size": 512, **kwargs})


def crossing(model, source, *, start: Callable = CrossObjective, accept=(), **kwargs):
    clock, cross = Clock({}), start(str(source), accept)
    run = Trainer(model=model, device="cpu", callbacks=[cross, clock], run_name="cross", progress_bar=False,
                  optimizers=StableAdamW(model.parameters(), PEAK), **kwargs)
    run.close()
    return run, clock


def save(model, path, lineage=()):
    clock = Clock({})
    run = Trainer(model=model, device="cpu", callbacks=clock, run_name="saved", progress_bar=False)
    clock.lineage = lineage
    run.save_checkpoint(str(path))
    run.close()
    return path


@pytest.fixture(scope="module")
def tokens(tokenizer_dir):
    return tokenizer.load(str(tokenizer_dir))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokens):
    """A decoder and its checkpoint, as Composer and Clock write it."""
    model = ettin("clm", tokenizer=tokens)
    with torch.no_grad():  # models of a seed start alike: else weights that were never loaded look loaded
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, save(model, tmp_path_factory.mktemp("decoder") / "ep0-ba7-rank0.pt")


def logits(model):
    ids = torch.arange(40) * 11 % 500
    ends = torch.tensor([0, 17, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(17), torch.arange(23)])
    model.eval()
    with torch.no_grad():
        return model.model.predict(model.model(ids, positions, ends, 23))


@pytest.mark.parametrize("through", ["checkpoints", "folders"])
def test_there_and_back_without_training_gives_equal_logits(through, decoder, tokens, tmp_path):
    def passed_on(model, name, lineage=()):
        if through == "checkpoints":
            return save(model, tmp_path / f"{name}.pt", lineage)
        return export_model(model, model.config, model.tokenizer, tmp_path / name, objective=model.objective,
                               facts={"lineage": list(lineage)})

    before, _ = decoder
    there, clock = crossing(ettin("mlm", tokenizer=tokens, max_seq_len=128), passed_on(before, "decoder"))
    encoder = there.state.model
    assert there.state.timestamp.batch == 0 and not there.state.optimizers[0].state
    back, clock = crossing(ettin("clm", tokenizer=tokens), passed_on(encoder, "encoder", clock.lineage))
    assert torch.equal(logits(back.state.model), logits(before))
    assert not torch.allclose(logits(encoder), logits(before))  # the same weights under another attention
    assert [e["objective"] for e in clock.lineage] == ["clm", "mlm"]


def test_what_was_built_is_compared_again(decoder, tokens):
    """Without the checks before work, as under a plain Trainer."""
    model, path = decoder
    with pytest.raises(ValueError, match=r"global_rope_theta 10000.0 \(here 160000.0\).*accept=\[global_rope_theta\]"):
        crossing(ettin("mlm", tokenizer=tokens, global_rope_theta=160000.0), path)
    with pytest.raises(ValueError, match="was not loaded"):
        crossing(ettin("clm", tokenizer=tokens), path, start=EnterPhase)
    with pytest.raises(ValueError, match="gave no moments to StableAdamW.*keep=weights"):
        crossing(ettin("clm", tokenizer=tokens), path, start=EnterPhase, load_path=str(path),
                 load_ignore_keys=[*PARTS_LEFT_OUT, "state/callbacks"])
    weights = functools.partial(EnterPhase, keep="weights")
    run, clock = crossing(ettin("clm", tokenizer=tokens), path, start=weights, load_path=str(path),
                          load_weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), run.state.model.parameters()))
    assert not run.state.optimizers[0].state and clock.lineage[-1]["source"].endswith("ep0-ba7-rank0.pt")
    state = torch.load(path, weights_only=False)
    del state["state"]["model"]["model.output_bias"]
    torch.save(state, path.with_name("other.pt"))
    with pytest.raises(ValueError, match=r"1 tensor\(s\) that are not this run's.*output_bias"):
        crossing(ettin("mlm", tokenizer=tokens), path.with_name("other.pt"))
