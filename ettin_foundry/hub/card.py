"""The model card of an exported folder: README.md with the metadata that the Hugging Face Hub reads.

Written from the config and from facts of the run, never from memory: what is not known is not said. Its code blocks are
run by the tests, against every supported version of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ettin_foundry.model.config import CONTRASTIVE, MASKED_OBJECTIVES, EttinConfig
from ettin_foundry.model.hf_config import export_notes
from ettin_foundry.version import __version__

__all__ = ["CITATION", "FACTS", "MNTP_NOTE", "card", "data_table", "lowest_transformers", "training_table"]

FACTS = {
    "phase": "pretrain, extend, decay, cross or contrastive",
    "tokens": "real tokens trained on, all phases together",
    "checkpoint": "mapping with run_name, batch and run_hash: which checkpoint this was",
    "objective_schedule": "text: the objectives in the course of training, where they change or are mixed",
    "mask_rate": "share of tokens that were masked, in [0, 1]",
    "license": "identifier of the weights' licence, as the Hub spells it",
    "language": "list of language codes",
    "data": "list of {name, tokens, licence}: the training corpus",
    "base_model": "name of the model this one was continued from",
    "lineage": "list of mappings, oldest first: where the weights come from; an entry with merged_from lists what they are "
               "the mean of, one with averaged says how they were averaged while training",
    "parity": "text or mapping: measured difference to transformers",
}
"""What `card` can be told, all optional."""

MNTP_NOTE = ("this encoder was trained with mntp (masked next-token prediction): a masked token is predicted at the "
             "position BEFORE the mask, so the usual fill-mask pipeline, which reads the mask's own position, looks broken. "
             "Shift by one, as the model card shows, or finish with a little plain mlm training. Embeddings are unaffected")

_TRAINED_BY = {
    "mlm": "masked language modelling (mlm): of the chosen tokens 80% become the mask, 10% a random token, 10% stay",
    "mntp": "masked next-token prediction (mntp): a masked token is predicted at the position before it",
    "clm": "next-token prediction (clm)",
    "mdlm": "masked diffusion (mdlm): each text has a mask rate of its own, drawn from 0 to 1, all chosen tokens become the "
            "mask, and a target weighs one over that rate; a masked token is predicted at its own position",
    CONTRASTIVE: "contrastive (unsupervised SimCSE): a text's two embeddings under dropout are told apart from other texts'",
}

_LOAD_ENCODER = '''\
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "."  # this folder, or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder).eval()
inputs = tokenizer("def add(a, b): return a {mask_token} b", return_tensors="pt")
place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
with torch.no_grad():
    logits = model(**inputs).logits[0, place{shift}]{why}
print(tokenizer.convert_ids_to_tokens(logits.topk(5).indices.tolist()))
'''

_LOAD_DECODER = '''\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
inputs = tokenizer("def add(a, b):", return_tensors="pt")  # the tokenizer puts the first token, never the last
output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
'''

CITATION = '''\
@inproceedings{weller2026ettin,
  title     = {Seq vs Seq: An Open Suite of Paired Encoders and Decoders},
  author    = {Weller, Orion and Ricci, Kathryn and Marone, Marc and Chaffin, Antoine and Lawrie, Dawn
               and Van Durme, Benjamin},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
  note      = {arXiv:2507.11412}
}
'''


def card(config: EttinConfig, *, objective: str, name: str, facts: Mapping[str, Any] | None = None,
         mask_token: str = "[MASK]") -> str:
    """The text of README.md.

    Args:
        objective: `mlm`, `mntp`, `mdlm` or `clm`. name: the model's title.
        facts: see `FACTS`; unknown names are refused, missing ones leave their line out.

    Raises:
        ValueError: an unknown fact.
    """
    facts = {key: value for key, value in (facts or {}).items() if value not in (None, [], {}, "")}
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise ValueError(f"facts: unknown key(s) {', '.join(unknown)}; a card can be told {', '.join(FACTS)}")
    kind = "decoder" if config.causal else "encoder"
    size = f"{config.size} " if config.size else ""
    parts = [_front_matter(config, facts), f"# {name}\n",
             f"An Ettin {kind} ({size}{config.num_parameters:,} parameters), trained with ettin_foundry {__version__}. "
             f"Ettin encoders and decoders are pairs: the same architecture and the same data in the same order, "
             f"{'causal attention and next tokens' if config.causal else 'bidirectional attention and masked tokens'} "
             "here, the other way round in its twin.\n"]
    if objective == "mntp":
        parts.append(f"> **Mind the position:** {MNTP_NOTE}.\n")
    parts += ["## Load\n", _load(config, objective, mask_token), "## Training\n", training_table(config, objective, facts)]
    if "data" in facts:
        parts += ["## Data\n", data_table(facts["data"])]
    parts += ["## Held to transformers\n", _parity(config, facts), "## Limits\n", _limits(config),
              "## Citation\n", f"```bibtex\n{CITATION}```\n"]
    return "\n".join(parts)


def _front_matter(config: EttinConfig, facts: Mapping[str, Any]) -> str:
    # JSON is YAML: quoting is safe whatever a name holds
    entries: dict[str, Any] = {
        "license": facts.get("license", "unknown"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if config.causal else "fill-mask",
        "tags": ["ettin", "modernbert", "decoder" if config.causal else "encoder"],
    }
    for fact, key in (("language", "language"), ("base_model", "base_model")):
        if fact in facts:
            entries[key] = facts[fact]
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()) + "---\n"


def _load(config: EttinConfig, objective: str, mask_token: str) -> str:
    needed = f"Needs transformers {lowest_transformers(config)} or newer, and no remote code.\n\n"
    if config.causal:
        return f"{needed}```python\n{_LOAD_DECODER}```\n"
    shift, why = (" - 1", "  # one before the mask: see above") if objective == "mntp" else ("", "")
    code = _LOAD_ENCODER.format(mask_token=mask_token, shift=shift, why=why)
    return f"{needed}```python\n{code}```\n"


def lowest_transformers(config: EttinConfig) -> str:
    """The oldest version that computes this model's function."""
    if not config.causal:
        return "4.48"
    return "4.56" if config.local_rope_theta == config.global_rope_theta else "5.0"


def training_table(config: EttinConfig, objective: str, facts: Mapping[str, Any]) -> str:
    """What the model is and how it was trained, as a table; arguments as for `card`."""
    local_layers = sum(kind == "sliding_attention" for kind in config.layer_types)
    left, right = config.local_window
    lineage = [dict(entry) for entry in facts.get("lineage", ())]
    rows = {
        "objective": _TRAINED_BY[objective],
        "objectives in training": facts.get("objective_schedule"),
        "mask rate": f"{facts['mask_rate']:g}" if facts.get("mask_rate") and objective in MASKED_OBJECTIVES else None,
        "phase": facts.get("phase"),
        "tokens seen": f"{facts['tokens']:,}" if "tokens" in facts else None,
        "context": f"{config.max_position_embeddings:,} tokens",
        "shape": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads, "
                 f"vocabulary {config.vocab_size:,}",
        "local layers": f"{local_layers} of {config.num_hidden_layers}; each token sees {left} tokens back"
                        + (f" and {right} ahead" if right else ""),
        "rotary base": f"{config.global_rope_theta:,.0f} in global layers, {config.local_rope_theta:,.0f} in local ones",
        "dropout": f"{config.attn_out_dropout:g} on the output of attention, in training only",
        "checkpoint": _checkpoint(facts["checkpoint"]) if "checkpoint" in facts else None,
        "continued from": _continued(lineage) or facts.get("base_model"),
        "merged from": _merged(lineage),
        "averaged": "; ".join(str(entry["averaged"]) for entry in lineage if "averaged" in entry) or None,
    }
    return _table(("", ""), [(key, str(value)) for key, value in rows.items() if value is not None])


def _checkpoint(checkpoint: Mapping[str, Any]) -> str:
    return f"batch {checkpoint['batch']:,} of {checkpoint['run_name']}, whose resolved config has the sha256 " + str(
        checkpoint["run_hash"])


def _continued(lineage: Iterable[Mapping[str, Any]]) -> str:
    return "; then ".join(", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)
                          for entry in lineage if not {"merged_from", "averaged"} & entry.keys())


def _merged(lineage: Iterable[Mapping[str, Any]]) -> str | None:
    lists = [entry["merged_from"] for entry in lineage if "merged_from" in entry]
    return "; then ".join(", ".join(f"{part['source']} (weight {part['weight']:.4g}, {part.get('tokens') or 0:,} tokens)"
                                    for part in parts) for parts in lists) or None


def data_table(sources: Iterable[Mapping[str, Any]]) -> str:
    """The fact `data` as a table."""
    rows = [(str(s.get("name", "?")), f"{s['tokens']:,}" if s.get("tokens") is not None else "not recorded",
             str(s.get("licence") or "not recorded")) for s in sources]
    return _table(("source", "tokens", "licence"), rows)


def _parity(config: EttinConfig, facts: Mapping[str, Any]) -> str:
    name = "ModernBertDecoderForCausalLM" if config.causal else "ModernBertForMaskedLM"
    text = (f"The weights were read back after writing and are equal bit for bit. ettin_foundry's tests hold its model to "
            f"transformers' `{name}` (`make parity`): largest difference of logits under 1e-4 in fp32, for inputs of 16, "
            f"200 and 1,500 tokens.\n")
    measured = facts.get("parity")
    if isinstance(measured, Mapping):
        text += "\nMeasured on these weights: " + ", ".join(f"{k} {v}" for k, v in measured.items()) + ".\n"
    elif measured:
        text += f"\nMeasured on these weights: {measured}\n"
    return text


def _limits(config: EttinConfig) -> str:
    lines = [
        "The model repeats what its data holds, mistakes and prejudice included; it has not been aligned or filtered.",
        f"Inputs longer than {config.max_position_embeddings:,} tokens were not seen in training.",
        "No evaluation, no contamination check and no measurement of bias came with this export.",
        *export_notes(config),
    ]
    if config.causal:
        lines.append("For sequence classification transformers draws a fresh head for decoders, and keeps the trained one "
                     "for encoders; a comparison of fine-tuned pairs should say so.")
    return "".join(f"- {line}\n" for line in lines)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def clean(cell: str) -> str:
        return cell.replace("|", "\\|").replace("\n", " ")

    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(clean(cell) for cell in line) + " |\n" for line in lines)
