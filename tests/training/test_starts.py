"""The resolved config as text and hash; another run's folder, and a run that was changed on the way, are refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import nano_run  # noqa: E402
from omegaconf import OmegaConf as om  # noqa: E402

from ettin_foundry.training import (  # noqa: E402
    checks,  # noqa: E402
    starts,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cfg(data_set):
    return om.to_container(nano_run.configure(data_set, Path("runs"), "model.vocab_size=512"), resolve=True)


def put(cfg, key, value):
    *blocks, last = key.split(".")
    for block in blocks:
        cfg = cfg.setdefault(block, {})
    cfg[last] = value


# ------------------------------------------------------------------ text and hash


def test_the_text_is_sorted_json_and_the_hash_its_sha256(cfg):
    text = starts.config_text(cfg)
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert starts.config_hash(text) == hashlib.sha256(text.encode()).hexdigest()
    backwards = {key: cfg[key] for key in reversed(cfg)}
    assert starts.config_text(backwards) == text


def test_what_the_host_adds_is_not_in_the_text(cfg):
    text = starts.config_text(cfg)
    added = {**cfg, "n_gpus": 8, "device_train_batch_size": 1, "device_train_grad_accum": 1, "load_path": None}
    assert starts.config_text(added) == text
    micro = cfg["device_train_microbatch_size"]
    bare = {key: value for key, value in cfg.items() if key != "device_eval_batch_size"}
    assert starts.config_text({**bare, "device_eval_batch_size": micro}) == starts.config_text(bare)
    assert starts.config_text({**bare, "device_eval_batch_size": micro + 1}) != starts.config_text(bare)
    listed = {"eval_loader": [{"label": "a"}]}
    assert starts.config_text({**bare, **listed}) == starts.config_text({**bare, "eval_loaders": listed["eval_loader"]})


def test_every_setting_is_in_the_hash(cfg):
    text = starts.config_text(cfg)
    for key, value in (("seed", 22), ("optimizer.lr", 1e-3), ("variables.mask_rate", 0.2), ("callbacks.ettin_monitor.x", 1),
                       ("save_interval", "5ba")):
        other = copy.deepcopy(cfg)
        put(other, key, value)
        assert starts.config_text(other) != text, key


# ------------------------------------------------------------------ going on


def record_of(cfg, **changes):
    """What Clock writes for a run of this config, made here by hand."""
    model = checks.model_config(cfg)
    objective = cfg["model"]["objective"]
    schedule = json.dumps(objective if isinstance(objective, str) else checks.objective_schedule(cfg).plain())
    return {"run_name": cfg["run_name"], "objective": objective if isinstance(objective, str) else "mlm",
            "objective_schedule": schedule, "config": dataclasses.asdict(model), "run_config": starts.config_text(cfg),
            "tokens": 3, "batch": 5, "lineage": (), **changes}


def resume(cfg, tmp_path, record, data=None):
    """`guard` of a config whose save folder holds a checkpoint with that record."""
    cfg = {**copy.deepcopy(cfg), "save_folder": str(tmp_path)}
    state = {"callbacks": {"Clock": record}, "dataset_state": {"train": data}}
    torch.save({"state": state}, tmp_path / "ep0-ba5-rank0.pt")
    return starts.guard(cfg)


def test_the_same_run_goes_on_and_its_link_is_mended(cfg, tmp_path):
    from ettin_foundry.data.mixture import open_split

    fingerprint = open_split(Path(cfg["train_loader"]["dataset"]["local"]) / "train").fingerprint
    assert resume(cfg, tmp_path, record_of(cfg), {"rows": 40, "fingerprint": fingerprint}) == {}
    assert (tmp_path / "latest-rank0.pt").resolve().name == "ep0-ba5-rank0.pt"


@pytest.mark.parametrize(("key", "old", "words"), [
    ("run_name", "other", ["run_name: 'nano-mlm-pretrain' in the config, 'other' in the checkpoint", "another run"]),
    ("model.global_rope_theta", 160000.0, ["model.global_rope_theta: 10000.0 in the config, 160000.0", "something else"]),
    ("model.window_left", 64, None),  # what an encoder has anyway
    ("model.local_attention", 64, ["model.local_attention: 128 in the config, 64 in"]),
    ("model.objective", "mntp", ["model.objective: 'mlm' in the config, 'mntp' in", "ettin_cross.source"]),
    ("train_loader.mask_rate", 0.15, ["train_loader.mask_rate: 0.3 in the config, 0.15 in"]),
    ("optimizer.lr", 0.001, ["optimizer.lr: 0.003 in the config, 0.001 in"]),
    ("optimizer.weight_decay", 0.0, ["optimizer.weight_decay: 0.0003 in the config, 0.0 in"]),
    ("optimizer.betas", [0.9, 0.95], ["optimizer.betas: [0.9, 0.98] in the config, [0.9, 0.95] in"]),
    ("seed", 17, ["seed: 21 in the config, 17 in"]),
    ("train_loader.shuffle_seed", 5, ["train_loader.shuffle_seed: 21 in the config, 5 in"]),
    ("train_loader.dataset.split", "validation", ["train_loader.dataset.split: 'train' in the config, 'validation'"]),
    ("max_duration", "4ba", None), ("save_interval", "9ba", None), ("device_train_microbatch_size", 8, None),
])
def test_a_run_that_was_another_or_was_changed_is_refused_with_both_values(key, old, words, cfg, tmp_path):
    then = copy.deepcopy(cfg)
    put(then, key, old)
    if words is None:
        assert resume(cfg, tmp_path, record_of(then)) == {}
        return
    with pytest.raises(ValueError) as error:
        resume(cfg, tmp_path, record_of(then))
    assert all(word in str(error.value) for word in [*words, str(tmp_path)]), error.value


def test_schedules_may_be_lengthened_at_their_open_end_only(cfg, tmp_path):
    def with_schedule(duration, joint):
        other = copy.deepcopy(cfg)
        other["max_duration"] = duration
        for block in ("model", "train_loader"):
            other[block]["objective"] = [{"until": joint, "objective": "clm"}, {"until": "1dur", "objective": "mlm"}]
        other["train_loader"]["mask_rate"] = [{"until": joint, "rate": 0.3}, {"rate": 0.15}]
        return other

    then = with_schedule("4000tok", "1000tok")
    assert resume(with_schedule("8000tok", "1000tok"), tmp_path, record_of(then)) == {}
    with pytest.raises(ValueError, match=r"model.objective: .*'until': 2000.*in the config, .*'until': 1000"):
        resume(with_schedule("8000tok", "0.25dur"), tmp_path, record_of(then))
    slope = with_schedule("4000tok", "1000tok")
    slope["train_loader"]["mask_rate"] = [{"from": 0.3, "to": 0.1}]
    longer = copy.deepcopy(slope) | {"max_duration": "8000tok"}
    with pytest.raises(ValueError, match=r"train_loader.mask_rate: .*8000.*in the config, .*4000"):
        resume(longer, tmp_path, record_of(slope))


def test_other_data_and_another_source_are_refused(cfg, tmp_path):
    with pytest.raises(ValueError, match=r"train_loader.dataset: '.*train' with fingerprint \w{64} given, 0123 in"):
        resume(cfg, tmp_path, record_of(cfg), {"rows": 40, "fingerprint": "0123"})
    then, now = copy.deepcopy(cfg), copy.deepcopy(cfg)
    put(then, "callbacks.ettin_phase.source", "runs/a")
    put(now, "callbacks.ettin_phase.source", "runs/b")
    with pytest.raises(ValueError, match="ettin_phase.source: 'runs/b' in the config, 'runs/a' in.*no effect"):
        resume(now, tmp_path, record_of(then))
    put(now, "callbacks.ettin_phase.source", "runs/c/../a")
    assert resume(now, tmp_path, record_of(then)) == {}  # though it is not here any more


def test_a_checkpoint_without_record_goes_on(cfg, tmp_path):
    assert resume(cfg, tmp_path, {}) == {}


def test_autoresume_into_another_runs_folder_stops_before_any_work(cfg, data_set, tmp_path):
    """Through the host: the model is not even built."""
    torch.save({"state": {"callbacks": {"Clock": record_of(cfg, run_name="a")}}}, tmp_path / "ep0-ba5-rank0.pt")
    with pytest.raises(ValueError, match="run_name: 'b' in the config, 'a' in the checkpoint that this run resumes"):
        nano_run.run(data_set, tmp_path, "model.vocab_size=512", "run_name=b", f"save_folder={tmp_path}")


def test_the_module_imports_neither_torch_nor_the_host():
    code = "import sys, ettin_foundry.training.starts; sys.exit(any(m in sys.modules for m in ('torch', 'llmfoundry', 'numpy')))"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
