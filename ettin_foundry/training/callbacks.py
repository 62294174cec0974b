"""Callbacks that a recipe names: entering a phase, crossing objectives, the log of steps, samples, data figures."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, format_name_with_dist
from llmfoundry.interfaces import CallbackWithConfig
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from ettin_foundry.data.stream import HASH_MODULUS
from ettin_foundry.model.weights import import_folder
from ettin_foundry.training.checkpoints import Head, decode_record
from ettin_foundry.training.clock import Clock
from ettin_foundry.training.run_config import require
from ettin_foundry.training.sources import compare, compare_configs, describe, read_source
from ettin_foundry.training.steps import EVALS, RUN, STEPS, cut_steps

log = logging.getLogger(__name__)


class EnterPhase(Callback):
    """Enters a phase: weights and optimizer moments of the phase before, everything else as this run's recipe says.

    The host loads, told by the checks what to take. A run that finds its own checkpoint enters nothing, so the clock
    starts anew exactly once.

    source: a Composer checkpoint (file, sharded folder or save folder) of the same objective; the checks leave it out
    for weights that the user's load_path names. accept: fields of the model that may differ, `tokenizer`, or
    `objective` between encoders. keep: `all`, or `weights` for a new optimizer.
    """

    key = "callbacks.ettin_phase.source"

    def __init__(self, source: str | None = None, accept: Sequence[str] = (), keep: str = "all"):
        self.source, self.accept, self.keep = source, list(accept), keep

    def after_load(self, state: State, logger: Logger) -> None:
        key, path = self.key if self.source else "load_path", str(state.load_path or self.source)
        if state.timestamp.batch > 0:
            log.info("resuming this run: %s is not entered again", self.source or key)
            return
        if self.keep == "all" and not any(optimizer.state for optimizer in state.optimizers):
            raise ValueError(f"{key}: {path} gave no moments to {type(state.optimizers[0]).__name__}; take the "
                             "optimizer that it was trained with, or set callbacks.ettin_phase.keep=weights")
        clock = next(each for each in state.callbacks if isinstance(each, Clock))  # the checks add it to every run
        if "://" not in path:
            source = read_source(key, path)
        elif clock.loaded and clock.loaded.get("config"):
            source = Head(Path(path), clock.loaded, {}, False)
        else:
            raise ValueError(f"{key}: {path} does not say what model it holds; download it first")
        now, record = decode_record(clock.state_dict()), source.record
        accepted = describe(compare(key, source, now, self.accept))
        clock.extend_lineage(record, source.path, accepted or None, record.get("tokens"))
        if (source.path / "config.json").is_file():  # a Hugging Face folder, which the host cannot load
            found: dict[str, Any] = {f"model.{name}": value for name, value in import_folder(source.path)[0].items()}
            set_model_state_dict(state.model, found, options=StateDictOptions(full_state_dict=True, strict=True))
        log.info("entering %s from %s (%s, batch %s, %s tokens): kept %s, and nothing else; changed: %s",
                 now["phase"] or "a phase", source.path, record.get("objective") or "objective unknown",
                 record.get("batch"), record.get("tokens"),
                 "weights" if self.keep == "weights" else "weights, optimizer moments",
                 describe(compare_configs(record, now)) or "nothing")


class CrossObjective(EnterPhase):
    """Continues from the weights of another kind of model: encoder and decoder, or mlm and mntp.

    Head, output bias and tied matrix come along; clock, optimizer and data start anew.

    source: a Composer checkpoint (file, sharded folder or save folder), or a Hugging Face folder. accept: fields of the
    model that may differ (`global_rope_theta`), or `tokenizer`.
    """

    key = "callbacks.ettin_cross.source"

    def __init__(self, source: str, accept: Sequence[str] = ()):
        super().__init__(source, accept, "weights")


class StepLog(CallbackWithConfig):
    """Appends one line a step to `<folder>/steps.jsonl`, on rank 0; a resumed run cuts off those that it does again.

    One line an evaluated dataset goes to evals.jsonl beside it: the last step done, its metrics.

    Metric: data/mask_rate.

    folder: a local folder; save_folder if not given. `{run_name}` is filled in.
    """

    def __init__(self, train_config: Mapping[str, Any], folder: str | None = None):
        super().__init__(dict(train_config))
        given = folder or train_config.get("save_folder")
        key = "callbacks.ettin_steps.folder"
        require(given and "://" not in given, key if folder else "save_folder", f"a local folder, for {STEPS}", given,
                f"set {key} to one, or remove callbacks.ettin_steps")
        self.folder, self._until = str(given), train_config.get("max_duration")
        self._file: TextIO | None = None
        self._entry: dict[str, Any] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            folder = Path(format_name_with_dist(self.folder, state.run_name))
            folder.mkdir(parents=True, exist_ok=True)
            for name in (STEPS, EVALS):
                cut_steps(folder / name, state.timestamp.batch.value)
            self._write_facts(state, finished=False)
            self._file = (folder / STEPS).open("a", buffering=1, encoding="utf-8")  # each line reaches the disk's cache

    def batch_start(self, state: State, logger: Logger) -> None:
        self._entry = {key: state.batch[key] for key in ("objective", "mask_rate", "ids_hash")}
        self._entry["lr"] = state.optimizers[0].param_groups[0]["lr"]  # by the clock, which is before this callback
        logger.log_metrics({"data/mask_rate": self._entry["mask_rate"]})

    def batch_end(self, state: State, logger: Logger) -> None:
        ids_hash = state.device.tensor_to_device(torch.tensor([self._entry.pop("ids_hash")], dtype=torch.int64))
        dist.all_reduce(ids_hash)
        before, now = state.previous_timestamp, state.timestamp
        if self._file is None or before is None:
            return
        loss = float(state.total_loss_dict["loss/train/total"])
        line = {"step": before.batch.value, "tokens": before.token.value,
                "rows": now.sample.value - before.sample.value, **self._entry, "loss": loss,
                "ids_hash": f"{int(ids_hash.item()) % HASH_MODULUS:012x}",
                "seconds": round(now.batch_wct.total_seconds(), 6)}
        self._file.write(json.dumps(line) + "\n")

    def _write_facts(self, state: State, finished: bool) -> None:
        facts = {"run_name": state.run_name, "max_duration": self._until, "finished": finished}
        Path(format_name_with_dist(self.folder, state.run_name), RUN).write_text(json.dumps(facts), encoding="utf-8")

    def fit_end(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._write_facts(state, finished=True)

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            time, label = state.timestamp, str(state.dataloader_label)
            found = {name: float(state.eval_metric_values[name]) for name in state.eval_metrics[label]}
            line = {"step": time.batch.value - 1, "tokens": time.token.value, "data": label, **found}
            with Path(self._file.name).with_name(EVALS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self, state: State, logger: Logger) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def interval_passed(key: str, value: str, *, at_end: bool = False) -> Any:
    """Composer's function of (state, event) that says when an interval has passed, or the training ended."""
    time = Time.from_input(value, TimeUnit.EPOCH)
    require(time.unit in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE) and time.value >= 1, key,
            "at least 1, in ba, tok or sp", value, "give a time such as 1000ba")
    return create_interval_scheduler(value, include_end_of_training=at_end)


class LogSamples(Callback):
    """Logs what the model makes of a few prompts: continuations of a decoder, filled masks of an encoder.

    Mode and random state are as before. Rank 0 samples alone, so sharded models are refused. interval: a time in ba,
    tok or sp. prompts: texts; for encoders each with one mask token. top_k: candidates for a mask.
    """

    def __init__(self, interval: str, prompts: list[str], max_new_tokens: int = 32, top_k: int = 3):
        require(not isinstance(prompts, str) and prompts, "callbacks.ettin_samples.prompts",
                "a list of at least one text", prompts, "write a YAML list")
        self.prompts, self.max_new_tokens, self.top_k = list(prompts), max_new_tokens, top_k
        self._due = interval_passed("callbacks.ettin_samples.interval", interval)

    def init(self, state: State, logger: Logger) -> None:
        if state.fsdp_config is not None:
            raise ValueError("callbacks.ettin_samples: given with fsdp_config; one rank cannot run a sharded model")

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self._due(state, Event.BATCH_CHECKPOINT) or dist.get_global_rank() != 0:
            return
        model: Any = getattr(state.model, "module", state.model)  # DDP wraps it
        predictor = model.predictor
        if model.objective == "clm":
            texts = [repr(text) for text in predictor.generate(self.prompts, max_new_tokens=self.max_new_tokens)]
        else:
            texts = [", ".join(f"{token!r} {share:.3f}" for token, share in candidates)
                     for candidates in predictor.fill_mask(self.prompts, top_k=self.top_k)]
        for prompt, text in zip(self.prompts, texts):
            log.info("batch %d: %r -> %s", state.timestamp.batch.value, prompt, text)
        logger.log_table(["prompt", "output"], [list(row) for row in zip(self.prompts, texts)], name="samples")


class DataMonitor(Callback):
    """Logs of rank 0's share of the batch: data/fill (real tokens over positions),
    data/targets and data/documents (counts), data/target_rate (targets over tokens).
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        batch: Any = state.batch
        logger.log_metrics({"data/fill": batch["num_tokens"] / batch["num_positions"],
                            "data/targets": batch["num_targets"], "data/documents": batch["num_documents"],
                            "data/target_rate": batch["num_targets"] / max(1, batch["num_tokens"])})
