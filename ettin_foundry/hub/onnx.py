"""model.onnx: a model as a graph of padded batches, held to the model itself before it is kept."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ettin_foundry.model.attention import Documents
from ettin_foundry.model.transformer import Ettin, Stream

ONNX = "model.onnx"
TOLERANCE = 1e-3  # of logits: onnxruntime sums in another order


class _Batch(Documents):
    """The rows of a padded batch as a stream of B x T tokens. Places count from the row's start, padding included, for
    rotary embeddings and windows are relative."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        super().__init__(mask, mask.shape[1], torch.arange(mask.shape[1]).repeat(mask.shape[0]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int]) -> Tensor:
        place = torch.arange(self.max_seqlen)
        distance = place - place[:, None]  # from query to key
        seen = self.mask[:, None, None, :] | (distance == 0)  # padding too needs a key: itself
        for limit, near in zip(window_size, (distance >= -window_size[0], distance <= window_size[1])):
            seen = seen if limit < 0 else seen & near
        q, k, v = (x.unflatten(0, self.mask.shape).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(0, 1)


class Padded(nn.Module):
    """An `Ettin` over a batch padded on either side: input_ids and attention_mask, (B, T) int64, to (B, T, V) logits,
    of which those of padding mean nothing."""

    def __init__(self, model: Ettin) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        stream = Stream(_Batch(attention_mask), self.model.config.causal, dict.fromkeys((False, True), "padded"))
        return self.model.predict(self.model.trunk(input_ids.flatten(), stream)).unflatten(0, input_ids.shape)


def write_onnx(model: Ettin, folder: Path) -> float:
    """Writes model.onnx (input_ids, attention_mask -> logits), fp32; returns its largest difference from the model.

    Raises:
        ValueError: a package is missing, or a logit differs by more than `TOLERANCE`.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]:
        raise ValueError(f"--onnx needs {', '.join(missing)}; do pip install 'ettin-foundry[onnx]'")
    ids, names = torch.zeros(2, 4, dtype=torch.int64), ["input_ids", "attention_mask"]
    sizes = {0: torch.export.Dim("batch", max=2**20), 1: torch.export.Dim("length", max=2**20)}
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):  # it prints how many rules it applied
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(Padded(model.eval()), (ids, torch.ones_like(ids)), dynamo=True, verbose=False,
                                         input_names=names, output_names=["logits"],
                                         dynamic_shapes=dict.fromkeys(names, sizes))
    program.save(str(folder / ONNX))
    worst, _, _ = compare(model, lambda *batch: onnx_logits(folder, *batch), (7, 200, 33))
    if worst > TOLERANCE:
        raise ValueError(f"{ONNX}: logits must equal the model's within {TOLERANCE}, got {worst:.1e}; "
                         "leave out --onnx")
    return worst


def compare(model: Ettin, theirs: Callable[[Tensor, Tensor], Tensor],
            lengths: Sequence[int] = (16, 200)) -> tuple[float, float, float]:
    """The model's logits beside theirs, (B, T, V) of ids and mask, for the same documents padded on each side.

    Returns the largest difference, infinite where there is no number; the largest logit; the share of tokens for which
    both have the same most probable one.
    """
    worst, largest, same = 0.0, 1.0, 1.0
    for left in (False, True):
        ids, mask = padded_batch(model, lengths, left)
        a, b = own_logits(model, ids, mask), theirs(ids, mask)[mask].float()
        worst = max(worst, float((a - b).abs().nan_to_num(float("inf")).max()))
        largest = max(largest, float(a.abs().max()))
        same = min(same, float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    return worst, largest, same


def padded_batch(model: Ettin, lengths: Sequence[int], left: bool) -> tuple[Tensor, Tensor]:
    """(ids, which are no padding), (B, T) each, of drawn documents as long as the model allows."""
    sizes = torch.tensor(lengths).clamp(max=model.config.max_position_embeddings)[:, None]
    place, generator = torch.arange(int(sizes.max())), torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (len(sizes), len(place)), generator=generator)
    return ids, place >= len(place) - sizes if left else place < sizes


@torch.no_grad()
def own_logits(model: Ettin, ids: Tensor, mask: Tensor) -> Tensor:
    """(N, V) logits of what is no padding in a batch, from one flat stream of its documents."""
    lengths, places = mask.sum(1), mask.cumsum(1) - 1
    hidden: Any = model(ids[mask], places[mask], F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()))
    return model.predict(hidden)


def onnx_logits(folder: Path, ids: Tensor, mask: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()})
    return torch.from_numpy(logits)
