#!/usr/bin/env bash
# Builds for the GPU that is present, tests and measures on it, offline, with the given python. Each part runs whatever
# became of the others; the exit status is that of the worst.
#   bash bench/gpu.sh [python3] [folder for the results]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
out=${2:-out/gpu}
mkdir -p "$out"
status=0

part() {  # part NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  local begin=$SECONDS
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  echo "$name: exit $rc after $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
  [ "$rc" -eq 0 ] || { status=1; tail -n 15 "$out/$name.log"; }
}

: >"$out/summary.txt"
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1
[ "$arch" = 90 ] && arch=90a
part build 240 env PYOPS_CUDA=1 PYOPS_CUDA_ARCHS="$arch" "$python" -m pip install --no-build-isolation --no-deps -e .
part test 240 "$python" -m pytest -q -m "not full and not nvcc" -k "cuda or triton" tests
part bench 240 "$python" -m bench all --device cuda --quick --json "$out/bench.json" --plot "$out/plots"
exit "$status"
