#!/usr/bin/env bash
# All that a real GPU is needed for, in three parts of less than ten minutes each. Nothing is fetched.
#
#   benchmarks/gpu_check.sh build    builds the CUDA engine for this card, with the torch that $PYTHON has
#   benchmarks/gpu_check.sh test     the room tests on the GPU, its instructions against the harness's, compute-sanitizer
#   benchmarks/gpu_check.sh bench    tables against the best that torch offers, into benchmarks/results/<gpu>/
#
# LLAMAKERN_CUDA_ARCHS (of this card, unless it is set) and RESULTS choose; what is built lies in build/gpu.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PLACE=build/gpu
export PYTHONPATH="$PWD/$PLACE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
NVCC=$("$PYTHON" -c 'import sys; sys.path.insert(0, "tools"); from toolkit import find_nvcc; print(find_nvcc() or "")')

# "9.0" -> 90a-real: the card's own instructions.
arch() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d '.')
  [ "$capability" = 90 ] && echo 90a-real || echo "$capability-real"
}

card() {
  nvidia-smi --query-gpu=name --format=csv,noheader --id=0 | tr '[:upper:] ' '[:lower:]-'
}

build() {
  LLAMAKERN_CUDA=1 LLAMAKERN_CUDA_ARCHS=${LLAMAKERN_CUDA_ARCHS:-$(arch)} LLAMAKERN_BUILD_NAME=cmake-gpu \
    "$PYTHON" setup.py -q build --build-lib "$PLACE"
  "$PYTHON" -c 'from llamakern import runs; [print(f"{k:<14}{v}") for k, v in runs.environment().items()]'
}

rooms() {
  local file
  for file in csrc/*/*_cuda.cu; do basename "$(dirname "$file")"; done | sort -u
}

tests_of() {
  local room
  for room in $(rooms); do ls "tests/test_$room.py" tests/test_"$room"_*.py 2> /dev/null || true; done
}

run_tests() {
  local status=0
  make -s -C tests/host_cuda gpu PATH="$(dirname "$NVCC"):$PATH" || status=1  # the harness's instructions on the card
  export LLAMAKERN_TEST_DEVICE=cuda
  # shellcheck disable=SC2046
  timeout 420 "$PYTHON" -m pytest -q -p no:cacheprovider --maxfail=40 -m "not slow" $(tests_of) tests/test_cuda.py || status=1
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      timeout 80 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" tests/gpu/smoke.py || status=1
    done
  else
    echo "compute-sanitizer is not here: memory and races were not checked"
  fi
  return $status
}

bench() {
  local results=${RESULTS:-benchmarks/results/$(card)}
  # shellcheck disable=SC2046
  timeout 560 "$PYTHON" -m llamakern bench $(rooms | grep -v -e excitor -e block) --device cuda --seconds 0.05 --json "$results"
}

case "${1:-}" in
  build) build ;;
  test) run_tests ;;
  bench) bench ;;
  *) sed -n '2,8p' "$0" && exit 2 ;;
esac
