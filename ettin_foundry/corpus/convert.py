"""Text to a data set: plan the units, run them, put them together. Restartable, on one machine or many.

Interrupted at any moment and started again, a conversion does only what is not done yet and ends with the same bytes
(units.py says why). `--task-index` does one share of the units on one machine of many; `ettin finalize` then puts the
shares together. Readers are in readers.py, the work on a unit in unit_worker.py, worker processes in pool.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ettin_foundry.corpus.duplicates import find_duplicates
from ettin_foundry.corpus.executors import WorkerDeath, run_tasks
from ettin_foundry.corpus.finalize import done_units, finalize, read_plan
from ettin_foundry.corpus.options import ConvertOptions, make_parser, options_from
from ettin_foundry.corpus.plan import check_given, check_place, find_sources, finished_units, plan_conversion
from ettin_foundry.corpus.progress import Board, Tick
from ettin_foundry.corpus.readers import ReadOptions, read_parts
from ettin_foundry.corpus.sources import Meter, Source, plan_parts
from ettin_foundry.corpus.unit_hashes import HashUnit, drops_name, hashes_name
from ettin_foundry.corpus.units import PLAN, Plan, Unit
from ettin_foundry.corpus.worker import ConvertUnit, TokenizerSpec
from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.storage import Storage, is_url, open_storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["ConvertOptions", "Summary", "convert", "main"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Attributes:
        out: the set. sources: name -> counts of both splits together, as a manifest states them; empty for one task of
        an array. validation_documents: documents of the validation split. seconds: of this call. units: done by this
        call, of all. tokens_done: tokenized by this call.
    """

    out: str
    sources: Mapping[str, Mapping[str, Any]]
    validation_documents: int
    seconds: float
    units: tuple[int, int]
    tokens_done: int

    @property
    def tokens(self) -> int:
        return sum(counts["tokens"] for counts in self.sources.values())

    def __str__(self) -> str:
        done, of = self.units
        speed = f"{self.seconds:.1f} s, {self.tokens_done / max(self.seconds, 1e-9):,.0f} tokens/s"
        if not self.sources:
            return (f"{self.out}: {done} of {of} units done by this task; {speed}. When all tasks are done: "
                    f"ettin finalize {self.out}")
        per_source = "; ".join(
            f"{name}: {c['documents']:,} documents, {c['tokens']:,} tokens, {c['bytes'] / 1e6:,.1f} MB"
            + "".join(f", {n:,} dropped ({reason})" for reason, n in c["dropped"].items())
            for name, c in self.sources.items())
        earlier = f"; {of - done} of {of} units were done before" if done < of else ""
        return f"{self.out}: {per_source}; {self.validation_documents:,} documents for validation{earlier}; {speed}"


def convert(options: ConvertOptions) -> Summary:
    """Converts a corpus into OUT/tokenizer, OUT/train and OUT/validation, or goes on with doing so.

    Raises:
        FileNotFoundError, ValueError: the input cannot be converted, or OUT was begun with other options; names file and
            record, or the option and both values. Finished units stay. FileExistsError: OUT holds something else.
    """
    begin = time.perf_counter()
    storage = open_storage(options.out)
    plan = read_plan(storage)
    if plan is None:
        check_place(storage, options)
    sources = find_sources(options, plan)
    tok = _tokenizer(options, storage, plan, sources)
    fingerprint = tokenizers.fingerprint(tok)
    record = options.record()
    wanted = plan_conversion(options, plan, sources, record=record, fingerprint=fingerprint, storage=storage)
    done = done_units(storage, wanted)
    todo = [unit for unit in wanted.units if unit.number not in done]
    check_given(todo, wanted, sources, storage)
    _begin(storage, plan, wanted, tok)
    if options.task_index is not None:
        todo = [unit for unit in todo if unit.number % int(options.num_tasks or 1) == options.task_index]
    spec = TokenizerSpec(fingerprint["name"], tok.backend_tokenizer.to_str(), tuple(sorted(tokenizers.forbidden_ids(tok))),
                         fingerprint["vocab_size"], options.engine)
    out = os.fspath(options.out)
    job = ConvertUnit(out=out if is_url(out) else os.path.abspath(out), options=wanted.options, tokenizer=spec,
                      filters=options.filters, sources={source.name: source for source in sources}, base_key=wanted.base_key)
    tokens = _run(job, todo, wanted, options, storage)
    units = (len(todo), len(wanted.units))
    if options.task_index is not None:
        return Summary(storage.url, {}, 0, time.perf_counter() - begin, units, tokens)
    manifests = finalize(options.out)
    return _summary(storage, manifests, time.perf_counter() - begin, units, tokens)


def _begin(storage: Storage, plan: Plan | None, wanted: Plan, tok: PreTrainedTokenizerFast) -> None:
    """Writes what all units need, and the plan last: where there is a plan, there is a tokenizer.

    Raises:
        ValueError: another conversion into the same place has begun meanwhile.
    """
    if wanted == plan:
        return
    if plan is None or dict(plan.tokenizer) != dict(wanted.tokenizer):
        _save_tokenizer(tok, storage)
    if read_plan(storage) not in (plan, wanted):
        raise ValueError(f"--out {storage.url}: another conversion has changed {PLAN} just now; two at a time must be the "
                         "same. Wait for the other one, then start this one again")
    storage.write_bytes(PLAN, wanted.to_bytes())


def _tokenizer(options: ConvertOptions, storage: Storage, plan: Plan | None,
               sources: Sequence[Source]) -> PreTrainedTokenizerFast:
    """The tokenizer: the given one, the set's own, or one trained now.

    Until a unit is finished, options and inputs may still change, and with them what a trained one is trained on.
    """
    if options.tokenizer is not None:
        tok = tokenizers.load(options.tokenizer)
    elif plan is None or not (options.append or finished_units(storage)):
        tok = _train(sources, options)
    else:
        folder = storage.scratch() / f"tokenizer.{uuid.uuid4().hex[:8]}"
        for name, size in storage.list("tokenizer/"):
            storage.get_file(name, folder / Path(name).name, num_bytes=size)
        tok = tokenizers.load(folder)
        tok.name_or_path = plan.tokenizer["name"]
        shutil.rmtree(folder)
    return tokenizers.with_template(tok, "encoder")


def _save_tokenizer(tok: PreTrainedTokenizerFast, storage: Storage) -> None:
    folder = storage.scratch() / f"tokenizer.{uuid.uuid4().hex[:8]}"
    tokenizers.save(tok, folder)
    for path in sorted(folder.iterdir()):
        storage.put_file(path, f"tokenizer/{path.name}")
    shutil.rmtree(folder)


def _train(sources: Sequence[Source], options: ConvertOptions) -> Any:
    """Trains on the documents of the training split only: validation text must be as new to it as to the model."""
    meter = Meter()
    with Board("tokenizer", sum(source.num_bytes for source in sources), show=options.progress) as board:

        def texts() -> Iterator[str]:
            board.began(0, "the sources", str(os.getpid()))
            for source in sources:
                for text, num_bytes, digest in _texts(source, meter, options):
                    board.tick(0, Tick(1, 0, num_bytes, meter.position() - board.total.file_bytes))
                    if digest >= options.validation * 2**64:
                        yield text

        return tokenizers.train_bpe(texts(), int(options.train_tokenizer or 0))


def _texts(source: Source, meter: Meter, options: ConvertOptions) -> Iterator[tuple[str, int, int]]:
    """Each document's text, its UTF-8 bytes, and the hash that decides its split."""
    total = 0
    for parts in plan_parts(source, 1 << 62):
        for document in read_parts(source, parts, meter, ReadOptions.of(options.record())):
            encoded = document.text.encode()
            yield document.text, len(encoded), xxhash.xxh64_intdigest(encoded, seed=options.seed)
            total += len(encoded)
            if options.limit_bytes is not None and total >= options.limit_bytes:
                return


def _run(job: ConvertUnit, todo: Sequence[Unit], plan: Plan, options: ConvertOptions, storage: Storage) -> int:
    """Does the units; tokens written."""
    if not todo:
        return 0
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(todo))
    if options.filters.deduplicate:
        known = {name for name, _ in storage.list("work/hashes/")}
        unhashed = [unit for unit in plan.units if hashes_name(unit, plan.base_key) not in known]
        check_given(unhashed, plan, list(job.sources.values()), storage)
        hashing = HashUnit(job.out, job.options, job.sources, plan.base_key)
        _execute(hashing, unhashed, "hashes", workers, options)
        _find_duplicates(plan, storage)
    return sum(result["tokens"] for result in _execute(job, todo, "documents", workers, options))


def _execute(job: Callable[..., Any], units: Sequence[Unit], title: str, workers: int,
             options: ConvertOptions) -> list[Any]:
    with Board(title, sum(unit.num_bytes for unit in units), show=options.progress) as board:
        return run_tasks(job, units, workers=workers, board=board, ray=options.executor == "ray",
                         ray_address=options.ray_address)


def _find_duplicates(plan: Plan, storage: Storage) -> None:
    """From the hashes of all units, which documents of each unit repeat earlier ones."""
    folder = storage.scratch() / f"duplicates.{uuid.uuid4().hex[:8]}"
    try:
        files = [folder / "hashes" / f"{unit.number:05d}.npy" for unit in plan.units]
        for unit, path in zip(plan.units, files):
            storage.get_file(hashes_name(unit, plan.base_key), path)
        find_duplicates(files, folder / "drops")
        for unit, path in zip(plan.units, files):
            storage.put_file(folder / "drops" / path.name, drops_name(unit, plan.base_key))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _summary(storage: Storage, manifests: Mapping[str, dict[str, Any]], seconds: float, units: tuple[int, int],
             tokens: int) -> Summary:
    totals: dict[str, dict[str, Any]] = {}
    for manifest in manifests.values():
        for name, counts in manifest["sources"].items():
            total = totals.setdefault(name, {"documents": 0, "chunks": 0, "tokens": 0, "bytes": 0, "dropped": {}})
            for key in ("documents", "chunks", "tokens", "bytes"):
                total[key] += counts[key]
            for reason, number in counts["dropped"].items():
                total["dropped"][reason] = total["dropped"].get(reason, 0) + number
    validation = manifests["validation"]["totals"]["documents"] if "validation" in manifests else 0
    return Summary(storage.url, totals, validation, seconds, units, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 after one line that says what is wrong, 130 if interrupted."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        summary = convert(options_from(arguments))
    except (ValueError, OSError, WorkerDeath) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: finished units are kept; the same command goes on\n")
        return 130
    sys.stdout.write(f"{summary}\n")
    return 0
