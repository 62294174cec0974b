#!/usr/bin/env bash
#SBATCH --job-name=ettin-suite
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#
# A suite on a Slurm cluster: one job for each stage, held back until the stage that it starts from has succeeded, and one
# job after them all that compares the pairs, exports, evaluates and reports. On the login node, in the clone:
#
#   bash launch/suite.slurm.sh SUITE.yaml [KEY=VALUE...]
#
#   SUITE.yaml          such as yamls/suite/ettin-150m.yaml; ettin suite SUITE.yaml --list shows its stages
#   KEY=VALUE           keys of that file, such as scale=0.1 or root=/scratch/me/ettin-150m
#
#   SUBMIT_OPTIONS      environment: further words for sbatch, such as SUBMIT_OPTIONS="--partition=gpu --nodes=4". They
#                       take precedence over the #SBATCH lines above, which are one whole node with 8 GPUs
#   PYTHON              environment: interpreter; else .venv/bin/python of this repository, else python3
#
# Repository, data and root must lie where every node sees them. Encoder and decoder have no job in common, so they train
# side by side. Shortly before its time limit or a preemption (USR1 or TERM to this script), a job finishes its step, saves,
# and is put back into the queue; one that is told before its first step fails, for it would get nowhere again. After the
# loss of a node Slurm does so. After a failure, give the same command again: finished stages end at once.

set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# One job a stage, then the report. Prints what was submitted.
submit() {
    local root python suite="$1" name source job report
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    python="${PYTHON:-}"
    if [[ -z "$python" ]]; then
        python=python3
        [[ ! -x "$root/.venv/bin/python" ]] || python="$root/.venv/bin/python"
    fi
    local -a options dependency all=()
    local -A jobs=()
    read -ra options <<< "${SUBMIT_OPTIONS:-}"
    # one line a stage: name, and what it starts from or -; every setting is checked before anything is submitted
    local listed
    listed="$(cd "$root" && "$python" -m ettin_foundry.cli.main suite "$@" --list --json | "$python" -c '
import json, sys
for stage in json.load(sys.stdin)["stages"]:
    print(stage["name"], stage["from"] or "-", sep="\t")')"
    while IFS=$'\t' read -r name source; do
        dependency=()
        if [[ "$source" != - ]]; then
            dependency=("--dependency=afterok:${jobs[$source]}" --kill-on-invalid-dep=yes)
        fi
        job="$(sbatch --parsable "${dependency[@]}" --job-name="ettin-$name" "${options[@]}" \
            "$root/launch/suite.slurm.sh" stage "$root" "$python" "$name" "$@")"
        jobs[$name]="${job%%;*}" # a cluster's name may follow
        all+=("${jobs[$name]}")
        printf 'job %s: %s%s\n' "${jobs[$name]}" "$name" "${dependency[*]:+, after job ${jobs[$source]-} ($source)}"
    done <<< "$listed"
    report="$(sbatch --parsable --dependency="afterok:$(IFS=:; printf '%s' "${all[*]}")" --kill-on-invalid-dep=yes \
        --job-name=ettin-report "${options[@]}" --nodes=1 "$root/launch/suite.slurm.sh" report "$root" "$python" "$@")"
    printf 'job %s: report of %s, after all of them\n' "${report%%;*}" "$suite"
    printf 'After a failure give the same command again: finished stages end at once.\n'
}

# The job of a stage. This script is a copy in Slurm's spool by now, so where the repository is comes as an argument.
stage() {
    local root="$1" python="$2" name="$3" hosts child code=0
    shift 3
    cd "$root"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    hosts="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?not a job of Slurm}")"
    MASTER_ADDR="${hosts%%$'\n'*}" # the first; a pipe to head would break when it stops reading
    # a port of its own for each job, so that two on one node do not meet
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 40000))
    export MASTER_ADDR MASTER_PORT
    "$python" -m ettin_foundry.cli.main suite "$@" --stage "$name" \
        "command=srun --ntasks-per-node=1 --cpus-per-task=${SLURM_CPUS_PER_TASK:-1} bash launch/suite.slurm.sh node $python" &
    child=$!
    trap 'kill -USR1 "$child"' USR1 TERM
    wait "$child" || code=$?
    while kill -0 "$child" 2> /dev/null; do # a signal has ended the wait
        code=0
        wait "$child" || code=$?
    done
    if ((code == 75)); then # it was told to end, and has saved
        scontrol requeue "$SLURM_JOB_ID"
        code=0
    fi
    exit "$code"
}

# One of these runs on each node of a stage's job: Composer's launcher, which starts a process for each GPU.
node() {
    local python="$1" gpus
    shift
    gpus="${SLURM_GPUS_ON_NODE:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
    trap '' USR1 # is for the ranks; the launcher outlives it
    exec "$python" -m composer.cli -n "$gpus" --world_size $((gpus * ${SLURM_NNODES:?})) --node_rank "${SLURM_NODEID:?}" \
        --master_addr "${MASTER_ADDR:?}" --master_port "${MASTER_PORT:?}" train.py "$@"
}

# The job after all stages.
report() {
    local root="$1" python="$2"
    shift 2
    cd "$root"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    exec srun --ntasks=1 --nodes=1 "$python" -m ettin_foundry.cli.main suite "$@" --report
}

case "${1:-}" in
    stage | node | report) "$@" ;;
    *.yaml | *.yml)
        [[ -z "${SLURM_JOB_ID:-}" ]] || fail "run this with bash on the login node; it calls sbatch itself"
        submit "$@" ;;
    *) fail "SUITE.yaml: ${1:-nothing} given; a suite file, such as yamls/suite/ettin-150m.yaml, then keys of it. See the head" \
        "of this script" ;;
esac
