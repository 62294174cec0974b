"""The linter: pairs of ours are clean, phases follow each other, and every changed key is found."""

import contextlib
import itertools
import json
import re
import shutil

import pytest
import test_recipes
from nano_run import ROOT, put

from ettin_foundry.model.config import SIZES
from ettin_foundry.tools.pair import check_phase, lint_pair
from ettin_foundry.training import run_config

NANO = run_config.resolved([str(ROOT / "yamls/nano.yaml")])
PHASES = ("pretrain", "extend", "decay", "cross")


def verdicts(report):
    return {d.key: d.verdict for d in report.differences}


# ------------------------------------------------------------------ our recipes

# what a pair's members may differ in, written out; every other key of a recipe is held equal by the test below
DEMANDED = {"model.objective", "train_loader.objective", "eval_loader.objective", "train_loader.mask_rate",
            "eval_loader.mask_rate", "model.window_left"}
NAMES = {"run_name", "save_folder"}
# keys of our recipes that cannot change what is learnt
FREE = re.compile(r"device_train_microbatch_size|.*_loader.num_workers|eval_interval|progress_bar|.*log.*|autoresume|"
                  r"save_(interval|overwrite)|callbacks\.ettin_(phase|cross)\.(accept|source)|callbacks\.(speed_monitor|"
                  r"lr_monitor|runtime_estimator|scheduled_gc|ettin_monitor|ettin_steps)(\..*)?")


@pytest.mark.parametrize(("size", "overlays"), [
    *((size, ()) for size in SIZES if size != "nano"), ("400m", ("original",))])
def test_every_pair_of_recipes_is_fair_and_phases_follow_each_other(size, overlays):
    runs = {(side, phase): test_recipes.config_of({"side": side, "size": size, "phase": phase}, *overlays)
            for side in ("enc", "dec") for phase in PHASES}
    for phase in PHASES:
        report = lint_pair(runs["enc", phase], runs["dec", phase])
        found = verdicts(report)
        assert report.fair and found == {**dict.fromkeys(found, "objective"), **dict.fromkeys(NAMES, "harmless")}
        assert {"model.objective", "train_loader.mask_rate"} <= set(found) - NAMES <= DEMANDED, str(report)
    for side, other in (("enc", "dec"), ("dec", "enc")):
        for before, phase in itertools.pairwise(PHASES):
            check_phase(before, runs[side, before], runs[other if phase == "cross" else side, phase])


def another(key, value):
    """A value of the same kind that means something else; of an empty block, none."""
    if value in ({}, []):
        return ...
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 if value else 1
    if isinstance(value, list):
        return [another(key, item) for item in value]
    if key == "model.size":
        return "32m" if value != "32m" else "17m"
    if key.endswith("objective"):
        return "mntp" if value != "mntp" else "mlm"
    if match := re.fullmatch(r"([0-9_.]+)(tok|ba|dur)", value):
        return "0.5dur" if match[2] == "dur" else f"{float(match[1]) * 3 or 7:.0f}{match[2]}"
    return f"{value}-x"


@pytest.mark.parametrize("phase", PHASES)
def test_changing_any_key_of_a_recipe_in_one_member_is_unfair_unless_it_is_declared(phase):
    enc, dec = (test_recipes.config_of({"side": side, "size": "400m", "phase": phase}) for side in ("enc", "dec"))
    declared, unfair = set(), set()
    for key in dict.fromkeys(key.partition("[")[0] for key, _ in run_config.walk(dec)):
        if not key.startswith("variables."):
            found = lint_pair(enc, put(dec, {key: another(key, run_config.value_at(dec, key))}))
            (declared if found.fair else unfair).add(key)
    assert {key for key in declared | unfair if FREE.fullmatch(key)} == declared - DEMANDED - NAMES
    assert {"seed", "optimizer.lr", "optimizer.betas", "scheduler.name", "model.size", "max_duration", "precision",
            "train_loader.dataset.local", "train_loader.shuffle_seed", "max_seq_len", "global_train_batch_size",
            "model.local_rope_theta", "device_eval_batch_size",  # so many batches are validated on
            "accumulate_train_batch_on_tokens", "tokenizer.name"} <= unfair


# ------------------------------------------------------------------ rules

# two spellings of one thing
SAME = [
    ({"max_duration": "4_000_000tok"}, {"max_duration": "4e6tok"}),
    ({"scheduler.t_warmup": "200_000tok"}, {"scheduler.t_warmup": "0.05dur"}),
    ({"scheduler.t_decay": "1_000_000tok"},
     {"scheduler.t_decay": "0.25dur", "scheduler.alpha_f": 0, "scheduler.t_max": "1dur"}),
    ({"model.window_left": 64}, {"model.local_attention": 128}),
    ({"optimizer.max_lr": 2e-3}, {"optimizer.betas": ..., "optimizer.eps": ...}),
    ({"train_loader.shuffle_window": 16, "train_loader.shuffle_seed": 21}, {"train_loader.shuffle_seed": ...}),
    ({"train_loader.mask_rate": [{"until": "2_000_000tok", "rate": 0.3}, {"rate": 0.1}]},
     {"train_loader.mask_rate": [{"until": "0.5dur", "rate": 0.3}, {"until": "1dur", "rate": 0.1}]}),
    ({"callbacks.ettin_phase": {"source": "x"}}, {"callbacks.ettin_phase": {"source": "x", "keep": "all"}}),
    ({"eval_loader": [NANO["eval_loader"]]}, {}),
]


@pytest.mark.parametrize("a, b, expected", [
    *((a, b, {}) for a, b in SAME),
    # mask rates: of a clm member there is none, of two that mask they are equal
    ({}, {"model.objective": "mntp", "train_loader.objective": "mntp", "train_loader.mask_rate": 0.15},
     {"model.objective": "objective", "train_loader.objective": "objective", "train_loader.mask_rate": "unfair"}),
    # a window that is neither 64 and 63 nor equal
    ({}, {"model.local_attention": 64}, {"model.local_attention": "unfair", "model.window_left": "unfair"}),
    ({}, {"model.objective": "clm", "train_loader.objective": "clm", "train_loader.mask_rate": 0.0,
          "model.window_left": 40},
     {"model.objective": "objective", "train_loader.objective": "objective", "train_loader.mask_rate": "objective",
      "model.window_left": "unfair"}),
    # microbatches, as long as targets weigh the same
    ({}, {"device_train_microbatch_size": 2}, {"device_train_microbatch_size": "harmless"}),
    # of so many batches, more rows are validated on; of the whole split the same
    ({}, {"device_eval_batch_size": 8}, {"device_eval_batch_size": "unfair"}),
    ({"eval_subset_num_batches": -1}, {"eval_subset_num_batches": -1, "device_eval_batch_size": 8},
     {"device_eval_batch_size": "harmless"}),
    ({"callbacks.ettin_phase": {"source": "a"}}, {"callbacks.ettin_phase": {"source": "b", "keep": "weights"}},
     {"callbacks.ettin_phase.source": "harmless", "callbacks.ettin_phase.keep": "unfair"}),
    ({"callbacks.ettin_phase": {"source": "a"}}, {},
     {"callbacks.ettin_phase.source": "unfair", "callbacks.ettin_phase.keep": "unfair"}),
    # sharding moves tensors, precision changes them
    ({}, {"fsdp_config": {"activation_checkpointing": True}}, {"fsdp_config.activation_checkpointing": "harmless"}),
    ({}, {"fsdp_config": {"mixed_precision": "PURE"}}, {"fsdp_config.mixed_precision": "unfair"}),
    ({}, {"eval_loader.objective": ["mlm", "clm"]}, {"eval_loader.objective": "unfair"}),
    ({}, {"eval_loader": None}, {f"eval_loader.{key}": verdict for verdict, keys in (
        ("unfair", "fixed_shapes mask_rate max_seq_len name objective packing shuffle shuffle_seed"),
        ("harmless", "num_workers persistent_workers pin_memory timeout")) for key in keys.split()}),
    ({"seed": 1}, {"seed": True}, {"seed": "unfair"}),  # equal in Python only
    # keys that no rule names
    ({}, {"new": 1, "train_loader.new": 1, "callbacks.new.a": 1, "algorithms": {"new": {}}},
     {"new": "unfair", "train_loader.new": "unfair", "callbacks.new.a": "unfair", "algorithms.new": "unfair"}),
], ids=str)
def test_a_difference_has_the_verdict_of_its_rule(a, b, expected):
    report = lint_pair(put(NANO, a), put(NANO, b))
    assert verdicts(report) == expected, str(report)
    assert report.fair is ("unfair" not in expected.values())


def test_sets_are_compared_by_content_where_they_are_here(data_set, tmp_path):
    def compared(folder):
        one, other = (put(NANO, {"train_loader.dataset.local": str(each), "eval_loader.dataset.local": str(each),
                                 "tokenizer.name": f"{each}/tokenizer"}) for each in (data_set, folder))
        return verdicts(lint_pair(one, other))

    shutil.copytree(data_set, tmp_path / "twin", ignore=shutil.ignore_patterns("*.mds*"))
    loaders = ["train_loader.dataset", "eval_loader.dataset"]
    assert compared(tmp_path / "twin") == dict.fromkeys(loaders, "harmless")
    manifest = json.loads((tmp_path / "twin/train/manifest.json").read_text())
    manifest["shards"][0]["raw"]["xxh64"] = "0" * 16
    (tmp_path / "twin/train/manifest.json").write_text(json.dumps(manifest))
    assert compared(tmp_path / "twin") == {"train_loader.dataset": "unfair", "eval_loader.dataset": "harmless"}
    assert compared(tmp_path / "none") == dict.fromkeys(loaders, "unfair")


SECOND = {"callbacks.ettin_phase": {"source": "x"}, "max_duration": "1_000_000tok"}


@pytest.mark.parametrize("change, words", [
    ({"callbacks.ettin_phase": ...}, "callbacks must have one of ettin_phase, ettin_cross after first"),
    ({"model.local_rope_theta": 160000}, "first has local_rope_theta 10000.0 .here 160000"),
    ({"model.local_rope_theta": 160000, "callbacks.ettin_phase.accept": ["local_rope_theta"]}, None),
    ({"train_loader.dataset.local": "data/b", "tokenizer.name": "data/b/tokenizer"}, None)], ids=str)  # not here
def test_a_phase_is_refused_as_it_would_refuse_at_its_start(change, words):
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        check_phase("first", NANO, put(NANO, {**SECOND, **change}))


def test_the_command_takes_joined_files_and_keys_and_its_exit_code_is_the_verdict(ettin):
    def run(*arguments):
        code, out, _ = ettin("lint", *arguments)
        return code, out.splitlines()[-1]

    nano = f"{ROOT}/yamls/nano.yaml"
    decoder = f"{nano}+variables.objective=clm+variables.mask_rate=0.0"
    code, verdict = run(nano, decoder)
    assert code == 0 and verdict.startswith("fair pair: ")
    assert run(nano, f"{decoder}+optimizer.eps=1e+5", "seed=3") == (1, "unfair pair, because of optimizer.eps")
