"""Checkpoints as revisions: names, chains of phases, restarts, tokenizers, exports in a run, uploads."""

import json
import re
import shutil

import huggingface_hub
import nano_run
import pytest
import safetensors.torch
import torch
from hub_server import HubServer
from parity import equal_states, nano, save, tiny_tokenizer

from ettin_foundry.data import tokenizer
from ettin_foundry.data.tokenizer import fingerprint, train_bpe
from ettin_foundry.hub.folder import export_every, revision_name
from ettin_foundry.hub.load import load_model
from ettin_foundry.model.weights import import_folder, to_hf

FINGERPRINT = fingerprint(tiny_tokenizer())


@pytest.fixture
def chain(tiny_dir, tmp_path):
    """Save folders of a chain: pretrain with its initial weights and a file cut short, extend, decay, cross."""
    root, models, past = tmp_path / "runs", {}, ({"objective": "mlm", "tokens": 100},)
    for name, phase, batch, objective in (("step0", "pretrain", 0, "mlm"), ("step10", "pretrain", 10, "mlm"),
                                          ("step9", "pretrain", 9, "mlm"), ("ext3", "extend", 3, "mlm"),
                                          ("decay2", "decay", 2, "mlm"), ("cross1", "cross", 1, "clm")):
        models[name] = nano(objective, seed=len(models))
        file = f"ep0-ba{batch}-rank0.pt" if batch else "initial/step0.pt"
        save(root / phase / file, models[name], objective, place=tiny_dir, run_name=phase, phase=phase, batch=batch,
             lineage=past if phase != "pretrain" else ())
    (root / "pretrain" / "ep0-ba11-rank0.pt").write_bytes((root / "pretrain" / "ep0-ba10-rank0.pt").read_bytes()[:-30])
    return root, models


def test_every_checkpoint_of_a_chain_becomes_a_folder(chain, tmp_path):
    root, models = chain
    line = export_every([root / name for name in ("pretrain", "extend", "decay", "cross")], tmp_path / "out",
                        licence="mit")
    assert line.startswith("6 revisions in ") and line.endswith("6 written, 0 were there")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(models)  # named as the original's tags
    assert (revision_name("../x", 7), revision_name(None, 0)) == ("ba7", "step0")
    for name, source in models.items():
        state, config, objective = import_folder(tmp_path / "out" / name)
        assert equal_states(state, source.state_dict()) and config == source.config
        assert objective == ("clm" if name == "cross1" else "mlm")
    card = (tmp_path / "out" / "ext3" / "README.md").read_text()
    assert "| tokens seen | 130 |" in card and "| phase | extend |" in card and "license: mit" in card


def test_a_restart_writes_what_is_missing_and_refuses_folders_of_something_else(chain, tiny_dir, tmp_path):
    (root, models), out = chain, tmp_path / "out"
    save(root / "other" / "ep0-ba10-rank0.pt", models["step10"], "mlm", place=tiny_dir, batch=10, run_name="other")
    export_every([root / "other"], out)
    with pytest.raises(ValueError, match="step10: must be of .*'pretrain'.*got .*'other'"):
        export_every([root / "pretrain"], out)
    assert [p.name for p in out.iterdir()] == ["step10"]
    assert "3 written, 0 were there" in export_every([root / "pretrain"], out, overwrite=True)
    with pytest.raises(ValueError, match="step0: must be of .*'bfloat16'.*got .*'float32'"):
        export_every([root / "pretrain"], out, dtype="bf16")
    (out / "step9").rename(tmp_path / "away")
    kept = (out / "step10" / "model.safetensors").stat()
    assert "1 written, 2 were there" in export_every([root / "pretrain"], out)
    assert (out / "step10" / "model.safetensors").stat() == kept and (out / "step9").is_dir()


def test_bad_input_is_named_and_nothing_is_written(chain, tmp_path):
    root, models = chain
    save(root / "again" / "ep0-ba10-rank0.pt", models["step10"], "mlm", batch=10, run_name="again")
    for folders, asked, words in (
            (["none"], None, "is no folder of complete checkpoints"), (["pretrain"], "clm", "--objective must be mlm "),
            (["pretrain", "again"], None, "ba10-rank0.pt: would be called step10, as would")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            export_every([root / folder for folder in folders], tmp_path / "out", objective=asked)
    torch.save({"state": {"model": {"model.weight": torch.ones(1)}}}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="plain.pt: holds no record of its config"):
        load_model(tmp_path / "plain.pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("run_config", "window"), [("{}", 63), ('{"model": {"window_left": 64}}', 64)])
def test_a_mixture_is_read_as_both_kinds_with_their_own_windows(run_config, window, tmp_path):
    source = nano("mntp")
    path = save(tmp_path / "a.pt", source, "mntp", schedule={"mntp": 0.75, "clm": 0.25}, batch=5, run_config=run_config)
    for asked, objective in ((None, "mntp"), ("clm", "clm")):
        loaded = load_model(path, asked)
        assert equal_states(loaded.state, source.state_dict()) and loaded.objective == objective
        assert loaded.config.causal == (objective == "clm") != loaded.other.causal
        assert {each.causal: each.window_left for each in (loaded.config, loaded.other)} == {True: window, False: 64}
        assert loaded.facts["objective_schedule"] == "{mntp: 0.75, clm: 0.25}"
    with pytest.raises(ValueError, match="--objective must be mntp or clm .*got 'mlm'"):
        load_model(path, "mlm")


def test_a_checkpoint_is_read_with_its_own_tokenizer_or_not_at_all(tiny_dir, tmp_path, monkeypatch):
    """Whatever lies where its data's tokenizer lay, and wherever the run was moved to."""
    monkeypatch.chdir(tmp_path)
    own, data = tmp_path / "own", tmp_path / "data" / "tokenizer"
    path = save(own / "ep0-ba1-rank0.pt", nano("mlm"), "mlm", place="data/tokenizer", batch=1)
    shutil.copytree(tiny_dir, data)
    assert not tokenizer.difference(fingerprint(load_model(path).tokenizer()), FINGERPRINT)
    data.rename(own / "tokenizer")  # as a run's copy
    train_bpe(["zebra quartz, the text of another corpus, and none of the first one"] * 3, 300).save_pretrained(data)
    own = own.rename(tmp_path / "moved")
    assert not tokenizer.difference(fingerprint(load_model(own).tokenizer()), FINGERPRINT)
    with pytest.raises(ValueError, match="data/tokenizer, whose vocab_sha256 is"):
        load_model(own).tokenizer("data/tokenizer")
    shutil.rmtree(own / "tokenizer")
    with pytest.raises(ValueError, match="the tokenizer must be the one that .*moved.* got data/tokenizer, whose"):
        load_model(own).tokenizer()
    assert load_model(own).tokenizer(otherwise=tiny_dir)
    shutil.rmtree(data)
    monkeypatch.setattr(tokenizer, "load", lambda place: pytest.fail(f"{place} is looked up"))
    with pytest.raises(ValueError, match="got none"):
        load_model(own).tokenizer()  # a path is not looked up on the Hub; a name is
    with pytest.raises(pytest.fail.Exception, match="org/name"):
        load_model(save(tmp_path / "h.pt", nano("mlm"), "mlm", tokenizer_fingerprint={"name": "org/name"})).tokenizer()


def test_folders_are_written_in_the_course_of_a_run(data_set, tmp_path):
    """Of drawn weights and of loaded ones; a run leaves its tokenizer in its save folder."""
    own, out = fingerprint(tokenizer.load(data_set / "tokenizer")), f"{tmp_path}/out/{{run_name}}"
    for name, more, names in (("pretrain", [], ["step0", "step3", "step5"]),
                              ("extend", ["variables.phase=extend", "load_weights_only=true",
                                          f"load_path={tmp_path}/pretrain/latest-rank0.pt"], ["ext3", "ext5"])):
        trainer = nano_run.run(data_set, tmp_path, "max_duration=5ba", f"run_name={name}",
                               f"callbacks.ettin_export={{interval: 3ba, folder: '{out}'}}", *more)
        folder = tmp_path / "out" / name
        assert sorted(path.name for path in folder.iterdir()) == names
        ours = json.loads((folder / names[-1] / "config.json").read_text())["ettin_foundry"]
        tokens = trainer.state.timestamp.token.value * (2 if more else 1)  # those of the weights that were loaded too
        assert ours["tokens"] == tokens and ours["checkpoint"]["batch"] == 5
        assert equal_states(import_folder(folder / names[-1])[0], trainer.state.model.model.state_dict())
        assert not tokenizer.difference(fingerprint(tokenizer.load(tmp_path / name / "tokenizer")), own)
        trainer.close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        for name, value in ("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False), ("HF_TOKEN_PATH", str(tmp_path / "no")):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        huggingface_hub.configure_http_backend()  # ends sessions that were made offline
        yield server
    huggingface_hub.configure_http_backend()


def test_every_checkpoint_is_uploaded_under_its_tag_and_an_interrupted_upload_goes_on(chain, hub, ettin):
    root, models = chain
    words = ["push", "--every", *(root / name for name in ("pretrain", "extend", "decay")), "--repo", "it", "--private"]
    code, said, _ = ettin(*words, "--dry-run")
    names = re.findall(r"-> it@(\S+)", said)
    assert code == 0 and names == ["step0", "step9", "step10", "ext3", "decay2"] and not hub.asked
    hub.refused = 2
    code, _, error = ettin(*words)
    assert code == 1 and re.search("error: me/it: 403 .*; the same command goes on\n$", error)
    assert [*hub.tags] == names[:2]
    hub.refused = -1
    assert "3 of 5 revisions, the others were there; main is decay2\n" in ettin(*words)[1]
    assert [*hub.tags.items()] == list(zip(names, range(5))) and len(hub.commits) == 5
    for name, at in hub.tags.items():
        sent = safetensors.torch.load(hub.commits[at]["model.safetensors"])
        assert equal_states(sent, to_hf(models[name].state_dict(), models[name].config, torch.float32))
    assert hub.commits[-1]["README.md"].startswith(b"---\n") and b"# it\n" in hub.commits[-1]["README.md"]
    del hub.tags["step9"]
    assert "1 of 5" in ettin(*words)[1] and hub.commits[-1] == hub.commits[4] != hub.commits[5]  # as main was before
    assert "0 of 5" in ettin(*words)[1] and len(hub.commits) == 7


def test_a_folder_is_uploaded_as_it_is_or_refused_before_anything_is_sent(chain, hub, ettin, tmp_path, monkeypatch):
    root, out = chain[0], tmp_path / "out"
    export_every([root / "decay"], out)
    assert ettin("push", out / "decay2", "--repo", "me/it")[:2] == (0, f"pushed to {hub.url}/me/it: {out / 'decay2'}\n")
    assert hub.commits == [{path.name: path.read_bytes() for path in (out / "decay2").iterdir()}] and not hub.tags
    assert f"{out / 'decay2'} -> me/it@decay2" in ettin("push", "--every", out, "--repo", "me/it", "--dry-run")[1]
    hub.asked.clear()
    for folder, repo, token, words in (
            (root / "decay", "me/it", "hf_x", "FOLDER must be an exported model"),
            (out / "decay2", "a/b/c", "hf_x", "a/b/c"), (out / "decay2", "it", "", "HF_TOKEN")):
        monkeypatch.setenv("HF_TOKEN", token)
        code, _, error = ettin("push", folder, "--repo", repo)
        assert code == 1 and words in error and error.count("\n") == 1
    assert not hub.asked
