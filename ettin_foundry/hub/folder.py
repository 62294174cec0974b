"""A Hugging Face folder of a model: weights, config.json, tokenizer and card; whole or not there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.hub.card import MNTP_NOTE, card
from ettin_foundry.model.config import OBJECTIVES, EttinConfig
from ettin_foundry.model.hf_config import config_json, read_config
from ettin_foundry.model.weights import WEIGHTS, plain_state, to_hf

__all__ = ["export_model", "write_json"]

log = logging.getLogger(__name__)


def export_model(model: Any, config: EttinConfig, tokenizer: Any, folder: str | Path, *, objective: str,
                 facts: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes a Hugging Face folder: config, safetensors, tokenizer, generation config (decoders), card.

    Everything is written beside the target, read back and compared bit by bit, then renamed into place.

    Args:
        model: an `EttinModel`, an `Ettin`, or a state dict of either.
        tokenizer: a fast tokenizer of transformers, or the name of a folder that holds one.
        objective: `mlm`, `mntp` or `clm`; what the head was last trained on.
        facts: see `card.FACTS`; `tokens`, `lineage` and `checkpoint` also go into config.json.
        overwrite: replace an earlier export of this name.
    """
    folder, facts = Path(folder), dict(facts or {})
    if objective not in OBJECTIVES or (objective == "clm") != config.causal:
        raise ValueError(f"objective must be {'clm for a decoder' if config.causal else 'mlm or mntp for an encoder'}, got "
                         f"{objective!r}")
    _check_target(folder, overwrite)
    tokenizer = _tokenizer_of_kind(tokenizer, config)
    weights = to_hf(plain_state(model), config)
    content = config_json(config, objective=objective, special_ids=tokenizers.special_ids(tokenizer),
                          tokens=facts.get("tokens"), lineage=facts.get("lineage") or (), checkpoint=facts.get("checkpoint"))
    if objective == "mntp":
        log.warning("%s: %s", folder, MNTP_NOTE)
    with _new_folder(folder) as partial:
        _write_files(partial, content, weights, tokenizer)
        text = card(config, objective=objective, name=folder.name, facts=facts, mask_token=tokenizer.mask_token)
        (partial / "README.md").write_text(text, encoding="utf-8")
        stored = load_file(partial / WEIGHTS)
        differing = [name for name in sorted(stored.keys() | weights.keys()) if name not in stored or name not in weights
                     or not torch.equal(stored[name].view(torch.int32), weights[name].view(torch.int32))]
        if differing or read_config(partial / "config.json") != (config, objective):
            raise ValueError(f"{folder}: what was written does not read back the same "
                             f"({', '.join(differing[:4]) or 'config'}); check the disk, then export again")
    return folder


def _tokenizer_of_kind(tokenizer: Any, config: EttinConfig) -> Any:
    """A copy of `tokenizer` (or of the one in the folder of this name) with the template of the model's kind."""
    if tokenizer is None:
        raise ValueError("tokenizer must be given; pass OUT/tokenizer of the conversion")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = tokenizers.load(str(tokenizer))
    if tokenizers.vocab_size(tokenizer) > config.vocab_size:
        raise ValueError(f"tokenizer must have at most the model's {config.vocab_size} entries, got "
                         f"{tokenizers.vocab_size(tokenizer)}; pass the one that the model was trained with")
    copy = tokenizers.with_template(tokenizer, "decoder" if config.causal else "encoder")
    copy.model_max_length = config.max_position_embeddings
    copy.model_input_names = ["input_ids", "attention_mask"]  # one segment: there are no token types
    return copy


def _write_files(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: Any) -> None:
    write_json(folder / "config.json", config)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save_pretrained(str(folder))
    # one class that every version of transformers has, whatever class read the training tokenizer
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {
        **settings, "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: getattr(tokenizer, name) for name in ("model_max_length", "model_input_names", "padding_side")}})
    if config["architectures"] == ["ModernBertDecoderForCausalLM"]:  # without these ids `generate` never stops
        write_json(folder / "generation_config.json", {k: config[k] for k in
                                                       ("bos_token_id", "eos_token_id", "pad_token_id")})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuses a link or file, a folder that is not empty without `overwrite`, and one that is no exported model."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file; give the name of a new folder")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder}: exists and is not empty; give another name, or pass --overwrite to replace it")
        if not (folder / "config.json").is_file() or any(entry.is_dir() for entry in folder.iterdir()):
            raise ValueError(f"{folder}: is not an exported model, so it is not overwritten; give another name")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` when the block ends, and is gone when it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, earlier = (folder.parent / f".{folder.name}.{what}-{os.getpid()}" for what in ("partial", "earlier"))
    shutil.rmtree(partial, ignore_errors=True)  # a leftover of a killed process that had our number
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
