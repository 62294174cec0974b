"""Hugging Face folders: of one model, or of every checkpoint of a run, named as the original's tags. Whole or not there."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.hub.card import MNTP_NOTE, card
from ettin_foundry.hub.load import chosen_objective, load_model
from ettin_foundry.model.config import OBJECTIVES, EttinConfig
from ettin_foundry.model.hf_config import config_json, read_config
from ettin_foundry.model.weights import WEIGHTS, plain_state, to_hf
from ettin_foundry.training import checkpoints

log = logging.getLogger(__name__)


def export_model(model: Any, config: EttinConfig, tokenizer: Any, folder: str | Path, *, objective: str,
                 facts: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes a Hugging Face folder: config, safetensors, tokenizer, generation config (decoders), card.

    Everything is written beside the target, read back and compared bit by bit, then renamed into place.

    Args:
        model: an `EttinModel`, an `Ettin`, or a state dict of either. overwrite: replace an earlier export of this name.
        tokenizer: a fast tokenizer of transformers, or the name of a folder that holds one.
        objective: what the head was last trained on. facts: see `card.FACTS`; some also go into config.json.
    """
    folder, facts = Path(folder), dict(facts or {})
    if objective not in OBJECTIVES or (objective == "clm") != config.causal:
        raise ValueError(f"objective must be {'clm' if config.causal else 'mlm or mntp'} of this model, got {objective!r}")
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
        differing = [name for name, tensor in weights.items()
                     if name not in stored or not torch.equal(stored[name].view(torch.int32), tensor.view(torch.int32))]
        if differing or read_config(partial / "config.json") != (config, objective):
            raise ValueError(f"{folder}: {', '.join(differing[:4]) or 'config'} does not read back the same; check the disk")
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
    _write_json(folder / "config.json", config)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save_pretrained(str(folder))
    # one class that every version of transformers has, whatever class read the training tokenizer
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", {
        **settings, "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: getattr(tokenizer, name) for name in ("model_max_length", "model_input_names", "padding_side")}})
    if config["architectures"] == ["ModernBertDecoderForCausalLM"]:  # without these ids `generate` never stops
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        _write_json(folder / "generation_config.json", {name: config[name] for name in ids})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}: is a link or a file; give the name of a new folder")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder}: exists and is not empty; give another name, or pass --overwrite to replace it")
        if not (folder / "config.json").is_file() or any(entry.is_dir() for entry in folder.iterdir()):
            raise ValueError(f"{folder}: is not an exported model, so it is not overwritten; give another name")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which replaces `folder` when the block ends; if anything fails, the old one stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new, earlier = Path(beside, "new"), Path(beside, "earlier")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(earlier)
        try:
            new.rename(folder)
        finally:
            if earlier.exists() and not folder.exists():
                earlier.rename(folder)


def revision_name(phase: str | None, batch: int) -> str:
    """`step{N}`, `ext{N}`, `decay{N}` as the original's tags; other phases by their own name; `ba{N}` without one."""
    prefix = {"pretrain": "step", "extend": "ext"}.get(phase or "", phase or "")
    return f"{prefix if re.fullmatch('[a-z][a-z_]*', prefix) else 'ba'}{batch}"


@dataclass(frozen=True)
class Revision:
    path: Path
    identity: Mapping[str, Any]  # run_name, phase, batch, run_hash, and the objective it is exported as


def _find_revisions(folders: Sequence[str | Path], objective: str | None) -> dict[str, Revision]:
    """Every complete checkpoint of save folders by name, in the order of the folders and then of batches, step0 first."""
    found: dict[str, Revision] = {}
    for folder in map(Path, folders):
        initial = folder / "initial" / "step0.pt"
        paths = [*([initial] if checkpoints.is_complete(initial) else []), *checkpoints.complete_checkpoints(folder)]
        if not paths:
            raise FileNotFoundError(f"{folder}: is no folder of complete checkpoints; --every takes save folders of runs")
        for path in paths:
            record = checkpoints.read_head(path).record
            if not record.get("config") or record.get("batch") is None:
                raise ValueError(f"{path}: holds no record of its phase and batch; export it alone, without --every")
            name = "step0" if path == initial else revision_name(record.get("phase"), record["batch"])
            if name in found:
                raise ValueError(f"{path}: would be called {name}, as would {found[name].path}; export to different folders")
            identity = {key: record.get(key) for key in ("run_name", "phase", "batch", "run_hash")}
            found[name] = Revision(path, {**identity, "objective": chosen_objective(path, record, objective)[0]})
    return found


def export_every(folders: Sequence[str | Path], out: str | Path, *, objective: str | None = None,
                 tokenizer: str | None = None, facts: Mapping[str, Any] | None = None, overwrite: bool = False) -> str:
    """Writes one folder in `out` for each complete checkpoint of save folders; returns a line that says what was done.

    Whole folders of the same checkpoint are left. Every refusal is made before the first weight is read. `objective` and
    `tokenizer` are as for `load.load_model` and `LoadedModel.tokenizer_name`, `facts` for every card.
    """
    from rich.console import Console
    from rich.progress import track

    out = Path(out)
    revisions = _find_revisions(folders, objective)
    wanted = [name for name, revision in revisions.items() if overwrite or not _is_there(out / name, revision)]
    for name in track(wanted, "export", console=Console(stderr=True)):
        model = load_model(revisions[name].path, objective)
        export_model(model.state, model.config, model.tokenizer_name(tokenizer), out / name,
                     objective=model.objective, facts={**model.facts, **(facts or {})}, overwrite=overwrite)
    return f"{len(revisions)} revisions in {out}: {len(wanted)} written, {len(revisions) - len(wanted)} were there"


def _is_there(folder: Path, revision: Revision) -> bool:
    """Whether a whole folder of this very checkpoint stands there; one of another is refused."""
    if not folder.exists():
        return False
    try:
        block = json.loads((folder / "config.json").read_text(encoding="utf-8"))["ettin_foundry"]
        there = {**block["checkpoint"], "objective": block["objective"]}
    except (OSError, ValueError, LookupError, TypeError):
        there = {}
    for key, value in revision.identity.items():
        if there.get(key) != value:
            raise ValueError(f"{folder}: {key} must be {value!r} as in {revision.path}, got {there.get(key)!r}; give "
                             "another folder, or pass --overwrite")
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            return True  # opening compares the header with the file's length
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: its {WEIGHTS} is not whole ({error}); pass --overwrite") from error
