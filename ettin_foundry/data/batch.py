"""A batch: rows to (B, T) tensors, and those to the flat microbatches that the model reads.

Torch and numpy only, so that anything that feeds the model can use it without LLM-Foundry.

Letters: B rows, T row length, N real tokens of a microbatch, D documents, n targets.
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

Batch = dict[str, Any]


class Collator:
    """Rows to one device batch.

    A row is, for each piece, BOS + chunk + EOS, then padding. The EOS of a chunk whose document goes on in another
    chunk is no target of clm.

    Args:
        objective, mask_rate: as in YAML, see objectives/schedule.py.
        vocab: ids of special and text tokens. max_seq_len: T. seed: the loader's shuffle_seed.
    """

    def __init__(self, objective: Any, vocab: TextVocab, *, max_seq_len: int, mask_rate: Any, seed: int) -> None:
        self.objective, self.mask_rate = ObjectiveSchedule.parse(objective), MaskRate.parse(mask_rate)
        check_together(self.objective, self.mask_rate)
        self.vocab, self.max_seq_len, self.seed = vocab, max_seq_len, seed

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: (B, T) int64 input_ids, labels and sequence_id (-1 on padding), and Python scalars.

        ids_hash is the sum of `hash_row` over the rows; the sum over ranks modulo 2**48 tells whether two runs read
        the same global batch. A mixture of objectives also has causal, (B,) bool, rows of clm; row_weight, (B,)
        float32, and loss_tokens, (B,) int64, see `targets.Inputs`.
        """
        step, clock = rows[0].step, rows[0].tokens_before
        shares, rate = self.objective.at(clock), self.mask_rate.at(clock)
        mixed = len(shares) > 1
        input_ids = np.full((len(rows), self.max_seq_len), self.vocab.pad)
        labels, sequence_id = np.full_like(input_ids, IGNORED), np.full_like(input_ids, -1)
        causal, weight = np.zeros(len(rows), bool), np.ones(len(rows), np.float32)
        loss_tokens, ids_hash = np.zeros(len(rows), np.int64), 0
        for at, row in enumerate(rows):
            fill_row(input_ids[at], sequence_id[at], row, cls=self.vocab.cls, sep=self.vocab.sep)
            ids_hash += hash_row(input_ids[at], row.place)
            if not row.chunks:
                continue
            name = draw_objective(shares, self.seed, row.epoch, row.number)
            input_ids[at], labels[at], weight[at], loss_tokens[at] = make_inputs(
                name, input_ids[at], sequence_id[at], row.ends_document, mask_rate=rate, vocab=self.vocab,
                rng=row_generator(self.seed, row.epoch, row.number), mixed=mixed)
            causal[at] = name == "clm"
        arrays = {"input_ids": input_ids, "labels": labels, "sequence_id": sequence_id}
        if mixed:
            arrays |= {"causal": causal, "row_weight": weight, "loss_tokens": loss_tokens}
        return {**{key: torch.from_numpy(value) for key, value in arrays.items()},
                "objective": "+".join(shares),
                "mask_rate": rate if set(shares) & set(MASKED_OBJECTIVES) else 0.0,
                "step": step, "tokens_before": clock, "ids_hash": ids_hash % HASH_MODULUS}


def flatten(batch: Batch) -> Batch:
    """A (B, T) batch on the CPU as one flat stream without padding; of a mixture, rows of clm come first.

    All counts are Python ints: the step never reads back from the device. Without any token, N = D = 0.
    """
    if "causal" in batch:
        batch = _causal_first(batch)
    # numpy picks positions by a mask several times faster than torch
    input_ids, labels, pieces = (batch[key].numpy() for key in ("input_ids", "labels", "sequence_id"))  # (B, T)
    real = pieces >= 0
    begins = np.diff(pieces, axis=1, prepend=-1) != 0
    row_tokens = real.sum(axis=1)  # (B,)
    num_tokens = int(row_tokens.sum())
    starts = np.flatnonzero(begins[real])  # (D,)
    bounds = np.append(starts, num_tokens)  # (D + 1,)
    lengths = np.diff(bounds)
    labels = labels[real]
    targets = np.flatnonzero(labels != IGNORED)
    causal = batch["causal"].numpy() if "causal" in batch else batch["objective"] == "clm"
    num_causal_tokens = int((row_tokens * causal).sum())
    arrays = {
        "input_ids": input_ids[real],  # (N,) int64
        "position_ids": np.arange(num_tokens) - np.repeat(starts, lengths),  # (N,) int64
        "cu_seqlens": bounds.astype(np.int32),  # (D + 1,), [0] without any token
        "target_positions": targets,  # (n,) int64
        "target_labels": labels[targets],  # (n,) int64
    }
    if "row_weight" in batch:  # (n,) fp32, of a mixture
        arrays["target_weights"] = np.repeat(batch["row_weight"].numpy(), row_tokens)[targets]
    return {
        **{key: torch.from_numpy(value) for key, value in arrays.items()},
        "max_seqlen": int(lengths.max(initial=0)),
        "num_rows": int(np.count_nonzero(row_tokens)),  # empty ones not counted
        "num_tokens": num_tokens,
        "num_targets": len(targets),
        # the divisor of the loss
        "num_loss_tokens": int(batch["loss_tokens"].sum()) if "loss_tokens" in batch else len(targets),
        "num_causal_documents": int(np.searchsorted(starts, num_causal_tokens)),  # the stream's first
        "num_causal_tokens": num_causal_tokens,
        **{key: value for key, value in batch.items() if not isinstance(value, torch.Tensor)},
    }


def _causal_first(batch: Batch) -> Batch:
    """The same rows, those of clm before the others, each kind in its order."""
    order = torch.argsort(~batch["causal"], stable=True)
    return {key: value[order] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def split_batch(batch: Batch, microbatch_size: int | float, *, pin: bool = False) -> list[Batch]:
    """Flat microbatches of `microbatch_size` rows of a (B, T) batch, the last one possibly of fewer.

    With `pin`, the flat tensors lie in page-locked memory: from pageable memory, their copy to the device would wait
    for the work that is queued there.
    """
    if int(microbatch_size) != microbatch_size or microbatch_size < 1:
        raise ValueError(f"device_train_microbatch_size must be an integer >= 1, got {microbatch_size}")
    if "causal" in batch:  # sorted here already, at most one microbatch has rows of both kinds
        batch = _causal_first(batch)
    size, tensors = int(microbatch_size), {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    flat = [flatten({**batch, **{key: value[first:first + size] for key, value in tensors.items()}})
            for first in range(0, len(batch["input_ids"]), size)]
    return [{key: value.pin_memory() if pin and isinstance(value, torch.Tensor) else value
             for key, value in part.items()} for part in flat]


def count_samples(batch: Batch) -> int:
    """Rows of a (B, T) or flat batch that hold a token; Composer counts them for the stream's position."""
    return batch["num_rows"] if "num_rows" in batch else int((batch["sequence_id"][:, 0] >= 0).sum())


def count_tokens(batch: Batch) -> dict[str, int | float]:
    """Real tokens (`total`) and the divisor of the loss (`loss_generating`) of a (B, T) or flat batch."""
    if "num_tokens" in batch:
        total, divisor = batch["num_tokens"], batch["num_loss_tokens"]
    else:
        total = np.count_nonzero(batch["sequence_id"].numpy() >= 0)
        divisor = batch["loss_tokens"].sum() if "loss_tokens" in batch else (batch["labels"] != IGNORED).sum()
    # A float on every rank, for Composer all-reduces it and all must have one dtype; above 0, because
    # Composer divides by the sum and a batch without any target would give NaN. 1e-6 is lost in float32
    # beside any real count.
    return {"total": total, "loss_generating": max(float(divisor), 1e-6)}
