"""Tasks from the standard library: what they hold, and nDCG against scikit-learn's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from ettin_eval import code_tasks
from ettin_eval.subject import read_subject
from ettin_eval.tasks import Settings
from sklearn.metrics import ndcg_score


def test_ndcg_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(60, 6))
    documents = queries + rng.normal(size=(60, 6))
    similarity = (queries / np.linalg.norm(queries, axis=1)[:, None]) @ (
        documents / np.linalg.norm(documents, axis=1)[:, None]).T
    theirs = [ndcg_score(np.eye(60)[[place]], similarity[[place]], k=10) for place in range(60)]
    found = code_tasks.ndcg_at_10(queries, documents)
    np.testing.assert_allclose(found, theirs)
    assert len(set(found.tolist())) > 5   # ranks of many kinds
    assert not code_tasks.ndcg_at_10(np.ones((60, 6)), np.ones((60, 6))).any()   # vectors that tell nothing apart


def test_snippets_hide_their_module_and_keep_train_and_test_apart() -> None:
    train, test = code_tasks.snippets()
    assert len(train) == 24 * 20 and len(test) == 14 * 20
    origin: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for each in code_tasks.stdlib_functions():
        if each.module in code_tasks.MODULES:
            key = code_tasks.masked(each.source, each.module), code_tasks.MODULES.index(each.module)
            origin.setdefault(key, set()).add((each.file, each.top))
    for label, module in enumerate(code_tasks.MODULES):
        places = [[origin[item] for item in items if item[1] == label] for items in (train, test)]
        files = {file for side in places for each in side for file, _ in each}
        for one in places[0]:
            for other in places[1]:
                assert not one & other, module
        trained = {file for each in places[0] for file, _ in each}
        tested = {file for each in places[1] for file, _ in each}
        assert len(files) == 1 or not trained & tested, module
    for text, label in train + test:
        assert code_tasks.MODULES[label].removeprefix("_py") not in text.lower()
        assert not [line for line in text.splitlines() if line.split()[:1] in (["import"], ["from"])]


def test_pairs_come_from_different_modules_and_hold_no_docstring() -> None:
    train, test = code_tasks.pairs()
    assert len(train) == 600 and len(test) == 300
    home = {}
    for each in code_tasks.stdlib_functions():
        home.setdefault("\n".join(each.body.splitlines()[:code_tasks.LINES[1]]), each.module)
    assert not {home[body] for _, body in train} & {home[body] for _, body in test}
    for query, body in train + test:
        assert query not in " ".join(body.split())
    for side in (0, 1):
        assert len({pair[side] for pair in train + test}) == 900


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_the_tasks_run_on_both_kinds_and_repeat(folders: dict[str, Path], name: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tasks, "SNIPPETS", (4, 3))
    monkeypatch.setattr(code_tasks, "PAIRS", (40, 20, 15))
    monkeypatch.setattr(code_tasks, "EPOCHS", 1)
    for made in ("snippets", "pairs"):
        monkeypatch.setattr(code_tasks, made, getattr(code_tasks, made).__wrapped__)
    subject, settings = read_subject(str(folders[name])), Settings(seed=5)
    for task in code_tasks.TASKS:
        score, = task.run(subject, settings)
        assert score.n == len(score.items or ()) == (60 if "module" in task.name else 20)
        assert score.settings["python"] == "{}.{}.{}".format(*sys.version_info[:3])
        assert len(score.settings["data"]) == 16
        assert score.settings["pooling"] == "mean"
        assert task.run(subject, settings) == [score]


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_tasks.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="take a Python that has them"):
        code_tasks.stdlib_functions.__wrapped__()
