"""mlm, clm and mntp: from one row of tokens to what the model reads and what it must predict.

Labels are aligned: labels[t] is what the hidden state at t must predict. Every draw comes from a generator seeded by
(seed, epoch, row), so that masks are the same on any worker, rank or resume. Masking is BERT's 80/10/10 (arXiv
1810.04805, 3.1); mntp predicts a masked token from the position before it (LLM2Vec, arXiv 2404.05961).
Shapes: T row length, P pieces (documents) in the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IGNORED = -100  # label of a position that is no target
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of chosen tokens: replaced by [MASK], by a random text token; the rest stays
_MASKS, _OBJECTIVES = 4, 5  # first word of the seed; order.py uses 1 to 3, so that no two uses share a stream

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextVocab:
    """The ids that objectives need to tell apart."""

    cls: int
    sep: int
    pad: int
    mask: int
    text: Ints  # (n,) ascending: every real entry of the vocabulary that is no special token; random ids are these
    is_special: npt.NDArray[np.bool_]  # (largest id + 1,): never chosen as a target of mlm or mntp

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TextVocab:
        """Reads the ids from a Hugging Face tokenizer, which must have the four special tokens."""
        named: dict[str, Any] = {name: getattr(tokenizer, f"{name}_token_id", None)
                                 for name in ("cls", "sep", "pad", "mask")}
        if missing := [f"{name}_token" for name, number in named.items() if number is None]:
            raise ValueError(f"tokenizer {getattr(tokenizer, 'name_or_path', tokenizer)!r} must have "
                             f"{', '.join(missing)}; use the one that the converter wrote beside the data")
        entries = np.unique(list(tokenizer.get_vocab().values()))
        special = np.unique([*tokenizer.all_special_ids, *named.values()])
        is_special = np.zeros(int(max(entries[-1], special[-1])) + 1, bool)
        is_special[special] = True
        return cls(**named, text=entries[~is_special[entries]], is_special=is_special)


def row_generator(seed: int, epoch: int, row: int, use: int = _MASKS) -> np.random.Generator:
    """Of the masks of a row, which is counted from the epoch's first."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((use, seed, epoch, row))))


def draw_objective(shares: Mapping[str, float], seed: int, epoch: int, row: int) -> str:
    """Which objective of a mixture ({objective: share}, summing to 1) a row has."""
    if len(shares) == 1:
        return next(iter(shares))
    ends = np.cumsum(list(shares.values()))
    at = np.searchsorted(ends, row_generator(seed, epoch, row, _OBJECTIVES).random(), side="right")
    return list(shares)[min(int(at), len(ends) - 1)]  # the last sum may be a hair below 1


class Inputs(NamedTuple):
    """One row as the model reads it, and what it must predict."""

    input_ids: Ints  # (T,)
    labels: Ints  # (T,), IGNORED where there is no target. A row with any text token has at least one target
    weight: float  # of each target of the row in the sum of losses
    loss_tokens: int  # what the row adds to the number that the sum is divided by


def make_inputs(objective: str, ids: Ints, sequence_id: Ints, ends_document: npt.NDArray[np.bool_], *,
                mask_rate: float, vocab: TextVocab, rng: np.random.Generator | None, mixed: bool = False) -> Inputs:
    """What the model reads and what it must predict, for one row.

    The loss of a batch is the mean over its targets. In a mixture that would give clm, which predicts every token,
    several times its share of the rows: there each target of mlm and mntp weighs 1 / mask_rate and a row counts by the
    tokens that could be targets, so that in expectation the loss is the objectives' means, weighted by their shares.

    ids: (T,) int64; each piece is BOS, chunk, EOS; padding at the end. Not changed.
    sequence_id: (T,) int64, number of the piece in the row, -1 on padding.
    ends_document: (P,) bool, False when the piece's chunk is continued in another chunk of its document.
    mask_rate: share of text tokens chosen by mlm and mntp. rng: what they draw from; None for clm.
    mixed: rows of the batch have different objectives.
    """
    labels = np.full_like(ids, IGNORED)
    if objective == "clm":
        inside = (sequence_id[1:] == sequence_id[:-1]) & (sequence_id[1:] >= 0)
        labels[:-1][inside] = ids[1:][inside]
        # where a document goes on in another chunk, the piece's EOS is no target
        ends = np.cumsum(np.bincount(sequence_id[sequence_id >= 0], minlength=len(ends_document))) - 1
        labels[ends[~np.asarray(ends_document, bool)] - 1] = IGNORED
        return Inputs(ids, labels, 1.0, int((labels != IGNORED).sum()))
    assert rng is not None
    maskable = ~vocab.is_special[ids] & (sequence_id >= 0)
    chosen = np.flatnonzero(maskable & (rng.random(maskable.size) < mask_rate))
    if not chosen.size and maskable.any():  # a row without a target would be read for nothing: one, drawn uniformly
        candidates = np.flatnonzero(maskable)
        chosen = candidates[[int(rng.random() * candidates.size)]]
    # a text token follows BOS at the earliest, so position t - 1 exists and lies in the same piece
    labels[chosen - 1 if objective == "mntp" else chosen] = ids[chosen]
    weight, loss_tokens = (1.0 / mask_rate, int(maskable.sum())) if mixed else (1.0, chosen.size)
    return Inputs(_corrupt(ids, chosen, vocab, rng), labels, weight, loss_tokens)


def _corrupt(ids: Ints, chosen: Ints, vocab: TextVocab, rng: np.random.Generator) -> Ints:
    """A copy of ids in which the chosen positions are [MASK], a random text token, or as before."""
    draw, pick = rng.random((2, chosen.size))
    replaced = ids[chosen]
    replaced[draw < MASK_SHARE] = vocab.mask
    random = (draw >= MASK_SHARE) & (draw < MASK_SHARE + RANDOM_SHARE)
    replaced[random] = vocab.text[(pick[random] * vocab.text.size).astype(np.int64)]
    corrupted = ids.copy()
    corrupted[chosen] = replaced
    return corrupted
