"""Rows to batches to Composer's DataSpec: the `ettin_text` loader.

`stream.py` says which rows a step reads; here a rank and a worker take their share of them, and `batch.py` turns it
into tensors. The only state is the number of rows consumed, which Composer counts, so resuming on another number of
ranks or workers gives the same global batches. Streaming's own iteration is not used: no shared memory, no lock file.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from composer import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ettin_foundry.data.batch import FEW_LENGTHS, Batch, Collator, Packed, count_samples, count_tokens, split_batch
from ettin_foundry.data.stream import Row, RowStream, check_warmup, open_stream
from ettin_foundry.data.tokenizer import check as check_tokenizer
from ettin_foundry.objectives.targets import TextVocab


class RowDataset(RowStream, IterableDataset):
    """This rank's share of the stream, a batch at a time; worker w of n serves the steps w, w + n, ..."""

    def __init__(self, stream: RowStream) -> None:
        super().__init__(stream.data, stream.order, stream.ramp)
        self.world_size = dist.get_world_size()

    def __iter__(self) -> Iterator[list[Row]]:
        world_size, rank = dist.get_world_size(), dist.get_global_rank()
        if world_size != self.world_size or not 0 <= rank < world_size:
            # a worker that lost sight of the other ranks would silently give every rank the same rows
            raise RuntimeError(f"loader of {self.world_size} ranks, iterated as rank {rank} of {world_size}")
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in itertools.count(self.ramp.step_of(self.start_row) + first, stride):
            if self.num_steps is not None and step >= self.num_steps:
                return
            yield self.rows_of(step, rank=rank, world_size=world_size)

    def __len__(self) -> int:
        """Rows of this rank, empty ones included: by its length the host knows that an evaluation ends."""
        if self.num_steps is None:
            raise TypeError("an endless stream has no length")
        return self.num_steps * (self.ramp.max_size // self.world_size)


class Microbatch(dict):
    """A microbatch on its device. The host makes a deep copy of each, which nothing reads and nothing changes."""

    def __deepcopy__(self, memo: Any) -> Microbatch:
        return self


def _outlive_signals(_: int) -> None:
    """In a worker: a signal to the whole process group is for the main process, which still wants its batches."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # the main process ends a worker that hangs by two of them, from the loader and at its exit
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _collator_of(objective: str | None) -> Callable[..., tuple[Collator, int]]:
    """A collator for LLM-Foundry's registry, of one objective or of what the loader's block says."""

    def build(dataloader_cfg: Mapping[str, Any], tokenizer: Any, dataset_batch_size: int) -> tuple[Collator, int]:
        """A collator and the batch size; the block is that of `ettin_text`."""
        cfg, vocab = dataloader_cfg, TextVocab.from_tokenizer(tokenizer)
        return Collator(objective or cfg["objective"], vocab, max_seq_len=cfg["max_seq_len"],
                        mask_rate=cfg.get("mask_rate", 0.0), seed=cfg["shuffle_seed"]), dataset_batch_size

    return build


# functions of this module, not partials: `llmfoundry registry find` shows where they are
mlm_collator, clm_collator, mntp_collator, scheduled_collator = map(_collator_of, ("mlm", "clm", "mntp", None))


def build_ettin_loader(
    tokenizer: Any, device_batch_size: int | float, *, dataset: Mapping[str, Any], objective: Any, max_seq_len: int,
    mask_rate: Any = 0.0, packing: bool = True, shuffle: bool = True, shuffle_seed: int = 21,
    shuffle_window: int | None = None, batch_size_warmup: Mapping[str, Any] | None = None, num_workers: int = 0,
    prefetch_factor: int | None = None, pin_memory: bool = True, persistent_workers: bool = False, timeout: float = 0,
    microbatch_size: int | None = None, fixed_shapes: bool = False,
) -> DataSpec:
    """Builds the `ettin_text` loader; every key may stand in YAML under train_loader or eval_loader.

    Args:
        tokenizer: the one that the data was converted with. device_batch_size: rows per batch on this rank.
        dataset: {local: folder made by `ettin convert` or `ettin mix`, split: train or validation}. With `remote`, a
            folder or URL of such a dataset, `local` is where its files are kept as they are needed, at most
            `cache_limit` bytes of shards for the split, such as 200gb.
        objective: mlm, clm or mntp, or a schedule of them, times in tokens (objectives/schedule.py).
        mask_rate: share of tokens that mlm and mntp choose, or a schedule of it; 0 where neither occurs.
        max_seq_len: tokens of a row. packing: several chunks a row (best fit), or one.
        shuffle: True gives the endless training stream; False one epoch as it is stored, for evaluation.
        shuffle_seed: seed of order and masks. shuffle_window: shards whose rows are mixed (16 if not given).
        batch_size_warmup: {min_size: rows of the first step over all ranks, tokens: of the warm-up}.
        num_workers, prefetch_factor, persistent_workers, timeout: as torch's DataLoader has them.
        pin_memory: page-locked batches, from which copies to a GPU do not wait; acts only where there is one.
        microbatch_size, fixed_shapes: workers split batches, see `batch.Collator`; set by the config transform.

    Raises:
        ValueError, FileNotFoundError: a key is out of range or without effect, or the data does not fit.
    """
    batch_size, world_size = int(device_batch_size), dist.get_world_size()
    if batch_size < 1 or batch_size != device_batch_size:  # LLM-Foundry's division may leave 8.0
        raise ValueError(f"device_batch_size must be an integer >= 1, got {device_batch_size}")
    if batch_size_warmup is not None:
        check_warmup(batch_size_warmup, batch_size * world_size, world_size=world_size)
    collate = Collator(objective, TextVocab.from_tokenizer(tokenizer), max_seq_len=max_seq_len, mask_rate=mask_rate,
                       seed=shuffle_seed, microbatch_size=microbatch_size,
                       fixed_lengths=(1 if packing else FEW_LENGTHS) if fixed_shapes else None)
    stream = open_stream(
        dataset=dataset, max_seq_len=max_seq_len, packing=packing, shuffle=shuffle, shuffle_seed=shuffle_seed,
        shuffle_window=shuffle_window, batch_size_warmup=batch_size_warmup, global_batch_size=batch_size * world_size)
    check_tokenizer(tokenizer, stream.data.tokenizer)
    pin = pin_memory and torch.cuda.is_available()

    def split(batch: Batch, microbatch_size: int | float) -> list[Batch]:
        """What a worker made; or made here, where only Composer knows the size (`auto`)."""
        if "microbatches" in batch:
            return batch["microbatches"].unpack()
        made = Packed(split_batch(batch, microbatch_size, collate.fixed_lengths))
        return (made.pin_memory() if pin else made).unpack()

    loader = DataLoader(
        RowDataset(stream), batch_size=None, collate_fn=collate, num_workers=num_workers,
        prefetch_factor=prefetch_factor, persistent_workers=persistent_workers, timeout=timeout,
        worker_init_fn=_outlive_signals, pin_memory=pin and microbatch_size is not None,
        # it draws a seed for its workers at each start; from the default generator that would shift dropout
        generator=torch.Generator().manual_seed(shuffle_seed))
    # the dataset makes the batches; Composer still asks the loader for their size
    object.__setattr__(loader, "batch_size", batch_size)
    return DataSpec(loader, num_samples=None if shuffle else stream.order.rows_per_epoch, split_batch=split,
                    microbatch_transforms=Microbatch, get_num_samples_in_batch=count_samples,
                    get_num_tokens_in_batch=count_tokens)  # type: ignore[arg-type]
