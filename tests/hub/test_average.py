"""Merged checkpoints: numpy's mean in float64, what they say they were made of, what they are good for, what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import parity
import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_cli import equal_states, run
from test_revisions import content, model, save

from ettin_foundry.hub import average as merge
from ettin_foundry.hub import weights_file
from ettin_foundry.model.weights import import_folder
from ettin_foundry.training import checkpoints as checkpoint
from ettin_foundry.training import sources

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    parity.tiny_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture
def runs(tokens, tmp_path):
    """A save folder with three checkpoints, a link and a file cut short; and the models in them."""
    models = [model("mlm", seed) for seed in range(3)]
    past = ({"objective": "mlm", "tokens": 500},)
    for batch, source in zip((9, 10, 11), models):
        save(tmp_path / "run" / f"ep0-ba{batch}-rank0.pt", source, "mlm", tokens, batch=batch, phase="decay", lineage=past,
             run_hash="b" * 64)
    (tmp_path / "run" / "latest-rank0.pt").symlink_to("ep0-ba11-rank0.pt")
    (tmp_path / "run" / "ep0-ba12-rank0.pt").write_bytes(b"PK half a file")
    return tmp_path / "run", models


def average(models, weights=None):
    """numpy, float64, rounded once."""
    states = [source.state_dict() for source in models]
    return {name: torch.from_numpy(np.average(np.stack([s[name].double().numpy() for s in states]), axis=0,
                                              weights=weights).astype(np.float32)) for name in states[0]}


@pytest.mark.parametrize("stretched", [False, True])
def test_the_mean_is_numpys_in_float64_bit_for_bit(runs, stretched, tmp_path, capsys, monkeypatch):
    folder, models = runs
    if stretched:
        monkeypatch.setattr(weights_file, "_LEAST", 1)
    code, out, err = run(capsys, "merge", folder, tmp_path / "m.pt", "--last", 3)
    assert code == 0, err
    assert "mean of 3 checkpoints (ep0-ba9-rank0.pt, ep0-ba10-rank0.pt, ep0-ba11-rank0.pt)" in out
    merged, _ = checkpoint.load_model_state(tmp_path / "m.pt")
    assert equal_states(merged, average(models))
    rounded = sum(source.state_dict()["head.dense.weight"] for source in models) / 3  # what fp32 would give is not it
    assert not torch.equal(rounded, merged["head.dense.weight"])
    assert len(list(tmp_path.glob("*.pt"))) == 1 and not list(tmp_path.glob(".*"))


def test_stretches_cover_every_tensor_once_in_about_eighths():
    sizes = {f"t{i}": size for i, size in enumerate([900 << 20, 100 << 20, *[10 << 20] * 60])}
    found = weights_file.stretches(sizes)
    assert [name for names in found for name in names] == list(sizes)
    assert all(sum(sizes[n] for n in names) <= sum(sizes.values()) // 8 or len(names) == 1 for names in found)
    assert len(found) <= 9


def test_weights_count_as_they_say_and_sharded_checkpoints_are_read(runs, tokens, tmp_path, capsys):
    folder, models = runs
    dcp.save(content(models[2], "mlm", tokens, batch=11, phase="decay"), checkpoint_id=tmp_path / "ep0-ba11")
    sources = [folder / "ep0-ba9-rank0.pt", tmp_path / "ep0-ba11"]
    code, _, err = run(capsys, "merge", *sources, tmp_path / "m.pt", "--weights", "1,3")
    assert code == 0, err
    merged, record = checkpoint.load_model_state(tmp_path / "m.pt")
    expected = average([models[0], models[2]], [1, 3])
    for name, tensor in merged.items():  # products rounded in another order: the last bit of fp32 at most
        assert torch.allclose(tensor, expected[name], rtol=2**-23, atol=0), name
    assert [part["weight"] for part in record["lineage"][-1]["merged_from"]] == [0.25, 0.75]


def test_a_merged_file_says_what_it_was_made_of_and_exports(runs, tokens, tmp_path, capsys):
    folder, models = runs
    assert run(capsys, "merge", folder, tmp_path / "m.pt", "--last", 2)[0] == 0
    _, record = checkpoint.load_model_state(tmp_path / "m.pt")
    parts = [{"source": f"run/ep0-ba{batch}-rank0.pt", "weight": 0.5, "run_name": "r", "batch": batch, "tokens": 10 * batch,
              "run_hash": "b" * 64} for batch in (10, 11)]
    assert record["lineage"] == [{"objective": "mlm", "tokens": 500}, {"merged_from": parts, "objective": "mlm"}]
    assert (record["tokens"], record["phase"], record["objective_schedule"]) == (110, "decay", "mlm")
    code, _, err = run(capsys, "export", tmp_path / "m.pt", tmp_path / "hf")
    assert code == 0, err
    assert equal_states(import_folder(tmp_path / "hf")[0], average(models[1:]))
    card = (tmp_path / "hf" / "README.md").read_text()
    merged_from = ", ".join(f"run/ep0-ba{batch}-rank0.pt (weight 0.5, {10 * batch} tokens)" for batch in (10, 11))
    for row in (f"merged from | {merged_from}", "tokens seen | 610", "continued from | objective mlm, tokens 500",
                "phase | decay"):
        assert f"| {row} |" in card, row
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["ettin_foundry"]["lineage"] == record["lineage"]


def test_a_merged_file_starts_a_phase(runs, tokens, tmp_path, capsys):
    """What `ettin_phase` with keep: weights makes the host do: load_path with load_weights_only, strict."""
    from composer import Trainer

    from ettin_foundry.model.composer import EttinModel

    folder, models = runs
    assert run(capsys, "merge", folder, tmp_path / "m.pt", "--last", 2)[0] == 0
    source = sources.read_source("callbacks.ettin_phase.source", str(tmp_path / "m.pt"))
    assert not source.has_moments and source.fingerprint == {"ids": 1}
    target = sources.Target(source.record["config"], ("mlm",), {"ids": 1, "vocab_size": None, "special_ids": None,
                                                              "vocab_sha256": None, "probe_sha256": None})
    assert sources.compare("callbacks.ettin_phase", source, target, (), crossing=False) == {}
    fresh = EttinModel(size="nano", objective="mlm", max_seq_len=1024, vocab_size=320, num_hidden_layers=1)
    trainer = Trainer(model=fresh, load_path=str(tmp_path / "m.pt"), load_weights_only=True, load_strict_model_weights=True,
                      device="cpu", auto_log_hparams=False, progress_bar=False)
    trainer.close()
    assert equal_states(fresh.model.state_dict(), average(models[1:]))


def test_what_has_no_mean_is_refused_with_both_values(runs, tokens, tmp_path, capsys):
    folder, models = runs
    a, b = folder / "ep0-ba9-rank0.pt", folder / "ep0-ba10-rank0.pt"

    def other(name, objective="mlm", record=None, **changes):
        return save(tmp_path / f"{name}.pt", model(objective, **changes), objective, tokens, **(record or {"batch": 50}))

    bad = model("mlm")
    with torch.no_grad():
        bad.trunk.final_norm.weight[3] = math.nan
    save(tmp_path / "nan.pt", bad, "mlm", tokens, batch=50)
    copy = tmp_path / "copy.pt"
    copy.write_bytes(a.read_bytes())
    plain = content(models[0], "mlm", tokens)
    del plain["state"]["callbacks"]["Clock"]
    torch.save(plain, tmp_path / "plain.pt")
    (tmp_path / "there.pt").write_bytes(b"x")
    out = tmp_path / "out.pt"
    for arguments, words in (
        ((a, other("theta", global_rope_theta=160000.0), out), ["global_rope_theta: 10000.0 in", "160000.0 in", "theta.pt"]),
        ((a, other("mntp", "mntp"), out), ["objective: 'mlm' in", "'mntp' in"]),
        ((a, other("vocab", vocab_size=384), out), ["vocab_size: 320 in", "384 in"]),
        ((a, other("wide", num_hidden_layers=2), out), ["num_hidden_layers: 1 in", "2 in"]),
        ((a, other("t", record={"batch": 50, "tokenizer_fingerprint": '{"ids": 2}'}), out), ["tokenizer ids: 1 in", "2 in"]),
        ((a, out), ["at least two checkpoints"]),
        ((a, b, a, out), ["the same checkpoint as"]),
        ((folder / "ep0-ba11-rank0.pt", folder / "latest-rank0.pt", out), ["latest-rank0.pt: the same checkpoint as"]),
        ((a, copy, out), ["copy.pt: the same checkpoint as", "ep0-ba9-rank0.pt"]),
        ((a, tmp_path / "nan.pt", out), ["nan.pt: trunk.final_norm.weight has NaN"]),
        ((a, tmp_path / "plain.pt", out), ["plain.pt: holds no record"]),
        ((folder, out, "--last", 4), ["--last: 4 given", "holds 3 complete checkpoint(s)"]),
        ((folder, out, "--last", 1), ["at least two checkpoints", "raise --last"]),
        ((a, b, out, "--last", 2), ["--last: 2 given with 2 sources"]),
        ((tmp_path / "no", out, "--last", 2), ["no such folder"]),
        ((a, b, out, "--weights", "1"), ["--weights: 1.0 given; 2 numbers"]),
        ((a, b, out, "--weights", "1,0"), ["--weights: 1.0, 0.0 given"]),
        ((a, b, out, "--weights", "1;2"), ["--weights: '1;2' given"]),
        ((a, b, tmp_path / "there.pt"), ["there.pt: exists", "--overwrite"]),
        ((a, b, tmp_path / "out"), ["must end in .pt"]),
    ):
        code, _, err = run(capsys, "merge", *arguments)
        line = err.strip().splitlines()[-1]
        assert code == 1 and line.startswith("error: ") and all(word in line for word in words), (arguments, err)
    assert not out.exists() and not list(tmp_path.glob(".*")) and (tmp_path / "there.pt").read_bytes() == b"x"
    assert run(capsys, "merge", a)[0] == 2


def test_what_does_not_read_back_is_not_left_there(runs, tmp_path, monkeypatch):
    folder, _ = runs
    save_whole = torch.save

    def bad_disk(value, path):
        value["state"]["model"]["model.output_bias"] = value["state"]["model"]["model.output_bias"] + 1
        save_whole(value, path)

    monkeypatch.setattr(torch, "save", bad_disk)
    with pytest.raises(ValueError, match="does not read back the same"):
        merge.merge_checkpoints([folder / "ep0-ba9-rank0.pt", folder / "ep0-ba10-rank0.pt"], tmp_path / "m.pt")
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))
