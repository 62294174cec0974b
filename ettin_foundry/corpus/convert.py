"""Text to a dataset: plan the units, run them, put them together. Restartable, on one machine or many.

Interrupted at any moment and started again, a conversion does only what is not done yet and ends with the same bytes
(see plan.py). `task_index` does one share of the units; `ettin finalize` then joins the shares.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from ettin_foundry.corpus import plan as plans
from ettin_foundry.corpus.executors import Board, Tick, run_tasks
from ettin_foundry.corpus.finalize import done_units, finalize
from ettin_foundry.corpus.plan import ConvertOptions
from ettin_foundry.corpus.readers import read_parts
from ettin_foundry.corpus.sources import Meter, Source, part_bytes, plan_parts
from ettin_foundry.corpus.worker import ConvertUnit
from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.cache import fetch_tokenizer
from ettin_foundry.data.storage import Storage, open_storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)


class Summary(NamedTuple):
    """What a conversion did."""

    manifests: Mapping[str, Mapping[str, Any]]  # split -> manifest; empty for one task of an array
    units: tuple[int, int]  # done by this call, of all


def convert(options: ConvertOptions) -> Summary:
    """Converts a corpus into OUT/tokenizer, OUT/train and OUT/validation, or goes on with doing so.

    Raises OSError or ValueError where the input cannot be converted, or OUT holds something else.
    """
    storage = open_storage(options.out)
    before = plans.read_plan(storage)
    if before is None:
        plans.check_place(storage, options.append)
    sources = plans.find_sources(options, before)
    tok = _tokenizer(options, storage, before, sources)
    facts = tokenizers.fingerprint(tok)
    plan = plans.plan_conversion(options, before, sources, tokenizer=facts, storage=storage)
    libraries = ["tokenizers", "zstd"] if options.compression else ["tokenizers"]
    made_with = ", ".join(f"{name} {version(name)}" for name in libraries)
    done = done_units(storage, plan, made_with)
    todo = [unit for unit in plan.units if unit.number not in done]
    plans.check_append(todo, plan, sources)
    if plan != before:
        if before is None or before.tokenizer != plan.tokenizer:
            with tempfile.TemporaryDirectory(dir=storage.scratch()) as folder:
                tokenizers.save(tok, folder)
                for path in sorted(Path(folder).iterdir()):
                    storage.put_file(path, f"tokenizer/{path.name}")
        if plans.read_plan(storage) not in (before, plan):
            raise ValueError(f"--out must be used by one conversion at a time, got {storage.url}, which just changed")
        storage.write_bytes(plans.PLAN, plan.to_bytes())  # last: where there is a plan, there is a tokenizer
    if options.task_index is not None:
        todo = [unit for unit in todo if unit.number % int(options.num_tasks or 1) == options.task_index]
    job = ConvertUnit(options, {source.name: source for source in sources}, plan.base_key, facts["name"],
                      tok.backend_tokenizer.to_str(), tuple(sorted(tokenizers.forbidden_ids(tok))), made_with)
    if todo:
        workers = min(options.workers or len(os.sched_getaffinity(0)), len(todo))
        num_bytes = sum(part_bytes(job.sources[unit.source], part) for unit in todo for part in unit.parts)
        board = Board("documents", num_bytes)
        run_tasks(job, todo, workers=workers, board=board)
        log.info("%s", board)
    manifests = finalize(options.out, max_bad_records=options.max_bad_records) if options.task_index is None else {}
    return Summary(manifests, (len(todo), len(plan.units)))


def _tokenizer(options: ConvertOptions, storage: Storage, plan: plans.Plan | None,
               sources: Sequence[Source]) -> PreTrainedTokenizerFast:
    """The given tokenizer, the dataset's own where a unit is finished, or one trained now."""
    if options.tokenizer is not None:
        tok = tokenizers.load(options.tokenizer)
    elif plan is None or not (options.append or plans.finished_units(storage)):
        tok = _train(sources, options)
    else:
        with tempfile.TemporaryDirectory(dir=storage.scratch()) as folder:
            fetch_tokenizer(Path(folder), storage.url)
            tok = tokenizers.load(Path(folder, "tokenizer"))
        tok.name_or_path = plan.tokenizer["name"]
    return tokenizers.with_template(tok, "encoder")


def _train(sources: Sequence[Source], options: ConvertOptions) -> PreTrainedTokenizerFast:
    """Trains on the training split only: validation text must be as new to the tokenizer as to the model."""
    def texts() -> Iterator[str]:
        documents, num_bytes, meter = 0, 0, Meter()
        for source in sources:
            parts = [part for parts in plan_parts(source, 1 << 62) for part in parts]
            for document in read_parts(source, parts, meter, options):
                encoded = document.text.encode()
                documents, num_bytes = documents + 1, num_bytes + len(encoded)
                board.tick(0, Tick(documents, 0, num_bytes, meter.position()))
                if xxhash.xxh64_intdigest(encoded, seed=options.seed) >= options.validation * 2**64:
                    yield document.text

    board = Board("tokenizer", sum(sum(source.files.values()) for source in sources))
    return tokenizers.train_bpe(texts(), int(options.train_tokenizer or 0))
