"""Tasks made from the standard library of the running Python: they need no data and no network.

`module_of_snippet`: which of 20 modules a function is from. Train and test share no file, or no top-level class or
function where a module is one file. Taken out of a snippet: import lines, and the module's name wherever it stands,
also inside other names and in any case. Names that the module defines stay.

`docstring_to_function`: the first paragraph of a docstring finds the body of its function, without signature and
docstring, among the bodies of all test pairs; nDCG@10. Test and training pairs come from different modules.

Models of a few million tokens (nano) are trained on this library themselves, test files included: nothing of it can be
held out from them. The tasks compare models that have read the same text; they do not measure unseen code.

A Python version gives the same items; Score.settings holds it and a hash of them. The seed of a call decides training
only: item i is the same for every model and seed, which paired comparisons need.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ettin_eval.finetune import HEAD, embed, fit, predict, probe, small_recipe, token_rows
from ettin_eval.results import Score, mean_score
from ettin_eval.retrieval import embedder, pooling_of, train
from ettin_eval.subject import Subject
from ettin_eval.tasks import Settings, Task

MODULES = ("_pydecimal", "argparse", "asyncio", "doctest", "email", "http", "importlib", "inspect", "ipaddress",
           "mailbox", "multiprocessing", "pickle", "ssl", "tarfile", "turtle", "typing", "unittest", "urllib", "xml",
           "zipfile")
SKIPPED = {"antigravity", "encodings", "ensurepip", "idlelib", "lib2to3", "distutils", "pydoc_data", "test", "this",
           "tkinter", "turtledemo", "venv"}   # tables, demos, and what not every Python carries
LINES = (5, 16)            # of a snippet: at least, at most
SNIPPETS = (24, 14)        # of a module: for training, for testing
PAIRS = (600, 300, 15)     # docstrings: for training, for testing, of one module at most
WORDS = (5, 60)            # of a docstring's first paragraph
MAX_LENGTH = 128           # tokens of a snippet, docstring or body
EPOCHS = 3                 # of fine-tuning
BATCH, MINI_BATCH = 32, 32   # of contrastive fine-tuning: pairs of a loss, of a pass


@dataclass(frozen=True)
class Function:
    """A function or method of the library. file: below the library's folder. top: its top-level class or function."""

    module: str
    file: str
    top: str
    source: str
    doc: str
    body: str


@cache
def stdlib_functions() -> tuple[Function, ...]:
    """The functions of the standard library's modules, in the order of their names and places.

    Raises:
        ValueError: this Python has no sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Function] = []
    for module in sorted(set(sys.stdlib_module_names) - SKIPPED):
        files = sorted((root / module).rglob("*.py")) if (root / module).is_dir() else [root / f"{module}.py"]
        for file in files:
            name = file.relative_to(root)
            if file.is_file() and not {"test", "tests"} & set(name.parts):
                found += _functions(module, name.as_posix(), file.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"the tasks on code need the sources of Python's library, got none in {root}; "
                         "take a Python that has them")
    return tuple(found)


def _functions(module: str, file: str, text: str) -> Iterator[Function]:
    lines = text.splitlines()
    for top in ast.parse(text).body:
        for node in top.body if isinstance(top, ast.ClassDef) else [top]:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            doc = ast.get_docstring(node) or ""
            inner = node.body[1:] if doc else node.body
            body = "\n".join(lines[inner[0].lineno - 1:node.end_lineno]) if inner else ""
            yield Function(module, file, top.name, _dedent(lines[node.lineno - 1:node.end_lineno]), doc,  # type: ignore[union-attr]
                           textwrap.dedent(body))


def _dedent(lines: Sequence[str]) -> str:
    return textwrap.dedent("\n".join(lines))


def masked(source: str, module: str) -> str:
    """The lines of a snippet, at most 16, without imports and with `module` in place of the module's name."""
    lines = [line for line in source.splitlines() if not re.match(r"\s*(import|from)\s", line)][:LINES[1]]
    return re.sub(module.removeprefix("_py"), "module", "\n".join(lines), flags=re.IGNORECASE)


@cache
def snippets() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Training and test items, (snippet, place of its module in MODULES), 24 and 14 of each module.

    Raises:
        ValueError: a module of this Python has too few functions.
    """
    rng = np.random.default_rng(0)
    train, test = [], []
    for label, module in enumerate(MODULES):
        functions = [each for each in stdlib_functions() if each.module == module]
        several = len({each.file for each in functions}) > 1
        units: dict[str, list[str]] = {}
        seen: set[str] = set()
        for each in functions:
            text = masked(each.source, module)
            if text.count("\n") + 1 >= LINES[0] and text not in seen:
                seen.add(text)
                units.setdefault(each.file if several else each.top, []).append(text)
        largest = max(units, key=lambda name: len(units[name]), default="")
        names = [name for name in units if name != largest]
        held: list[str] = []
        for place in rng.permutation(len(names)):
            if sum(len(units[name]) for name in held) < SNIPPETS[1]:
                held.append(names[place])
        for count, into, texts in ((SNIPPETS[0], train, [text for name in units if name not in held
                                                         for text in units[name]]),
                                   (SNIPPETS[1], test, [text for name in held for text in units[name]])):
            if not texts:
                raise ValueError(f"module_of_snippet needs functions of {module} in two places of it, got "
                                 f"{len(functions)} functions in this Python")
            into += [(texts[place], label) for place in rng.permutation(len(texts))[:count]]
    return train, test


@cache
def pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and test pairs, (docstring's first paragraph, body of its function): 600, and 300 of other modules."""
    rng = np.random.default_rng(0)
    modules: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    for each in stdlib_functions():
        query = " ".join(re.split(r"\n\s*\n", each.doc)[0].split())
        body = "\n".join(each.body.splitlines()[:LINES[1]])
        if (WORDS[0] <= len(query.split()) <= WORDS[1] and body.count("\n") >= 2 and not {query, body} & seen):
            seen |= {query, body}
            modules.setdefault(each.module, []).append((query, body))
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for name in rng.permutation(sorted(modules)):
        found = modules[str(name)]
        (test if len(test) < PAIRS[1] else train).extend(
            found[place] for place in rng.permutation(len(found))[:PAIRS[2]])
    return train[:PAIRS[0]], test[:PAIRS[1]]


def made_from(*items: Any) -> dict[str, Any]:
    """The Python version and a hash of the items, for Score.settings."""
    return {"python": platform.python_version(), "data": hashlib.sha256(repr(items).encode()).hexdigest()[:16]}


def module_of_snippet(tuned: bool, subject: Subject, settings: Settings) -> list[Score]:
    """Accuracy of a probe on frozen states, or of a fine-tuned model."""
    train_items, test_items = snippets()
    test_items = _spread(test_items, settings.limit)
    train_rows, test_rows = (token_rows(subject, [(text,) for text, _ in items], MAX_LENGTH)
                             for items in (train_items, test_items))
    labels, true = (np.array([label for _, label in items]) for items in (train_items, test_items))
    if tuned:
        recipe = small_recipe(subject, settings, EPOCHS)
        model = fit(subject, settings, train_rows, labels.tolist(), len(MODULES), recipe, "mean")
        said = predict(model, test_rows, settings.batch_tokens).argmax(1)
        how = {"pooling": "mean", **recipe.facts(), "head": HEAD}
    else:
        said = probe(embed(subject, settings, train_rows), labels, embed(subject, settings, test_rows))
        how = {"pooling": "mean"}
    return [mean_score(f"module_of_snippet_{'finetune' if tuned else 'probe'}", "accuracy",
                       (said == true).astype(float).tolist(), classes=len(MODULES), trained_on=len(train_items),
                       **how, **made_from(train_items, test_items))]


def _spread(items: Sequence[Any], limit: int | None) -> Sequence[Any]:
    """At most `limit` items, evenly over the list, so that each module keeps its share."""
    return items if limit is None or limit >= len(items) else [items[len(items) * i // limit] for i in range(limit)]


def ndcg_at_10(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """nDCG@10 of each query, (n,), by cosine; document i is the one relevant to query i. A tie counts against it.

    With one relevant document it is 1 / log2(1 + its rank), 0 below rank 10.
    """
    unit = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (queries, documents)]
    similarity = unit[0] @ unit[1].T
    own = np.diagonal(similarity)[:, None]
    rank = (similarity >= own).sum(1)   # itself counted
    return np.where(rank <= 10, 1 / np.log2(1 + rank), 0.0)


def docstring_to_function(tuned: bool, subject: Subject, settings: Settings) -> list[Score]:
    """nDCG@10 by the frozen states' mean, or after contrastive fine-tuning on the pairs of other modules."""
    train_pairs, test_pairs = pairs()
    test_pairs = test_pairs[:settings.limit]
    if tuned:
        recipe, model = small_recipe(subject, settings, EPOCHS), embedder(subject, settings, "mean")
        model.max_seq_length = MAX_LENGTH
        rows = datasets.Dataset.from_dict({"query": [query for query, _ in train_pairs],
                                           "positive": [body for _, body in train_pairs]})
        with tempfile.TemporaryDirectory() as folder:
            train(model, rows, Path(folder, "training"), settings, lr=recipe.lr, batch=BATCH, mini_batch=MINI_BATCH,
                  epochs=recipe.epochs)
        sides = [model.encode([pair[side] for pair in test_pairs], show_progress_bar=False) for side in (0, 1)]
        how = {"lr": recipe.lr, "epochs": recipe.epochs, "batch": BATCH, "pooling": pooling_of(model),
               "trained_on": len(train_pairs)}
    else:
        sides = [embed(subject, settings, token_rows(subject, [(pair[side],) for pair in test_pairs], MAX_LENGTH))
                 for side in (0, 1)]
        how = {"pooling": "mean"}
    return [mean_score(f"docstring_to_function_{'tuned' if tuned else 'zeroshot'}", "ndcg_at_10",
                       ndcg_at_10(np.asarray(sides[0]), np.asarray(sides[1])).tolist(), **how,
                       **made_from(train_pairs, test_pairs))]


TASKS: list[Task] = [
    Task("module_of_snippet_probe", partial(module_of_snippet, False),
         "which module a function is from: logistic regression on frozen states"),
    Task("module_of_snippet_finetune", partial(module_of_snippet, True),
         "which module a function is from: fine-tuning"),
    Task("docstring_to_function_zeroshot", partial(docstring_to_function, False),
         "a docstring finds its function, nDCG@10: frozen states"),
    Task("docstring_to_function_tuned", partial(docstring_to_function, True),
         "a docstring finds its function, nDCG@10: contrastive fine-tuning"),
]
QUICK: list[Task] = [task for task in TASKS if task.name != "module_of_snippet_finetune"]
