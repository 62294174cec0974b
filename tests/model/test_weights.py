"""Weights and config.json of Hugging Face: names, parity with transformers, foreign folders read, and what is refused.

The installed transformers has no decoder class: `make parity` (tests/parity.py) holds decoders to newer versions.
"""

import dataclasses
import json
import re

import parity
import pytest
import torch
from safetensors.torch import save_file

from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.hf_config import config_json, read_config
from ettin_foundry.model.weights import from_hf, import_folder, plain_state, to_hf

CONFIGS = {kind: EttinConfig.for_size("nano", causal=causal, vocab_size=320)
           for kind, causal in (("encoder", False), ("decoder", True))}


@pytest.fixture(scope="module")
def models():
    return {kind: parity.random_model(config) for kind, config in CONFIGS.items()}


@pytest.fixture
def edited(tmp_path):
    """edited(kind, drop, **changes): the path of an export's config.json with keys removed and changed."""

    def edit(kind, drop=(), **changes):
        ids = dict.fromkeys(("cls", "sep", "pad", "mask"), 1)
        content = config_json(CONFIGS[kind], objective="clm" if kind == "decoder" else "mlm", special_ids=ids)
        content = {key: value for key, value in {**content, **changes}.items() if key not in drop}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path / "config.json"

    return edit


@pytest.mark.parametrize("case", [c for c, (_, causal, _, _) in parity.CASES.items() if not causal])
def test_exported_encoder_equals_installed_transformers(case, tmp_path):
    """Logits at 16, 200 and 1,500 tokens, eager and SDPA; the card's code; the tokenizer; a save by transformers."""
    assert list(parity.run_case(case, parity.tiny_tokenizer(), tmp_path))[-1].startswith("control ")


def test_weights_come_out_in_fp32_and_only_what_must_change_is_copied(models):
    """An export of a mapped checkpoint must not hold the weights twice."""
    state, config = models["decoder"].state_dict(), models["decoder"].config
    out = to_hf(state, config)
    own = {t.untyped_storage().data_ptr() for t in state.values()}
    assert {t.untyped_storage().data_ptr() for t in out.values()} == own
    assert all(t.is_contiguous() for t in out.values())
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
            (from_hf, {**good, "decoder.weight": embedding * (1 + 1e-6)}, {}, "decoder.weight.*differs")):
        with pytest.raises(ValueError, match=words):
            function(given, dataclasses.replace(config, **changes))


@pytest.mark.parametrize("kind, drop", [
    *((kind, drop) for kind in ("encoder", "decoder") for drop in (
        ["rope_parameters", "layer_types", "sliding_window", "dtype"],  # the keys of 4.x alone
        ["global_rope_theta", "local_rope_theta", "global_attn_every_n_layers", "torch_dtype"])),  # what 5.x drops
    ("decoder", ["local_attention"])])  # what 4.54 to 5.0 drop
def test_keys_of_each_generation_alone_read_the_same(kind, drop, edited):
    assert read_config(edited(kind, [*drop, "ettin_foundry"]))[0] == CONFIGS[kind]


@pytest.mark.parametrize("kind, version, local", [("encoder", "4.48.0", 10_000.0), ("encoder", "5.23.0", 10_000.0),
                                                  ("decoder", "4.57.6", 160_000.0), ("decoder", "5.0.0", 10_000.0)])
def test_missing_bases_are_those_of_the_version_that_saved(kind, version, local, edited, caplog):
    path = edited(kind, ["rope_parameters", "global_rope_theta", "local_rope_theta"], transformers_version=version)
    config, _ = read_config(path)
    assert (config.global_rope_theta, config.local_rope_theta) == (160_000.0, local)
    assert "no rotary base for local layers" in caplog.text


@pytest.mark.parametrize("kind, changes, words", [
    ("encoder", {"attention_bias": True}, "attention_bias must be False, got True"),
    ("encoder", {"rope_parameters": {"full_attention": {"rope_theta": 1e4, "rope_type": "yarn"}}}, "rope_parameters"),
    ("encoder", {"local_rope_theta": 160000.0}, "local_rope_theta contradict"),
    ("decoder", {"sliding_window": 65}, "sliding_window 65 contradict"),
    ("decoder", {"local_attention": 130, "sliding_window": 65}, "trained with window_left 63"),
    ("decoder", {"sliding_window": -1}, "sliding_window must be"),
    ("encoder", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("encoder", {"model_type": "bert"}, "model_type"),
    ("encoder", {"ettin_foundry": {"objective": "clm"}}, "ettin_foundry.objective"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_unsupported_or_ambiguous_settings_are_refused_by_name(kind, changes, words, edited):
    path = edited(kind, **changes)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_broken_files_are_refused(edited, models):
    folder = edited("encoder").parent
    whole = folder / "model.safetensors"
    save_file(to_hf(models["encoder"].state_dict(), CONFIGS["encoder"]), whole)
    for damage, words in (
            (lambda: whole.write_bytes(whole.read_bytes()[:-100]), "not a whole safetensors file"),
            (lambda: whole.rename(folder / "pytorch_model.bin"), "bin is a pickle.*max_shard_size"),
            (lambda: (folder / "config.json").unlink(), "config.json: not found")):
        damage()
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            import_folder(folder)
