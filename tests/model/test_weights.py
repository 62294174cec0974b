"""Hugging Face folders written: names, config, round trip, parity with the installed transformers, whole or not at all.

The decoder class does not exist in the installed transformers, so decoders are held to a naive model written here from the
Hugging Face names; tests/parity.py holds them to the real class under newer versions.
"""

import dataclasses
import json

import parity
import pytest
import torch
import torch.nn.functional as F

from ettin_foundry.hub.card import card
from ettin_foundry.model import hf_config
from ettin_foundry.model import weights as hf
from ettin_foundry.model.config import SIZES, EttinConfig
from ettin_foundry.model.weights import export_model, import_folder, tensor_table, to_hf

# what TEI's ModernBERT needs without a default (facts: its config struct)
TEI_KEYS = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_activation "
            "max_position_embeddings initializer_range initializer_cutoff_factor norm_eps norm_bias pad_token_id "
            "eos_token_id bos_token_id cls_token_id sep_token_id global_rope_theta attention_bias attention_dropout "
            "global_attn_every_n_layers local_attention local_rope_theta classifier_activation").split()
IDS = {"unk": 295, "cls": 296, "sep": 297, "pad": 298, "mask": 299}


def shape(causal: bool, **changes) -> EttinConfig:
    return EttinConfig.for_size("nano", causal=causal, vocab_size=320, **changes)


@pytest.fixture(scope="module")
def tokenizer():
    return parity.tiny_tokenizer()


@pytest.fixture(scope="module")
def encoder():
    return parity.random_model(shape(False))


@pytest.fixture(scope="module")
def decoder():
    return parity.random_model(shape(True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, encoder, decoder, tokenizer):
    """Two exports; tests copy what they change."""
    root = tmp_path_factory.mktemp("exported")
    return {"encoder": export_model(encoder, encoder.config, tokenizer, root / "encoder", objective="mlm"),
            "decoder": export_model(decoder, decoder.config, tokenizer, root / "decoder", objective="clm")}


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("size", SIZES)
def test_encoder_names_and_shapes_are_transformers_own(size):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = EttinConfig.for_size(size, causal=False)
    with torch.device("meta"):
        theirs = ModernBertForMaskedLM(ModernBertConfig(**hf_config.config_json(config, objective="mlm",
                                                                                special_ids=IDS))).state_dict()
    theirs.pop("decoder.weight")  # tied
    rows = tensor_table(config)
    assert {row.hf_names[0]: row.shape for row in rows} == {name: tuple(t.shape) for name, t in theirs.items()}
    assert all(len(row.hf_names) == 1 for row in rows)
    assert sum(torch.Size(row.shape).numel() for row in rows) == config.num_parameters


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_table_names_our_model_exactly(causal):
    config = shape(causal)
    ours = {name: tuple(t.shape) for name, t in parity.Ettin(config).state_dict().items()}
    assert {row.name: row.shape for row in tensor_table(config)} == ours


def naive_decoder_logits(weights, config, ids):
    """ModernBertDecoderForCausalLM from its own names and config.json, one position and head dimension at a time."""
    n, heads = len(ids), config["num_attention_heads"]
    c = config["hidden_size"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + config["norm_eps"]).sqrt() * weights[name]

    x = norm(weights["model.embeddings.tok_embeddings.weight"][ids], "model.embeddings.norm.weight")
    for i, kind in enumerate(config["layer_types"]):
        layer = f"model.layers.{i}."
        theta = config["rope_parameters"][kind]["rope_theta"]
        y = norm(x, layer + "attn_norm.weight") if i else x
        q, k, v = (F.linear(y, weights[f"{layer}attn.{p}_proj.weight"]).view(n, heads, 64).transpose(0, 1) for p in "qkv")
        angle = torch.arange(n, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        turn = torch.polar(torch.ones_like(angle), angle)  # complex: dimension j is paired with j + 32
        q, k = (torch.cat([r.real, r.imag], -1) for r in (torch.complex(t[..., :32], t[..., 32:]) * turn for t in (q, k)))
        back = torch.arange(n)[:, None] - torch.arange(n)
        # transformers' eager mask: a local layer keeps keys at distances 0 .. sliding_window - 1
        seen = (back >= 0) & ((back < config["sliding_window"]) | (kind == "full_attention"))
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(~seen, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, c)
        x = x + F.linear(out, weights[layer + "attn.Wo.weight"])
        act, gate = F.linear(norm(x, layer + "mlp_norm.weight"), weights[layer + "mlp.Wi.weight"]).chunk(2, -1)
        x = x + F.linear(F.gelu(act) * gate, weights[layer + "mlp.Wo.weight"])
    x = norm(F.gelu(F.linear(norm(x, "model.final_norm.weight"), weights["lm_head.dense.weight"])), "lm_head.norm.weight")
    return F.linear(x, weights["model.embeddings.tok_embeddings.weight"], weights["decoder.bias"])


@pytest.mark.parametrize("window_left", [63, 64])
def test_exported_decoder_equals_a_naive_model_of_its_names(window_left):
    config = shape(True, window_left=window_left, global_rope_theta=160_000.0)
    model = parity.random_model(config)
    weights = {name: t.double() for name, t in to_hf(model.state_dict(), config).items()}
    content = hf_config.config_json(config, objective="clm", special_ids=IDS)
    ids = torch.randint(0, 320, (200,), generator=torch.Generator().manual_seed(1))
    naive = naive_decoder_logits(weights, content, ids)
    # fp32 against float64, logits up to 13: the limit of tests/parity.py
    assert (parity.our_logits(model, ids) - naive).abs().max() < parity.TOLERANCE
    narrower = {**content, "sliding_window": content["sliding_window"] - 1}
    assert (naive_decoder_logits(weights, narrower, ids) - naive).abs().max() > parity.CONTROL


@pytest.mark.parametrize("case", [c for c, (_, causal, _, _) in parity.CASES.items() if not causal])
def test_exported_encoder_equals_installed_transformers(case, tokenizer, tmp_path):
    """Logits at 16, 200 and 1,500 tokens, eager and SDPA; the card's code; the tokenizer; and a save by transformers."""
    for result in parity.run_case(case, tokenizer, tmp_path):
        assert parity.passed(result), result
        assert result.get("saved_again", "same, then same") == "same, then same"


def test_padded_batch_in_transformers_equals_documents_alone(exported, encoder):
    from transformers import AutoModelForMaskedLM

    theirs = AutoModelForMaskedLM.from_pretrained(str(exported["encoder"]), attn_implementation="sdpa").eval()
    documents = [torch.randint(0, 290, (n,), generator=torch.Generator().manual_seed(n)) for n in (16, 150)]
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=IDS["pad"])
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask).logits
    for document, got in zip(documents, logits):
        assert (parity.our_logits(encoder, document) - got[: len(document)]).abs().max() < parity.TOLERANCE


# ---------------------------------------------------------------- out and in


@pytest.mark.parametrize("objective, changes", [
    ("mlm", {}), ("mdlm", {}), ("mntp", {"global_rope_theta": 160_000.0, "local_rope_theta": 160_000.0}),
    ("mlm", {"local_attention": 64, "attn_out_dropout": 0.0, "max_position_embeddings": 7999, "norm_eps": 1e-6}),
    ("clm", {}), ("clm", {"window_left": 64, "attn_out_dropout": 0.25}), ("clm", {"local_attention": 32}),
    ("clm", {"local_rope_theta": 50_000.0, "global_attn_every_n_layers": 2}),
], ids=str)
def test_out_and_in_is_bit_equal(objective, changes, tokenizer, tmp_path):
    config = shape(objective == "clm", **changes)
    model = parity.random_model(config)
    folder = export_model(model, config, tokenizer, tmp_path / "out", objective=objective,
                          facts={"tokens": 7, "lineage": [{"objective": "mlm", "tokens": 5}]})
    state, read, read_objective = import_folder(folder)
    assert (read, read_objective) == (config, objective)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["ettin_foundry"]["tokens"] == 7


def test_half_precision_weights_come_out_as_exact_fp32(encoder):
    half = {f"model.{name}": t.bfloat16() for name, t in encoder.state_dict().items()}
    out = to_hf(hf.plain_state(half), encoder.config)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in out.values())
    assert torch.equal(out["head.dense.weight"], half["model.head.dense.weight"].float())


def test_only_what_must_change_is_copied(decoder):
    """An export of a mapped checkpoint must not hold the weights twice."""
    out = to_hf(decoder.state_dict(), decoder.config)
    own = {t.untyped_storage().data_ptr() for t in decoder.state_dict().values()}
    assert {t.untyped_storage().data_ptr() for t in out.values()} == own and all(t.is_contiguous() for t in out.values())
    query, _, value = decoder.state_dict()["trunk.layers.1.attn.Wqkv.weight"].chunk(3)
    assert torch.equal(out["model.layers.1.attn.q_proj.weight"], query)
    assert torch.equal(out["model.layers.1.attn.v_proj.weight"], value)
    turned = to_hf({name: t.t().contiguous().t() for name, t in decoder.state_dict().items()}, decoder.config)
    assert all(t.is_contiguous() and torch.equal(t, out[name]) for name, t in turned.items())


def test_weights_file_says_pt_and_has_no_tied_matrix(exported):
    from safetensors import safe_open

    for folder in exported.values():
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"} and "decoder.weight" not in file.keys()
    assert sorted(p.name for p in exported["decoder"].iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json"]
    assert not (exported["encoder"] / "generation_config.json").exists()


def test_config_json_speaks_to_both_generations(exported):
    encoder, decoder = (json.loads((exported[k] / "config.json").read_text()) for k in ("encoder", "decoder"))
    for content in (encoder, decoder):
        assert not set(TEI_KEYS) - set(content)
        assert content["rope_parameters"]["sliding_attention"] == {"rope_theta": 10_000.0, "rope_type": "default"}
        assert content["layer_types"][:4] == ["full_attention"] + 2 * ["sliding_attention"] + ["full_attention"]
        assert content["torch_dtype"] == content["dtype"] == "float32" and content["tie_word_embeddings"] is True
        assert all(type(content[f"{name}_token_id"]) is int for name in ("bos", "eos", "cls", "sep", "pad"))
        assert content["bos_token_id"] == content["cls_token_id"] == IDS["cls"]
    assert "sliding_window" not in encoder and encoder["local_attention"] == 128
    assert (decoder["local_attention"], decoder["sliding_window"]) == (128, 64)
    original = hf_config.config_json(shape(True, window_left=64), objective="clm", special_ids=IDS)
    assert (original["local_attention"], original["sliding_window"]) == (130, 65)
    generation = json.loads((exported["decoder"] / "generation_config.json").read_text())
    assert generation == {"bos_token_id": IDS["cls"], "eos_token_id": IDS["sep"], "pad_token_id": IDS["pad"]}


@pytest.mark.parametrize("changes, word", [({"window_left": 64}, "drop that key"),
                                           ({"local_rope_theta": 5e4}, "4.x ignores")])
def test_what_a_version_of_transformers_gets_wrong_is_warned_of_and_on_the_card(changes, word, caplog):
    config = shape(True, **changes)
    hf_config.config_json(config, objective="clm", special_ids=IDS)
    text = card(config, objective="clm", name="x")
    assert word in caplog.text and word in text
    assert f"Needs transformers {'5.0' if 'local_rope_theta' in changes else '4.56'} or newer" in text
    caplog.clear()
    hf_config.config_json(shape(True), objective="clm", special_ids=IDS)
    assert not caplog.text


def test_mntp_says_everywhere_that_the_mask_is_read_one_before(encoder, tokenizer, tmp_path, caplog):
    folder = export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mntp")
    content = json.loads((folder / "config.json").read_text())
    text = (folder / "README.md").read_text()
    assert "BEFORE the mask" in caplog.text and "BEFORE the mask" in text and "place - 1]" in text
    assert content["ettin_foundry"]["objective"] == "mntp"
    assert "before the mask" in content["ettin_foundry"]["mask_is_predicted_at"]
    assert content["architectures"] == ["ModernBertForMaskedLM"]
    printed = parity.run_card(folder)  # the card's code reads that position: the same tokens as our model gives there
    ids = torch.tensor(hf.load_tokenizer(tokenizer, encoder.config)("def add(a, b): return a [MASK] b")["input_ids"])
    place = ids.tolist().index(IDS["mask"]) - 1
    best = parity.our_logits(encoder, ids)[place].topk(5).indices.tolist()
    assert printed.strip() == str(tokenizer.convert_ids_to_tokens(best))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_exported_tokenizer_has_the_template_of_its_kind(kind, exported, tokenizer):
    assert parity.check_tokenizer(exported[kind], tokenizer, kind == "decoder")
    content = json.loads((exported[kind] / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast" and content["model_max_length"] == 1024
    assert content["padding_side"] == ("left" if kind == "decoder" else "right")
    assert content["model_input_names"] == ["input_ids", "attention_mask"]


def test_exported_folder_holds_no_path_of_this_machine(encoder, tokenizer, tmp_path):
    tokenizer.save_pretrained(str(tmp_path / "tokens"))
    folder = export_model(encoder, encoder.config, str(tmp_path / "tokens"), tmp_path / "out", objective="mlm")
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


# ---------------------------------------------------------------- writing


def test_failed_export_leaves_nothing_behind(encoder, tokenizer, tmp_path, monkeypatch):
    """Neither a new folder, nor a changed old one, nor a partial one."""
    folder = export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mlm")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "card", full_disk)
    for name in ("m", "new"):
        with pytest.raises(OSError, match="no space"):
            export_model(encoder, encoder.config, tokenizer, tmp_path / name, objective="mntp", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_altered_file_does_not_pass_the_check_after_writing(encoder, tokenizer, tmp_path, monkeypatch):
    write = hf.write_files

    def bad_disk(folder, config, weights, tok):
        write(folder, config, {**weights, "decoder.bias": weights["decoder.bias"] + 1}, tok)

    monkeypatch.setattr(hf, "write_files", bad_disk)
    with pytest.raises(ValueError, match="does not read back the same.*decoder.bias"):
        export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mlm")
    assert not list(tmp_path.iterdir())


def test_only_an_earlier_export_is_overwritten_and_only_when_asked(encoder, tokenizer, tmp_path):
    def export(folder, **options):
        return export_model(encoder, encoder.config, tokenizer, folder, objective="mlm", **options)

    folder = export(tmp_path / "m")
    with pytest.raises(ValueError, match="not empty"):
        export(folder)
    (folder / "stale.txt").write_text("x")
    assert not (export(folder, overwrite=True) / "stale.txt").exists()
    (tmp_path / "work" / "sub").mkdir(parents=True)
    for name in ("config.json", "work"):
        (tmp_path / "work" / name).write_text("{}")
    with pytest.raises(ValueError, match="not an exported model"):
        export(tmp_path / "work", overwrite=True)
    assert (tmp_path / "work" / "sub").is_dir()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="is a link"):
        export(tmp_path / "link", overwrite=True)


def test_export_refuses_contradictions(encoder, decoder, tokenizer, tmp_path):
    for model, objective in ((encoder, "clm"), (decoder, "mlm"), (decoder, "mntp"), (decoder, "mdlm"), (encoder, "rtd")):
        with pytest.raises(ValueError, match=f"objective: '{objective}' given"):
            export_model(model, model.config, tokenizer, tmp_path / "m", objective=objective)
    small = dataclasses.replace(encoder.config, vocab_size=299)
    with pytest.raises(ValueError, match="300 entries given; the model has 299"):
        export_model(encoder, small, tokenizer, tmp_path / "m", objective="mlm")
    with pytest.raises(ValueError, match="tokenizer: none given"):
        export_model(encoder, encoder.config, None, tmp_path / "m", objective="mlm")
    with pytest.raises(ValueError, match="unknown key.*colour"):
        export_model(encoder, encoder.config, tokenizer, tmp_path / "m", objective="mlm", facts={"colour": "red"})
    assert not list(tmp_path.iterdir())


def test_to_hf_refuses_wrong_and_diverged_states(encoder):
    state = encoder.state_dict()
    with pytest.raises(ValueError, match="missing output_bias"):
        to_hf({k: v for k, v in state.items() if k != "output_bias"}, encoder.config)
    with pytest.raises(ValueError, match="output_bias: has NaN"):
        to_hf({**state, "output_bias": torch.full((320,), torch.nan)}, encoder.config)
