"""ModernBertDecoder for vLLM: the same sums as transformers' models/modernbert_decoder, over vLLM's layers.

Names of parameters are those of transformers, except that q_proj, k_proj and v_proj are one matrix. Tensors are
(tokens, C): vLLM lays the sequences of a step in a row. Written for vLLM 0.32; one pipeline stage, any tensor
parallelism that divides the heads.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import ModernBertDecoderConfig
from transformers.activations import ACT2FN
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors


def _norm(config: ModernBertDecoderConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class _Embeddings(nn.Module):
    def __init__(self, config: ModernBertDecoderConfig):
        super().__init__()
        self.tok_embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.norm = _norm(config)

    def forward(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        return self.norm(self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)


class _Attention(nn.Module):
    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        quantized = vllm_config.quant_config
        kind = config.layer_types[index]
        head = config.hidden_size // config.num_attention_heads
        heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.size = heads * head
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head, config.num_attention_heads, quant_config=quantized,
                                          bias=config.attention_bias, prefix=f"{prefix}.qkv_proj")
        self.rotary = get_rope(head, config.max_position_embeddings, rope_parameters=config.rope_parameters[kind])
        # a window of n tokens with the token itself, in vLLM as in transformers
        window = config.sliding_window if kind == "sliding_attention" else None
        self.attn = Attention(heads, head, head**-0.5, num_kv_heads=heads, cache_config=vllm_config.cache_config,
                              quant_config=quantized, per_layer_sliding_window=window, prefix=f"{prefix}.attn")
        self.Wo = RowParallelLinear(config.hidden_size, config.hidden_size, bias=config.attention_bias,
                                    quant_config=quantized, prefix=f"{prefix}.Wo")

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(hidden)[0].split([self.size] * 3, dim=-1)
        q, k = self.rotary(positions, q, k)
        return self.Wo(self.attn(q, k, v))[0]


class _MLP(nn.Module):
    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config, quantized = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.Wi = MergedColumnParallelLinear(config.hidden_size, [config.intermediate_size] * 2, bias=config.mlp_bias,
                                             quant_config=quantized, prefix=f"{prefix}.Wi")
        self.act = ACT2FN[config.hidden_activation]
        self.Wo = RowParallelLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias,
                                    quant_config=quantized, prefix=f"{prefix}.Wo")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        content, gate = self.Wi(hidden)[0].chunk(2, dim=-1)
        return self.Wo(self.act(content) * gate)[0]


class _Layer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.attn_norm = _norm(config) if index else nn.Identity()  # the embeddings' norm stands before layer 0
        self.attn = _Attention(vllm_config, index, f"{prefix}.attn")
        self.mlp_norm = _norm(config)
        self.mlp = _MLP(vllm_config, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attn(positions, self.attn_norm(hidden))
        return hidden + self.mlp(self.mlp_norm(hidden))


@support_torch_compile  # reads the annotations of forward: they must be types, not text
class _Trunk(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embeddings = _Embeddings(config)
        self.layers = nn.ModuleList(_Layer(vllm_config, index, f"{prefix}.layers.{index}")
                                    for index in range(config.num_hidden_layers))
        self.final_norm = _norm(config)

    def forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor,
                intermediate_tensors: IntermediateTensors | None = None,
                inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embeddings(input_ids, inputs_embeds)
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.final_norm(hidden)


class _Head(nn.Module):
    def __init__(self, config: ModernBertDecoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.classifier_bias)
        self.act = ACT2FN[config.classifier_activation]
        self.norm = _norm(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.dense(hidden)))


class ModernBertDecoderForCausalLM(nn.Module):
    """Generates with an exported decoder."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"), ".v_proj": (".qkv_proj", "v")})
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model = _Trunk(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = _Head(config)
        self.decoder = ParallelLMHead(config.vocab_size, config.hidden_size, bias=config.decoder_bias,
                                      prefix=maybe_prefix(prefix, "decoder"))
        if config.tie_word_embeddings:
            self.decoder = self.decoder.tie_weights(self.model.embeddings.tok_embeddings)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embeddings.tok_embeddings(input_ids)

    def forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor,
                intermediate_tensors: IntermediateTensors | None = None,
                inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.decoder, self.lm_head(hidden_states), self.decoder.bias)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
