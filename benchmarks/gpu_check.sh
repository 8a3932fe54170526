#!/usr/bin/env bash
# All that a real GPU is needed for, in three parts that fit into half an hour together. Nothing is fetched.
#
#   benchmarks/gpu_check.sh build    in 8 minutes at most: the CUDA engine for this card, with the torch of $PYTHON
#   benchmarks/gpu_check.sh test     in 8: the room tests, the instructions against the harness's, compute-sanitizer
#   benchmarks/gpu_check.sh bench    in 9: tables against the best that is there, into benchmarks/results/<gpu>/
#
# What runs out of its time is stopped, and the rest goes on. Each table has a process of its own: a fault in one leaves
# the others. LLAMAKERN_CUDA_ARCHS (of this card, unless it is set) and RESULTS choose; what is built lies in build/gpu.
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

# within SECONDS COMMAND...: says how long it took, and what became of it.
within() {
  local limit=$1 status=0 start=$SECONDS
  shift
  timeout --kill-after=10 "$limit" "$@" || status=$?
  echo "gpu_check: status $status after $((SECONDS - start)) of $limit s: $*" | cut -c1-200
  return $status
}

build() {
  export LLAMAKERN_CUDA=1 LLAMAKERN_CUDA_ARCHS=${LLAMAKERN_CUDA_ARCHS:-$(arch)} LLAMAKERN_BUILD_NAME=cmake-gpu
  within 470 "$PYTHON" setup.py -q build --build-lib "$PLACE"
  "$PYTHON" -c 'from llamakern import runs; [print(f"{k:<14}{v}") for k, v in runs.environment().items()]'
}

# The rooms that have CUDA kernels, those that decide speed first.
rooms() {
  local room
  for room in attention nf4 lora loss moe excitor norm swiglu rope; do
    if compgen -G "csrc/$room/*_cuda.cu" > /dev/null; then echo "$room"; fi
  done
}

tests_of() {
  local room
  for room in $(rooms); do ls tests/test_"$room"{,_decode,_limits,_prompts,_rows}.py 2> /dev/null || true; done
}

run_tests() {
  local status=0 several=()
  if "$PYTHON" -c 'import xdist' 2> /dev/null; then several=(-n 8 --dist loadfile); fi
  # shellcheck disable=SC2046
  LLAMAKERN_TEST_DEVICE=cuda within 280 "$PYTHON" -m pytest -q -p no:cacheprovider "${several[@]}" --maxfail=40 \
    -m "not slow" tests/test_cuda.py $(tests_of) || status=1
  within 60 make -s -C tests/host_cuda gpu PATH="$(dirname "$NVCC"):$PATH" || status=1
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      within 60 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" tests/gpu/smoke.py || status=1
    done
  else
    echo "compute-sanitizer is not here: memory and races were not checked"
  fi
  return $status
}

bench() {
  local results=${RESULTS:-benchmarks/results/$(card)} status=0 room
  local table=("$PYTHON" -m llamakern bench --device cuda --seconds 0.05 --json "$results")
  within 60 "${table[@]}" generate --preset llama3.1-8b --tokens 512 || status=1
  within 60 "${table[@]}" step --preset llama3.1-8b --tokens 4096 || status=1
  for room in $(rooms); do
    [ $SECONDS -lt 450 ] || { echo "gpu_check: no time is left for $room" && status=1 && continue; }
    within 90 "${table[@]}" "$room" || status=1
  done
  return $status
}

case "${1:-}" in
  build) build ;;
  test) run_tests ;;
  bench) bench ;;
  *) sed -n '2,9p' "$0" && exit 2 ;;
esac
