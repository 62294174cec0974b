"""A batch: rows to (B, T) tensors, and those to the flat microbatches that the model reads.

Torch and numpy only, so that anything that feeds the model can use it without the host. The loader is in `data.py`.

Letters: B rows, T row length, P pieces in a row, N real tokens of a microbatch, D documents, n targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ettin_foundry.data.stream import HASH_MODULUS, Row, fill_row, hash_row
from ettin_foundry.model.config import MASKED_OBJECTIVES
from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.objectives.targets import IGNORED, TextVocab, draw_objective, make_inputs, row_generator

__all__ = ["HASH_MODULUS", "Batch", "Collator", "Row", "count_samples", "count_tokens", "flatten", "hash_row", "split_batch"]

_ONE_A_TARGET = {"mlm", "clm", "mntp"}  # alone in a batch, each target weighs 1 and counts as one

Batch = dict[str, Any]


class Collator:
    """Rows to one device batch.

    A row is, for each piece, BOS + chunk + EOS, then padding; the same for encoders and decoders, so that a pair's rows
    and token clocks are identical. The EOS of a chunk whose document goes on in another chunk is no target of clm.

    Args:
        objective: a name, a schedule, or what `ObjectiveSchedule.parse` reads. mask_rate: likewise, of mlm and mntp.
        vocab: ids of special and text tokens. max_seq_len: T. seed: the loader's shuffle_seed.

    Raises:
        ValueError: an unknown objective, or a mask rate that it cannot use.
    """

    def __init__(self, objective: Any, vocab: TextVocab, *, max_seq_len: int, mask_rate: Any, seed: int) -> None:
        self.objective = objective if isinstance(objective, ObjectiveSchedule) else ObjectiveSchedule.parse(objective)
        self.mask_rate = mask_rate if isinstance(mask_rate, MaskRate) else MaskRate.parse(mask_rate)
        check_together(self.objective, self.mask_rate)
        self.vocab, self.max_seq_len, self.seed = vocab, max_seq_len, seed

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch with these entries.

        input_ids, labels, sequence_id (-1 on padding): (B, T) int64 each. Where rows differ in it: causal, (B,) bool,
        rows of clm. Where targets do not all weigh 1: row_weight, (B,) float32, and loss_tokens, (B,) int64, see
        `objectives.Inputs`. Python scalars: objective (of a mixture, its names joined by +), mask_rate, step,
        tokens_before, and ids_hash, the sum of `hash_row` over the rows, below 2**48; the sum over ranks modulo 2**48
        tells whether two runs read the same global batch.
        """
        if rows[0].step != rows[-1].step:
            raise RuntimeError(f"a batch mixes rows of steps {rows[0].step} and {rows[-1].step}: the DataLoader's "
                               "batch_size is not the dataset's")
        shares, rate = self.objective.at(rows[0].tokens_before), self.mask_rate.at(rows[0].tokens_before)
        shape = (len(rows), self.max_seq_len)
        input_ids, labels = np.full(shape, self.vocab.pad), np.full(shape, IGNORED)
        sequence_id = np.full(shape, -1)
        causal, weight, loss_tokens = np.zeros(len(rows), bool), np.ones(len(rows), np.float32), np.zeros(len(rows), int)
        ids_hash = 0
        for at, row in enumerate(rows):
            fill_row(input_ids[at], sequence_id[at], row.chunks, cls=self.vocab.cls, sep=self.vocab.sep)
            ids_hash += hash_row(input_ids[at], row.place)
            if not row.chunks:
                continue
            name = draw_objective(shares, self.seed, row.epoch, row.number)
            input_ids[at], labels[at], weight[at], loss_tokens[at] = make_inputs(
                name, input_ids[at], sequence_id[at], row.ends_document, mask_rate=rate, vocab=self.vocab,
                rng=row_generator(self.seed, row.epoch, row.number), mixed=len(shares) > 1)
            causal[at] = name == "clm"
        batch: Batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels),
                        "sequence_id": torch.from_numpy(sequence_id), "objective": "+".join(shares),
                        "mask_rate": rate if any(name in MASKED_OBJECTIVES for name in shares) else 0.0,
                        "step": rows[0].step, "tokens_before": rows[0].tokens_before, "ids_hash": ids_hash % HASH_MODULUS}
        if len(shares) > 1:
            batch["causal"] = torch.from_numpy(causal)
        if not set(shares) <= _ONE_A_TARGET or len(shares) > 1:
            batch |= {"row_weight": torch.from_numpy(weight), "loss_tokens": torch.from_numpy(loss_tokens)}
        return batch


def flatten(batch: Batch) -> Batch:
    """A (B, T) batch as one flat stream without padding; rows of clm come first when there are others too.

    Returns:
        input_ids (N,), position_ids (N,) int64 restarting at each document, cu_seqlens (D + 1,) int32, max_seqlen,
        target_positions (n,) and target_labels (n,) int64, num_rows (empty ones not counted), num_tokens, num_targets,
        num_loss_tokens (the divisor of the loss), num_causal_documents and num_causal_tokens (how many of the stream's
        first see the past only), the batch's Python scalars, and target_weights (n,) fp32 where not all are 1. All
        counts are Python ints: the step never reads back from the device. Without any token, N = D = 0 and cu_seqlens is
        [0].
    """
    if "causal" in batch:
        batch = _causal_first(batch)
    sequence_id = batch["sequence_id"]
    real = sequence_id >= 0  # (B, T)
    input_ids, labels = batch["input_ids"][real], batch["labels"][real]  # (N,)
    rows = torch.arange(len(real))[:, None] * real.shape[1]  # no two rows share a document number
    document = (sequence_id + rows)[real]  # (N,)
    starts = torch.nonzero(document.diff(prepend=document.new_full((1,), -1)))[:, 0]  # (D,)
    bounds = torch.cat([starts, starts.new_full((1,), len(document))])  # (D + 1,)
    lengths = bounds.diff()
    targets = torch.nonzero(labels != IGNORED)[:, 0]
    num_causal_tokens = int(real[batch["causal"]].sum()) if "causal" in batch else (
        len(document) if batch["objective"] == "clm" else 0)
    flat = {
        "input_ids": input_ids,
        "position_ids": torch.arange(len(document)) - torch.repeat_interleave(starts, lengths),
        "cu_seqlens": bounds.to(torch.int32),
        "max_seqlen": int(lengths.max()) if len(lengths) else 0,
        "target_positions": targets,
        "target_labels": labels[targets],
        "num_rows": int(real[:, 0].sum()),
        "num_tokens": len(document),
        "num_targets": len(targets),
        "num_loss_tokens": int(batch["loss_tokens"].sum()) if "loss_tokens" in batch else len(targets),
        "num_causal_documents": int((starts < num_causal_tokens).sum()),
        "num_causal_tokens": num_causal_tokens,
        **{key: value for key, value in batch.items() if not isinstance(value, torch.Tensor)},
    }
    if "row_weight" in batch:
        flat["target_weights"] = batch["row_weight"][:, None].expand_as(real)[real][targets]
    return flat


def _causal_first(batch: Batch) -> Batch:
    """The same rows, those of clm before the others, each kind in its order."""
    order = torch.argsort(~batch["causal"], stable=True)
    return {key: value[order] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def split_batch(batch: Batch, microbatch_size: int | float, *, pin: bool = False) -> list[Batch]:
    """Flat microbatches of `microbatch_size` rows, the last one possibly of fewer; see `flatten`.

    Args:
        batch: (B, T) tensors and Python scalars; not changed.
        microbatch_size: rows.
        pin: put the flat tensors into page-locked memory. These are what travels to the device (the (B, T) batch stays
            here), and from pageable memory the copy would wait for the work that is queued there.

    Raises:
        ValueError: microbatch_size is not a whole number of at least 1.
    """
    if int(microbatch_size) != microbatch_size or microbatch_size < 1:
        raise ValueError(f"device_train_microbatch_size: {microbatch_size} given; a whole number of rows, at least 1, "
                         "is needed. Use fewer rows of a shorter max_seq_len if one row does not fit")
    if "causal" in batch:  # sorted here already, at most one microbatch has rows of both kinds
        batch = _causal_first(batch)
    size, tensors = int(microbatch_size), {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    flat = [flatten({**batch, **{key: value[first:first + size] for key, value in tensors.items()}})
            for first in range(0, len(batch["input_ids"]), size)]
    if not pin:
        return flat
    return [{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in part.items()} for part in flat]


def count_samples(batch: Batch) -> int:
    """Rows of a (B, T) or flat batch that hold a token; the host's sample count, hence the stream's position."""
    return batch["num_rows"] if "num_rows" in batch else int((batch["sequence_id"][:, 0] >= 0).sum())


def count_tokens(batch: Batch) -> dict[str, int | float]:
    """Real tokens (`total`) and the divisor of the loss (`loss_generating`) of a (B, T) or flat batch."""
    if "num_tokens" in batch:
        total, divisor = batch["num_tokens"], batch["num_loss_tokens"]
    else:
        total = int((batch["sequence_id"] >= 0).sum())
        divisor = int(batch["loss_tokens"].sum() if "loss_tokens" in batch else (batch["labels"] != IGNORED).sum())
    # A float on every rank, for the host all-reduces it and all must have one dtype; above 0, because the host divides
    # by the sum and a batch without any target would give NaN. 1e-6 is lost in float32 beside any real count.
    return {"total": total, "loss_generating": max(float(divisor), 1e-6)}
