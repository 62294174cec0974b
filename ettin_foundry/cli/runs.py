"""The commands of `ettin` for training runs seen as a whole: recipes, plan, lint, suite, order."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ettin_foundry.data.stream import RowStream


def recipes(copy: Annotated[Path | None, typer.Option(
        help="Folder to copy train.py, yamls/ and data_prep/ into.")] = None) -> None:
    """List the recipes, or copy them into a folder of your own.

    Example: ettin recipes --copy my-runs
    """
    from ettin_foundry import program_folder

    here, parts = program_folder(), ("train.py", "yamls", "data_prep")
    if copy is None:
        print(*sorted(path.relative_to(here).as_posix() for path in (here / "yamls").rglob("*.yaml")), sep="\n")
        return
    if taken := [name for name in parts if (copy / name).exists()]:
        raise ValueError(f"--copy must be a folder without {', '.join(taken)}, got {copy}; choose another")
    copy.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / parts[0], copy)
    for name in parts[1:]:
        shutil.copytree(here / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"wrote {', '.join(parts)} in {copy}")


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file, or a suite file.")],
    more: Annotated[list[str] | None, typer.Argument(
        metavar="OVERLAY|KEY=VALUE", help="As for train.py, or keys of the suite.")] = None,
    gpus: Annotated[str | None, typer.Option(
        help="Such as 4xH100, which is taken if left out (for runs in fp32: one CPU process).")] = None,
    mfu: Annotated[float | None, typer.Option(
        help="Share of the peak, at 6 operations per parameter and token; the original's if left out.")] = None,
    picture: Annotated[Path | None, typer.Option(
        help="Draw learning rate, batch size, masks and row length into this file (png, svg, pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a run or suite takes: steps, memory, hours, storage.

    Example: ettin plan yamls/ettin-dec-150m.yaml --gpus 4xH100
    """
    from ettin_foundry.tools import plan as planning
    from ettin_foundry.training import recipes as files

    if recipe.endswith((".yaml", ".yml")) and {"stages", "extends"} & set(files.read(recipe)):
        from ettin_foundry.tools.suite import load

        found = load(recipe, more or []).stages
        stages, sources = [(s.name, s.config) for s in found], {s.name: s.source for s in found}
    else:
        config = files.resolved([recipe, *(more or [])])
        name = config.get("run_name") or recipe
        stages, sources = [(name, config)], {name: None}
    runs = planning.plan_runs(stages, gpus=gpus, mfu=mfu)
    if picture is not None:
        from ettin_foundry.tools.pictures import draw_plans

        draw_plans(runs, picture, sources)
    print(json.dumps(planning.as_json(runs), indent=1) if as_json else planning.text(runs))


def lint(
    words: Annotated[list[str], typer.Argument(
        metavar="RUN|KEY=VALUE", help="Two runs, each YAML files and key=value joined by +; then key=value for both.")],
    chain: Annotated[bool, typer.Option("--chain", help="The runs are one model's phases, in order.")] = False,
) -> None:
    """Say whether two runs are a fair pair, and why.

    The exit code is 1 when they are not.

    Example: ettin lint yamls/ettin-enc-150m.yaml yamls/ettin-dec-150m.yaml
    """
    from ettin_foundry.tools.pair import lint_chain, lint_pair

    runs = [word for word in words if "=" not in word.split("+")[0]]
    if len(runs) != 2 and not (chain and len(runs) > 2):
        raise typer.BadParameter(f"two runs are compared, --chain takes two or more phases; {len(runs)} given: {runs}")
    configs = [_config(run, [word for word in words if word not in runs]) for run in runs]
    names = [str(config.get("run_name") or run) for run, config in zip(runs, configs)]
    report = lint_chain([*zip(names, configs)]) if chain else lint_pair(*configs, names=(names[0], names[1]))
    print(report)
    if not report.fair:
        raise typer.Exit(1)


def _config(text: str, overrides: list[str]) -> dict[str, Any]:
    """The checked config of `recipe.yaml+overlay.yaml+key=value` and overrides after it."""
    from ettin_foundry.training import recipes
    from ettin_foundry.training.checks import check_settings

    parts = re.split(r"\+(?=[^+=]*(?:=|\.ya?ml(?:\+|$)))", text)  # at + before a file or a key, not in 1e+3
    try:
        config = {key: value for key, value in recipes.resolved([*parts, *overrides]).items() if value is not None}
        check_settings(config)
    except (ValueError, OSError) as error:
        raise type(error)(f"{text}: {error}") from error
    return config


def suite(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Suite file, such as yamls/suite/ettin-150m.yaml.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="KEY=VALUE", help="Keys of the file, such as scale=0.01 or root=runs/mine.")] = None,
    list_: Annotated[bool, typer.Option(
        "--list", help="Train nothing: check all, print each stage, its source and its exact command.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="As --list, as JSON.")] = False,
    stage: Annotated[list[str] | None, typer.Option(
        help="Run this stage only; may be repeated. No export, no report.")] = None,
    report: Annotated[bool, typer.Option(
        "--report", help="Train nothing: export, evaluate and report what is finished.")] = False,
    command: Annotated[str | None, typer.Option(help="What starts a run, instead of the file's command.")] = None,
    allow_unfair: Annotated[bool, typer.Option(
        "--allow-unfair", help="Train pairs that differ in more than their objective; the report says so.")] = False,
) -> None:
    """Train the stages of a suite in order, then export and report.

    Finished stages are skipped, an interrupted one continues.

    Example: ettin suite yamls/suite/nano.yaml scale=0.02 root=runs/suite-short
    """
    from ettin_foundry.tools.suite import load

    if report and (stage or command):
        raise ValueError("--report trains nothing; leave out --stage and --command")
    found = load(file, [*(settings or []), *([f"command={command}"] if command is not None else [])])
    from ettin_foundry.tools.suite_run import StageFailed, check_suite, run_suite, signals

    fairness = check_suite(found, allow_unfair=allow_unfair)
    if list_ or json_:
        _list(found, json_)
        return
    try:
        with signals():
            if not report:
                run_suite(found, only=stage or [])
            if not stage:
                from ettin_foundry.tools.report import write_report

                write_report(found, fairness)
    except StageFailed as error:
        print(f"error: {error}\nNothing after it was started. The same command continues.", file=sys.stderr)
        raise typer.Exit(3) from None
    except KeyboardInterrupt as error:
        print("stopped. The same command continues.", file=sys.stderr)
        raise typer.Exit(128 + (error.args[0] if error.args else signal.SIGINT)) from None


def _list(found: Any, as_json: bool) -> None:
    stages = [{"name": stage.name, "from": stage.source, "pair": stage.pair, "folder": str(stage.folder),
               "max_duration": stage.config["max_duration"], "command": stage.words} for stage in found.stages]
    if as_json:
        print(json.dumps({"name": found.name, "root": str(found.root), "stages": stages}, indent=1))
        return
    for stage in stages:
        pair = f", pair {stage['pair']}" if stage["pair"] else ""
        print(f"{stage['name']}: {stage['max_duration']} from {stage['from'] or 'initialisation'}{pair}\n"
              f"    {shlex.join(stage['command'])}")


def order(
    words: Annotated[list[str] | None, typer.Argument(
        metavar="DATASET|KEY=VALUE", help="A dataset in place of the recipe's, and keys as for train.py.")] = None,
    yaml: Annotated[list[str] | None, typer.Option(help="The recipe; again for each overlay.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(
        help="In place of a recipe: a checkpoint or save folder, and the step that follows it.")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Counted from 0, as in steps.jsonl.")] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows whose documents are printed.")] = 8,
    decode: Annotated[bool, typer.Option("--decode", help="Print how each chunk begins.")] = False,
    export: Annotated[Path | None, typer.Option(
        help="Folder to write the order into, in the format of jhu-clsp/ettin-data-order.")] = None,
    first: Annotated[int, typer.Option("--from", min=0, help="First step of the export.")] = 0,
    last: Annotated[int | None, typer.Option("--to", min=0, help="First step that is not exported.")] = None,
) -> None:
    """Show what a step of a run reads, or write a run's order as files.

    Example: ettin order --yaml yamls/nano.yaml --step 100
    """
    from rich.console import Console
    from rich.progress import track

    from ettin_foundry.tools.order import export_order, next_step, steps_of_run, stream_of
    from ettin_foundry.training.recipes import resolved

    places, overrides = ([word for word in words or [] if ("=" in word) is key] for key in (False, True))
    for wrong, message in (
            ((yaml is None) == (checkpoint is None), "either --yaml or --checkpoint must be given"),
            (checkpoint and overrides, f"--checkpoint must come without keys, got {' '.join(overrides)}"),
            (len(places) > 1, f"DATASET must be one place, got {' '.join(places)}"),
            (export is None and (first or last is not None), "--from and --to must come with --export"),
            (export and step is not None, "--export must come with --from and --to instead of --step"),
            (yaml and export is None and step is None, "--step or --export must be given with --yaml")):
        if wrong:
            raise ValueError(message)
    location, following = places[0] if places else None, 0
    if checkpoint is not None:
        cfg, stream, following = next_step(checkpoint, location)
    else:
        cfg = resolved([*(yaml or []), *overrides])
        stream = stream_of(cfg, location)
    if export is None:
        _show(cfg, stream, following if step is None else step, rows, decode)
        return
    steps, console = steps_of_run(cfg, stream, first, last), Console(stderr=True)
    for _ in track(export_order(cfg, stream, export, steps), "steps", len(steps), console=console,
                   disable=not console.is_terminal):
        pass
    files = sum(1 for _ in export.rglob("*.parquet"))
    print(f"{export} holds the order of {cfg.get('run_name') or 'the run'} in {files:,} files")


def _show(cfg: dict[str, Any], stream: RowStream, step: int, rows: int, decode: bool) -> None:
    from ettin_foundry.data.inspect import load_decoder, plain
    from ettin_foundry.data.packing import SPECIALS_PER_PIECE
    from ettin_foundry.data.storage import open_storage
    from ettin_foundry.tools.order import view_step
    from ettin_foundry.training.run_config import parse_time

    folder = stream.data.local.parent
    decoder = load_decoder(open_storage(str(folder))) if decode else None
    if decode and decoder is None:
        raise ValueError(f"--decode needs the tokenizer/ of the dataset, got {folder} without one")
    view = view_step(stream, step, rows=rows)
    head = view.rows[0]
    print(f"step {step:,} of {cfg.get('run_name') or 'the run'}: {len(view.rows):,} rows, {view.num_tokens:,} tokens, "
          f"{head.tokens_before:,} before it, in epoch {head.epoch}; ids_hash {view.ids_hash:012x}")
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    if (head.tokens_before if unit == "tok" else step) >= amount:
        print(f"the run ends before it: max_duration is {cfg['max_duration']}")
    if rows:
        print(f"{'row':>6} {'tokens':>7}  source, document (part)")
    for row, stored in zip(view.rows, view.samples):
        for chunk, sample in zip(row.chunks, stored):
            part = f"part {sample['part']}" + (", the last" if sample["last"] else "")
            source, doc = plain(sample["source"], 60), plain(sample["doc"], 200)
            print(f"{row.place:>6,} {len(chunk) + SPECIALS_PER_PIECE:>7,}  {source}  {doc} ({part})")
            if decoder is not None:
                print(" " * 16 + plain(decoder.decode(chunk[:60].tolist()), 60))
    if len(view.samples) < len(view.rows):
        print(f"and {len(view.rows) - len(view.samples):,} rows more (--rows)")
