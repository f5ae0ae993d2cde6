#!/usr/bin/env bash
# Starts launch/train.py with torchrun on this host, or as one node of several. Ends with train.py's exit code.
#
#   launch/torchrun.sh RANKS --config configs/digits-spardl.yaml [key=value ...]
#
# Several nodes: run it on each with NNODES and RDZV_ENDPOINT=host:port (the first node's address).
# PYTHON: the interpreter to use.
set -euo pipefail

if [[ $# -lt 1 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the first argument must be the number of ranks on this host, got '${1:-}'; usage:" >&2
    sed -n '4,7s/^# \{0,1\}//p' "$0" >&2
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

if [[ -n ${RDZV_ENDPOINT:-} ]]; then
    meet=(--nnodes "${NNODES:?NNODES must say how many nodes there are}" --rdzv-backend c10d
        --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-sparcomm}")
else
    meet=(--standalone)
fi

# One thread a rank unless told otherwise: ranks of one host share its cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" "$here/ranks.py" "${meet[@]}" --nproc-per-node "$ranks" "$here/train.py" "$@"
