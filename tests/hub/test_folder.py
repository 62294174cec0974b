"""Hugging Face folders written: files, config, card and tokenizer, round trip, whole or not at all."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import parity
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ettin_foundry.hub import folder as hub_folder
from ettin_foundry.hub.card import card
from ettin_foundry.hub.folder import export_model
from ettin_foundry.model import hf_config
from ettin_foundry.model.weights import import_folder

# what TEI's ModernBERT needs without a default (its config struct)
TEI_KEYS = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_activation "
            "max_position_embeddings initializer_range initializer_cutoff_factor norm_eps norm_bias pad_token_id "
            "eos_token_id bos_token_id cls_token_id sep_token_id global_rope_theta attention_bias attention_dropout "
            "global_attn_every_n_layers local_attention local_rope_theta classifier_activation").split()
IDS = {"unk": 295, "cls": 296, "sep": 297, "pad": 298, "mask": 299}


@pytest.fixture(scope="module")
def tokenizer():
    return parity.tiny_tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return parity.nano("mlm")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, encoder, tokenizer):
    root, decoder = tmp_path_factory.mktemp("exported"), parity.nano("clm")
    return {"encoder": export_model(encoder, encoder.config, tokenizer, root / "encoder", objective="mlm"),
            "decoder": export_model(decoder, decoder.config, tokenizer, root / "decoder", objective="clm")}


@pytest.mark.parametrize("objective, changes", [
    ("mntp", {"global_rope_theta": 160_000.0, "local_rope_theta": 160_000.0}),
    ("mlm", {"local_attention": 64, "attn_out_dropout": 0.0, "max_position_embeddings": 7999, "norm_eps": 1e-6}),
    ("clm", {"window_left": 64, "attn_out_dropout": 0.25}), ("clm", {"local_attention": 32}),
    ("clm", {"local_rope_theta": 50_000.0, "global_attn_every_n_layers": 2}),
], ids=str)
def test_out_and_in_is_bit_equal(objective, changes, tokenizer, tmp_path):
    model = parity.nano(objective, **changes)
    folder = export_model(model, model.config, tokenizer, tmp_path / "out", objective=objective,
                          facts={"tokens": 7, "lineage": [{"objective": "mlm", "tokens": 5}]})
    state, read, read_objective = import_folder(folder)
    assert (read, read_objective) == (model.config, objective) and parity.equal_states(state, model.state_dict())
    assert json.loads((folder / "config.json").read_text())["ettin_foundry"]["tokens"] == 7


def test_config_json_speaks_to_both_generations(exported, tokenizer):
    encoder, decoder = (json.loads((exported[k] / "config.json").read_text()) for k in ("encoder", "decoder"))
    for content in (encoder, decoder):
        assert not set(TEI_KEYS) - set(content) and content["layer_norm_eps"] == content["norm_eps"] == 1e-5
    assert "sliding_window" not in encoder and encoder["local_attention"] == 128
    assert (decoder["local_attention"], decoder["sliding_window"]) == (128, 64)
    original = hf_config.config_json(parity.nano("clm", window_left=64).config, objective="clm", special_ids=IDS)
    assert (original["local_attention"], original["sliding_window"]) == (130, 65)
    assert all(parity.check_tokenizer(exported[kind], tokenizer, kind == "decoder") for kind in exported)
    # whom the umask lets read README.md may read every file
    assert len({path.stat().st_mode for path in exported["encoder"].iterdir()}) == 1


def test_what_a_version_of_transformers_gets_wrong_is_warned_of_and_on_the_card(caplog):
    hf_config.config_json(parity.nano("clm").config, objective="clm", special_ids=IDS)
    assert not caplog.text
    for changes, word, needed in (({"window_left": 64}, "drop that key", "4.56"),
                                  ({"local_rope_theta": 5e4}, "4.x ignores", "5.0")):
        config = parity.nano("clm", **changes).config
        hf_config.config_json(config, objective="clm", special_ids=IDS)
        text = card(config, objective="clm", name="x")
        assert word in caplog.text and word in text and f"Needs transformers {needed} or newer" in text


def test_mntp_says_everywhere_that_the_mask_is_read_one_before(encoder, tokenizer, tmp_path, caplog):
    folder = export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mntp")
    content, text = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert "BEFORE the mask" in caplog.text and "BEFORE the mask" in text and "place - 1]" in text
    assert content["ettin_foundry"]["objective"] == "mntp"
    printed = parity.run_card(folder)  # the card's code reads that position: the same tokens as our model gives there
    ids = torch.tensor(tokenizer("def add(a, b): return a [MASK] b")["input_ids"])
    place = ids.tolist().index(IDS["mask"]) - 1
    best = parity.our_logits(encoder, ids)[place].topk(5).indices.tolist()
    assert printed.strip() == str(tokenizer.convert_ids_to_tokens(best))


def test_failed_export_leaves_nothing_behind(encoder, tokenizer, tmp_path, monkeypatch):
    folder = export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mlm")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rename = Path.rename

    def renames_nothing_here(path, target):  # the last step: the old folder has been moved away
        if target == tmp_path / "m" and path.name == "new":
            raise OSError("no space left on device")
        return rename(path, target)

    def full_disk(weights, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    for place, name, broken in ((Path, "rename", renames_nothing_here), (hub_folder, "save_file", full_disk)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(place, name, broken)
            export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mntp", overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_only_an_earlier_export_is_overwritten_when_asked_and_contradictions_are_refused(encoder, tokenizer, tmp_path):
    export = functools.partial(export_model, encoder, encoder.config, tokenizer, objective="mlm")
    folder = export(tmp_path / "m")
    (folder / "stale.txt").write_text("x")
    assert not (export(folder, overwrite=True) / "stale.txt").exists()
    (tmp_path / "work" / "sub").mkdir(parents=True)
    (tmp_path / "work" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    small = dataclasses.replace(encoder.config, vocab_size=299)
    for config, place, objective, words in (
            (encoder.config, "work", "mlm", "not an exported model"),
            (encoder.config, "link", "mlm", "is a link"), (small, "n", "mlm", "at most the model's 299 entries"),
            (encoder.config, "n", "clm", "be mlm or mntp here, got 'clm'"),
            (parity.nano("clm").config, "n", "mntp", "be clm here, got 'mntp'")):
        with pytest.raises(ValueError, match=words):
            export_model(encoder, config, tokenizer, tmp_path / place, objective=objective, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["link", "m", "sub", "work"]


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_special_ids_are_those_that_the_model_was_trained_with(causal, tmp_path):
    """A tokenizer with BOS and EOS of its own, to which [CLS] and [SEP] were added for the conversion."""
    from transformers import AutoTokenizer

    own, model = parity.tiny_tokenizer(), parity.nano("clm" if causal else "mlm")
    own.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    folder = export_model(model, model.config, own, tmp_path / "m", objective="clm" if causal else "mlm")
    read, content = AutoTokenizer.from_pretrained(folder), json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text()) if causal else content
    for key, role in (("bos_token_id", "cls"), ("eos_token_id", "sep"), ("pad_token_id", "pad")):
        assert getattr(read, key) == content[key] == generation[key] == IDS[role]
    assert own.eos_token == "</s>"  # the caller's is not changed


def test_weights_in_bf16_are_rounded_once_and_come_back_as_that(encoder, tokenizer, tmp_path):
    from transformers import AutoModelForMaskedLM

    folder = export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mlm", dtype="bf16")
    state, config, _ = import_folder(folder)
    rounded = {name: tensor.bfloat16().float() for name, tensor in encoder.state_dict().items()}
    assert config == encoder.config and all(torch.equal(state[name], tensor) for name, tensor in rounded.items())
    assert (folder / "model.safetensors").stat().st_size < 2.2 * encoder.config.num_parameters
    assert AutoModelForMaskedLM.from_pretrained(folder, torch_dtype="auto").dtype == torch.bfloat16


def test_a_trunk_is_what_automodel_saves_and_is_pooled_by_its_mean(exported, encoder, tokenizer, tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    trunk = export_model(encoder, encoder.config, tokenizer, tmp_path / "trunk", objective="mntp", trunk=True)
    [line] = re.findall(r'`(AutoModel[^`]*)`', (exported["encoder"] / "README.md").read_text())  # the other way
    eval(line.replace('"encoder"', "folder").replace('"trunk"', "saved"),
         {"AutoModel": AutoModel, "folder": exported["encoder"], "saved": tmp_path / "saved"})
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("trunk", "saved"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    contents = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("trunk", "saved")]
    assert [(c["architectures"], c["layer_norm_eps"]) for c in contents] == [(["ModernBertModel"], 1e-5)] * 2
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(trunk).eval()(**tokenizer("a + b", return_tensors="pt")).last_hidden_state
    assert torch.allclose(tokens.mean(1)[0], torch.tensor(SentenceTransformer(str(trunk)).encode("a + b")), atol=1e-5)
    assert "tensor" in parity.run_card(trunk)
    assert export_model(encoder, encoder.config, tokenizer, trunk, objective="mlm", overwrite=True)


def test_card_says_where_weights_come_from():
    lineage = [{"objective": "clm", "tokens": 99, "phase": None}, {"merged_from": [
        {"source": "a/1.pt", "tokens": 1000}, {"source": "a/2.pt", "tokens": None}]}]
    text = card(parity.nano("mlm").config, objective="mlm", name="a: b", facts={
        "license": "mit", "lineage": lineage, "objective_schedule": "clm, then mlm",
        "checkpoint": {"run_name": "r", "batch": 1234, "run_hash": "ab"}})
    for row in ("continued from | objective clm, tokens 99", "objectives in training | clm, then mlm",
                "mean of | a/1.pt (1,000 tokens), a/2.pt (0 tokens)",
                "checkpoint | batch 1,234 of r, whose resolved config has the sha256 ab"):
        assert f"| {row} |" in text, row
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "fill-mask",
        "tags": ["ettin", "modernbert", "encoder"]}
