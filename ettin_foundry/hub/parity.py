"""Exports held to the model itself: model.onnx before it is kept, and a folder in the transformers installed here."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ettin_foundry.hub.load import load_model
from ettin_foundry.model.attention import Documents
from ettin_foundry.model.transformer import Ettin, Stream

ONNX = "model.onnx"
TOLERANCE = 1e-3  # of logits: onnxruntime sums in another order
# of the largest logit: sums in another order, over dozens of layers; roundings of 8 and of 11 bits, likewise
_FP32, _HALF = 1e-4, {"bf16": (torch.bfloat16, 0.05), "fp16": (torch.float16, 0.01)}


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
        stream = Stream(_Batch(attention_mask), self.model.config.windows, dict.fromkeys((False, True), "padded"))
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


class Check(NamedTuple):
    name: str
    note: str
    worst: float  # the largest difference, and what it may be
    limit: float

    @property
    def ok(self) -> bool:
        return self.worst <= self.limit  # not of NaN


class Parity:
    """An exported folder with its head, our model of it, and transformers' class."""

    def __init__(self, folder: str | Path) -> None:
        import transformers

        loaded = load_model(folder, default_objective="mlm")
        self.folder, self.causal = loaded.source, loaded.config.causal
        if self.causal and "modernbert-decoder" not in transformers.CONFIG_MAPPING:
            raise ValueError(f"{folder}: needs transformers 4.56 or later, got {transformers.__version__}; put a "
                             "folder with another version first in PYTHONPATH")
        self.auto = transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForMaskedLM
        self.model = Ettin(loaded.config, "reference").eval()
        self.model.load_state_dict(loaded.state)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()

    def theirs(self, folder: str | Path, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        hf = self.auto.from_pretrained(str(folder), **options).eval()
        return torch.no_grad()(lambda ids, mask: hf(input_ids=ids, attention_mask=mask.long()).logits)

    def run(self) -> Iterator[Check]:
        """Yields what each check finds, first of the two ways in which every transformers attends."""
        for attention in ("eager", "sdpa"):
            yield self._check(attention, self.theirs(self.folder, attn_implementation=attention), lengths=(200, 1500))
        for name, (dtype, share) in _HALF.items():
            yield self._check(name, self.theirs(self.folder, torch_dtype=dtype), share)
        hf = self.auto.from_pretrained(str(self.folder)).eval()
        with tempfile.TemporaryDirectory() as again:
            hf.save_pretrained(again)
            before, after = (json.loads(Path(place, "config.json").read_bytes()) for place in (self.folder, again))
            lost = ", ".join(sorted(before.keys() - after.keys())) or "nothing"
            yield self._check("saved again", self.theirs(again))._replace(note=f"config.json loses {lost}")
        if self.causal:
            yield from self._generate(hf)
        if (self.folder / ONNX).is_file():
            yield self._check(ONNX, lambda *batch: onnx_logits(self.folder, *batch))._replace(limit=TOLERANCE)

    def _check(self, name: str, theirs: Callable[[Tensor, Tensor], Tensor], share: float = _FP32,
               lengths: tuple[int, ...] = (16, 200)) -> Check:
        worst, largest, same = compare(self.model, theirs, lengths)
        return Check(name, f"the same first token at {same:.1%}; logits to {largest:.1f}", worst, share * largest)

    def _generate(self, hf: Any) -> Iterator[Check]:
        """The logits of each step beside ours of the text that came out."""
        ids, mask = padded_batch(self.model, (16, 40), True)
        steps = min(160, self.model.config.max_position_embeddings - 40)  # past the window
        whole = F.pad(mask, (0, steps), value=True)
        for name in ("cache", "no cache"):
            out = hf.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, use_cache=name == "cache",
                              min_new_tokens=steps, max_new_tokens=steps, output_logits=True,
                              return_dict_in_generate=True)
            ours = torch.zeros(*whole.shape, self.model.config.vocab_size)
            ours[whole] = own_logits(self.model, out.sequences, whole)
            worst = float((ours[:, -steps - 1:-1] - torch.stack(out.logits, dim=1)).abs().max())
            yield Check(f"generate, {name}", f"{steps} new tokens, left padded", worst, _FP32 * float(ours.abs().max()))
