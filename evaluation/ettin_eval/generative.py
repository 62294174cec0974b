"""Generation: what a model gives to continuations of a text, by lm-evaluation-harness.

The tasks are the harness's own: prompts, targets, shots and metrics. Decoders run through its `hf` class; encoders
through `ettin_eval.pseudo_likelihood`. With --data the same tasks read their items from the folder.
The list is the paper's table of decoders (ARC, HellaSwag, LAMBADA, OpenBookQA, PIQA, SciQ, SIQA, TriviaQA, WinoGrande,
WSC), with the reasoning and code that its reviewers asked for. The paper does not name its metrics; `about` names
those that its figures of Pythia and Llama agree with.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval

from ettin_eval.data import held, splits
from ettin_eval.harness import decoder, harness_task, read_yaml
from ettin_eval.pseudo_likelihood import MaskedLikelihood
from ettin_eval.results import Score, mean_score
from ettin_eval.subject import Subject
from ettin_eval.tasks import Settings, Task

PIECE = 512  # bytes of text in one item of bits_per_byte
PIECES = 100

# name: (YAML files in lm_eval/tasks, one line for the list)
HARNESS = {
    "arc_easy": ("arc/arc_easy.yaml", "school science, easy; acc, acc_norm"),
    "arc_challenge": ("arc/arc_challenge.yaml", "school science, hard; acc, acc_norm (paper: acc_norm)"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "how a scene goes on; acc, acc_norm (paper: acc_norm)"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "last word of a passage; perplexity, acc (paper: acc)"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "school science; acc, acc_norm (paper: acc_norm)"),
    "piqa": ("piqa/piqa.yaml", "everyday physics; acc, acc_norm (paper: acc_norm)"),
    "sciq": ("sciq/sciq.yaml", "science with a passage; acc, acc_norm (paper: acc_norm)"),
    "social_iqa": ("siqa/siqa.yaml", "social situations; acc"),
    "triviaqa": ("triviaqa/default.yaml", "trivia, generated; exact_match"),
    "winogrande": ("winogrande/default.yaml", "whom a pronoun means; acc"),
    "wsc273": ("wsc273/default.yaml", "whom a pronoun means, Winograd's; acc"),
    "mmlu": ("mmlu/default/mmlu_*.yaml", "exam questions of 57 subjects; acc over all items, and each subject's"),
    "gsm8k": ("gsm8k/gsm8k.yaml", "school mathematics, 5 shots, generated; exact_match"),
    "humaneval": ("humaneval/humaneval.yaml", "Python functions, generated and run: HF_ALLOW_CODE_EVAL=1; pass@1"),
}


def language_model(subject: Subject, settings: Settings) -> Any:
    """The subject as a model of lm-evaluation-harness."""
    if subject.kind == "encoder":
        return MaskedLikelihood(subject, protocol=settings.protocol, device=settings.device,
                                batch_tokens=settings.batch_tokens)
    return decoder(subject, settings.device, settings.batch_tokens)


def evaluate(name: str, most: int | None, subject: Subject, settings: Settings) -> list[Score]:
    """Runs the harness's task `name` on at most `most` items (None: all), drawn by the seed, subjects alike.

    One Score a metric; where the task has subjects, first the one over all their items, then theirs.

    Raises:
        ValueError: the folder does not hold its data, or the data is empty; a model whose rows are too short.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if reason := missing(name, settings):
        raise ValueError(reason)
    tasks = [harness_task(path, settings.data) for path in _yamls(name)]
    for task in tasks:  # as lm_eval.simple_evaluate does, which then spends seconds on a report of the machine
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(settings.seed)
        wanted = (task.config.generation_kwargs or {}).get("max_gen_toks", 0)
        if wanted >= subject.max_length:
            raise ValueError(f"{name} generates {wanted} tokens, got {subject.name} with rows of {subject.max_length}; "
                             "leave it out")
    limit = min((each for each in (most, settings.limit) if each), default=None)
    if limit:
        limit = math.ceil(limit / len(tasks))  # of each subject alike
    draw = random.Random(settings.seed)
    samples = {task.config.task: sorted(draw.sample(range(len(task.eval_docs)), min(limit, len(task.eval_docs))))
               for task in tasks} if limit else None
    run: Any = lm_eval.evaluate  # its decorator gives it simple_evaluate's type
    results = run(
        language_model(subject, settings), {"tasks": {task.config.task: task for task in tasks}, "groups": {}},
        samples=samples, bootstrap_iters=0, confirm_run_unsafe_code=True)
    scores, label = [], _label(name, most)
    for task in tasks:
        scores += _scores(task, results, label if len(tasks) == 1 else task.config.task, subject, settings)
    if len(tasks) > 1:
        items = [item for score in scores for item in score.items or ()]
        scores.insert(0, mean_score(label, scores[0].metric, items, **scores[0].settings))
    return scores


def _scores(task: Any, results: Any, name: str, subject: Subject, settings: Settings) -> Iterator[Score]:
    """One Score a metric and filter. Means keep their items; of others (perplexity) the harness's value is taken."""
    label = task.config.task
    samples = results["samples"][label]
    filters = list(dict.fromkeys(each["filter"] for each in samples))
    facts = {"shots": results["n-shot"][label], "split": task.config.test_split or task.config.validation_split,
             "data": "/".join(filter(None, (task.config.dataset_path, task.config.dataset_name)))}
    if subject.kind == "encoder":
        facts["protocol"] = settings.protocol
    aggregations = task.aggregation()
    for metric in samples[0]["metrics"]:  # a function of several numbers names them itself: pass@1
        for each in filters:
            values = [sample[metric] for sample in samples if sample["filter"] == each]
            called = metric if len(filters) == 1 else f"{metric},{each}"
            if metric not in aggregations or aggregations[metric].__name__ == "mean":  # as the harness has it
                yield mean_score(name, called, [float(value) for value in values], **facts)
            else:
                value = results["results"][label][f"{metric},{each}"]
                yield Score(task=name, metric=called, value=value, n=len(values), settings=facts)


def _yamls(name: str) -> list[Path]:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.submodule_search_locations
    return sorted(Path(spec.submodule_search_locations[0], "tasks").glob(HARNESS[name][0]))


def missing(name: str, settings: Settings) -> str | None:
    """Why the task cannot be run; None where it can."""
    if name == "humaneval" and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        return "humaneval runs code that the model writes; set HF_ALLOW_CODE_EVAL=1 in a sandbox, or leave it out"
    if settings.data is None:
        return None
    for path in _yamls(name):
        config = read_yaml(path)
        there = splits(settings.data, config["dataset_path"], config.get("dataset_name"))
        if not {config.get("test_split"), config.get("validation_split")} & set(there):
            return (f"{path.stem if name == 'mmlu' else name} needs {config['dataset_path']}, got {settings.data} with "
                    f"{held(settings.data)}; leave --data out to read the hub")
    return None


def bits_per_byte(most: int, subject: Subject, settings: Settings) -> list[Score]:
    """Bits a byte of text, of pieces of 512 bytes, each alone after the beginning-of-text token.

    Text: DIR/text/**/*.txt under --data DIR, else docstrings of the installed scikit-learn, which is pinned here and
    no part of the corpora of this project. A decoder's is exact (`bits_per_byte`). An encoder's under `pseudo` is no
    code length, since each token is seen from both sides; its metric carries the protocol: `pseudo_bits_per_byte`.
    """
    pieces, source = _pieces(settings.data)
    chosen = random.Random(settings.seed).sample(pieces, min(len(pieces), settings.limit or most, most))
    requests: list[Any] = [SimpleNamespace(args=(piece,)) for piece in chosen]
    totals = language_model(subject, settings).loglikelihood_rolling(requests, disable_tqdm=True)
    items = [-total / math.log(2) / len(piece.encode()) for total, piece in zip(totals, chosen, strict=True)]
    metric = "bits_per_byte" if subject.kind == "decoder" else f"{settings.protocol}_bits_per_byte"
    return [mean_score("bits_per_byte", metric, items, text=source, piece_bytes=PIECE)]


def _pieces(data: Path | None) -> tuple[list[str], str]:
    folder = data / "text" if data else None
    if folder and folder.is_dir():
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.txt"))]
        pieces = [piece for text in texts for piece in _cut(text)]
        if not pieces:
            raise ValueError(f"{folder} must hold .txt files of at least {PIECE} bytes, got {len(texts)} files")
        return pieces, "text"
    return _library(), f"docstrings of scikit-learn {importlib.metadata.version('scikit-learn')}"


@cache
def _library() -> list[str]:
    """The first PIECE bytes of each docstring of scikit-learn that is as long, equal ones once, in order of files."""
    spec = importlib.util.find_spec("sklearn")
    assert spec and spec.submodule_search_locations
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*/_*.py"))  # tests lie deeper
    texts = (text for path in files for text in _docstrings(path))
    return list(dict.fromkeys(piece for text in texts for piece in _cut(text)[:1]))


def _docstrings(path: Path) -> Iterator[str]:
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:  # grows: a module's classes, then their methods
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""
        if isinstance(node, (ast.Module, ast.ClassDef)):
            nodes += node.body


def _cut(text: str) -> list[str]:
    """Pieces of PIECE bytes, up to 3 less where a character would be cut; the rest of the text is left."""
    raw, pieces, start = text.encode(), [], 0
    while len(raw) - start >= PIECE:
        piece = raw[start:start + PIECE].decode(errors="ignore")
        pieces.append(piece)
        start += len(piece.encode())
    return pieces


def _task(name: str, most: int | None = None) -> Task:
    return Task(_label(name, most), partial(evaluate, name, most),
                HARNESS[name][1] + (f"; {most} items" if most else ""), missing=partial(missing, name))


def _label(name: str, most: int | None) -> str:
    return f"{name}_{most}" if most else name


_BITS = Task("bits_per_byte", partial(bits_per_byte, PIECES), f"bits a byte of text, {PIECES} pieces of {PIECE} bytes")
TASKS: Sequence[Task] = [*map(_task, HARNESS), _BITS]
QUICK: Sequence[Task] = [_BITS, *(_task(name, 200) for name in ("arc_easy", "sciq", "piqa", "hellaswag"))]
