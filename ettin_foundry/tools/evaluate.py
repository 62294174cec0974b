"""Losses of a trained model on a dataset's validation split under any objective, whatever it was trained on.

The rows, masks and batches are those that the loader gives an evaluation in a run, so two models of one vocabulary are
compared on the same targets. A decoder evaluated under mlm sees both sides, an encoder under clm only the past: the
same weights with other windows. One process, one device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ettin_foundry.objectives.schedule import MASKED_OBJECTIVES, OBJECTIVES

_SEED = 21  # of the masks: the recipes' shuffle_seed
_BATCH_TOKENS = 16_384


def evaluate(source: str | Path, data: str | Path, objectives: Sequence[str] = OBJECTIVES, *,
             mask_rate: float = 0.15, max_batches: int | None = None, split: str = "validation",
             max_seq_len: int | None = None, device: str = "auto") -> dict[str, dict[str, float]]:
    """Evaluates a model under each objective.

    source: a Composer checkpoint (.pt file, sharded folder, save folder), or a Hugging Face folder.
    data: folder of a dataset tokenized with the model's tokenizer.
    mask_rate: of mlm and mntp, in (0, 1].
    max_batches: of 16,384 token positions (one row at least), from the split's begin; all of it if not given.
    max_seq_len: length of a row; the model's own if not given.
    device: auto, cpu or cuda; auto takes a GPU if there is one, and bf16 on it.

    Returns {objective: {loss: nats per target, accuracy: share of targets, perplexity, targets: how many}}, all finite.
    A ValueError or FileNotFoundError names an argument, data that does not fit the model, or damaged weights.
    """
    if unknown := [name for name in objectives if name not in OBJECTIVES] or not objectives:
        raise ValueError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {unknown or objectives!r}")
    splits = sorted(path.parent.name for path in Path(data).glob("*/manifest.json"))
    if split not in splits:
        raise FileNotFoundError(f"--split must be one of {data} ({', '.join(splits) or 'which holds none'}), got "
                                f"{split!r}; give --split, or make the dataset with ettin convert")
    import torch  # from here on; it takes seconds

    from ettin_foundry.data.batch import Collator
    from ettin_foundry.data.stream import open_stream
    from ettin_foundry.data.tokenizer import check
    from ettin_foundry.hub.load import load_model
    from ettin_foundry.objectives.targets import TextVocab

    loaded = load_model(source, default_objective="mlm")
    tokenizer = loaded.tokenizer(otherwise=Path(data) / "tokenizer")  # its own may lie on the machine of the run
    longest = loaded.config.max_position_embeddings
    length = longest if max_seq_len is None else max_seq_len
    if not 3 <= length <= longest:
        raise ValueError(f"--max-seq-len must be 3 to {longest}, the length the model was made for, got {length}")
    stream = open_stream(dataset={"local": str(data), "split": split}, max_seq_len=length, shuffle=False,
                         shuffle_seed=_SEED, global_batch_size=max(1, _BATCH_TOKENS // length))
    check(tokenizer, stream.data.tokenizer)
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    predictor, vocab, found = loaded.predictor(tokenizer, place), TextVocab.from_tokenizer(tokenizer), {}
    steps = range(stream.num_steps or 0)[:max_batches]  # one epoch, since the order is not shuffled
    for name in objectives:
        rate = mask_rate if name in MASKED_OBJECTIVES else 0.0
        collate = Collator(name, vocab, max_seq_len=length, seed=_SEED, mask_rate=rate)
        found[name] = values = _measure(predictor, (collate(stream.rows_of(step)) for step in steps), place)
        if not values["targets"]:
            raise ValueError(f"--data must hold targets of {name}, got {data}, whose {split} split has none")
        if not math.isfinite(values["loss"]):
            raise ValueError(f"{source} must give finite losses, got {values['loss']} under {name}: its weights are "
                             "damaged; evaluate an earlier checkpoint")
    return found


def _measure(predictor: Any, batches: Iterator[dict[str, Any]], device: Any) -> dict[str, float]:
    import torch

    from ettin_foundry.data.batch import flatten
    from ettin_foundry.model.transformer import batch_loss

    nll = correct = targets = 0
    with torch.no_grad(), predictor.autocast():
        for batch in batches:
            out = batch_loss(predictor.model, {key: value.to(device) if isinstance(value, torch.Tensor) else value
                                               for key, value in flatten(batch).items()})
            nll += float(out["nll"])
            correct += int(out["correct"])
            targets += out["num_targets"]
    loss = nll / max(1, targets)
    return {"loss": loss, "accuracy": correct / max(1, targets), "perplexity": math.exp(min(loss, 700.0)),
            "targets": targets}
