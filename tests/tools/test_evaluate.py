"""Claims about `evaluate`: its losses are those of transformers in float64 on the same targets."""

from __future__ import annotations

import json
import math
import types

import numpy as np
import parity
import pytest
import torch
import torch.nn.functional as F

from ettin_foundry.data.batch import Collator
from ettin_foundry.data.mixture import open_split
from ettin_foundry.data.stream import open_stream
from ettin_foundry.data.tokenizer import fingerprint, load
from ettin_foundry.hub.folder import export_model
from ettin_foundry.objectives.targets import TextVocab
from ettin_foundry.tools.evaluate import evaluate

LENGTH = 64
SHAPE = {"vocab_size": 512, "max_position_embeddings": LENGTH}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer_dir):
    """(Composer checkpoint, Hugging Face folder) of one random encoder."""
    model, folder = parity.nano("mlm", **SHAPE), tmp_path_factory.mktemp("encoder")
    parity.save(folder / "a.pt", model, "mlm", place=tokenizer_dir, tokenizer_fingerprint=None)
    return folder / "a.pt", export_model(model, model.config, load(tokenizer_dir), folder / "hf", objective="mlm")


@pytest.fixture(scope="module")
def reference(encoder):
    """transformers' model in float64."""
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(encoder[1], attn_implementation="eager").double().eval()


def logits_of(reference, ids, causal):
    """(T, V) of one document, no longer than a window; causal: with masks that hide what follows, in every layer."""
    hidden = torch.full((len(ids), len(ids)), -1e30, dtype=torch.float64).triu(1)[None, None]
    mask = hidden if causal else torch.zeros_like(hidden)
    reference.model._update_attention_mask = types.MethodType(lambda *_, **__: (mask, mask), reference.model)
    with torch.no_grad():
        return reference(input_ids=torch.tensor([ids])).logits[0]


def summed(parts):
    """Naive dense cross-entropy over (logits, labels) of all documents."""
    losses = torch.cat([F.cross_entropy(logits, torch.tensor(labels), reduction="none") for logits, labels in parts])
    hits = torch.cat([logits.argmax(-1) == torch.tensor(labels) for logits, labels in parts])
    loss = float(losses.mean())
    return {"loss": loss, "accuracy": float(hits.double().mean()), "perplexity": math.exp(loss), "targets": len(losses)}


def same(found, expected):
    assert found["targets"] == expected["targets"]
    for key in ("loss", "accuracy", "perplexity"):  # ours sums in fp32 over 1,000 to 10,000 targets
        assert found[key] == pytest.approx(expected[key], rel=2e-5), key


def test_encoder_under_clm_is_transformers_with_causal_masks_on_every_chunk(
        encoder, reference, data_set, tokenizer_dir):
    """Labels are made here from the stored chunks: the next token, and EOS only where the document ends."""
    data, tokenizer = open_split(data_set / "validation"), load(tokenizer_dir)
    parts = []
    for shard in range(data.num_shards):
        for sample, last in enumerate(data.last(shard)):
            ids = [tokenizer.cls_token_id, *map(int, data.chunk(shard, sample)), tokenizer.sep_token_id]
            labels = ids[1:] if last else ids[1:-1]
            parts.append((logits_of(reference, ids, causal=True)[:len(labels)], labels))
    same(evaluate(encoder[0], data_set, ["clm"])["clm"], summed(parts))


def test_mlm_and_mntp_are_transformers_on_the_loader_s_own_masks(encoder, reference, data_set, tokenizer_dir):
    """Masked places are taken from the loader; what is right there, from the stored tokens; mntp reads one before."""
    tokenizer = load(tokenizer_dir)
    stream = open_stream(dataset={"local": str(data_set), "split": "validation"}, max_seq_len=LENGTH, shuffle=False,
                         global_batch_size=256)
    rows = [row for row in stream.rows_of(0) if row.chunks]
    assert stream.num_steps == 1
    batch = Collator("mlm", TextVocab.from_tokenizer(tokenizer), max_seq_len=LENGTH, mask_rate=0.15, seed=21)(rows)
    at, before = [], []
    for row, *of_row in zip(rows, batch["sequence_id"], batch["input_ids"], batch["labels"]):
        numbers, masked, labels = (values.numpy() for values in of_row)
        for piece, chunk in enumerate(row.chunks):
            places = np.flatnonzero(numbers == piece)
            logits = logits_of(reference, masked[places].tolist(), causal=False)
            chosen = np.flatnonzero(labels[places] != -100)
            right = [int(chunk[place - 1]) for place in chosen]  # after BOS
            if right:
                at.append((logits[chosen], right))
                before.append((logits[chosen - 1], right))
    found = evaluate(encoder[1], data_set, ["mlm", "mntp"], mask_rate=0.15)
    same(found["mlm"], summed(at))
    same(found["mntp"], summed(before))


def test_a_decoder_under_mlm_sees_both_sides(encoder, data_set, tokenizer_dir, tmp_path):
    """The encoder's weights as a decoder's: no document is longer than either window, so the losses are the same."""
    decoder = parity.nano("clm", **SHAPE)
    decoder.load_state_dict(parity.nano("mlm", **SHAPE).state_dict())
    parity.save(tmp_path / "d.pt", decoder, "clm", place=tokenizer_dir, tokenizer_fingerprint=None)
    found, expected = (evaluate(path, data_set, ["mlm", "clm"]) for path in (tmp_path / "d.pt", encoder[0]))
    for objective in expected:  # other windows are other blocks of the attention, which round otherwise in fp32
        same(found[objective], expected[objective])


@pytest.mark.parametrize("change, message", [
    ({"objectives": ["mlm", "nsp"]}, "--objective"), ({"max_seq_len": 128}, "--max-seq-len"),
    ({"mask_rate": 1.5}, "mask_rate must be above 0"), ({"split": "test"}, "train, validation"),
    ({"data": "nowhere"}, "which holds none"), ({"source": "gone.pt"}, "gone.pt")])
def test_bad_input_is_refused(encoder, data_set, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(**{"source": encoder[0], "data": data_set, "objectives": ["mlm"], **change})


def test_damaged_weights_and_data_of_another_tokenizer_are_refused(encoder, data_set, tmp_path):
    content = torch.load(encoder[0], weights_only=True)
    content["state"]["model"]["model.output_bias"][3] = math.nan
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must give finite losses, got nan under mlm"):
        evaluate(tmp_path / "a.pt", data_set, ["mlm"])
    content["state"]["callbacks"]["Clock"] |= {
        "tokenizer": "gone", "tokenizer_fingerprint": json.dumps(fingerprint(parity.tiny_tokenizer()))}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="tokenizer must be the one that .*a.pt was trained with, got .*, whose"):
        evaluate(tmp_path / "a.pt", data_set, ["mlm"])
