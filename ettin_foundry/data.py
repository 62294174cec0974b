"""Rows to batches to the host's DataSpec: the `ettin_text` loader.

`order.py` says which chunks form row n of the stream; here a rank and a worker take their rows, and `batches.py` turns
them into tensors with masks and labels, and a batch into flat microbatches, still on the CPU. Every step is a pure
function of (data, seed, row number), so there is no state but the number of rows consumed, which the host counts, and
resuming on another number of ranks or workers gives the same global batches. Streaming's own iteration is not used: no
shared memory, and no lock file or background thread as long as the shards lie here unpacked. Those of a remote or packed
set are made ahead of need, because the order is known (remote.py).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ettin_foundry.batches import Collator, Row, count_samples, count_tokens, flatten, split_batch
from ettin_foundry.keys import DATASET_KEYS
from ettin_foundry.mds import MDSSet
from ettin_foundry.mix_set import MixSet, open_set
from ettin_foundry.objectives import TextVocab, check_objective
from ettin_foundry.order import ORDER_VERSION, Order
from ettin_foundry.packing import SPECIALS_PER_PIECE
from ettin_foundry.storage import join
from ettin_foundry.tokenizer import check as check_tokenizer

__all__ = ["FiniteRowDataset", "RowDataset", "build_ettin_loader", "clm_collator", "flatten", "mlm_collator",
           "mntp_collator", "split_batch"]

_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
DEFAULT_WINDOW = 16
"""Shards whose rows are mixed; with the usual 64 MB shards about half a billion tokens."""


class RowDataset(IterableDataset):
    """This rank's rows of the endless stream, in batches of `batch_size` rows.

    Global batch k is the rows start + k * G to start + (k + 1) * G - 1 of the stream, G = batch_size * world size; rank
    r has the r-th contiguous batch_size of them, and worker w of n serves the batches w, w + n, ...

    Args:
        data: the opened split.
        order: its order; the two are kept together so that a row's address and its chunks match.
        batch_size: rows per batch of this rank; the DataLoader's batch_size must be the same.
    """

    def __init__(self, data: MDSSet | MixSet, order: Order, *, batch_size: int) -> None:
        self.data, self.order, self.batch_size = data, order, batch_size
        self.start_row = 0
        self.world_size = dist.get_world_size()

    @property
    def max_seq_len(self) -> int:
        return self.order.max_seq_len

    def __iter__(self) -> Iterator[Row]:
        world_size, rank = dist.get_world_size(), dist.get_global_rank()
        if world_size != self.world_size or not 0 <= rank < world_size:
            # a worker that lost sight of the other ranks would silently give every rank the same rows
            raise RuntimeError(f"loader built for {self.world_size} ranks, iterated as rank {rank} of {world_size}")
        worker = get_worker_info()
        first_batch, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        global_batch_size = self.batch_size * world_size
        for batch in itertools.count(first_batch, stride):
            first = self.start_row + batch * global_batch_size
            if self._is_past_end(first):
                return
            step, tokens_before = first // global_batch_size, self.order.tokens_before(first)
            begin = first + rank * self.batch_size
            self.data.prefetch(self.order.shards_ahead(begin))
            for number in range(begin, begin + self.batch_size):
                yield self._row(number, step, tokens_before, number - first)

    def _is_past_end(self, number: int) -> bool:
        return False

    def _row(self, number: int, step: int, tokens_before: int, place: int) -> Row:
        of_epoch = number % self.order.rows_per_epoch
        if self._is_past_end(number):
            return Row(0, of_epoch, step, tokens_before, place, (), np.zeros(0, bool))
        epoch, shard, samples = self.order.row(number)
        chunks = [self.data.chunk(shard, sample) for sample in samples]
        return Row(epoch, of_epoch, step, tokens_before, place, chunks, self.data.last(shard)[list(samples)])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """What a checkpoint holds of the data: where the stream is, and what it is a stream of.

        Args:
            num_samples: rows consumed by all ranks, as the host counts them.
            from_beginning: counted from row 0, not from where this process resumed.
        """
        return {"rows": num_samples if from_beginning else self.start_row + num_samples, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint's row, with any number of ranks and workers.

        Raises:
            ValueError: the checkpoint's rows are of other data or another order.
        """
        rows = state.get("rows") if isinstance(state, Mapping) else None
        if not isinstance(rows, int) or rows < 0:
            raise ValueError(f"checkpoint: its dataset state is {state!r}; one written by ettin_text is needed. Load "
                             "only the weights (load_weights_only: true) to start on new data")
        for key, mine in self._identity().items():
            if state.get(key) != mine:
                where = {"fingerprint": "dataset (fingerprint of its manifest)",
                         "order": "order (its version in this program)"}.get(key, key)
                raise ValueError(f"train_loader.{where}: {mine!r} given, the checkpoint was trained with "
                                 f"{state.get(key)!r}; they must be equal, or rows would be skipped or repeated. Restore "
                                 "the setting, or load only the weights (load_weights_only: true) to start anew")
        self.start_row = rows

    def _identity(self) -> dict[str, Any]:
        return {"fingerprint": self.data.fingerprint, "order": ORDER_VERSION, "max_seq_len": self.order.max_seq_len,
                "packing": self.order.packing, "shuffle": self.order.shuffle, "shuffle_seed": self.order.seed,
                "shuffle_window": self.order.window}


class FiniteRowDataset(RowDataset):
    """One epoch, for evaluation: every rank gives the same number of batches; rows that are missing are empty."""

    def __len__(self) -> int:
        """Rows of this rank, empty ones included; the host needs a length to know that an evaluation ends."""
        return -(-self.order.rows_per_epoch // (self.batch_size * self.world_size)) * self.batch_size

    def _is_past_end(self, number: int) -> bool:
        return number >= self.order.rows_per_epoch


def _make_collator(objective: str, dataloader_cfg: Mapping[str, Any], tokenizer: Any,
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


def build_ettin_loader(
    tokenizer: Any, device_batch_size: int | float, *, dataset: Mapping[str, Any], objective: str, max_seq_len: int,
    mask_rate: float = 0.0, packing: bool = True, shuffle: bool = True, shuffle_seed: int = 21,
    shuffle_window: int | None = None, num_workers: int = 0, prefetch_factor: int | None = None,
    pin_memory: bool = True, persistent_workers: bool = False, timeout: float = 0, **unknown: Any,
) -> DataSpec:
    """Builds the `ettin_text` loader; every key may stand in YAML under train_loader or eval_loader.

    Args:
        tokenizer: must be the one that the data was converted with.
        device_batch_size: rows per batch on this rank.
        dataset: {local: folder made by data_prep/convert.py or `ettin mix`, split: train or validation}. With `remote`, a
            folder or URL of such a set, `local` is where its files are kept as they are needed, at most `cache_limit` bytes
            of shards for the split, such as 200gb. `on_bad_shard`: stop (if not given) or skip, see `mds.MDSSet`.
        objective: mlm, clm or mntp.
        max_seq_len: tokens of a row, T.
        mask_rate: share of tokens that mlm and mntp choose; 0 for clm.
        packing: several chunks a row (best fit), or one.
        shuffle: True gives the endless training stream; False one epoch in stored order, for evaluation.
        shuffle_seed: seed of order and masks.
        shuffle_window: shards whose rows are mixed (16 if not given); not with shuffle: false.
        num_workers, prefetch_factor, persistent_workers, timeout: as torch's DataLoader has them.
        pin_memory: page-locked microbatches, see `batches.split_batch`; acts only where there is a GPU.

    Raises:
        ValueError, FileNotFoundError: a key is unknown, out of range or without effect, or the data does not fit.
    """
    _check_keys(dataset, unknown)
    _check_numbers(device_batch_size=device_batch_size, max_seq_len=max_seq_len, num_workers=num_workers,
                   shuffle_seed=shuffle_seed, timeout=timeout)
    check_objective(objective, mask_rate)
    _check_effects(packing=packing, shuffle=shuffle, shuffle_window=shuffle_window, num_workers=num_workers,
                   prefetch_factor=prefetch_factor, pin_memory=pin_memory, persistent_workers=persistent_workers,
                   timeout=timeout)
    window = DEFAULT_WINDOW if shuffle_window is None else shuffle_window
    data = _open(dataset, max_open=2 * window)
    check_tokenizer(tokenizer, data.tokenizer)
    _check_row_length(data, max_seq_len)
    order = Order(data, max_seq_len, packing=packing, shuffle=shuffle, seed=shuffle_seed, window=window)
    data.check_room(order.shards_ahead(0))  # nowhere are they more
    rows = (RowDataset if shuffle else FiniteRowDataset)(data, order, batch_size=int(device_batch_size))
    settings = {"max_seq_len": max_seq_len, "mask_rate": mask_rate, "shuffle_seed": shuffle_seed}
    collate, batch_size = _collator(objective)(settings, tokenizer, rows.batch_size)
    loader = DataLoader(
        rows, batch_size=batch_size, collate_fn=collate, num_workers=num_workers, prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers, timeout=timeout,
        # DataLoader draws a seed for its workers at each start; from the default generator that would shift dropout
        generator=torch.Generator().manual_seed(shuffle_seed))
    return DataSpec(loader, num_samples=None if shuffle else order.rows_per_epoch,
                    split_batch=functools.partial(split_batch, pin=pin_memory and torch.cuda.is_available()),
                    get_num_samples_in_batch=count_samples, get_num_tokens_in_batch=count_tokens)  # type: ignore


def _collator(objective: str) -> Callable[..., tuple[Any, int]]:
    from llmfoundry import registry  # imported late: it takes seconds, and only the host's own runs come here

    return registry.collators.get(f"ettin_{objective}")


def _open(dataset: Mapping[str, Any], max_open: int) -> MDSSet | MixSet:
    local, split, remote = Path(dataset["local"]), dataset["split"], dataset.get("remote")
    options = {key: dataset[key] for key in ("cache_limit", "on_bad_shard") if dataset.get(key) is not None}
    if remote is not None:
        return open_set(local / split, max_open=max(32, max_open), remote=join(remote, split), **options)
    splits = sorted(folder.parent.name for folder in local.glob("*/manifest.json"))
    if split not in splits:
        what = f"its complete splits are: {', '.join(splits)}" if splits else "that folder holds no complete split"
        raise FileNotFoundError(f"dataset: local: {str(local)!r}, split: {split!r} given; {what}. A split is a folder "
                                "with a manifest.json, made by data_prep/convert.py: run it, or correct the keys")
    return open_set(local / split, max_open=max(32, max_open), **options)


def _check_keys(dataset: Mapping[str, Any], unknown: Mapping[str, Any]) -> None:
    if unknown:
        valid = [name for name, parameter in inspect.signature(build_ettin_loader).parameters.items()
                 if parameter.kind is parameter.KEYWORD_ONLY]
        raise ValueError(f"ettin_text loader: unknown key {', '.join(map(repr, unknown))} given; valid keys are "
                         f"{', '.join(['name', *valid])}. Correct or remove it")
    if not isinstance(dataset, Mapping) or not {"local", "split"} <= set(dataset) <= set(DATASET_KEYS):
        given = sorted(dataset) if isinstance(dataset, Mapping) else repr(dataset)
        raise ValueError(f"dataset: {given} given; the keys local (folder of the converted corpus) and split (train or "
                         f"validation) are needed, and {', '.join(DATASET_KEYS[2:])} are possible. Correct the block")
    for key in ("local", "split", "remote"):
        if key in dataset and dataset[key] is not None and not (isinstance(dataset[key], str) and dataset[key]):
            raise ValueError(f"dataset.{key}: {dataset[key]!r} given; a text is needed. Correct it")
    if not _SPLIT.fullmatch(dataset["split"]):
        raise ValueError(f"dataset.split: {dataset['split']!r} given; the name of a folder in dataset.local is needed, "
                         "such as train. Correct it")


def _check_numbers(**values: Any) -> None:
    smallest = {"device_batch_size": 1, "max_seq_len": SPECIALS_PER_PIECE + 1}
    for key, value in values.items():
        least = smallest.get(key, 0)
        # the host computes device_batch_size by a division, which may leave 8.0
        kinds = (int, float) if key in ("device_batch_size", "timeout") else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf") \
                or (key != "timeout" and int(value) != value):
            raise ValueError(f"{key}: {value!r} given; a {'number' if key == 'timeout' else 'whole number'} of at least "
                             f"{least} is needed. Correct the key")


def _check_effects(**keys: Any) -> None:
    """Refuses settings of the wrong type and those that would change nothing."""
    for key in ("packing", "shuffle", "pin_memory", "persistent_workers"):
        if not isinstance(keys[key], bool):
            raise ValueError(f"{key}: {keys[key]!r} given; true or false is needed. Correct the key")
    for key in ("prefetch_factor", "shuffle_window"):
        if keys[key] is not None and (isinstance(keys[key], bool) or not isinstance(keys[key], int) or keys[key] < 1):
            raise ValueError(f"{key}: {keys[key]!r} given; a whole number of at least 1 is needed. Correct the key")
    if not keys["shuffle"] and keys["shuffle_window"] is not None:
        raise ValueError(f"shuffle_window: {keys['shuffle_window']} given with shuffle: false, where it has no effect; "
                         "it is allowed with shuffle: true. Remove it")
    for key in ("prefetch_factor", "persistent_workers", "timeout"):
        if keys[key] and not keys["num_workers"]:
            raise ValueError(f"{key}: {keys[key]} given with num_workers: 0, where it has no effect; it is allowed with "
                             "num_workers of at least 1. Remove it, or set num_workers")


def _check_row_length(data: MDSSet | MixSet, max_seq_len: int) -> None:
    if data.chunk_length + SPECIALS_PER_PIECE <= max_seq_len:
        return
    # chunk_length only bounds the chunks; the histograms tell
    longest = max(int(np.flatnonzero(data.lengths(shard))[-1]) for shard in range(data.num_shards))
    if longest + SPECIALS_PER_PIECE > max_seq_len:
        raise ValueError(f"max_seq_len: {max_seq_len} given, but the data has a chunk of {longest} tokens; a row holds "
                         f"chunks of at most {max_seq_len - SPECIALS_PER_PIECE} (BOS and EOS take {SPECIALS_PER_PIECE}). "
                         "Raise max_seq_len, or convert the corpus again with a smaller chunk length")
