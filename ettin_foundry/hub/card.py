"""The model card of an exported folder: README.md, with the Hub's metadata and code that the tests run.

model_card.md beside this file is its template.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.hf_config import export_notes
from ettin_foundry.version import __version__

MNTP_NOTE = "a masked token is predicted at the position BEFORE the mask: read it there, as the card's code does"

_TEMPLATE = Path(__file__).with_name("model_card.md")


def card(config: EttinConfig, *, objective: str, name: str, facts: Mapping[str, Any] | None = None,
         mask_token: str = "[MASK]", trunk: bool = False) -> str:
    """The text of README.md, titled `name`; trunk: the folder has no head.

    facts, all optional: phase (the last), tokens (real ones, of all phases), objective_schedule (text, where objectives
    change), license (as the Hub spells it), checkpoint (a mapping with run_name, phase, batch and run_hash), lineage
    (mappings, oldest first: where the weights come from, or, merged_from, what they are the mean of).
    """
    facts = facts or {}
    kind = "decoder" if config.causal else "encoder"
    one_base = config.local_rope_theta == config.global_rope_theta
    data = ModelCardData(license=facts.get("license") or "unknown", library_name="transformers",
                         pipeline_tag="text-generation" if config.causal else
                         "feature-extraction" if trunk else "fill-mask",
                         tags=["ettin", "modernbert", kind])
    text = ModelCard.from_template(
        data, template_path=str(_TEMPLATE), name=name, kind=kind, config=config, trunk=trunk, version=__version__,
        shift=" - 1" if objective == "mntp" and not trunk else "", mntp_note=MNTP_NOTE, mask_token=mask_token,
        transformers="4.48" if not config.causal else "4.56" if one_base else "5.0",
        objective=objective, facts=facts, notes=export_notes(config))
    return f"{text}\n"
