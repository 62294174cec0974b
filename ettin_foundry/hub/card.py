"""The model card of an exported folder: README.md, with the Hub's metadata and code that the tests run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.hf_config import export_notes
from ettin_foundry.version import __version__

MNTP_NOTE = "a masked token is predicted at the position BEFORE the mask: read it there, as the card's code does"

_TRAINED_BY = {
    "mlm": "masked language modelling (mlm): of the chosen tokens 80% become the mask, 10% a random token, 10% stay",
    "mntp": "masked next-token prediction (mntp): a masked token is predicted at the position before it",
    "clm": "next-token prediction (clm)",
}

_CARD = '''\
---
{metadata}
---

# {name}

An Ettin {kind} ({size}{parameters:,} parameters), trained with ettin_foundry {version}. Ettin encoders and decoders are
pairs: the same architecture and the same data in the same order, {attention} here, the other way round in its twin.
{note}
## Load

Needs transformers {transformers} or newer, and no remote code.

```python
{code}```

## In other programs

{programs}
## Training

{training}
## Limits

{limits}
## Citation

```bibtex
@inproceedings{{weller2026ettin, title = {{Seq vs Seq: An Open Suite of Paired Encoders and Decoders}},
  author = {{Weller, Orion and Ricci, Kathryn and Marone, Marc and Chaffin, Antoine and Lawrie, Dawn and
    Van Durme, Benjamin}},
  booktitle = {{International Conference on Learning Representations}}, year = {{2026}}, note = {{arXiv:2507.11412}} }}
```
'''

_LOAD_ENCODER = '''\
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "."  # this folder, or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForMaskedLM.from_pretrained(folder).eval()
inputs = tokenizer("def add(a, b): return a {mask_token} b", return_tensors="pt")
place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
with torch.no_grad():
    logits = model(**inputs).logits[0, place{shift}]
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

_PROGRAMS_ENCODER = '''\
- sentence-transformers: `SentenceTransformer("{name}")`, a mean over tokens, to be trained before use.
- vLLM: `LLM("{name}", hf_overrides={{"architectures": ["ModernBertModel"]}})`; it takes the first token's vector unless
  told to take the mean.
- llama.cpp reads the trunk alone: `AutoModel.from_pretrained("{name}").save_pretrained("trunk")`, copy the tokenizer's
  files there and convert that to GGUF. Its converter knows the tokenizers of published models only.
'''

_PROGRAMS_DECODER = '''\
- vLLM and llama.cpp (GGUF) have no ModernBertDecoder: serve it with transformers, or from an export by `torch.onnx`.
'''


def card(config: EttinConfig, *, objective: str, name: str, facts: Mapping[str, Any] | None = None,
         mask_token: str = "[MASK]") -> str:
    """The text of README.md, titled `name`.

    facts, all optional: phase (the last), tokens (real ones, of all phases), objective_schedule (text, where objectives
    change), license (as the Hub spells it), checkpoint (a mapping with run_name, phase, batch and run_hash), lineage
    (mappings, oldest first: where the weights come from, or, merged_from, what they are the mean of).
    """
    facts = {key: value for key, value in (facts or {}).items() if value}
    kind, attention = (("decoder", "causal attention and next tokens") if config.causal else
                       ("encoder", "bidirectional attention and masked tokens"))
    shift = " - 1" if objective == "mntp" else ""
    one_base = config.local_rope_theta == config.global_rope_theta
    limits = [
        "The model repeats what its data holds, mistakes and prejudice included; it has not been aligned or filtered.",
        f"Inputs longer than {config.max_position_embeddings:,} tokens were not seen in training.",
        "No evaluation, no contamination check and no measurement of bias came with this export.",
        *export_notes(config),
        *["For sequence classification transformers draws a fresh head, where it keeps an encoder's."][:config.causal]]
    return _CARD.format(
        metadata=ModelCardData(license=facts.get("license", "unknown"), library_name="transformers",
                               pipeline_tag="text-generation" if config.causal else "fill-mask",
                               tags=["ettin", "modernbert", kind]),
        name=name, kind=kind, size=f"{config.size} " if config.size else "", parameters=config.num_parameters,
        attention=attention, version=__version__, note=f"\n> **Mind the position:** {MNTP_NOTE}.\n" if shift else "",
        transformers="4.48" if not config.causal else "4.56" if one_base else "5.0",
        programs=(_PROGRAMS_DECODER if config.causal else _PROGRAMS_ENCODER).format(name=name),
        code=_LOAD_DECODER if config.causal else _LOAD_ENCODER.format(mask_token=mask_token, shift=shift),
        training=_training_table(objective, facts), limits="".join(f"- {line}\n" for line in limits))


def _training_table(objective: str, facts: Mapping[str, Any]) -> str:
    """What config.json does not say."""
    lineage, checkpoint = facts.get("lineage", ()), facts.get("checkpoint")
    merged = [part for entry in lineage for part in entry.get("merged_from", ())]
    rows = {
        "objective": _TRAINED_BY[objective],
        "objectives in training": facts.get("objective_schedule"),
        "phase": facts.get("phase"),
        "tokens seen": f"{facts['tokens']:,}" if "tokens" in facts else None,
        "checkpoint": checkpoint and f"batch {checkpoint['batch']:,} of {checkpoint['run_name']}, whose resolved "
                                     f"config has the sha256 {checkpoint['run_hash']}",
        "continued from": "; then ".join(
            ", ".join(f"{key} {value}" for key, value in entry.items() if value is not None)
            for entry in lineage if "merged_from" not in entry),
        "mean of": ", ".join(f"{part['source']} ({part.get('tokens') or 0:,} tokens)" for part in merged),
    }
    return "|  |  |\n| --- | --- |\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value)
