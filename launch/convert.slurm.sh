#!/usr/bin/env bash
#SBATCH --job-name=ettin-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem-per-cpu=3G
#SBATCH --time=24:00:00
#SBATCH --output=ettin-convert-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# Text to a data set on a Slurm cluster: one array of tasks, each of which converts its share of the units with all its
# cores, and one job after it that puts the shares together. On the login node:
#
#   bash launch/convert.slurm.sh TASKS SOURCE... --out OUT --tokenizer TOKENIZER [OPTION...]
#
#   TASKS               number of tasks; each gets every TASKS-th unit. More tasks than units leave some without work
#   SOURCE, OPTION      as of data_prep/convert.py (--help lists them), except those of the array itself. OUT and the sources
#                       are folders that every node sees, or URLs. --train-tokenizer needs one process that sees
#                       all documents: train the tokenizer before
#
#   SUBMIT_OPTIONS      environment: further words for sbatch, such as SUBMIT_OPTIONS="--partition=cpu --cpus-per-task=32".
#                       They take precedence over the #SBATCH lines above, which are 16 cores and 48 GB a task
#   PYTHON              environment: interpreter; else .venv/bin/python of this repository, else python3
#
# A task that runs into its time limit, fails, or loses its node has lost at most the units in work: give the same command
# again, and only what is missing is done. The job after the array runs only when every task has succeeded. Progress is in
# ettin-convert-JOB-TASK.log.

set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# The value of --out among the arguments of convert.py.
out_of() {
    local out=""
    while (($#)); do
        case "$1" in
            --out) out="${2:-}" ;;
            --out=*) out="${1#--out=}" ;;
        esac
        shift
    done
    [[ -n "$out" ]] || fail "--out: not given; a folder that every node sees, or a URL, is needed"
    printf '%s\n' "$out"
}

# Submits the array and the job after it, and says their numbers.
submit() {
    local tasks="$1" out root python array after
    shift
    out="$(out_of "$@")"
    for argument in "$@"; do
        case "$argument" in
            --task-index* | --num-tasks* | --train-tokenizer*)
                fail "$argument: given; not possible in an array of tasks, see the head of this script" ;;
        esac
    done
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    python="${PYTHON:-}"
    if [[ -z "$python" ]]; then
        python=python3
        [[ ! -x "$root/.venv/bin/python" ]] || python="$root/.venv/bin/python"
    fi
    local -a options
    read -ra options <<< "${SUBMIT_OPTIONS:-}"
    array="$(sbatch --parsable "${options[@]}" --array="0-$((tasks - 1))" "$root/launch/convert.slurm.sh" \
        task "$root" "$python" "$tasks" "$@")"
    array="${array%%;*}" # a cluster's name may follow
    after="$(sbatch --parsable "${options[@]}" --dependency="afterok:$array" --kill-on-invalid-dep=yes \
        --job-name=ettin-finalize --output="ettin-finalize-%j.log" "$root/launch/convert.slurm.sh" \
        finalize "$root" "$python" "$out")"
    printf 'array %s: %s tasks; then job %s: ettin finalize %s\n' "$array" "$tasks" "${after%%;*}" "$out"
    printf 'After a failure give the same command again: finished units are kept.\n'
}

# One task of the array. This script is a copy in Slurm's spool by now, so where the repository is comes as an argument.
task() {
    local root="$1" python="$2" tasks="$3" cores="${SLURM_CPUS_PER_TASK:-1}"
    shift 3
    exec srun --ntasks=1 --cpus-per-task="$cores" "$python" "$root/data_prep/convert.py" --workers "$cores" "$@" \
        --task-index "${SLURM_ARRAY_TASK_ID:?not a task of an array}" --num-tasks "$tasks"
}

# The job after the array.
finalize() {
    local root="$1" python="$2" out="$3"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    exec srun --ntasks=1 "$python" -m ettin_foundry.cli.main finalize "$out"
}

case "${1:-}" in
    task | finalize) "$@" ;;
    [1-9] | [1-9][0-9] | [1-9][0-9][0-9] | [1-9][0-9][0-9][0-9])
        [[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || fail "run this with bash on the login node; it calls sbatch itself"
        submit "$@" ;;
    *) fail "TASKS: ${1:-nothing} given; a number from 1 to 9999, then the arguments of data_prep/convert.py. See the head" \
        "of this script" ;;
esac
