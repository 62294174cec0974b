"""The model card: valid metadata, and every line backed by a fact. That its code runs is tested with the exports."""

import yaml

from ettin_foundry.hub.card import card
from ettin_foundry.model.config import EttinConfig


def shape(causal: bool, **changes) -> EttinConfig:
    return EttinConfig.for_size("nano", causal=causal, vocab_size=320, **changes)



def test_card_metadata_is_yaml_whatever_the_names_hold():
    facts = {"license": "mit", "base_model": 'a: "b" # c', "language": ["en", "no"], "tokens": 1_234_567, "mask_rate": 0.3,
             "phase": "extend", "data": [{"name": "a|b", "tokens": 10, "licence": "CC-BY-4.0"}, {"name": "c"}],
             "lineage": [{"objective": "clm", "tokens": 99}], "parity": {"4.57.6": 1.6e-5}}
    text = card(shape(False), objective="mlm", name="x", facts=facts)
    meta = yaml.safe_load(text.split("---\n")[1])
    assert meta == {"license": "mit", "library_name": "transformers", "pipeline_tag": "fill-mask", "language": ["en", "no"],
                    "base_model": 'a: "b" # c', "tags": ["ettin", "modernbert", "encoder"]}  # "no" is no boolean here
    for part in ("| mask rate | 0.3 |", "1,234,567", "extend", r"| a\|b | 10 | CC-BY-4.0 |", "| c | not recorded |",
                 "objective clm, tokens 99", "4.57.6 1.6e-05", "2507.11412", "64 tokens back and 64 ahead"):
        assert part in text, part


def test_card_of_masked_diffusion_reads_the_masks_own_position():
    text = card(shape(False), objective="mdlm", name="x", facts={"mask_rate": 0.3})
    assert "masked diffusion (mdlm)" in text and "predicted at its own position" in text and "logits[0, place]" in text
    assert "mask rate |" not in text and "BEFORE" not in text  # it draws its rate


def test_card_says_where_weights_come_from():
    lineage = [{"objective": "clm", "tokens": 99, "phase": None}, {"averaged": "EMA(half_life='9tok')"}, {"merged_from": [
        {"source": "a/1.pt", "weight": 0.25, "tokens": 1000}, {"source": "a/2.pt", "weight": 0.75, "tokens": None}]}]
    text = card(shape(False), objective="mlm", name="x", facts={
        "lineage": lineage, "objective_schedule": "clm, then mlm",
        "checkpoint": {"run_name": "r", "batch": 1234, "run_hash": "ab"}})
    for row in ("continued from | objective clm, tokens 99", "averaged | EMA(half_life='9tok')",
                "merged from | a/1.pt (weight 0.25, 1,000 tokens), a/2.pt (weight 0.75, 0 tokens)",
                "objectives in training | clm, then mlm",
                "checkpoint | batch 1,234 of r, whose resolved config has the sha256 ab"):
        assert f"| {row} |" in text, row


def test_card_says_nothing_that_is_not_known():
    text = card(shape(True), objective="clm", name="x")
    assert "None" not in text and "## Data" not in text and "mask rate" not in text and "tokens seen" not in text
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    assert "63 tokens back |" in text
