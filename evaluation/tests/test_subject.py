"""What may be evaluated, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
from ettin_eval.main import main
from ettin_eval.subject import read_subject


def test_a_folder_says_its_kind_objective_and_pooling(folders):
    found = {name: read_subject(str(folder)) for name, folder in folders.items()}
    assert {name: (each.kind, each.objective, each.pooling) for name, each in found.items()} == {
        "mlm": ("encoder", "mlm", "mean"), "mntp": ("encoder", "mntp", "mean"), "clm": ("decoder", "clm", "lasttoken")}
    assert {each.max_length for each in found.values()} == {128}


def test_an_encoder_of_unknown_objective_is_taken_by_its_name_or_by_the_option(folders, tmp_path, caplog):
    copy = shutil.copytree(folders["mntp"], tmp_path / "ettin-enc-from-dec-17m")
    config = json.loads((copy / "config.json").read_text())
    del config["ettin_foundry"]
    (copy / "config.json").write_text(json.dumps(config))
    assert read_subject(str(copy)).objective == "mntp"
    assert "taken as mntp by its name" in caplog.text
    assert read_subject(str(copy), objective="mlm").objective == "mlm"


def test_bad_models_are_refused_by_one_line(folders, tmp_path, capsys):
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--out", str(tmp_path / "out.json")])
        assert stopped.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        return next(line for line in lines if line.startswith("error: "))

    (tmp_path / "empty").mkdir()
    assert "MODEL must be a folder with a config.json" in refused(str(tmp_path / "empty"))
    assert "MODEL must be an exported folder or a hub id" in refused("nobody/nothing-of-the-kind")
    assert "--objective must be clm for a decoder, got mlm" in refused(str(folders["clm"]), "--objective", "mlm")
    assert "--objective must be mntp" in refused(str(folders["mntp"]), "--objective", "mlm")
    assert "--suite must be one of quick, " in refused(str(folders["mlm"]), "--suite", "glew")
    small = shutil.copytree(folders["mlm"], tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    assert "belongs to another model" in refused(str(small))
    headless = shutil.copytree(folders["mlm"], tmp_path / "headless")
    (headless / "config.json").write_text(json.dumps({**config, "architectures": ["ModernBertModel"]}))
    assert "export the model with its head" in refused(str(headless))


def test_a_folder_without_a_card_is_evaluated_with_a_warning(folders, tmp_path, caplog):
    bare = shutil.copytree(folders["mlm"], tmp_path / "bare", ignore=shutil.ignore_patterns("README.md"))
    assert read_subject(str(bare)).kind == "encoder"
    assert "has no card" in caplog.text
