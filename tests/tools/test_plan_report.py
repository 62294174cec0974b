"""`ettin plan` as people see it: lines of a run, the table of a suite, JSON, and one line for bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from plan_suites import planned_150m

from ettin_foundry.cli import main as cli
from ettin_foundry.tools import plan_report
from ettin_foundry.training import recipes

ROOT = Path(__file__).resolve().parents[2]
ENC, DECAY = ROOT / "yamls/ettin-enc-150m.yaml", ROOT / "yamls/phases/decay.yaml"


def plan(capsys, *arguments):
    """(exit code, stdout, stderr) of `ettin plan arguments...`"""
    with pytest.raises(SystemExit) as end:
        cli.main(["plan", *map(str, arguments)])
    return end.value.code or 0, *capsys.readouterr()


def test_the_lines_of_a_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no data here
    prices = ("--price", "2.5", "--kwh-price", "0.3", "--pue", "1.1")
    code, out, _ = plan(capsys, ENC, DECAY, "variables.source=runs/x", *prices)
    assert code == 0
    for words in ("150m encoder, 149,655,232 parameters", "5,961 steps, 50,004,492,288 tokens",
                  "0.1500 a token, mask rate 0.15",
                  "GiB of 79.1 on each GPU: parameters 0.56, gradients 0.56, moments 1.12, copies 0.56",
                  "4 rows, 32,768 tokens, 64 a step, flash attention", "11.8 on 4x H100, 47.0 GPU hours",
                  "295,508 tokens/s a GPU: MFU 26.8% counting 6 per parameter and token (as the original)",
                  "36.2 kWh, GPUs at their limit of 700 W, PUE 1.1", "117.51 for GPUs at 2.5 an hour",
                  "10.86 for energy at 0.3 a kWh", "6 checkpoints of 1.8 GB, 10.8 GB in all"):
        assert words in out
    assert len({line.index(line[11:]) for line in out.splitlines()}) == 1  # one column of names, one of facts


def test_a_run_that_does_not_fit_says_what_would(capsys):
    _, out, _ = plan(capsys, ENC, "--gpus", "4xa10", "device_train_microbatch_size=100")
    assert "DOES NOT FIT, 2" in out and "rows would with 2 GiB to spare" in out


def test_every_stage_of_a_suite_and_their_sums():
    runs, _ = planned_150m()
    rows = [line.split() for line in plan_report.text(runs).splitlines()]
    assert [row[0] for row in rows[1:len(runs) + 1]] == [run.name for run in runs]
    total = rows[len(runs) + 1]
    # 2.05T tokens for each of the two members at the original's 470 hours for 2T
    assert total[:2] == ["total", "4.1T"] and float(total[3]) == pytest.approx(2 * 2.05 / 2 * 470, rel=0.01)
    assert float(total[4].replace(",", "")) == pytest.approx(4 * 0.7 * float(total[3]), rel=1e-3)
    # 2 x (200 + 30 + 6 + 5) checkpoints of three fp32 tensors a weight, and two runs' first weights
    weights = 4 * 149_655_232
    assert total[5] == "482" and float(total[6]) * 1e9 == pytest.approx(weights * (3 * 482 + 2), rel=1e-3)
    assert "money" not in rows[0]  # a column without any figure is left out


def test_a_suite_file_is_planned_stage_by_stage_and_as_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data/nano, whatever a user made in the clone
    file, picture = tmp_path / "suite.yaml", tmp_path / "pictures/plan.svg"
    nano = ROOT / "yamls/nano.yaml"
    file.write_text(f"name: pair\nroot: runs/pair\nscale: 0.5\nstages:\n  one: {{yaml: [{nano}]}}\n"
                    f"  two: {{yaml: [{nano}, {ROOT / 'yamls/options/decoder.yaml'}]}}\n")
    code, out, _ = plan(capsys, file, "scale=0.25", "--json", "--gpus", "1xH100", "--mfu", "0.05", "--kwh-price", "0.5",
                        "--picture", picture)
    found = json.loads(out)
    assert code == 0 and [stage["name"] for stage in found["stages"]] == ["one", "two"]
    assert found["stages"][0]["num_steps"] == math.ceil(1e6 / 8192)  # a quarter of nano's 4M tokens
    for key in ("num_tokens", "num_steps", "hours", "kwh", "money_energy", "checkpoints", "storage_bytes"):
        assert found["totals"][key] == pytest.approx(sum(stage[key] for stage in found["stages"]), rel=1e-12)
    assert found["totals"]["money"] is None and found["prices"]["kwh"] == 0.5
    memory = found["stages"][0]["memory_bytes"]
    resident = memory["parameters"] + memory["gradients"] + memory["moments"] + memory["copies"]
    assert memory["total"] == resident + max(memory["activations"] + memory["loss"], memory["update"])
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("arguments, message", [
    ([ENC, "--gpus", "4xH800"], "error: --gpus: '4xH800' given"),
    ([ENC, "--gpus", "5xH100"], "error: global_train_batch_size: 2816 given, --gpus is 5x H100"),
    ([ENC, "--picture", "plan.txt"], "error: --picture: plan.txt given; a name that ends in .png"),
    ([ENC, "max_duration=3ep"], "error: max_duration: '3ep' given"),
    ([ENC, "variables.mask_rate=1.5"], "error: train_loader.mask_rate must be"),
    ([ENC, "~/no.yaml"], "error: ~/no.yaml: no such file"),
    ([ENC, "optimizer=null"], "error: optimizer: not given; every run needs it"),
    ([ENC, "save_intervall=1000ba"], "error: save_intervall: unknown key"),
    ([ENC, "model.name=mpt_causal_lm"], "error: model.name: 'mpt_causal_lm' given; only ettin"),
    ([ROOT / "yamls/suite/nano.yaml", "scale=0"], "scale: 0 given"),
    ([ROOT / "yamls/suite/ettin-150m.yaml", "--gpus", "3xH100"], "error: encoder-pretrain: global_train_batch_size: 2816"),
    ([ENC, "--pue", "0.5"], "error: --pue: 0.5 given"),
])
def test_bad_input_is_one_line(capsys, arguments, message):
    code, out, err = plan(capsys, *arguments)
    assert code == 1 and not out and message in err and len(err.splitlines()) == 1


def test_a_plan_needs_neither_torch_nor_the_host():
    """They alone take ten seconds to import."""
    code = (f"import sys; from ettin_foundry.cli import main as cli\ntry:\n    cli.main(['plan', {str(ENC)!r}])\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'transformers', 'composer', 'llmfoundry', 'matplotlib'} & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("run") and out.strip().endswith("[]")


def test_runs_are_planned_for_what_they_can_use():
    """The original's four GPUs, fewer where the batch allows fewer, a CPU for fp32."""
    nano = recipes.resolved([str(ROOT / "yamls/nano.yaml")])
    big = recipes.resolved([str(ENC)])
    whole = {**big, "global_train_batch_size": 128, "device_train_microbatch_size": 128}
    runs = plan_report.plan_chain([("nano", nano), ("big", big), ("whole", whole)])
    assert [str(run.cost.machine) for run in runs] == ["one CPU process", "4x H100", "1x H100"]
    assert plan_report.totals(runs)["hours"] is None and "not known" in plan_report.text(runs[:1])
