"""What README, docs and the help of each command tell people to type is accepted, and CI runs what can run there."""

import contextlib
import re
import shlex

import nano_run
import pytest
import readme_commands
import typer

from ettin_foundry import REGISTRY
from ettin_foundry.cli.main import app

BLOCKS = [(title, readme_commands.commands(text)) for _, language, title, text in readme_commands.BLOCKS
          if language == "bash"]
LINES = sorted({line for _, lines in BLOCKS for line in lines if "RECIPE" not in line})
COMMANDS = typer.main.get_command(app).commands
EXAMPLES = {name: re.findall(r"^Example: (ettin .*)", command.help, re.M) for name, command in COMMANDS.items()}
CI = (nano_run.ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("line", [line for line in LINES if re.match("(composer|python) train.py", line)]
                         + re.findall("^Example: (composer .*)", (nano_run.ROOT / "train.py").read_text(), re.M))
def test_every_training_command_is_a_valid_run(line, monkeypatch):
    from ettin_foundry.training import checks, run_config

    monkeypatch.chdir(nano_run.ROOT)
    checks.check_settings(run_config.resolved([word for word in shlex.split(line)[2:] if word != "--dry-run"]))


@pytest.mark.parametrize("line", [line for line in [*LINES, *sum(EXAMPLES.values(), [])]
                                  if re.match("ettin [a-z]|python data_prep/convert.py", line)])
def test_every_command_and_option_exists(line):
    name, *words = shlex.split(line.replace("python data_prep/convert.py", "ettin convert"))[1:]
    with contextlib.suppress(typer.Exit):  # of --help
        COMMANDS[name].make_context(name, words)


def test_commands_without_a_title_are_run_by_ci_and_the_others_say_what_they_need():
    assert "tests/readme_commands.py >" in CI and len(BLOCKS) == len(re.findall(
        r"^ *```\s*(?:sh|shell|console|bash)\b", "".join(readme_commands.PAGES.values()), re.M))
    run = {*readme_commands.script(), *(f"make {target}" for line in re.findall("^make (.*)", CI, re.M)
                                        for target in line.split())}
    assert not {line for title, lines in BLOCKS if not title for line in lines} - run
    assert all(re.match("$|needs |installs", title) for *_, title, _ in readme_commands.BLOCKS)
    assert sorted(readme_commands.NAV) == sorted(path.name for path in (nano_run.ROOT / "docs").glob("*.md"))


def test_every_program_and_target_that_a_page_names_exists():
    rules = " ".join(re.findall(r"^([^.\t#][\w ./-]*):(?!=)", (nano_run.ROOT / "Makefile").read_text(), re.M)).split()
    for name, *words in map(shlex.split, LINES):
        assert name != "make" or words[0] in (*rules, ".venv/.installed"), words
        assert all((nano_run.ROOT / word).is_file() for word in words if re.fullmatch(r"[\w/]+\.(py|sh)", word)), words


def test_the_page_of_the_api_has_every_registered_name():
    page = readme_commands.PAGES["api.md"]
    for name, target in [pair for names in REGISTRY.values() for pair in names.items()]:
        shown = target in REGISTRY["collators"].values() or f"::: {target.replace(':', '.')}\n" in page
        assert shown and re.search(rf"heading: {name},|`{name}`", page), name


def test_the_help_of_train_py_says_how_it_is_called(capsys):
    program = nano_run.program()
    assert program.main(["--help"]) == 0 and "RECIPE.yaml [OVERLAY.yaml ...] [KEY=VALUE ...]" in capsys.readouterr().out


def test_every_help_has_one_example_and_a_first_sentence_of_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, lines in EXAMPLES.items():
        assert [line.split()[1] for line in lines] == [name]
    app(["--help"], standalone_mode=False)
    listed = re.findall(r"^  ([a-z][a-z-]*) +(\S.*\.)$", capsys.readouterr().out, re.M)
    assert listed == [(name, command.help.split("\n")[0]) for name, command in COMMANDS.items()]


# files of other projects that comments give as sources
FOREIGN = {"dolma_to_mds", "sample_too_large_down", "format/mds/writer", "src/bert_layers/model", "layers",
           "initialization", "speed_monitor", "src/optimizer", "src/scheduler", "stableadamw"}


def test_every_module_that_a_comment_or_a_page_names_exists():
    folders, root = ("benchmarks", "data_prep", "docs", "examples", "launch", "tests", "yamls"), nano_run.ROOT
    package = [*(root / "ettin_foundry").rglob("*.py")]
    files = [*package, *root.glob("*.*"), *(file for name in folders for file in (root / name).rglob("*.*"))]
    for path in package + [file for file in files if file.suffix in (".md", ".yaml")]:
        text = path.read_text()
        for name in re.findall(r"((?:\w+/)*\w+)\.py\b", text):
            assert name in FOREIGN or any(f"/{file}".endswith(f"/{name}.py") for file in files), (path, name)
        for folder, module, attribute in re.findall(r"`(?:(\w+)[./])?(\w+)\.(\w+)", text) if path in package else ():
            found = [file.read_text() for file in package if file.stem == module and folder in ("", file.parent.name)]
            known = attribute in ("json", "jsonl") or module in ("callbacks", "data", "model", "optimizer")  # keys
            assert not found or known or attribute in "".join(found), (path, module)
