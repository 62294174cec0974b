"""Text to a data set: plan the units, run them, put them together. Restartable, on one machine or many.

Interrupted at any moment and started again, a conversion does only what is not done yet and ends with the same bytes
(units.py says why). `--task-index` does one share of the units on one machine of many; `ettin finalize` then puts the
shares together. Readers are in readers.py, the work on a unit in unit_worker.py, worker processes in pool.py.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ettin_foundry import tokenizer as tokenizers
from ettin_foundry.convert_options import ConvertOptions, make_parser, options_from
from ettin_foundry.decontamination import index_sources
from ettin_foundry.duplicates import merge
from ettin_foundry.finalize import done_units, finalize, read_plan
from ettin_foundry.manifest import MANIFEST
from ettin_foundry.pool import run_tasks
from ettin_foundry.progress import Board, Progress
from ettin_foundry.readers import LongDocument, read_parts
from ettin_foundry.sources import Meter, Source, find_source, plan_parts
from ettin_foundry.storage import Storage, open_storage
from ettin_foundry.unit_hashes import HashUnit, drops_name, hashes_name
from ettin_foundry.unit_worker import NGRAMS, ConvertUnit, TokenizerSpec
from ettin_foundry.units import PLAN, Plan, Unit, add_sources, make_plan

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
        _check_empty(storage, options)
    sources = _find_sources(options)
    tok = _tokenizer(options, storage, plan, sources)
    fingerprint = tokenizers.fingerprint(tok)
    spec = TokenizerSpec(fingerprint["name"], tok.backend_tokenizer.to_str(), tuple(sorted(tokenizers.forbidden_ids(tok))),
                         fingerprint["vocab_size"], options.engine)
    wanted = _plan(options, plan, sources, fingerprint, storage)
    done = {} if plan is None else done_units(storage, wanted)
    if plan is None:
        _save_tokenizer(tok, storage)  # before the plan: where there is a plan, there is a tokenizer
    if wanted != plan:
        storage.write_bytes(PLAN, wanted.to_bytes())
    todo = [unit for unit in wanted.units if unit.number not in done]
    if options.task_index is not None:
        todo = [unit for unit in todo if unit.number % int(options.num_tasks or 1) == options.task_index]
    job = ConvertUnit(out=os.fspath(options.out), options=wanted.options, tokenizer=spec, filters=options.filters,
                      sources={source.name: source for source in sources})
    tokens = _run(job, todo, wanted, options, storage)
    seconds = time.perf_counter() - begin
    if options.task_index is not None:
        return Summary(storage.url, {}, 0, seconds, (len(todo), len(wanted.units)), tokens)
    manifests = finalize(options.out)
    return _summary(storage, manifests, time.perf_counter() - begin, (len(todo), len(wanted.units)), tokens)


def _check_empty(storage: Storage, options: ConvertOptions) -> None:
    found = [name for name, _ in storage.list() if not name.startswith("tokenizer/")]
    if found:
        raise FileExistsError(f"--out {storage.url}: it holds {found[0]} and no {PLAN}, so no conversion was begun there; "
                              "nothing is ever written over. Name another folder, or remove this one")
    if options.append:
        raise FileNotFoundError(f"--append: given, but {storage.url} holds no set; a finished one is needed. Leave --append "
                                "out to start one")


def _find_sources(options: ConvertOptions) -> list[Source]:
    sources = [find_source(text, licence=options.licence) for text in options.sources]
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"sources: {', '.join(sorted(twice))} is the name of more than one source; each needs a name "
                         "of its own in the manifest. Write NAME=SOURCE")
    return sources


def _tokenizer(options: ConvertOptions, storage: Storage, plan: Plan | None,
               sources: Sequence[Source]) -> PreTrainedTokenizerFast:
    """The tokenizer: the given one, the set's own, or one trained now."""
    if options.tokenizer is not None:
        tok = tokenizers.load(options.tokenizer)
    elif plan is None:
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
    with Progress("tokenizer", meter, sum(source.num_bytes for source in sources), show=options.progress) as progress:

        def texts() -> Iterator[str]:
            for source in sources:
                for pieces, num_bytes, digest in _texts(source, meter, options):
                    progress.update(documents=1, num_bytes=num_bytes)
                    if digest >= options.validation * 2**64:
                        yield from pieces()

        return tokenizers.train_bpe(texts(), int(options.train_tokenizer or 0))


def _texts(source: Source, meter: Meter,
           options: ConvertOptions) -> Iterator[tuple[Callable[[], Iterable[str]], int, int]]:
    """Each document's text in pieces, its UTF-8 bytes, and the hash that decides its split."""
    total = 0
    for parts in plan_parts(source, 1 << 62):
        for document in read_parts(source, parts, meter, text_field=options.text_field, id_field=options.id_field):
            pieces = document.pieces if isinstance(document, LongDocument) else functools.partial(iter, [document.text])
            digest, num_bytes = xxhash.xxh64(seed=options.seed), 0
            for piece in pieces():
                encoded = piece.encode()
                digest.update(encoded)
                num_bytes += len(encoded)
            yield pieces, num_bytes, digest.intdigest()
            total += num_bytes
            if options.limit_bytes is not None and total >= options.limit_bytes:
                return


def _record(options: ConvertOptions, storage: Storage) -> dict[str, Any]:
    """The options that shape the data; evaluation texts are among them, so their n-grams are collected first."""
    if not options.filters.decontaminate:
        return options.record()
    ngrams = index_sources(options.filters.decontaminate, text_field=options.filters.decontaminate_field)
    if not storage.exists(NGRAMS):
        path = storage.scratch() / f"ngrams.{uuid.uuid4().hex[:8]}"
        ngrams.save(path)
        storage.put_file(path, NGRAMS)
    return {**options.record(), "filters": options.filters.record(ngrams=ngrams)}


def _plan(options: ConvertOptions, plan: Plan | None, sources: Sequence[Source], fingerprint: Mapping[str, Any],
          storage: Storage) -> Plan:
    """What is to be done; an earlier plan must agree with it in all that shapes the data.

    Raises:
        ValueError: it does not; names what differs, and both values.
    """
    record = _record(options, storage)
    if plan is None:
        return make_plan(sources, options=record, tokenizer=fingerprint)
    _check_options(plan, record, fingerprint, options, storage)
    names = [source.name for source in sources]
    if options.append:
        prefix = [name for name in plan.sources if name not in names]
        if list(plan.sources)[:len(prefix)] != prefix:
            raise ValueError(f"--append: {', '.join(names)} given, but {storage.url} has its sources in the order "
                             f"{', '.join(plan.sources)}; only the last ones can be added again. Name new sources")
        if not set(names) & set(plan.sources) and not storage.exists(f"train/{MANIFEST}"):
            raise ValueError(f"--append: {storage.url} is not finished; a finished set is needed. Run the conversion of "
                             f"{', '.join(plan.sources)} again first, without --append")
        kept = tuple(unit for unit in plan.units if unit.source in prefix)
        before = Plan(plan.options, plan.tokenizer, {name: plan.sources[name] for name in prefix}, kept)
        wanted = add_sources(before, sources)
    else:
        if names != list(plan.sources):
            raise ValueError(f"sources: {', '.join(names)} given, but {storage.url} was begun with "
                             f"{', '.join(plan.sources)}; they must be the same. Use --append with the new sources alone, "
                             "or another --out")
        wanted = add_sources(Plan(plan.options, plan.tokenizer), sources)
    _check_inputs(plan, wanted, storage)
    return wanted


def _check_options(plan: Plan, record: Mapping[str, Any], fingerprint: Mapping[str, Any], options: ConvertOptions,
                   storage: Storage) -> None:
    differing = [f"{key} ({plan.options.get(key)!r} then, {value!r} now)" for key, value in record.items()
                 if plan.options.get(key) != value and not (options.append and key == "train_tokenizer")]
    differing += [f"tokenizer {key} ({plan.tokenizer.get(key)} then, {fingerprint[key]} now)"
                  for key in ("vocab_size", "special_ids", "vocab_sha256", "probe_sha256")
                  if plan.tokenizer.get(key) != fingerprint[key]]
    if differing:
        raise ValueError(f"--out {storage.url}: it was begun with other options: {'; '.join(differing)}. The options of a "
                         "set never change: give the same ones to go on, or another --out")


def _check_inputs(plan: Plan, wanted: Plan, storage: Storage) -> None:
    """Inputs may have changed only where no finished unit was read."""
    finished = {int(Path(name).stem) for name, _ in storage.list("units/") if Path(name).stem.isdigit()}
    for number in sorted(finished):
        then = plan.units[number] if number < len(plan.units) else None
        now = wanted.units[number] if number < len(wanted.units) else None
        if then != now:
            what = now if then is None else then
            changed = [part.file for part, size in zip(then.parts, then.sizes)
                       if now is None or (part, size) not in zip(now.parts, now.sizes)] if then else []
            raise ValueError(f"{what.label if what else number}: the input was changed after it was converted"
                             f"{' (' + changed[0] + ')' if changed else ''}; finished units keep their input. Restore the "
                             "files as they were, or convert into another --out")


def _run(job: ConvertUnit, todo: Sequence[Unit], plan: Plan, options: ConvertOptions, storage: Storage) -> int:
    """Does the units; tokens written."""
    if not todo:
        return 0
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(todo))
    if options.filters.deduplicate:
        unhashed = [unit for unit in plan.units if not storage.exists(hashes_name(unit.number))]
        for _ in _execute(HashUnit(job.out, job.options, job.sources), unhashed, "hashes", workers, options):
            pass
        _find_duplicates(plan, storage)
    tokens = 0
    for _, result in _execute(job, todo, "documents", workers, options):
        tokens += result["tokens"]
    return tokens


def _execute(job: Callable[..., Any], units: Sequence[Unit], title: str, workers: int,
             options: ConvertOptions) -> Iterator[tuple[Unit, Any]]:
    with Board(title, sum(unit.num_bytes for unit in units), workers, show=options.progress) as board:
        if options.executor == "ray":
            from ettin_foundry.ray_pool import run_tasks_ray

            yield from run_tasks_ray(job, units, workers=workers, board=board, address=options.ray_address)
        else:
            yield from run_tasks(job, units, workers=workers, board=board)


def _find_duplicates(plan: Plan, storage: Storage) -> None:
    """From the hashes of all units, which documents of each unit repeat earlier ones."""
    folder = storage.scratch() / f"duplicates.{uuid.uuid4().hex[:8]}"
    try:
        files = [folder / "hashes" / f"{unit.number:05d}.npy" for unit in plan.units]
        for unit, path in zip(plan.units, files):
            storage.get_file(hashes_name(unit.number), path, num_bytes=storage.size(hashes_name(unit.number)))
        merge(files, folder / "drops")
        for unit, path in zip(plan.units, files):
            storage.put_file(folder / "drops" / path.name, drops_name(unit.number))
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
    """The command line; returns the exit status: 0, or 1 after one line that says what is wrong with the input."""
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        summary = convert(options_from(arguments))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{summary}\n")
    return 0
