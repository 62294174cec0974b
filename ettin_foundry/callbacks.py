"""What happens around a training step: the clock, continuation across objectives, exports, samples, data figures.

`Clock` is in every run (checks.py adds it), so that what it protects holds under stock `llmfoundry train` too. The others are
asked for by name in a recipe. Composer keeps callback state under the class name: one of each per run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist, is_tar
from llmfoundry.interfaces import CallbackWithConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from ettin_foundry import checkpoint
from ettin_foundry.optim import StableAdamW, fsdp2_gradient_factor

__all__ = ["Clock", "CrossObjective", "DataMonitor", "ExportHF", "LogSamples"]

log = logging.getLogger(__name__)

# optimizer.param_groups key -> key in the recipe's optimizer block
_SETTINGS = {"initial_lr": "lr", "max_lr": "max_lr", "weight_decay": "weight_decay", "beta1": "betas", "beta2": "betas",
             "betas": "betas", "eps": "eps"}


class Clock(CallbackWithConfig):
    """Ties a step to the tokens before it: learning rate, data position, randomness; and guards what is loaded.

    - lr of batch k is exactly f(tokens before batch k), also after a resume. Composer evaluates schedules before it adds
      the finished batch to its clock, so its own value is one batch late.
    - The batch says how many tokens precede it in the stream; that must be Composer's token count.
    - torch's default generators are seeded from (seed, batch, rank) before each batch, so that dropout is a function of the
      step: Composer 0.32.1 restores no generator when it resumes mid-epoch with a dataset that has state.
    - Before loading: checkpoints are scanned (checkpoint.py) and a broken `latest` link is repaired.
    - After loading at token 0 (a new phase), lr, max_lr, weight decay, betas and eps are the recipe's; Composer would keep
      the checkpoint's. After loading in the middle of a run, a recipe that differs is refused.
    - Gradients under FSDP2 on gloo are averaged (see `optim.fsdp2_gradient_factor`).

    Args:
        train_config: the run's config, given by LLM-Foundry.
    """

    def __init__(self, train_config: Mapping[str, Any]):
        super().__init__(dict(train_config))
        self._run = train_config
        self._state: State | None = None
        self._model: Any = None
        self._given: list[dict[str, Any]] = []
        self._loaded: dict[str, Any] | None = None
        self._gradient_factor = 1.0
        # a tuple: torch's sharded checkpoints flatten lists of dicts into keys, which must then be there on loading
        self.lineage: tuple[dict[str, Any], ...] = ()

    def init(self, state: State, logger: Logger) -> None:
        self._state, self._model = state, state.model  # the model before DDP wraps it

    def before_load(self, state: State, logger: Logger) -> None:
        checkpoint.install_validation()
        load_path = self._run.get("load_path")
        if load_path and is_tar(load_path):
            raise ValueError(f"load_path: {load_path!r} given; archives are unpacked without any check, so only .pt files and "
                             "sharded checkpoint folders are loaded. Unpack it yourself and give the file inside")
        folder = self._run.get("save_folder")
        if self._run.get("autoresume") and folder and "://" not in folder:
            if dist.get_global_rank() == 0:
                latest = self._run.get("save_latest_filename") or "latest-rank{rank}.pt"
                checkpoint.repair_latest(format_name_with_dist(folder, state.run_name),
                                         latest=format_name_with_dist(latest, state.run_name))
            dist.barrier()
        self._given = [_settings(group) for optimizer in state.optimizers for group in optimizer.param_groups]

    def after_load(self, state: State, logger: Logger) -> None:
        if self._loaded is not None:
            self._check_loaded(self._loaded, new_phase=state.timestamp.batch == 0)
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        if state.timestamp.batch == 0:
            for group, given in zip(groups, self._given):
                group.update(given)
                group["lr"] = given.get("initial_lr", group["lr"])
            for scheduler in state.schedulers:
                scheduler.base_lrs = [group["initial_lr"] for group in groups]
            if self._loaded is not None:
                past = {"objective": self._loaded.get("objective"), "tokens": self._loaded.get("tokens")}
                self.lineage = (*self.lineage, past)
            return
        for group, given in zip(groups, self._given):
            for key, value in given.items():
                if group.get(key) != value:
                    raise ValueError(f"optimizer.{_SETTINGS[key]}: {value} in the config, {group.get(key)} in the checkpoint "
                                     f"that this run resumes (batch {state.timestamp.batch.value}); in the middle of a run only "
                                     "the same is allowed. Restore the value, or start a new phase with reset time")

    def _check_loaded(self, loaded: dict[str, Any], new_phase: bool) -> None:
        """Refuses a checkpoint of another kind of model, and mid-run a changed model function."""
        now, then = self._describe(), loaded
        if then["objective"] is not None and now["objective"] != then["objective"]:
            if not new_phase or "clm" in (now["objective"], then["objective"]):
                raise ValueError(f"load_path: the checkpoint is of objective {then['objective']}, this run trains "
                                 f"{now['objective']}; only the same is allowed. Give it as callbacks.ettin_cross.source instead")
        for key, value in (now["config"] or {}).items():
            old = (then["config"] or {}).get(key, value)
            if old != value and not new_phase:
                raise ValueError(f"model.{key}: {value} in the config, {old} in the checkpoint that this run resumes; the model "
                                 "would compute something else. Restore it, or start a new phase with reset time")
            if old != value:
                log.info("model.%s: %s in the loaded checkpoint, %s from here on", key, old, value)

    def fit_start(self, state: State, logger: Logger) -> None:
        if any(isinstance(module, FullyShardedDataParallel) for module in state.model.modules()) and any(
                isinstance(optimizer, StableAdamW) for optimizer in state.optimizers):
            raise ValueError("fsdp_config: FSDP1 cuts parameters into flat pieces, and ettin_stable_adamw needs each whole "
                             "tensor's mean; only FSDP2 is allowed. Set the environment variable FSDP_VERSION=2")
        self._gradient_factor = fsdp2_gradient_factor(state.model)
        if self._gradient_factor != 1.0:
            log.info("this backend sums FSDP2's gradients; they are multiplied by %s", self._gradient_factor)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._check_position(state)
        groups = [group for optimizer in state.optimizers for group in optimizer.param_groups]
        for scheduler in state.schedulers:
            lrs = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
            for group, lr in zip(groups, lrs):
                group["lr"] = lr
            scheduler._last_lr = lrs
        words = (state.rank_zero_seed, state.timestamp.batch.value, dist.get_global_rank())
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))  # and every CUDA device

    def _check_position(self, state: State) -> None:
        batch = state.batch
        if isinstance(batch, Mapping) and "tokens_before" in batch:
            stream, clock = int(batch["tokens_before"]), state.timestamp.token.value
            if stream != clock:
                raise ValueError(f"train_loader: its next batch comes after {stream} tokens of the stream, but the trainer has "
                                 f"counted {clock} at batch {state.timestamp.batch.value}; they must be equal. Load time and data "
                                 "position together (neither or both in load_ignore_keys), with the same global batch and data")

    def before_backward(self, state: State, logger: Logger) -> None:
        """Scales gradients at their source, so that accumulation, clipping and the optimizer all see averages."""
        if self._gradient_factor == 1.0:
            return
        loss = state.loss
        parts = [loss["total"]] if isinstance(loss, dict) and "total" in loss else (
            list(loss.values()) if isinstance(loss, dict) else loss if isinstance(loss, (list, tuple)) else [loss])
        for part in parts:
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient * self._gradient_factor)

    def _describe(self) -> dict[str, Any]:
        config = getattr(self._model, "config", None)
        plain = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else None
        return {"config": plain, "objective": getattr(self._model, "objective", None), "size": getattr(config, "size", None),
                "tokenizer": getattr(getattr(self._model, "tokenizer", None), "name_or_path", None)}

    def state_dict(self) -> dict[str, Any]:
        """What makes a checkpoint readable by itself: plain data only."""
        tokens = 0 if self._state is None else self._state.timestamp.token.value
        return {**self._describe(), "tokens": tokens, "lineage": self.lineage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = dict(state)
        self.lineage = tuple(state.get("lineage", ()))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: group[key] for key in _SETTINGS if key in group}
    settings.setdefault("initial_lr", group["lr"])  # there once a scheduler is attached
    return settings


class CrossObjective(Callback):
    """Continues from the weights of the other kind of model: an encoder from a decoder, or a decoder from an encoder.

    Head, output bias and tied matrix come along; clock, optimizer and data start anew. Nothing happens when autoresume has
    already loaded a checkpoint of this very run.

    Args:
        source: a Composer checkpoint (file, sharded folder or save folder), or a Hugging Face folder.

    Raises:
        ValueError: another size or vocabulary, missing or unknown tensors, or a `load_path` besides.
    """

    def __init__(self, source: str):
        self.source = source
        self._resumed = False

    def after_load(self, state: State, logger: Logger) -> None:
        if self._resumed and state.timestamp.batch > 0:
            log.info("resuming this run: weights of %s are not loaded again", self.source)
            return
        if state.load_path is not None:
            raise ValueError(f"load_path: {state.load_path} was loaded, and callbacks.ettin_cross.source is {self.source}; only "
                             "one can give the weights. Remove one of them")
        weights, origin = _read_source(self.source)
        options = StateDictOptions(full_state_dict=True, cpu_offload=False, strict=True)
        _check_fit(self.source, weights, get_model_state_dict(state.model))
        named = {f"model.{name}": tensor for name, tensor in weights.items()}
        set_model_state_dict(state.model, named, options=options)
        config = getattr(state.model, "config", None)
        for key, old in (origin.get("config") or {}).items():
            new = getattr(config, key, old)
            if new != old:
                log.info("model.%s: %s in %s, %s from here on", key, old, self.source, new)
        log.info("weights of %s (%s, %s tokens) loaded; clock and optimizer start anew", self.source,
                 origin.get("objective") or "objective unknown", origin.get("tokens"))
        clock = next((c for c in state.callbacks if isinstance(c, Clock)), None)
        if clock is not None:
            path = Path(self.source)
            clock.lineage = (*origin.get("lineage", ()), {"source": f"{path.parent.name}/{path.name}", **{
                key: origin.get(key) for key in ("objective", "tokens")}})

    def state_dict(self) -> dict[str, Any]:
        return {"source": self.source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resumed = True


def _read_source(source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights under our names, what is known of their run). Every rank reads: mapped from the file, not copied."""
    if (Path(source) / "config.json").is_file():
        from ettin_foundry import hf

        weights, config, objective = hf.import_folder(source)
        return weights, {"config": dataclasses.asdict(config), "objective": objective}
    return checkpoint.load_model_state(source)


def _check_fit(source: str, weights: Mapping[str, torch.Tensor], current: Mapping[str, Any]) -> None:
    """Names and shapes must be the model's; `current` is its state dict, possibly sharded (shapes are then global)."""
    own = {name.removeprefix("model."): tuple(value.shape) for name, value in current.items() if name.startswith("model.")}
    embedding = "trunk.embeddings.tok_embeddings.weight"
    if embedding in weights and embedding in own:
        for key, old, new in zip(("vocab_size", "hidden_size"), weights[embedding].shape, own[embedding]):
            if old != new:
                raise ValueError(f"callbacks.ettin_cross.source: {source} has {key} {old}, this run's model has {new}; they must "
                                 "be equal. Choose the model of the same size and tokenizer")
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or unknown:
        raise ValueError(f"callbacks.ettin_cross.source: {source} lacks {len(missing)} tensor(s) {missing[:3]} and has "
                         f"{len(unknown)} that this model has not {unknown[:3]}; all must match. Choose a model of the same size")
    for name, shape in own.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"callbacks.ettin_cross.source: {source} has {name} of shape {tuple(weights[name].shape)}, this run's "
                             f"model {shape}; they must be equal. Choose a model of the same size")


def _interval(key: str, value: str) -> Any:
    """Composer's function of (state, event) that says when an interval has passed."""
    time = Time.from_input(value, TimeUnit.EPOCH)
    if time.unit not in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE) or time.value < 1:
        raise ValueError(f"{key}: {value!r} given; a time of at least 1 in ba, tok or sp is needed, such as 1000ba")
    return create_interval_scheduler(value, include_end_of_training=False)


class ExportHF(Callback):
    """Writes Hugging Face folders `<folder>/ba<batch>` at an interval and at the end of training.

    Args:
        interval: a time in ba, tok or sp.
        folder: a local folder; `{run_name}` is filled in.
    """

    def __init__(self, interval: str, folder: str):
        if "://" in folder:
            raise ValueError(f"callbacks.ettin_export.folder: {folder!r} given; only a local folder is written. Upload it after "
                             "training, for instance with huggingface-cli")
        self.folder = folder
        self._due = _interval("callbacks.ettin_export.interval", interval)
        self._model: Any = None
        self._last_batch = 0

    def init(self, state: State, logger: Logger) -> None:
        self._model = state.model

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self._due(state, Event.BATCH_CHECKPOINT):
            self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value != self._last_batch:
            self._write(state)

    def _write(self, state: State) -> None:
        """Every rank gathers, rank 0 writes."""
        self._last_batch = state.timestamp.batch.value
        weights = get_model_state_dict(state.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_global_rank() == 0:
            from ettin_foundry import hf

            lineage = next((c.lineage for c in state.callbacks if isinstance(c, Clock)), ())
            past = sum(entry.get("tokens") or 0 for entry in lineage)
            folder = Path(format_name_with_dist(self.folder, state.run_name)) / f"ba{self._last_batch}"
            hf.export_model({name.removeprefix("model."): value for name, value in weights.items()}, self._model.config,
                            self._model.tokenizer, folder, objective=self._model.objective, overwrite=True,
                            facts={"tokens": past + state.timestamp.token.value, "lineage": list(lineage)})
            log.info("wrote %s", folder)
        dist.barrier()


class LogSamples(Callback):
    """Logs what the model makes of a few prompts: continuations of a decoder, filled masks of an encoder.

    Training is not touched: mode and random state are as before. Only rank 0 samples, so sharded models are refused.

    Args:
        interval: a time in ba, tok or sp.
        prompts: texts; for encoders each with one mask token.
        max_new_tokens: length of a continuation. top_k: candidates for a mask.
    """

    def __init__(self, interval: str, prompts: list[str], max_new_tokens: int = 32, top_k: int = 3):
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"callbacks.ettin_samples.prompts: {prompts!r} given; a list of at least one text is needed")
        self.prompts, self.max_new_tokens, self.top_k = list(prompts), max_new_tokens, top_k
        self._due = _interval("callbacks.ettin_samples.interval", interval)
        self._model: Any = None

    def init(self, state: State, logger: Logger) -> None:
        self._model = state.model

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.fsdp_enabled:
            raise ValueError("callbacks.ettin_samples: given with fsdp_config; one rank alone cannot run a sharded model. Use "
                             "callbacks.ettin_export and sample from its folders")

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self._due(state, Event.BATCH_CHECKPOINT) or dist.get_global_rank() != 0:
            return
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.random.fork_rng(), torch.no_grad(), get_precision_context(state.precision):
                rows = list(zip(self.prompts, self._sample()))
        finally:
            self._model.train(was_training)
        for prompt, text in rows:
            log.info("batch %d: %r -> %s", state.timestamp.batch.value, prompt, text)
        logger.log_table(["prompt", "output"], [list(row) for row in rows], name="samples")

    def _sample(self) -> list[str]:
        if self._model.objective == "clm":
            return [repr(text) for text in self._model.generate(self.prompts, max_new_tokens=self.max_new_tokens)]
        filled = self._model.fill_mask(self.prompts, top_k=self.top_k)
        return [", ".join(f"{token!r} {share:.3f}" for token, share in candidates) for candidates in filled]


class DataMonitor(Callback):
    """Logs how full the batch is, of rank 0's share and while it is still on the CPU, so that nothing waits.

    data/fill: real tokens over positions; data/targets and data/documents: counts; data/target_rate: targets over tokens.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        sequence_id, labels = state.batch["sequence_id"], state.batch["labels"]
        real = sequence_id >= 0
        tokens, targets = int(real.sum()), int((labels != -100).sum())
        logger.log_metrics({
            "data/fill": tokens / max(1, real.numel()), "data/targets": targets, "data/target_rate": targets / max(1, tokens),
            "data/documents": int((sequence_id.amax(dim=1) + 1).sum()),
        })
