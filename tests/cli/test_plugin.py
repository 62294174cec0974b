"""LLM-Foundry finds every name, by entry point and by `register()`, and the two tables agree."""

import configparser
import os
import subprocess
import sys
from pathlib import Path

import nano_run

import ettin_foundry

ROOT = Path(__file__).resolve().parents[2]


def test_entry_points_mirror_the_registry_table():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = {}
    for group, lines in setup["options.entry_points"].items():
        if group != "console_scripts":
            pairs = (line.split(" = ") for line in lines.strip().splitlines())
            groups[group.removeprefix("llmfoundry_")] = dict(pairs)
    assert groups == ettin_foundry.REGISTRY


STOCK = """
import sys, catalogue, llmfoundry, ettin_foundry
taken = {key[1:] for key in catalogue.REGISTRY if key[0] == "llmfoundry"}
ours = {(group, name) for group, names in ettin_foundry.REGISTRY.items() for name in names}
print("SHADOWED", sorted(taken & ours))
from typer.testing import CliRunner
from llmfoundry.cli.cli import app
for group, name in sorted(ours):
    found = CliRunner().invoke(app, ["registry", "find", group, name])
    print("FOUND", name, found.exit_code, "ettin_foundry" in found.output)
sys.argv = ["llmfoundry", "train", sys.argv[1]]
app(standalone_mode=False)
print("TRAINED")
"""


def test_stock_llmfoundry_finds_every_name_and_trains_with_them(data_set, tmp_path):
    """In a fresh process, by entry points alone: nothing here calls register(), and no name hides one of the host's."""
    from omegaconf import OmegaConf

    config = nano_run.configure(data_set, tmp_path, "max_duration=2ba")
    OmegaConf.save(config, tmp_path / "run.yaml")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", STOCK, str(tmp_path / "run.yaml")], capture_output=True, text=True,
                          cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "SHADOWED []" in lines and lines[-1] == "TRAINED"
    found = {line.split()[1]: line.split()[2:] for line in lines if line.startswith("FOUND ")}
    assert found == {name: ["0", "True"] for names in ettin_foundry.REGISTRY.values() for name in names}
    assert list(tmp_path.rglob("latest-rank0.pt"))


def test_core_modules_import_with_torch_and_numpy_only():
    """The core also runs where LLM-Foundry is not installed, on newer torch."""
    code = ("import sys; sys.modules.update(dict.fromkeys(('llmfoundry', 'composer', 'streaming', 'transformers')))\n"
            "from ettin_foundry.model import attention, config, loss, transformer\n"
            "from ettin_foundry.data import batch, order, packing, stream")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
