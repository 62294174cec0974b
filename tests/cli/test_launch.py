"""The Slurm script, rehearsed with stand-ins for sbatch and srun that behave as Slurm does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from converting import files_of, run, write_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "convert.slurm.sh"

# Writes down what it is asked for, then runs it at once: a copy of the script, as Slurm does, all tasks at the same
# time, with the environment of a job. A job after a failed array is not run.
SBATCH = """#!/bin/bash
here=$(dirname "$0"); array=""; held=""; id=$((100 + $(ls "$here" | grep -c ^copy)))
printf '%s\\n' "$@" > "$here/sbatch.$id"
while [[ $1 == --* ]]; do
    case $1 in --array=*) array=${1#*=} ;; --dependency=afterok:*) held=${1##*:} ;; esac
    shift
done
cp "$1" "$here/copy.$id"; shift
echo "$id;cluster"
if [[ -n $held && -e $here/failed.$held ]]; then exit 0; fi
export SLURM_JOB_ID=$id SLURM_CPUS_PER_TASK=1
for task in $(if [[ -n $array ]]; then seq ${array%-*} ${array#*-}; else echo none; fi); do
    if [[ $task != none ]]; then export SLURM_ARRAY_TASK_ID=$task; fi
    bash "$here/copy.$id" "$@" > "$here/log.$id.$task" 2>&1 || touch "$here/failed.$id" &
done
wait
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
ECHO = """#!/bin/sh
printf '%s\\n' "$@"
printf 'PYTHONPATH=%s\\n' "$PYTHONPATH"
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the stand-ins, which are first in PATH; PYTHON is one that shows its arguments."""
    folder = tmp_path / "cluster bin"
    folder.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "python-echo": ECHO}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", "python-echo")
    for name in ("SLURM_ARRAY_TASK_ID", "SUBMIT_OPTIONS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


def submit(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def said(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_script_is_valid_bash_and_clean_for_shellcheck_where_that_is_here():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


def test_every_task_gets_its_index_and_all_arguments_as_they_were_given(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMIT_OPTIONS", "--partition=cpu --cpus-per-task=8")
    arguments = ["web=a b/*.txt", "--out", "my set", "--tokenizer", "tok", "--filter", "my.module:keep$x"]
    done = submit(3, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("array 100: 3 tasks; then job 101: ettin finalize my set\n")
    root = str(SCRIPT.parent.parent)
    assert said(cluster / "sbatch.100")[:4] == ["--parsable", "--partition=cpu", "--cpus-per-task=8", "--array=0-2"]
    for task in range(3):
        assert said(cluster / f"log.100.{task}")[:-1] == [
            f"{root}/data_prep/convert.py", "--workers", "1", *arguments, "--task-index", str(task), "--num-tasks", "3"]
    after = said(cluster / "sbatch.101")
    assert {"--dependency=afterok:100", "--kill-on-invalid-dep=yes", "--partition=cpu"} <= set(after)
    module = "ettin_foundry.cli.main"
    assert said(cluster / "log.101.none") == ["-m", module, "finalize", "my set", f"PYTHONPATH={root}"]


@pytest.mark.parametrize("arguments, message", [
    ([], "TASKS: nothing given; a number from 1 to 9999"),
    (["corpus", "--out", "b"], "TASKS: corpus given"),
    (["2", "corpus"], "--out: not given"),
    (["2", "corpus", "--out=b", "--num-tasks=4"], "--num-tasks=4: given; not possible in an array"),
    (["2", "corpus", "--out", "b", "--deduplicate"], "--deduplicate: given; not possible in an array"),
])
def test_wrong_command_line_submits_nothing(cluster, tmp_path, arguments, message):
    done = submit(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and not list(cluster.glob("sbatch.*"))


def test_an_array_ends_with_the_dataset_of_one_machine(cluster, tmp_path, tokenizer_dir, monkeypatch):
    """For real: two tasks at once on a fresh OUT, and the job after them; not before all tasks have succeeded."""
    write_corpus(tmp_path / "in" / "texts", files=4)
    monkeypatch.setenv("PYTHON", sys.executable)
    options = {"chunk_length": 62, "validation": 0.1, "shard_size": 8192, "unit_size": 3000}
    flags = [word for key, value in options.items() for word in ("--" + key.replace("_", "-"), value)]
    command = [2, "texts", "--out", "../set", "--tokenizer", tokenizer_dir, *flags]
    assert submit(*command, "--no-such-option", cwd=tmp_path / "in").returncode == 0
    assert not (cluster / "log.101.none").exists()
    assert submit(*command, cwd=tmp_path / "in").returncode == 0
    assert "train:" in (cluster / "log.103.none").read_text()
    run(tmp_path / "whole", [tmp_path / "in" / "texts"], tokenizer_dir, **options)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
