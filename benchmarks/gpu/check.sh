#!/usr/bin/env bash
# All that is checked on a GPU, in one go; run it after `source benchmarks/gpu/setup.sh`.
# Usage: benchmarks/gpu/check.sh OUTPUT_FOLDER [speed|correctness], both without the second
set -uo pipefail
out=$1
part=${2:-both}
started=$SECONDS
say() { echo "[$((SECONDS - started)) s] $*"; }
gpu_tests=(python3 -m pytest -m gpu -q -p no:cacheprovider --timeout 150)

if [[ $part != correctness ]]; then
say "whole models"
python3 benchmarks/offline.py --start "$(mktemp -d)" --json "$out/offline.json" \
  --plot "$out/decode-step.png" 2>&1 | tee "$out/offline.txt"

say "where a step's time goes"
for arguments in "0.6b --sequences 1 64 256" "4b --sequences 1 64"; do
  # shellcheck disable=SC2086
  echo "\$ profile_step.py $arguments" && python3 benchmarks/gpu/profile_step.py $arguments
done >"$out/profile.txt" 2>&1
grep "us a step" "$out/profile.txt"
fi
[[ $part == speed ]] && exit

# Correctness from here on: what follows may share the GPU.
# cuda-bindings asks the driver for symbols that it may lack: that is no error of ours.
sanitize() {
  timeout 400 compute-sanitizer --tool "$1" --report-api-errors no --target-processes all \
    "${gpu_tests[@]}" tests/cuda -k small >"$out/$1.txt" 2>&1
  say "$1: $(grep -E "[0-9]+ (passed|failed)" "$out/$1.txt"), $(tail -1 "$out/$1.txt")"
}
# Most of the tests' time is compiling, each in its turn: so several processes, one for each group.
run_group() {
  "${gpu_tests[@]}" "${@:2}" >"$out/tests-$1.txt" 2>&1
  say "tests of $1: $(tail -1 "$out/tests-$1.txt")"
}
say "the demo, over gRPC"
python3 -m zllm demo 2>&1 | grep -vE "^ " | tail -24
say "tests, and the small ones under memcheck and racecheck"
sanitize memcheck &
sanitize racecheck &
run_group attention tests/cuda/test_{attention,decoder}.py &
run_group linear tests/cuda/test_linear{,_many}.py &
run_group engine tests/cuda/test_cuda_engine.py &
run_group others tests/cuda \
  --ignore=tests/cuda/test_{attention,decoder,linear,linear_many,cuda_engine}.py &
wait
say "done"
! grep -E "^(FAILED|ERROR|E  )" "$out"/{tests-*,memcheck,racecheck}.txt | tail -30
