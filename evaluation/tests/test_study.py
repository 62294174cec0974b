"""A study on made scores: intervals and verdicts are those of the differences that were put in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from ettin_eval.main import main
from ettin_eval.results import mean_score
from ettin_eval.study import compare, read_study, run_study, show
from ettin_eval.suites import SUITES
from ettin_eval.tasks import chosen

BASE = {"name": "made", "suite": "suite.yaml", "seeds": [1, 2, 3], "models": ["encoder", "decoder"],
        "tasks": {"classification": ["a", "b"], "generation": ["c"]},
        "claims": [{"claim": "encoders classify better", "source": "x", "better": "encoder", "worse": "decoder",
                    "kind": "classification"},
                   {"claim": "encoders generate better", "source": "x", "better": "encoder", "worse": "decoder",
                    "kind": "generation"}]}


def write(tmp_path, **changes):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**BASE, "root": str(tmp_path / "out"), **changes}))
    return path


def made_scores(seeds, rates):
    """Accuracies of `rates[model][task]`, the same items hard for both models."""
    generator = np.random.default_rng(0)
    hard = {task: generator.random(300) for task in "abc"}
    return {model: {task: [mean_score(task, "acc", (hard[task] < rate).astype(float)) for _ in seeds]
                    for task, rate in tasks.items()} for model, tasks in rates.items()}


def test_verdicts_are_those_of_the_differences(tmp_path):
    study = read_study(write(tmp_path, draws=2000))
    found = compare(study, made_scores(study.seeds, {"encoder": {"a": 0.8, "b": 0.6, "c": 0.5},
                                                     "decoder": {"a": 0.7, "b": 0.5, "c": 0.7}}))
    assert [claim["verdict"] for claim in found["claims"]] == ["holds", "does not"]
    assert found["claims"][0]["low"] < found["claims"][0]["difference"] < found["claims"][0]["high"]
    assert found["claims"][0]["n"] == 600
    means = {task["task"]: task["mean"] for task in found["tasks"]}
    # 300 draws of a rate: a standard error of at most 0.029
    assert means["a"]["encoder"]["value"] == pytest.approx(0.8, abs=0.09)
    same = compare(study, made_scores(study.seeds, {model: dict.fromkeys("abc", 0.5) for model in study.models}))
    assert [claim["verdict"] for claim in same["claims"]] == ["undecided"] * 2


def test_of_bits_less_is_better_and_those_of_another_protocol_are_not_compared(tmp_path):
    models = ["encoder", "decoder", "crossed"]
    claims = [{"claim": "made", "source": "x", "better": better, "worse": "crossed", "kind": "text"}
              for better in models[:2]]
    study = read_study(write(tmp_path, models=models, tasks={"text": ["bits"]}, claims=claims, draws=500))
    draws = np.random.default_rng(0).normal(2.0, 0.1, (3, 300))
    scores = {model: {"bits": [mean_score("bits", metric, list(row + more)) for row in draws]} for model, metric, more
              in (("encoder", "pseudo_bits_per_byte", 0), ("decoder", "bits_per_byte", 0),
                  ("crossed", "bits_per_byte", 0.5))}
    found = compare(study, scores)
    assert [claim["verdict"] for claim in found["claims"]] == ["not comparable: the metrics differ", "holds"]
    assert found["claims"][1]["difference"] == pytest.approx(0.5) and found["claims"][1]["unit"] == "bits"
    assert [(task["metric"], list(task["mean"])) for task in found["tasks"]] == [
        ("pseudo_bits_per_byte", ["encoder"]), ("bits_per_byte", ["decoder", "crossed"])]
    shown = []
    show({**found, "models": models}, shown.append)
    assert [bool(cell) for cell in shown[0].columns[3].cells] == [True, False]
    assert list(shown[1].columns[1].cells) == ["", "+0.50 [+0.50, +0.50] bits"]


@pytest.mark.parametrize("changes, message", [
    ({"seeds": []}, "seeds: .*, got \\[\\]; keys are name, root, suite"),
    ({"seeds": [1, 1]}, "seeds must differ"),
    ({"model": 1}, "model: Extra inputs are not permitted"),
    ({"claims": [{**BASE["claims"][0], "better": "coder"}]}, "claims must be about encoder, decoder, got coder"),
    ({"claims": [{**BASE["claims"][0], "kind": "speed"}]}, "claims.kind must be one of classification, generation"),
])
def test_bad_files_are_refused_by_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_study(write(tmp_path, **changes))


def test_quick_replaces_keys_and_has_a_folder_of_its_own(tmp_path):
    path = write(tmp_path, quick={"seeds": [7], "draws": 100})
    study = read_study(path, quick=True)
    assert study.seeds == (7,) and study.draws == 100 and study.root.name == "out-quick"
    assert read_study(path).seeds == (1, 2, 3)


FAKE = """#!{python}
import json, pathlib, sys
words = dict(word.split("=", 1) for word in sys.argv[3:] if "=" in word)
if "--json" in sys.argv:
    print(json.dumps({{"stages": [{{"name": "one", "max_duration": "1000tok"}}]}}))
elif words["variables.seed"] == "{broken}":
    print("error: no disk", file=sys.stderr)
    raise SystemExit(3)
else:
    pathlib.Path(words["root"], "models").mkdir(parents=True, exist_ok=True)
"""


def test_a_suite_that_fails_stops_the_study_with_its_words(tmp_path, capsys):
    fake = tmp_path / "ettin"
    fake.write_text(FAKE.format(python=sys.executable, broken=2))
    fake.chmod(0o755)
    study = read_study(write(tmp_path, ettin=str(fake)))
    with pytest.raises(ValueError, match="seed 2 failed with exit code 3: .* suite suite.yaml variables.seed=2"):
        run_study(study, "made")
    said = capsys.readouterr().err
    assert "3 suites of 1 runs, 0.0M tokens" in said and "seed 2: error: no disk" in said
    assert (tmp_path / "out/seed-1/models").is_dir() and not (tmp_path / "out/seed-3").exists()


def test_a_study_of_finished_models_is_written_and_printed(tmp_path, capsys, folders):
    """Evaluations are those of an earlier call: whole files are not made again."""
    fake = tmp_path / "ettin"
    fake.write_text(FAKE.format(python=sys.executable, broken="none"))
    fake.chmod(0o755)
    path = write(tmp_path, ettin=str(fake), tasks={"classification": ["module_of_snippet_probe"]}, seeds=[1, 2],
                 claims=BASE["claims"][:1], workers=2)
    for seed in (1, 2):
        for model, objective in (("encoder", "mlm"), ("decoder", "clm")):
            root = tmp_path / "out" / f"seed-{seed}"
            (root / "eval").mkdir(parents=True, exist_ok=True)
            (root / "models").mkdir(exist_ok=True)
            (root / "models" / model).symlink_to(folders[objective])
            kind = "encoder" if objective == "mlm" else "decoder"
            score = mean_score("module_of_snippet_probe", "acc", [kind == "encoder", 1.0, 0.0])
            (root / "eval" / f"{model}.json").write_text(json.dumps({
                "model": str(root / "models" / model), "revision": None, "kind": kind, "objective": objective,
                "settings": {"limit": None, "seed": 0, "protocol": "pseudo"}, "created": "2026-01-01",
                "tasks": {"module_of_snippet_probe": {
                    "seconds": 1.0, "scores": [score.model_dump(exclude_none=True)]}}}))
    with pytest.raises(SystemExit) as stopped:
        main(["study", str(path)])
    assert stopped.value.code == 0
    content = json.loads((tmp_path / "out/study.json").read_text())
    assert content["tokens"] == {"one": 1000} and content["models"] == ["encoder", "decoder"]
    assert content["claims"][0]["difference"] == pytest.approx(1 / 3)
    assert "encoders classify better" in capsys.readouterr().out


@pytest.mark.parametrize("quick", [False, True])
def test_the_study_of_the_repository_names_tasks_that_there_are(quick):
    root = Path(__file__).resolve().parents[2]
    study = read_study(root / "study/nano.yaml", quick)
    names = [name for tasks in study.tasks.values() for name in tasks]
    assert [task.name for task in chosen(SUITES, None, names)] == names
    assert (root / study.suite).is_file() and len(study.seeds) >= 3
