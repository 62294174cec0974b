"""Rows to batches to the host's DataSpec: the `ettin_text` loader.

`rows.py` says which rows a step reads; here a rank and a worker take their share of them, and `batches.py` turns it
into tensors with masks and labels, and a batch into flat microbatches, still on the CPU. Every step is a pure function of
(data, seed, step), so there is no state but the number of rows consumed, which the host counts, and resuming on another
number of ranks or workers gives the same global batches. Streaming's own iteration is not used: no shared memory, and no
lock file or background thread as long as the shards lie here unpacked. Those of a remote or packed set are made ahead of
need, because the order is known (remote.py).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from composer import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ettin_foundry.data.batch import Collator, count_samples, count_tokens, flatten, split_batch
from ettin_foundry.data.mixture import MixtureSplit
from ettin_foundry.data.order import Order
from ettin_foundry.data.ramp import BatchRamp, check_warmup
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.stream import Row, RowStream, check_choices, check_numbers, open_stream
from ettin_foundry.data.tokenizer import check as check_tokenizer
from ettin_foundry.model.config import OBJECTIVES
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.objectives.targets import TextVocab

__all__ = ["FiniteRowDataset", "RowDataset", "build_ettin_loader", "clm_collator", "flatten", "mdlm_collator",
           "mlm_collator", "mntp_collator", "scheduled_collator", "split_batch"]


class RowDataset(RowStream, IterableDataset):
    """This rank's share of the endless stream, a whole batch at a time.

    The ranks have contiguous shares of a step's rows, and worker w of n serves the steps w, w + n, ... after the first.
    """

    def __init__(self, data: MDSSplit | MixtureSplit, order: Order, ramp: BatchRamp) -> None:
        super().__init__(data, order, ramp)
        self.world_size = dist.get_world_size()

    def __iter__(self) -> Iterator[list[Row]]:
        world_size, rank = dist.get_world_size(), dist.get_global_rank()
        if world_size != self.world_size or not 0 <= rank < world_size:
            # a worker that lost sight of the other ranks would silently give every rank the same rows
            raise RuntimeError(f"loader built for {self.world_size} ranks, iterated as rank {rank} of {world_size}")
        worker = get_worker_info()
        first_step, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in itertools.count(self.start_step + first_step, stride):
            if self.num_steps is not None and step >= self.num_steps:
                return
            yield self.rows_of(step, rank=rank, world_size=world_size)


class FiniteRowDataset(RowDataset):
    """One epoch, for evaluation: every rank gives the same number of batches; rows that are missing are empty."""

    def __len__(self) -> int:
        """Rows of this rank, empty ones included; the host needs a length to know that an evaluation ends."""
        assert self.num_steps is not None
        return self.num_steps * (self.ramp.max_size // self.world_size)


def _make_collator(objective: Any, dataloader_cfg: Mapping[str, Any], tokenizer: Any,
                   dataset_batch_size: int) -> tuple[Collator, int]:
    collator = Collator(objective, TextVocab.from_tokenizer(tokenizer), max_seq_len=dataloader_cfg["max_seq_len"],
                        mask_rate=dataloader_cfg.get("mask_rate", 0.0), seed=dataloader_cfg["shuffle_seed"])
    return collator, dataset_batch_size


def mlm_collator(dataloader_cfg: Mapping[str, Any], tokenizer: Any, dataset_batch_size: int) -> tuple[Collator, int]:
    """Collator of masked-token prediction; `dataloader_cfg` has max_seq_len, shuffle_seed, mask_rate."""
    return _make_collator("mlm", dataloader_cfg, tokenizer, dataset_batch_size)


def clm_collator(dataloader_cfg: Mapping[str, Any], tokenizer: Any, dataset_batch_size: int) -> tuple[Collator, int]:
    """Collator of next-token prediction; `dataloader_cfg` has max_seq_len and shuffle_seed."""
    return _make_collator("clm", dataloader_cfg, tokenizer, dataset_batch_size)


def mntp_collator(dataloader_cfg: Mapping[str, Any], tokenizer: Any, dataset_batch_size: int) -> tuple[Collator, int]:
    """Collator of masked next-token prediction; `dataloader_cfg` has max_seq_len, shuffle_seed, mask_rate."""
    return _make_collator("mntp", dataloader_cfg, tokenizer, dataset_batch_size)


def mdlm_collator(dataloader_cfg: Mapping[str, Any], tokenizer: Any, dataset_batch_size: int) -> tuple[Collator, int]:
    """Collator of masked diffusion; `dataloader_cfg` has max_seq_len and shuffle_seed."""
    return _make_collator("mdlm", dataloader_cfg, tokenizer, dataset_batch_size)


def scheduled_collator(dataloader_cfg: Mapping[str, Any], tokenizer: Any, dataset_batch_size: int) -> tuple[Collator, int]:
    """Collator whose objective changes with the token clock or the row: besides the above, `objective` (schedules.py)."""
    return _make_collator(dataloader_cfg["objective"], dataloader_cfg, tokenizer, dataset_batch_size)


def build_ettin_loader(
    tokenizer: Any, device_batch_size: int | float, *, dataset: Mapping[str, Any], objective: Any, max_seq_len: int,
    mask_rate: Any = 0.0, packing: bool = True, shuffle: bool = True, shuffle_seed: int = 21,
    shuffle_window: int | None = None, batch_size_warmup: Mapping[str, Any] | None = None, num_workers: int = 0,
    prefetch_factor: int | None = None, pin_memory: bool = True, persistent_workers: bool = False, timeout: float = 0,
    **unknown: Any,
) -> DataSpec:
    """Builds the `ettin_text` loader; every key may stand in YAML under train_loader or eval_loader.

    Args:
        tokenizer: must be the one that the data was converted with.
        device_batch_size: rows per batch on this rank.
        dataset: {local: folder made by data_prep/convert.py or `ettin mix`, split: train or validation}. With `remote`, a
            folder or URL of such a set, `local` is where its files are kept as they are needed, at most `cache_limit` bytes
            of shards for the split, such as 200gb. `on_bad_shard`: stop (if not given) or skip, see `mds.MDSSplit`.
        objective: mlm, clm, mntp or mdlm, or a schedule of them on the token clock, times in tokens (schedules.py).
        max_seq_len: tokens of a row, T.
        mask_rate: share of tokens that mlm and mntp choose, or a schedule of it; 0 where neither occurs.
        packing: several chunks a row (best fit), or one.
        shuffle: True gives the endless training stream; False one epoch in stored order, for evaluation.
        shuffle_seed: seed of order and masks.
        shuffle_window: shards whose rows are mixed (16 if not given); not with shuffle: false.
        batch_size_warmup: {min_size: rows of the first step over all ranks, tokens: of the whole warm-up}, see ramp.py; only
            in training.
        num_workers, prefetch_factor, persistent_workers, timeout: as torch's DataLoader has them.
        pin_memory: page-locked microbatches, see `batches.split_batch`; acts only where there is a GPU.

    Raises:
        ValueError, FileNotFoundError: a key is unknown, out of range or without effect, or the data does not fit.
    """
    _check_keys(unknown)
    check_numbers(device_batch_size=device_batch_size, num_workers=num_workers, timeout=timeout)
    check_choices(pin_memory=pin_memory, persistent_workers=persistent_workers)
    if prefetch_factor is not None:
        check_numbers(prefetch_factor=prefetch_factor)
    _check_workers(num_workers, prefetch_factor=prefetch_factor, persistent_workers=persistent_workers, timeout=timeout)
    schedule, rate = ObjectiveSchedule.parse(objective), MaskRate.parse(mask_rate)
    check_together(schedule, rate)
    batch_size, world_size = int(device_batch_size), dist.get_world_size()
    if batch_size_warmup is not None:
        check_warmup(batch_size_warmup, batch_size * world_size, world_size=world_size)
    stream = open_stream(dataset=dataset, max_seq_len=max_seq_len, global_batch_size=batch_size * world_size,
                         packing=packing, shuffle=shuffle, shuffle_seed=shuffle_seed, shuffle_window=shuffle_window,
                         batch_size_warmup=batch_size_warmup)
    check_tokenizer(tokenizer, stream.data.tokenizer)
    rows = (RowDataset if shuffle else FiniteRowDataset)(stream.data, stream.order, stream.ramp)
    settings = {"max_seq_len": max_seq_len, "objective": schedule, "mask_rate": rate, "shuffle_seed": shuffle_seed}
    collate, _ = _collator(schedule)(settings, tokenizer, batch_size)
    loader = DataLoader(
        rows, batch_size=None, collate_fn=collate, num_workers=num_workers, prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers, timeout=timeout,
        # DataLoader draws a seed for its workers at each start; from the default generator that would shift dropout
        generator=torch.Generator().manual_seed(shuffle_seed))
    # the dataset makes the batches; the host still asks the loader for their size, and the loader itself for its length
    object.__setattr__(loader, "batch_size", batch_size)
    return DataSpec(loader, num_samples=None if shuffle else rows.order.rows_per_epoch,
                    split_batch=functools.partial(split_batch, pin=pin_memory and torch.cuda.is_available()),
                    get_num_samples_in_batch=count_samples, get_num_tokens_in_batch=count_tokens)  # type: ignore


def _collator(schedule: ObjectiveSchedule) -> Callable[..., tuple[Any, int]]:
    from llmfoundry import registry  # imported late: it takes seconds, and only the host's own runs come here

    single = schedule.is_single and schedule.final in OBJECTIVES
    return registry.collators.get(f"ettin_{schedule.final if single else 'scheduled'}")


def _check_keys(unknown: Mapping[str, Any]) -> None:
    if unknown:
        valid = [name for name, parameter in inspect.signature(build_ettin_loader).parameters.items()
                 if parameter.kind is parameter.KEYWORD_ONLY]
        raise ValueError(f"ettin_text loader: unknown key {', '.join(map(repr, unknown))} given; valid keys are "
                         f"{', '.join(['name', *valid])}. Correct or remove it")


def _check_workers(num_workers: int, **keys: Any) -> None:
    """Refuses settings of the worker processes where there are none."""
    for key, value in keys.items():
        if value and not num_workers:
            raise ValueError(f"{key}: {value} given with num_workers: 0, where it has no effect; it is allowed with "
                             "num_workers of at least 1. Remove it, or set num_workers")
