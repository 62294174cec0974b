"""The shape of an Ettin model: one dataclass, the published sizes (sizes.yaml), exact parameter and FLOP counts.

Field names are transformers' (ModernBertConfig, ModernBertDecoderConfig); constants are the reference's training files
(JHU-CLSP/ettin-encoder-vs-decoder). No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SIZES: dict[str, dict[str, int]] = yaml.safe_load(Path(__file__).with_name("sizes.yaml").read_text(encoding="utf-8"))
_MAX_LAYERS = 1024  # each is listed: a number that a file only states must not take hours


def did_you_mean(given: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean X?` with the known word nearest to a given one; nothing if none is near."""
    near = difflib.get_close_matches(str(given), [*known], 1, cutoff)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass(frozen=True, kw_only=True)
class EttinConfig:
    """Everything that determines the function a model computes; ValueErrors name the field."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int  # the GLU width, half of the input projection's rows
    num_attention_heads: int
    causal: bool
    max_position_embeddings: int = 1024  # longest document in tokens, BOS and EOS included
    vocab_size: int = 50368
    global_attn_every_n_layers: int = 3  # layer i attends globally if i is a multiple of this
    local_attention: int = 128  # encoders see local_attention // 2 tokens on each side of a token in local layers
    window_left: int = -1
    """Tokens to the left that a local layer sees, itself not counted. -1 takes what transformers computes from
    `local_attention`: half of it for encoders, half minus one for decoders (63). The reference's decoders had 64."""
    global_rope_theta: float = 10_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    attn_out_dropout: float = 0.1  # after the attention output projection; the model's only dropout
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0

    def __post_init__(self) -> None:
        side = self.local_attention // 2 if isinstance(self.local_attention, int) else 0
        if self.window_left == -1:
            object.__setattr__(self, "window_left", side - 1 if self.causal else side)
        whole = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
                 "max_position_embeddings", "global_attn_every_n_layers", "local_attention")
        rules = [
            *((name, type(value := getattr(self, name)) is int and value >= 1, "an integer >= 1") for name in whole),
            ("num_hidden_layers", self.num_hidden_layers in range(_MAX_LAYERS + 1), f"at most {_MAX_LAYERS}"),
            *((name, isinstance(value := getattr(self, name), (int, float)) and value > 0, "above 0") for name in (
                "global_rope_theta", "local_rope_theta", "norm_eps", "initializer_range", "initializer_cutoff_factor")),
            ("hidden_size", self.hidden_size == 64 * self.num_attention_heads, "64 for each of num_attention_heads"),
            ("local_attention", self.local_attention == 2 * side, "even, half of it on each side"),
            ("attn_out_dropout", isinstance(p := self.attn_out_dropout, (int, float)) and 0 <= p < 1, "in [0, 1)"),
            ("window_left", type(left := self.window_left) is int and left >= 0 and (self.causal or left == side),
             "at least 0" if self.causal else f"{side} (half of local_attention) for an encoder"),
        ]
        for name, holds, needed in rules:
            if not holds:
                raise ValueError(f"model.{name} must be {needed}, got {getattr(self, name)!r}")

    @classmethod
    def for_size(cls, size: str, *, causal: bool, **overrides: Any) -> EttinConfig:
        """The config of a published size, with single fields overridden by name."""
        if size not in list(SIZES):  # which a block may be compared with
            raise ValueError(f"model.size must be one of {', '.join(SIZES)}, got {size!r}{did_you_mean(size, SIZES)}")
        fields = [f.name for f in dataclasses.fields(cls) if f.name != "causal"]
        if unknown := sorted(set(overrides) - set(fields)):
            raise ValueError(f"model: unknown key(s) {', '.join(unknown)}; valid keys are {', '.join(fields)}")
        return cls(**{**SIZES[size], **overrides, "causal": causal})

    @property
    def size(self) -> str | None:
        """The name of this shape in `SIZES`, or None for another shape."""
        return next((name for name, row in SIZES.items() if row.items() <= vars(self).items()), None)

    def with_causal(self, causal: bool, window_left: int = -1) -> EttinConfig:
        """This shape as a decoder or encoder, with the usual window of that kind unless another is given."""
        return self if causal == self.causal else dataclasses.replace(self, causal=causal, window_left=window_left)

    @property
    def windows(self) -> dict[bool, tuple[int, int]]:
        """{is the layer global: (left, right)}, both ends included, -1 for no limit."""
        return {True: (-1, 0), False: (self.window_left, 0)} if self.causal else \
            {True: (-1, -1), False: (self.window_left, self.local_attention // 2)}

    def is_global(self, layer: int) -> bool:
        return layer % self.global_attn_every_n_layers == 0

    @property
    def layer_types(self) -> list[str]:  # transformers' names
        return ["full_attention" if self.is_global(i) else "sliding_attention" for i in range(self.num_hidden_layers)]

    @property
    def num_parameters(self) -> int:
        """All parameters, the matrix shared by embedding and output counted once; layer 0 has no attention norm."""
        c, i, v = self.hidden_size, self.intermediate_size, self.vocab_size
        return v * c + c + self.num_hidden_layers * (4 * c * c + 3 * c * i + 2 * c) + (c * c + c) + v

    def attended_pairs(self, length: Any) -> Any:
        """(query, key) pairs that one document of `length` tokens needs, summed over layers; of an int, or an array."""
        def pairs(window: Any) -> Any:  # at distance 1..window to one side
            w = window - (window - length + 1) * (window > length - 1)  # the lesser of window and length - 1
            return w * length - w * (w + 1) // 2

        full = length + pairs(length) * (1 if self.causal else 2)
        local = length + sum(map(pairs, self.windows[False]))
        num_global = sum(map(self.is_global, range(self.num_hidden_layers)))
        return num_global * full + (self.num_hidden_layers - num_global) * local

    def flops(self, num_tokens: int, num_targets: int, attended_pairs: int) -> int:
        """Useful floating-point operations of a training step: two per multiply-add, three passes; head and vocabulary
        at targets only."""
        c = self.hidden_size
        matrices = self.num_hidden_layers * (4 * c * c + 3 * c * self.intermediate_size)
        return 6 * matrices * num_tokens + 6 * (c * c + c * self.vocab_size) * num_targets + 12 * c * attended_pairs
