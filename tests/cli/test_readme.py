"""What README and docs tell people to type is accepted."""

import shlex

import nano_run
import pytest
import readme_commands

PAGES = [nano_run.ROOT / "README.md", *sorted((nano_run.ROOT / "docs").glob("*.md"))]


def commands(start):
    lines = {line for page in PAGES for line in readme_commands.commands(page.read_text())}
    return sorted(line for line in lines if line.startswith(start) and "RECIPE" not in line)


@pytest.mark.parametrize("line", commands("composer train.py"))
def test_every_training_command_is_a_valid_run(line, monkeypatch):
    from ettin_foundry.training import checks, recipes

    monkeypatch.chdir(nano_run.ROOT)
    checks.check_settings(recipes.resolved([word for word in shlex.split(line)[2:] if word != "--dry-run"]))


@pytest.mark.parametrize("line", [*commands("ettin "), *commands("python data_prep/convert.py")])
def test_every_command_and_option_exists(line):
    import typer

    from ettin_foundry.cli import convert
    from ettin_foundry.cli.main import app

    words = shlex.split(line)
    converts = words[0] == "python"
    command = typer.main.get_command(convert.app) if converts else typer.main.get_command(app).commands[words[1]]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known or words[1] == "convert"
