"""Entering phases and crossing objectives: a chain of real nano runs, killed and started again, and refusals one by one.

`TRAPS` lists what the original stumbles over, each with the test that shows that this does not.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("composer")
pytest.importorskip("llmfoundry")

import nano_run  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from composer import Trainer  # noqa: E402
from omegaconf import OmegaConf as om  # noqa: E402

from ettin_foundry.data import tokenizer  # noqa: E402
from ettin_foundry.hub.folder import export_model  # noqa: E402
from ettin_foundry.model.composer import EttinModel  # noqa: E402
from ettin_foundry.model.transformer import Ettin  # noqa: E402
from ettin_foundry.training import checkpoints as checkpoint  # noqa: E402
from ettin_foundry.training import checks, entry  # noqa: E402
from ettin_foundry.training.clock import Clock  # noqa: E402
from ettin_foundry.training.optimizer import StableAdamW  # noqa: E402
from ettin_foundry.training.start import CrossObjective, EnterPhase  # noqa: E402
from ettin_foundry.training.starts import config_hash, config_text  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
LONG = ("extend", "decay", "cross")
PEAK, WEIGHT_DECAY, WARMUP = 3e-3, 3e-4, 1500
TOKENS = {"pretrain": 3000, "extend": 3000, "decay": 4000, "cross": 3000}

TRAPS = {
    # what the original does -> the test that shows that ours does not; facts in section numbers of its analysis
    "reset_time zeroes the clock at every restart (8.1.4)":
        "test_phases.py::test_a_phase_killed_after_its_first_checkpoint_goes_on_without_its_source",
    "reset_time forgotten: the loaded clock is past the end, the run cannot start (0.5.3)":
        "test_phases.py::test_each_phase_starts_at_token_0_of_its_data_with_weights_and_moments_of_the_phase_before",
    "restart_override doubles the learning rate under one_minus_sqrt (4.3)":
        "test_phases.py::test_the_lr_of_every_batch_of_every_phase_is_its_formula",
    "the schedule lags one batch (4.2)":
        "test_clock.py::test_the_lr_of_each_batch_is_the_schedule_at_the_tokens_before_it",
    "a changed lr leaves max_lr behind, or takes it along (4.1)":
        "test_phases.py::test_weight_decay_is_relative_to_the_peak_of_pretraining_until_the_end_of_decay",
    "local theta drifts between phases (0.4)":
        "test_phases.py::test_another_theta_is_refused_unless_the_phase_may_change_it",
    "local theta drifts between the members of a pair (0.4)":
        "test_recipes.py::test_a_pair_differs_only_in_its_objective",
    "a cross run starts from nobody knows which checkpoint (caveat 2)":
        "test_phases.py::test_every_checkpoint_says_where_its_weights_came_from_and_by_which_config",
    "masks are not the same after a resume (2.1)":
        "test_train.py::test_four_steps_resume_four_steps_equals_eight_steps_bitwise",
    "no state of the data: a resume replays the loader (3.5)":
        "test_data.py::test_resume_at_any_step_equals_never_stopped",
    "a row number needs the whole permutation in memory (8.4)":
        "test_order.py::test_looking_up_a_place_reads_the_histograms_of_one_window_only",
    "padding_idx 0 keeps a real token from learning (1.5)":
        "test_phases.py::test_token_0_learns_as_every_other",
    "the output bias starts at random (1.5)":
        "test_model.py::test_initialisation_follows_the_role_of_each_matrix",
    "losses are weighted by rows, so microbatches change the gradient (2.3)":
        "test_train.py::test_microbatches_of_four_give_the_gradient_of_one_of_eight",
    "a decoder sees document ends by accident of chunking (3.3.3)":
        "test_objectives.py::test_clm_predicts_the_end_of_finished_documents_only",
    "SEP overwrites the last real token of a full chunk (2.2)":
        "test_data.py::test_rows_hold_the_stored_chunks_of_the_order",
    "encoder and decoder see other ends (2.2)":
        "test_data.py::test_encoder_and_decoder_of_a_pair_read_the_same_rows",
    "evaluation never runs (3.5)":
        "test_phases.py::test_a_cross_run_logs_the_losses_of_both_objectives_at_its_interval",
    "the batch-size warm-up is configured and does nothing (3.5)":
        "test_data.py::test_batch_sizes_go_up_without_changing_the_stream",
    "the packer's token counter stands still for decoders (3.6)":
        "test_ramp.py::test_every_step_and_every_row_equals_the_simulation",
    "padding of a packed row is attended to as a document (3.6)":
        "test_batches.py::test_flat_stream_equals_loops_over_tokens",
    "mntp is said nowhere, and masks are read at the wrong place (2.4)":
        "test_hf.py::test_mntp_says_everywhere_that_the_mask_is_read_one_before",
    "window off by one in transformers' decoders (6.4)":
        "test_attention.py::test_window_lets_exactly_the_stated_positions_through",
    "an unset local theta is exported as -1 (6.2)":
        "test_hf.py::test_config_json_speaks_to_both_generations",
    "causal models break without compilation (2.2)":
        "test_train.py::test_losses_are_the_golden_ones",
}


def test_every_trap_has_a_test():
    for trap, place in TRAPS.items():
        name, function = place.split("::")
        assert f"\ndef {function}(" in (ROOT / "tests" / name).read_text(), (trap, place)


# ------------------------------------------------------------------ a chain of real runs


def register_watch():
    """Registers `phase_watch`: what the optimizer does at each batch, and a death at a given one."""
    from composer import Callback
    from llmfoundry import registry

    class PhaseWatch(Callback):
        seen: list[dict] = []
        first: dict = {}

        def __init__(self, die_at: int = -1):
            self.die_at, PhaseWatch.seen, PhaseWatch.first = die_at, [], {}

        def before_train_batch(self, state, logger):
            groups = state.optimizers[0].param_groups
            PhaseWatch.seen.append({
                "tokens": int(state.timestamp.token), "before": state.batch["tokens_before"],
                "groups": [{key: g[key] for key in ("lr", "initial_lr", "max_lr", "weight_decay")} for g in groups],
                "base_lrs": list(state.schedulers[0].base_lrs)})
            if not PhaseWatch.first:
                names = {p: name for name, p in state.model.named_parameters()}
                moments = {names[p]: values["exp_avg_sq"].clone() for p, values in state.optimizers[0].state.items()
                           if "exp_avg_sq" in values}
                ids = torch.where(state.batch["labels"] != -100, state.batch["labels"], state.batch["input_ids"])
                PhaseWatch.first = {"moments": moments, "steps": [int(g["step"]) for g in groups if "step" in g], "ids": ids,
                                    "weights": {n: p.detach().clone() for n, p in state.model.named_parameters()},
                                    "seed": state.rank_zero_seed}

        def batch_end(self, state, logger):
            PhaseWatch.seen[-1]["loss"] = float(state.total_loss_dict["loss/train/total"])
            if state.timestamp.batch == self.die_at:
                raise RuntimeError("killed")

    registry.callbacks.register("phase_watch", func=PhaseWatch)
    return PhaseWatch


def arguments(phase, *overrides):
    """What `nano_run.run` is given to run a phase of nano on the fixtures' data."""
    sizes = ["variables.long_max_seq_len=64", "variables.long_global_batch=8", "device_train_microbatch_size=4"]
    times = [f"variables.{name}_tokens={TOKENS[name]}tok" for name in LONG]
    overlay = [] if phase == "pretrain" else [str(ROOT / f"yamls/phases/{phase}.yaml")]
    return [*overlay, *sizes, *times, "model.vocab_size=512", "variables.extend_data=${variables.data}",
            "variables.decay_data=${variables.data}", f"max_duration={TOKENS[phase]}tok", "callbacks.phase_watch={}",
            f"variables.warmup={WARMUP}tok", *overrides]


class Said(logging.Handler):
    """The messages of phases.py."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        self.logger = logging.getLogger("ettin_foundry.training.start")
        self.logger.addHandler(self)
        self.level = self.logger.level
        self.logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self)
        self.logger.setLevel(self.level)


@pytest.fixture(scope="module")
def watch():
    return register_watch()


@pytest.fixture(scope="module")
def chain(data_set, tmp_path_factory, watch):
    """pretrain, extend and decay of an encoder, one after the other: what was seen, said, and written."""
    out, done, source = tmp_path_factory.mktemp("chain"), {}, None
    for phase in ("pretrain", "extend", "decay"):
        args = arguments(phase, *([f"variables.source={source}"] if source else []), *["seed=99"] * (phase == "decay"))
        with Said() as said:
            trainer = nano_run.run(data_set, out, *args)
        config = om.to_container(nano_run.configure(data_set, out, *args), resolve=True)
        done[phase] = {"seen": watch.seen, "first": watch.first, "said": said.messages, "folder": out / config["run_name"],
                       "config": config, "args": args, "tokens": int(trainer.state.timestamp.token)}
        trainer.close()
        source = done[phase]["folder"]
    return out, done


def formula(phase, t):
    """The learning rate after t tokens, in float64, as the recipe states it."""
    if phase == "pretrain":
        return PEAK * (1e-10 + (1 - 1e-10) * t / WARMUP if t < WARMUP else 1.0)
    x = min(1.0, t / TOKENS[phase])
    return PEAK * (0.5 + 0.5 * (1 - math.sqrt(x))) if phase == "extend" else PEAK / 2 * (0.04 + 0.96 * (1 - math.sqrt(x)))


@pytest.mark.parametrize("phase", ["pretrain", "extend", "decay"])
def test_the_lr_of_every_batch_of_every_phase_is_its_formula(phase, chain):
    """In the group's lr, and in initial_lr and base_lrs, from which a scheduler would compute it again."""
    seen = chain[1][phase]["seen"]
    assert len(seen) > 5 and seen[0]["tokens"] == 0
    for batch in seen:
        lr = formula(phase, batch["tokens"])
        peak = PEAK / 2 if phase == "decay" else PEAK
        for group in batch["groups"]:
            assert group["lr"] == pytest.approx(lr, rel=1e-12) and group["initial_lr"] == peak
        assert batch["base_lrs"] == [peak, peak]


def test_weight_decay_is_relative_to_the_peak_of_pretraining_until_the_end_of_decay(chain):
    """A step removes lr / max_lr * weight_decay of a matrix: the whole at the peak, half where decay begins."""
    begins = {"extend": 1.0, "decay": 0.5}
    for phase, share in begins.items():
        for batch in chain[1][phase]["seen"]:
            matrices, norms = batch["groups"]
            removed = matrices["lr"] / matrices["max_lr"] * matrices["weight_decay"]
            assert removed == pytest.approx(WEIGHT_DECAY * formula(phase, batch["tokens"]) / PEAK, rel=1e-12)
            assert matrices["max_lr"] == norms["max_lr"] == PEAK and norms["weight_decay"] == 0
        first = chain[1][phase]["seen"][0]["groups"][0]
        assert first["lr"] / first["max_lr"] == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(("before", "phase"), [("pretrain", "extend"), ("extend", "decay")])
def test_each_phase_starts_at_token_0_of_its_data_with_weights_and_moments_of_the_phase_before(before, phase, chain):
    done = chain[1]
    state = torch.load(checkpoint.newest_complete(done[before]["folder"]), weights_only=False)["state"]
    first = done[phase]["first"]
    for name, value in first["weights"].items():
        assert torch.equal(value, state["model"][name]), name
    stored = state["optimizers"]["StableAdamW"]
    assert first["moments"].keys() == stored["state"].keys() and len(first["moments"]) > 20
    for name, value in first["moments"].items():
        assert torch.equal(value, stored["state"][name]["exp_avg_sq"]) and value.abs().max() > 0, name
    assert first["steps"] == [int(g["step"]) for g in stored["param_groups"]] and min(first["steps"]) > 0
    assert (done[phase]["seen"][0]["tokens"], done[phase]["seen"][0]["before"]) == (0, 0)
    assert torch.equal(first["ids"], done["pretrain"]["first"]["ids"])  # the same set here, so the same first rows
    assert first["seed"] == (99 if phase == "decay" else 21)  # the host would have kept the checkpoint's


def test_entering_says_once_what_is_kept_new_and_changed(chain):
    assert chain[1]["pretrain"]["said"] == []
    [extend], [decay] = chain[1]["extend"]["said"], chain[1]["decay"]["said"]
    for words in ("entering extend from", "(mlm, batch", "kept weights, optimizer moments; new clock, schedule, data order, "
                  "generators; changed:", "model.global_rope_theta 10000.0 -> 160000.0"):
        assert words in extend
    for words in ("entering decay from", "optimizer.lr 0.003 -> 0.0015", "optimizer.max_lr None -> 0.003",
                  "train_loader.mask_rate 0.3 -> 0.15", "seed 21 -> 99"):
        assert words in decay
    assert "theta" not in decay and "weight_decay" not in decay


def test_every_checkpoint_says_where_its_weights_came_from_and_by_which_config(chain, data_set, tokenizer_dir):
    out, done = chain
    for phase, run in done.items():
        head = checkpoint.read_head(run["folder"])
        record = head.record
        text = json.dumps({k: v for k, v in run["config"].items() if k != "device_eval_batch_size"}, sort_keys=True,
                          separators=(",", ":"))
        assert record["run_config"] == config_text(run["config"]) and record["run_hash"] == config_hash(record["run_config"])
        assert json.loads(record["run_config"]).items() >= json.loads(text).items()
        assert (record["run_name"], record["phase"]) == (f"nano-mlm-{phase}", phase)
        assert (record["objective"], record["objective_schedule"]) == ("mlm", "mlm")
        assert (record["batch"], record["tokens"]) == (len(run["seen"]), run["tokens"])
        assert record["tokenizer_fingerprint"] == tokenizer.fingerprint(tokenizer.load(str(data_set / "tokenizer")))
        assert head.has_moments and head.data["rows"] == 8 * len(run["seen"])
    first, second = record["lineage"]
    newest = checkpoint.locate(done["extend"]["folder"])
    assert (second["source"], second["objective"], second["tokens"], second["phase"], second["accepted"]) == (
        f"{newest.parent.name}/{newest.name}", "mlm", done["extend"]["tokens"], "extend", None)
    assert second["run_hash"] == checkpoint.read_head(newest).record["run_hash"]
    assert first["accepted"] == "global_rope_theta 10000.0 -> 160000.0, local_rope_theta 10000.0 -> 160000.0"
    assert (first["phase"], first["tokens"]) == ("pretrain", done["pretrain"]["tokens"])


def test_initial_weights_are_kept_where_they_were_drawn_and_nowhere_else(chain):
    done = chain[1]
    weights, record = checkpoint.load_model_state(done["pretrain"]["folder"] / "initial" / "step0.pt")
    first = done["pretrain"]["first"]["weights"]
    assert {f"model.{name}" for name in weights} == set(first)
    assert all(torch.equal(value, first[f"model.{name}"]) for name, value in weights.items())
    assert (record["tokens"], record["batch"], record["objective"], record["phase"]) == (0, 0, "mlm", "pretrain")
    assert not (done["extend"]["folder"] / "initial").exists()
    assert "step0" not in checkpoint.locate(done["pretrain"]["folder"]).name


@pytest.fixture(scope="module")
def killed(chain, data_set, watch, tmp_path_factory):
    """The decay of the chain again, killed before its first checkpoint (at batch 4), then after it, then let live.

    The source is gone by the last start.
    """
    out, source = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("source") / "extend"
    shutil.copytree(chain[1]["extend"]["folder"], source)
    starts = []
    for die_at in (3, 6, None):
        args = arguments("decay", f"variables.source={source}", "seed=99", "save_interval=4ba",
                         *([] if die_at is None else [f"callbacks.phase_watch.die_at={die_at}"]))
        with Said() as said:
            if die_at is None:
                shutil.rmtree(source)
                nano_run.run(data_set, out, *args).close()
            else:
                with pytest.raises(RuntimeError, match="killed"):
                    nano_run.run(data_set, out, *args)
        newest = checkpoint.newest_complete(out / "nano-mlm-decay")
        starts.append({"seen": watch.seen, "said": said.messages, "newest": newest})
    return starts


def test_a_phase_killed_before_its_first_checkpoint_is_entered_again(chain, killed):
    whole = chain[1]["decay"]["seen"]
    assert killed[0]["newest"] is None and killed[0]["seen"] == whole[:3]
    assert [message[:14] for message in killed[1]["said"]] == ["entering decay"]
    assert killed[1]["seen"] == whole[:6]  # clock, learning rates and losses, to the last bit


def test_a_phase_killed_after_its_first_checkpoint_goes_on_without_its_source(chain, killed):
    assert "ba4" in killed[1]["newest"].name
    [said] = killed[2]["said"]
    assert "is not entered again" in said
    assert killed[2]["seen"] == chain[1]["decay"]["seen"][4:]
    record = checkpoint.read_head(killed[2]["newest"]).record
    assert [e["phase"] for e in record["lineage"]] == ["pretrain", "extend"]  # not once more


# ------------------------------------------------------------------ crossing, through the overlay


def test_a_cross_run_logs_the_losses_of_both_objectives_at_its_interval(chain, data_set, watch, tmp_path):
    done = chain[1]["decay"]
    args = arguments("cross", f"variables.source={done['folder']}", "variables.cross_objective=clm", "loggers.inmemory={}",
                     "variables.decay_mask_rate=0.0", "variables.source_objective=mlm", "eval_interval=2ba",
                     "variables.cross_warmup=500tok", "variables.cross_decay=500tok", "device_eval_batch_size=16")
    trainer = nano_run.run(data_set, tmp_path, *args, evaluate=True)
    values = next(d for d in trainer.logger.destinations if type(d).__name__ == "InMemoryLogger").data
    for objective in ("clm", "mlm"):
        logged = values[f"metrics/eval/{objective}/TargetCrossEntropy"]
        assert len(logged) >= 3 and all(0 < value < 8 for _, value in logged)
    assert watch.seen[0]["tokens"] == 0 and watch.first["moments"] == {}
    state = torch.load(checkpoint.newest_complete(done["folder"]), weights_only=False)["state"]["model"]
    assert all(torch.equal(value, state[name]) for name, value in watch.first["weights"].items())
    record = checkpoint.read_head(tmp_path / "nano-clm-cross").record
    assert [(e["phase"], e["objective"]) for e in record["lineage"]] == [
        ("pretrain", "mlm"), ("extend", "mlm"), ("decay", "mlm")]
    assert (record["objective"], record["phase"]) == ("clm", "cross") and record["config"]["causal"]
    trainer.close()


def test_the_tokenizers_template_follows_the_objective_that_was_crossed_to(crossed_models, tmp_path):
    """A text ends with [SEP] for an encoder, and stays open for a decoder, whichever it was before."""
    for model in crossed_models:
        folder = export_model(model, model.config, model.tokenizer, tmp_path / model.objective, objective=model.objective)
        from transformers import PreTrainedTokenizerFast

        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        last = loaded.convert_ids_to_tokens(loaded("ka lo mi")["input_ids"])[-1]
        assert (last == "[SEP]") == (model.objective != "clm")


# ------------------------------------------------------------------ crossing, by itself


def ettin(objective, **kwargs):
    return EttinModel(**{"size": "nano", "objective": objective, "max_seq_len": 64, "vocab_size": 512, **kwargs})


def crossing(model, source, *, start: Callable = CrossObjective, accept=(), **kwargs):
    clock, cross = Clock({}), start(str(source), accept)
    run = Trainer(model=model, device="cpu", callbacks=[cross, clock], run_name="cross", progress_bar=False,
                  optimizers=StableAdamW(model.parameters(), PEAK), **kwargs)
    run.close()
    return run, clock, cross


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
    with torch.no_grad():  # every model of a seed starts alike: without this, weights that were never loaded look loaded
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model, save(model, tmp_path_factory.mktemp("decoder") / "ep0-ba7-rank0.pt")


@pytest.fixture(scope="module")
def folder(decoder, tmp_path_factory):
    model, _ = decoder
    lineage = [{"objective": "mlm", "tokens": 5}]
    return export_model(model, model.config, model.tokenizer, tmp_path_factory.mktemp("hf") / "out", objective="clm",
                           facts={"tokens": 12, "lineage": lineage})


@pytest.fixture(scope="module")
def crossed_models(decoder, tokens):
    """An encoder from the decoder, and that decoder."""
    return crossing(ettin("mntp", tokenizer=tokens), decoder[1])[0].state.model, decoder[0]


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
    there, clock, _ = crossing(ettin("mlm", tokenizer=tokens), passed_on(before, "decoder"))
    encoder = there.state.model
    back, clock, _ = crossing(ettin("clm", tokenizer=tokens), passed_on(encoder, "encoder", clock.lineage))
    assert torch.equal(logits(back.state.model), logits(before))
    assert not torch.allclose(logits(encoder), logits(before))  # the same weights under another attention
    assert [e["objective"] for e in clock.lineage] == ["clm", "mlm"]


@pytest.mark.parametrize("kind", ["file", "save folder", "sharded", "Hugging Face folder"])
def test_weights_of_every_kind_of_source_are_taken_with_a_fresh_clock(kind, decoder, folder, tokens, tmp_path):
    old, path = decoder
    source = {"file": path, "save folder": path.parent, "sharded": tmp_path / "ep0-ba7", "Hugging Face folder": folder}[kind]
    if kind == "sharded":
        dcp.save(torch.load(path, weights_only=False), checkpoint_id=source)
    run, clock, _ = crossing(ettin("mntp", tokenizer=tokens, max_seq_len=128), source)
    for (name, a), (_, b) in zip(old.named_parameters(), run.state.model.named_parameters()):
        assert torch.equal(a, b), name
    assert run.state.timestamp.batch == 0 and not run.state.optimizers[0].state
    own = {"file": "ep0-ba7-rank0.pt", "save folder": "ep0-ba7-rank0.pt", "sharded": "ep0-ba7", "Hugging Face folder": "out"}
    assert clock.lineage[-1]["source"].split("/")[1] == own[kind] and clock.lineage[-1]["objective"] == "clm"
    # a card counts tokens from initialisation, so what came before is not counted twice
    assert sum(entry["tokens"] for entry in clock.lineage) == (12 if kind == "Hugging Face folder" else 0)


def test_crossing_refuses_a_load_path_and_leaves_a_resumed_run_alone(decoder):
    from types import SimpleNamespace

    from composer.core import Timestamp

    with pytest.raises(ValueError, match="only one can give the weights"):
        crossing(ettin("clm"), decoder[1], load_path=str(decoder[1]))
    cross = CrossObjective("nowhere")
    cross.load_state_dict({"source": "nowhere"})  # Composer does this when autoresume found this run's checkpoint
    cross.after_load(SimpleNamespace(timestamp=Timestamp(batch=4), load_path="own.pt"), None)  # type: ignore[arg-type]


def test_what_was_built_is_compared_again(decoder, tokens):
    """Without the checks before work, as under a plain Trainer."""
    with pytest.raises(ValueError, match=r"global_rope_theta 10000.0 \(here 160000.0\).*accept=\[global_rope_theta\]"):
        crossing(ettin("mlm", tokenizer=tokens, global_rope_theta=160000.0), decoder[1])
    run, clock, _ = crossing(ettin("mlm", tokenizer=tokens, global_rope_theta=160000.0), decoder[1],
                             accept=["global_rope_theta"])
    assert clock.lineage[-1]["accepted"] == "global_rope_theta 10000.0 -> 160000.0"
    with pytest.raises(ValueError, match="was not loaded"):
        crossing(ettin("clm", tokenizer=tokens), decoder[1], start=EnterPhase)
    with pytest.raises(ValueError, match="gave no moments to StableAdamW.*keep=weights"):  # the source had another optimizer
        crossing(ettin("clm", tokenizer=tokens), decoder[1], start=EnterPhase, load_path=str(decoder[1]),
                 load_ignore_keys=[*entry.ANEW, "state/callbacks"])
    weights = functools.partial(EnterPhase, keep="weights")
    run, clock, _ = crossing(ettin("clm", tokenizer=tokens), decoder[1], start=weights, load_path=str(decoder[1]),
                             load_weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(decoder[0].parameters(), run.state.model.parameters()))
    assert not run.state.optimizers[0].state and clock.lineage[-1]["source"].endswith("ep0-ba7-rank0.pt")
    with pytest.raises(ValueError, match=r"1 tensor\(s\) that are not this run's.*output_bias"):
        state = torch.load(decoder[1], weights_only=False)
        del state["state"]["model"]["model.output_bias"]
        torch.save(state, decoder[1].with_name("other.pt"))
        crossing(ettin("mlm", tokenizer=tokens), decoder[1].with_name("other.pt"))


# ------------------------------------------------------------------ refused before work


@pytest.fixture(scope="module")
def cross_cfg(tokenizer_dir):
    """nano with the fixtures' vocabulary, crossing to an encoder at the source's theta."""
    return config_of("cross", f"tokenizer.name={tokenizer_dir}", "variables.rope_theta=10000.0")


def config_of(phase, *overrides):
    args = [str(ROOT / "yamls/nano.yaml"), str(ROOT / f"yamls/phases/{phase}.yaml"), "model.vocab_size=512",
            "variables.source=x", *overrides]
    return om.to_container(nano_run.program().configure(args), resolve=True)


def prepared(cfg, name, source, **changes):
    cfg = copy.deepcopy(cfg)
    cfg["callbacks"][name]["source"] = str(source)
    for key, value in changes.items():
        *blocks, last = key.split("__")
        block = cfg
        for part in blocks:
            block = block.setdefault(part, {})
        block[last] = value
    for loader in ("train_loader",):  # as the recipes have it
        cfg[loader]["objective"] = cfg["model"]["objective"]
    checks.check_settings({**cfg, "eval_loader": None, "eval_interval": None, "eval_subset_num_batches": None})
    return entry.prepare(cfg, name)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model__global_rope_theta": 160000.0, "model__local_rope_theta": 160000.0},
     ["global_rope_theta 10000.0 (here 160000.0)", "local_rope_theta 10000.0", "variables.rope_theta",
      "callbacks.ettin_cross.accept=[global_rope_theta, local_rope_theta]"]),
    ({"model__local_rope_theta": 160000.0, "callbacks__ettin_cross__accept": ["global_rope_theta"]},
     ["local_rope_theta 10000.0 (here 160000.0)"]),
    ({"callbacks__ettin_cross__accept": ["global_rope_theta"]}, ["accept: 'global_rope_theta'", "allows nothing"]),
    ({"model__size": "17m"}, ["hidden_size 128 (here 256)", "num_hidden_layers 4 (here 7)"]),
    ({"model__vocab_size": 576}, ["vocab_size 512 (here 576)"]),
    ({"model__local_attention": 64}, ["local_attention 128 (here 64)"]),
    ({"model__objective": "clm", "train_loader__mask_rate": 0.0}, ["trained with clm", "starts with clm", "ettin_phase"]),
    ({"eval_loader__objective": ["mntp", "mlm"]}, ["['mntp', 'mlm']", "with clm", "variables.source_objective=clm"]),
])
def test_a_source_that_does_not_fit_is_refused_with_both_values(changes, words, cross_cfg, decoder):
    with pytest.raises(ValueError) as error:
        prepared(cross_cfg, "ettin_cross", decoder[1], **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_what_fits_or_is_accepted_is_crossed(cross_cfg, decoder):
    theta = {"model__global_rope_theta": 160000.0, "callbacks__ettin_cross__accept": ["global_rope_theta"]}
    for changes in ({}, theta, {"model__attn_out_dropout": 0.3}, {"model__objective": "mlm"}):
        assert prepared(cross_cfg, "ettin_cross", decoder[1], **changes) == {}


def test_another_tokenizer_is_refused_by_its_content(cross_cfg, decoder, folder, tmp_path):
    from conftest import make_documents

    tokenizer.save(tokenizer.train_bpe(make_documents(300, seed=4), 512), tmp_path / "other")
    for source in (decoder[1], folder):
        with pytest.raises(ValueError, match=r"tokenizer '.*' with vocab_sha256 \w{64} \(here 'other' with vocab_sha256"):
            prepared(cross_cfg, "ettin_cross", source, tokenizer__name=str(tmp_path / "other"))
        prepared(cross_cfg, "ettin_cross", source, tokenizer__name=str(tmp_path / "other"),
                 callbacks__ettin_cross__accept=["tokenizer"])


def test_an_encoder_that_does_not_say_how_it_predicts_is_refused_where_that_matters(cross_cfg, tokens, tmp_path):
    model = ettin("mlm", tokenizer=tokens)
    place = export_model(model, model.config, tokens, tmp_path / "enc", objective="mlm")
    config = json.loads((place / "config.json").read_text())
    del config["ettin_foundry"]["objective"]  # as official encoders
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say whether.*mlm or mntp.*ettin import"):
        prepared(cross_cfg, "ettin_cross", place)
    prepared(cross_cfg, "ettin_cross", place, model__objective="clm", train_loader__mask_rate=0.0)


def test_a_folder_of_the_published_kind_is_crossed_as_it_is(decoder, folder, tokens, tokenizer_dir, tmp_path):
    """Keys and values of an official decoder's config.json, at nano's shape: nothing of ours in it."""
    shutil.copytree(folder, tmp_path / "official")
    config = {"architectures": ["ModernBertDecoderForCausalLM"], "model_type": "modernbert-decoder", "hidden_size": 128,
              "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 512,
              "max_position_embeddings": 7999, "global_rope_theta": 160000.0, "local_rope_theta": 160000.0,
              "local_attention": 128, "sliding_window": 64, "decoder_bias": True,
              "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "official" / "config.json").write_text(json.dumps(config))
    cfg = config_of("cross", f"tokenizer.name={tokenizer_dir}")  # theta as the overlay says
    assert prepared(cfg, "ettin_cross", tmp_path / "official") == {}
    encoder = ettin("mntp", tokenizer=tokens, global_rope_theta=160000.0, local_rope_theta=160000.0)
    run, clock, _ = crossing(encoder, tmp_path / "official")
    assert all(torch.equal(a, b) for a, b in zip(decoder[0].parameters(), run.state.model.parameters()))
    assert clock.lineage == ({"source": f"{tmp_path.name}/official", "objective": "clm", "tokens": None, "phase": None,
                              "run_hash": None, "accepted": None},)


def partial(kind, path, folder, tmp_path):
    """A source of which a part is missing."""
    if kind == "missing":
        return tmp_path / "none.pt"
    if kind == "half a file":
        (tmp_path / "half.pt").write_bytes(path.read_bytes()[:5000])
        return tmp_path / "half.pt"
    if kind == "save folder of half a file":
        (tmp_path / "ep0-ba5-rank0.pt").write_bytes(path.read_bytes()[:5000])
        return tmp_path
    if kind == "shard cut short":
        dcp.save(torch.load(path, weights_only=False), checkpoint_id=tmp_path / "ep0-ba7")
        shard = next((tmp_path / "ep0-ba7").glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-100])
        return tmp_path / "ep0-ba7"
    if kind == "without a record":
        torch.save({"state": {"model": {"model.x": torch.ones(1)}}}, tmp_path / "foreign.pt")
        return tmp_path / "foreign.pt"
    shutil.copytree(folder, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    if kind == "folder without weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    return tmp_path / "hf"


@pytest.mark.parametrize(("kind", "says"), [
    ("missing", "none.pt.*no such file or folder"), ("half a file", "half.pt.*not a whole archive"),
    ("save folder of half a file", "no complete checkpoint"), ("shard cut short", "missing or cut short"),
    ("without a record", "foreign.pt does not say what model it holds"),
    ("folder without weights", "no model.safetensors"), ("folder cut short", "not a whole safetensors file"),
])
def test_a_missing_or_partial_source_is_refused_by_its_key(kind, says, cross_cfg, decoder, folder, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"callbacks.ettin_cross.source: '.*{says}"):
        prepared(cross_cfg, "ettin_cross", partial(kind, decoder[1], folder, tmp_path))


def test_a_payload_as_source_is_named_and_not_run(cross_cfg, tmp_path):
    from test_checkpoints import Payload

    torch.save({"state": Payload(tmp_path / "mark")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="callbacks.ettin_cross.source: .*system"):
        prepared(cross_cfg, "ettin_cross", tmp_path / "bad.pt")
    assert not (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def phase_cfg(data_set):
    return config_of("extend", f"tokenizer.name={data_set / 'tokenizer'}")


@pytest.fixture(scope="module")
def pretrained(chain):
    return checkpoint.newest_complete(chain[1]["pretrain"]["folder"])


@pytest.mark.parametrize(("changes", "words"), [
    ({"model__objective": "clm", "train_loader__mask_rate": 0.0}, ["trained with mlm", "starts with clm", "ettin_cross"]),
    ({"model__objective": "mntp"}, ["trained with mlm", "starts with mntp", "callbacks.ettin_phase.accept=[objective]"]),
    ({"model__objective": [{"until": "0.5dur", "objective": "clm"}, {"objective": "mlm"}]}, ["starts with clm"]),
    ({"model__hidden_size": 192, "model__num_attention_heads": 3}, ["hidden_size 128 (here 192)"]),
    ({"fsdp_config": {"state_dict_type": "sharded"}}, ["one file", "state_dict_type is sharded", "full"]),
    ({"optimizer": {"name": "decoupled_adamw", "lr": 1e-3}}, ["ettin_stable_adamw", "decoupled_adamw", "keep=weights"]),
])
def test_a_phase_that_cannot_go_on_is_refused_with_both_values(changes, words, phase_cfg, pretrained):
    with pytest.raises(ValueError) as error:
        prepared(phase_cfg, "ettin_phase", pretrained, **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_another_theta_is_refused_unless_the_phase_may_change_it(phase_cfg, pretrained, chain):
    """extend.yaml may, decay.yaml may not: a decay of a model that was never extended is caught."""
    assert prepared(phase_cfg, "ettin_phase", pretrained)["load_path"] == str(pretrained)
    with pytest.raises(ValueError, match=r"global_rope_theta 10000.0 \(here 160000.0\), local_rope_theta 10000.0"):
        prepared(phase_cfg, "ettin_phase", pretrained, callbacks__ettin_phase__accept=[])
    extended = chain[1]["extend"]["folder"]
    with pytest.raises(ValueError, match=r"local_rope_theta 160000.0 \(here 10000.0\)"):  # the drift of the original
        prepared(phase_cfg, "ettin_phase", extended, callbacks__ettin_phase__accept=[], model__local_rope_theta=10000.0)
    assert "accept" not in config_of("decay")["callbacks"]["ettin_phase"]


def test_the_host_is_told_to_keep_weights_and_moments_or_weights_alone(phase_cfg, pretrained, chain):
    told = prepared(phase_cfg, "ettin_phase", chain[1]["pretrain"]["folder"])
    assert told["load_path"] == str(pretrained)
    assert not any(key.startswith(("state/model", "state/optimizers")) for key in told["load_ignore_keys"])
    for part in ("state/timestamp", "state/dataset_state", "state/schedulers", "state/rank_zero_seed", "rng"):
        assert part in told["load_ignore_keys"]
    weights = prepared(phase_cfg, "ettin_phase", pretrained, callbacks__ettin_phase__keep="weights")
    assert weights == {"load_path": str(pretrained), "load_weights_only": True}
    accepted = prepared(phase_cfg, "ettin_phase", pretrained, model__objective="mntp", callbacks__ettin_phase__accept=[
        "objective", "global_rope_theta", "local_rope_theta"])
    assert accepted == told
    remote = prepared(phase_cfg, "ettin_phase", "s3://bucket/run/latest-rank0.pt")
    assert remote["load_path"] == "s3://bucket/run/latest-rank0.pt" and "state/callbacks" not in remote["load_ignore_keys"]


def test_what_has_no_moments_is_refused_unless_weights_are_enough(phase_cfg, chain, folder, tmp_path):
    with pytest.raises(ValueError, match="Hugging Face folder.*no optimizer moments.*ettin_cross.*import.*keep=weights"):
        prepared(phase_cfg, "ettin_phase", folder, model__objective="clm", train_loader__mask_rate=0.0)
    initial = chain[1]["pretrain"]["folder"] / "initial" / "step0.pt"
    dcp.save(torch.load(initial, weights_only=False), checkpoint_id=tmp_path / "step0")
    for source, changes in ((initial, {}), (tmp_path / "step0", {"fsdp_config": {"state_dict_type": "sharded"}})):
        with pytest.raises(ValueError, match="holds no optimizer moments.*keep=weights"):
            prepared(phase_cfg, "ettin_phase", source, **changes)
        told = prepared(phase_cfg, "ettin_phase", source, callbacks__ettin_phase__keep="weights", **changes)
        assert told == {"load_path": str(source), "load_weights_only": True}
    whole = torch.load(checkpoint.newest_complete(chain[1]["pretrain"]["folder"]), weights_only=False)
    dcp.save(whole, checkpoint_id=tmp_path / "whole")
    assert checkpoint.read_head(tmp_path / "whole").has_moments


# ------------------------------------------------------------------ traps without a test elsewhere


def test_token_0_learns_as_every_other():
    """Through the input side alone: the head is left out, so the tied matrix gets no gradient from the output."""
    model = Ettin(ettin("mlm").config)
    ids, ends = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 4], dtype=torch.int32)
    model(ids, torch.arange(4), ends, 4).square().sum().backward()
    gradient = model.trunk.embeddings.tok_embeddings.weight.grad
    assert gradient is not None
    assert gradient[0].abs().max() > 0 and gradient[1].abs().max() > 0 and gradient[3].abs().max() == 0
