"""The shape of an Ettin model: one dataclass, one row of `SIZES` per published size, exact parameter and FLOP counts.

Field names are those of transformers' ModernBertConfig and ModernBertDecoderConfig. Sizes are Table 1 of the Ettin paper
(arXiv 2507.11412); constants are the reference's 48 training files (JHU-CLSP/ettin-encoder-vs-decoder,
pretraining/configs). Nothing here imports torch: counts are known before a model is built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["MASKED_OBJECTIVES", "OBJECTIVES", "SIZES", "EttinConfig", "Size", "objective_names"]

OBJECTIVES = ("mlm", "clm", "mntp")
"""`clm` trains a decoder (causal attention); the others train an encoder (bidirectional attention)."""

MASKED_OBJECTIVES = ("mlm", "mntp")
"""Those that choose tokens at a given mask rate."""


def objective_names(value: Any, key: str = "model.objective") -> tuple[tuple[str, ...], str]:
    """Reads which objectives an objective or schedule (objectives/schedule.py) names, not when each holds.

    Returns:
        (every objective in order of first occurrence, the one that the model ends as: of a mixture, the first named).

    Raises:
        ValueError: no objective, or an unknown one.
    """
    def mixtures(part: Any) -> list[list[Any]]:
        if isinstance(part, Mapping):
            inner = part.get("cycle", part.get("objective"))
            return [list(part)] if inner is None else mixtures(inner)
        is_list = isinstance(part, Sequence) and not isinstance(part, str)
        return [names for each in part for names in mixtures(each)] if is_list else [[part]]

    found = mixtures(value)
    names = tuple(dict.fromkeys(name for mixture in found for name in mixture))
    if not names or not set(names) <= set(OBJECTIVES):
        raise ValueError(f"{key} must be one of {', '.join(OBJECTIVES)}, shares of them, or a list of segments, got "
                         f"{value!r}")
    return names, found[-1][0]


@dataclass(frozen=True)
class Size:
    """One row of the size table: layers, hidden width, GLU width (half of the input projection's rows), heads."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int


# Paper Table 1; `nano` is ours, for tests and the demo: the same layer pattern at a size that two CPU cores can train.
SIZES: dict[str, Size] = {
    "nano": Size(4, 128, 192, 2),
    "17m": Size(7, 256, 384, 4),
    "32m": Size(10, 384, 576, 6),
    "68m": Size(19, 512, 768, 8),
    "150m": Size(22, 768, 1152, 12),
    "400m": Size(28, 1024, 2624, 16),
    "1b": Size(28, 1792, 3840, 28),
}


@dataclass(frozen=True, kw_only=True)
class EttinConfig:
    """Everything that determines the function a model computes.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other; the message names the field.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    causal: bool
    """True for decoders. The only field in which the two members of a pair differ besides `window_left`."""
    max_position_embeddings: int = 1024
    """Longest document in tokens, BOS and EOS included; limits samples, and is written to exports."""
    vocab_size: int = 50368
    global_attn_every_n_layers: int = 3
    """Layer i attends globally when i is a multiple of this, and in the local window otherwise."""
    local_attention: int = 128
    """Width of the local window. Encoders see local_attention // 2 tokens on each side of a token."""
    window_left: int = -1
    """Tokens to the left that a local layer sees, itself not counted. -1 takes the value transformers computes from
    `local_attention`: half of it for encoders, half minus one for decoders (63: its mask keeps 64 keys with the token
    itself). The reference trained decoders with 64."""
    global_rope_theta: float = 10_000.0
    local_rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    attn_out_dropout: float = 0.1
    """Dropout after the attention output projection, in training only; the model's only dropout."""
    initializer_range: float = 0.02
    initializer_cutoff_factor: float = 2.0

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
                     "max_position_embeddings", "global_attn_every_n_layers", "local_attention"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise _bad(name, "an integer >= 1", value)
        if self.hidden_size != 64 * self.num_attention_heads:
            raise _bad("hidden_size", f"{64 * self.num_attention_heads}, 64 for each of num_attention_heads="
                                      f"{self.num_attention_heads}", self.hidden_size)
        if self.local_attention % 2:
            raise _bad("local_attention", "even, half of it on each side", self.local_attention)
        if not 0.0 <= self.attn_out_dropout < 1.0:
            raise _bad("attn_out_dropout", "in [0, 1)", self.attn_out_dropout)
        for name in ("global_rope_theta", "local_rope_theta", "norm_eps", "initializer_range",
                     "initializer_cutoff_factor"):
            if not getattr(self, name) > 0:
                raise _bad(name, "above 0", getattr(self, name))
        side = self.local_attention // 2
        if self.window_left == -1:
            object.__setattr__(self, "window_left", side - 1 if self.causal else side)
        if self.window_left < 0:
            raise _bad("window_left", "at least 0, or -1 for the value that follows from local_attention", self.window_left)
        if not self.causal and self.window_left != side:
            raise _bad("window_left", f"{side} for an encoder with local_attention={self.local_attention}, whose window is "
                                      "symmetric", f"{self.window_left}; set local_attention instead")

    @classmethod
    def for_size(cls, size: str, *, causal: bool, **overrides: Any) -> EttinConfig:
        """The config of a published size, with single fields overridden by name.

        Raises:
            ValueError: an unknown size or field; the message lists the valid ones.
        """
        if size not in SIZES:
            raise _bad("size", f"one of {', '.join(SIZES)}", repr(size))
        fields = [f.name for f in dataclasses.fields(cls) if f.name != "causal"]
        if unknown := sorted(set(overrides) - set(fields)):
            raise ValueError(f"model: unknown key(s) {', '.join(unknown)}; valid keys are {', '.join(fields)}")
        return cls(**{**dataclasses.asdict(SIZES[size]), **overrides, "causal": causal})

    @property
    def size(self) -> str | None:
        """The name of this shape in `SIZES`, or None for another shape."""
        row = Size(self.num_hidden_layers, self.hidden_size, self.intermediate_size, self.num_attention_heads)
        return next((name for name, size in SIZES.items() if size == row), None)

    def with_causal(self, causal: bool, window_left: int = -1) -> EttinConfig:
        """This shape as a decoder or an encoder, with the usual window of that kind unless another is given."""
        return self if causal == self.causal else dataclasses.replace(self, causal=causal, window_left=window_left)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def local_window(self) -> tuple[int, int]:
        """(left, right) of local layers in flash-attn's sense: both ends included."""
        return (self.window_left, 0 if self.causal else self.local_attention // 2)

    def is_global(self, layer: int) -> bool:
        return layer % self.global_attn_every_n_layers == 0

    @property
    def layer_types(self) -> list[str]:
        """transformers' names of the layer kinds, first layer first."""
        return ["full_attention" if self.is_global(i) else "sliding_attention" for i in range(self.num_hidden_layers)]

    @property
    def num_layer_parameters(self) -> int:
        """Weights of all transformer layers; layer 0 has no attention norm (its input is the embedding norm's output)."""
        c, i, n = self.hidden_size, self.intermediate_size, self.num_hidden_layers
        return n * (4 * c * c + 3 * c * i + 2 * c) - c

    @property
    def num_parameters(self) -> int:
        """All parameters, the matrix shared by embedding and output counted once."""
        c, v = self.hidden_size, self.vocab_size
        return v * c + c + self.num_layer_parameters + c + (c * c + c) + v

    def attended_pairs(self, length: int) -> int:
        """(query, key) pairs that one document of `length` tokens needs, summed over layers."""
        left, right = self.local_window

        def pairs(window: int) -> int:  # pairs at distance 1..window to one side
            w = min(window, length - 1)
            return w * length - w * (w + 1) // 2

        full = length + pairs(length) * (1 if self.causal else 2)
        local = length + pairs(left) + pairs(right)
        num_global = sum(self.is_global(i) for i in range(self.num_hidden_layers))
        return num_global * full + (self.num_hidden_layers - num_global) * local

    def flops(self, num_tokens: int, num_targets: int, attended_pairs: int) -> int:
        """Floating-point operations of one training step (forward and backward), counting useful work only.

        Two per multiply-add, three passes (forward, gradients of inputs and of weights): 6 per weight and token for the
        layers, 6 per weight and target for head and vocabulary, 12 * hidden_size per attended pair (scores and
        values; the paper's appendix and LLM-Foundry count full squares for attention instead).
        """
        c = self.hidden_size
        matrices = self.num_hidden_layers * (4 * c * c + 3 * c * self.intermediate_size)
        head = c * c + c * self.vocab_size
        return 6 * matrices * num_tokens + 6 * head * num_targets + 12 * c * attended_pairs


def _bad(name: str, needed: str, value: Any) -> ValueError:
    return ValueError(f"model.{name} must be {needed}, got {value}")
