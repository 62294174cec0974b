"""model.onnx and `ettin parity`: held to the flat model and to transformers; a model that differs is refused."""

import functools
import json
import shutil

import parity
import pytest
import torch

from ettin_foundry.hub.folder import export_model
from ettin_foundry.hub.parity import ONNX, TOLERANCE, Padded, compare, onnx_logits

model = functools.partial(parity.nano, max_position_embeddings=256)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_padded_batches_give_the_logits_of_documents_alone(objective):
    own = model(objective)
    worst, largest, same = compare(own, Padded(own), (7, 200, 33))
    assert worst < 1e-4 and same == 1 and largest > 1  # sums in another order, at logits of 10


def test_an_exported_graph_runs_at_any_length_and_one_that_differs_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript (pip install 'ettin-foundry[onnx]')")
    own, tokenizer = model("clm"), parity.tiny_tokenizer()
    folder = export_model(own, own.config, tokenizer, tmp_path / "m", objective="clm", onnx=True)
    assert compare(own, lambda *batch: onnx_logits(folder, *batch), (3, 250))[0] < TOLERANCE

    class OfOtherWeights:
        def save(self, path):
            shutil.copy(folder / ONNX, path)

    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: OfOtherWeights())
    for objective, options, words in (("clm", {"onnx": True}, "within 0.001, got"), ("clm", {"trunk": True}, "encoder"),
                                      ("clm", {"onnx": True, "dtype": "bf16"}, "in fp32")):
        with pytest.raises(ValueError, match=words):
            export_model(model("clm", 1), own.config, tokenizer, tmp_path / "n", objective=objective, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_rotary_base_that_transformers_misses_fails_parity(ettin, tmp_path):
    own, tokenizer = model("mlm"), parity.tiny_tokenizer()
    folder = export_model(own, own.config, tokenizer, tmp_path / "m", objective="mlm")
    content = json.loads((folder / "config.json").read_text())
    del content["global_rope_theta"]  # transformers 4 takes 160,000 then, and does not read rope_parameters
    (folder / "config.json").write_text(json.dumps(content))
    code, out, _ = ettin("parity", folder, "--json")
    found = {found["name"]: found["ok"] for found in map(json.loads, out.splitlines())}
    assert code == 1 and not any(found[name] for name in ("eager", "sdpa", "saved again"))
    decoder = export_model(model("clm"), model("clm").config, tokenizer, tmp_path / "d", objective="clm")
    assert "needs transformers 4.56 or later, got 4.51.3" in ettin("parity", decoder)[2]
