"""mlm, clm and mntp: from one row of tokens to what the model reads and what it must predict.

Labels are aligned: labels[t] is what the hidden state at t must predict, so the model never shifts. T is the row length,
P the number of pieces (documents) in the row. Every draw comes from the generator passed in, seeded by (seed, epoch,
row), so that masks are the same on any worker, rank or resume. Numpy only. Rows and batches are made in `batches.py`.

The masking scheme is BERT's 80/10/10 (arXiv 1810.04805, 3.1), at Ettin's rates; mntp predicts a masked token from the
position before it (LLM2Vec, arXiv 2404.05961, and Ettin's encoder-from-decoder runs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ettin_foundry.config import OBJECTIVES

__all__ = ["IGNORED", "TextVocab", "check_objective", "make_inputs", "row_generator"]

IGNORED = -100
"""Label of a position that is no target."""

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the chosen tokens: replaced by [MASK], by a random text token; the rest stays as it is."""

_MASKS = 4  # first word of the seed; order.py uses 1 to 3, so that no two uses share a stream

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextVocab:
    """The ids that objectives need to tell apart.

    Attributes:
        cls, sep, pad, mask: ids of BOS, EOS, padding and [MASK].
        text: (n,) int64, ascending: every real entry of the vocabulary that is no special token; random ids are these.
        is_special: (largest id + 1,) bool: never chosen as a target of mlm or mntp.
    """

    cls: int
    sep: int
    pad: int
    mask: int
    text: Ints
    is_special: npt.NDArray[np.bool_]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TextVocab:
        """Reads the ids from a Hugging Face tokenizer.

        Raises:
            ValueError: the tokenizer lacks one of the four special tokens, or has no text token.
        """
        named: dict[str, Any] = {name: getattr(tokenizer, f"{name}_token_id", None)
                                 for name in ("cls", "sep", "pad", "mask")}
        missing = [f"{name}_token" for name, number in named.items() if number is None]
        if missing:
            raise ValueError(
                f"tokenizer: {getattr(tokenizer, 'name_or_path', tokenizer)!r} has no {', '.join(missing)}; all of "
                "cls_token, sep_token, pad_token, mask_token are needed. Use the tokenizer folder that the converter "
                "wrote beside the data")
        entries = np.unique(np.fromiter(tokenizer.get_vocab().values(), np.int64))
        special = np.union1d(np.array(tokenizer.all_special_ids, np.int64), np.array(list(named.values()), np.int64))
        is_special = np.zeros(int(max(entries[-1], special[-1])) + 1, bool)
        is_special[special] = True
        text = entries[~is_special[entries]]
        if not text.size:
            raise ValueError("tokenizer: its vocabulary holds special tokens only; text tokens are needed. Use the "
                             "tokenizer folder that the converter wrote beside the data")
        return cls(**{name: int(number) for name, number in named.items()}, text=text, is_special=is_special)


def check_objective(objective: str, mask_rate: float) -> None:
    """Refuses an unknown objective and a mask rate that the objective cannot use.

    Raises:
        ValueError: naming the key, what was given and what is allowed.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} given; it must be one of {', '.join(OBJECTIVES)}. Correct the key")
    if isinstance(mask_rate, bool) or not isinstance(mask_rate, (int, float)):
        raise ValueError(f"mask_rate: {mask_rate!r} given; a number is needed. Correct the key")
    if objective == "clm" and mask_rate != 0:
        raise ValueError(f"mask_rate: {mask_rate} given with objective: clm, which masks nothing; it must be 0 or "
                         "absent. Remove mask_rate, or set objective to mlm or mntp")
    if objective != "clm" and not 0 < mask_rate <= 1:
        raise ValueError(f"mask_rate: {mask_rate} given with objective: {objective}; it must be above 0 and at most 1, "
                         "the share of tokens to predict. Set mask_rate (the recipes use 0.3, in the decay phase 0.15)")


def row_generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    """The generator of a row's draws.

    Args:
        seed: the loader's shuffle_seed.
        epoch: epoch of the row.
        row: number of the row in its epoch.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((_MASKS, seed, epoch, row))))


def make_inputs(objective: str, ids: Ints, sequence_id: Ints, ends_document: npt.NDArray[np.bool_], *,
                mask_rate: float, vocab: TextVocab, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """What the model reads and what it must predict, for one row.

    Args:
        objective: mlm, clm or mntp.
        ids: (T,) int64; each piece is BOS, chunk, EOS; padding at the end. Not changed.
        sequence_id: (T,) int64, number of the piece in the row, -1 on padding.
        ends_document: (P,) bool, False when the piece's chunk is continued in another chunk of its document.
        mask_rate: share of text tokens chosen; 0 for clm.
        vocab: ids of special and text tokens.
        rng: source of every draw; unused for clm.

    Returns:
        input_ids and labels, (T,) int64 each; labels are IGNORED where there is no target. A row with any text token
        has at least one target.

    Raises:
        ValueError: unknown objective, or a mask rate that it cannot use.
    """
    check_objective(objective, mask_rate)
    if objective == "clm":
        return ids, _next_tokens(ids, sequence_id, ends_document)
    chosen = _choose(~vocab.is_special[ids] & (sequence_id >= 0), mask_rate, rng)
    input_ids = _corrupt(ids, chosen, vocab, rng)
    labels = np.full_like(ids, IGNORED)
    # a text token follows BOS at the earliest, so position t - 1 exists and lies in the same piece
    labels[chosen - 1 if objective == "mntp" else chosen] = ids[chosen]
    return input_ids, labels


def _next_tokens(ids: Ints, sequence_id: Ints, ends_document: npt.NDArray[np.bool_]) -> Ints:
    """Labels of clm: the next token of the same piece, but no EOS where a document goes on in another chunk."""
    labels = np.full_like(ids, IGNORED)
    inside = (sequence_id[1:] == sequence_id[:-1]) & (sequence_id[1:] >= 0)
    labels[:-1][inside] = ids[1:][inside]
    last = np.cumsum(np.bincount(sequence_id[sequence_id >= 0], minlength=len(ends_document))) - 1  # place of each EOS
    labels[last[~np.asarray(ends_document, bool)] - 1] = IGNORED
    return labels


def _choose(maskable: npt.NDArray[np.bool_], rate: float, rng: np.random.Generator) -> Ints:
    """Positions to predict: each maskable one with probability `rate`; one of them when none was drawn."""
    chosen = np.flatnonzero(maskable & (rng.random(maskable.size) < rate))
    if chosen.size:
        return chosen
    candidates = np.flatnonzero(maskable)
    # a row without a target would be read for nothing; one more draw, so that the choice is uniform
    return candidates[[int(rng.random() * candidates.size)]] if candidates.size else candidates


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
