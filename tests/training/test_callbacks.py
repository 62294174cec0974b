"""Exports, samples and data figures."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("composer")
pytest.importorskip("llmfoundry")

from composer import Trainer  # noqa: E402
from composer.core import Precision, Time, Timestamp  # noqa: E402
from torch import nn  # noqa: E402

from ettin_foundry.data import tokenizer  # noqa: E402
from ettin_foundry.model import weights as hf  # noqa: E402
from ettin_foundry.model.composer import EttinModel  # noqa: E402
from ettin_foundry.training.callbacks import DataMonitor, ExportHF, LogSamples  # noqa: E402
from ettin_foundry.training.clock import Clock  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_an_exported_folder_is_written_at_intervals_and_reads_back(tokenizer_dir, tmp_path):
    model = EttinModel(tokenizer.load(str(tokenizer_dir)), size="nano", objective="mlm", max_seq_len=64, vocab_size=512)
    clock, export = Clock({"variables": {"phase": "extend"}}), ExportHF("2ba", str(tmp_path / "{run_name}"))
    run = Trainer(model=model, device="cpu", callbacks=[clock, export], run_name="exported", progress_bar=False,
                  max_duration="5ba")
    clock.lineage = ({"objective": "clm", "tokens": 5},)
    export.fit_start(run.state, run.logger)
    for _ in range(5):
        run.state.previous_timestamp = run.state.timestamp
        run.state.timestamp = run.state.timestamp.to_next_batch(tokens=10)
        export.batch_checkpoint(run.state, run.logger)
    export.fit_end(run.state, run.logger)
    run.close()
    folder = tmp_path / "exported"
    assert sorted(path.name for path in folder.iterdir()) == ["ext2", "ext4", "ext5"]  # loaded: no step0
    ours = json.loads((folder / "ext5" / "config.json").read_text())["ettin_foundry"]
    assert ours["tokens"] == 55 and ours["checkpoint"]["batch"] == 5 and ours["checkpoint"]["run_name"] == "exported"
    weights, _, objective = hf.import_folder(folder / "ext5")
    assert objective == "mlm"
    for name, value in model.model.named_parameters():
        assert torch.equal(value, weights[name]), name


def test_drawn_weights_are_exported_as_step0_and_a_run_without_a_phase_counts_batches(tokenizer_dir, tmp_path):
    model = EttinModel(tokenizer.load(str(tokenizer_dir)), size="nano", objective="clm", max_seq_len=64, vocab_size=512)
    export = ExportHF("2ba", str(tmp_path))
    run = Trainer(model=model, device="cpu", callbacks=[Clock({}), export], progress_bar=False, max_duration="5ba")
    export.fit_start(run.state, run.logger)
    run.state.timestamp = Timestamp(batch=3, token=9)
    export.fit_start(run.state, run.logger)  # as a resumed run does
    export.fit_end(run.state, run.logger)
    run.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ba3", "step0"]
    assert torch.equal(hf.import_folder(tmp_path / "step0")[0]["output_bias"], model.model.output_bias)


# ------------------------------------------------------------------ samples and figures


class Sampler(nn.Module):
    """Draws random numbers and must be in eval mode."""

    objective = "clm"

    def generate(self, prompts, max_new_tokens):
        assert not self.training
        torch.randn(100)
        return [f"{prompt} {max_new_tokens}" for prompt in prompts]

    def fill_mask(self, texts, top_k):
        return [[("a", 0.5)] * top_k for _ in texts]


def sample(callback, model, batch=2):
    tables = []
    state = SimpleNamespace(
        model=model, fsdp_enabled=False, precision=Precision.FP32, max_duration=Time.from_timestring("10ba"),
        timestamp=Timestamp(batch=batch), previous_timestamp=Timestamp(batch=batch - 1),
        get_elapsed_duration=lambda: Time(0.2, "dur"))
    callback.init(state, None)
    callback.batch_end(state, SimpleNamespace(log_table=lambda columns, rows, name: tables.append(rows)))
    return tables


def test_samples_leave_mode_and_random_state_as_they_were(caplog):
    model = Sampler().train()
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        tables = sample(LogSamples("2ba", ["once"], max_new_tokens=9), model)
    assert tables == [[["once", "'once 9'"]]] and "once 9" in caplog.text
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert sample(LogSamples("2ba", ["once"]), model, batch=3) == []
    model.objective = "mlm"
    assert sample(LogSamples("2ba", ["[MASK]"], top_k=2), model) == [[["[MASK]", "'a' 0.500, 'a' 0.500"]]]


@pytest.mark.parametrize(("make", "says"), [
    (lambda: LogSamples("1ep", ["a"]), "interval: '1ep'"),
    (lambda: LogSamples("0ba", ["a"]), "interval: '0ba'"),
    (lambda: LogSamples("1ba", []), "prompts"),
    (lambda: LogSamples("1ba", "a"), "prompts"),  # type: ignore[arg-type]
    (lambda: ExportHF("1dur", "x"), "interval: '1dur'"),
    (lambda: ExportHF("1ba", "s3://x"), "only a local folder"),
])
def test_settings_without_sense_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_samples_of_a_sharded_model_are_refused():
    with pytest.raises(ValueError, match="sharded"):
        LogSamples("1ba", ["a"]).fit_start(SimpleNamespace(fsdp_enabled=True), None)  # type: ignore[arg-type]


def test_data_figures_of_a_batch():
    logged = {}
    batch = {"sequence_id": torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1]]),
             "labels": torch.tensor([[5, -100, 7, -100], [-100] * 4])}
    DataMonitor().batch_start(SimpleNamespace(batch=batch), SimpleNamespace(log_metrics=logged.update))  # type: ignore[arg-type]
    assert logged == {"data/fill": 3 / 8, "data/documents": 2, "data/targets": 2, "data/target_rate": 2 / 3}
