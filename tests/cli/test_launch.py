"""Clusters: the Slurm scripts with stand-ins that behave as Slurm does, the Kubernetes manifest, the Dockerfile."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from converting import files_of, run, write_corpus

from ettin_foundry import __version__
from ettin_foundry.tools.suite import load
from ettin_foundry.training import run_config

ROOT = Path(__file__).resolve().parents[2]
SUITE, CONVERT = (ROOT / "launch" / f"{name}.slurm.sh" for name in ("suite", "convert"))

# Writes down what it is asked for. With a file `starts` beside it, runs that at once: a copy of the script, as Slurm
# does, all tasks at the same time, with the environment of a job. A job after a failed array is not run.
SBATCH = """#!/bin/bash
here=$(dirname "$0"); array=""; held=""; id=$((100 + $(ls "$here" | grep -c ^sbatch.)))
printf '%s\\n' "$@" > "$here/sbatch.$id"
while [[ $1 == --* ]]; do
    case $1 in --array=*) array=${1#*=} ;; --dependency=afterok:*) held=${1##*:} ;; esac
    shift
done
cp "$1" "$here/copy.$id"; shift
echo "$id;cluster"
if [[ ! -e $here/starts || (-n $held && -e $here/failed.$held) ]]; then exit 0; fi
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
# Lists the stages as `ettin suite --list --json` does, runs the script's own little programs, and else says what it was
# asked for; as a stage it waits if told to, and ends with a code of the test's when it is told to end.
PYTHON = """#!/bin/bash
here=$(dirname "$0")
case " $* " in
    *" --list "*)
        printf '%s\\n' "$@" > "$here/list"
        exec cat "$here/stages.json" ;;
    " -c "*) exec {python} "$@" ;;
esac
printf '%s\\n' "$@" "PYTHONPATH=$PYTHONPATH" "MASTER=$MASTER_ADDR:$MASTER_PORT" "in $PWD" | tee "$here/ran"
if [[ -e $here/wait ]]; then
    trap 'sleep 0.3; echo ended > "$here/ended"; exit "$(cat "$here/wait")"' USR1
    touch "$here/up"
    while :; do sleep 0.02; done
fi
exit "$(cat "$here/rc" 2> /dev/null || echo 0)"
"""
SCONTROL = """#!/bin/bash
printf '%s\\n' "$*" >> "$(dirname "$0")/scontrol.said"
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; fi
"""
STAGES = {"stages": [{"name": "encoder", "from": None, "folder": "runs/s/encoder"},
                     {"name": "decoder", "from": None, "folder": "runs/s/decoder"},
                     {"name": "crossed", "from": "encoder", "folder": "runs/s/crossed"}]}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder with the stand-ins, which are first in PATH; PYTHON is one of them."""
    folder = tmp_path / "cluster bin"
    folder.mkdir()
    python = PYTHON.replace("{python}", shlex.quote(sys.executable))
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "python-stand-in": python}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "stages.json").write_text(json.dumps(STAGES))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", "python-stand-in")
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SUBMIT_OPTIONS", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return folder


def script(path, *arguments, cwd=ROOT, **environment):
    return subprocess.run(["bash", path, *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, **environment})


def said(path):
    return path.read_text().splitlines()


JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "16"}


def test_every_task_gets_its_index_and_all_arguments_as_they_were_given(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMIT_OPTIONS", "--partition=cpu --cpus-per-task=8")
    (cluster / "starts").touch()
    arguments = ["web=a b/*.txt", "--out", "my set", "--tokenizer", "tok", "--text-field", "my text$x"]
    done = script(CONVERT, 3, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("array 100: 3 tasks; then job 101: ettin finalize my set\n")
    assert said(cluster / "sbatch.100")[:4] == ["--parsable", "--partition=cpu", "--cpus-per-task=8", "--array=0-2"]
    for task in range(3):
        assert said(cluster / f"log.100.{task}")[:-3] == [
            f"{ROOT}/data_prep/convert.py", "--workers", "1", *arguments, "--task-index", str(task), "--num-tasks", "3"]
    after = said(cluster / "sbatch.101")
    assert {"--dependency=afterok:100", "--kill-on-invalid-dep=yes", "--partition=cpu"} <= set(after)
    finalize = ["-m", "ettin_foundry.cli.main", "finalize", "my set", f"PYTHONPATH={ROOT}"]
    assert said(cluster / "log.101.none")[:-2] == finalize


@pytest.mark.parametrize("path, arguments, message", [
    (CONVERT, [], "TASKS: nothing given; a number from 1 to 9999"),
    (CONVERT, ["corpus", "--out", "b"], "TASKS: corpus given"),
    (CONVERT, ["2", "corpus"], "--out: not given"),
    (CONVERT, ["2", "corpus", "--out=b", "--num-tasks=4"], "--num-tasks=4: given; not possible in an array"),
    (SUITE, ["suite.yaml"], "run this with bash on the login node"),
])
def test_a_wrong_command_line_and_one_in_a_job_submit_nothing(cluster, path, arguments, message):
    done = script(path, *arguments, SLURM_JOB_ID="9")
    assert done.returncode == 2 and message in done.stderr and not list(cluster.glob("sbatch.*"))


def test_an_array_ends_with_the_dataset_of_one_machine(cluster, tmp_path, tokenizer_dir, monkeypatch):
    """For real: two tasks at once on a fresh OUT, and the job after them; not before all tasks have succeeded."""
    write_corpus(tmp_path / "in" / "texts", files=4)
    (cluster / "starts").touch()
    monkeypatch.setenv("PYTHON", sys.executable)
    options = {"chunk_length": 62, "cut_window": 0.1, "validation": 0.1, "shard_size": 8192, "unit_size": 3000}
    flags = [word for key, value in options.items() for word in ("--" + key.replace("_", "-"), value)]
    command = [2, "texts", "--out", "../set", "--tokenizer", tokenizer_dir, *flags]
    assert script(CONVERT, *command, "--no-such-option", cwd=tmp_path / "in").returncode == 0
    assert not (cluster / "log.101.none").exists()
    assert script(CONVERT, *command, cwd=tmp_path / "in").returncode == 0
    assert "train:" in (cluster / "log.103.none").read_text()
    run(tmp_path / "whole", [tmp_path / "in" / "texts"], tokenizer_dir, **options)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")


def test_every_stage_waits_for_the_one_it_starts_from_and_the_report_for_all(cluster, monkeypatch):
    monkeypatch.setenv("SUBMIT_OPTIONS", "--partition=gpu --nodes=2")
    given = ["my suite.yaml", "root=a b", "scale=0.1"]
    done = script(SUITE, *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert said(cluster / "list") == ["-m", "ettin_foundry.cli.main", "suite", *given, "--list", "--json"]

    def job(name: str, *what: str, nodes: tuple[str, ...] = (), after: str = "") -> list[str]:
        held = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["--parsable", *held, f"--job-name=ettin-{name}", "--partition=gpu", "--nodes=2", *nodes, str(SUITE),
                what[0], str(ROOT), "python-stand-in", *what[1:], *given]

    assert said(cluster / "sbatch.100") == job("encoder", "stage", "encoder")
    assert said(cluster / "sbatch.101") == job("decoder", "stage", "decoder")
    assert said(cluster / "sbatch.102") == job("crossed", "stage", "crossed", after="100")
    assert said(cluster / "sbatch.103") == job("report", "report", nodes=("--nodes=1",), after="100:101:102")
    assert "job 102: crossed, after job 100 (encoder)" in done.stdout


def test_a_stage_s_job_runs_that_stage_on_all_its_nodes_and_ends_as_it_ends(cluster):
    (cluster / "rc").write_text("3")
    done = script(SUITE, "stage", ROOT, "python-stand-in", "crossed", "my suite.yaml", "root=a b",
                  **JOB)
    assert done.returncode == 3
    command = "command=srun --ntasks-per-node=1 --cpus-per-task=16 bash launch/suite.slurm.sh node python-stand-in"
    assert said(cluster / "ran") == ["-m", "ettin_foundry.cli.main", "suite", "my suite.yaml", "root=a b", "--stage",
                                     "crossed", command, f"PYTHONPATH={ROOT}", "MASTER=node7:20123",
                                     f"in {ROOT}"]


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("code", [75, 143])
def test_told_to_end_a_job_is_requeued_only_if_its_stage_has_saved(cluster, code, signum):
    (cluster / "wait").write_text(str(code))
    job = subprocess.Popen(["bash", SUITE, "stage", ROOT, "python-stand-in", "encoder", "suite.yaml"],
                           env={**os.environ, **JOB})
    while not (cluster / "up").exists():
        assert job.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # the job's shell is in its wait by now
    job.send_signal(signum)
    assert job.wait(timeout=20) == (0 if code == 75 else code)
    assert (cluster / "ended").exists()  # the stage was told, and waited for
    assert ("requeue 123" in said(cluster / "scontrol.said")) is (code == 75)


def test_the_manifest_is_valid_its_parts_fit_together_and_its_command_is_a_suite(monkeypatch):
    import kubernetes_validate

    documents = yaml.safe_load_all((ROOT / "launch" / "suite.k8s.yaml").read_text())
    manifest: dict[str, Any] = {document["kind"]: document for document in documents}
    for document, version in itertools.product(manifest.values(), ("1.31", "1.34")):
        kubernetes_validate.validate(document, version, strict=True)
    pod, claim = manifest["Job"]["spec"]["template"]["spec"], manifest["PersistentVolumeClaim"]["metadata"]["name"]
    [container] = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["work"]["persistentVolumeClaim"]["claimName"] == claim
    evicted, saved, refused = manifest["Job"]["spec"]["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in (saved, refused)} == {container["name"]}
    assert (saved["action"], saved["onExitCodes"]["values"]) == ("Ignore", [run_config.PREEMPTED])
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy demands
    assert container["image"].endswith(f":{__version__}")
    monkeypatch.chdir(ROOT)
    program, command, *arguments = container["args"]
    assert (program, command) == ("ettin", "suite")
    config = load(arguments[0], arguments[1:]).stage("encoder-decay").config
    for path in (config["save_folder"], config["train_loader"]["dataset"]["local"], config["tokenizer"]["name"]):
        assert path.startswith(container["volumeMounts"][0]["mountPath"] + "/")


def test_the_dockerfile_has_the_project_s_versions():
    dockerfile, setup = (ROOT / "Dockerfile").read_text(), ConfigParser()
    torch_versions = re.findall(r"^FROM \S+:([0-9.]+)", dockerfile, re.MULTILINE)
    assert set(torch_versions) == {importlib.metadata.version("torch").split("+")[0]}
    setup.read(ROOT / "setup.cfg")
    assert set(re.findall(r"flash-attn==\S+", dockerfile)) & set(setup["options.extras_require"]["gpu"].split())
