"""config.json of transformers' ModernBert classes, written and read.

Written so that every version computes the same function (4.48 to 5.x for encoders, 4.54 to 5.x for decoders; each rule
was measured by loading). Read with the defaults of the version that saved it; what an Ettin model cannot express, or
what means different functions to different versions, is refused by name.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.objectives.schedule import OBJECTIVES
from ettin_foundry.version import __version__

log = logging.getLogger(__name__)
# fields of the same name and meaning on both sides, with transformers' value where a key is missing (4.48 to 5.23)
_DEFAULTS = {"vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
             "num_attention_heads": 12, "max_position_embeddings": 8192, "initializer_range": 0.02,
             "initializer_cutoff_factor": 2.0, "norm_eps": 1e-5, "global_attn_every_n_layers": 3}
# settings that change the function and that Ettin has in one form only
_FIXED: dict[str, Any] = {"hidden_activation": "gelu", "classifier_activation": "gelu", "norm_bias": False,
                          "attention_bias": False, "mlp_bias": False, "classifier_bias": False, "decoder_bias": True,
                          "tie_word_embeddings": True}
# that we have not; they act in training only
_DROPOUTS = ("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout")
_BASES = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
_MODEL_TYPES = {"modernbert": "ModernBertForMaskedLM", "modernbert-decoder": "ModernBertDecoderForCausalLM"}


def export_notes(config: EttinConfig) -> list[str]:
    """What a user of the exported model must know about versions of transformers; empty for most models."""
    notes = []
    if config.causal and config.window_left != 63:
        notes.append(f"Local layers see {config.window_left} tokens back (`local_attention: "
                     f"{2 * config.window_left + 2}`); transformers 4.54 to 5.0 drop that key when they save the model "
                     "again, and 4.x falls back to 63.")
    if config.causal and config.local_rope_theta != config.global_rope_theta:
        notes.append(f"Local layers use the rotary base {config.local_rope_theta:g}, global layers "
                     f"{config.global_rope_theta:g}: use transformers 5 or newer, since 4.x ignores the local base.")
    return notes


def config_json(config: EttinConfig, *, objective: str, special_ids: Mapping[str, int | None],
                facts: Mapping[str, Any] | None = None, dtype: str = "float32") -> dict[str, Any]:
    """The content of config.json for both generations of transformers, and for TEI, which needs the flat keys.

    Both keys of each rotary base are written, because each generation falls back to a default of its own. An encoder
    gets no `sliding_window` (5.x doubles it into `local_attention`); a decoder's counts the token itself. What no key
    of transformers can say stands under `ettin_foundry`, so that an import gives the config back whole.
    """
    facts = facts or {}
    for note in export_notes(config):
        log.warning("%s", note)
    thetas = {kind: float(getattr(config, name)) for kind, name in _BASES.items()}
    model_type = "modernbert-decoder" if config.causal else "modernbert"
    ours = {"version": __version__, "objective": objective, "window_left": config.window_left,
            "local_attention": config.local_attention, "attn_out_dropout": config.attn_out_dropout,
            "tokens": facts.get("tokens"), "lineage": [dict(entry) for entry in facts.get("lineage") or ()]}
    if checkpoint := facts.get("checkpoint"):
        ours["checkpoint"] = dict(checkpoint)
    if objective == "mntp":
        ours["mask_is_predicted_at"] = "the position before the mask"
    window = {"local_attention": config.local_attention}
    if config.causal:
        window = {"local_attention": 2 * (config.window_left + 1), "sliding_window": config.window_left + 1}
    return {
        "architectures": [_MODEL_TYPES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in _DEFAULTS},
        "layer_norm_eps": config.norm_eps,  # read by llama.cpp and vLLM
        **_FIXED,
        **dict.fromkeys(_DROPOUTS, 0.0),
        "classifier_pooling": "mean",
        **{f"{name}_token_id": special_ids[role] for name, role in
           (("bos", "cls"), ("eos", "sep"), ("cls", "cls"), ("sep", "sep"), ("pad", "pad"))},
        **{_BASES[kind]: theta for kind, theta in thetas.items()},
        "rope_parameters": {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in thetas.items()},
        "layer_types": config.layer_types,
        **window,
        "torch_dtype": dtype,  # read up to 4.55
        "dtype": dtype,        # read from 4.56
        **({"use_cache": True} if config.causal else {}),
        "ettin_foundry": ours,
    }


def check_folder(folder: Path) -> None:
    """Refuses a model folder in which a file is a pipe, a link that leads out of it and of the hub's cache that it is
    part of, or text larger than 64 MiB."""
    homes = (home := folder.resolve(), *(parent / "blobs" for parent in home.parents[1:3]))
    for path in folder.glob("*.*"):
        if path.suffix in (".json", ".txt", ".model", ".jinja", ".safetensors"):
            if not path.is_file() or path.resolve().parent not in homes:
                raise ValueError(f"{path}: must be a file in this folder, got a link out or a pipe; copy the file")
            if path.suffix != ".safetensors" and (size := path.stat().st_size) > 2**26:
                raise ValueError(f"{path}: must have at most {2**26:,} bytes of text, got {size:,}")


def read_config(path: Path) -> tuple[EttinConfig, str | None]:
    """(config, objective: None for an encoder that does not say) of a config.json; errors name file and key."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; a Hugging Face model folder has a config.json")
    check_folder(path.parent)
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")), path)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}. This model cannot be imported") from error


def read_record(folder: Path) -> dict[str, Any]:
    """What an exported folder says of its training, as `clock.Clock.state_dict`; little of a folder of others."""
    ours = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("ettin_foundry") or {}
    tokens, lineage = ours.get("tokens"), tuple(ours.get("lineage") or ())
    if tokens is not None:  # counted from initialisation there, from the last start in a record
        tokens -= sum(entry.get("tokens") or 0 for entry in lineage)
    return {**(ours.get("checkpoint") or {}), "tokens": tokens, "lineage": lineage}


def _read(raw: dict[str, Any], path: Path) -> tuple[EttinConfig, str | None]:
    if raw.get("model_type") not in _MODEL_TYPES:
        raise ValueError(f"model_type must be {' or '.join(_MODEL_TYPES)}, got {raw.get('model_type')!r}")
    causal = raw["model_type"] == "modernbert-decoder"
    for name, value in {**_FIXED, "rope_scaling": None}.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r}, got {raw[name]!r}")
    ours = raw.get("ettin_foundry") or {}
    fields = {name: raw.get(name, default) for name, default in _DEFAULTS.items()}
    kinds = raw.get("layer_types")
    if kinds and "global_attn_every_n_layers" not in raw:  # saved by 5.x, which keeps only the list
        fields["global_attn_every_n_layers"] = [*kinds[1:], "full_attention"].index("full_attention") + 1
    if "attn_out_dropout" in ours:
        fields["attn_out_dropout"] = ours["attn_out_dropout"]
    config = EttinConfig(causal=causal, **_windows(raw, ours, causal), **_thetas(raw, causal, path), **fields)
    if kinds not in (None, config.layer_types):
        raise ValueError(f"layer_types must be {config.layer_types}, got {kinds}")
    objective = ours.get("objective", "clm" if causal else None)
    if objective is not None and (objective not in OBJECTIVES or (objective == "clm") != causal):
        raise ValueError(f"ettin_foundry.objective must be {'clm' if causal else 'mlm or mntp'}, got {objective!r}")
    return config, objective


def _windows(raw: dict[str, Any], ours: dict[str, Any], causal: bool) -> dict[str, int]:
    """window_left and local_attention. transformers 4.x obeys local_attention, 5.x obeys sliding_window."""
    local, sliding = raw.get("local_attention"), raw.get("sliding_window")
    for name, value in (("local_attention", local), ("sliding_window", sliding)):
        if name in raw and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an integer >= 1 or absent, got {value!r}")
    if local is not None and sliding is not None and local // 2 != sliding:
        raise ValueError(f"local_attention {local} and sliding_window {sliding} contradict each other; keep one")
    side = sliding if sliding is not None else (128 if local is None else local) // 2
    window_left = side - 1 if causal else side
    stated = ours.get("window_left", window_left)
    if stated != window_left:
        raise ValueError(f"local_attention {local} and sliding_window {sliding} mean {window_left} tokens back, got a "
                         f"model trained with window_left {stated}; set local_attention to {2 * (stated + causal)}"
                         f"{f' and sliding_window to {stated + 1}' if causal else ''}")
    return {"window_left": window_left, "local_attention": ours.get("local_attention", 2 * side)}


def _thetas(raw: dict[str, Any], causal: bool, path: Path) -> dict[str, float]:
    """From the new keys, the old keys, or the defaults of the version that saved them."""
    new = raw.get("rope_parameters") or {}
    if not set(new) <= set(_BASES) or any(entry.get("rope_type", "default") != "default" for entry in new.values()):
        raise ValueError(f"rope_parameters must hold rope_type default for {' and '.join(_BASES)}, got {new!r}")
    found: dict[str, float] = {}
    for kind, name in _BASES.items():
        values = {float(v) for v in (new.get(kind, {}).get("rope_theta"), raw.get(name)) if v is not None}
        if len(values) > 1:
            raise ValueError(f"rope_parameters.{kind}.rope_theta and {name} contradict each other ({sorted(values)}); "
                             "keep the trained one")
        if values:
            found[name] = values.pop()
    found.setdefault("global_rope_theta", 160_000.0)
    if "local_rope_theta" not in found:
        # encoders: 10k in every version. Decoders: 4.x computes with the global base whatever is written, 5.x with 10k
        major = str(raw.get("transformers_version", "4")).split(".")[0]
        found["local_rope_theta"] = found["global_rope_theta"] if causal and major == "4" else 10_000.0
        log.warning("%s: no rotary base for local layers; %g is taken, as transformers %s computes with", path,
                    found["local_rope_theta"], major)
    return found
