#!/usr/bin/env bash
# Everything that takes a GPU, in one go and under 8 minutes: all GPU tests, compute-sanitizer, the table of kernels.
#
#   launch/gpu-check.sh
#
# Needs PyTorch, CuPy, Numba and pytest, and installs nothing. Each stage has a time limit, and later ones run even if
# one has failed; ends with 1 if any has. OUT: the folder for logs, table and picture (runs/gpu-check).
# PYTHON: the interpreter to use.
set -uo pipefail

here=$(cd "$(dirname "$0")/.." && pwd) || exit 2
cd "$here" || exit 2
out=${OUT:-runs/gpu-check}
mkdir -p "$out" || exit 2
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
export PYTHONPATH="$here:$here/tests:$here/launch${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

summary=()
failed=0

# stage NAME SECONDS COMMAND...: runs it, its output on the screen and in a log.
stage() {
    local name=$1 limit=$2 status start=$SECONDS
    shift 2
    echo "== $name (at most $limit s): $*"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) summary+=("$name: passed in $((SECONDS - start)) s") ;;
        124 | 137) summary+=("$name: FAILED, not done after $limit s") ;;
        *) summary+=("$name: FAILED with $status after $((SECONDS - start)) s") ;;
    esac
    ((status == 0)) || failed=1
}

stage versions 40 "$python" launch/gpu_versions.py
if ((failed)); then
    echo "error: nothing can be checked here" >&2
    exit 1
fi

stage tests 200 "$python" launch/gpu_tests.py --out "$out"

sanitizer=$(command -v compute-sanitizer || true)
for folder in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda; do
    [[ -z $sanitizer && -x $folder/bin/compute-sanitizer ]] && sanitizer=$folder/bin/compute-sanitizer
done
if [[ -n $sanitizer ]]; then
    # PyTorch's cache would hide where an allocation ends, and what of it has never been written.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    check=("$sanitizer" --error-exitcode 9 --print-limit 20 --tool)
    run=("$python" launch/gpu_sanitize.py --device cuda)
    stage memcheck 65 "${check[@]}" memcheck "${run[@]}" --dtypes float32
    stage racecheck 40 "${check[@]}" racecheck "${run[@]}" --dtypes float32 --sizes 33,4097
    stage initcheck 25 "${check[@]}" initcheck "${run[@]}" --dtypes float32 --sizes 33,4097
    stage synccheck 25 "${check[@]}" synccheck "${run[@]}" --dtypes float32 --sizes 33,4097
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
    summary+=("compute-sanitizer: not found, so memory, races and barriers have NOT been checked")
    stage sanitize 40 "$python" launch/gpu_sanitize.py --device cuda
fi

picture=()
if "$python" -c 'import matplotlib' 2>/dev/null; then
    picture=(--png "$out/kernels.png")
else
    summary+=("picture: left out, there is no matplotlib")
fi
stage kernels 95 "$python" -m sparcomm.bench.kernels --device cuda "${picture[@]}"

echo "== summary, also in $out/summary.log"
printf '%s\n' "${summary[@]}" | tee "$out/summary.log"
exit "$failed"
