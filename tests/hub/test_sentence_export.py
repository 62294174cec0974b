"""Sentence-transformers folders: the real library loads them and gives our own embeddings."""

import json
import re

import parity
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

from ettin_foundry.cli import main as cli
from ettin_foundry.hub.sentence_export import export_sentence_model
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import weights_checkpoint
from ettin_foundry.training.contrastive import EttinContrastive

VOCAB = 320
# no spaces at the ends: versions of the library differ in whether they strip them
TEXTS = ["def add(a, b):", "two numbers, and then some more text" * 24, "sum", "return a + b  # the sum of two numbers"]
# both sum in fp32 but in another order, over 4 layers: 2e-6 seen at vectors whose entries reach 3
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = parity.tiny_tokenizer()
    tokenizer.save_pretrained(str(folder))
    return tokenizer, str(folder)


def model_of(pooling="mean", **changes):
    model = EttinContrastive(**{"size": "nano", "objective": "simcse", "max_seq_len": 256, "vocab_size": VOCAB,
                                "pooling": pooling, **changes})
    model.model.load_state_dict(parity.random_model(model.config).state_dict())
    return model.eval()


def ours(model, tokenizer, texts):
    """Our embeddings of [CLS] text [SEP], each text alone in the stream; texts longer than the context are cut."""
    out = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)[:model.config.max_position_embeddings - 2]
        ids = torch.tensor([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id])
        flat = {"input_ids": ids, "position_ids": torch.arange(len(ids)), "max_seqlen": len(ids), "num_tokens": len(ids),
                "cu_seqlens": torch.tensor([0, len(ids)], dtype=torch.int32)}
        with torch.no_grad():
            out.append(model.embed(flat)[0, 0])
    return torch.stack(out)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_library_gives_our_embeddings(tokenizer, tmp_path, pooling):
    model = model_of(pooling, global_rope_theta=160_000.0)
    folder = export_sentence_model(model, model.config, tokenizer[1], tmp_path / "out", objective="simcse", pooling=pooling,
                                   facts={"tokens": 123_456, "lineage": [{"objective": "mlm", "tokens": 100}]})
    loaded = SentenceTransformer(str(folder), device="cpu")
    assert loaded.max_seq_length == 256 and loaded.similarity_fn_name == "cosine"
    assert type(loaded[0].auto_model).__name__ == "ModernBertModel"
    theirs = loaded.encode(TEXTS, batch_size=4, convert_to_tensor=True)  # one padded batch
    expected = ours(model, tokenizer[0], TEXTS)
    assert expected.abs().max() > 0.5 and len(tokenizer[0].encode(TEXTS[1])) > 256  # beyond window and context
    torch.testing.assert_close(theirs, expected, rtol=0, atol=TOLERANCE)
    other = ours(model_of("last" if pooling == "mean" else "mean", global_rope_theta=160_000.0), tokenizer[0], TEXTS)
    assert (theirs - other).abs().max() > 0.1  # the comparison can tell poolings apart
    assert "(3, 128)" in parity.run_card(folder)  # the card's own example, with the library
    text = (folder / "README.md").read_text()
    assert "123,456" in text and "contrastive" in text and "No contrastive stage" not in text
    assert ("the mean over a text's tokens" in text) is (pooling == "mean")


def test_weights_are_named_as_transformers_base_class_has_them(tokenizer, tmp_path):
    model = model_of()
    folder = export_sentence_model(model, model.config, tokenizer[0], tmp_path / "out", objective="simcse")
    _, found = AutoModel.from_pretrained(str(folder), output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_a_longer_limit_set_by_the_user_is_what_the_trunk_computes(tokenizer, tmp_path):
    """What the card's limits say: positions are rotary, so the trunk reads more than the last stage did."""
    short, long = model_of(max_seq_len=32), model_of(max_seq_len=256)
    folder = export_sentence_model(short, short.config, tokenizer[0], tmp_path / "out", objective="simcse")
    loaded = SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), ours(short, tokenizer[0], TEXTS), rtol=0,
                               atol=TOLERANCE)
    loaded.max_seq_length = 256
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), ours(long, tokenizer[0], TEXTS), rtol=0,
                               atol=TOLERANCE)


def test_a_causal_trunk_is_a_decoder_that_says_which_transformers_it_needs(tokenizer, tmp_path):
    """By its files: the installed transformers has no such class; `make parity` loads it with those that have."""
    model = model_of(causal=True, global_rope_theta=160_000.0, local_rope_theta=160_000.0)
    folder = export_sentence_model(model, model.config, tokenizer[0], tmp_path / "out", objective="simcse")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("modernbert-decoder", ["ModernBertDecoderModel"])
    assert (config["sliding_window"], config["ettin_foundry"]["objective"]) == (64, "simcse")
    template = json.loads((folder / "tokenizer.json").read_text())["post_processor"]["single"]
    assert [next(iter(part.values()))["id"] for part in template] == ["[CLS]", "A", "[SEP]"]  # rows end with EOS
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "right"
    assert not (folder / "generation_config.json").exists()
    text = (folder / "README.md").read_text()
    assert "transformers 4.56 or newer" in text and "An Ettin decoder" in text
    drifted = model_of(causal=True, global_rope_theta=160_000.0)
    folder = export_sentence_model(drifted, drifted.config, tokenizer[0], tmp_path / "two", objective="simcse")
    assert "transformers 5.0 or newer" in (folder / "README.md").read_text()


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `ettin arguments...`"""
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code or 0, *capsys.readouterr()


def save(model, path, objective, tokenizer, **clock):
    content = weights_checkpoint(model.state_dict(), model.config, objective=objective, tokenizer=tokenizer)
    content["state"]["callbacks"]["Clock"].update(clock)
    torch.save(content, path)
    return path


def test_the_command_writes_a_contrastive_checkpoint_with_its_own_pooling(capsys, tokenizer, tmp_path):
    model = model_of("last")
    path = save(model.model, tmp_path / "c.pt", "simcse", tokenizer[1], tokens=77,
                run_config=json.dumps({"model": {"name": "ettin_contrastive", "pooling": "last"}}))
    code, _, error = run(capsys, "export", path, tmp_path / "plain")
    assert code == 1 and re.search("simcse.*--sentence-transformers", error) and not (tmp_path / "plain").exists()
    for _ in range(2):  # an earlier export of its own is replaced
        code, out, error = run(capsys, "export", "--sentence-transformers", path, tmp_path / "out", "--overwrite")
        assert (code, error) == (0, "") and "wrote" in out
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, ours(model, tokenizer[0], TEXTS), rtol=0, atol=TOLERANCE)
    code, _, error = run(capsys, "export", "--sentence-transformers", path, tmp_path / "out")
    assert code == 1 and "exists and is not empty" in error


def test_the_command_writes_a_trunk_without_the_stage_and_the_card_says_so(capsys, tokenizer, tmp_path):
    model = model_of()
    path = save(model.model, tmp_path / "c.pt", "mlm", tokenizer[1])
    code, _, error = run(capsys, "export", path, tmp_path / "out", "--sentence-transformers", "--license", "mit")
    assert (code, error) == (0, "")
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, ours(model, tokenizer[0], TEXTS), rtol=0, atol=TOLERANCE)
    text = (tmp_path / "out/README.md").read_text()
    assert "**No contrastive stage:** this trunk was trained with mlm only" in text and 'license: "mit"' in text


def test_bad_requests_write_nothing(tokenizer, tmp_path):
    model = model_of()
    with pytest.raises(ValueError, match="pooling: 'cls' given; mean or last is possible"):
        export_sentence_model(model, model.config, tokenizer[0], tmp_path / "out", objective="simcse", pooling="cls")
    with pytest.raises(ValueError, match="lacks|missing"):
        export_sentence_model({"trunk.final_norm.weight": torch.ones(128)}, model.config, tokenizer[0], tmp_path / "out",
                              objective="simcse")
    (tmp_path / "notes/chapters").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not an exported model"):
        export_sentence_model(model, model.config, tokenizer[0], tmp_path / "notes", objective="simcse", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes"]


def test_a_disk_that_writes_something_else_is_noticed(tokenizer, tmp_path, monkeypatch):
    import safetensors.torch

    model, honest = model_of(), safetensors.torch.save_file

    def broken(tensors, path, **kwargs):
        honest({name: t + 1e-3 if name == "final_norm.weight" else t for name, t in tensors.items()}, path, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(ValueError, match="does not read back the same .final_norm.weight"):
        export_sentence_model(model, model.config, tokenizer[0], tmp_path / "out", objective="simcse")
    assert not list(tmp_path.iterdir())


def test_configs_of_the_two_kinds_differ_in_attention_only():
    encoder, decoder = (EttinConfig.for_size("nano", causal=causal) for causal in (False, True))
    assert model_of(max_seq_len=1024, vocab_size=50368, attn_out_dropout=0.1).config == encoder
    assert model_of(max_seq_len=1024, vocab_size=50368, attn_out_dropout=0.1, causal=True).config == decoder
