"""An exported folder held to the transformers of this environment: logits, padding, dtypes, generation, ONNX."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ettin_foundry.hub.load import load_model
from ettin_foundry.hub.onnx import ONNX, TOLERANCE, compare, onnx_logits, own_logits, padded_batch
from ettin_foundry.model.transformer import Ettin

# of the largest logit: sums in another order, over dozens of layers; roundings of 8 and of 11 bits, likewise
_FP32, _HALF = 1e-4, {"bf16": (torch.bfloat16, 0.05), "fp16": (torch.float16, 0.01)}


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

    def logits(self) -> Iterator[Check]:
        for attention in ("eager", "sdpa"):
            yield self._check(attention, self.theirs(self.folder, attn_implementation=attention), lengths=(200, 1500))

    def run(self) -> Iterator[Check]:
        """Yields what each check finds."""
        yield from self.logits()
        for name, (dtype, share) in _HALF.items():
            yield self._check(name, self.theirs(self.folder, torch_dtype=dtype), share)
        hf, info = self.auto.from_pretrained(str(self.folder), output_loading_info=True)
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        yield Check("keys", f"missing or unexpected: {', '.join(wrong) or 'none'}", len(wrong), 0)
        with tempfile.TemporaryDirectory() as again:
            hf.save_pretrained(again)
            before, after = (json.loads(Path(place, "config.json").read_bytes()) for place in (self.folder, again))
            lost = ", ".join(sorted(before.keys() - after.keys())) or "nothing"
            yield self._check("saved again", self.theirs(again))._replace(note=f"config.json loses {lost}")
        if self.causal:
            yield from self._generate(hf.eval())
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
