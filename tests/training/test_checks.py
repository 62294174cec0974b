"""The checks: each mistake is refused by name, with what is allowed, what was given and what to do; nothing else is."""

import copy
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nano_run import put

from ettin_foundry import REGISTRY
from ettin_foundry.training import checks, run_config
from ettin_foundry.training.run_config import resolved

ROOT = Path(__file__).resolve().parents[2]
NANO = resolved([str(ROOT / "yamls/nano.yaml"), "variables.global_batch=32", "device_train_microbatch_size=16",
                 "device_eval_batch_size=16"])


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """nano with every folder that it names, on one process of a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for file in ("tokenizer/x", "train/manifest.json", "validation/manifest.json"):
        (tmp_path / "data/nano" / file).parent.mkdir(parents=True)
        (tmp_path / "data/nano" / file).touch()
    return copy.deepcopy(NANO)


def test_parameters_read_from_source_are_those_of_the_signatures():
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig

    assert run_config.HOST_KEYS == TRAIN_CONFIG_KEYS
    assert {key: getattr(TrainConfig, key) for key in run_config.HOST_DEFAULTS} == run_config.HOST_DEFAULTS
    host = {"self", "tokenizer", "device_batch_size", "params", "train_config", "state", "kwargs", "args"}
    for registry in ("models", "dataloaders", "optimizers", "schedulers", "callbacks", "callbacks_with_config"):
        for name, target in REGISTRY[registry].items():
            module, attribute = target.split(":")
            signature = inspect.signature(getattr(importlib.import_module(module), attribute)).parameters.values()
            taken = {p.name: None if p.default is p.empty else p.default for p in signature
                     if p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL and p.name not in host}
            found = {key: value for key, value in run_config.PARAMETERS[name].items() if key in taken}
            assert found == {k: list(v) if isinstance(v, tuple) else v for k, v in taken.items()}, name


OBJECTIVE = ("model.objective", "train_loader.objective", "eval_loader.objective")


@pytest.mark.parametrize("changes, words", [
    ({"max_duration": ...}, ["max_duration must be given", "yamls/"]),
    ({"model": "ettin", "train_loader.name": "ettin_text"}, ["model must be a block with a name"]),
    ({"run_name": "nano-[{'until': 1}]"}, ["run_name", "brackets", "variables.label"]),
    ({"train_loader.name": "text"}, ["train_loader.name must be ettin_text", "'text'"]),
    ({"model.name": "mpt_causal_lm"}, ["train_loader.name must be", "text with others", "mpt_causal_lm"]),
    ({"train_loader.microbatch_size": 3}, ["train_loader.microbatch_size: unknown key"]),  # it follows from others
    ({"eval_loader.batch_size_warmup": None}, ["eval_loader.batch_size_warmup: unknown key", "label"]),
    ({"train_loader.dataset.remotes": "s3://x"}, ["train_loader.dataset.remotes: unknown key", "did you mean remote?"]),
    # lengths, objectives, loaders
    ({"model.max_seq_len": 512}, ["model.max_seq_len must be 256", "512", "variables.max_seq_len"]),
    ({"train_loader.objective": "mntp"}, ["train_loader.objective must be 'mlm'", "'mntp'", "variables.objective"]),
    ({"eval_loader.objective": ["mlm", "mlm"]}, ["eval_loader.objective", "['mlm', 'mlm']", "once"]),
    *(({"eval_loader": ..., key: [NANO["eval_loader"], {**NANO["eval_loader"], "objective": "rtd"}]},
       ["eval_loader[1].objective", "'rtd'"]) for key in ("eval_loader", "eval_loaders")),  # both are the host's names
    ({"eval_loader.mask_rate": [{"rate": 0.3}]}, ["eval_loader.mask_rate must be one rate"]),
    (dict.fromkeys(OBJECTIVE, "clm"), ["train_loader.mask_rate", "clm", "variables.mask_rate"]),
    ({"eval_loader.shuffle": ...}, ["eval_loader.shuffle must be false", "True"]),
    ({"train_loader.dataset": {"split": "train"}}, ["train_loader.dataset", "local"]),
    ({"train_loader.dataset": {"local": [], "split": "train"}}, ["train_loader.dataset must be texts", "[]"]),
    # times and amounts
    ({"max_duration": "1ep"}, ["max_duration must be", "'1ep'", "tok"]),
    ({"eval_interval": ...}, ["eval_interval", "got 1", "epoch"]),  # the host's default
    *(({key: "0.1dur"}, [f"{key} must be in tok or ba", "0.1dur"]) for key in ("save_interval", "eval_interval")),
    ({"scheduler.t_warmup": "5ba"}, ["scheduler.t_warmup must be in tok or dur", "'5ba'"]),
    ({"scheduler.t_warmup": "3_000_000tok", "scheduler.t_decay": "1_000_001tok"}, ["scheduler", "4_000_000tok"]),
    ({"scheduler.alpha_f": 0.02}, ["scheduler.alpha_f", "0.02", "t_decay"]),
    ({"precision": "amp_fp16"}, ["precision must be amp_bf16 or fp32", "underflows"]),
    ({"global_train_batch_size": 0}, ["global_train_batch_size", "at least 1", "got 0"]),
    ({"accumulate_train_batch_on_tokens": False}, ["accumulate_train_batch_on_tokens", "original.yaml"]),
    # what would do nothing, or cannot act on our model
    ({"icl_tasks": "x.yaml"}, ["icl_tasks: given", "eval_loader"]), ({"compile_config": {}}, ["model.compile"]),
    ({"eval_loader": ...}, ["eval_interval", "without eval_loader", "eval_interval=null"]),
    # where a run starts
    ({"callbacks.ettin_cross": {"source": "a"}, "load_path": "b"}, ["load_path must", "'b'", "ettin_cross.source=a"]),
    ({"callbacks.ettin_phase": {"source": ""}}, ["ettin_phase.source", "variables.source"]),
    ({"callbacks.ettin_phase": {"source": "a"}, "callbacks.ettin_cross": {"source": "b"}},
     ["source=a", "'b'", "only one"]),
    ({"callbacks.ettin_cross": {"source": "a", "accept": "tokenizer"}}, ["accept must be a list", "tokenizer"]),
    ({"load_path": "x", "load_ignore_keys": ["state/timestamp"]}, ["load_ignore_keys", "ettin_phase"]),
    ({"optimizer.param_groups": [{"lr": 1}]}, ["optimizer.param_groups: unknown key", "disable_grad"]),
    ({"callbacks.ettin_clock": {"accept": "optimizer.lr"}}, ["ettin_clock.accept must be a list", "'optimizer.lr'"]),
    ({"save_latest_filename": "x"}, ["save_latest_filename", "latest-rank0.pt"]),
    ({"save_filename": "ba{batch}.pt.gz"}, ["save_filename must be a name that ends in .pt", "'ba{batch}.pt.gz'"]),])
def test_a_setting_that_cannot_be_meant_is_refused(changes, words):
    with pytest.raises(ValueError) as error:
        checks.check_settings(put(NANO, changes))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_what_can_be_meant_passes():
    for changes in (
            {}, {"eval_loader": None, "eval_interval": None, "eval_subset_num_batches": None}, {"eval_interval": 0},
            {"eval_loader": ..., "eval_interval": 0, "eval_subset_num_batches": -1},
            {"accumulate_train_batch_on_tokens": False, "train_loader.packing": False},
            {"max_duration": "500ba", "scheduler.t_warmup": "0.1dur"}, {"load_path": "x", "load_weights_only": True},
            {"callbacks.ettin_phase": {"source": "a", "accept": ["global_rope_theta", "objective"], "keep": "weights"}},
            {"scheduler.t_decay": "1e5tok", "scheduler.alpha_f": 0.0}, {"algorithms": {"gradient_clipping": {}}},
            {"max_duration": "8ba", "scheduler.t_decay": "1e5tok"}, {"variables": {"objective": "mdlm"}}):
        checks.check_settings(put(NANO, changes))


@pytest.mark.parametrize("changes, words", [
    ({"precision": ...}, ["precision must be fp32", "'amp_bf16'"]),  # the host's default
    ({"device_train_microbatch_size": "auto"}, ["device_train_microbatch_size", "'auto'", "GPU"]),
    ({"device_train_microbatch_size": 33}, ["device_train_microbatch_size must be 1 to 32", "33"]),
    ({"train_loader.batch_size_warmup": {"min_size": 8, "tokens": "9000tok"}}, ["microbatch_size", "min_size"]),
    ({"fsdp_config": {"state_dict_type": "full"}}, ["fsdp_config", "several processes"]),
    ({"model.init_device": "meta"}, ["model.init_device", "'meta'", "GPU"]),
    ({"tokenizer.name": "data/nano/tokeniser"}, ["tokenizer.name", "data/nano/tokeniser", "no such folder"]),
    ({"train_loader.dataset.local": "data/other"}, ["train_loader.dataset", "data/other", "ettin convert"]),
    ({"eval_loader.dataset.split": "test"}, ["eval_loader.dataset", "test", "eval_loader=null"]),])
def test_what_this_machine_cannot_do_is_refused(ready, changes, words):
    checks.check_machine(ready)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checks.check_machine(put(ready, changes))
    assert all(word in str(error.value) for word in words), error.value


def test_a_remote_dataset_needs_nothing_here_and_its_tokenizer_is_fetched(ready, tmp_path):
    changes = {"tokenizer.name": "cache/tokenizer"}
    for key in ("train_loader", "eval_loader"):
        changes |= {f"{key}.dataset.local": "cache", f"{key}.dataset.remote": str(tmp_path / "data/nano")}
    checks.check_machine(put(ready, changes))
    assert [path.name for path in (tmp_path / "cache/tokenizer").iterdir()] == ["x"]


def test_batch_sizes_and_sharding_are_held_to_the_number_of_processes(ready, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="device_train_microbatch_size must be 1 to 8"):
        checks.check_machine(ready)
    ready = put(ready, {"device_train_microbatch_size": 4, "fsdp_config": {"state_dict_type": "full"},
                        "train_loader.batch_size_warmup": {"min_size": 16, "tokens": "0.25dur"}})
    with pytest.raises(ValueError, match="fsdp_config.*FSDP1.*FSDP_VERSION=2"):
        checks.check_machine(ready)
    monkeypatch.setenv("FSDP_VERSION", "2")
    made = checks.check_config(ready)
    assert made["train_loader"]["batch_size_warmup"] == {"min_size": 16, "tokens": 1_000_000}
    assert made["fsdp_config"] == {"mixed_precision": "FULL", "state_dict_type": "full"}  # the precision of DDP


def test_the_transform_adds_the_clock_drops_nulls_and_resolves_schedules(ready):
    schedule = [{"until": "0.5dur", "objective": "clm"}, {"objective": "mlm"}]
    ready = put(ready, {"model.objective": schedule, "train_loader.objective": schedule,
                        "eval_loader.objective": ["mlm", "clm"], "load_path": None})
    before = copy.deepcopy(ready)
    made = checks.check_config(ready)
    assert ready == before and "load_path" not in made and next(iter(made["callbacks"])) == "ettin_clock"
    assert made["model"]["objective"] == made["train_loader"]["objective"] == [
        {"until": 2_000_000, "objective": "clm"}, {"until": 4_000_000, "objective": "mlm"}]
    assert [(block["objective"], block["label"], "mask_rate" in block) for block in made["eval_loaders"]] == [
        ("mlm", "mlm", True), ("clm", "clm", False)]
    assert [block["microbatch_size"] for block in (made["train_loader"], *made["eval_loaders"])] == [16] * 3
    auto = put(ready, {"device_train_microbatch_size": "auto", "model.compile": "blocks"})
    checks.split_in_workers(auto)  # compiled code wants fixed shapes, whoever makes the microbatches
    assert (auto["train_loader"]["microbatch_size"], auto["train_loader"]["fixed_shapes"]) == (None, True)


def test_a_run_of_another_model_and_loader_is_left_alone():
    foreign = {"model": {"name": "mpt_causal_lm"}, "train_loader": {"name": "text"}, "max_duration": "1ep", "x": None}
    assert checks.check_config(foreign) is foreign and "callbacks" not in foreign


def test_the_module_imports_neither_torch_nor_the_host():
    code = "import sys, ettin_foundry.training.checks; sys.exit(any(m in sys.modules for m in ('torch', 'llmfoundry')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
