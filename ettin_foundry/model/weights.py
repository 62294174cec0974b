"""Hugging Face folders, out and in: weights, config, tokenizer and card.

Encoders become `ModernBertForMaskedLM`, decoders `ModernBertDecoderForCausalLM`; both load without remote code. The names
and shapes of all tensors stand in one table, read in both directions, and both directions are strict. Nothing is pickled:
weights are safetensors, everything else is JSON.

config.json carries the keys of both generations of transformers (4.x: `global_rope_theta`, `local_rope_theta`; 5.x:
`rope_parameters`, `layer_types`), because each generation silently falls back to a default of its own when its keys are
missing. What no key of transformers can say stands under `ettin_foundry`, so that an import gives the config back whole.

The card's text is in card.py; safe reading of Composer checkpoints in checkpoint.py; folders of embedding models are
written by sentence_export.py. A folder holds one weights file:
transformers splits files above 5 GB, and the largest Ettin model has 4.1 GB in fp32.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ettin_foundry.hub.card import MNTP_NOTE, card
from ettin_foundry.hub.folder import WEIGHTS, check_target, differing_tensors, new_folder, write_json
from ettin_foundry.model.config import OBJECTIVES, EttinConfig
from ettin_foundry.model.hf_config import config_json, read_config
from ettin_foundry.version import __version__

__all__ = ["config_json", "export_model", "from_hf", "import_folder", "load_tokenizer", "plain_state", "tensor_table",
           "to_hf", "write_files"]

log = logging.getLogger(__name__)


class TensorRow(NamedTuple):
    """One tensor of ours and what it is called there; several names mean equal parts, stacked along dimension 0."""

    name: str
    hf_names: tuple[str, ...]
    shape: tuple[int, ...]


# ours | shape | encoder | decoder, where it differs. C hidden, I GLU width, V vocabulary, {i} layer. Layer 0 has no
# attn_norm. `decoder.weight` is tied to the embedding and never written: transformers 5.0 leaves a stored one untied.
_TABLE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("trunk.embeddings.tok_embeddings.weight", "V C", "model.embeddings.tok_embeddings.weight", ()),
    ("trunk.embeddings.norm.weight", "C", "model.embeddings.norm.weight", ()),
    ("trunk.layers.{i}.attn_norm.weight", "C", "model.layers.{i}.attn_norm.weight", ()),
    ("trunk.layers.{i}.attn.Wqkv.weight", "3C C", "model.layers.{i}.attn.Wqkv.weight",
     tuple(f"model.layers.{{i}}.attn.{x}_proj.weight" for x in "qkv")),
    ("trunk.layers.{i}.attn.Wo.weight", "C C", "model.layers.{i}.attn.Wo.weight", ()),
    ("trunk.layers.{i}.mlp_norm.weight", "C", "model.layers.{i}.mlp_norm.weight", ()),
    ("trunk.layers.{i}.mlp.Wi.weight", "2I C", "model.layers.{i}.mlp.Wi.weight", ()),
    ("trunk.layers.{i}.mlp.Wo.weight", "C I", "model.layers.{i}.mlp.Wo.weight", ()),
    ("trunk.final_norm.weight", "C", "model.final_norm.weight", ()),
    ("head.dense.weight", "C C", "head.dense.weight", ("lm_head.dense.weight",)),
    ("head.norm.weight", "C", "head.norm.weight", ("lm_head.norm.weight",)),
    ("output_bias", "V", "decoder.bias", ()),
)
_TIED = "decoder.weight"
_EMBEDDING = "model.embeddings.tok_embeddings.weight"


def tensor_table(config: EttinConfig) -> list[TensorRow]:
    """Every tensor of a model of this shape: our name, transformers' name or names, our shape."""
    c, i = config.hidden_size, config.intermediate_size
    sizes = {"C": c, "3C": 3 * c, "I": i, "2I": 2 * i, "V": config.vocab_size}
    rows = []
    for name, shape, encoder, decoder in _TABLE:
        hf_names = decoder if config.causal and decoder else (encoder,)
        layers = range(config.num_hidden_layers) if "{i}" in name else range(1)
        for layer in layers:
            if layer or "attn_norm" not in name:
                rows.append(TensorRow(name.format(i=layer), tuple(n.format(i=layer) for n in hf_names),
                                      tuple(sizes[s] for s in shape.split())))
    return rows


def to_hf(state: Mapping[str, Tensor], config: EttinConfig) -> dict[str, Tensor]:
    """Our parameters under transformers' names: fp32 on the CPU, contiguous.

    What is so already is not copied, only cut: the result may share memory with `state`, for instance with a file that is
    mapped. Write it out, do not change it.

    Args:
        state: parameters as `model.Ettin.state_dict()` names them.

    Raises:
        ValueError: a name is missing or unknown, a shape is wrong, a value is not finite, or a tensor is sharded.
    """
    rows = tensor_table(config)
    _check_names(state, (row.name for row in rows), "the model's state")
    out: dict[str, Tensor] = {}
    for row in rows:
        tensor = state[row.name].detach()
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{row.name}: a sharded tensor given; a whole one is needed. Gather the state first, with "
                             "torch.distributed.checkpoint.state_dict and full_state_dict=True")
        _check_shape(row.name, tensor, row.shape)
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # NaN is passed on; needs no memory of its own
            raise ValueError(f"{row.name}: has NaN or infinite values, so the run has diverged; export an earlier "
                             "checkpoint")
        for name, part in zip(row.hf_names, tensor.chunk(len(row.hf_names))):
            out[name] = part.to(device="cpu", dtype=torch.float32).contiguous()
    return out


def from_hf(hf_state: Mapping[str, Tensor], config: EttinConfig) -> dict[str, Tensor]:
    """The way back: our parameters in fp32 (exact from bf16 and fp16) out of transformers' state dict.

    A `decoder.weight`, as some writers store it, must equal the embedding it is tied to.

    Raises:
        ValueError: a name is missing or unknown, a shape is wrong, or `decoder.weight` is a matrix of its own.
    """
    given = dict(hf_state)
    tied = given.pop(_TIED, None)
    if tied is not None and _EMBEDDING in given and not torch.equal(tied, given[_EMBEDDING]):
        raise ValueError(f"{_TIED}: differs from {_EMBEDDING}; Ettin models have one matrix for input and output. A "
                         "model with untied matrices cannot be imported")
    rows = tensor_table(config)
    _check_names(given, (name for row in rows for name in row.hf_names), "the folder's weights")
    out: dict[str, Tensor] = {}
    for row in rows:
        parts = [given[name] for name in row.hf_names]
        for name, part in zip(row.hf_names, parts):
            _check_shape(name, part, (row.shape[0] // len(parts), *row.shape[1:]))
        out[row.name] = torch.cat([part.detach().float() for part in parts]).contiguous()
    return out


def _check_names(given: Iterable[str], expected: Iterable[str], where: str) -> None:
    given, expected = set(given), set(expected)
    problems = [f"{label} {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
                for label, names in (("missing", expected - given), ("unknown", given - expected)) if names]
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)} ({len(expected)} tensors are expected). Check that the config "
                         "(layers, encoder or decoder) is that of these weights, and that they hold the prediction head")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} given; the config needs {shape}. Check vocab_size, "
                         "hidden_size and intermediate_size")


def export_model(model: Any, config: EttinConfig, tokenizer: Any, folder: str | Path, *, objective: str,
                 facts: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes a Hugging Face folder: config, safetensors, tokenizer, generation config (decoders), card.

    Everything is written beside the target, read back and compared bit by bit, then renamed into place, so that a folder
    of this name is always whole.

    Args:
        model: an `EttinModel`, an `Ettin`, or a state dict with or without the prefix `model.`.
        tokenizer: a fast tokenizer of transformers, or the name of a folder that holds one.
        objective: `mlm`, `mntp`, `mdlm` or `clm`; what the head was last trained on.
        facts: what the card shall say, see `card.card`; `tokens` and `lineage` also go into config.json.
        overwrite: replace an earlier export of this name.

    Returns:
        The folder.

    Raises:
        ValueError: objective and config contradict each other, the folder is in use, the vocabulary is larger than the
            model's, or the weights are not those of the config.
    """
    from ettin_foundry.data.tokenizer import special_ids

    folder, facts = Path(folder), dict(facts or {})
    if objective not in OBJECTIVES or (objective == "clm") != config.causal:
        raise ValueError(f"objective: {objective!r} given for {'a decoder' if config.causal else 'an encoder'}; "
                         f"{'only clm' if config.causal else 'mlm, mntp or mdlm'} is possible. Pass what the model was "
                         "trained on")
    check_target(folder, overwrite)
    if tokenizer is None:
        raise ValueError("tokenizer: none given; a model cannot be used without one. Pass the training set's tokenizer "
                         "folder (OUT/tokenizer of data_prep/convert.py)")
    tokenizer = load_tokenizer(tokenizer, config)
    weights = to_hf(plain_state(model), config)
    written = config_json(config, objective=objective, special_ids=special_ids(tokenizer), tokens=facts.get("tokens"),
                          lineage=facts.get("lineage") or (), checkpoint=facts.get("checkpoint"))
    if objective == "mntp":
        log.warning("%s: %s", folder, MNTP_NOTE)
    with new_folder(folder) as partial:
        write_files(partial, written, weights, tokenizer)
        (partial / "README.md").write_text(card(config, objective=objective, name=folder.name, facts=facts,
                                                mask_token=tokenizer.mask_token), encoding="utf-8")
        _verify(partial, weights, config, objective)
    return folder


def plain_state(model: Any) -> dict[str, Tensor]:
    """Parameters under our names: of an `EttinModel`, an `Ettin`, or a state dict of either."""
    state = model if isinstance(model, Mapping) else model.state_dict()
    prefixed = any(name.startswith("model.") for name in state)  # the ComposerModel holds the Ettin as `.model`
    return {name.removeprefix("model."): tensor for name, tensor in state.items()} if prefixed else dict(state)


def load_tokenizer(tokenizer: Any, config: EttinConfig) -> Any:
    """A copy of `tokenizer` (or of the one in the folder of this name) with the template of the model's kind.

    Raises:
        ValueError: it has more entries than the model, or lacks a special token.
    """
    from ettin_foundry.data import tokenizer as tokenizers

    if isinstance(tokenizer, (str, Path)):
        tokenizer = tokenizers.load(str(tokenizer))
    if tokenizers.vocab_size(tokenizer) > config.vocab_size:
        raise ValueError(f"tokenizer: {tokenizers.vocab_size(tokenizer)} entries given; the model has "
                         f"{config.vocab_size}. Pass the tokenizer that the model was trained with")
    copy = tokenizers.with_template(tokenizer, "decoder" if config.causal else "encoder")
    copy.model_max_length = config.max_position_embeddings
    copy.model_input_names = ["input_ids", "attention_mask"]  # one segment: there are no token types
    return copy


def write_files(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: Any) -> None:
    """Config, weights and tokenizer, and the generation config of a decoder with its head."""
    from safetensors.torch import save_file

    write_json(folder / "config.json", config)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save_pretrained(str(folder))
    # one class that every version of transformers has, whatever class read the training tokenizer
    kept = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**kept, "tokenizer_class": "PreTrainedTokenizerFast",
                                                  "model_max_length": tokenizer.model_max_length,
                                                  "model_input_names": tokenizer.model_input_names,
                                                  "padding_side": tokenizer.padding_side})
    if config["architectures"] == ["ModernBertDecoderForCausalLM"]:  # without these ids `generate` never stops
        write_json(folder / "generation_config.json", {k: config[k] for k in
                                                       ("bos_token_id", "eos_token_id", "pad_token_id")})


def _verify(folder: Path, weights: dict[str, Tensor], config: EttinConfig, objective: str) -> None:
    """Reads the folder back and compares bit by bit: the disk's word is taken for nothing."""
    differing, read = differing_tensors(folder, weights), read_config(folder / "config.json")
    if differing or read != (config, objective):
        what = f"tensors {', '.join(differing[:4])}" if differing else f"config {read[0]} instead of {config}"
        raise ValueError(f"{folder}: what was written does not read back the same ({what}). Check the disk, then export "
                         "again")


def import_folder(folder: str | Path) -> tuple[dict[str, Tensor], EttinConfig, str | None]:
    """Reads a Hugging Face folder: ours, official Ettin ones, and those that transformers 4.48 to 5.x saved.

    Returns:
        (parameters under our names in fp32, config, objective). The objective is None for an encoder that does not say
        (encoders look alike); a decoder's is always `clm`.

    Raises:
        FileNotFoundError: no such folder, config or safetensors file. Pickled weights (`pytorch_model.bin`) are refused.
        ValueError: a setting that an Ettin model cannot express, ambiguous or broken files; the message names the key.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a downloaded Hugging Face model folder is needed, with "
                                "config.json and model.safetensors")
    config, objective = read_config(folder / "config.json")
    return from_hf(_read_weights(folder), config), config, objective


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read_safetensors(single)
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = (f"it holds {', '.join(pickled)}, a pickle, which can run code and is never read; convert it to "
                "safetensors first" if pickled else "download the model's safetensors file into it")
        raise FileNotFoundError(f"{folder}: has no model.safetensors; {hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is not an index of safetensors shards ({error}); download the file again") from error
    out: dict[str, Tensor] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: names the shard {file!r}; only safetensors files in the same folder are read")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: named in {index.name} but not there; download it")
        tensors = _read_safetensors(folder / file)
        listed = {name for name, shard in weight_map.items() if shard == file}
        if set(tensors) != listed:
            raise ValueError(f"{folder / file}: holds other tensors than {index.name} says "
                             f"({', '.join(sorted(set(tensors) ^ listed)[:4])}); download both again")
        out.update(tensors)
    return out


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error}); download or export it again") from error


def weights_checkpoint(state: Mapping[str, Tensor], config: EttinConfig, *, objective: str,
                       tokenizer: str | None = None, lineage: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A dict that `torch.save` turns into what the host's `load_path` with `load_weights_only` and `ettin_cross` read.

    It has the layout of a Composer checkpoint without optimizer, clock and random state: plain data and tensors only.
    """
    clock = {"config": dataclasses.asdict(config), "objective": objective, "size": config.size, "tokenizer": tokenizer,
             "tokens": 0, "lineage": [dict(entry) for entry in lineage]}
    return {"state": {"model": {f"model.{name}": tensor for name, tensor in state.items()},
                      "callbacks": {"Clock": clock}, "integrations": {},
                      "metadata": {"ettin_foundry_version": __version__}}}
