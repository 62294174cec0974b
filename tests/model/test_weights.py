"""Weights and config.json of Hugging Face: names, parity with transformers, foreign folders read, and what is refused.

The decoder class does not exist in the installed transformers, so decoders are held to a naive model written here from the
Hugging Face names; tests/parity.py holds them to the real class under newer versions.
"""

import dataclasses
import json
import re
import shutil

import parity
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ettin_foundry.hub.folder import export_model
from ettin_foundry.model import hf_config
from ettin_foundry.model.config import SIZES, EttinConfig
from ettin_foundry.model.weights import from_hf, import_folder, plain_state, tensor_table, to_hf

IDS = {"unk": 295, "cls": 296, "sep": 297, "pad": 298, "mask": 299}


def shape(causal: bool, **changes) -> EttinConfig:
    return EttinConfig.for_size("nano", causal=causal, vocab_size=320, **changes)


@pytest.fixture(scope="module")
def models():
    return {"encoder": parity.random_model(shape(False)), "decoder": parity.random_model(shape(True))}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, models):
    """Two exports; tests copy what they change."""
    root, tokenizer = tmp_path_factory.mktemp("exported"), parity.tiny_tokenizer()
    return {kind: export_model(model, model.config, tokenizer, root / kind, objective="clm" if kind == "decoder" else "mlm")
            for kind, model in models.items()}


@pytest.fixture
def edited(exported, tmp_path):
    """edited(kind, drop, **changes): the config.json of an export with keys removed and changed, as a path."""

    def edit(kind, drop=(), **changes):
        content = json.loads((exported[kind] / "config.json").read_text())
        content = {k: v for k, v in {**content, **changes}.items() if k not in drop}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path / "config.json"

    return edit


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("size", SIZES)
def test_names_and_shapes_are_our_models_and_transformers_own(size):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = EttinConfig.for_size(size, causal=False)
    content = hf_config.config_json(config, objective="mlm", special_ids=IDS)
    with torch.device("meta"):
        theirs = ModernBertForMaskedLM(ModernBertConfig(**content)).state_dict()
        ours = {causal: parity.Ettin(config.with_causal(causal)).state_dict() for causal in (False, True)}
    theirs.pop("decoder.weight")  # tied
    rows = tensor_table(config)
    assert {row.hf_names[0]: row.shape for row in rows} == {name: tuple(t.shape) for name, t in theirs.items()}
    for causal, state in ours.items():
        table = {row.name: row.shape for row in tensor_table(config.with_causal(causal))}
        assert table == {name: tuple(t.shape) for name, t in state.items()}


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
def test_exported_encoder_equals_installed_transformers(case, tmp_path):
    """Logits at 16, 200 and 1,500 tokens, eager and SDPA; the card's code; the tokenizer; and a save by transformers."""
    for result in parity.run_case(case, parity.tiny_tokenizer(), tmp_path):
        assert parity.passed(result), result
        assert result.get("saved_again", "same, then same") == "same, then same"


def test_padded_batch_in_transformers_equals_documents_alone(exported, models):
    from transformers import AutoModelForMaskedLM

    theirs = AutoModelForMaskedLM.from_pretrained(str(exported["encoder"]), attn_implementation="sdpa").eval()
    documents = [torch.randint(0, 290, (n,), generator=torch.Generator().manual_seed(n)) for n in (16, 150)]
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=IDS["pad"])
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask).logits
    for document, got in zip(documents, logits):
        assert (parity.our_logits(models["encoder"], document) - got[: len(document)]).abs().max() < parity.TOLERANCE


# ---------------------------------------------------------------- the table


def test_weights_come_out_in_fp32_and_only_what_must_change_is_copied(models):
    """An export of a mapped checkpoint must not hold the weights twice."""
    state, config = models["decoder"].state_dict(), models["decoder"].config
    out = to_hf(state, config)
    own = {t.untyped_storage().data_ptr() for t in state.values()}
    assert {t.untyped_storage().data_ptr() for t in out.values()} == own and all(t.is_contiguous() for t in out.values())
    assert torch.equal(out["model.layers.1.attn.v_proj.weight"], state["trunk.layers.1.attn.Wqkv.weight"].chunk(3)[2])
    half = to_hf(plain_state({f"model.{name}": t.t().bfloat16().contiguous().t() for name, t in state.items()}), config)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in half.values())
    assert all(torch.equal(t, out[name].bfloat16().float()) for name, t in half.items())


def test_both_directions_are_strict_and_name_what_is_wrong(models):
    state, config = models["encoder"].state_dict(), models["encoder"].config
    good = to_hf(state, config)
    embedding = good["model.embeddings.tok_embeddings.weight"]
    assert from_hf({**good, "decoder.weight": embedding.clone()}, config).keys() == state.keys()  # tied, stored twice
    for function, given, changes, words in (
            (to_hf, {k: v for k, v in state.items() if k != "output_bias"}, {}, "missing output_bias"),
            (to_hf, {**state, "output_bias": torch.full((320,), torch.nan)}, {}, "output_bias: has NaN"),
            (from_hf, {k: v for k, v in good.items() if k != "head.norm.weight"}, {}, "missing head.norm.weight"),
            (from_hf, {**good, "classifier.weight": torch.zeros(2, 128)}, {}, "unknown classifier.weight"),
            (from_hf, {**good, "decoder.bias": torch.zeros(5)}, {}, r"decoder.bias: shape .*\(5,\)"),
            (from_hf, good, {"causal": True, "window_left": -1}, "missing.*q_proj"),
            (from_hf, {**good, "decoder.weight": embedding + 1e-7 * embedding.abs().max()}, {}, "decoder.weight.*differs")):
        with pytest.raises(ValueError, match=words):
            function(given, dataclasses.replace(config, **changes))


# ---------------------------------------------------------------- import of foreign folders


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_old_and_new_keys_alone_read_the_same(kind, edited):
    want = hf_config.read_config(edited(kind))
    old = edited(kind, drop=("rope_parameters", "layer_types", "sliding_window", "dtype", "ettin_foundry"))
    assert hf_config.read_config(old)[0] == want[0]
    # the keys that 5.x drops when it saves
    new = edited(kind, drop=("global_rope_theta", "local_rope_theta", "global_attn_every_n_layers", "torch_dtype",
                             "ettin_foundry"))
    assert hf_config.read_config(new)[0] == want[0]
    # and 4.54 to 5.0, for decoders
    if kind == "decoder":
        assert hf_config.read_config(edited(kind, drop=("local_attention", "ettin_foundry")))[0] == want[0]


@pytest.mark.parametrize("kind, version, local", [("encoder", "4.48.0", 10_000.0), ("encoder", "5.23.0", 10_000.0),
                                                  ("decoder", "4.57.6", 160_000.0), ("decoder", "5.0.0", 10_000.0)])
def test_missing_bases_are_those_of_the_version_that_saved(kind, version, local, edited, caplog):
    path = edited(kind, drop=("rope_parameters", "global_rope_theta", "local_rope_theta", "ettin_foundry"),
                  transformers_version=version)
    config, _ = hf_config.read_config(path)
    assert (config.global_rope_theta, config.local_rope_theta) == (160_000.0, local)
    assert "no rotary base for local layers" in caplog.text


@pytest.mark.parametrize("kind, changes, words", [
    ("encoder", {"attention_bias": True}, "attention_bias must be False, got True"),
    ("decoder", {"decoder_bias": False}, "decoder_bias"), ("decoder", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("encoder", {"hidden_activation": "silu"}, "hidden_activation"),
    ("decoder", {"classifier_activation": "relu"}, "classifier_activation"),
    ("encoder", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ("encoder", {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "yarn"}}}, "rope_parameters"),
    ("encoder", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
    ("encoder", {"local_rope_theta": 160000.0}, "local_rope_theta contradict"),
    ("encoder", {"sliding_window": 128}, "sliding_window 128 contradict"),
    ("decoder", {"sliding_window": 65}, "sliding_window 65 contradict"),
    ("decoder", {"local_attention": 130, "sliding_window": 65}, "trained with window_left 63"),
    ("decoder", {"sliding_window": -1}, "sliding_window must be"),
    ("encoder", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("encoder", {"num_attention_heads": 4}, "hidden_size"),
    ("encoder", {"hidden_size": "128"}, "hidden_size"),
    ("encoder", {"model_type": "bert"}, "model_type"),
    ("encoder", {"ettin_foundry": {"objective": "clm"}}, "ettin_foundry.objective"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_unsupported_or_ambiguous_settings_are_refused_by_name(kind, changes, words, edited):
    path = edited(kind, **changes)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        hf_config.read_config(path)
    assert str(path) in str(error.value)


def test_window_lost_by_transformers_4_is_noticed(edited):
    """What 4.57 writes when it loads and saves an export with window 64 twice: the plain keys say 63 again."""
    block = hf_config.config_json(shape(True, window_left=64), objective="clm", special_ids=IDS)["ettin_foundry"]
    path = edited("decoder", drop=("local_attention",), sliding_window=64, ettin_foundry=block)
    with pytest.raises(ValueError, match="trained with window_left 64.*Set local_attention to 130 and sliding_window to 65"):
        hf_config.read_config(path)


def shard(folder, out, names=("a.safetensors", "b.safetensors")):
    """The folder with its weights in two files and an index, as transformers writes large models."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(weights))}
    for file in names:
        save_file({n: t for n, t in weights.items() if weight_map[n] == file}, out / file.replace("/", "_"))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def test_sharded_weights_are_read_and_broken_files_refused(exported, tmp_path, models):
    folder = shard(exported["encoder"], tmp_path / "s")
    state, _, _ = import_folder(folder)
    assert all(torch.equal(state[name], t) for name, t in models["encoder"].state_dict().items())
    whole = shutil.copytree(exported["encoder"], tmp_path / "f")
    weights = (whole / "model.safetensors").read_bytes()
    for broken, damage, words in (
            (shard(exported["encoder"], tmp_path / "outside", ("a.safetensors", "../b.safetensors")), None,
             "names the shard '../b.safetensors'"),
            (folder, lambda: (folder / "b.safetensors").unlink(), "b.safetensors: not found"),
            (folder, lambda: shutil.copy(folder / "a.safetensors", folder / "b.safetensors"), "holds other tensors"),
            (folder, lambda: (folder / "model.safetensors.index.json").write_text("[]"), "not an index"),
            (whole, lambda: (whole / "model.safetensors").write_bytes(weights[:-100]), "not a whole safetensors file"),
            (whole, lambda: (whole / "model.safetensors").rename(whole / "pytorch_model.bin"), "bin is a pickle"),
            (whole, lambda: (whole / "config.json").write_text("{"), "config.json: Expecting"),
            (whole, lambda: (whole / "config.json").unlink(), "config.json: not found")):
        if damage:
            damage()
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            import_folder(broken)


def test_official_decoder_config_is_read(tmp_path):
    """Keys and values of the published tiny config derived from the official decoders, at nano's shape."""
    content = {"architectures": ["ModernBertDecoderForCausalLM"], "model_type": "modernbert-decoder", "hidden_size": 128,
               "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 50368,
               "max_position_embeddings": 7999, "global_rope_theta": 160000.0, "local_rope_theta": 160000.0,
               "local_attention": 128, "sliding_window": 64, "causal_mask": True, "is_causal": True,
               "classifier_pooling": "mean", "position_embedding_type": "sans_pos", "layer_norm_eps": 1e-5,
               "decoder_bias": True, "masked_prediction": False, "bos_token": "[CLS]", "eos_token": "[SEP]",
               "tokenizer_class": "PreTrainedTokenizerFast", "reference_compile": False, "attention_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    want = EttinConfig.for_size("nano", causal=True, max_position_embeddings=7999, global_rope_theta=160_000.0,
                                local_rope_theta=160_000.0)
    assert hf_config.read_config(tmp_path / "config.json") == (want, "clm")
