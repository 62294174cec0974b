"""Reads a run's config: merges YAML files and key=value, and says what times, shapes, keys and schedules in it mean.

Later files win over earlier ones, and key=value wins over files. What a config may hold is checked in checks.py.
Neither torch nor the host is imported: keys and defaults of our blocks are read from signatures as source text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from omegaconf.errors import OmegaConfBaseException

from ettin_foundry import REGISTRY, program_folder
from ettin_foundry.data.stream import DEFAULT_WINDOW, check_warmup
from ettin_foundry.model.config import EttinConfig, did_you_mean
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule

PREEMPTED = 75  # exit code of a run that was told to end and has saved: EX_TEMPFAIL, the same command goes on
# last words of keys whose values are names or paths
TEXT_KEYS = frozenset("run_name name label size source save_folder load_path local remote split folder project entity "
                      "group".split())


def merge(base: Any, over: Any) -> Any:
    """`over` laid onto `base` key by key, in new containers; a block whose `name` changes is replaced.

    So a new scheduler does not inherit the old one's settings. `???` (no value yet) never hides a value.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        if "name" in base and over.get("name", base["name"]) != base["name"]:
            return over
        return {**base, **{k: merge(base[k], v) if k in base else v for k, v in over.items()}}
    return base if over == "???" else over


def read(path: str) -> dict[str, Any]:
    """One YAML file, interpolations left as they are."""
    if not Path(path).is_file():
        here = program_folder()
        known = ", ".join(sorted(p.relative_to(here).as_posix() for p in (here / "yamls").rglob("*.yaml")))
        raise FileNotFoundError(f"{path}: no such file. Arguments are YAML files and key=value; recipes here: {known}")
    try:
        config = om.load(io.StringIO(Path(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, AssertionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: holds {type(config).__name__}, not keys and values; see yamls/ for examples")
    return om.to_container(config)  # type: ignore[return-value]


def configure(args: Sequence[str]) -> DictConfig:
    """The merged config of a command line: its interpolations resolve, no value is missing, its variables exist."""
    om.clear_resolver("oc.env")  # as LLM-Foundry does, so that a YAML means the same in both
    files, overrides = [arg for arg in args if "=" not in arg], [arg for arg in args if "=" in arg]
    if wrong := [arg for arg in files if not arg.endswith((".yaml", ".yml"))]:
        raise ValueError(f"{wrong[0]}: neither a YAML file nor key=value; the only option is --dry-run")
    if not files:
        raise ValueError("no recipe given; usage: composer train.py recipe.yaml [overlay.yaml ...] [key=value ...]")
    merged: dict[str, Any] = functools.reduce(merge, map(read, files), {})
    command_line: Any = om.to_container(om.from_cli(overrides))
    known = merged.get("variables") or {}
    require(isinstance(known, dict), "variables", "a block of keys", known, "see yamls/ for examples")
    if unknown := [k for k in command_line.get("variables") or {} if k not in known]:
        raise ValueError(f"variables.{unknown[0]}: {', '.join(files)} has no such variable, so nothing would change"
                         + did_you_mean(unknown[0], known))
    config: Any = om.create(merge(merged, command_line))
    try:
        if missing := sorted(om.missing_keys(config), key=lambda key: (not key.startswith("variables."), key)):
            raise ValueError(f"{missing[0]}: no value given; add {missing[0]}=... to the command line"
                             + (f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""))
        plain: Any = om.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{', '.join(files)}: {' '.join(str(error).split())}") from error
    check_kinds(plain)
    config.update(rows_from_tokens(plain))
    return config


def resolved(args: Sequence[str]) -> dict[str, Any]:
    """`configure`, with every interpolation filled in, as plain containers."""
    return om.to_container(configure(args), resolve=True)  # type: ignore[return-value]


def rows_from_tokens(cfg: dict[str, Any], ranks: int | None = None) -> dict[str, int]:
    """Rows a GPU takes at once, where a config (plain containers, resolved) gives token positions instead.

    `variables.microbatch_tokens` gives `device_train_microbatch_size`: the most rows of `max_seq_len` that it holds and
    that divide every batch of each of WORLD_SIZE (or `ranks`) processes. `variables.eval_tokens` gives
    `device_eval_batch_size`. A key that the config has itself is left alone.
    """
    variables, length, found = cfg.get("variables") or {}, cfg.get("max_seq_len"), {}
    for name, key in (("microbatch_tokens", "device_train_microbatch_size"), ("eval_tokens", "device_eval_batch_size")):
        tokens = variables.get(name)
        if tokens is None or cfg.get(key) is not None or length is None:
            continue
        if type(tokens) is not int or tokens < length:
            raise ValueError(f"variables.{name} must be an integer >= {length} (max_seq_len), got {tokens!r}")
        found[key] = tokens // length
    if most := found.get("device_train_microbatch_size"):
        smallest = value_at(cfg, "train_loader.batch_size_warmup.min_size") or 0
        rows = math.gcd(cfg.get("global_train_batch_size") or 1, smallest)
        share = max(1, rows // (ranks or int(os.environ.get("WORLD_SIZE", "1"))))
        found["device_train_microbatch_size"] = next(n for n in range(min(most, share), 0, -1) if share % n == 0)
    return found


# ------------------------------------------------------------------ what is in a config

FIELDS = tuple(field.name for field in dataclasses.fields(EttinConfig)
               if field.name not in ("causal", "max_position_embeddings"))
"""Fields of the shape that a config may set; the other two follow from objective and max_seq_len."""
_TIME = re.compile(r"([0-9](?:_?[0-9])*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)(tok|ba|dur|sp|sec|iter)", re.IGNORECASE)


def require(fits: Any, key: str, allowed: str, given: Any, advice: str) -> None:
    """Refuses a setting that does not fit: the key as one types it, what is allowed, what was given, what to do."""
    if not fits:
        raise ValueError(f"{key} must be {allowed}, got {given!r}; {advice}")


def check_kinds(cfg: Mapping[str, Any]) -> None:
    """Refuses a value of another kind than every reader of a config takes for granted: blocks, and counts."""
    def block(key: str, value: Any) -> dict[str, Any]:
        require(isinstance(value or {}, dict), key, "a block of keys", value, "see yamls/ for examples")
        return value or {}

    for key in ("model", "tokenizer", "optimizer", "scheduler", "fsdp_config"):
        block(key, cfg.get(key))
    for name, value in [(f"{key}.{name}", value) for key in ("callbacks", "loggers")
                        for name, value in block(key, cfg.get(key)).items()]:
        block(name, value)
    for key, value in loaders(cfg):
        dataset = block(f"{key}.dataset", block(key, value).get("dataset"))
        require(list not in map(type, dataset.values()), f"{key}.dataset", "texts", dataset, "name a folder and split")
    for key in ("max_seq_len", "global_train_batch_size", "train_loader.batch_size_warmup.min_size"):
        value = value_at(cfg, key)
        require(value is None or type(value) is int and value > 0, key, "an integer of at least 1", value, "correct it")


def parse_time(key: str, value: Any) -> tuple[float, str]:
    """A time of the host such as `3_000_000_000tok` as (number, unit); a ValueError that names `key` if it is none."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    require(match, key, "a number with the unit tok, ba or dur", value,
            "the loader's one epoch never ends, so give a time such as 8_500_000_000tok or 3000ba")
    return float(match[1]), match[2].lower()  # type: ignore[index]


def total_tokens(cfg: Mapping[str, Any]) -> int | None:
    """Tokens of the run; None when max_duration is not in tokens."""
    amount, unit = parse_time("max_duration", cfg["max_duration"])
    return round(amount) if unit == "tok" else None


def objective_schedule(cfg: Mapping[str, Any]) -> ObjectiveSchedule:
    """The objective of a config's model over the run's tokens."""
    value = cfg["model"].get("objective")
    total = None if isinstance(value, str) else total_tokens(cfg)  # a name alone needs no clock
    return ObjectiveSchedule.parse(value, total=total, key="model.objective")


def model_config(cfg: Mapping[str, Any]) -> EttinConfig:
    """The shape that a config asks for; under a schedule, that of the objective it ends with."""
    fields = {key: value for key, value in cfg["model"].items() if key in FIELDS}
    return EttinConfig.for_size(cfg["model"].get("size"), causal=objective_schedule(cfg).final == "clm",
                                max_position_embeddings=cfg["max_seq_len"], **fields)


def loaders(cfg: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, block) of every loader, the training loader first."""
    yield "train_loader", cfg.get("train_loader") or {}
    evals: Any = cfg.get("eval_loaders") or cfg.get("eval_loader") or []  # the host renames a list to eval_loaders
    if isinstance(evals, Mapping):
        yield "eval_loader", evals  # type: ignore[misc]
    else:
        evals = evals if isinstance(evals, list) else [evals]
        yield from ((f"eval_loader[{i}]", block) for i, block in enumerate(evals))


def value_at(cfg: Any, key: str) -> Any:
    """The value of a dotted key, or None."""
    for part in key.split("."):
        cfg = cfg.get(part) if isinstance(cfg, Mapping) else None
    return cfg


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty block is a leaf."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from walk(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from walk(item, f"{key}[{i}]")
    else:
        yield key, value


def without_nulls(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are set; where eval_loader is null, all that belongs to evaluation is left out on purpose."""
    evaluates = cfg.get("eval_loader", ...) is not None or cfg.get("eval_loaders")
    return {key: value for key, value in cfg.items()
            if value is not None and (evaluates or not key.startswith("eval_"))}


def config_text(cfg: Mapping[str, Any]) -> str:
    """The resolved config as canonical JSON, without nulls, and without what follows from the number of processes."""
    config = {key: value for key, value in without_nulls(cfg).items() if not key.startswith(("n_gpus", "device_"))}
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


# ------------------------------------------------------------------ keys and defaults

_BY_HOST = ("self", "tokenizer", "train_config", "params", "device_batch_size")  # parameters that the host fills in


def _literal(node: ast.expr | None) -> Any:
    try:
        value = ast.literal_eval(node)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # of no node, and of a name such as MISSING
        return None
    return list(value) if isinstance(value, tuple) else value


def read_parameters(target: str) -> dict[str, Any]:
    """{parameter: default, or None} of a function, a class's `__init__` or a dataclass, given as `module:name`."""
    module, name = target.split(":")
    package, *rest = module.split(".")
    spec: Any = importlib.util.find_spec(package)
    source = Path(spec.origin).parent.joinpath(*rest).with_suffix(".py").read_text(encoding="utf-8")
    node: Any = next(node for node in ast.parse(source).body if getattr(node, "name", None) == name)
    if isinstance(node, ast.ClassDef):
        methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        if "__init__" not in methods:
            return {item.target.id: _literal(item.value) for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
        node = methods["__init__"]
    taken = node.args
    defaults = [*[None] * (len(taken.args) - len(taken.defaults)), *taken.defaults, *taken.kw_defaults]
    return {argument.arg: _literal(default) for argument, default in zip([*taken.args, *taken.kwonlyargs], defaults)
            if argument.arg not in _BY_HOST}


PARAMETERS: dict[str, dict[str, Any]] = {
    name: read_parameters(target)
    for registry in ("models", "dataloaders", "optimizers", "schedulers", "loggers", "callbacks",
                     "callbacks_with_config")
    for name, target in REGISTRY[registry].items()}
"""Of our blocks, by the name of their class: {key: default, or None}."""
PARAMETERS["ettin"] |= dict.fromkeys(FIELDS)
PARAMETERS["ettin_stable_adamw"]["disable_grad"] = None  # taken out by LLM-Foundry
DEFAULTS = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in PARAMETERS.items()}
HOST = read_parameters("llmfoundry.utils.config_utils:TrainConfig")
HOST_DEFAULTS = {key: value for key, value in HOST.items() if value is not None}

KEYS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("keys.yaml").read_text(encoding="utf-8"))
NO_EFFECT = KEYS["no_effect"]


def settings(cfg: Mapping[str, Any], run: tuple[float, str] | None = None) -> dict[str, Any]:
    """{dotted key: value} of a resolved config but for `variables`, so that two spellings of one thing are equal.

    `10000` is `10000.0`, `1dur` is the run's length, a key that is left out is the default that the code takes, a size
    is the shape it stands for. run: (number, unit) that shares in `dur` are of, max_duration if not given.
    """
    cfg = {key: value for key, value in cfg.items() if value is not None and key != "variables"}
    fields, total = dataclasses.asdict(model_config(cfg)), total_tokens(cfg)
    full = {**HOST_DEFAULTS, **cfg, **{key: filled(cfg[key]) for key in ("optimizer", "scheduler")}}
    for key in ("eval_loader", "eval_loaders"):
        full.pop(key, None)
    # size stands for the fields; causal and length follow from objective and max_seq_len, which are compared themselves
    model = {**filled(cfg["model"]), **fields, "objective": open_ended(objective_schedule(cfg).plain())}
    full["model"] = {key: value for key, value in model.items()
                     if key not in ("size", "causal", "max_position_embeddings")}
    full["optimizer"].setdefault("max_lr", full["optimizer"].get("lr"))
    full["callbacks"] = {key: filled(block or {}, key) for key, block in (cfg.get("callbacks") or {}).items()}
    if Path(cfg["tokenizer"].get("name", ".")) == Path(cfg["train_loader"]["dataset"]["local"], "tokenizer"):
        full["tokenizer"] = {**cfg["tokenizer"], "name": "that of the data"}  # whose fingerprint tells what it does
    train, *evals = [_filled_loader(block, total) for _, block in loaders(cfg)]
    if warmup := train.get("batch_size_warmup"):
        train["batch_size_warmup"] = check_warmup(warmup, cfg["global_train_batch_size"], total=total)
    names = ["eval_loader"] if len(evals) == 1 else [f"eval_loader[{b.get('label', i)}]" for i, b in enumerate(evals)]
    full |= {"train_loader": train, **dict(zip(names, evals))}
    run = run or parse_time("max_duration", cfg["max_duration"])
    return {key: _in_one_unit(value, *run) for key, value in walk(full)}


def filled(block: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """A block of ours with its defaults; `name` for blocks without the key."""
    return {**DEFAULTS.get(name or block.get("name", ""), {}), **{k: v for k, v in block.items() if v is not None}}


def _filled_loader(block: Mapping[str, Any], total: int | None) -> dict[str, Any]:
    full = filled(block, "ettin_text")
    full["mask_rate"] = open_ended(MaskRate.parse(full["mask_rate"], total=total).plain())
    objective = full.get("objective")
    if isinstance(objective, list) and all(isinstance(name, str) for name in objective):  # an evaluation under each
        full["objective"] = ", ".join(sorted(objective))
    elif objective is not None:
        full["objective"] = open_ended(ObjectiveSchedule.parse(objective, total=total).plain())
    return {"shuffle_window": DEFAULT_WINDOW, **full} if full["shuffle"] else full


def open_ended(plain: Any) -> Any:
    """A schedule's plain data as a name, number or text: without the run's end, unless a slope leads there."""
    if isinstance(plain, list) and "from" not in plain[-1]:
        plain = [*plain[:-1], {key: value for key, value in plain[-1].items() if key != "until"}]
    return plain if isinstance(plain, (str, float)) else json.dumps(plain)


def _in_one_unit(value: Any, amount: float, unit: str) -> Any:
    """A time as `8_500_000_000tok`, shares of the run in the run's own unit; anything else as it is."""
    try:
        number, own_unit = parse_time("", value)
    except ValueError:
        return value
    if own_unit == "dur" or number == 0:
        number, own_unit = number * amount, unit
    return f"{round(number, 0 if own_unit == 'tok' else 6):_}".removesuffix(".0") + own_unit


# ------------------------------------------------------------------ the learning rate


def lr_factor(scheduler: Mapping[str, Any], run: tuple[float, str], clock: Callable[[str], float]) -> float:
    """Factor on the peak lr by a whole block of a scheduler of ours, each of whose times has the clock of its own unit.

    Linear from 1e-10 to 1 (`warmup_stable_decay` alone), flat, then down to `alpha_f` over the last `t_decay`: linear,
    or along 1 - sqrt. Source: ModernBERT's src/scheduler.py, lines 81-131 and 258-289 (decay 0 divides by 0 there).
    In a run of batches, the end in tokens is estimated from those so far. run: max_duration as (number, unit). clock:
    the present in a unit.
    """
    def read(key: str) -> tuple[float, float, float]:
        """(present, length of that time, end of the schedule) in one unit."""
        times = (parse_time(f"scheduler.{name}", scheduler[name]) for name in (key, "t_max"))
        (length, unit), (end, end_unit) = ((value * run[0], run[1]) if unit == "dur" else (value, unit)
                                           for value, unit in times)
        now, past = clock(unit), clock(end_unit)
        if unit != end_unit:
            end = end * now / past if past else math.inf
        return now, length, end

    if "t_warmup" in scheduler:
        now, warmup, _ = read("t_warmup")
        if now < warmup:
            return 1e-10 + (1 - 1e-10) * (now / warmup)
    now, decay, end = read("t_decay")
    x = min(1.0, max(0.0, (now - (end - decay)) / decay)) if decay else 0.0
    alpha_f = scheduler["alpha_f"]
    if scheduler["name"] == "one_minus_sqrt":
        return alpha_f + (1.0 - alpha_f) * (1.0 - math.sqrt(x))
    return 1.0 - x * (1.0 - alpha_f)
