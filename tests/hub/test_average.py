"""Averaged checkpoints: numpy's mean in float64, what they say they were made of, what is refused."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import equal_states, nano, save, tiny_tokenizer

from ettin_foundry.data.tokenizer import difference
from ettin_foundry.hub.average import average_checkpoints, import_weights
from ettin_foundry.hub.folder import export_checkpoint
from ettin_foundry.hub.load import load_model


@pytest.fixture
def runs(tmp_path):
    """A save folder with three checkpoints, a link and a file cut short; and the models in them."""
    models, folder = [nano("mlm", seed) for seed in range(3)], tmp_path / "run"
    for batch, source in zip((9, 10, 11), models):
        save(folder / f"ep0-ba{batch}-rank0.pt", source, "mlm", batch=batch, phase="decay", run_hash="b" * 64,
             lineage=({"objective": "mlm", "tokens": 500},))
    (folder / "latest-rank0.pt").symlink_to("ep0-ba11-rank0.pt")
    (folder / "ep0-ba12-rank0.pt").write_bytes(b"PK half a file")
    return folder, models


def average(models):
    """numpy, float64, rounded once."""
    states = [source.state_dict() for source in models]
    return {name: torch.from_numpy(np.mean([s[name].double().numpy() for s in states], axis=0).astype(np.float32))
            for name in states[0]}


def test_the_mean_is_numpys_in_float64_bit_for_bit(runs, tmp_path):
    folder, models = runs
    config, sources = average_checkpoints([folder], tmp_path / "m.pt", last=3)
    assert [path.name for path in sources] == ["ep0-ba9-rank0.pt", "ep0-ba10-rank0.pt", "ep0-ba11-rank0.pt"]
    merged = load_model(tmp_path / "m.pt").state
    assert config == models[0].config and equal_states(merged, average(models))
    rounded = sum(source.state_dict()["head.dense.weight"] for source in models) / 3  # what fp32 would give is not it
    assert not torch.equal(rounded, merged["head.dense.weight"])
    assert len(list(tmp_path.glob("*.pt"))) == 1 and not list(tmp_path.glob(".*"))


def test_a_mean_says_what_it_was_made_of_and_exports(runs, tmp_path):
    folder, models = runs
    average_checkpoints([folder], tmp_path / "m.pt", last=2)
    loaded = load_model(tmp_path / "m.pt")
    parts = [{"source": f"run/ep0-ba{batch}-rank0.pt", "run_name": "r", "batch": batch, "tokens": 10 * batch,
              "run_hash": "b" * 64} for batch in (10, 11)]
    lineage = [{"objective": "mlm", "tokens": 500}, {"merged_from": parts, "objective": "mlm"}]
    assert loaded.facts == {"tokens": 610, "phase": "decay", "lineage": lineage}
    tiny_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))  # found beside the file
    export_checkpoint(tmp_path / "m.pt", tmp_path / "hf")
    import_weights(tmp_path / "hf", tmp_path / "back.pt")
    back = load_model(tmp_path / "back.pt")
    assert equal_states(back.state, average(models[1:])) and {**back.facts, "phase": "decay"} == loaded.facts
    assert not difference(back.record["tokenizer_fingerprint"], loaded.record["tokenizer_fingerprint"])


def test_what_has_no_mean_is_refused_with_both_values(runs, tmp_path):
    folder, models = runs
    a, b = folder / "ep0-ba9-rank0.pt", folder / "ep0-ba10-rank0.pt"
    bad, out = nano("mlm"), tmp_path / "out.pt"
    bad.trunk.final_norm.weight.data[3] = math.nan
    nan = save(tmp_path / "nan.pt", bad, "mlm", batch=50)
    theta = save(tmp_path / "theta.pt", nano("mlm", global_rope_theta=160000.0), "mlm", batch=50)
    mntp = save(tmp_path / "mntp.pt", nano("mntp"), "mntp", batch=50)
    tokens = save(tmp_path / "t.pt", nano("mlm"), "mlm", batch=50, tokenizer_fingerprint={})
    copy = Path(shutil.copy(a, tmp_path / "copy.pt"))
    (tmp_path / "there.pt").write_bytes(b"x")
    for sources, place, last, words in (
            ([a, theta], out, None, "rope_theta.*10000.0 in.*160000.0 in.*theta"),
            ([a, mntp], out, None, "objective.*mlm.*mntp"),
            ([a, tokens], out, None, "t.pt.*vocab_size is None, not 300 as"),
            ([a], out, None, "at least two checkpoints"),
            ([folder / "ep0-ba11-rank0.pt", folder / "latest-rank0.pt"], out, None, "latest-rank0.pt: the same check"),
            ([a, copy], out, None, "copy.pt: the same checkpoint as .*ep0-ba9-rank0.pt"),
            ([a, nan], out, None, "nan.pt: trunk.final_norm.weight: has NaN"),
            ([folder], out, 4, "--last must be at most 3"),
            ([a, b], tmp_path / "there.pt", None, "there.pt: exists"), ([a, b], tmp_path / "out", None, "end in .pt")):
        with pytest.raises(ValueError, match=words):
            average_checkpoints(sources, place, last=last)
    assert not out.exists() and not list(tmp_path.glob(".*")) and (tmp_path / "there.pt").read_bytes() == b"x"
