"""The recipes: each one parses, resolves, passes the checks and builds, and says what the original's files say.

`original_recipe.json` holds the numbers of the reference's 48 training files. Where a recipe differs, `DEVIATIONS` says
from what and why; nothing else may differ, and a deviation that no longer exists fails too.
"""

import functools
import json
import operator
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf as om

from ettin_foundry.model.composer import EttinModel
from ettin_foundry.training import checks, run_config

ROOT = Path(__file__).resolve().parents[2]
ORIGINAL = json.loads((ROOT / "tests/original_recipe.json").read_text())
RECIPES = sorted((ROOT / "yamls").glob("*.yaml"))
NANO = ROOT / "yamls/nano.yaml"
ETTIN = [path for path in RECIPES if path != NANO]
LONG = ("extend", "decay", "cross")
ALL = ("pretrain", *LONG)
stem = operator.attrgetter("stem")
of_each_run = pytest.mark.parametrize("run", ORIGINAL["runs"], ids=lambda r: f"{r['side']}-{r['size']}-{r['phase']}")

# fact -> (phases in which it differs, why); one line for each fact that is not the original's
DEVIATIONS = {
    "sequence_packing": (ALL, "rows are packed full with documents isolated, instead of 40% padding"),
    "global_train_batch_size": (ALL, "full rows: 2,816 hold the real tokens of the original's 4,608 part-filled ones"),
    "device_train_microbatch_size": (ALL, "follows from full rows; see the rule's own test"),
    "max_seq_len": (LONG, "8,192 positions are what the model is said to serve; 7,999 comes from chunking at 8,000"),
    "local_rope_theta": (("extend", "decay"), "160,000 for both of a pair; the original's drifted by accident"),
    "alpha_f": (("pretrain",), "the original sets 0.02 with t_decay 0, where it does nothing"),
    "window_left": (ALL, "decoders see 63 tokens back, as transformers computes it; encoders are equal"),
    "accumulate_train_batch_on_tokens": (ALL, "each target weighs the same; the original averaged microbatches"),
    "has_eval_loader": (("cross",), "validation of its own objective, as in the other phases"),
    "mlm_probability_eval": (("cross",), "follows from has_eval_loader"),
    "autoresume": (("cross",), "a killed run continues in every phase"),
    "eval_interval": (ALL, "at each checkpoint; the original's 10^32 batches left one evaluation, at the end")}
# facts that stay deviations under phases/original.yaml, which is about batches, not about those
STAY = {"local_rope_theta", "alpha_f", "has_eval_loader", "mlm_probability_eval", "autoresume", "eval_interval"}


@functools.cache  # parsing YAML is what these tests spend their time on; nobody changes the result
def resolved(path, *phases, args=()):
    files = [str(path), *(str(ROOT / f"yamls/phases/{phase}.yaml") for phase in phases)]
    given = ["variables.source=x.pt" for phase in phases if phase in LONG]
    return run_config.resolved([*files, *given, *args])


def config_of(run, *overlays):
    path = ROOT / f"yamls/ettin-{run['side']}-{run['size']}.yaml"
    return resolved(path, *(() if run["phase"] == "pretrain" else (run["phase"],)), *overlays)


def tokens(value, total=None):
    number, unit = run_config.parse_time("test", value)
    return round(number * total) if unit == "dur" else int(number)


def facts_of(cfg):
    """A config in the words of original_recipe.json."""
    scheduler, optimizer, loader = cfg["scheduler"], cfg["optimizer"], cfg["train_loader"]
    total = tokens(cfg["max_duration"])
    return {
        **{key: optimizer[key] for key in ("lr", "weight_decay", "betas", "eps")},
        "name": scheduler["name"], "alpha_f": scheduler.get("alpha_f"),
        "t_warmup_tokens": tokens(scheduler["t_warmup"]) if "t_warmup" in scheduler else None,
        "t_decay_tokens": tokens(scheduler["t_decay"], total),
        "t_max_tokens": tokens(scheduler.get("t_max", "1dur"), total), "max_duration_tokens": total,
        "max_seq_len": cfg["max_seq_len"], "global_train_batch_size": cfg["global_train_batch_size"],
        "device_train_microbatch_size": cfg["device_train_microbatch_size"], "seed": cfg["seed"],
        **{key: loader[key] for key in ("shuffle", "shuffle_seed", "num_workers")},
        "mlm_probability_train_effective": loader["mask_rate"],
        "mlm_probability_eval": cfg["eval_loader"]["mask_rate"], "has_eval_loader": "eval_loader" in cfg,
        "save_interval_tokens": tokens(cfg["save_interval"]), "precision": cfg["precision"],
        "sequence_packing": loader["packing"], "autoresume": cfg["autoresume"],
        "load_path_set": not cfg["callbacks"].keys().isdisjoint({"ettin_phase", "ettin_cross"}),
        "global_rope_theta": cfg["model"]["global_rope_theta"], "local_rope_theta": cfg["model"]["local_rope_theta"],
        "objective": cfg["model"]["objective"].upper(), "window_left": run_config.model_config(cfg).window_left,
        "accumulate_train_batch_on_tokens": cfg["accumulate_train_batch_on_tokens"],
        "eval_interval": cfg["eval_interval"],
    }


def facts_of_original(run):
    scheduler = {k: v for k, v in run["scheduler"].items() if k not in ("start_lr", "final_lr_reached")}
    flat = {k: v for k, v in run.items() if k not in ("scheduler", "size", "side", "phase", "config")} | scheduler
    # constants of code, not of files: flash-attn's window (64, 0), Composer's weighting by samples, no evaluation
    return {**flat, "window_left": 64, "accumulate_train_batch_on_tokens": False, "eval_interval": f"{10**32 - 1}ba",
            "autoresume": bool(run["autoresume"])}


@pytest.mark.parametrize("overlay", [(), ("original",)], ids=["recipe", "original"])
@pytest.mark.parametrize("phase", [(), ("extend",), ("decay",), ("cross",)], ids="".join)
@pytest.mark.parametrize("path", ETTIN, ids=stem)
def test_it_resolves_passes_the_checks_and_builds_on_meta(path, phase, overlay):
    cfg = resolved(path, *phase, *overlay)
    assert cfg == resolved(path, *overlay, *phase)
    checks.check_settings(cfg)
    checks.check_settings(resolved(path, *phase, args=("max_duration=8ba",)))  # a try of eight steps is one key
    with torch.device("meta"):
        model = EttinModel(**{k: v for k, v in cfg["model"].items() if k != "name"})
    config, size = model.config, cfg["model"]["size"]
    count = sum(p.numel() for p in model.parameters())
    assert count == config.num_parameters == ORIGINAL["parameters"][size] and config.size == size
    assert config.max_position_embeddings == cfg["max_seq_len"]
    assert {"attn_out_dropout_prob": config.attn_out_dropout, "norm_eps": config.norm_eps,
            "global_attn_every_n_layers": config.global_attn_every_n_layers, "sliding_window": config.local_attention,
            "vocab_size": config.vocab_size} == ORIGINAL["model"]


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_a_recipe_is_read_at_a_glance_and_crosses_to_what_its_name_says(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 75 and max(map(len, lines)) <= 110
    assert not any(isinstance(value, (dict, list)) for value in om.to_container(om.load(path))["variables"].values())
    cfg = resolved(path, "cross")
    assert cfg["model"]["objective"] == ("clm" if "dec" in path.stem else "mntp")
    assert cfg["callbacks"]["ettin_cross"] == {"source": "x.pt"}


@pytest.mark.parametrize("overlay, kept", [((), DEVIATIONS), (("original",), STAY)], ids=["recipe", "original"])
def test_every_number_is_the_originals_or_a_declared_deviation_which_exists(overlay, kept):
    runs = ORIGINAL["runs"]
    assert len(runs) == 48 == len({(r["size"], r["side"], r["phase"]) for r in runs})
    differing = {(key, run["phase"]) for run in runs for key, value in facts_of(config_of(run, *overlay)).items()
                 if value != facts_of_original(run)[key]}
    assert differing == {(key, phase) for key in kept for phase in DEVIATIONS[key][0]}


@of_each_run
def test_the_schedule_ends_at_the_originals_learning_rate(run):
    facts = facts_of(cfg := config_of(run))
    scheduler, whole = run_config.filled(cfg["scheduler"]), run_config.parse_time("max_duration", cfg["max_duration"])
    factor = run_config.lr_factor(scheduler, whole, lambda _: facts["t_max_tokens"] - 1e-3)  # 1e-12 of 50B tokens
    assert facts["lr"] * factor == pytest.approx(run["scheduler"]["final_lr_reached"], rel=1e-5)  # sqrt at 1 - 1e-14
    # weight decay is relative to the peak in the phases that keep the optimizer, and to the phase's lr in cross
    peak = cfg["variables"]["peak_lr"]
    assert cfg["optimizer"].get("max_lr", cfg["optimizer"]["lr"]) == (peak / 2 if run["phase"] == "cross" else peak)


@pytest.mark.parametrize("path", ETTIN, ids=stem)
def test_packed_batches_hold_the_originals_tokens_and_microbatches_follow_the_rule(path):
    cfg, key = resolved(path), "device_train_microbatch_size"
    positions = cfg["global_train_batch_size"] * cfg["max_seq_len"]
    assert 0.98 < ORIGINAL["tokens_per_step_pretrain"] / positions < 1
    # a batch of one of 4 GPUs, or the half, quarter, ... that fits it (test_plan.py); several rows also of 8,192
    most = 704 >> ["17m", "32m", "68m", "150m", "400m", "1b"].index(cfg["variables"]["size"])
    for ranks in (1, 2, 4, 8, 16):
        assert run_config.rows_from_tokens({**cfg, key: None}, ranks)[key] == min(most, 2816 // ranks)
        for phase in LONG:
            rows = run_config.rows_from_tokens({**resolved(path, phase), key: None}, ranks)[key]
            assert rows == min(1024 // ranks, max(n for n in (1, 2, 4, 8, 16, 32, 64) if 8 * n <= most)) > 1


@pytest.mark.parametrize("tokens, batch, length, processes, rows", [
    (4096, 32, 256, 1, 16), (4096, 32, 256, 8, 4), (5000, 30, 1000, 1, 5), (5000, 28, 1000, 1, 4), (99, 7, 99, 1, 1)])
def test_rows_of_a_microbatch_fit_its_tokens_and_divide_the_batch(tokens, batch, length, processes, rows, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    cfg = {"variables": {"microbatch_tokens": tokens}, "max_seq_len": length, "global_train_batch_size": batch}
    assert run_config.rows_from_tokens(cfg) == {"device_train_microbatch_size": rows}
    assert run_config.rows_from_tokens({**cfg, "device_train_microbatch_size": 2}) == {}
    for wrong in (length - 1, "4096", True):
        with pytest.raises(ValueError, match="microbatch_tokens must be an integer"):
            run_config.rows_from_tokens({**cfg, "variables": {"microbatch_tokens": wrong}})


WARMUP_BILLIONS = {"17m": 125, "32m": 100, "68m": 75, "150m": 50, "400m": 10, "1b": 3}  # in the original's files


@pytest.mark.parametrize("path", ETTIN, ids=stem)
def test_batch_size_warmup_is_the_originals_and_divides_on_up_to_four_gpus(path):
    cfg = resolved(path, args=(str(ROOT / "yamls/options/batch-size-warmup.yaml"),))
    warmup, rows = cfg["train_loader"]["batch_size_warmup"], cfg["global_train_batch_size"]
    assert tokens(warmup["tokens"]) == WARMUP_BILLIONS[cfg["model"]["size"]] * 10**9
    for gpus in (1, 2, 4, 8):
        micro = run_config.rows_from_tokens({**cfg, "device_train_microbatch_size": None}, gpus).popitem()[1]
        checks.check_warmup(warmup, rows, world_size=gpus, microbatch=micro, total=tokens(cfg["max_duration"]))
    assert warmup["min_size"] == rows // 8


def test_overlays_state_the_right_token_counts_and_launch_lines_name_files_that_exist():
    for phase in LONG:
        text = (ROOT / f"yamls/phases/{phase}.yaml").read_text()
        for path in ETTIN:
            amount = tokens(resolved(path)["variables"][f"{phase}_tokens"]) / 1e9
            assert f"{amount:.1f}".removesuffix(".0") + "B" in text
    for path in (*RECIPES, *(ROOT / "yamls/phases").glob("*.yaml")):
        lines = re.findall(r"composer train\.py (.*)", path.read_text().replace("\\\n#", ""))
        assert lines and all((ROOT / name).is_file() for name in re.findall(r"yamls/\S+\.yaml", " ".join(lines))), path
