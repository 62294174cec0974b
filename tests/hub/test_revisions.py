"""Checkpoints as revisions: names, chains of phases, restarts, objectives of one run, averages; by the command itself."""

from __future__ import annotations

import json
import re

import nano_run
import parity
import pytest
import torch
from test_cli import equal_states, run

from ettin_foundry.hub.revisions import revision_name
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import import_folder, weights_checkpoint
from ettin_foundry.objectives.schedule import ObjectiveSchedule
from ettin_foundry.training import checkpoints as checkpoint

SHAPE = {"vocab_size": 320, "num_hidden_layers": 1}  # one layer: files of these tests are many


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    parity.tiny_tokenizer().save_pretrained(str(folder))
    return folder


def model(objective, seed=0, **changes):
    return parity.random_model(EttinConfig.for_size("nano", causal=objective == "clm", **{**SHAPE, **changes}), seed)


def content(source, objective, tokens, *, schedule=None, **record):
    """A checkpoint as a run's clock describes itself (`clock.Clock.state_dict`)."""
    content = weights_checkpoint(source.state_dict(), source.config, objective=objective, tokenizer=str(tokens))
    plain = objective if schedule is None else ObjectiveSchedule.parse(schedule).plain()
    content["state"]["callbacks"]["Clock"].update(
        {"tokens": 10 * (record.get("batch") or 0), "batch": 0, "phase": "pretrain", "run_name": "r", "run_hash": "a" * 64,
         "run_config": "{}", "objective_schedule": json.dumps(plain), "tokenizer_fingerprint": json.dumps({"ids": 1}),
         **record})
    return content


def save(path, *args, **record):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content(*args, **record), path)
    return path


@pytest.fixture
def chain(tokens, tmp_path):
    """Save folders of a chain: pretrain with its initial weights and a file cut short, extend, decay, cross."""
    root, models = tmp_path / "runs", {}

    def add(name, objective, folder, file, **record):
        models[name] = model(objective, seed=len(models))
        save(root / folder / file, models[name], objective, tokens, run_name=folder, **record)

    add("step0", "mlm", "pretrain", "initial/step0.pt")
    add("step10", "mlm", "pretrain", "ep0-ba10-rank0.pt", batch=10)
    add("step9", "mlm", "pretrain", "ep0-ba9-rank0.pt", batch=9)
    (root / "pretrain" / "latest-rank0.pt").symlink_to("ep0-ba10-rank0.pt")
    (root / "pretrain" / "ep0-ba11-rank0.pt").write_bytes((root / "pretrain" / "ep0-ba10-rank0.pt").read_bytes()[:-30])
    past = ({"objective": "mlm", "tokens": 100},)
    add("ext3", "mlm", "extend", "ep0-ba3-rank0.pt", batch=3, phase="extend", lineage=past)
    add("decay2", "mlm", "decay", "ep0-ba2-rank0.pt", batch=2, phase="decay", lineage=past)
    add("cross1", "clm", "cross", "ep0-ba1-rank0.pt", batch=1, phase="cross", lineage=past)
    return root, models


@pytest.mark.parametrize(("phase", "batch", "name"), [
    ("pretrain", 2999, "step2999"), ("extend", 1000, "ext1000"), ("decay", 100, "decay100"), ("cross", 7, "cross7"),
    ("contrastive", 7, "contrastive7"), (None, 7, "ba7"), ("../x", 7, "ba7"),
])
def test_names_are_those_of_the_originals_tags(phase, batch, name):
    assert revision_name(phase, batch) == name


def test_every_checkpoint_of_a_chain_becomes_a_folder(chain, tmp_path, capsys):
    root, models = chain
    folders = [root / name for name in ("pretrain", "extend", "decay", "cross")]
    code, out, err = run(capsys, "export", "--every", *folders, tmp_path / "out", "--tags")
    assert code == 0, err
    assert re.search(r"^6 revisions in \S+out: 6 written, 0 were there; \d+\.\d\d s for each, \d+ MB/s$", out.strip())
    order = ["step0", "step9", "step10", "ext3", "decay2", "cross1"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*order, "tags.json"])
    for name, source in models.items():
        state, config, objective = import_folder(tmp_path / "out" / name)
        assert equal_states(state, source.state_dict()) and config == source.config
        assert objective == ("clm" if name == "cross1" else "mlm")
    card = (tmp_path / "out" / "ext3" / "README.md").read_text()
    assert "| tokens seen | 130 |" in card and "| phase | extend |" in card
    assert f"| checkpoint | batch 3 of extend, whose resolved config has the sha256 {'a' * 64} |" in card
    tags = json.loads((tmp_path / "out" / "tags.json").read_text())["tags"]
    assert [tag["tag"] for tag in tags] == order and tags[0]["tokens"] == 0
    assert tags[-1] == {"tag": "cross1", "objective": "clm", "tokens": 110, "run_name": "cross", "phase": "cross",
                        "batch": 1, "run_hash": "a" * 64}


def test_a_restart_writes_only_what_is_missing(chain, tmp_path, capsys):
    root, _ = chain
    assert run(capsys, "export", "--every", root / "pretrain", tmp_path / "out")[0] == 0
    (tmp_path / "out" / "step9").rename(tmp_path / "away")
    kept = (tmp_path / "out" / "step10" / "model.safetensors").stat()
    code, out, _ = run(capsys, "export", "--every", root / "pretrain", tmp_path / "out")
    assert code == 0 and "3 revisions" in out and "1 written, 2 were there" in out
    assert (tmp_path / "out" / "step10" / "model.safetensors").stat() == kept
    assert (tmp_path / "out" / "step9" / "model.safetensors").read_bytes() == (
        tmp_path / "away" / "model.safetensors").read_bytes()
    code, out, _ = run(capsys, "export", "--every", root / "pretrain", tmp_path / "out")
    assert code == 0 and out.strip().endswith("0 written, 3 were there")


def test_folders_of_something_else_are_refused_before_any_is_written(chain, tokens, tmp_path, capsys):
    root, models = chain
    out = tmp_path / "out"
    save(root / "other" / "ep0-ba10-rank0.pt", models["step10"], "mlm", tokens, batch=10, run_name="other")
    assert run(capsys, "export", "--every", root / "other", out)[0] == 0
    code, _, err = run(capsys, "export", "--every", root / "pretrain", out)
    assert code == 1 and "step10: exists, with run_name 'other'" in err and "run_name 'pretrain'" in err
    assert [p.name for p in out.iterdir()] == ["step10"]
    assert run(capsys, "export", "--every", root / "pretrain", out, "--overwrite")[0] == 0
    with (out / "step9" / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    code, _, err = run(capsys, "export", "--every", root / "pretrain", out)
    assert code == 1 and "step9: its model.safetensors is not whole" in err and "--overwrite" in err


def test_bad_input_of_every_is_named(chain, tokens, tmp_path, capsys, caplog):
    root, models = chain
    (root / "empty").mkdir()
    save(root / "again" / "ep0-ba10-rank0.pt", models["step10"], "mlm", tokens, batch=10, run_name="again")
    save(root / "old" / "ep0-ba1-rank0.pt", models["step10"], "mlm", tokens, batch=None)
    simcse = content(models["step10"], "mlm", tokens, batch=1, phase="contrastive")
    simcse["state"]["callbacks"]["Clock"].update(objective="simcse", objective_schedule='"simcse"')
    (root / "simcse").mkdir()
    torch.save(simcse, root / "simcse" / "ep0-ba1-rank0.pt")
    for arguments, words in (
        (("--every", root / "none"), "is no folder of checkpoints"),
        (("--every", root / "empty"), "no complete checkpoint in it"),
        (("--every", root / "pretrain" / "ep0-ba9-rank0.pt"), "is no folder of checkpoints"),
        (("--every", root / "pretrain", root / "again"), "again/ep0-ba10-rank0.pt: would be called step10, as would"),
        (("--every", root / "old"), "holds no record of its phase and batch"),
        (("--every", root / "simcse"), "is of the contrastive stage"),
        (("--every", root / "pretrain", "--objective", "clm"), "--objective: 'clm' given, but"),
        (("--every", root / "pretrain", "--sentence-transformers"), "--sentence-transformers: given with --every"),
        ((root / "pretrain", "--tags"), "--tags: given without --every"),
        (("--every", root / "pretrain", "--ema"), "no checkpoint in it holds averages"),
    ):
        code, _, err = run(capsys, "export", *arguments, tmp_path / "out")
        assert code == 1 and words in err.strip().splitlines()[-1], (arguments, err)
    assert "left out: " in caplog.text and "step0.pt: holds no averaged weights" in caplog.text
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert run(capsys, "export", root / "pretrain", root / "extend", tmp_path / "out")[0] == 2
    assert run(capsys, "export", tmp_path / "out")[0] == 2


# ---------------------------------------------------------------- runs of several objectives


@pytest.mark.parametrize(("run_config", "window"), [("{}", 63), ('{"model": {"window_left": 64}}', 64)])
def test_a_mixture_exports_both_kinds_with_their_own_windows(run_config, window, tokens, tmp_path, capsys):
    source = model("mntp")
    path = save(tmp_path / "a.pt", source, "mntp", tokens, schedule={"mntp": 0.75, "clm": 0.25}, batch=5,
                run_config=run_config)
    for objective, given in (("mntp", ()), ("clm", ("--objective", "clm"))):
        code, _, err = run(capsys, "export", path, tmp_path / objective, *given)
        assert code == 0, err
        state, config, read = import_folder(tmp_path / objective)
        assert equal_states(state, source.state_dict()) and read == objective
        assert (config.causal, config.window_left) == ((True, window) if objective == "clm" else (False, 64))
        assert "| objectives in training | " in (tmp_path / objective / "README.md").read_text()
    code, _, err = run(capsys, "export", path, tmp_path / "o", "--objective", "mlm")
    assert code == 1 and "--objective: 'mlm' given, but" in err and "mntp, clm" in err


def test_a_checkpoint_before_the_switch_says_what_it_was_trained_on(tokens, tmp_path, capsys):
    schedule = [{"until": 100, "objective": "clm"}, {"objective": "mdlm"}]
    early, late = (save(tmp_path / f"{batch}.pt", model("mdlm"), "mdlm", tokens, schedule=schedule, batch=batch)
                   for batch in (10, 11))  # 100 and 110 tokens: batches before token 100 are clm
    assert run(capsys, "export", early, tmp_path / "early")[0] == 0
    assert "(up to here: clm)" in (tmp_path / "early" / "README.md").read_text()
    assert import_folder(tmp_path / "early")[2] == "mdlm"
    assert run(capsys, "export", early, tmp_path / "clm", "--objective", "clm")[0] == 0
    assert import_folder(tmp_path / "clm")[1].window_left == 63
    code, _, err = run(capsys, "export", early, tmp_path / "o", "--objective", "mdlm")
    assert code == 1 and "was trained on clm in its 100 tokens" in err
    assert run(capsys, "export", late, tmp_path / "late", "--objective", "mdlm")[0] == 0
    assert "up to here" not in (tmp_path / "late" / "README.md").read_text()


# ---------------------------------------------------------------- a run with averages


def test_a_run_with_averages_exports_trained_weights_or_averages(data_set, tmp_path, capsys):
    """Through LLM-Foundry: the name `ema`, its checks, its checkpoints read without executing a pickle."""
    nano_run.run(data_set, tmp_path, "algorithms.ema={half_life: 1000tok}", "max_duration=4ba", "save_interval=2ba",
                 "model.vocab_size=512", "variables.eval_mask_rate=0.3").close()
    folder = next(path.parent for path in tmp_path.rglob("latest-rank0.pt"))
    raw = {batch: torch.load(folder / f"ep0-ba{batch}-rank0.pt", weights_only=False)["state"] for batch in (2, 4)}
    for ema, name in ((False, "trained"), (True, "averages")):
        code, _, err = run(capsys, "export", "--every", folder, tmp_path / name, *(["--ema"] if ema else []))
        assert code == 0, err
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [*([] if ema else ["step0"]), "step2", "step4"]
        for batch, state in raw.items():
            kept = dict(state["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"] if ema else state["model"]
            stored, _, _ = import_folder(tmp_path / name / f"step{batch}")
            assert equal_states(stored, {key.removeprefix("model."): t for key, t in kept.items()})
    assert not torch.equal(dict(raw[4]["algorithms"])["EMA"]["ema_model"]["named_parameters_dict"]["model.output_bias"],
                           raw[4]["model"]["model.output_bias"])
    block = json.loads((tmp_path / "averages" / "step4" / "config.json").read_text())["ettin_foundry"]
    settings = "EMA(half_life='1000tok', update_interval='1ba', ema_start='0dur')"
    assert block["lineage"] == [{"averaged": settings}] and block["checkpoint"]["batch"] == 4
    assert f"| averaged | {settings} |" in (tmp_path / "averages" / "step4" / "README.md").read_text()
    code, _, err = run(capsys, "export", "--every", folder, tmp_path / "averages")
    assert code == 1 and "step2: exists, with averaged True" in err and "averaged False" in err
    assert len(checkpoint.complete_checkpoints(folder)) == 2
