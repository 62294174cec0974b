"""Retrieval: fine-tuning on MS MARCO by sentence-transformers, then MTEB(eng, v2), CodeSearchNet and MLDR by mteb.

Training is the paper's: the triplets of msmarco-co-condenser-margin-mse-sym-mnrl-mean-v1, of which 1,000 (seed 12) are
held out and the first 1.25M train; CachedMultipleNegativesRankingLoss, scale 20; batches of 1,024 without duplicates,
in cache mini-batches; one epoch, 5% of warm-up, bf16 on CUDA. The paper swept the learning rate and states one example,
3e-4, the default here (`--lr`). Pooling is the mean for encoders and the last token for decoders, except that a model
with modules of its own (modules.json) keeps them.

The fine-tuned model is kept in the folder beside the result file and used by every task; a killed training goes on from
its last checkpoint, and mteb's cache holds each set's result.

With `--data DIR` nothing is read from the hub: DIR/REPOSITORY/triplet-hard/train (`Dataset.save_to_disk`) trains, and
DIR/mteb/NAME holds a copy of the hub's repository mteb/NAME for a set of mteb.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.evaluation import TripletEvaluator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.hub import cached_file

from ettin_eval import data as sets
from ettin_eval.finetune import quiet
from ettin_eval.results import Score, mean_score
from ettin_eval.subject import Subject
from ettin_eval.tasks import Settings, Task

log = logging.getLogger(__name__)

SET = "sentence-transformers/msmarco-co-condenser-margin-mse-sym-mnrl-mean-v1"
COLUMNS = ("query", "positive", "negative")
ROWS, HELD_OUT, HELD_OUT_SEED = 1_250_000, 1000, 12
LR, BATCH, SCALE, WARMUP, EVERY = 3e-4, 1024, 20.0, 0.05, 50


def embedder(subject: Subject, settings: Settings, pooling: str | None = None) -> SentenceTransformer:
    """The model as a sentence-transformer: its own modules, where it has them, else its trunk and a pooling.

    pooling: `mean` or `lasttoken`; None takes the kind's.
    """
    with quiet():
        if cached_file(subject.name, "modules.json", revision=subject.revision, local_files_only=_local(subject),
                       _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False) is not None:
            model = SentenceTransformer(subject.name, revision=subject.revision, device=settings.device)
            log.warning("%s: its own modules.json decides the pooling: %s", subject.name, pooling_of(model))
            return model
        trunk = Transformer(subject.name, model_kwargs={"revision": subject.revision},
                            config_kwargs={"revision": subject.revision},
                            processor_kwargs={"revision": subject.revision}, max_seq_length=subject.max_length)
    trunk.tokenizer.pad_token = subject.tokenizer.pad_token  # type: ignore[union-attr]
    pool = Pooling(trunk.get_embedding_dimension(), pooling or subject.pooling)  # type: ignore[arg-type]
    return SentenceTransformer(modules=[trunk, pool], device=settings.device)


def _local(subject: Subject) -> bool:
    return Path(subject.name).is_dir()


def pooling_of(model: SentenceTransformer) -> str:
    """The names of its pooling modules' modes, for Score.settings."""
    return ", ".join(str(each.pooling_mode) for each in model if isinstance(each, Pooling)) or "none"


def train(model: SentenceTransformer, rows: Any, folder: Path, settings: Settings, *, lr: float, batch: int,
          mini_batch: int, epochs: int = 1, held_out: Any = None) -> None:
    """Contrastive fine-tuning in place. rows: columns query, positive and perhaps negatives, in this order.

    mini_batch: rows of one pass; the loss sees `batch` rows. folder: of checkpoints, every 50 steps; training goes on
    from the last one in it. held_out: triplets whose accuracy is logged at each checkpoint.
    """
    set_seed(settings.seed)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=epochs, per_device_train_batch_size=batch, learning_rate=lr,
        warmup_steps=WARMUP, bf16=settings.device.startswith("cuda"), use_cpu=settings.device == "cpu",
        batch_sampler=BatchSamplers.NO_DUPLICATES, seed=settings.seed, report_to=[], disable_tqdm=True,
        logging_strategy="no", dataloader_pin_memory=False, save_strategy="steps", save_steps=EVERY, save_total_limit=1,
        eval_strategy="no" if held_out is None else "steps", eval_steps=EVERY)
    evaluator = None if held_out is None else _triplets(held_out)
    loss = CachedMultipleNegativesRankingLoss(model, scale=SCALE, mini_batch_size=mini_batch)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss, evaluator=evaluator)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    model.eval()


def _triplets(rows: Any) -> TripletEvaluator:
    return TripletEvaluator(list(rows["query"]), list(rows["positive"]), list(rows["negative"]), name="held-out")


def tuned(subject: Subject, settings: Settings) -> tuple[SentenceTransformer, dict[str, Any]]:
    """The model fine-tuned on MS MARCO, from WORK/msmarco if it is there, and what decides it (for Score.settings).

    Raises:
        ValueError: WORK/msmarco was trained with other settings; the training set is missing or lacks a column.
    """
    folder, made = settings.work / "msmarco", settings.work / "msmarco-training"
    facts = {"model": subject.name, "revision": subject.revision, "lr": settings.lr or LR, "batch": BATCH,
             "scale": SCALE, "limit": settings.limit, "seed": settings.seed}
    for place in (folder, made):
        there = json.loads((place / "training.json").read_text()) if (place / "training.json").is_file() else facts
        for key, value in facts.items():
            if there[key] != value:
                raise ValueError(f"{place} was trained with {key} {there[key]!r}, got {value!r}; give another --out, "
                                 "or remove the folder")
    if not (folder / "training.json").is_file():
        _train_on_msmarco(subject, settings, folder, made, facts)
    model = SentenceTransformer(str(folder), device=settings.device)
    return model, {**facts, **json.loads((folder / "training.json").read_text())}


def _train_on_msmarco(subject: Subject, settings: Settings, folder: Path, made: Path, facts: dict[str, Any]) -> None:
    rows = sets.load(settings.data, SET, "triplet-hard", "train")
    for column in COLUMNS:
        if column not in rows.column_names:
            raise ValueError(f"{SET} must have columns {', '.join(COLUMNS)}, got {', '.join(rows.column_names)}")
    if len(rows) < 10:
        raise ValueError(f"{SET} must have at least 10 rows, got {len(rows)}")
    split = rows.select_columns(list(COLUMNS)).train_test_split(min(HELD_OUT, len(rows) // 10), seed=HELD_OUT_SEED)
    chosen = split["train"].select(range(min(ROWS, settings.limit or ROWS, len(split["train"]))))
    made.mkdir(parents=True, exist_ok=True)
    (made / "training.json").write_text(json.dumps(facts))
    model = embedder(subject, settings)
    measure = _triplets(split["test"])
    before = measure(model)["held-out_cosine_accuracy"]
    train(model, chosen, made, settings, lr=facts["lr"], batch=BATCH, mini_batch=_mini_batch(settings),
          held_out=split["test"])
    facts = {**facts, "rows": len(chosen), "held_out_before": before, "pooling": pooling_of(model),
             "held_out_after": measure(model)["held-out_cosine_accuracy"]}
    partial_folder = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial_folder, ignore_errors=True)
    model.save_pretrained(str(partial_folder))
    (partial_folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial_folder.rename(folder)
    shutil.rmtree(made)


def _mini_batch(settings: Settings) -> int:
    """256 of the paper's script on a GPU; rows of at most 256 tokens in --batch-tokens on a CPU."""
    return 256 if settings.device.startswith("cuda") else max(1, settings.batch_tokens // 256)


def mteb_tasks(name: str) -> list[Any]:
    """mteb's tasks of one of ours."""
    import mteb  # seconds, which no other task should wait for

    if name == "mteb_eng_v2":
        return list(mteb.get_benchmark("MTEB(eng, v2)").tasks)
    if name == "codesearchnet":
        return [mteb.get_task("CodeSearchNetRetrieval")]
    return [mteb.get_task("MultiLongDocRetrieval", languages=["eng"], eval_splits=["test"])]


def on_disk(task: Any, data: Path) -> Any:
    """The task, which reads its copy under `data` in place of the hub's repository.

    Raises:
        ValueError: there is no copy.
    """
    repository = task.metadata.dataset["path"]
    if not (data / repository).is_dir():
        raise ValueError(f"--data must hold {repository}, a copy of the hub's repository, for {task.metadata.name}, "
                         f"got {data}; leave --data out to read the hub")
    where = {**task.metadata.dataset, "path": str(data / repository)}
    task.metadata = task.metadata.model_copy(update={"dataset": where})
    return task


def evaluate(model: Any, tasks: Sequence[Any], settings: Settings) -> dict[str, list[float]]:
    """mteb's main score of each task, one for each of its subsets and splits; those in WORK/mteb are not run again."""
    import mteb

    found = mteb.evaluate(model, tasks, cache=mteb.ResultCache(settings.work / "mteb"), show_progress_bar=False,
                          encode_kwargs={"batch_size": _mini_batch(settings), "show_progress_bar": False})
    return {result.task_name: [float(each["main_score"]) for split in result.scores.values() for each in split]
            for result in found.task_results}


def score_with_mteb(name: str, subject: Subject, settings: Settings,
                    choose: Callable[[str], list[Any]] = mteb_tasks) -> list[Score]:
    """Fine-tunes on MS MARCO if that is not done, then one score for each set, type of task and benchmark.

    n counts the figures that were averaged (subsets of a set, sets of a benchmark), not queries.
    """
    tasks = choose(name)
    if settings.data:
        tasks = [on_disk(task, settings.data) for task in tasks]
    model, facts = tuned(subject, settings)
    figures = evaluate(model, tasks, settings)
    scores, means, types = [], {}, defaultdict(list)
    for task in tasks:
        found = figures[task.metadata.name]
        metric = f"{task.metadata.name} {task.metadata.main_score}"
        score = mean_score(name, metric, found, **facts).model_copy(update={"stderr": None})
        scores.append(score)
        means[task.metadata.name] = score.value
        types[task.metadata.type].append(score.value)
    if len(tasks) > 1:
        groups = {**{f"mean of {kind}": values for kind, values in types.items()}, "mean of all": list(means.values())}
        scores += [mean_score(name, metric, values, **facts).model_copy(update={"stderr": None})
                   for metric, values in groups.items()]
    return scores


def missing(name: str, settings: Settings) -> str | None:
    """Why the task cannot be run; None where it can."""
    if settings.data and not (settings.work / "msmarco").is_dir() and (
            "train" not in sets.splits(settings.data, SET, "triplet-hard")):
        return (f"it needs {SET}/triplet-hard/train, got {settings.data} with {sets.held(settings.data)}; "
                "leave --data out to read the hub")
    for repository in [str(task.metadata.dataset["path"]) for task in mteb_tasks(name)] if settings.data else []:
        if not Path(settings.data or "", repository).is_dir():
            return (f"it needs {repository}, a copy of the hub's repository, in {settings.data}; "
                    "leave --data out to read the hub")
    return None


def _task(name: str, about: str) -> Task:
    return Task(name, partial(score_with_mteb, name), f"{about}, after MS MARCO", missing=partial(missing, name))


TASKS: list[Task] = [
    _task("mteb_eng_v2", "MTEB(eng, v2)"),
    _task("codesearchnet", "CodeSearchNet, nDCG@10"),
    _task("mldr", "MLDR, English, nDCG@10"),
]
