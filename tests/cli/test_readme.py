"""What README tells people to type is accepted, and what it says stands in the code."""

import re
import shlex

import nano_run
import pytest
from readme_commands import README, commands

from ettin_foundry.model.config import SIZES, EttinConfig

LINES = [line for section in ("By hand", "Run 400m on a cluster", "Bring a corpus") for line in commands(section)]
TRAINING = [line for line in LINES if line.startswith("composer train.py")]
CONVERTING = [line for line in LINES if "convert.py" in line]


def test_readme_is_short_and_has_no_gap():
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert not re.search(r"\b(NUMBERS|DEMO_TABLE|TEST_FIGURE|BENCH_ROWS|TODO)\b", text)


@pytest.mark.parametrize("line", TRAINING, ids=range(len(TRAINING)))
def test_every_training_command_is_a_valid_run(line, monkeypatch):
    from ettin_foundry.training import checks

    monkeypatch.chdir(nano_run.ROOT)
    from omegaconf import OmegaConf
    config = nano_run.program().configure(shlex.split(line)[2:])
    checks.check_settings(OmegaConf.to_container(config, resolve=True))


def test_the_commands_are_found():
    assert (len(TRAINING), len(CONVERTING)) == (8, 5)


@pytest.mark.parametrize("line", CONVERTING, ids=range(len(CONVERTING)))
def test_every_convert_command_has_known_options(line):
    import typer

    from ettin_foundry.cli.convert import app

    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert {word for word in shlex.split(line) if word.startswith("--")} <= known


def test_recipe_table_shows_the_sizes_of_the_code():
    rows = re.findall(r"^\| (\w+) \| (\d+) / (\d+) / (\d+) / (\d+) \| ([\d,]+) \|", README.read_text(), re.M)
    assert [row[0] for row in rows] == [name for name in SIZES if name != "nano"]
    for name, *shape, parameters in rows:
        size = SIZES[name]
        assert [int(n) for n in shape] == [size.num_hidden_layers, size.hidden_size, size.intermediate_size,
                                           size.num_attention_heads]
        assert int(parameters.replace(",", "")) == EttinConfig.for_size(name, causal=False).num_parameters


def test_map_names_every_module():
    block = (nano_run.ROOT / "ettin_foundry" / "README.md").read_text().split("```")[1]
    modules = {p.stem for p in (nano_run.ROOT / "ettin_foundry").glob("*.py")} - {"__init__", "version"}
    assert {m for m in modules if not re.search(rf"\b{m}\b", block)} == set()
