"""Hugging Face folders read: those of every transformers version, and a refusal by name of what cannot be expressed."""

import dataclasses
import json
import re
import shutil

import parity
import pytest
import torch
from safetensors.torch import load_file, save_file

from ettin_foundry.model import hf_config
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.weights import export_model, from_hf, import_folder, to_hf

IDS = {"unk": 295, "cls": 296, "sep": 297, "pad": 298, "mask": 299}


def shape(causal: bool, **changes) -> EttinConfig:
    return EttinConfig.for_size("nano", causal=causal, vocab_size=320, **changes)


@pytest.fixture(scope="module")
def encoder():
    return parity.random_model(shape(False))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, encoder):
    """Two exports; tests copy what they change."""
    root, tokenizer = tmp_path_factory.mktemp("exported"), parity.tiny_tokenizer()
    decoder = parity.random_model(shape(True))
    return {"encoder": export_model(encoder, encoder.config, tokenizer, root / "encoder", objective="mlm"),
            "decoder": export_model(decoder, decoder.config, tokenizer, root / "decoder", objective="clm")}


@pytest.fixture
def edited(exported, tmp_path):
    """edited(kind, drop, **changes): the config.json of an export with keys removed and changed, as a path."""

    def edit(kind, drop=(), **changes):
        content = json.loads((exported[kind] / "config.json").read_text())
        content = {k: v for k, v in {**content, **changes}.items() if k not in drop}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path / "config.json"

    return edit


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


@pytest.mark.parametrize("kind, changes, words", [
    ("encoder", {"attention_bias": True}, "attention_bias is True"),
    ("encoder", {"mlp_bias": True}, "mlp_bias"), ("encoder", {"norm_bias": True}, "norm_bias"),
    ("decoder", {"decoder_bias": False}, "decoder_bias"), ("decoder", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ("encoder", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ("decoder", {"classifier_activation": "relu"}, "classifier_activation"),
    ("encoder", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ("encoder", {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "yarn"}}}, "rope_parameters"),
    ("encoder", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
    ("encoder", {"local_rope_theta": 160000.0}, "local_rope_theta contradict"),
    ("encoder", {"sliding_window": 128}, "sliding_window 128 contradict"),
    ("decoder", {"sliding_window": 65}, "sliding_window 65 contradict"),
    ("decoder", {"local_attention": 130, "sliding_window": 65}, "trained with window_left 63"),
    ("decoder", {"sliding_window": -1}, "sliding_window is -1"),
    ("encoder", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("encoder", {"num_attention_heads": 4}, "hidden_size"),
    ("encoder", {"hidden_size": "128"}, "hidden_size"),
    ("encoder", {"model_type": "bert"}, "model_type is 'bert'"),
    ("encoder", {"ettin_foundry": {"objective": "clm"}}, "ettin_foundry.objective is 'clm'"),
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


def test_training_dropouts_of_others_are_named_not_taken(edited, caplog):
    config, _ = hf_config.read_config(edited("encoder", mlp_dropout=0.1))
    assert "mlp_dropout 0.1 not taken over" in caplog.text and config.attn_out_dropout == 0.1


# ---------------------------------------------------------------- strictness


def test_from_hf_is_strict_and_names_what_is_wrong(encoder):
    config, good = encoder.config, to_hf(encoder.state_dict(), encoder.config)
    with pytest.raises(ValueError, match="missing head.norm.weight"):
        from_hf({k: v for k, v in good.items() if k != "head.norm.weight"}, config)
    with pytest.raises(ValueError, match="unknown classifier.weight"):
        from_hf({**good, "classifier.weight": torch.zeros(2, 128)}, config)
    with pytest.raises(ValueError, match=r"decoder.bias: shape \(5,\) given"):
        from_hf({**good, "decoder.bias": torch.zeros(5)}, config)
    with pytest.raises(ValueError, match="missing.*q_proj"):
        from_hf(good, dataclasses.replace(config, causal=True, window_left=-1))


def test_stored_tied_matrix_is_taken_only_when_equal(encoder):
    good = to_hf(encoder.state_dict(), encoder.config)
    embedding = good["model.embeddings.tok_embeddings.weight"]
    assert from_hf({**good, "decoder.weight": embedding.clone()}, encoder.config).keys() == encoder.state_dict().keys()
    with pytest.raises(ValueError, match="decoder.weight: differs"):
        from_hf({**good, "decoder.weight": embedding + 1e-7 * embedding.abs().max()}, encoder.config)


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


def test_sharded_weights_are_read(exported, tmp_path, encoder):
    state, _, _ = import_folder(shard(exported["encoder"], tmp_path / "s"))
    assert all(torch.equal(state[name], t) for name, t in encoder.state_dict().items())


def test_broken_shards_are_refused(exported, tmp_path):
    with pytest.raises(ValueError, match="names the shard '../b.safetensors'"):
        import_folder(shard(exported["encoder"], tmp_path / "outside", ("a.safetensors", "../b.safetensors")))
    folder = shard(exported["encoder"], tmp_path / "gone")
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="b.safetensors: named in"):
        import_folder(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(ValueError, match="holds other tensors"):
        import_folder(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        import_folder(folder)


def test_pickles_missing_and_truncated_files_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported["encoder"], tmp_path / "f")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        import_folder(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin, a pickle"):
        import_folder(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        import_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: not found"):
        import_folder(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        import_folder(tmp_path / "nothing")
