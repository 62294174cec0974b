"""What a run may start from, before any work: another run's checkpoint, a folder, or its own checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nano_run
import parity
import pytest
import torch
import torch.distributed.checkpoint as dcp
from nano_run import put
from omegaconf import OmegaConf as om

from ettin_foundry.data import tokenizer
from ettin_foundry.hub.folder import export_model
from ettin_foundry.training import checkpoints, checks, sources
from ettin_foundry.training.run_config import config_text, resolved

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def configs(tokenizer_dir):
    """Of nano: `cross` to an mntp encoder, at the source's theta, and the phase `extend`."""
    made = {}
    for phase, more in (("cross", ["variables.rope_theta=10000.0"]), ("extend", [])):
        files = [f"{nano_run.ROOT}/yamls/{name}.yaml" for name in ("nano", f"phases/{phase}")]
        made[phase] = resolved([*files, "model.vocab_size=512", "variables.source=x", f"tokenizer.name={tokenizer_dir}",
                                *more])
    return made


@pytest.fixture(scope="module")
def encoder(rising_run):
    return checkpoints.newest_complete(rising_run[0])


@pytest.fixture(scope="module")
def decoder(encoder, tmp_path_factory):
    """The same checkpoint, as of a decoder."""
    content, path = torch.load(encoder, weights_only=False), tmp_path_factory.mktemp("decoder") / "ep0-ba7-rank0.pt"
    record = content["state"]["callbacks"]["Clock"]
    record |= {"objective": "clm", "config": {**record["config"], "causal": True, "window_left": 63}}
    torch.save(content, path)
    return path


def exported(objective, tokenizer_dir, out):
    """A Hugging Face folder."""
    model = parity.nano(objective, num_hidden_layers=4, vocab_size=512, max_position_embeddings=64)
    return export_model(model, model.config, tokenizer.load(str(tokenizer_dir)), out, objective=objective)


@pytest.fixture(scope="module")
def folder(tokenizer_dir, tmp_path_factory):
    return exported("clm", tokenizer_dir, tmp_path_factory.mktemp("hf") / "out")


def prepared(cfg, source, changes=()):
    """`prepare_start` of a config whose callback starts from `source`."""
    name = next(name for name in sources.STARTS if name in cfg["callbacks"])
    cfg = put(cfg, {f"callbacks.{name}.source": str(source), "autoresume": False, **dict(changes)})
    cfg["train_loader"]["objective"] = cfg["model"]["objective"]
    checks.check_settings({**cfg, "eval_loader": None, "eval_interval": None, "eval_subset_num_batches": None})
    return sources.prepare_start(cfg)


THETA = {"model.global_rope_theta": 160000.0, "model.local_rope_theta": 160000.0}
CLM = {"model.objective": "clm", "train_loader.mask_rate": 0.0}


@pytest.mark.parametrize(("phase", "changes", "words"), [
    ("cross", THETA, ["global_rope_theta 10000.0 (here 160000.0)", "local_rope_theta 10000.0", "variables.rope_theta",
                      "callbacks.ettin_cross.accept=[global_rope_theta,local_rope_theta]"]),
    ("cross", {**THETA, "callbacks.ettin_cross.accept": ["global_rope_theta"]}, ["local_rope_theta 10000.0 (here 16"]),
    ("cross", {**THETA, "callbacks.ettin_cross.accept": ["global_rope_theta", "local_rope_theta"]}, None),
    ("cross", {}, None), ("cross", {"model.attn_out_dropout": 0.3}, None), ("cross", {"model.objective": "mlm"}, None),
    ("cross", {"model.size": "17m"}, ["hidden_size 128 (here 256)", "num_hidden_layers 4 (here 7)"]),
    ("cross", {"model.vocab_size": 576}, ["vocab_size 512 (here 576)"]),
    ("cross", {"model.local_attention": 64}, ["local_attention 128 (here 64)"]),
    ("cross", CLM, ["trained with clm", "starts with clm", "ettin_phase"]),
    ("extend", CLM, ["trained with mlm", "starts with clm", "ettin_cross"]),
    ("extend", {"model.objective": "mntp"}, ["objective mlm (here mntp)", "callbacks.ettin_phase.accept=[objective]"]),
    ("extend", {"model.objective": [{"until": "1tok", "objective": "clm"}, {"objective": "mlm"}]}, ["starts with clm"]),
    ("extend", {"optimizer": {"name": "decoupled_adamw", "lr": 1e-3}},
     ["ettin_stable_adamw", "decoupled_adamw", "keep=weights"]),
    ("extend", {"callbacks.ettin_phase.accept": []}, ["global_rope_theta 10000.0 (here 160000.0), local_rope_th"])])
def test_a_source_is_taken_or_refused_with_both_values(phase, changes, words, configs, encoder, decoder, folder):
    for source in (decoder, folder) if phase == "cross" else (encoder,):
        if words is None:
            told = {"load_path": str(source), "load_weights_only": True} if source is decoder else {}
            assert prepared(configs[phase], source, changes) == told
        else:
            with pytest.raises(ValueError) as error:
                prepared(configs[phase], source, changes)
            assert all(word in str(error.value) for word in words), error.value


def test_an_encoder_that_does_not_say_how_it_predicts_is_refused_where_that_matters(configs, tokenizer_dir, tmp_path):
    place = exported("mlm", tokenizer_dir, tmp_path / "enc")
    config = json.loads((place / "config.json").read_text())
    del config["ettin_foundry"]["objective"]  # as official encoders
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say whether.*mlm or mntp.*ettin import"):
        prepared(configs["cross"], place)
    prepared(configs["cross"], place, CLM)


def test_a_missing_or_partial_source_is_refused_by_its_key(configs, decoder, tmp_path):
    (tmp_path / "runs").mkdir()
    for half in (tmp_path / "half.pt", tmp_path / "runs" / "ep0-ba5-rank0.pt"):
        half.write_bytes(decoder.read_bytes()[:5000])
    torch.save({"state": {"model": {"model.x": torch.ones(1)}}}, tmp_path / "foreign.pt")
    for name, says in (("none.pt", "none.pt.*no such path"), ("half.pt", "not a whole archive"),
                       ("runs", "no complete checkpoint"),
                        ("foreign.pt", "foreign.pt does not say what model it holds")):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"callbacks.ettin_cross.source: '.*{says}"):
            prepared(configs["cross"], tmp_path / name)


def test_the_host_is_told_to_keep_weights_and_moments_or_weights_alone(configs, encoder):
    told = prepared(configs["extend"], encoder.parent)  # a save folder means its newest checkpoint
    assert told["load_path"] == str(encoder)
    assert not any(key.startswith(("state/model", "state/optimizers")) for key in told["load_ignore_keys"])
    for part in ("state/timestamp", "state/dataset_state", "state/schedulers", "state/rank_zero_seed", "rng"):
        assert part in told["load_ignore_keys"]
    weights = prepared(configs["extend"], encoder, {"callbacks.ettin_phase.keep": "weights"})
    assert weights == {"load_path": str(encoder), "load_weights_only": True}
    accepted = {"model.objective": "mntp", "callbacks.ettin_phase.accept": [
        "objective", "global_rope_theta", "local_rope_theta"]}
    assert prepared(configs["extend"], encoder, accepted) == told
    remote = prepared(configs["extend"], "s3://bucket/run/last.pt")
    assert remote["load_path"] == "s3://bucket/run/last.pt"
    assert "state/callbacks" not in remote["load_ignore_keys"]  # with which the record comes


def test_what_has_no_moments_is_refused_unless_weights_are_enough(configs, encoder, folder, tmp_path):
    with pytest.raises(ValueError, match="Hugging Face folder.*without optimizer moments.*ettin import.*ettin_cross"):
        prepared(configs["extend"], folder, CLM)
    state = torch.load(encoder, weights_only=False)
    del state["state"]["optimizers"]
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="holds no optimizer moments.*keep=weights"):
        prepared(configs["extend"], tmp_path / "bare.pt")
    told = prepared(configs["extend"], tmp_path / "bare.pt", {"callbacks.ettin_phase.keep": "weights"})
    assert told == {"load_path": str(tmp_path / "bare.pt"), "load_weights_only": True}
    dcp.save(torch.load(encoder, weights_only=False), checkpoint_id=tmp_path / "whole")
    with pytest.raises(ValueError, match="a sharded checkpoint.*state_dict_type=sharded"):
        prepared(configs["extend"], tmp_path / "whole")
    told = prepared(configs["extend"], tmp_path / "whole", {"fsdp_config": {"state_dict_type": "sharded"}})
    assert told["load_path"] == str(tmp_path / "whole") and "load_ignore_keys" in told


# ------------------------------------------------------------------ going on


@pytest.fixture(scope="module")
def cfg(data_set):
    """A nano encoder's of the fixtures' data, whose rows are of 64 tokens."""
    return om.to_container(nano_run.configure(data_set, Path("runs")), resolve=True)


def test_the_text_of_a_config_is_what_the_user_wrote_on_any_number_of_processes(cfg, monkeypatch):
    text, texts = config_text(cfg), set()
    for world_size in ("1", "4", "8"):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        texts.add(config_text(resolved([str(nano_run.ROOT / "yamls/nano.yaml")])))
    added = {**cfg, "n_gpus": 8, "device_train_batch_size": 1, "load_path": None}
    assert len(texts) == 1 and config_text({key: added[key] for key in reversed(added)}) == text
    for key, value in (("seed", 22), ("optimizer.lr", 1e-3), ("variables.mask_rate", 0.2), ("save_interval", "5ba")):
        assert config_text(put(cfg, {key: value})) != text, key


def resume(cfg, tmp_path, then, **changes):
    """`prepare_start` of a config whose save folder holds a checkpoint of the config `then`: 3 tokens, 5 batches."""
    record = {**sources.record_of(then), "tokens": 3, "batch": 5, "lineage": (), **changes}
    for key in ("objective_schedule", "tokenizer_fingerprint"):
        record[key] = json.dumps(record[key])  # as Clock writes it
    torch.save({"state": {"callbacks": {"Clock": record}}}, tmp_path / "ep0-ba5-rank0.pt")
    return sources.prepare_start({**cfg, "save_folder": str(tmp_path)})


ACCEPT = "callbacks.ettin_clock.accept"
COUNTS = {"run_name": "other", "seed": 17, "model.global_rope_theta": 160000.0, "model.local_attention": 64,
          "model.objective": "mntp", "train_loader.shuffle_seed": 5, "train_loader.dataset.split": "validation",
          "train_loader.mask_rate": 0.15, "optimizer.lr": 0.001, "optimizer.weight_decay": 0.0,
          "global_train_batch_size": 4, "scheduler.t_warmup": "2ba", "scheduler.name": "one_minus_sqrt",
          "algorithms.gradient_clipping.clipping_threshold": 1.0, "precision": "amp_bf16",
          "train_loader.batch_size_warmup.min_size": 4, "train_subset_num_batches": 3,
          "callbacks.global_lr_scaling.lr_scale": 2.0}
FREE = [("model.window_left", 64), ("max_duration", "4ba"), ("device_train_microbatch_size", 8),
        ("save_interval", "3ba"), ("train_loader.num_workers", 3), ("loggers.wandb.project", "p"),
        ("eval_interval", "3ba"), ("fsdp_config", {}), ("callbacks.lr_monitor", {"a": 1}), ("optimizer.max_lr", 0.002),
        ("optimizer.eps", 0.000001), ("scheduler.t_warmup", "1.0ba"), ("variables.x", 1)]


@pytest.mark.parametrize("key", COUNTS)
def test_a_run_that_learns_otherwise_is_refused_with_both_values_unless_it_is_accepted(key, cfg, tmp_path):
    then = put(cfg, {key: COUNTS[key]})
    if "warmup.min" in key:
        then["train_loader"]["batch_size_warmup"]["tokens"] = 2000
    with pytest.raises(ValueError, match=rf"{key} must be .*{COUNTS[key]}.*{tmp_path}.*another name") as error:
        resume(cfg, tmp_path, then)
    accept = re.search(rf"{ACCEPT}=\[(.*)\]", str(error.value))[1].split(",")  # as the message says
    assert resume(put(cfg, {ACCEPT: accept}), tmp_path, then) == {}


def test_each_difference_is_named_and_what_cannot_change_learning_is_free(cfg, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be 4, got 8; optimizer.lr must be 0.001, got 0.002: "):
        resume(cfg, tmp_path, put(cfg, {"optimizer.lr": 0.001, "global_train_batch_size": 4}))
    for key, old in FREE:
        assert resume(cfg, tmp_path, put(cfg, {key: old})) == {}, key
        assert (tmp_path / "latest-rank0.pt").resolve().name == "ep0-ba5-rank0.pt"  # its link is repaired


@pytest.mark.parametrize(("scheduler", "tokens", "fits"), [
    ({"t_warmup": "0tok", "t_decay": "0tok"}, 3000, True), ({"t_warmup": "0.1dur", "t_decay": "0tok"}, 3000, True),
    ({"t_warmup": "0.5dur", "t_decay": "0tok"}, 1000, False),  # 1,000 of 2,000 would be of 4,000
    ({"t_warmup": "0tok", "t_decay": "500tok"}, 3000, True), ({"t_warmup": "0tok", "t_decay": "500tok"}, 3600, False),
    ({"t_warmup": "0tok", "t_decay": "500tok", "t_max": "4000tok"}, 3600, True),
    ({"name": "one_minus_sqrt", "t_decay": "1dur"}, 1000, False),
    ({"name": "cosine_with_warmup", "t_warmup": "0tok"}, 1000, False)])  # of the host: not known
def test_a_run_may_be_lengthened_where_its_learning_rate_does_not_jump(scheduler, tokens, fits, cfg, tmp_path):
    block = {"name": "warmup_stable_decay", **scheduler}
    then, now = ({**put(cfg, {"max_duration": end}), "scheduler": block} for end in ("4_000tok", "8000tok"))
    if fits:
        assert resume(now, tmp_path, then, tokens=tokens) == {}
    else:
        with pytest.raises(ValueError, match="^max_duration must be '4_000tok', got '8000tok'.*accept=.max_duration"):
            resume(now, tmp_path, then, tokens=tokens)


def test_schedules_may_be_lengthened_at_their_open_end_only(cfg, tmp_path):
    def with_schedule(duration, joint, rate=None):
        objective = [{"until": joint, "objective": "clm"}, {"until": "1dur", "objective": "mlm"}]
        return put(cfg, {"max_duration": duration, "model.objective": objective, "train_loader.objective": objective,
                         "train_loader.mask_rate": rate or [{"until": joint, "rate": 0.3}, {"rate": 0.15}]})

    then = with_schedule("4000tok", "1000tok")
    assert resume(with_schedule("8000tok", "1000tok"), tmp_path, then) == {}
    with pytest.raises(ValueError, match=r"model.objective must be .*until.: 1000.*, got .*until.: 2000"):
        resume(with_schedule("8000tok", "0.25dur"), tmp_path, then)
    slope = [{"from": 0.3, "to": 0.1}]
    with pytest.raises(ValueError, match="train_loader.mask_rate must be"):
        resume(with_schedule("8000tok", "1000tok", slope), tmp_path, with_schedule("4000tok", "1000tok", slope))


def test_another_source_is_refused_and_a_checkpoint_without_record_goes_on(cfg, tmp_path):
    key = "callbacks.ettin_phase.source"
    then = put(cfg, {key: "runs/a"})
    with pytest.raises(ValueError, match="ettin_phase.source must be 'runs/a', got 'runs/b'"):
        resume(put(cfg, {key: "runs/b"}), tmp_path, then)
    assert resume(put(cfg, {key: "runs/c/../a"}), tmp_path, then) == {}  # though it is not here any more
    torch.save({"state": {}}, tmp_path / "ep0-ba5-rank0.pt")
    assert sources.prepare_start({**cfg, "save_folder": str(tmp_path)}) == {}


def test_autoresume_into_another_runs_folder_stops_before_any_work(cfg, data_set, tmp_path):
    """Through the host: the model is not even built."""
    with pytest.raises(ValueError):
        resume(cfg, tmp_path, cfg, run_name="a")
    with pytest.raises(ValueError, match="run_name must be 'a', got 'b': so it was in the checkpoint that this run"):
        nano_run.run(data_set, tmp_path, "run_name=b", f"save_folder={tmp_path}")


# ------------------------------------------------------------------ load_path


def loaded(cfg, path, **changes):
    return sources.prepare_start(put({**cfg, "autoresume": False, "load_path": str(path)}, changes))


def test_a_load_path_is_compared_as_a_source_is(cfg, encoder, decoder, tokenizer_dir, tmp_path):
    cfg, weights = put(cfg, {"tokenizer.name": str(tokenizer_dir), "max_seq_len": 64}), {"load_weights_only": True}
    told = loaded(cfg, encoder, **weights)
    assert told == loaded(cfg, encoder.parent, **weights) and told["load_path"] == str(encoder)
    assert told["load_weights_only"] and told["callbacks"]["ettin_phase"] == {"accept": [], "keep": "weights"}
    from conftest import make_documents

    tokenizer.save(tokenizer.train_bpe(make_documents(300, seed=4), 512), tmp_path / "other")
    for changes, words in (({"model.vocab_size": 576}, "load_path: .* has vocab_size 512 .here 576"),
                           (THETA, rf"global_rope_theta 10000.0 .here 160000.0.*{ACCEPT}=.global_rope_theta,local"),
                           ({"tokenizer.name": str(tmp_path / "other")}, "tokenizer .* with vocab_sha256")):
        for whole in ({}, weights):
            with pytest.raises(ValueError, match=words if whole else "vocab|theta"):
                loaded(cfg, encoder, **whole, **changes)
    with pytest.raises(ValueError, match="trained with clm, and this run starts with mlm; use callbacks.ettin_cross"):
        loaded(cfg, decoder, **weights)
    accepted = {ACCEPT: ["global_rope_theta", "local_rope_theta"]}
    assert loaded(cfg, encoder, **weights, **THETA, **accepted)["load_path"] == str(encoder)


def test_a_load_path_that_is_no_checkpoint_is_refused(cfg, folder):
    for path, says in (("nowhere.pt", "no such path"),
                       (folder, r"ettin import .*out FILE.pt.*load_weights_only")):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            loaded(cfg, path)
