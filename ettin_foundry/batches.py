"""A batch: rows to (B, T) tensors, and those to the flat microbatches that the model reads.

Torch and numpy only, so that anything that feeds the model can use it without the host. The loader is in `data.py`.

Letters: B rows, T row length, P pieces in a row, N real tokens of a microbatch, D documents, n targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ettin_foundry.objectives import IGNORED, TextVocab, check_objective, make_inputs, row_generator
from ettin_foundry.packing import SPECIALS_PER_PIECE

__all__ = ["Batch", "Collator", "Row", "count_samples", "count_tokens", "flatten", "split_batch"]

Batch = dict[str, Any]


class Row(NamedTuple):
    """One row before its tensors are made. An empty row (no chunks) fills the last batch of an evaluation."""

    epoch: int
    number: int  # of the row in its epoch; with seed and epoch it seeds the row's masks
    step: int
    tokens_before: int  # real tokens of the stream before the global batch
    place: int  # of the row in the global batch
    chunks: Sequence[np.ndarray]  # P arrays (L,) uint16, no special ids
    ends_document: np.ndarray  # (P,) bool


class Collator:
    """Rows to one device batch.

    A row is, for each piece, BOS + chunk + EOS, then padding; the same for encoders and decoders, so that a pair's rows
    and token clocks are identical. The EOS of a chunk whose document goes on in another chunk is no target of clm.
    """

    def __init__(self, objective: str, vocab: TextVocab, *, max_seq_len: int, mask_rate: float, seed: int) -> None:
        check_objective(objective, mask_rate)
        self.objective, self.vocab, self.max_seq_len = objective, vocab, max_seq_len
        self.mask_rate, self.seed = mask_rate, seed

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Batch with input_ids, labels, sequence_id (-1 on padding), (B, T) int64 each; objective, step, tokens_before.
        """
        if rows[0].step != rows[-1].step:
            raise RuntimeError(f"a batch mixes rows of steps {rows[0].step} and {rows[-1].step}: the DataLoader's "
                               "batch_size is not the dataset's")
        shape = (len(rows), self.max_seq_len)
        input_ids, labels = np.full(shape, self.vocab.pad), np.full(shape, IGNORED)
        sequence_id = np.full(shape, -1)
        for at, row in enumerate(rows):
            self._fill(input_ids[at], sequence_id[at], row.chunks)
            if row.chunks:
                input_ids[at], labels[at] = make_inputs(
                    self.objective, input_ids[at], sequence_id[at], row.ends_document, mask_rate=self.mask_rate,
                    vocab=self.vocab, rng=row_generator(self.seed, row.epoch, row.number))
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels),
                "sequence_id": torch.from_numpy(sequence_id), "objective": self.objective, "step": rows[0].step,
                "tokens_before": rows[0].tokens_before}

    def _fill(self, ids: np.ndarray, sequence_id: np.ndarray, chunks: Sequence[np.ndarray]) -> None:
        begin = 0
        for piece, chunk in enumerate(chunks):
            end = begin + len(chunk) + SPECIALS_PER_PIECE
            ids[begin] = self.vocab.cls
            ids[begin + 1:end - 1] = chunk
            ids[end - 1] = self.vocab.sep
            sequence_id[begin:end] = piece
            begin = end


def flatten(batch: Batch) -> Batch:
    """A (B, T) batch as one flat stream without padding.

    Returns:
        input_ids (N,), position_ids (N,) int64 restarting at each document, cu_seqlens (D + 1,) int32, max_seqlen,
        target_positions (n,) and target_labels (n,) int64, num_rows (empty ones not counted), num_tokens, num_targets,
        and the batch's Python scalars. All counts are Python ints: the step never reads back from the device. Without
        any token, N = D = 0 and cu_seqlens is [0].
    """
    sequence_id = batch["sequence_id"]
    real = sequence_id >= 0  # (B, T)
    input_ids, labels = batch["input_ids"][real], batch["labels"][real]  # (N,)
    rows = torch.arange(len(real))[:, None] * real.shape[1]  # no two rows share a document number
    document = (sequence_id + rows)[real]  # (N,)
    starts = torch.nonzero(document.diff(prepend=document.new_full((1,), -1)))[:, 0]  # (D,)
    bounds = torch.cat([starts, starts.new_full((1,), len(document))])  # (D + 1,)
    lengths = bounds.diff()
    targets = torch.nonzero(labels != IGNORED)[:, 0]
    return {
        "input_ids": input_ids,
        "position_ids": torch.arange(len(document)) - torch.repeat_interleave(starts, lengths),
        "cu_seqlens": bounds.to(torch.int32),
        "max_seqlen": int(lengths.max()) if len(lengths) else 0,
        "target_positions": targets,
        "target_labels": labels[targets],
        "num_rows": int(real[:, 0].sum()),
        "num_tokens": len(document),
        "num_targets": len(targets),
        **{key: value for key, value in batch.items() if not isinstance(value, torch.Tensor)},
    }


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
    """Real tokens (`total`) and targets (`loss_generating`) of a (B, T) or flat batch."""
    if "num_tokens" in batch:
        total, targets = batch["num_tokens"], batch["num_targets"]
    else:
        total, targets = int((batch["sequence_id"] >= 0).sum()), int((batch["labels"] != IGNORED).sum())
    # A float on every rank, for the host all-reduces it and all must have one dtype; above 0, because the host divides
    # by the sum and a batch without any target would give NaN. 1e-6 is lost in float32 beside any real count.
    return {"total": total, "loss_generating": max(float(targets), 1e-6)}
