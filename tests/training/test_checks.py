"""The checks: each mistake is refused by name, with what was given, what is allowed and what to do; nothing else is."""

import copy
import dataclasses
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Callback
from omegaconf import OmegaConf as om

from ettin_foundry import REGISTRY
from ettin_foundry.data.loader import build_ettin_loader
from ettin_foundry.model.composer import EttinModel
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.training import checks, keys
from ettin_foundry.training import optimizer as optim

ROOT = Path(__file__).resolve().parents[2]
NANO = om.to_container(om.load(ROOT / "yamls/nano.yaml"), resolve=True)


@pytest.fixture
def cfg():
    return copy.deepcopy(NANO)


@pytest.fixture
def ready(cfg, tmp_path, monkeypatch):
    """nano with every folder that it names, on one process of a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for file in ("tokenizer/x", "train/manifest.json", "validation/manifest.json"):
        (tmp_path / "data/nano" / file).parent.mkdir(parents=True)
        (tmp_path / "data/nano" / file).touch()
    return cfg


def put(cfg, key, value):
    """Sets a dotted key; the value `...` removes it."""
    *blocks, last = key.split(".")
    for block in blocks:
        cfg = cfg.setdefault(block, {})
    if value is ...:
        del cfg[last]
    else:
        cfg[last] = value


def test_valid_keys_mirror_the_signatures():
    def named(function):
        return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}

    fields = {f.name for f in dataclasses.fields(EttinConfig)} - {"causal", "max_position_embeddings"}
    for name, kind in (("ettin", EttinModel),):
        assert set(keys.MODEL_KEYS[name]) == (named(kind) - {"tokenizer"}) | fields
    assert set(keys.MODEL_KEYS) == set(REGISTRY["models"])
    assert set(keys.LOADER_KEYS) == named(build_ettin_loader) - {"tokenizer", "device_batch_size"}
    assert set(keys.BLOCK_KEYS["optimizer"]) == set(REGISTRY["optimizers"])
    assert set(keys.BLOCK_KEYS["optimizer"]["ettin_stable_adamw"]) == (
        named(optim.StableAdamW) - {"params"}) | {"disable_grad", "param_groups"}
    assert set(keys.BLOCK_KEYS["scheduler"]) == set(REGISTRY["schedulers"])
    assert set(keys.BLOCK_KEYS["scheduler"]["warmup_stable_decay"]) == named(optim.WarmupStableDecay)
    assert set(keys.BLOCK_KEYS["scheduler"]["one_minus_sqrt"]) == named(optim.OneMinusSqrt)
    assert set(keys.CALLBACK_KEYS) == {*REGISTRY["callbacks"], *REGISTRY["callbacks_with_config"]}
    for name, target in {**REGISTRY["callbacks"], **REGISTRY["callbacks_with_config"]}.items():
        module, attribute = target.split(":")
        kind = getattr(importlib.import_module(module), attribute)
        takes = set() if kind.__init__ is Callback.__init__ else named(kind) - {"train_config"}
        assert set(keys.CALLBACK_KEYS[name]) == takes, name


@pytest.mark.parametrize("changes, words", [
    # each: what is changed -> parts of the message: key, given, allowed, advice
    ({"max_duration": ...}, ["max_duration: not given", "yamls/"]),
    ({"global_train_batch_size": ...}, ["global_train_batch_size: not given"]),
    ({"model": "ettin", "train_loader.name": "ettin_text"}, ["model: 'ettin'", "block with a name"]),
    ({"modle": 1}, ["modle: unknown key", "variables"]),
    ({"load_path": "???"}, ["load_path: no value given"]),
    ({"train_loader.name": "text"}, ["train_loader.name: 'text'", "ettin_text"]),
    ({"eval_loader.name": "text"}, ["eval_loader.name: 'text'", "ettin_text"]),
    ({"model.name": "mpt_causal_lm"}, ["train_loader.name: 'ettin_text'", "mpt_causal_lm", "name: text"]),
    ({"model.hidden": 3}, ["model.hidden: unknown key", "hidden_size"]),
    ({"train_loader.drop_last": True}, ["train_loader.drop_last: unknown key", "shuffle_window"]),
    ({"eval_loader.drop_last": True}, ["eval_loader.drop_last: unknown key"]),
    ({"eval_loader.batch_size_warmup": None}, ["eval_loader.batch_size_warmup: unknown key"]),
    ({"train_loader.dataset.remotes": "s3://x"}, ["train_loader.dataset.remotes: unknown key", "local, split, remote"]),
    ({"optimizer.foo": 1}, ["optimizer.foo: unknown key", "max_lr"]),
    ({"scheduler.t_cool": "1ba"}, ["scheduler.t_cool: unknown key", "t_warmup, t_decay"]),
    ({"callbacks.ettin_export": {"every": 3}}, ["callbacks.ettin_export.every: unknown key", "interval, folder"]),
    ({"callbacks.ettin_monitor": {"every": 3}}, ["callbacks.ettin_monitor.every: unknown key", "takes no key"]),
    ({"global_train_batch_size": 0}, ["global_train_batch_size: 0", "at least 1"]),
    ({"scheduler.t_warmup": "5ba"}, ["scheduler.t_warmup: '5ba'", "is in tok", "dur"]),
    ({"model.size": "3b"}, ["model.size must be", "400m", "'3b'"]),
    ({"model.objective": "rtd"}, ["model.objective: 'rtd'", "mlm"]),
    ({"model.max_seq_len": 512}, ["model.max_seq_len: 512", "256", "variables.max_seq_len"]),
    ({"train_loader.max_seq_len": 512}, ["train_loader.max_seq_len: 512", "256"]),
    ({"eval_loader.max_seq_len": ...}, ["eval_loader.max_seq_len: None"]),
    ({"max_seq_len": 128}, ["model.max_seq_len: 256", "128"]),
    ({"tokenizer.kwargs.model_max_length": 128}, ["model_max_length: 128", "256"]),
    ({"train_loader.objective": "mntp"}, ["train_loader.objective: 'mntp'", "'mlm'", "variables.objective"]),
    ({"eval_loader.objective": "clm"}, ["eval_loader.mask_rate: 0.3", "objective: clm", "eval_mask_rate"]),
    ({"eval_loader.objective": ["mlm", "mlm"]}, ["eval_loader.objective: ['mlm', 'mlm']", "twice"]),
    ({"eval_loader.objective": ["mlm", "rtd"]}, ["eval_loader.objective must be", "clm, mntp", "'rtd'"]),
    ({"train_loader.mask_rate": 0.0}, ["train_loader.mask_rate: 0.0", "above 0"]),
    ({"train_loader.mask_rate": ...}, ["train_loader.mask_rate", "above 0"]),
    ({"eval_loader.mask_rate": 1.5}, ["eval_loader.mask_rate: 1.5", "up to 1"]),
    ({"model.objective": "clm", "train_loader.objective": "clm", "eval_loader.objective": "clm"},
     ["train_loader.mask_rate: 0.3", "clm", "variables.mask_rate"]),
    ({"train_loader.shuffle": False}, ["train_loader.shuffle: False", "endless"]),
    ({"eval_loader.shuffle": True}, ["eval_loader.shuffle: True", "finite"]),
    ({"eval_loader.shuffle": ...}, ["eval_loader.shuffle: True"]),
    ({"train_loader.dataset": {"split": "train"}}, ["train_loader.dataset", "local"]),
    ({"max_duration": "1ep"}, ["max_duration: '1ep'", "epochs", "tok"]),
    ({"max_duration": 1}, ["max_duration: 1", "epochs"]),
    ({"max_duration": "1dur"}, ["max_duration: '1dur'", "tok and ba"]),
    ({"max_duration": "many"}, ["max_duration: 'many'", "unit"]),
    ({"save_interval": "1ep"}, ["save_interval: '1ep'", "epochs"]),
    ({"save_interval": 1}, ["save_interval: 1", "epochs"]),
    ({"eval_interval": "2ep"}, ["eval_interval: '2ep'", "epochs"]),
    ({"eval_interval": ...}, ["eval_interval: 1", "epochs"]),  # the host's default
    ({"scheduler.t_warmup": "1ep"}, ["scheduler.t_warmup: '1ep'", "epochs"]),
    ({"callbacks.ettin_export": {"interval": "1ep"}}, ["callbacks.ettin_export.interval: '1ep'"]),
    ({"scheduler.t_warmup": "3_000_000tok", "scheduler.t_decay": "1_000_001tok"}, ["scheduler", "4_000_000tok"]),
    ({"scheduler.t_warmup": "0.6dur", "scheduler.t_decay": "0.5dur"}, ["scheduler", "fit into max_duration"]),
    ({"scheduler.alpha_f": 0.02}, ["scheduler.alpha_f: 0.02", "t_decay"]),
    ({"icl_tasks": "x.yaml"}, ["icl_tasks: given", "eval_loader"]),
    ({"eval_gauntlet": "x.yaml"}, ["eval_gauntlet: given", "eval_loader"]),
    ({"only_hf_checkpoint": True}, ["only_hf_checkpoint", "ettin export"]),
    ({"callbacks.hf_checkpointer": {"save_folder": "x"}}, ["callbacks.hf_checkpointer", "ettin_export"]),
    ({"callbacks.generate_callback": {"prompts": []}}, ["callbacks.generate_callback", "ettin_samples"]),
    ({"callbacks.load_checkpoint": {"load_path": "x"}}, ["callbacks.load_checkpoint", "load_path"]),
    ({"train_subset_num_batches": 5}, ["train_subset_num_batches: 5", "max_duration"]),
    ({"eval_loader": ...}, ["eval_interval", "eval_subset_num_batches", "eval_interval=null"]),
    ({"eval_loader": None}, ["eval_interval", "without eval_loader"]),
    ({"save_folder": ..., "autoresume": False}, ["save_interval", "save_overwrite=null"]),
    ({"load_ignore_keys": ["rng"]}, ["load_ignore_keys", "load_path"]),
    ({"load_strict_model_weights": False}, ["load_strict_model_weights", "load_path"]),
    ({"accumulate_train_batch_on_tokens": False}, ["accumulate_train_batch_on_tokens: False", "original.yaml"]),
    ({"callbacks.ettin_cross": {"source": "a"}, "load_path": "b"}, ["load_path: 'b'", "ettin_cross", "'a'"]),
    ({"callbacks.ettin_phase": {"source": "a"}, "load_path": "b"}, ["load_path: 'b'", "ettin_phase", "'a'"]),
    ({"callbacks.ettin_cross": {}}, ["ettin_cross.source", "variables.source"]),
    ({"callbacks.ettin_phase": {"source": ""}}, ["ettin_phase.source", "variables.source"]),
    ({"callbacks.ettin_phase": {"source": "a"}, "callbacks.ettin_cross": {"source": "b"}}, ["'a'", "'b'", "only one"]),
    ({"callbacks.ettin_phase": {"source": "a", "keep": "moments"}}, ["ettin_phase.keep: 'moments'", "weights"]),
    ({"callbacks.ettin_phase": {"source": "a", "accept": "objective"}}, ["accept: 'objective'", "list"]),
    ({"callbacks.ettin_phase": {"source": "a", "accept": ["hidden_size"]}}, ["accept: 'hidden_size'", "cannot be loaded"]),
    ({"callbacks.ettin_cross": {"source": "a", "accept": ["objective"]}}, ["accept: 'objective'", "global_rope_theta"]),
    ({"callbacks.ettin_cross": {"source": "a", "accept": ["theta"]}}, ["accept: 'theta'", "global_rope_theta", "tokenizer"]),
    ({"load_path": "x", "load_ignore_keys": ["state/timestamp"]}, ["load_ignore_keys: ['state/timestamp']", "ettin_phase"]),
    ({"run_name": ...}, ["autoresume", "run_name"]),
    ({"save_folder": ..., "save_interval": ..., "save_overwrite": ...}, ["autoresume", "save_folder"]),
])
def test_a_setting_that_cannot_be_meant_is_refused(cfg, changes, words, monkeypatch):
    monkeypatch.delenv("RUN_NAME", raising=False)
    for key, value in changes.items():
        put(cfg, key, value)
    with pytest.raises(ValueError) as error:
        checks.check_settings(cfg)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    {}, {"eval_loader": None, "eval_interval": None, "eval_subset_num_batches": None},
    {"eval_loader": ..., "eval_interval": 0, "eval_subset_num_batches": -1}, {"eval_interval": 0},
    {"accumulate_train_batch_on_tokens": False, "train_loader.packing": False},
    {"max_duration": "500ba", "scheduler.t_warmup": "0.1dur"}, {"load_path": "x", "load_weights_only": True},
    {"callbacks.ettin_phase": {"source": "a", "accept": ["global_rope_theta", "objective"], "keep": "weights"}},
    {"scheduler.t_decay": "1e5tok", "scheduler.alpha_f": 0.0}, {"algorithms": {"gradient_clipping": {}}},
    {"loggers": {"wandb": {"name": "1ep"}}, "metadata": {"a": "1ep"}},
])
def test_what_can_be_meant_passes(cfg, changes):
    for key, value in changes.items():
        put(cfg, key, value)
    checks.check_settings(cfg)


def test_a_list_of_eval_loaders_is_checked_under_both_of_the_hosts_names(cfg):
    block = cfg.pop("eval_loader") | {"label": "validation"}
    for key in ("eval_loader", "eval_loaders"):
        checks.check_settings({**cfg, key: [block]})
        with pytest.raises(ValueError, match=r"eval_loader\[1\].objective must be .*'rtd'"):
            checks.check_settings({**cfg, key: [block, {**block, "objective": "rtd"}]})


@pytest.mark.parametrize("changes, words", [
    ({"precision": "amp_bf16"}, ["precision: 'amp_bf16'", "fp32"]),
    ({"precision": ...}, ["precision: 'amp_bf16'", "fp32"]),  # the host's default
    ({"device_train_microbatch_size": "auto"}, ["device_train_microbatch_size: 'auto'", "CPU"]),
    ({"device_train_microbatch_size": 33}, ["device_train_microbatch_size: 33", "1 to 32"]),
    ({"train_loader.batch_size_warmup": {"min_size": 8, "tokens": "9000tok"}}, ["microbatch_size: 16", "min_size is 8"]),
    ({"train_loader.batch_size_warmup": {"min_size": 16, "tokens": "2dur"}}, ["tokens: '2dur'", "4,000,000 tokens"]),
    ({"fsdp_config": {"state_dict_type": "full"}}, ["fsdp_config", "one process"]),
    ({"model.init_device": "meta"}, ["model.init_device: 'meta'", "GPU", "init_device=cpu"]),
    ({"tokenizer.name": "data/nano/tokeniser"}, ["tokenizer.name: 'data/nano/tokeniser'", "no such folder"]),
    ({"train_loader.dataset.local": "data/other"}, ["train_loader.dataset", "data/other", "convert.py"]),
    ({"eval_loader.dataset.split": "test"}, ["eval_loader.dataset", "test", "convert.py"]),
])
def test_what_this_machine_cannot_do_is_refused(ready, changes, words):
    checks.check_machine(ready)
    for key, value in changes.items():
        put(ready, key, value)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checks.check_machine(ready)
    assert all(word in str(error.value) for word in words), error.value


def test_a_remote_set_needs_nothing_here_and_its_tokenizer_is_fetched(ready, tmp_path):
    for key in ("train_loader", "eval_loader"):
        put(ready, f"{key}.dataset.local", "cache")
    put(ready, "tokenizer.name", "cache/tokenizer")
    with pytest.raises(FileNotFoundError, match="holds no converted split"):
        checks.check_machine(ready)
    for key in ("train_loader", "eval_loader"):
        put(ready, f"{key}.dataset.remote", str(tmp_path / "data/nano"))
    checks.check_machine(ready)
    assert [path.name for path in (tmp_path / "cache/tokenizer").iterdir()] == ["x"]


def test_batch_sizes_are_held_to_the_number_of_processes(ready, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"global_train_batch_size: 32 given; a multiple of .* \(3\)"):
        checks.check_machine(ready)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="device_train_microbatch_size: 16 given; 1 to 8"):
        checks.check_machine(ready)
    ready.update(device_train_microbatch_size=8, fsdp_config={})
    checks.check_machine(ready)
    put(ready, "train_loader.batch_size_warmup", {"min_size": 16, "tokens": "0.25dur"})
    with pytest.raises(ValueError, match="device_train_microbatch_size must divide the 4 rows .*got 8"):
        checks.check_machine(ready)
    ready.update(device_train_microbatch_size=4)
    assert checks.check_config(ready)["train_loader"]["batch_size_warmup"] == {"min_size": 16, "tokens": 1_000_000}


def test_a_hub_tokenizer_is_not_taken_for_a_folder(ready):
    ready["tokenizer"]["name"] = "jhu-clsp/ettin-encoder-17m"
    checks.check_machine(ready)


def test_the_transform_adds_the_clock_first_and_drops_nulls(ready):
    before = copy.deepcopy(ready) | {"load_path": None}
    after = checks.check_config(copy.deepcopy(before))
    assert next(iter(after["callbacks"])) == "ettin_clock" and "load_path" not in after
    said = json.loads(after["callbacks"].pop("ettin_clock")["run_config"])
    before.pop("load_path")
    default = before["device_eval_batch_size"]  # what the host would fill in, so it may as well be absent
    assert {**said, "device_eval_batch_size": default} == before  # what the files say, before anything was added
    assert after == before
    assert checks.check_config(checks.check_config(copy.deepcopy(ready))) == checks.check_config(copy.deepcopy(ready))


def test_sharding_is_fsdp2_in_the_precision_of_ddp(ready, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ready["fsdp_config"] = {"state_dict_type": "full"}
    with pytest.raises(ValueError, match="fsdp_config: .*FSDP1.*FSDP_VERSION=2"):
        checks.check_machine(ready)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert checks.check_config(ready)["fsdp_config"] == {"mixed_precision": "FULL", "state_dict_type": "full"}


def test_a_run_of_another_model_and_loader_is_left_alone():
    foreign = {"model": {"name": "mpt_causal_lm"}, "train_loader": {"name": "text"}, "max_duration": "1ep", "x": None}
    assert checks.check_config(foreign) is foreign and "callbacks" not in foreign
    assert checks.check_config({}) == {}


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_checkpoint_that_would_run_code_is_refused_before_any_work(ready, tmp_path, capsys):
    torch.save({"state": Evil()}, tmp_path / "evil.pt")
    ready["load_path"] = str(tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="print"):
        checks.check_config(ready)
    assert "executed" not in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(Evil())) is None and "executed" in capsys.readouterr().out  # it does run code
    ready["load_path"] = "nowhere.pt"
    with pytest.raises(FileNotFoundError, match="load_path: 'nowhere.pt'"):
        checks.check_config(ready)


def test_a_run_that_will_resume_needs_no_load_path_and_gets_its_link_mended(ready, tmp_path):
    folder = Path(ready["save_folder"])
    folder.mkdir(parents=True)
    torch.save({"state": {}}, folder / "ep0-ba5-rank0.pt")
    (folder / "ep0-ba9-rank0.pt").write_bytes(b"PK half a file")
    (folder / "latest-rank0.pt").symlink_to("ep0-ba9-rank0.pt")
    ready["load_path"] = "gone.pt"
    checks.check_config(ready)
    assert (folder / "latest-rank0.pt").resolve().name == "ep0-ba5-rank0.pt"


def test_the_module_imports_neither_torch_nor_the_host():
    code = "import sys, ettin_foundry.training.checks; sys.exit(any(m in sys.modules for m in ('torch', 'llmfoundry')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
