"""What another run's checkpoint says of itself, and whether a run may start from it.

`prepare` compares before any work, by the config; the callbacks in phases.py compare again, with what was built. Reading is
of records and headers only. Local files and folders; what the host fetches is checked once it is here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ettin_foundry.data import tokenizer
from ettin_foundry.training import checkpoints as checkpoint
from ettin_foundry.training.starts import FREE_FIELDS, SHAPE_FIELDS

__all__ = ["Source", "Target", "compare", "prepare", "read_source"]

log = logging.getLogger(__name__)

Differences = dict[str, tuple[Any, Any]]
"""{key: (the source's value, this run's)}."""

# of a checkpoint: what belongs to the run that wrote it. Metrics would be asked of a sharded one under labels it has not
ANEW = ("state/timestamp", "state/dataset_state", "state/schedulers", "state/rank_zero_seed", "state/train_metrics",
        "state/eval_metrics", "rng")
_CALLBACKS = "state/callbacks"
@dataclass(frozen=True)
class Source:
    """A checkpoint or Hugging Face folder to start from, as it describes itself; no tensor is read."""

    path: Path
    record: Mapping[str, Any]
    """As `clock.Clock.state_dict` has it; of a folder what its config.json says."""
    has_moments: bool
    is_folder: bool

    @property
    def fingerprint(self) -> dict[str, Any] | None:
        """The tokenizer's (`tokenizer.fingerprint`), recorded or of the tokenizer that it names; None if there is none."""
        recorded, named = self.record.get("tokenizer_fingerprint"), self.record.get("tokenizer")
        if recorded or not named or not (Path(named) / "tokenizer.json").is_file():
            return recorded
        return tokenizer.fingerprint(tokenizer.load(named))


@dataclass(frozen=True)
class Target:
    """The run that starts."""

    config: Mapping[str, Any]
    """Fields of its `EttinConfig`."""
    starts_with: tuple[str, ...]
    """Objectives of its first batch."""
    fingerprint: dict[str, Any] | None
    """Its tokenizer's, or None without one."""


def read_source(key: str, source: str) -> Source:
    """What a source says of itself.

    Args:
        key: how the user calls it. source: a `.pt` file, a sharded folder, a save folder (then its newest complete
            checkpoint), or a Hugging Face folder.

    Raises:
        FileNotFoundError, ValueError: missing, partial, pickled with code, or without a record; it names the key.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{key}: {source!r} given; no such file or folder. Give a checkpoint, a save folder such as "
                                "runs/NAME, or a Hugging Face folder that was downloaded")
    try:
        if (path / "config.json").is_file():
            return _read_folder(path)
        head = checkpoint.read_head(path)
    except (ValueError, OSError) as error:
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"{key}: {source!r} given; {error}") from error
    if not head.record.get("config"):
        raise ValueError(f"{key}: {source!r} given; {head.path.name} does not say what model it holds, so nothing could be "
                         "checked. Give a checkpoint that a run of ettin_foundry wrote, or `ettin import` made")
    return Source(head.path, head.record, head.has_moments, is_folder=False)


def _read_folder(path: Path) -> Source:
    from safetensors import SafetensorError, safe_open

    from ettin_foundry.model.hf_config import read_config

    config, objective = read_config(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} has no model.safetensors; a Hugging Face folder with its weights is needed")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass  # opening compares the header with the file's length
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); download or export it again") from error
    ours = json.loads((path / "config.json").read_text(encoding="utf-8")).get("ettin_foundry") or {}
    lineage = tuple(ours.get("lineage") or ())
    tokens = ours.get("tokens")
    if tokens is not None:  # the card counts from initialisation, a record from the last start
        tokens -= sum(entry.get("tokens") or 0 for entry in lineage)
    return Source(path, {"config": dataclasses.asdict(config), "size": config.size, "objective": objective, "tokens": tokens,
                         "tokenizer": str(path), "lineage": lineage}, has_moments=False, is_folder=True)


# ------------------------------------------------------------------ comparing


def compare(key: str, source: Source, target: Target, accept: Sequence[str], *, crossing: bool) -> Differences:
    """Holds a source to the run that starts from it.

    Args:
        key: the callback as the user calls it. accept: what may differ besides what always may.
        crossing: for `ettin_cross`; else for `ettin_phase`.

    Returns:
        {key: (source's value, this run's)} of the differences that `accept` lists.

    Raises:
        ValueError: another size, vocabulary, rotary base, tokenizer or objective, with both values.
    """
    old, new = source.record["config"], target.config
    shape = [f"{name} {old[name]} (here {new[name]})" for name in SHAPE_FIELDS if old[name] != new[name]]
    if shape:
        raise ValueError(f"{key}.source: {source.path} has {', '.join(shape)}; its weights do not fit. Choose a source of "
                         "the same size and vocabulary, or set model.size")
    found = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
    free = (*FREE_FIELDS, *(("window_left",) if crossing or old["causal"] != new["causal"] else ()))
    found = {name: values for name, values in found.items() if name not in free}
    found |= _compare_tokenizers(source, target) | _compare_objectives(key, source, target, accept, crossing)
    refused = [f"{name} {was} (here {now})" for name, (was, now) in found.items() if name not in accept]
    if refused:
        listed = ", ".join(name for name in found if name not in accept)
        raise ValueError(f"{key}.source: {source.path} has {', '.join(refused)}; what the weights were trained with must be "
                         f"the same, or the model would compute something else. Choose another source, set the same here "
                         f"(variables.rope_theta=... for rotary bases), or allow it: {key}.accept=[{listed}]")
    return found


def _compare_tokenizers(source: Source, target: Target) -> Differences:
    old, new = source.fingerprint, target.fingerprint
    if old is None or new is None:
        if new is not None:
            log.warning("%s names no tokenizer that is here: whether it is this run's is not checked", source.path)
        return {}
    for name in ("vocab_size", "special_ids", "vocab_sha256", "probe_sha256"):
        if old.get(name) != new[name]:
            was, now = (f"{f.get('name')!r} with {name} {f.get(name)}" for f in (old, new))
            return {"tokenizer": (was, now)}
    return {}


def _compare_objectives(key: str, source: Source, target: Target, accept: Sequence[str], crossing: bool) -> Differences:
    old, new = source.record.get("objective"), " + ".join(target.starts_with)
    same = old in target.starts_with
    blind = target.starts_with != ("clm",) and not source.record["config"]["causal"]
    if crossing and old is None and blind:
        raise ValueError(f"{key}.source: {source.path} does not say whether this encoder predicts masks as mlm or mntp, and "
                         f"this run starts with {new}. Say it once: `ettin import {source.path} FILE.pt --objective mlm` "
                         "(official encoders) and give FILE.pt")
    if crossing and same:
        raise ValueError(f"{key}.source: {source.path} was trained with {old}, and this run starts with {new}; crossing "
                         "changes the objective. Use callbacks.ettin_phase to go on with the same (keep: weights drops its "
                         "moments)")
    if crossing or same:
        return {}
    if "clm" in (old, *target.starts_with) or "objective" not in accept:
        allow = "" if "clm" in (old, *target.starts_with) else f", or allow it: {key}.accept=[objective]"
        raise ValueError(f"{key}.source: {source.path} was trained with {old}, and this run starts with {new}; a phase goes "
                         f"on with the same objective. Use callbacks.ettin_cross (yamls/phases/cross.yaml) to change "
                         f"it{allow}")
    return {"objective": (old, new)}


# ------------------------------------------------------------------ before work


def prepare(cfg: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Checks the source that a config names, and says how the host shall load it.

    Args:
        cfg: plain containers that `checks.check_settings` accepts. name: `ettin_phase` or `ettin_cross`.

    Returns:
        Keys to set in the config; none for `ettin_cross`, which loads by itself.

    Raises:
        FileNotFoundError, ValueError: as `read_source` and `compare`, or a checkpoint that cannot give what is asked of it.
    """
    key, block = f"callbacks.{name}", cfg["callbacks"][name]
    given, crossing, sharded = block["source"], name == "ettin_cross", _is_sharded(cfg)
    if "://" in given:
        if crossing:
            raise ValueError(f"{key}.source: {given!r} given; only a local file or folder can be read. Download it first")
        return _loading(block, given)  # the host fetches it, and EnterPhase checks what came
    remote = "://" in (cfg.get("save_folder") or "") and cfg.get("autoresume")
    if remote and not Path(given).exists():
        log.warning("%s.source: %s is not here; it is needed unless this run's own checkpoint is found", key, given)
        return {} if crossing else _loading(block, given)
    source = read_source(f"{key}.source", given)
    if not crossing:
        _check_loadable(key, block, source, sharded, cfg["optimizer"]["name"])
    accept = block.get("accept", [])
    found = compare(key, source, _target(cfg), accept, crossing=crossing)
    if crossing:
        idle = [entry for entry in accept if entry not in found]
        if idle:
            raise ValueError(f"{key}.accept: {idle[0]!r} given, but {source.path} and this run agree in it, so it allows "
                             "nothing. Remove it")
        _check_evaluation(cfg, key, source)
        return {}
    return _loading(block, str(source.path))


def _is_sharded(cfg: Mapping[str, Any]) -> bool:
    return (cfg.get("fsdp_config") or {}).get("state_dict_type") == "sharded"


def _loading(block: Mapping[str, Any], path: str) -> dict[str, Any]:
    if block.get("keep") == "weights":
        return {"load_path": path, "load_weights_only": True}
    # a remote one's record comes through the host, with the callbacks' state
    return {"load_path": path, "load_ignore_keys": [*ANEW, *(() if "://" in path else (_CALLBACKS,))]}


def _check_loadable(key: str, block: Mapping[str, Any], source: Source, sharded: bool, optimizer: str) -> None:
    path, weights_only = source.path, block.get("keep") == "weights"
    if source.is_folder:
        raise ValueError(f"{key}.source: {path} is a Hugging Face folder, which holds no optimizer moments. Give the run's "
                         "checkpoint; without one, use callbacks.ettin_cross to change the objective, or `ettin import` and "
                         f"{key}.keep=weights to go on with the same")
    if not source.has_moments and not weights_only:
        raise ValueError(f"{key}.source: {path} holds no optimizer moments. Give a whole checkpoint, or set "
                         f"{key}.keep=weights to start the optimizer anew")
    before = json.loads(source.record.get("run_config") or "{}").get("optimizer", {}).get("name", optimizer)
    if before != optimizer and not weights_only:
        raise ValueError(f"{key}.source: {path} holds moments of {before}, and this run's optimizer.name is {optimizer}; "
                         f"they are of no use to it. Take the same optimizer, or set {key}.keep=weights to start it anew")
    if path.is_dir() != sharded:
        raise ValueError(f"{key}.source: {path} is {'a sharded checkpoint' if path.is_dir() else 'one file'}, and this "
                         f"run's fsdp_config.state_dict_type is {'sharded' if sharded else 'not sharded'}; the host loads a "
                         f"checkpoint of its own kind only. Set it to {'sharded' if path.is_dir() else 'full'}, as the "
                         "source's run had it")


def _target(cfg: Mapping[str, Any]) -> Target:
    from ettin_foundry.training.run_config import model_config, objective_schedule

    return Target(dataclasses.asdict(model_config(dict(cfg))), tuple(objective_schedule(dict(cfg)).at(0)),
                  tokenizer.fingerprint(tokenizer.load(cfg["tokenizer"]["name"])))


def _check_evaluation(cfg: Mapping[str, Any], key: str, source: Source) -> None:
    """An evaluation of several objectives is there to show what is forgotten, so the source's must be among them."""
    evals = cfg.get("eval_loaders") or cfg.get("eval_loader") or []
    for block in [evals] if isinstance(evals, dict) else evals:
        names, old = block.get("objective"), source.record.get("objective")
        if isinstance(names, list) and all(isinstance(n, str) for n in names) and old is not None and old not in names:
            raise ValueError(f"eval_loader.objective: {names} given, and {key}.source ({source.path}) was trained with "
                             f"{old}; its loss would not be logged, so forgetting not be seen. Set "
                             f"variables.source_objective={old}")
