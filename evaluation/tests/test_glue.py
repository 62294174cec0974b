"""GLUE on small made sets in the layout of --data: metrics by hand, folds by scikit-learn, the grid's held-out part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from ettin_eval import glue
from ettin_eval.finetune import embed, token_rows
from ettin_eval.subject import read_subject
from ettin_eval.tasks import Settings
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

WORDS = "tree plant capital France Paris is a the of good".split()


def write_set(root: Path, name: str, splits: dict[str, int], **changed: Any) -> Path:
    """A GLUE task whose first word tells the class."""
    task = glue.GLUE[name]
    for split, count in splits.items():
        labels = [each % task.classes if task.classes > 1 else each / 3 for each in range(count)]
        columns = {column: [f"{WORDS[int(label)]} {WORDS[place % 7]} {column}" for place, label in enumerate(labels)]
                   for column in task.texts}
        Dataset.from_dict({**columns, "label": labels, **changed}).save_to_disk(root / "glue" / name / split)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name, task in glue.GLUE.items():
        write_set(folder, name, {"train": 24, **dict.fromkeys(task.splits, 12)})
    return folder


def test_metrics_by_hand() -> None:
    true, said = np.array([1] * 6 + [0] * 4), np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])  # tp 4, fn 2, fp 1, tn 3
    found = {each.metric: each for each in glue.scores_of("t", ("accuracy", "f1", "matthews"), true, said)}
    assert found["accuracy"].value == pytest.approx(0.7) and found["accuracy"].items == tuple((true == said) * 1.0)
    assert found["f1"].value == pytest.approx(2 * 4 / (2 * 4 + 1 + 2))
    assert found["matthews"].value == pytest.approx((4 * 3 - 1 * 2) / (5 * 6 * 4 * 5) ** 0.5)
    x, y = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 5.0, 3.0, 9.0])
    pearson, spearman = (each.value for each in glue.scores_of("t", ("pearson", "spearman"), x, y))
    assert pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman == pytest.approx(1 - 6 * (0 + 1 + 4 + 1) / (4 * 15))  # ranks 1 2 4 3 and 1 3 2 4


def test_the_error_of_f1_is_that_of_resampled_items() -> None:
    rng = np.random.default_rng(1)
    true = rng.integers(0, 2, 400)
    said = np.where(rng.random(400) < 0.8, true, 1 - true)
    score = glue.scores_of("t", ("f1",), true, said)[0]
    # many sets of 400 drawn from the same distribution; 200 resamples know a deviation to about 5%, the set to 10%
    drawn = []
    for _ in range(150):
        other = rng.integers(0, 2, 400)
        drawn.append(glue.STATISTICS["f1"](other, np.where(rng.random(400) < 0.8, other, 1 - other)))
    assert score.stderr == pytest.approx(float(np.std(drawn)), rel=0.3)


@pytest.mark.parametrize("name", list(glue.GLUE))
def test_each_task_trains_and_reports_glues_metrics(folders: dict[str, Path], root: Path, name: str) -> None:
    subject = read_subject(str(folders["clm" if name in ("sst2", "mnli") else "mlm"]))
    scores = glue.train_and_score(name, subject, Settings(data=root, lr=1e-3))
    task = glue.GLUE[name]
    suffixes = ["_matched", "_mismatched"] if name == "mnli" else [""]
    assert [each.metric for each in scores] == [metric + suffix for suffix in suffixes for metric in task.metrics]
    assert all(each.n == 12 and each.settings["lr"] == 1e-3 and each.settings["trained_on"] == 24 for each in scores)


def test_a_probe_equals_scikit_learns_cross_validation(folders: dict[str, Path], tmp_path: Path) -> None:
    subject, count = read_subject(str(folders["clm"])), 40
    noisy = np.random.default_rng(0).integers(0, 2, count).tolist()
    settings = Settings(data=write_set(tmp_path, "sst2", {"validation": count}, label=noisy), seed=3)
    score = glue.fold_scores("sst2", False, subject, settings)[0]
    texts = [f"{WORDS[place % 2]} {WORDS[place % 7]} sentence" for place in range(count)]
    states = embed(subject, settings, token_rows(subject, [(text,) for text in texts]))
    theirs = cross_val_predict(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), states, noisy,
                               cv=StratifiedKFold(5, shuffle=True, random_state=3))
    assert score.items == tuple((theirs == noisy) * 1.0) and 0 < score.value < 1


def test_fine_tuned_folds_never_train_on_what_they_predict(
        folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[Any], list[Any]]] = []
    monkeypatch.setattr(glue, "fit", lambda subject, settings, rows, *rest: seen.append((rows, [])) or len(seen) - 1)
    monkeypatch.setattr(glue, "predict", lambda model, rows, size: seen[model][1].extend(rows) or np.eye(2)[
        np.zeros(len(rows), int)])
    words = [f"{place} item" for place in range(30)]
    data = write_set(tmp_path, "sst2", {"validation": 30}, sentence=words)
    subject = read_subject(str(folders["mlm"]))
    glue.fold_scores("sst2", True, subject, Settings(data=data))
    rows = token_rows(subject, [(word,) for word in words])
    assert sorted(row for _, tested in seen for row in tested) == sorted(rows) and len(seen) == 3
    assert all(not [row for row in tested if row in trained] for trained, tested in seen)


def test_the_grid_is_searched_on_train_and_goes_on_where_it_stopped(
        folders: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[tuple[float, int]] = []
    real = glue.fit

    def counted(subject: Any, settings: Any, rows: Any, labels: Any, classes: int, recipe: Any) -> Any:
        fits.append((recipe.lr, len(rows)))
        if len(fits) == 2:
            raise KeyboardInterrupt
        return real(subject, settings, rows, labels, classes, recipe)

    monkeypatch.setattr(glue, "fit", counted)
    settings = Settings(data=root, work=tmp_path, grid={"lr": [3e-3, 1e-9], "epochs": [4]})
    subject = read_subject(str(folders["mlm"]))
    with pytest.raises(KeyboardInterrupt):
        glue.train_and_score("rte", subject, settings)
    score = glue.train_and_score("rte", subject, settings)[0]
    # each point on 22 of 24 (a tenth, 2, is held out); the first point once; then the best on all 24
    best = score.settings["lr"]
    assert fits == [(3e-3, 22), (1e-9, 22), (1e-9, 22), (best, 24)]
    assert score.settings["searched"] == 2 and score.settings["held_out"] == 2 and best in (3e-3, 1e-9)


def test_what_cannot_be_scored_is_refused(folders: dict[str, Path], root: Path, tmp_path: Path) -> None:
    subject = read_subject(str(folders["mlm"]))
    only = Settings(data=write_set(tmp_path / "a", "sst2", {"validation": 12}))
    with pytest.raises(ValueError, match=r"glue/sst2/train"):
        glue.train_and_score("sst2", subject, only)
    hidden = write_set(tmp_path / "b", "sst2", {"validation": 12, "train": 12}, label=[-1] * 12)
    with pytest.raises(ValueError, match=r"hidden"):
        glue.train_and_score("sst2", subject, Settings(data=hidden))
    with pytest.raises(ValueError, match=r"5 items of each class, got 2"):
        glue.fold_scores("sst2", False, subject, Settings(data=root, limit=4))
    for text, message in (("rate: [1]", "lists of lr, wd"), ("lr: 1.0", "lr must be a list"),
                          ("epochs: [1.5]", "positive integers")):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            glue.read_grid(str(tmp_path / "grid.yaml"))
    with pytest.raises(ValueError, match="must be modernbert or"):
        glue.read_grid("all")
