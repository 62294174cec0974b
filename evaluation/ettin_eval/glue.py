"""Classification: fine-tuning on GLUE, both kinds alike (`ettin_eval.finetune` has the policy).

The suite `glue` trains on each task's training set and reports its validation set (the test set's labels are not
public), with the settings of ModernBERT's mirror job. `--grid modernbert` searches ModernBERT's grid on a tenth of the
training set, never on validation, and trains the best on all of it. RTE, MRPC and STS-B begin from the pretrained
weights, not from the best MNLI checkpoint.

Without training sets: `..._probe` and `..._finetune` predict each validation item once, by a model that learned from
the other folds. A probe is a logistic regression on frozen states.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from sklearn.model_selection import StratifiedKFold

from ettin_eval import data as sets
from ettin_eval.finetune import HEAD, Recipe, embed, fit, predict, probe, small_recipe, token_rows
from ettin_eval.results import Score, mean_score
from ettin_eval.subject import Subject
from ettin_eval.tasks import Settings, Task

SET = "nyu-mll/glue"
FOLDS = {False: 5, True: 3}   # of a probe, of fine-tuning, which costs more
FOLD_EPOCHS = 3


@dataclass(frozen=True)
class Glue:
    """A task. texts: its columns. classes: 1 is a regression. metrics: GLUE's. recipe: of ModernBERT's mirror job."""

    texts: tuple[str, ...]
    classes: int
    metrics: tuple[str, ...]
    recipe: Recipe
    splits: tuple[str, ...] = ("validation",)


GLUE = {
    "cola": Glue(("sentence",), 2, ("matthews",), Recipe(5e-5, 5e-6, 10)),
    "sst2": Glue(("sentence",), 2, ("accuracy",), Recipe(3e-5, 3e-6, 3)),
    "mrpc": Glue(("sentence1", "sentence2"), 2, ("accuracy", "f1"), Recipe(8e-5, 8e-6, 10)),
    "stsb": Glue(("sentence1", "sentence2"), 1, ("pearson", "spearman"), Recipe(3e-5, 3e-6, 10)),
    "qqp": Glue(("question1", "question2"), 2, ("accuracy", "f1"), Recipe(3e-5, 3e-6, 5)),
    "mnli": Glue(("premise", "hypothesis"), 3, ("accuracy",), Recipe(5e-5, 5e-6, 3),
                 ("validation_matched", "validation_mismatched")),
    "qnli": Glue(("question", "sentence"), 2, ("accuracy",), Recipe(1e-5, 1e-6, 10)),
    "rte": Glue(("sentence1", "sentence2"), 2, ("accuracy",), Recipe(1e-5, 1e-5, 3)),
}
MODERNBERT_GRID = {"lr": [1e-5, 3e-5, 5e-5, 8e-5, 1e-4], "wd": [1e-6, 5e-6, 8e-6, 1e-5], "batch": [16, 32]}
MODERNBERT_EPOCHS = {True: [1, 2, 3, 4], False: [2, 5, 10, 12]}   # True: MNLI, SST-2, RTE
STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda true, said: float(np.mean(true == said)),
    "f1": lambda true, said: float(f1_score(true, said, zero_division=0.0)),  # type: ignore[arg-type]
    "matthews": lambda true, said: float(matthews_corrcoef(true, said)),
    "pearson": lambda true, said: float(pearsonr(true, said).statistic),  # type: ignore[union-attr]
    "spearman": lambda true, said: float(spearmanr(true, said).statistic),  # type: ignore[union-attr]
}


def scores_of(task: str, metrics: Sequence[str], true: np.ndarray, said: np.ndarray, suffix: str = "",
              **settings: Any) -> list[Score]:
    """GLUE's metrics of the predictions. true, said: (n,), classes or values of a regression.

    The standard error of an accuracy is that of a mean; the others' is the standard deviation over 200 resamples of the
    items. suffix: of the metric's name.
    """
    scores, draws = [], np.random.default_rng(0).integers(0, len(true), (200, len(true)))
    for metric in metrics:
        name = metric + suffix
        if metric == "accuracy":
            scores.append(mean_score(task, name, (true == said).astype(float).tolist(), **settings))
            continue
        statistic = STATISTICS[metric]
        resampled = [statistic(true[each], said[each]) for each in draws]
        scores.append(Score(task=task, metric=name, value=statistic(true, said), n=len(true),
                            stderr=float(np.nanstd(resampled, ddof=1)), settings=settings))
    return scores


def items_of(name: str, split: str, subject: Subject, settings: Settings) -> tuple[list[list[int]], np.ndarray]:
    """Rows of ids and labels of a split; `--limit` takes its first items.

    Raises:
        ValueError: the split is missing or empty, or its labels are hidden.
    """
    task, loaded = GLUE[name], sets.load(settings.data, SET, name, split)
    loaded = loaded.select(range(min(settings.limit or len(loaded), len(loaded))))
    labels = np.array(loaded["label"], dtype=np.float64 if task.classes == 1 else np.int64)
    if task.classes > 1 and not (0 <= labels.min() and labels.max() < task.classes):
        raise ValueError(f"label of {name}/{split} must be 0 to {task.classes - 1}, got {labels.min()} to "
                         f"{labels.max()}; the labels of GLUE's test sets are hidden, take train and validation")
    texts = list(zip(*(loaded[column] for column in task.texts), strict=True))
    return token_rows(subject, texts), labels


def train_and_score(name: str, subject: Subject, settings: Settings) -> list[Score]:
    """Fine-tunes on the training set, with the mirror job's settings or the best of the grid; scores validation."""
    task = GLUE[name]
    tests = {split: items_of(name, split, subject, settings) for split in task.splits}
    rows, labels = items_of(name, "train", subject, settings)
    recipe, searched = task.recipe, {}
    if settings.grid:
        recipe, searched = _search(name, subject, settings, rows, labels)
    elif settings.lr:
        recipe = replace(recipe, lr=settings.lr)
    model = fit(subject, settings, rows, labels.tolist(), task.classes, recipe)
    scores = []
    for split, (test_rows, true) in tests.items():
        said = _said(task, predict(model, test_rows, settings.batch_tokens))
        suffix = split.removeprefix("validation")
        scores += scores_of(f"glue_{name}", task.metrics, true, said, suffix, **recipe.facts(), **searched,
                            trained_on=len(rows), head=HEAD, pooling=subject.pooling)
    return scores


def missing(name: str, splits: Sequence[str], settings: Settings) -> str | None:
    """Why the task cannot be run; None where it can."""
    there = sets.splits(settings.data, SET, name) if settings.data else splits
    if lacking := [split for split in splits if split not in there]:
        return (f"it needs glue/{name}/{' and '.join(lacking)}, got {settings.data} with {', '.join(there) or 'none'} "
                "of it; leave --data out to read the hub")
    return None


def _said(task: Glue, logits: np.ndarray) -> np.ndarray:
    return logits[:, 0] if task.classes == 1 else logits.argmax(1)


def read_grid(given: str | None) -> dict[str, list[Any]] | None:
    """`modernbert`, or a YAML file of lists: any of lr, wd, epochs, batch. What it leaves out is the task's own.

    Raises:
        ValueError: another key, or a value that is no list of positive numbers.
    """
    if given is None or given == "modernbert":
        return MODERNBERT_GRID if given else None
    if not Path(given).is_file():
        raise ValueError(f"--grid must be modernbert or a YAML file, got {given}")
    grid = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
    known = Recipe.__dataclass_fields__
    if not isinstance(grid, dict) or not grid or set(grid) - set(known):
        raise ValueError(f"--grid must hold lists of {', '.join(known)}, got {grid}")
    for key, values in grid.items():
        kinds = int if key in ("epochs", "batch") else (int, float)
        if not isinstance(values, list) or not values or any(not isinstance(each, kinds) or each <= 0
                                                             for each in values):
            raise ValueError(f"--grid: {key} must be a list of positive {'integers' if kinds is int else 'numbers'}, "
                             f"got {values}; write 5.0e-5, not 5e-5")
    return grid


def _search(name: str, subject: Subject, settings: Settings, rows: list[list[int]],
            labels: np.ndarray) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the best mean of the task's metrics on a held-out tenth of train (at most 5,000 items).

    What has been tried is in WORK/glue_NAME-grid.json: a killed search goes on.
    """
    task, grid = GLUE[name], dict(settings.grid or {})
    if settings.grid == MODERNBERT_GRID:
        grid["epochs"] = MODERNBERT_EPOCHS[name in ("mnli", "sst2", "rte")]
    recipes = [replace(task.recipe, **dict(zip(grid, point, strict=True)))
               for point in itertools.product(*grid.values())]
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    held = min(max(len(rows) // 10, 1), 5000)
    if len(rows) < 2:
        raise ValueError(f"train of {name} must have at least 2 items for a search, got {len(rows)}")
    file = settings.work / f"glue_{name}-grid.json"
    tried = json.loads(file.read_text()) if file.exists() else {}
    for recipe in recipes:
        key = json.dumps(recipe.facts())
        if key in tried:
            continue
        model = fit(subject, settings, [rows[each] for each in order[held:]], labels[order[held:]].tolist(),
                    task.classes, recipe)
        said = _said(task, predict(model, [rows[each] for each in order[:held]], settings.batch_tokens))
        figures = [STATISTICS[metric](labels[order[:held]], said) for metric in task.metrics]
        tried[key] = float(np.nan_to_num(np.mean(figures), nan=-1.0))  # a constant prediction has no correlation
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(tried, indent=1) + "\n")
    best = max(recipes, key=lambda recipe: tried[json.dumps(recipe.facts())])
    return best, {"searched": len(recipes), "held_out": held, "held_out_score": tried[json.dumps(best.facts())]}


def fold_scores(name: str, tuned: bool, subject: Subject, settings: Settings) -> list[Score]:
    """Validation items only: each predicted once, by a probe or a fine-tuned model of the other folds."""
    task, label = GLUE[name], f"{name}_{'finetune' if tuned else 'probe'}"
    rows, labels = items_of(name, task.splits[0], subject, settings)
    least = min(np.bincount(labels, minlength=task.classes))
    count = FOLDS[tuned]
    if least < count:
        raise ValueError(f"{label} must have at least {count} items of each class, got {least}; raise --limit")
    folds = StratifiedKFold(count, shuffle=True, random_state=settings.seed).split(np.zeros(len(labels)), labels)
    recipe, said = small_recipe(subject, settings, FOLD_EPOCHS), np.full(len(labels), -1)
    states = None if tuned else embed(subject, settings, rows)
    for train, test in folds:
        if states is None:
            model = fit(subject, settings, [rows[each] for each in train], labels[train].tolist(), task.classes, recipe,
                        "mean")
            said[test] = predict(model, [rows[each] for each in test], settings.batch_tokens).argmax(1)
        else:
            said[test] = probe(states[train], labels[train], states[test])
    how = {"pooling": "mean", **({**recipe.facts(), "head": HEAD} if tuned else {})}
    return scores_of(label, task.metrics, labels, said, folds=count,
                     majority=float(np.bincount(labels).max() / len(labels)), **how)


TASKS: list[Task] = [
    Task(f"glue_{name}", partial(train_and_score, name), f"fine-tuning, {' and '.join(task.metrics)}",
         missing=partial(missing, name, ("train", *task.splits)))
    for name, task in GLUE.items()]
QUICK: list[Task] = [
    Task(f"{name}_{'finetune' if tuned else 'probe'}", partial(fold_scores, name, tuned),
         f"{'fine-tuning' if tuned else 'logistic regression on frozen states'}, {FOLDS[tuned]} folds of validation",
         missing=partial(missing, name, ("validation",)))
    for name in ("sst2", "rte", "mrpc") for tuned in (False, True)]
