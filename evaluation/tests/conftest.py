"""Small models of random weights and a tokenizer trained here, as folders."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
)

TEXT = ["def add(a, b):\n    return a + b", "The capital of France is Paris.", "Which is a plant? A tree."] * 20
SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")


def small_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 entries, with the template of the kind: [CLS] x [SEP], or [CLS] x."""
    inner = Tokenizer(models.BPE(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    single = "[CLS] $A [SEP]" if kind == "encoder" else "[CLS] $A"
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]", model_max_length=128,
        model_input_names=["input_ids", "attention_mask"], padding_side="right" if kind == "encoder" else "left")


def write_model(folder: Path, kind: str, objective: str, seed: int = 0) -> Path:
    """A model of 2 layers of 32 with random weights, as `ettin export` would write it."""
    torch.manual_seed(seed)
    tokenizer = small_tokenizer(kind)
    ids = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    options: dict[str, Any] = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                   num_attention_heads=2, max_position_embeddings=128, local_attention=16, **ids)
    if kind == "encoder":
        model = ModernBertForMaskedLM(ModernBertConfig(**options))
    else:
        model = ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**options))
    for parameter in model.parameters():  # larger than at initialisation: no two candidates are nearly alike
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.config.ettin_foundry = {"objective": objective}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("a small model\n")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders of small models: `mlm`, `mntp` (encoders), `clm` (a decoder)."""
    root = tmp_path_factory.mktemp("models")
    yield {objective: write_model(root / objective, "decoder" if objective == "clm" else "encoder", objective)
           for objective in ("mlm", "mntp", "clm")}
