"""train.py: files merge left to right, blocks that change their name are replaced, mistakes are one clear line."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("train_program", ROOT / "train.py")
assert SPEC is not None and SPEC.loader is not None
TRAIN = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TRAIN)
NANO = str(ROOT / "yamls/nano.yaml")
EXTEND = str(ROOT / "yamls/phases/extend.yaml")


def test_a_block_that_changes_its_name_keeps_nothing_of_the_old_one():
    base = {"scheduler": {"name": "warmup_stable_decay", "t_warmup": "1tok"}, "optimizer": {"name": "a", "lr": 1}}
    over = {"scheduler": {"name": "one_minus_sqrt", "alpha_f": 0.5}, "optimizer": {"lr": 2}}
    assert TRAIN.merge(base, over) == {"scheduler": {"name": "one_minus_sqrt", "alpha_f": 0.5},
                                       "optimizer": {"name": "a", "lr": 2}}
    assert "t_warmup" not in TRAIN.configure([NANO, EXTEND, "variables.source=x"])["scheduler"]


def test_a_block_of_the_same_name_or_of_none_is_merged():
    assert TRAIN.merge({"a": {"name": "x", "k": 1}}, {"a": {"name": "x", "l": 2}}) == {"a": {"name": "x", "k": 1, "l": 2}}
    assert TRAIN.merge({"a": {"k": 1}}, {"a": {"name": "x"}}) == {"a": {"k": 1, "name": "x"}}


def test_a_missing_value_in_an_overlay_hides_no_value():
    assert TRAIN.merge({"load_path": "x"}, {"load_path": "???"}) == {"load_path": "x"}


def test_later_files_win_and_the_command_line_wins_over_files(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("variables: {n: 1}\na: ${variables.n}\nb: 1\nc: 1\n")
    second.write_text("variables: {n: 2}\nb: 2\nc: 2\n")
    # interpolations are resolved after merging, wherever key=value stands
    assert dict(TRAIN.configure([str(first), "c=3", str(second)])) == {"variables": {"n": 2}, "a": 2, "b": 2, "c": 3}
    assert TRAIN.configure([str(second), str(first)])["b"] == 1
    assert TRAIN.configure([str(first), "variables.n=7"])["a"] == 7


@pytest.mark.parametrize("args, words", [
    ([], ["no recipe given", "usage"]),
    (["nano.yaml"], ["nano.yaml: no such file", "yamls/nano.yaml"]),
    ([NANO, "yamls/phases/typo.yaml"], ["typo.yaml: no such file", "yamls/phases/extend.yaml"]),
    ([NANO, "variables.gloabl_batch=4"], ["variables.gloabl_batch", "no such variable", "global_batch"]),
    ([NANO, EXTEND], ["variables.source: no value given", "variables.source=..."]),
    ([NANO, "seed=${variables.sede}"], ["nano.yaml", "variables.sede"]),
    ([NANO, "seed=${oc.env:HOME}"], ["nano.yaml", "oc.env"]),
    ([NANO, "max_duration=1ep"], ["max_duration: '1ep' given", "epochs", "tok"]),
    ([NANO, "modle.size=17m"], ["modle: unknown key", "model"]),
])
def test_a_mistake_is_one_line_and_exit_code_1(args, words, capsys):
    assert TRAIN.main([*args, "--dry-run"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize("text, words", [("a: [1\n", "not valid YAML"), ("- 1\n", "not keys and values")])
def test_a_broken_file_is_named(text, words, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    assert TRAIN.main([str(tmp_path / "x.yaml")]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path}/x.yaml" in err and words in err and err.count("\n") == 1


def test_a_dry_run_says_what_would_run_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmfoundry.command_utils", None)  # importing it would raise
    monkeypatch.chdir(tmp_path)
    assert TRAIN.main([str(ROOT / "yamls/ettin-dec-400m.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("395,881,664 parameters", "2,883,584 real tokens", "589,545 steps", "FLOPs per token", "attention",
                  "not on this machine: tokenizer.name: 'data/pretrain/tokenizer'"):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_a_run_that_this_machine_cannot_do_stops_before_the_host_is_called(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmfoundry.command_utils", None)
    assert TRAIN.main([NANO, f"variables.data={tmp_path}/none"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_the_merged_config_reaches_the_host_after_registration(tmp_path, monkeypatch, capsys):
    import llmfoundry.command_utils as host

    calls = []
    monkeypatch.setattr(TRAIN.ettin_foundry, "register", lambda: calls.append("register"))
    monkeypatch.setattr(host, "train", lambda cfg: calls.append(cfg))
    monkeypatch.setattr(TRAIN.plan, "report", lambda cfg: "")  # there is no data to count
    for file in ("tokenizer/x", "train/manifest.json", "validation/manifest.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    assert TRAIN.main([NANO, f"variables.data={tmp_path}", "seed=5"]) == 0
    assert calls[0] == "register" and calls[1].seed == 5 and calls[1].tokenizer.name == f"{tmp_path}/tokenizer"
    assert not capsys.readouterr().err
