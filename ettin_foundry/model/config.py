"""The shape of an Ettin model: one dataclass, one row of `SIZES` per published size, exact parameter and FLOP counts.

Field names are those of transformers' ModernBertConfig and ModernBertDecoderConfig, so that export needs no translation
table. Sizes are Table 1 of the Ettin paper (arXiv 2507.11412); constants are the reference's 48 training files
(JHU-CLSP/ettin-encoder-vs-decoder, pretraining/configs). Nothing here imports torch: counts are known before building.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["CONTRASTIVE", "MASKED_OBJECTIVES", "OBJECTIVES", "SIZES", "EttinConfig", "Size"]

OBJECTIVES = ("mlm", "clm", "mntp", "mdlm")
"""`clm` trains a decoder (causal attention); the others train an encoder (bidirectional attention)."""

MASKED_OBJECTIVES = ("mlm", "mntp")
"""Those that choose tokens at a given mask rate. `mdlm` draws a rate for each row, `clm` masks nothing."""

CONTRASTIVE = "simcse"
"""What the loader is told for whole texts without targets (contrastive.py); no objective of language modelling."""


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
                raise ValueError(f"model.{name}: {value!r} given; a whole number of at least 1 is needed")
        if self.hidden_size != 64 * self.num_attention_heads:
            raise ValueError(f"model.hidden_size: {self.hidden_size} given with num_attention_heads="
                             f"{self.num_attention_heads}; every Ettin head has 64 dimensions, so hidden_size must be "
                             f"{64 * self.num_attention_heads}")
        if self.local_attention % 2:
            raise ValueError(f"model.local_attention: {self.local_attention} given; it must be even, half a side")
        if not 0.0 <= self.attn_out_dropout < 1.0:
            raise ValueError(f"model.attn_out_dropout: {self.attn_out_dropout} given; it must be in [0, 1)")
        for name in ("global_rope_theta", "local_rope_theta", "norm_eps", "initializer_range",
                     "initializer_cutoff_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model.{name}: {getattr(self, name)!r} given; it must be above 0")
        side = self.local_attention // 2
        if self.window_left == -1:
            object.__setattr__(self, "window_left", side - 1 if self.causal else side)
        if self.window_left < 0:
            raise ValueError(f"model.window_left: {self.window_left} given; it must be at least 0 (or -1 for the "
                             "value that follows from local_attention)")
        if not self.causal and self.window_left != side:
            raise ValueError(f"model.window_left: {self.window_left} given for an encoder with local_attention="
                             f"{self.local_attention}; an encoder's window is symmetric, so only {side} is possible. "
                             "Set local_attention instead")

    @classmethod
    def for_size(cls, size: str, *, causal: bool, **overrides: Any) -> EttinConfig:
        """The config of a published size, with single fields overridden by name.

        Raises:
            ValueError: an unknown size or field; the message lists the valid ones.
        """
        if size not in SIZES:
            raise ValueError(f"model.size: {size!r} is unknown; choose one of {', '.join(SIZES)}")
        fields = [f.name for f in dataclasses.fields(cls) if f.name != "causal"]
        unknown = sorted(set(overrides) - set(fields))
        if unknown:
            raise ValueError(f"model: unknown key(s) {', '.join(unknown)}; valid keys are {', '.join(fields)}")
        return cls(**{**dataclasses.asdict(SIZES[size]), **overrides, "causal": causal})

    @property
    def size(self) -> str | None:
        """The name of this shape in `SIZES`, or None for another shape."""
        row = Size(self.num_hidden_layers, self.hidden_size, self.intermediate_size, self.num_attention_heads)
        return next((name for name, size in SIZES.items() if size == row), None)

    def of_kind(self, causal: bool) -> EttinConfig:
        """This shape as a decoder or an encoder, the window to the left being that kind's usual one."""
        return self if causal == self.causal else dataclasses.replace(self, causal=causal, window_left=-1)

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
