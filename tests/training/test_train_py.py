"""train.py: files merge left to right, blocks that change their name are replaced, mistakes are one clear line."""

import sys

import nano_run
import pytest

TRAIN = nano_run.program()
NANO = str(nano_run.ROOT / "yamls/nano.yaml")
EXTEND = str(nano_run.ROOT / "yamls/phases/extend.yaml")


def test_a_block_that_changes_its_name_keeps_nothing_of_the_old_one():
    base = {"scheduler": {"name": "warmup_stable_decay", "t_warmup": "1tok"}, "optimizer": {"name": "a", "lr": 1}}
    over = {"scheduler": {"name": "one_minus_sqrt", "alpha_f": 0.5}, "optimizer": {"lr": 2}}
    assert TRAIN.merge(base, over) == {"scheduler": {"name": "one_minus_sqrt", "alpha_f": 0.5},
                                       "optimizer": {"name": "a", "lr": 2}}
    assert "t_warmup" not in TRAIN.configure([NANO, EXTEND, "variables.source=x"])["scheduler"]
    assert TRAIN.merge({"load_path": "x"}, {"load_path": "???"}) == {"load_path": "x"}  # a missing value hides none


def test_later_files_win_and_the_command_line_wins_over_files(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("variables: {n: 1}\na: ${variables.n}\nb: 1\nc: 1\n")
    second.write_text("variables: {n: 2}\nb: 2\nc: 2\n")
    # interpolations are resolved after merging, wherever key=value stands
    assert dict(TRAIN.configure([str(first), "c=3", str(second)])) == {"variables": {"n": 2}, "a": 2, "b": 2, "c": 3}
    assert TRAIN.configure([str(second), str(first)])["b"] == 1
    assert TRAIN.configure([str(first), "variables.n=7"])["a"] == 7


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path, capsys):
    for name, text in (("broken.yaml", "a: [1\n"), ("list.yaml", "- 1\n")):
        (tmp_path / name).write_text(text)
    for args, words in (
            ([], ["no recipe given", "usage"]), (["nano.yaml"], ["nano.yaml: no such file", "yamls/nano.yaml"]),
            ([NANO, "variables.gloabl_batch=4"], ["variables.gloabl_batch", "no such variable", "global_batch"]),
            ([NANO, EXTEND], ["variables.source: no value given", "variables.source=..."]),
            ([NANO, "seed=${variables.sede}"], ["nano.yaml", "variables.sede"]),
            ([NANO, "seed=${oc.env:HOME}"], ["nano.yaml", "oc.env"]),
            ([NANO, "max_duration=1ep"], ["max_duration must be", "'1ep'"]),
            ([NANO, "modle.size=17m"], ["modle: unknown key", "model"]),
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
    assert TRAIN.main([NANO, f"variables.data={tmp_path}/none"]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_an_error_of_the_package_in_a_run_is_one_line_and_of_others_a_traceback(data_set, tmp_path, capsys, monkeypatch):
    import llmfoundry.command_utils as host

    from ettin_foundry.training.run_config import parse_time

    monkeypatch.setattr(host, "train", lambda cfg: parse_time("seed", cfg.seed))
    run = [NANO, f"variables.data={data_set}", "variables.max_seq_len=64", f"variables.save_root={tmp_path}"]
    assert TRAIN.main([*run, "seed=5"]) == 1
    assert "error: seed must be" in capsys.readouterr().err
    monkeypatch.setattr(host, "train", lambda cfg: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        TRAIN.main(run)
