"""A trunk as a sentence-transformers folder: transformers' files, the pooling's, and a card that shows their use.

Loaded with `SentenceTransformer(folder)`, which finds transformers' `AutoModel` classes (`ModernBertModel`,
`ModernBertDecoderModel`), so the weights have the names of those: no head, no prefix. The tokenizer puts BOS and EOS around
a text for encoders and decoders alike, for so are the rows of training. A trunk that never had the contrastive stage is
written too, with the mean over its tokens; the card says so. Files of language models are written in hf.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ettin_foundry.hub import card as cards
from ettin_foundry.hub.folder import POOLING, check_target, differing_tensors, new_folder, write_json
from ettin_foundry.model import weights as hf
from ettin_foundry.model.config import CONTRASTIVE, EttinConfig
from ettin_foundry.model.hf_config import config_json, export_notes
from ettin_foundry.version import __version__

__all__ = ["POOLINGS", "export_sentence_model", "sentence_card"]

POOLINGS = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
"""Our names and sentence-transformers'."""

_MODULES = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": POOLING, "type": "sentence_transformers.models.Pooling"}]

_USE = '''\
from sentence_transformers import SentenceTransformer

folder = "."  # this folder, or the model's name on the Hub
model = SentenceTransformer(folder)
texts = ["A dog runs on the beach.", "A puppy plays by the sea.", "Rates were left unchanged."]
embeddings = model.encode(texts)
print(embeddings.shape)
print(model.similarity(embeddings, embeddings))  # cosines
'''


def export_sentence_model(model: Any, config: EttinConfig, tokenizer: Any, folder: str | Path, *, objective: str,
                          pooling: str = "mean", facts: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Writes the folder beside its place, reads it back, and renames it into place.

    Args:
        model, config, tokenizer, facts, overwrite: as for `hf.export_model`.
        objective: what the trunk was last trained on: `simcse`, or an objective of language modelling.
        pooling: `mean` or `last`.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown pooling, and what `hf.export_model` refuses of folder, tokenizer and weights.
    """
    from ettin_foundry.data.tokenizer import special_ids

    folder, facts = Path(folder), dict(facts or {})
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: {pooling!r} given; {' or '.join(POOLINGS)} is possible")
    check_target(folder, overwrite)
    tokenizer = hf.load_tokenizer(tokenizer, config.of_kind(causal=False))
    whole = hf.to_hf(hf.plain_state(model), config)
    weights = {name.removeprefix("model."): tensor for name, tensor in whole.items() if name.startswith("model.")}
    written = config_json(config, objective=objective, special_ids=special_ids(tokenizer), tokens=facts.get("tokens"),
                          lineage=facts.get("lineage") or (), checkpoint=facts.get("checkpoint"))
    written["architectures"] = ["ModernBertDecoderModel" if config.causal else "ModernBertModel"]
    written["ettin_foundry"] = {**written["ettin_foundry"], "pooling": pooling}
    with new_folder(folder) as partial:
        hf.write_files(partial, written, weights, tokenizer)
        _write_modules(partial, config, pooling)
        text = sentence_card(config, objective=objective, pooling=pooling, name=folder.name, facts=facts)
        (partial / "README.md").write_text(text, encoding="utf-8")
        differing = differing_tensors(partial, weights)  # the disk's word is taken for nothing
        if differing or json.loads((partial / "config.json").read_text(encoding="utf-8")) != written:
            what = ", ".join(differing[:4]) or "config"
            raise ValueError(f"{folder}: what was written does not read back the same ({what}). Check the disk, then export "
                             "again")
    return folder


def _write_modules(folder: Path, config: EttinConfig, pooling: str) -> None:
    (folder / POOLING).mkdir()
    modes = dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens",
                           "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens",
                           "pooling_mode_lasttoken"), False)
    write_json(folder / POOLING / "config.json", {
        "word_embedding_dimension": config.hidden_size, **modes, POOLINGS[pooling]: True, "include_prompt": True})
    (folder / "modules.json").write_text(json.dumps(_MODULES, indent=2) + "\n", encoding="utf-8")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": config.max_position_embeddings,
                                                      "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None,
                                                              "similarity_fn_name": "cosine"})


def sentence_card(config: EttinConfig, *, objective: str, pooling: str, name: str,
                  facts: Mapping[str, Any] | None = None) -> str:
    """The text of README.md; arguments as for `export_sentence_model` and `card.card`."""
    facts = {key: value for key, value in (facts or {}).items() if value not in (None, [], {}, "")}
    kind = "decoder" if config.causal else "encoder"
    entries: dict[str, Any] = {
        "license": facts.get("license", "unknown"), "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "ettin", "modernbert", kind],
        **{key: facts[key] for key in ("language", "base_model") if key in facts}}
    taken = "the mean over a text's tokens" if pooling == "mean" else "the state of a text's last token"
    parts = ["---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()) + "---\n", f"# {name}\n",
             f"An Ettin {kind} ({f'{config.size} ' if config.size else ''}{config.num_parameters:,} parameters with its "
             f"head) that gives one vector of {config.hidden_size} numbers for a text: {taken}, special tokens included. "
             f"Trained with ettin_foundry {__version__}.\n"]
    if objective != CONTRASTIVE:
        parts.append(f"> **No contrastive stage:** this trunk was trained with {objective} only. Nothing has taught its "
                     "vectors to tell texts apart; take it as a start for fine-tuning.\n")
    parts += ["## Use\n", f"Needs sentence-transformers 3 or newer with transformers {cards.lowest_transformers(config)} or "
              "newer, and no remote code.\n",
              f"```python\n{_USE}```\n", "## Training\n", cards.training_table(config, objective, facts)]
    if "data" in facts:
        parts += ["## Data\n", cards.data_table(facts["data"])]
    limits = [f"Texts are cut at {config.max_position_embeddings:,} tokens, the longest of the last stage. Positions are "
              "rotary, so the trunk takes as many as the stages before had: set `model.max_seq_length`.",
              "No evaluation, no contamination check and no measurement of bias came with this export.",
              *export_notes(config)]
    parts += ["## Limits\n", "".join(f"- {line}\n" for line in limits), "## Citation\n", f"```bibtex\n{cards.CITATION}```\n"]
    return "\n".join(parts)
