"""Claims about suites: what a file means, what is refused before work, and how stages run, go on, fail and are stopped.

Nothing is trained: the suites' command is a small program that leaves what a run leaves, a checkpoint and its steps.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nano_run
import pages
import parity
import pytest
import torch
from omegaconf import OmegaConf

from ettin_foundry.model.config import SIZES
from ettin_foundry.model.weights import import_folder, weights_checkpoint
from ettin_foundry.tools import suite_run
from ettin_foundry.tools.evaluate import evaluate
from ettin_foundry.tools.report import write_report
from ettin_foundry.tools.suite import Stage, Suite, load
from ettin_foundry.tools.suite_run import check_suite, run_suite
from ettin_foundry.training import run_config

ROOT = nano_run.ROOT
STEPS = 8  # of each stage, of 500 tokens

# Leaves a checkpoint prepared beside it and a log of steps in save_folder, or does what a file named as the stage says.
PROGRAM = """
import json, pathlib, shutil, signal, subprocess, sys, time
here = pathlib.Path(__file__).resolve().parent
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("save_folder=")).split("=", 1)[1])
plan = here / f"{folder.name}.plan"
plan = plan.read_text() if plan.exists() else "finish"
with (here / "called").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("training", folder.name, flush=True)
with (folder / "steps.jsonl").open("w") as file:
    for step in range(8):
        file.write(json.dumps({"step": step, "tokens": 500 * step, "rows": 8, "objective": "mlm", "mask_rate": 0.3,
                               "lr": 0.001, "loss": 6.0 - step / 8, "seconds": 0.5,
                               "ids_hash": f"{step + (plan == 'other rows' and step == 5):012x}"}) + "\\n")
if plan == "fail":
    print("Traceback (most recent call last):\\n  File nowhere\\ntrain  17%|# | 1/6\\x1b[A", end="")
    print("RuntimeError: the disk is full\\ntrain  17%|# | 1/6\\n  really")
    print("ERROR:composer.cli.launcher:Rank 0 crashed with exit code 7.")
    sys.exit(7)
if plan == "save":
    (here / "hanging").write_text("1")
    time.sleep(0.5)
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    time.sleep(600)
if plan == "hang":
    child = subprocess.Popen(["sleep", "600"])
    (here / "hanging").write_text(str(child.pid))
    time.sleep(600)
shutil.copy(here / f"{folder.name}.pt", folder / "ep0-ba8-rank0.pt")
"""
EXPORTS = {"encoder": "encoder-extend", "decoder": "decoder-extend"}
PEAKS = {"name": "peak", "keys": ["variables.peak_lr={x}"], "values": [0.001, 0.003]}


class Small:
    """A suite of four stages in a folder, whose checkpoints are prepared."""

    def __init__(self, folder: Path, data: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.file, self.hanging, program = folder / "suite.yaml", folder / "hanging", folder / "program.py"
        program.write_text(PROGRAM)
        self.command = [sys.executable, str(program)]
        names = ("nano.yaml", "options/decoder.yaml", "phases/extend.yaml")
        nano, decoder, extend = (str(ROOT / "yamls" / name) for name in names)
        self.plain: dict[str, Any] = {
            "name": "small", "root": "root", "command": shlex.join(self.command),
            "overrides": [f"variables.data={data}", "variables.max_seq_len=64", "variables.long_max_seq_len=64",
                          "variables.global_batch=8", "variables.long_global_batch=8", "device_train_microbatch_size=8",
                          "variables.vocab_size=512", "max_duration=4_000tok", "variables.warmup=500tok"],
            "stages": {"encoder-pretrain": {"yaml": [nano], "pair": "pretrain"},
                       "decoder-pretrain": {"yaml": [nano, decoder], "pair": "pretrain"},
                       "encoder-extend": {"yaml": [nano, extend], "from": "encoder-pretrain", "pair": "extend"},
                       "decoder-extend": {"yaml": [nano, decoder, extend], "from": "decoder-pretrain",
                                          "pair": "extend"}}}

    def suite(self, *overrides: str, prepare: bool = True, **keys: Any) -> Suite:
        """Writes the file with these keys and reads it; prepares the checkpoints that its stages would leave."""
        self.plain.update(keys)
        self.file.write_text(OmegaConf.to_yaml(OmegaConf.create(self.plain)))
        suite = load(self.file, overrides)
        for stage in suite.stages if prepare else ():
            self.prepare(stage)
        return suite

    def prepare(self, stage: Stage) -> None:
        shape, objective = run_config.model_config(stage.config), stage.config["model"]["objective"]
        # whole models only where they will be exported
        state = _weights(shape) if "exports" in self.plain else {"output_bias": torch.zeros(1)}
        text = run_config.config_text(stage.config)
        content = weights_checkpoint(state, shape, objective=objective, tokenizer=str(self.tokenizer))
        content["state"]["callbacks"]["Clock"].update({
            "tokens": 500 * STEPS, "batch": STEPS, "run_name": stage.config["run_name"], "run_config": text,
            "run_hash": hashlib.sha256(text.encode()).hexdigest(), "objective_schedule": json.dumps(objective)})
        torch.save(content, self.folder / f"{stage.name}.pt")

    def plan(self, stage: str, what: str) -> None:
        (self.folder / f"{stage}.plan").write_text(what)

    def wait_until_it_hangs(self) -> int:
        """The process that a hanging stage has started."""
        while not (self.hanging.exists() and self.hanging.read_text()):
            time.sleep(0.02)
        return int(self.hanging.read_text())

    @property
    def called(self) -> list[list[str]]:
        """The arguments of each process that was started, in order."""
        path = self.folder / "called"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def trained(self) -> list[str]:
        return [Path(next(a for a in args if a.startswith("save_folder="))).name for args in self.called]


@functools.cache
def _weights(shape):
    return parity.random_model(shape, seed=int(shape.causal)).state_dict()


@pytest.fixture
def small(tmp_path, data_set, tokenizer_dir, monkeypatch):
    folder = tmp_path / "a b"  # a space, so that quoting matters
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Small(folder, data_set, tokenizer_dir)


ALL = ["encoder-pretrain", "decoder-pretrain", "encoder-extend", "decoder-extend"]


# ------------------------------------------------------------------ running


def test_stages_run_in_order_with_the_listed_commands_and_a_second_call_trains_nothing(small, capfd):
    suite = small.suite()
    run_suite(suite)
    assert small.trained == ALL
    assert [[*small.command, *args] for args in small.called] == [stage.words for stage in suite.stages]
    log = (suite.stages[0].folder / "suite.log").read_text()
    assert log == f"$ {shlex.join(suite.stages[0].words)}\ntraining encoder-pretrain\n"
    run_suite(small.suite(prepare=False))
    assert small.trained == ALL
    assert "1/4 encoder-pretrain: finished, 4,000 tokens" in capfd.readouterr().err


def test_a_failed_stage_stops_the_chain_with_its_reason_and_the_same_command_goes_on(small, ettin):
    suite = small.suite()
    small.plan("decoder-pretrain", "fail")
    code, _, error = ettin("suite", small.file)
    assert code == 3 and "error: decoder-pretrain failed: exit code 7" in error
    assert "RuntimeError: the disk is full\n    really" in error and "Traceback" not in error
    assert small.trained == ALL[:2]
    small.plan("decoder-pretrain", "finish")
    run_suite(suite)
    assert small.trained == [*ALL[:2], *ALL[1:]] and small.called[1] == small.called[2]


def test_pairs_that_read_other_rows_stop_the_chain(small):
    small.plan("decoder-pretrain", "other rows")
    with pytest.raises(ValueError, match="encoder-pretrain and decoder-pretrain did not read the same rows at step 5 "):
        run_suite(small.suite())
    assert small.trained == ALL[:2]


def test_one_stage_runs_alone_after_the_one_it_starts_from(small, ettin):
    suite = small.suite()
    with pytest.raises(ValueError, match="encoder-extend: starts from encoder-pretrain, which is not finished"):
        run_suite(suite, [suite.stage("encoder-extend")])
    run_suite(suite, [suite.stage("encoder-pretrain")])
    run_suite(suite, [suite.stage("encoder-extend")])
    assert small.trained == ["encoder-pretrain", "encoder-extend"]
    with pytest.raises(ValueError, match=r"--report: decoder-pretrain, decoder-extend not finished"):
        write_report(suite, {})
    for name, said in ("encoder-extend", "encoder-extend: 4_000tok from encoder-pretrain, pair extend\n"), (
            "nope", f"--stage must be one of {', '.join(ALL)} ({small.file}), got 'nope'\n"):
        told = "".join(ettin("suite", small.file, "--stage", name, "--list")[1:])
        assert said in told and "decoder-extend: " not in told


@pytest.mark.parametrize("what, signum, code", [("save", signal.SIGTERM, 75), ("save", signal.SIGUSR1, 75),
                                                ("hang", signal.SIGTERM, 143), ("hang", signal.SIGINT, 130)])
def test_told_to_end_it_has_the_stage_save_told_twice_or_by_ctrl_c_it_ends_all(
        small, ettin, monkeypatch, what, signum, code):
    """The first telling is lost on a stage that saves: it is still starting."""
    def tell():
        small.wait_until_it_hangs()
        os.kill(os.getpid(), signum)
        if code == 143:
            time.sleep(0.5)
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(suite_run, "_TELL_SECONDS", 0.2)
    small.suite()
    small.plan("encoder-pretrain", what)
    threading.Thread(target=tell, daemon=True).start()
    ended, _, error = ettin("suite", small.file)
    assert ended == code and "stopped. The same command continues." in error and small.trained == ALL[:1]
    if what == "hang":  # state, not stat: its one letter is the same whatever the priority and the terminal
        told = subprocess.run(["ps", "-o", "state=", "-p", small.hanging.read_text()], capture_output=True, text=True)
        assert told.stdout.strip() in ("", "Z")  # gone, or waiting only for its parent's parent to notice


# ------------------------------------------------------------------ refused before anything starts


def test_a_finished_stage_of_other_settings_is_refused_with_both_values(small):
    suite = small.suite()
    run_suite(suite, [suite.stage("encoder-pretrain")])
    overrides = [*small.plain["overrides"], "variables.peak_lr=1.0e-3", "seed=5", "progress_bar=true"]
    with pytest.raises(ValueError) as error:
        run_suite(small.suite(prepare=False, overrides=overrides))
    for text in ("stages.encoder-pretrain: ", "optimizer.lr must be 0.002, got 0.001", "seed must be 21, got 5"):
        assert text in str(error.value)
    assert "progress_bar" not in str(error.value) and small.trained == ALL[:1]


def test_an_unfair_pair_is_refused_and_allowed_by_hand(small):
    small.plain["stages"]["decoder-pretrain"]["overrides"] = ["train_loader.shuffle_seed=22"]
    suite = small.suite()
    with pytest.raises(ValueError, match=r"(?s)could not be compared.*train_loader.shuffle_seed.*--allow-unfair"):
        check_suite(suite)
    run_suite(suite)
    write_report(suite, check_suite(suite, allow_unfair=True))
    report = json.loads((small.folder / "root" / "report.json").read_text())
    assert report["allowed_unfair"] == ["pair pretrain: encoder-pretrain, decoder-pretrain"]
    assert "Not a fair comparison" in (small.folder / "root" / "report.html").read_text()


@pytest.mark.parametrize("setting", ["optimizer.momentum=0.9", "variables.typo=1"])
def test_a_stage_that_could_not_run_is_named(small, setting):
    small.plain["stages"]["decoder-extend"]["overrides"] = [setting]
    with pytest.raises(ValueError, match=f"stages.decoder-extend: {setting.split('=')[0]}"):
        check_suite(small.suite(prepare=False))


@pytest.mark.parametrize("change, key", [
    ({"name": "a/b"}, "name"), ({"root": "s3://bucket/x"}, "root"), ({"scale": 0}, "scale"),
    ({"stages": {"a": {"yaml": ["x.yaml"], "from": "b"}, "b": {"yaml": ["x.yaml"]}}}, "stages.a.from"),
    ({"stages": {"a": {"yaml": ["x.yaml"], "overrides": ["save_folder=x"]}}}, "stages.a.overrides"),
    ({"overrides": ["--dry-run"]}, "overrides"), ({"stages": {"a": {"yaml": ["x.yaml"], "pair": "p"}}}, "pair"),
    ({"exports": {"encoder": "x"}}, "exports.encoder"), ({"samples": {"prompts": ["a"]}}, "need exports"),
    ({"evaluation": {"data": "x", "batches": 1}}, "evaluation.batches"),
    ({"extends": "suite.yaml"}, "extends: leads back to"), ({"root": "${variables.place}"}, "variables"),
    ({"x": {**PEAKS, "values": [1]}}, "x.values: .* at least 2"), ({"x": PEAKS}, "lines must be given"),
    ({"lines": {"a": {"objective": "rtd"}}}, "lines.a.objective: .*'mlm', 'clm' or 'mntp', got 'rtd'"),
    ({"x": PEAKS, "lines": {"a": {"objective": "mlm"}}}, "evaluation must be given"),
])
def test_a_file_that_cannot_be_is_refused_by_key(small, change, key):
    with pytest.raises(ValueError, match=key):
        small.suite(prepare=False, **change)


# ------------------------------------------------------------------ what a file means


def test_scale_multiplies_every_time_in_tokens_and_nothing_else(small):
    whole, tenth = (dict(run_config.walk({**small.suite(f"scale={scale}", prepare=False).stages[0].config,
                                          "variables": None})) for scale in (1, 0.1))
    times = {key for key, value in whole.items() if str(value).endswith("tok") and float(value[:-3]) > 0}
    assert {"max_duration", "save_interval", "eval_interval", "scheduler.t_warmup"} <= times
    for key, value in whole.items():
        if key in times:
            assert float(tenth[key][:-3]) == pytest.approx(0.1 * float(value[:-3]), abs=0.5), key
        else:
            assert tenth[key] == value, key


@pytest.mark.parametrize("size", [size for size in SIZES if size != "nano"])
def test_the_suite_of_every_size_is_the_paper_s(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = load(f"yamls/suite/ettin-{size}.yaml")
    configs = [stage.config for stage in suite.stages]
    assert {config["model"]["size"] for config in configs} == {size}
    assert [config["model"]["objective"] for config in configs] == ["mlm", "clm"] * 3 + ["clm", "mntp"]
    third = 1 / 3 if size == "1b" else 1
    budgets = [1.7e12] * 2 + [250e9 * third] * 2 + [50e9 * third] * 4
    assert [float(c["max_duration"][:-3]) for c in configs] == pytest.approx(budgets, rel=1e-4)
    for last in suite.stages[-2:]:
        assert [stage.name.split("-")[-1] for stage in suite.chain(last)][:3] == ["pretrain", "extend", "decay"]


@pytest.mark.parametrize("name, pairs", [("ettin-150m", 4), ("nano", 4), ("demo", 2)])
def test_the_suites_are_fair(name, pairs, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = check_suite(load(f"yamls/suite/{name}.yaml"))
    assert sum(key.startswith("pair ") for key in found) == pairs and all(entry["fair"] for entry in found.values())


# ------------------------------------------------------------------ the report


def test_the_report_says_what_the_exported_folders_are(small, data_set, capfd):
    evaluation = {"data": str(data_set), "objectives": ["clm", "mlm"], "mask_rate": 0.15, "max_batches": 1}
    suite = small.suite(exports=EXPORTS, evaluation=evaluation)
    run_suite(suite)
    write_report(suite, check_suite(suite))
    root = small.folder / "root"
    report = json.loads((root / "report.json").read_text())
    assert report["pairs"]["extend"] == {"members": ALL[2:], "steps_with_equal_rows": STEPS}
    first = report["stages"][0]
    assert [first[key] for key in ("tokens", "steps", "tokens_per_second", "first_loss")] == [4000, STEPS, 1000, 6.0]
    assert first["last_loss"] == pytest.approx(sum(6 - step / 8 for step in range(STEPS)) / STEPS, rel=1e-12)
    text, printed = pages.read_page(root / "report.html"), capfd.readouterr().out
    for name, objective in (("encoder", "mlm"), ("decoder", "clm")):
        weights, config, stated = import_folder(root / "models" / name)
        assert stated == objective and config.causal == (objective == "clm")
        assert all(torch.equal(weights[key], value) for key, value in _weights(config).items())
        told = json.loads((root / "models" / name / "config.json").read_text())["ettin_foundry"]
        assert told["checkpoint"]["run_name"] == f"small-{name}-extend"  # as `ettin export` says it
        found = evaluate(root / "models" / name, data_set, ["clm", "mlm"], mask_rate=0.15, max_batches=1)
        assert next(model for model in report["models"] if model["model"] == name)["evaluation"] == found
        cells = [f"{value['loss']:.3f} ({value['accuracy']:.1%})" for value in found.values()]
        assert f"{name} {objective} {' '.join(cells)} 4k + 4k" in text
        assert re.search(rf"{name} +{objective} +{re.escape(cells[0])} .* 4k \+ 4k\n", printed), printed


def test_the_report_says_why_a_number_is_missing(small):
    """Runs without a log of their steps, with losses that are not finite, and a model that cannot be evaluated."""
    suite = small.suite(exports=EXPORTS, evaluation={"data": "nowhere"}, samples={"masked": ["a [MASK]"]})
    run_suite(suite)
    logs = {name: suite.stage(name).folder / "steps.jsonl" for name in ALL}
    logs["encoder-extend"].unlink()
    logs["decoder-extend"].write_text("")
    lines = [json.loads(line) for line in logs["encoder-pretrain"].read_text().splitlines()]
    for name in ALL[:2]:
        logs[name].write_text("".join(json.dumps({**line, "loss": None if line["step"] % 4 == 0 else 5.0}) + "\n"
                                      for line in lines))
    write_report(suite, {})
    text = pages.read_page(small.folder / "root" / "report.html")
    for words in ("encoder-extend: no losses and times", "decoder-extend: no losses and times",
                  "encoder: not evaluated: ", "a [MASK] ",
                  "encoder-pretrain: the loss is not finite at 2 of 8 steps, first at step 0",
                  "encoder-extend mlm from encoder-pretrain 4,000 – – – – – –",
                  "encoder-pretrain mlm 4,000 8 – 5.000 – 1,000 "):
        assert words in text


# ------------------------------------------------------------------ sweeps


def test_a_sweep_trains_each_point_once_and_gives_the_losses_of_its_checkpoints(small, ettin, data_set):
    nano, decoder = small.plain["stages"]["decoder-pretrain"]["yaml"]
    lines = {"encoder": {"yaml": [nano], "objective": "mlm"}, "decoder": {"yaml": [nano, decoder], "objective": "clm"}}
    suite = small.suite(stages={}, exports={}, x=PEAKS, lines=lines,  # exports: whole models
                        evaluation={"data": str(data_set), "max_batches": 1})
    assert [stage.name for stage in suite.stages] == [f"{line}-{x}" for line in lines for x in (0.001, 0.003)]
    assert [stage.config["optimizer"]["lr"] for stage in suite.stages] == [0.001, 0.003] * 2
    code, out, error = ettin("sweep", small.file)
    assert code == 0 and error.endswith("finished: 4 points in root/sweep.json; `ettin report root` draws them\n")
    assert "\ntotal " in out
    path = Path("root/sweep.json")
    content = json.loads(path.read_text())
    assert content["axes"] == {"x": "peak", "lines": "model"} and len(content["points"]) == 4
    last = content["points"][-1]
    assert (last["x"], last["line"], last["metric"], last["seconds"]) == (0.003, "decoder", "clm loss", 4.0)
    direct = evaluate(suite.stages[-1].folder, data_set, ["clm"], max_batches=1)["clm"]
    assert last["value"] == pytest.approx(direct["loss"], rel=1e-6)  # the same numbers, in another process or not
    content["points"][0]["value"] = 1.5  # a mark: what is measured already is left
    path.write_text(json.dumps(content))
    assert ettin("sweep", small.file)[0] == 0 and len(small.called) == 4
    assert json.loads(path.read_text())["points"] == content["points"]
