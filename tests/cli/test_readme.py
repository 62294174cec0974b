"""What README, docs and the help of each command tell people to type is accepted, and CI runs what can run there."""

import re
import shlex

import nano_run
import pytest
import readme_commands
import typer
from ettin_eval.main import app as evaluation

from ettin_foundry import REGISTRY
from ettin_foundry.cli.main import app

BLOCKS = [(title, readme_commands.commands(text)) for language, title, text in readme_commands.BLOCKS
          if language == "bash"]
LINES = sorted({line for _, lines in BLOCKS for line in lines if "RECIPE" not in line})
GROUPS = {name: typer.main.get_command(each) for name, each in (("ettin", app), ("ettin-eval", evaluation))}
COMMANDS = GROUPS["ettin"].commands
EXAMPLES = {name: re.findall(r"^Example: (ettin .*)", command.help, re.M) for name, command in COMMANDS.items()}
CI = (nano_run.ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("line", [line for line in LINES if re.match("(composer|python) train.py", line)]
                         + re.findall("^Example: (composer .*)", (nano_run.ROOT / "train.py").read_text(), re.M))
def test_every_training_command_is_a_valid_run(line, monkeypatch):
    from ettin_foundry.training import checks, run_config

    monkeypatch.chdir(nano_run.ROOT)
    checks.check_settings(run_config.resolved([word for word in shlex.split(line)[2:] if word != "--dry-run"]))


@pytest.mark.parametrize("line", [line for line in [*LINES, *sum(EXAMPLES.values(), [])]
                                  if re.match(r"\S*ettin(-eval)? [a-z]|python data_prep/convert.py", line)])
def test_every_command_and_option_exists(line):
    program, *words = shlex.split(line.replace("python data_prep/convert.py", "ettin convert"))
    group = GROUPS[program.rpartition("/")[2]]
    name, command, words = group.resolve_command(typer.Context(group), words)
    command.make_context(name, words)


def test_commands_without_a_title_are_run_by_ci_and_the_others_name_what_exists():
    fences = re.findall(r"^ *```\s*(?:sh|shell|console|bash)\b", "".join(readme_commands.PAGES.values()), re.M)
    assert "tests/readme_commands.py >" in CI and len(BLOCKS) == len(fences)
    made = {f"make {target}" for line in re.findall("^make (.*)", CI, re.M) for target in line.split()}
    assert {line for title, lines in BLOCKS if not title for line in lines} <= {*readme_commands.script(), *made}
    assert all(re.match("$|needs |installs", title) for _, title, _ in readme_commands.BLOCKS)
    assert sorted(readme_commands.NAV) == sorted(path.name for path in (nano_run.ROOT / "docs").glob("*.md"))
    rules, text = (nano_run.ROOT / "Makefile").read_text(), "\n".join(LINES)
    assert all(f"\n{target}:" in rules for target in re.findall(r"^make ([\w-]+)", text, re.M))
    assert all((nano_run.ROOT / file).is_file() for file in re.findall(r"(?<=\s)[\w/.]+\.(?:py|sh)\b", text))


def test_the_page_of_the_api_has_every_registered_name():
    for name, target in [pair for names in REGISTRY.values() for pair in names.items()]:
        shown = rf"::: {target.replace(':', '.')}\n.*heading: {name},|`{name}`"  # the latter: collators
        assert re.search(shown, readme_commands.PAGES["docs/api.md"]), name


def test_every_help_has_one_example_and_a_first_sentence_of_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name, lines in EXAMPLES.items():
        assert [line.split()[1] for line in lines] == [name]
    app(["--help"], standalone_mode=False)
    listed = re.findall(r"^│ ([a-z][a-z-]*) +(\S.*\.) +│$", capsys.readouterr().out, re.M)
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
