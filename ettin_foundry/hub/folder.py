"""Hugging Face folders: of one model, or of every checkpoint of a run, named as the original's tags."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.storage import atomic_folder
from ettin_foundry.hub.card import MNTP_NOTE, card
from ettin_foundry.hub.load import LoadedModel, chosen_objective, load_model
from ettin_foundry.hub.parity import ONNX, write_onnx
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.hf_config import config_json
from ettin_foundry.model.transformer import Ettin
from ettin_foundry.model.weights import WEIGHTS, plain_state, to_hf
from ettin_foundry.objectives.schedule import OBJECTIVES
from ettin_foundry.training import checkpoints

log = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # torch's names


def export_model(model: Any, config: EttinConfig, tokenizer: Any, folder: str | Path, *, objective: str,
                 facts: Mapping[str, Any] | None = None, dtype: str = "fp32", onnx: bool = False, trunk: bool = False,
                 overwrite: bool = False) -> Path:
    """Writes a Hugging Face folder: config, safetensors, tokenizer, generation config (decoders), card.

    Everything is written beside the target, then renamed into place.

    model: an `EttinModel`, an `Ettin`, or a state dict of either. tokenizer: a fast one of transformers.
    objective: what the head was last trained on. facts: as of `card.card`; some also go into config.json.
    dtype: of the weights, a key of `DTYPES`. onnx: also model.onnx, as of `parity.write_onnx`. trunk: an encoder
    without its head, with the mean as pooling, for programs that make embeddings. overwrite: replace an earlier
    export of this name.
    """
    folder, facts = Path(folder), dict(facts or {})
    if objective not in OBJECTIVES or (objective == "clm") != config.causal:
        raise ValueError(f"objective must be {'clm' if config.causal else 'mlm or mntp'} here, got {objective!r}")
    if (onnx and (trunk or dtype != "fp32")) or (trunk and config.causal):
        raise ValueError("--onnx takes whole models in fp32; export it by itself" if onnx else
                         "--trunk must be of an encoder, got a decoder: no program takes its trunk alone")
    _check_target(folder, overwrite)
    exported = _tokenizer_of_kind(tokenizer, config)
    weights = to_hf(plain_state(model), config, getattr(torch, DTYPES[dtype]))
    content = config_json(config, objective=objective, special_ids=tokenizers.special_ids(exported), facts=facts,
                          dtype=DTYPES[dtype])
    if trunk:
        weights = {name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")}
        content["architectures"] = ["ModernBertModel"]
    elif objective == "mntp":
        log.warning("%s: %s", folder, MNTP_NOTE)
    with atomic_folder(folder) as partial:
        _write_files(partial, content, weights, exported)
        if trunk:
            _write_pooling(partial, config.hidden_size)
        if onnx:
            built = Ettin(config, "reference")
            built.load_state_dict(plain_state(model))
            log.info("%s: logits as the model's within %.1e", folder / ONNX, write_onnx(built, partial))
        (partial / "README.md").write_text(card(config, objective=objective, name=folder.name, facts=facts, trunk=trunk,
                                                mask_token=exported.mask_token), encoding="utf-8")
        for path in partial.glob("*.*"):  # as the umask says: safetensors makes a file that nobody else can read
            path.chmod((partial / "README.md").stat().st_mode)
    return folder


def _tokenizer_of_kind(tokenizer: Any, config: EttinConfig) -> Any:
    """A copy with the template of the model's kind, and with the special tokens that the model was trained with."""
    if tokenizers.vocab_size(tokenizer) > config.vocab_size:
        raise ValueError(f"tokenizer must have at most the model's {config.vocab_size} entries, got "
                         f"{tokenizers.vocab_size(tokenizer)}; pass the one that the model was trained with")
    copy = tokenizers.with_template(tokenizer, "decoder" if config.causal else "encoder")
    copy.bos_token, copy.eos_token = copy.cls_token, copy.sep_token  # whatever BOS and EOS it had of its own
    copy.model_max_length = config.max_position_embeddings
    # one segment: there are no token types; what the constructor was given is saved
    copy.model_input_names = copy.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    return copy


def _write_files(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: Any) -> None:
    _write_json(folder / "config.json", config)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizers.save(tokenizer, folder)
    if config["architectures"] == ["ModernBertDecoderForCausalLM"]:  # without these ids `generate` never stops
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(folder / "generation_config.json", {name: config[name] for name in ids})


def _write_pooling(folder: Path, hidden_size: int) -> None:
    """What sentence-transformers, TEI, vLLM and llama.cpp's converter read the pooling from."""
    parts = enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    _write_json(folder / "modules.json", [{"idx": i, "name": str(i), "path": path, "type":
                                           f"sentence_transformers.models.{kind}"} for i, (path, kind) in parts])
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json",
                {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file; give the name of a new folder")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder}: exists and is not empty; give another name, or pass --overwrite to replace it")
        if not (folder / "config.json").is_file() or any(
                entry.is_dir() and entry.name != "1_Pooling" for entry in folder.iterdir()):
            raise ValueError(f"{folder}: is not an exported model, so it is not overwritten; give another name")


def export_checkpoint(source: str | Path, folder: str | Path, *, objective: str | None = None,
                      tokenizer: str | None = None, licence: str | None = None, **options: Any) -> LoadedModel:
    """Writes a checkpoint, or the newest of a save folder, as `export_model` does, with all that it says of itself.

    `objective` and `tokenizer` are as for `load.load_model` and `LoadedModel.tokenizer`; options as of `export_model`.
    """
    model = load_model(source, objective)
    export_model(model.state, model.config, model.tokenizer(tokenizer), folder, objective=model.objective,
                 facts={**model.facts, "license": licence}, **options)
    return model


def revision_name(phase: str | None, batch: int) -> str:
    """`step{N}`, `ext{N}`, `decay{N}` as the original's tags, drawn weights step0; other phases by name, or `ba{N}`."""
    prefix = {"pretrain": "step", "extend": "ext"}.get(phase or "", phase or "") if batch else "step"
    return f"{prefix if re.fullmatch('[a-z][a-z_]*', prefix) else 'ba'}{batch}"


def revisions(folders: Sequence[str | Path]) -> dict[str, checkpoints.Head]:
    """{name: what it says of itself} of the complete checkpoints of save folders, in order, those of each by batch."""
    found: dict[str, checkpoints.Head] = {}
    for folder in map(Path, folders):
        initial = folder / "initial" / "step0.pt"
        paths = [*([initial] if checkpoints.is_complete(initial) else []), *checkpoints.complete_checkpoints(folder)]
        if not paths:
            raise FileNotFoundError(f"{folder}: is no folder of complete checkpoints; --every takes save folders")
        for path in paths:
            record = (head := checkpoints.read_head(path)).record
            if not record.get("config") or record.get("batch") is None:
                raise ValueError(f"{path}: holds no record of its phase and batch; export it alone, without --every")
            name = revision_name(record.get("phase"), record["batch"])
            if (other := found.setdefault(name, head)) is not head:
                raise ValueError(f"{path}: would be called {name}, as would {other.path}; use two folders")
    return found


def export_every(folders: Sequence[str | Path], out: str | Path, *, dtype: str = "fp32", overwrite: bool = False,
                 objective: str | None = None, **options: Any) -> str:
    """Writes one folder in `out` for each of the `revisions` of save folders; returns a line that says what was done.

    Folders of the same checkpoint are left. Every refusal is made before the first weight is read. Options are
    those of `export_checkpoint`.
    """
    out, wanted, found = Path(out), [], revisions(folders)
    for name, (path, record, *_) in found.items():
        identity = {**{key: record.get(key) for key in ("run_name", "phase", "batch", "run_hash")},
                    "objective": chosen_objective(path, record, objective)[0], "dtype": DTYPES[dtype],
                    "trunk": options.get("trunk", False)}
        if overwrite or not (out / name).exists():
            wanted.append(name)
        elif (there := _identity(out / name)) != identity:
            raise ValueError(f"{out / name}: must be of {path}: {identity}, got {there or 'no export'}; give another "
                             "folder, or pass --overwrite")
    for name in track(wanted, "export", console=Console(stderr=True)):
        export_checkpoint(found[name].path, out / name, objective=objective, dtype=dtype, overwrite=overwrite,
                          **options)
    return f"{len(found)} revisions in {out}: {len(wanted)} written, {len(found) - len(wanted)} were there"


def _identity(folder: Path) -> dict[str, Any]:
    """Which checkpoint a folder holds, and how it was exported; empty where it does not say."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        block = content["ettin_foundry"]
        return {**block["checkpoint"], "objective": block["objective"], "dtype": content["dtype"],
                "trunk": content["architectures"] == ["ModernBertModel"]}
    return {}
