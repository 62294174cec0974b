"""The model that is evaluated: what kind it is, and what its mask predicts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

log = logging.getLogger(__name__)

OBJECTIVES = {"encoder": ("mlm", "mntp"), "decoder": ("clm",)}


@dataclass(frozen=True)
class Subject:
    """A Hugging Face folder or hub id, checked before anything is loaded.

    objective: `clm`; `mlm`, where position i of the output predicts token i; or `mntp`, where position i - 1 does.
    max_length: the most tokens of a row, special ones counted.
    """

    name: str
    revision: str | None
    kind: str
    objective: str
    max_length: int
    config: Any
    tokenizer: Any

    @property
    def pooling(self) -> str:
        """How a text becomes one vector: sentence-transformers' name of it (paper, retrieval: mean or last token)."""
        return "mean" if self.kind == "encoder" else "lasttoken"

    def model(self, auto: Any = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32,
              **options: Any) -> Any:
        """The weights, in evaluation mode, by transformers' class `auto` (the language model's if None)."""
        auto = auto or (AutoModelForMaskedLM if self.kind == "encoder" else AutoModelForCausalLM)
        model = auto.from_pretrained(self.name, revision=self.revision, dtype=dtype, **options)
        return model.to(device).eval()

    def needs(self, kind: str, task: str) -> None:
        """Refuses a model of the other kind.

        Raises:
            ValueError: when the model is not of `kind`.
        """
        if self.kind != kind:
            other = self.kind
            raise ValueError(f"{task} needs {_article(kind)}, got {_article(other)} ({self.name}); "
                             f"leave the task out, or name a model of the other kind")


def read_subject(name: str, *, revision: str | None = None, objective: str | None = None) -> Subject:
    """Reads config and tokenizer of a folder or hub id, and refuses what cannot be evaluated.

    objective: of the head; None takes what the export records, else mlm for encoders and clm for decoders.

    Raises:
        ValueError: no model there, neither kind, an objective of the other kind, a tokenizer of another vocabulary.
    """
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"MODEL must be a folder with a config.json, got {name}; `ettin export` writes one")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"MODEL must be an exported folder or a hub id, got {name}: {_first_line(error)}") from error
    kind = _kind(config, name)
    objective = _objective(config, kind, name, objective)
    if folder.exists() and not (folder / "README.md").is_file():
        log.warning("%s: has no card (README.md); what it was trained on is not known here", name)
    tokenizer = _tokenizer(name, revision, kind, config)
    longest = getattr(config, "max_position_embeddings", None) or 1024
    return Subject(name, revision, kind, objective, min(longest, tokenizer.model_max_length), config, tokenizer)


def _kind(config: Any, name: str) -> str:
    """By the class that wrote the weights."""
    for architecture in getattr(config, "architectures", None) or []:
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            return "decoder"
        if architecture.endswith("ForMaskedLM"):
            return "encoder"
    raise ValueError(f"architectures in {name}'s config.json must name a ...ForMaskedLM or a ...ForCausalLM, got "
                     f"{getattr(config, 'architectures', None)}; export the model with its head")


def _objective(config: Any, kind: str, name: str, asked: str | None) -> str:
    recorded = (getattr(config, "ettin_foundry", None) or {}).get("objective")
    if asked and asked not in OBJECTIVES[kind]:
        raise ValueError(f"--objective must be {' or '.join(OBJECTIVES[kind])} for {_article(kind)}, got {asked}")
    if asked and recorded and asked != recorded:
        raise ValueError(f"--objective must be {recorded}, as {name} records, got {asked}; leave it out")
    if recorded is None and asked is None and kind == "encoder" and "enc-from-dec" in name:
        log.warning("%s: records no objective; taken as mntp by its name (--objective mlm says otherwise)", name)
        return "mntp"
    return asked or recorded or ("mlm" if kind == "encoder" else "clm")


def _tokenizer(name: str, revision: str | None, kind: str, config: Any) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} must hold a tokenizer: {_first_line(error)}; export the model anew") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer of {name} must have at most the model's {config.vocab_size} entries, got "
                         f"{len(tokenizer)}; it belongs to another model")
    if kind == "encoder" and tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {name} must have a mask token, got none; it belongs to another model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out wherever it stands
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
