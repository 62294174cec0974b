"""A batch: rows to (B, T) tensors, and those to the flat microbatches that the model reads.

Without LLM-Foundry. Letters: B rows, T row length, N tokens of a microbatch, D documents, n targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ettin_foundry.data.packing import SPECIALS_PER_PIECE
from ettin_foundry.data.stream import HASH_MODULUS, Row, fill_row, hash_row
from ettin_foundry.objectives.schedule import MASKED_OBJECTIVES, MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.objectives.targets import IGNORED, TextVocab, draw_objective, make_inputs, row_generator

Batch = dict[str, Any]
FEW_LENGTHS = 8  # fixed lengths of a flat stream where rows are not full: eighths of the positions of its rows


class Packed:
    """The microbatches of a step with all their tensors in one, which crosses from a worker, and is pinned, at once."""

    def __init__(self, microbatches: Sequence[Batch]) -> None:
        self.layouts: list[Batch] = [dict(each) for each in microbatches]  # numbers, and where in `words` tensors lie
        end, tensors = 0, []
        for layout in self.layouts:
            for key, value in layout.items():
                if isinstance(value, torch.Tensor):
                    begin, end = end, end + -(-value.nbytes // 8)
                    layout[key] = slice(begin, end), len(value), value.dtype
                    tensors.append((layout[key], value))
        self.words = torch.zeros(end, dtype=torch.int64)
        for (words, length, dtype), value in tensors:
            self.words[words].view(dtype)[:length] = value

    def pin_memory(self) -> Packed:
        """Also called by the DataLoader's thread; from pageable memory, a copy to the device waits for queued work."""
        self.words = self.words.pin_memory()
        return self

    def unpack(self) -> list[Batch]:
        """The microbatches; their tensors are views of one."""
        return [{key: self.words[value[0]].view(value[2])[:value[1]] if isinstance(value, tuple) else value
                 for key, value in layout.items()} for layout in self.layouts]


class Collator:
    """Rows to one device batch.

    A row is BOS + chunk + EOS for each piece, then padding. EOS of a chunk whose document goes on is no target of clm.

    Args:
        objective, mask_rate: as in YAML, see objectives/schedule.py.
        vocab: ids of special and text tokens. max_seq_len: T. seed: the loader's shuffle_seed.
        microbatch_size: rows of a microbatch; the batch then has them ready, in place of its (B, T) tensors.
        fixed_lengths: of those, see `split_batch`.
    """

    def __init__(self, objective: Any, vocab: TextVocab, *, max_seq_len: int, mask_rate: Any, seed: int,
                 microbatch_size: int | None = None, fixed_lengths: int | None = None) -> None:
        self.objective, self.mask_rate = ObjectiveSchedule.parse(objective), MaskRate.parse(mask_rate)
        check_together(self.objective, self.mask_rate)
        self.vocab, self.max_seq_len, self.seed = vocab, max_seq_len, seed
        self.microbatch_size, self.fixed_lengths = microbatch_size, fixed_lengths

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """A batch: (B, T) int64 input_ids, labels and sequence_id (-1 on padding), and Python numbers.

        ids_hash is the sum of `hash_row` over the rows; the sum over ranks modulo 2**48 tells whether two runs read
        the same global batch. num_rows (that hold a token), num_positions (B * T), num_tokens, num_targets,
        num_loss_tokens (the divisor of the loss), num_documents; document_lengths, {causal: (2, k) int64, each length
        and how many have it}. A mixture of objectives also has causal, (B,) bool, rows of clm; row_weight, (B,)
        float32, and loss_tokens, (B,) int64, see `targets.Inputs`.
        """
        step, clock = rows[0].step, rows[0].tokens_before
        shares, rate = self.objective.at(clock), self.mask_rate.at(clock)
        mixed = len(shares) > 1
        input_ids = np.full((len(rows), self.max_seq_len), self.vocab.pad)
        labels, sequence_id = np.full_like(input_ids, IGNORED), np.full_like(input_ids, -1)
        causal, weight = np.zeros(len(rows), bool), np.ones(len(rows), np.float32)
        loss_tokens, ids_hash = np.zeros(len(rows), np.int64), 0
        lengths: dict[bool, list[int]] = {}
        for at, row in enumerate(rows):
            fill_row(input_ids[at], sequence_id[at], row, cls=self.vocab.cls, sep=self.vocab.sep)
            ids_hash += hash_row(input_ids[at], row.place)
            if not row.chunks:
                continue
            name = draw_objective(shares, self.seed, row.epoch, row.number)
            rng = row_generator(self.seed, row.epoch, row.number) if name in MASKED_OBJECTIVES else None
            input_ids[at], labels[at], weight[at], loss_tokens[at] = make_inputs(
                name, input_ids[at], sequence_id[at], row.ends_document, mask_rate=rate, vocab=self.vocab,
                rng=rng, mixed=mixed)
            causal[at] = name == "clm"
            lengths.setdefault(name == "clm", []).extend(len(chunk) + SPECIALS_PER_PIECE for chunk in row.chunks)
        arrays = {"input_ids": input_ids, "labels": labels, "sequence_id": sequence_id}
        if mixed:
            arrays |= {"causal": causal, "row_weight": weight, "loss_tokens": loss_tokens}
        batch = {**{key: torch.from_numpy(value) for key, value in arrays.items()},
                 "objective": "+".join(shares),
                 "mask_rate": rate if set(shares) & set(MASKED_OBJECTIVES) else 0.0,
                 "step": step, "tokens_before": clock, "ids_hash": ids_hash % HASH_MODULUS,
                 "num_rows": sum(bool(row.chunks) for row in rows), "num_tokens": sum(map(sum, lengths.values())),
                 "num_targets": int(np.count_nonzero(labels != IGNORED)), "num_loss_tokens": int(loss_tokens.sum()),
                 "num_positions": input_ids.size, "num_documents": sum(map(len, lengths.values())),
                 "document_lengths": {kind: np.stack(np.unique(found, return_counts=True))
                                      for kind, found in lengths.items()}}
        if self.microbatch_size is None:
            return batch
        ready = Packed(split_batch(batch, self.microbatch_size, self.fixed_lengths))
        return {**{key: value for key, value in batch.items() if key not in arrays}, "microbatches": ready}


_OF_THE_STEP = ("objective", "mask_rate", "step", "tokens_before", "ids_hash")


def flatten(batch: Batch, length: int | None = None) -> Batch:
    """A (B, T) batch of one kind, causal or not, as one flat stream without padding, on the CPU.

    With a `length`, N is its least multiple that holds the tokens, so that compiled code finds few shapes: what is left
    is filled with documents of the id 0 that no other document sees and in which nothing is predicted or counted.
    max_seqlen is T then, and cu_seqlens ends with empty documents, up to a power of two. All counts are Python ints:
    the step never reads back from the device. Without any token and length, N = D = 0.
    """
    # numpy picks positions by a mask several times faster than torch
    input_ids, labels, pieces = (batch[key].numpy() for key in ("input_ids", "labels", "sequence_id"))  # (B, T)
    real = pieces >= 0
    row_tokens = real.sum(axis=1)  # (B,)
    num_tokens, longest = int(row_tokens.sum()), pieces.shape[1]
    starts = np.flatnonzero((np.diff(pieces, axis=1, prepend=-1) != 0)[real])  # (D,)
    ids, labels = input_ids[real], labels[real]
    targets = np.flatnonzero(labels != IGNORED)
    end = num_tokens if length is None else -(-max(num_tokens, 1) // length) * length
    if end > num_tokens:
        ids = np.pad(ids, (0, end - num_tokens))
        starts = np.append(starts, np.arange(num_tokens, end, longest))
    lengths = np.diff(starts, append=end)
    empty = 0 if length is None else (1 << (len(starts) - 1).bit_length()) - len(starts)
    arrays = {
        "input_ids": ids,  # (N,) int64
        "position_ids": np.arange(end) - np.repeat(starts, lengths),  # (N,) int64
        "cu_seqlens": np.append(starts, np.full(1 + empty, end)).astype(np.int32),  # (D + 1,), [0] without any token
        "target_positions": targets,  # (n,) int64
        "target_labels": labels[targets],  # (n,) int64
    }
    if "row_weight" in batch:  # (n,) fp32, of a mixture
        arrays["target_weights"] = np.repeat(batch["row_weight"].numpy(), row_tokens)[targets]
    return {
        **{key: torch.from_numpy(value) for key, value in arrays.items()},
        "max_seqlen": int(lengths.max(initial=0)) if length is None else longest,
        "causal": bool(batch["causal"].any()) if "causal" in batch else batch["objective"] == "clm",
        "num_rows": int(np.count_nonzero(row_tokens)),  # empty ones not counted
        "num_tokens": num_tokens,
        "num_targets": len(targets),
        # the divisor of the loss
        "num_loss_tokens": int(batch["loss_tokens"].sum()) if "loss_tokens" in batch else len(targets),
        **{key: batch[key] for key in _OF_THE_STEP if key in batch},
    }


def split_batch(batch: Batch, microbatch_size: int | float, fixed_lengths: int | None = None) -> list[Batch]:
    """Flat microbatches of `microbatch_size` rows each, or of fewer, of a (B, T) batch.

    Each is of one kind: in a mixture, rows of clm come first, and there is one microbatch more than the rows need,
    possibly without rows, so that all ranks have as many. `fixed_lengths`: N is this fraction of the positions of
    `microbatch_size` rows, or a multiple of it, see `flatten`; 1 where rows are full.
    """
    if int(microbatch_size) != microbatch_size or microbatch_size < 1:
        raise ValueError(f"device_train_microbatch_size must be an integer >= 1, got {microbatch_size}")
    size, tensors = int(microbatch_size), {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    rows, longest = batch["input_ids"].shape
    parts: list[Any] = [slice(first, first + size) for first in range(0, rows, size)]
    if "causal" in batch:
        kinds = (kind.nonzero()[:, 0] for kind in (batch["causal"], ~batch["causal"]))
        of_kinds = [part for kind in kinds for part in kind.split(size) if len(part)]
        parts = of_kinds + [slice(0)] * (len(parts) + 1 - len(of_kinds))
        fixed_lengths = fixed_lengths and FEW_LENGTHS
    length = max(1, size * longest // fixed_lengths) if fixed_lengths else None
    return [flatten({**batch, **{key: value[part] for key, value in tensors.items()}}, length) for part in parts]


def count_samples(batch: Batch) -> int:
    """Rows of a batch or microbatch that hold a token; Composer counts them for the stream's position."""
    return batch["num_rows"]


def count_tokens(batch: Batch) -> dict[str, int | float]:
    """Real tokens (`total`) and the divisor of the loss (`loss_generating`) of a batch or microbatch."""
    # A float on every rank, for Composer all-reduces it and all must have one dtype; above 0, because
    # Composer divides by the sum and a batch without any target would give NaN. 1e-6 is lost in float32
    # beside any real count.
    return {"total": batch["num_tokens"], "loss_generating": max(float(batch["num_loss_tokens"]), 1e-6)}
