"""Weights under our names and under transformers': one table read both ways, folders read, weights files laid out.

Encoders are `ModernBertForMaskedLM`, decoders `ModernBertDecoderForCausalLM`. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.hf_config import read_config
from ettin_foundry.version import __version__

WEIGHTS = "model.safetensors"


class TensorRow(NamedTuple):
    name: str
    hf_names: tuple[str, ...]  # several mean equal parts, stacked along dimension 0
    shape: tuple[int, ...]


_TABLE: dict[str, list[Any]] = yaml.safe_load(Path(__file__).with_name("tensors.yaml").read_text(encoding="utf-8"))
_TIED, _EMBEDDING = "decoder.weight", "model.embeddings.tok_embeddings.weight"


def tensor_table(config: EttinConfig) -> list[TensorRow]:
    """Every tensor of a model of this shape."""
    c, i = config.hidden_size, config.intermediate_size
    sizes = {"C": c, "3C": 3 * c, "I": i, "2I": 2 * i, "V": config.vocab_size}
    rows = []
    for name, (shape, encoder, *decoder) in _TABLE.items():
        hf_names = decoder[0] if config.causal and decoder else (encoder,)
        for layer in range(config.num_hidden_layers if "{i}" in name else 1):
            if layer or "attn_norm" not in name:
                rows.append(TensorRow(name.format(i=layer), tuple(n.format(i=layer) for n in hf_names),
                                      tuple(sizes[s] for s in shape.split())))
    return rows


def plain_state(model: Any) -> dict[str, Tensor]:
    """Parameters under our names: of an `EttinModel`, an `Ettin`, or a state dict of either."""
    state = model if isinstance(model, Mapping) else model.state_dict()
    prefixed = any(name.startswith("model.") for name in state)  # the ComposerModel holds the Ettin as `.model`
    return {name.removeprefix("model."): tensor for name, tensor in state.items()} if prefixed else dict(state)


def to_hf(state: Mapping[str, Tensor], config: EttinConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Our whole parameters under transformers' names: on the CPU, contiguous; copied only if they are not.

    A missing or unknown name, a wrong shape or a value that is not finite is an error.
    """
    rows, out = tensor_table(config), {}
    _check_names(state, (row.name for row in rows), "the model's state")
    for row in rows:
        check_tensor(row.name, state[row.name], row.shape)
        for name, part in zip(row.hf_names, state[row.name].detach().chunk(len(row.hf_names))):
            out[name] = part.to(device="cpu", dtype=dtype).contiguous()
    return out


def from_hf(hf_state: Mapping[str, Tensor], config: EttinConfig) -> dict[str, Tensor]:
    """The way back, with the same checks; a stored `decoder.weight` must equal the embedding."""
    given = dict(hf_state)
    tied = given.pop(_TIED, None)
    if tied is not None and _EMBEDDING in given and not torch.equal(tied, given[_EMBEDDING]):
        raise ValueError(f"{_TIED} must equal {_EMBEDDING}, got one that differs: no untied matrix can be imported")
    rows, out = tensor_table(config), {}
    _check_names(given, (name for row in rows for name in row.hf_names), "the folder's weights")
    for row in rows:
        parts = [given[name] for name in row.hf_names]
        for name, part in zip(row.hf_names, parts):
            check_tensor(name, part, (row.shape[0] // len(parts), *row.shape[1:]))
        out[row.name] = torch.cat([part.detach().float() for part in parts]).contiguous()
    return out


def _check_names(given: Iterable[str], expected: Iterable[str], where: str) -> None:
    given, expected = set(given), set(expected)
    problems = [f"{label} {', '.join(sorted(names)[:8])}{' ...' if len(names) > 8 else ''}"
                for label, names in (("missing", expected - given), ("unknown", given - expected)) if names]
    if problems:
        raise ValueError(f"{where} must be the {len(expected)} tensors of its config, got {'; '.join(problems)}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape, or with a value that is not finite."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape must be {shape} as the config says, got {tuple(tensor.shape)}")
    if not all(math.isfinite(bound) for bound in tensor.aminmax()):  # NaN is passed on; needs no memory of its own
        raise ValueError(f"{name}: has NaN or infinite values, so the run has diverged; use an earlier checkpoint")


def import_folder(folder: str | Path) -> tuple[dict[str, Tensor], EttinConfig, str | None]:
    """(parameters under our names in fp32, config, objective: None for an encoder that does not say) of a Hugging Face
    folder: ours, official Ettin ones, and those that transformers 4.48 to 5.x saved."""
    config, objective = read_config(Path(folder, "config.json"))
    return from_hf(_read_weights(Path(folder)), config), config, objective


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        pickled = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
        hint = f"; {pickled} is a pickle, which can run code and is never read" if pickled else ""
        raise FileNotFoundError(f"{folder}: has no {WEIGHTS}{hint}; save it as one file of safetensors "
                                "(save_pretrained with max_shard_size='10GB')")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error


def weights_checkpoint(state: Mapping[str, Tensor], config: EttinConfig, *, objective: str,
                       **record: Any) -> dict[str, Any]:
    """A Composer checkpoint without optimizer, clock and random state: plain data and tensors, to be torch.saved.

    record: what else it says of itself, as `checkpoints.decode_record` gives it.
    """
    clock = {"tokenizer": None, "tokens": 0, "lineage": (), **record, "config": dataclasses.asdict(config),
             "objective": objective, "size": config.size}
    clock |= {key: json.dumps(clock[key]) for key in ("objective_schedule", "tokenizer_fingerprint") if key in clock}
    return {"state": {"model": {f"model.{name}": tensor for name, tensor in state.items()},
                      "callbacks": {"Clock": clock}, "integrations": {},
                      "metadata": {"ettin_foundry_version": __version__}}}
