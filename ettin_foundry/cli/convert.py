"""Text to a dataset: the command line of `python data_prep/convert.py` and of `ettin convert`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from ettin_foundry.corpus import convert as converting
from ettin_foundry.corpus.executors import WorkerDeath
from ettin_foundry.corpus.filters import FilterOptions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_REMOVED = ("--decontaminate", "--decontaminate-field", "--drop-contaminated")
_D = converting.ConvertOptions  # its defaults


def _help(text: str, *names: str) -> object:
    return typer.Option(*names, help=text)


@app.command(help="Turn text into a dataset (MDS with a manifest). Interrupted, the same command goes on where it was; the "
             "result is the same whatever the workers and machines.")
def convert(
    sources: Annotated[list[str], typer.Argument(metavar="[NAME=]SOURCE...", help="A .jsonl, .json, .txt or .parquet file "
                                                 "(plain, .gz, .zst), a folder or URL of them, a Hugging Face dataset id "
                                                 "(owner/name[:config]), or python-stdlib.")],
    out: Annotated[str, _help("Folder or URL of the dataset: new, or one where this was begun.")],
    tokenizer: Annotated[str | None, _help("Folder or Hugging Face id.")] = None,
    train_tokenizer: Annotated[int | None, _help("Entries of one to train on the corpus instead, e.g. 8192.")] = None,
    chunk_length: Annotated[int, _help("Most tokens in a chunk: row length of training minus 2.")] = _D.chunk_length,
    cut_window: Annotated[float, _help("Share of a chunk in which to look for a paragraph or sentence end; 0: cut as late "
                                       "as possible.")] = _D.cut_window,
    validation: Annotated[float, _help("Share of the documents for validation, by a hash of the text.")] = _D.validation,
    text_field: Annotated[str, _help("Key or column of the text.")] = _D.text_field,
    id_field: Annotated[str | None, _help("Key or column of a document's id.")] = None,
    max_document_bytes: Annotated[str, _help("Drop larger documents.")] = "256mb",
    shard_size: Annotated[str, _help("Bytes per shard.")] = "64mb",
    unit_size: Annotated[str, _help("Input bytes per unit of work.")] = "256mb",
    compression: Annotated[str | None, _help("zstd, or leave it out for plain shards.")] = None,
    limit_bytes: Annotated[int | None, _help("Stop each source after so much text.")] = None,
    seed: Annotated[int, _help("Of the validation split.")] = 0,
    licence: Annotated[str | None, _help("Licence of files, for the manifest.")] = None,
    append: Annotated[bool, _help("Add these sources to a finished dataset.", "--append")] = False,
    workers: Annotated[int | None, _help("Processes; all cores if left out.")] = None,
    engine: Annotated[str, _help("What tokenizes: fast, tokenizers, or fast where its ids are the same (auto).")] = "auto",
    executor: Annotated[str, _help("local or ray.")] = "local",
    ray_address: Annotated[str | None, _help("A running Ray cluster; one is started here if left out.")] = None,
    task_index: Annotated[int | None, _help("Number of this task in a job array, from 0.")] = None,
    num_tasks: Annotated[int | None, _help("Tasks of the job array.")] = None,
    deduplicate: Annotated[bool, _help("Keep the first of equal documents.", "--deduplicate")] = False,
    min_characters: Annotated[int | None, _help("Drop shorter documents.")] = None,
    max_characters: Annotated[int | None, _help("Drop longer documents.")] = None,
    predicates: Annotated[list[str] | None, typer.Option(
        "--filter", metavar="MODULE:FUNCTION", help="Keep documents for which FUNCTION(text, id) is true; may be repeated.",
    )] = None,
) -> None:
    given = locals()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        filters = FilterOptions(deduplicate=given.pop("deduplicate"), min_characters=given.pop("min_characters"),
                                max_characters=given.pop("max_characters"), predicates=given.pop("predicates") or ())
        print(converting.convert(converting.ConvertOptions(**given, filters=filters)))
    except (ValueError, OSError, WorkerDeath) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("interrupted: finished units are kept; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status: 0, 1 after one line that says what is wrong, 2 for a wrong command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if removed := [option for word in arguments if (option := word.partition("=")[0]) in _REMOVED]:
        print(f"error: {removed[0]} is no option any more; remove evaluation texts with datatrove before, and convert what "
              "it writes (.jsonl.gz)", file=sys.stderr)
        return 2
    try:
        app(args=arguments, prog_name="convert")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
