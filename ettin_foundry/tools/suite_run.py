"""Runs the stages of a suite in order: skips finished ones, continues an interrupted one, stops at the first that fails.

All of it is checked before the first process starts: every stage's settings and data, that pairs are pairs, and that what
lies in the stages' folders is theirs. What a stage has reached is read from its newest complete checkpoint, never from notes
of an earlier suite, so a stage may as well be started alone, on another machine, or by a scheduler. Reading suite files is
in suite.py, the process of one stage in suite_process.py, the report in suite_report.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ettin_foundry.tools.lint_report import HARMLESS
from ettin_foundry.tools.pair import lint_chain, lint_pair
from ettin_foundry.tools.suite import Stage, Suite
from ettin_foundry.tools.suite_process import run_process, say, time_text
from ettin_foundry.training import checkpoints as checkpoint
from ettin_foundry.training import checks, run_config
from ettin_foundry.training.steps import STEPS, compare_steps, read_steps

__all__ = ["StageFailed", "State", "check_suite", "compare_pair", "inspect", "run_suite"]


class StageFailed(RuntimeError):
    """A stage ended without having finished its run."""


class State(NamedTuple):
    """How far a stage is."""

    checkpoint: Path | None
    """The newest complete one."""
    record: dict[str, Any]
    """What the run's Clock wrote into it; empty without a checkpoint."""
    finished: bool

    @property
    def tokens(self) -> int:
        """Real tokens of this run alone."""
        return int(self.record.get("tokens") or 0)


def inspect(stage: Stage) -> State:
    """Reads a stage's newest complete checkpoint.

    Raises:
        ValueError: the checkpoint is of a run with other settings; each that may change what is learnt is named with both
            values.
    """
    newest = checkpoint.newest_complete(stage.folder)
    if newest is None:
        return State(None, {}, False)
    record, config = checkpoint.read_head(newest).record, stage.config()
    if differing := _other_settings(stage, record, config):
        raise ValueError(f"stages.{stage.name}: {newest} was trained with other settings: {'; '.join(differing[:8])}"
                         f"{f'; and {len(differing) - 8} more' if len(differing) > 8 else ''}. Restore them, or give "
                         "another root, or move that folder away")
    amount, unit = checks.parse_time("max_duration", config["max_duration"])
    return State(newest, record, int(record.get("tokens" if unit == "tok" else "batch") or 0) >= amount)


def _other_settings(stage: Stage, record: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """`key: then, now` of each difference, between a checkpoint's run and the stage's, that may change what is learnt."""
    text = run_config.config_text(config)
    if record.get("run_hash") == run_config.config_hash(text):
        return []
    if "run_config" not in record:
        return ["its config is not in it, so it is not one of train.py's"]
    found = lint_pair(json.loads(record["run_config"]), json.loads(text), names=("then", "now")).differences
    return [f"{d.key}: {d.a} then, {d.b} now" for d in found if d.verdict != HARMLESS or d.key.endswith(".source")]


# ------------------------------------------------------------------ before anything starts


def check_suite(suite: Suite, *, allow_unfair: bool = False) -> dict[str, dict[str, Any]]:
    """Refuses a suite of which some stage could not run as written, or whose pairs are none.

    Args:
        allow_unfair: go on with an unfair pair or chain.

    Returns:
        {pair or last stage of a chain: {members, fair, findings}}, for the report; findings is the linter's text.

    Raises:
        ValueError, FileNotFoundError: naming the stage and the key.
    """
    configs = {stage.name: stage.config() for stage in suite.stages}
    for stage in suite.stages:
        try:
            checks.check_settings(configs[stage.name])
        except ValueError as error:
            raise ValueError(f"stages.{stage.name}: {error}") from error
    found = {}
    for pair, members in suite.pairs().items():
        first = members[0].name
        for other in (member.name for member in members[1:]):
            report = lint_pair(configs[first], configs[other], names=(first, other))
            found[f"pair {pair}: {first}, {other}"] = {"members": [first, other], "fair": report.fair,
                                                       "findings": str(report)}
    followed = {stage.source for stage in suite.stages}
    for stage in suite.stages:
        chain = suite.chain(stage)
        if stage.name not in followed and len(chain) > 1:
            report = lint_chain([(each.name, configs[each.name]) for each in chain])
            names = [each.name for each in chain]
            found[f"chain {' -> '.join(names)}"] = {"members": names, "fair": report.fair, "findings": str(report)}
    unfair = [f"{key}\n{entry['findings']}" for key, entry in found.items() if not entry["fair"]]
    if unfair and not allow_unfair:
        raise ValueError("\n".join([f"{suite.path}: its models could not be compared:", *unfair,
                                    "Make the settings equal, or pass --allow-unfair, which the report will say"]))
    return found


def _check_data(stage: Stage) -> None:
    """Data of a late phase that is missing is found before the first phase has run for weeks."""
    try:
        checks.check_files(stage.config())
    except (ValueError, OSError) as error:
        raise type(error)(f"stages.{stage.name}: {error}") from error


# ------------------------------------------------------------------ running


def run_suite(suite: Suite, *, only: Sequence[str] = (), report_only: bool = False, allow_unfair: bool = False) -> None:
    """Trains what is not finished, compares pairs, then exports, evaluates and reports.

    Args:
        only: names of stages; nothing but these is trained, and nothing is reported.
        report_only: nothing is trained; every stage must be finished.
        allow_unfair: see `check_suite`.

    Raises:
        ValueError, FileNotFoundError: a setting, a folder, data, or a pair that read different rows; nothing is started, or
            nothing more.
        StageFailed: a stage failed. The message has its reason.
        Stopped: this process was told to end; the stage's process was ended before.
    """
    begin = time.monotonic()
    stages = [suite.stage(name) for name in only] or list(suite.stages)
    found = check_suite(suite, allow_unfair=allow_unfair)
    open_stages = [stage for stage in stages if not inspect(stage).finished]
    if report_only and open_stages:
        raise ValueError(f"--report: given, but {', '.join(s.name for s in open_stages)} not finished. Run ettin suite "
                         f"{suite.path} without it")
    for stage in open_stages:
        _check_data(stage)
    for number, stage in enumerate(stages, 1):
        _train(suite, stage, f"{number}/{len(stages)} {stage.name}", finished=stage not in open_stages)
        if stage.pair is not None:
            compare_pair(suite.pairs()[stage.pair])
    if not only:
        from ettin_foundry.tools.report import write_report

        say(write_report(suite, found, seconds=time.monotonic() - begin))


def _train(suite: Suite, stage: Stage, title: str, *, finished: bool) -> None:
    if finished:
        say(f"{title}: finished, {inspect(stage).tokens:,} tokens")
        return
    if stage.source is not None and not inspect(suite.stage(stage.source)).finished:
        raise ValueError(f"stages.{stage.name}: starts from {stage.source}, which is not finished. Run that first: ettin "
                         f"suite {suite.path} --stage {stage.source}")
    begin = time.monotonic()
    failed = run_process(stage, suite.words(stage), title)
    state = inspect(stage)
    if failed is None and not state.finished:
        failed = (f"it ended with exit code 0, but its newest checkpoint has {state.tokens:,} tokens, and max_duration is "
                  f"{stage.config()['max_duration']}; see {stage.folder}")
    if failed is not None:
        raise StageFailed(f"{stage.name} failed: {failed}")
    say(f"{title}: done, {state.tokens:,} tokens in {time_text(time.monotonic() - begin)}")


def compare_pair(members: Sequence[Stage]) -> int:
    """Holds the finished members of a pair to one another: the same rows at every step, by the hashes that the runs logged.

    Returns:
        Steps compared; 0 while fewer than two members are finished.

    Raises:
        ValueError: they read different rows at some step; FileNotFoundError: a member has no record of its steps.
    """
    done = [stage for stage in members if inspect(stage).finished]
    for other in done[1:]:
        step = compare_steps(done[0].folder, other.folder)
        if step is not None:
            raise ValueError(f"pair {done[0].pair}: {done[0].name} and {other.name} did not read the same rows at step "
                             f"{step} ({done[0].folder / STEPS}, {other.folder / STEPS}), so they cannot be compared. Was "
                             "the data changed between them? Move the folder of the wrong one away and run the suite again")
    return len(read_steps(done[0].folder)) if len(done) > 1 else 0
