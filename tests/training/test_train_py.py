"""train.py: files merge left to right, blocks that change their name are replaced, mistakes are one clear line."""

import re
import sys

import nano_run
import pytest

from ettin_foundry.training import checks, run_config

TRAIN = nano_run.program()
NANO = str(nano_run.ROOT / "yamls/nano.yaml")
EXTEND = str(nano_run.ROOT / "yamls/phases/extend.yaml")


def test_later_files_win_and_the_command_line_wins_over_files(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("variables: {n: 1}\na: ${variables.n}\nb: 1\nc: 1\n")
    second.write_text("variables: {n: 2}\nb: 2\nc: 2\n")
    # interpolations are resolved after merging, wherever key=value stands
    assert dict(TRAIN.configure([str(first), "c=3", str(second)])) == {"variables": {"n": 2}, "a": 2, "b": 2, "c": 3}
    assert TRAIN.configure([str(second), str(first)])["b"] == 1
    assert TRAIN.configure([str(first), "variables.n=7"])["a"] == 7
    assert TRAIN.merge({"load_path": "x"}, {"load_path": "???"}) == {"load_path": "x"}  # a missing value hides none


@pytest.mark.parametrize("text", ["1", "on", "1e3", "007", "1_000", "-3"])
def test_names_and_paths_that_yaml_takes_for_something_else_are_refused(text):
    for key in ("run_name", "loggers.wandb.project"):
        with pytest.raises(ValueError, match=f"{key}.* must be text, got .*; put it in quotes"):
            checks.check_settings(run_config.resolved([NANO, f"{key}={text}"]))
        checks.check_settings(run_config.resolved([NANO, f"{key}='{text}'"]))


def test_a_logger_without_its_key_is_found_before_work(tmp_path, capsys, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = [NANO, "--dry-run"]
    assert TRAIN.main([*run, "loggers.wandb.project=p"]) == 1
    assert re.search("loggers.wandb must be given a key.*WANDB_MODE=offline", capsys.readouterr().err)
    for name, value in (("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "offline")):  # as the message says
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert TRAIN.main([*run, "loggers.wandb.project=p", "loggers.mlflow={}"]) == 0


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, capsys):
    for name, text in (("broken.yaml", "a: [1\n"), ("list.yaml", "- 1\n")):
        (tmp_path / name).write_text(text)
    for args, words in (
            ([], ["no recipe given", "usage"]), (["nano.yaml"], ["nano.yaml: no such file", "yamls/nano.yaml"]),
            ([NANO, "variables.gloabl_batch=4"], ["variables.gloabl_batch", "did you mean global_batch?"]),
            ([NANO, EXTEND], ["variables.source: no value given", "variables.source=..."]),
            ([NANO, "seed=${variables.sede}"], ["nano.yaml", "variables.sede"]),
            ([NANO, "seed=${oc.env:HOME}"], ["nano.yaml", "oc.env"]),
            ([NANO, "modle.size=17m"], ["modle: unknown key", "did you mean model?"]),
            ([NANO, "callbacks.ettin_sampels={}"], ["callbacks", "did you mean ettin_samples?"]),
            ([NANO, "loggers.wandbb={}"], ["loggers.wandbb must be one of", "did you mean wandb?"]),
            ([f"{tmp_path}/broken.yaml"], [f"{tmp_path}/broken.yaml", "not valid YAML"]),
            ([f"{tmp_path}/list.yaml"], [f"{tmp_path}/list.yaml", "not keys and values"])):
        assert TRAIN.main([*args, "--dry-run"]) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1
        assert all(word in err for word in words), err


def test_a_dry_run_says_what_would_run_and_starts_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmfoundry.command_utils", None)  # importing it would raise
    monkeypatch.chdir(tmp_path)
    assert TRAIN.main([str(nano_run.ROOT / "yamls/ettin-dec-400m.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    for words in ("395,881,664 parameters", "not on this machine: tokenizer.name: 'data/pretrain/tokenizer'"):
        assert words in out
    assert not list(tmp_path.iterdir())
    assert TRAIN.main(["--help"]) == 0 and "RECIPE.yaml [OVERLAY.yaml ...] [KEY=VALUE ...]" in capsys.readouterr().out
    assert TRAIN.main([NANO, f"variables.data={tmp_path}/none"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_an_error_of_the_package_in_a_run_is_one_line_others_a_traceback(data_set, tmp_path, capsys, monkeypatch):
    import llmfoundry.command_utils as host

    from ettin_foundry.training.run_config import parse_time

    monkeypatch.setattr(host, "train", lambda cfg: parse_time("seed", cfg.seed))
    run = [NANO, f"variables.data={data_set}", "variables.max_seq_len=64", f"variables.save_root={tmp_path}"]
    assert TRAIN.main([*run, "seed=5"]) == 1
    assert "error: seed must be" in capsys.readouterr().err
    monkeypatch.setattr(host, "train", lambda cfg: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        TRAIN.main(run)
