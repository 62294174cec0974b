"""The Ettin transformer in plain torch: one stream of tokens in, hidden states or a loss out.

Encoder and decoder have the same modules and parameters; causal or not changes only the windows given to attention, so
one model runs streams of either kind, or of both. The order of operations is the reference's (bert24
src/bert_layers/{model,layers}.py). Shapes: N tokens of the stream, D documents, n targets, C hidden, H heads, K head
dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ettin_foundry.model import kernels
from ettin_foundry.model.attention import Documents, attention, block_mask, local_mask
from ettin_foundry.model.backends import choose
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.loss import linear_cross_entropy


class TargetLoss(NamedTuple):
    """Sums over the targets of one stream; divide by their number for means."""

    nll: Tensor  # scalar fp32, in nats; weighted where the targets have weights
    correct: Tensor | None  # scalar int64: targets whose label is the most probable entry; under no_grad only


class Stream:
    """What every block needs besides hidden states; windows and backends of attention by whether a layer is global."""

    def __init__(self, documents: Documents, windows: dict[bool, tuple[int, int]], backends: dict[bool, str]) -> None:
        self.documents, self.windows, self.backends = documents, windows, backends
        # theta -> (cos, sin) of every token, fp32. Not an argument of the blocks, because FSDP2's mixed precision casts
        # every tensor among a block's arguments to bf16, and bf16 loses the angle at 8k
        self.angles: dict[float, tuple[Tensor, Tensor]] = {}


def _drawn(module: Any, config: EttinConfig, std: float) -> Any:
    """Marks how `init_parameters` draws this weight, also when FSDP materialises it from `meta`."""
    module.init_std, module.init_cut = std, config.initializer_cutoff_factor * std
    return module


def _linear(config: EttinConfig, size_in: int, size_out: int, *, is_output: bool = False) -> nn.Linear:
    """Without bias; `is_output`: it writes to the residual stream and is drawn smaller, by the depth."""
    std = config.initializer_range / ((2 * config.num_hidden_layers) ** 0.5 if is_output else 1)
    return _drawn(nn.Linear(size_in, size_out, bias=False), config, std)


def _norm(config: EttinConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)


def rotary(position_ids: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (N, 1, K) fp32, of position times theta ** (-2i / K) for pair i, as `_rotate` takes them."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    # an inverse frequency times the position, rounded as transformers does: at 1,500 tokens a division shows in logits
    angle = position_ids.to(torch.float32)[:, None, None] * (1.0 / theta**exponent)
    sin = angle.sin()
    return angle.cos().repeat(1, 1, 2), torch.cat((-sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (N, heads, K): pair i is (x[i], x[i + K / 2]). In fp32, then back: bf16 loses the angle at 8k."""
    x32 = x.float()  # rolled, not split and put together again: compiled, that would compute both halves for each entry
    return (x32 * cos + x32.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class Embeddings(nn.Module):
    def __init__(self, config: EttinConfig) -> None:
        super().__init__()
        matrix = nn.Embedding(config.vocab_size, config.hidden_size)
        self.tok_embeddings = _drawn(matrix, config, config.initializer_range)
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(input_ids))  # (N, C)


class Attention(nn.Module):
    """Attention, causal or bidirectional as the stream says."""

    def __init__(self, config: EttinConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.is_global = config.is_global(layer)
        self.theta = config.global_rope_theta if self.is_global else config.local_rope_theta
        self.Wqkv = _linear(config, config.hidden_size, 3 * config.hidden_size)
        self.Wo = _linear(config, config.hidden_size, config.hidden_size, is_output=True)
        self.dropout = config.attn_out_dropout

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        qkv = self.Wqkv(x).view(-1, 3 * self.num_heads, self.head_dim)
        qk, v = qkv.split((2 * self.num_heads, self.num_heads), dim=1)
        q, k = _rotate(qk, *stream.angles[self.theta]).chunk(2, dim=1)          # (N, H, K) each
        out = attention(q, k, v, stream.documents, stream.windows[self.is_global], stream.backends[self.is_global])
        return F.dropout(self.Wo(out.reshape(-1, self.num_heads * self.head_dim)), self.dropout, self.training)


class GLU(nn.Module):
    def __init__(self, config: EttinConfig) -> None:
        super().__init__()
        self.Wi = _linear(config, config.hidden_size, 2 * config.intermediate_size)
        self.Wo = _linear(config, config.intermediate_size, config.hidden_size, is_output=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.Wo(kernels.gelu_gate(self.Wi(x)))


class Block(nn.Module):
    """One pre-norm layer. The first has no attention norm: its input is the embedding norm's output already."""

    def __init__(self, config: EttinConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = _norm(config) if layer else nn.Identity()
        self.attn = Attention(config, layer)
        self.mlp_norm = _norm(config)
        self.mlp = GLU(config)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = x + self.attn(self.attn_norm(x), stream)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    def __init__(self, config: EttinConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers: Any = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = _norm(config)

    def forward(self, input_ids: Tensor, stream: Stream) -> Tensor:
        for theta in sorted({self.config.global_rope_theta, self.config.local_rope_theta}):
            stream.angles[theta] = rotary(stream.documents.position_ids, theta, self.layers[0].attn.head_dim)
        x = self.embeddings(input_ids)
        for block in self.layers:
            x = block(x, stream)
        return self.final_norm(x)


class Head(nn.Module):
    def __init__(self, config: EttinConfig) -> None:
        super().__init__()
        self.dense = _linear(config, config.hidden_size, config.hidden_size)
        self.norm = _norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class Ettin(nn.Module):
    """An Ettin encoder or decoder with its prediction head, the embedding matrix as its output.

    config: the shape. On `torch.device("meta")` nothing is drawn; call `init_parameters` on materialised modules.
    attn_impl: `auto`, `flash`, `flex` or `reference`.
    other: the same shape with the other attention, for streams of that kind; `config.with_causal` unless given.
    """

    def __init__(self, config: EttinConfig, attn_impl: str = "auto", other: EttinConfig | None = None) -> None:
        super().__init__()
        self.config, self.attn_impl = config, attn_impl
        self.configs = {config.causal: config, not config.causal: other or config.with_causal(not config.causal)}
        self.trunk = Trunk(config)
        self.head = Head(config)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.compiled = False
        self.apply(init_parameters)

    def forward(self, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int,
                target_positions: Tensor | None = None, target_labels: Tensor | None = None, *,
                causal: bool | None = None, target_weights: Tensor | None = None) -> Tensor | TargetLoss:
        """(N, C) hidden states, or with targets a `TargetLoss`, made in here because FSDP unshards weights inside only.

        input_ids: (N,) int64. position_ids: (N,) int64, restarting at 0 in each document.
        cu_seqlens, max_seqlen: as of `Documents`. target_weights: (n,) fp32, in the sum; 1 unless given.
        target_positions: (n,) int64 places in the stream. target_labels: (n,) int64 what they must predict.
        causal: whether tokens see the past only; as the config says if None.
        """
        device = input_ids.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.output_bias.dtype
        if device == "cuda":
            kernels.load()  # not by a block, which may be compiled
        if self.compiled:  # the number of documents is no length of the code
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        config, deterministic = self.config, torch.are_deterministic_algorithms_enabled()
        config = config if causal is None else self.configs[causal]
        backends = choose(self.attn_impl, device, dtype, config, self.compiled, deterministic)
        stream = Stream(Documents(cu_seqlens, max_seqlen, position_ids), config.windows, backends)
        if len(input_ids):  # masks are made here, for the block that made them would be compiled otherwise
            if backends[False] == "reference":
                stream.documents.cached(local_mask, config.windows[False], dtype)
            for is_global, name in backends.items():
                if name == "flex_attention":
                    stream.documents.cached(block_mask, config.windows[is_global])
        hidden = self.trunk(input_ids, stream)
        if target_positions is None:
            return hidden
        assert target_labels is not None
        targets = self.head(hidden.index_select(0, target_positions))
        matrix = self.trunk.embeddings.tok_embeddings.weight
        return TargetLoss(*linear_cross_entropy(targets, matrix, self.output_bias, target_labels, target_weights))

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block, for each length of a stream by itself; blocks of one role share what is compiled."""
        torch._dynamo.config.recompile_limit = 64  # lengths x (first, global, local) x (training, evaluation)
        torch._dynamo.config.optimize_ddp = False  # would cut blocks in two; gradients are reduced after each anyway
        for block in self.trunk.layers:
            # not the module's call: the hooks of FSDP stay outside
            block.forward = torch.compile(block.forward, backend=backend, dynamic=False)
        self.compiled = True

    def predict(self, hidden: Tensor) -> Tensor:
        """(n, C) hidden states to (n, V) logits."""
        return F.linear(self.head(hidden), self.trunk.embeddings.tok_embeddings.weight, self.output_bias)


def compiles(wish: str) -> bool:
    """Whether blocks are compiled here: `blocks`, `none`, or `auto`, which says where there is a GPU."""
    if wish not in ("auto", "blocks", "none"):
        raise ValueError(f"model.compile must be auto, blocks or none, got {wish!r}")
    return wish == "blocks" or wish == "auto" and torch.cuda.is_available()


def batch_loss(model: Ettin, batch: Mapping[str, Any]) -> dict[str, Any]:
    """{loss, nll, correct, num_targets, num_loss_tokens} of a flat batch as `data.batch.flatten` makes it."""
    out: Any = model(batch["input_ids"], batch["position_ids"], batch["cu_seqlens"], batch["max_seqlen"],
                     batch["target_positions"], batch["target_labels"], target_weights=batch.get("target_weights"),
                     causal=batch["causal"])
    # max(1, n): a microbatch without any target has a loss of 0, not 0 / 0
    return {"loss": out.nll / max(1, batch["num_loss_tokens"]), "nll": out.nll, "correct": out.correct,
            "num_targets": batch["num_targets"], "num_loss_tokens": batch["num_loss_tokens"]}


@torch.no_grad()
def init_parameters(module: nn.Module) -> None:
    """Draws the parameters that `module` itself owns, by role (`full_megatron` of bert24 initialization.py:107-137).

    A normal, cut at `initializer_cutoff_factor` deviations: 0.02, for both Wo 0.02 / sqrt(2 * layers). Norm weights 1,
    output bias 0, where the reference keeps torch's random default.
    """
    if hasattr(module, "init_std") and not module.weight.is_meta:
        nn.init.trunc_normal_(module.weight, std=module.init_std, a=-module.init_cut, b=module.init_cut)  # type: ignore
    elif isinstance(module, nn.LayerNorm):
        module.weight.fill_(1.0)
    elif isinstance(module, Ettin):
        module.output_bias.zero_()
