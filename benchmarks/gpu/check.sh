#!/usr/bin/env bash
# All that is checked on a GPU, in one go; run it after `source benchmarks/gpu/setup.sh`.
# Usage: benchmarks/gpu/check.sh OUTPUT_FOLDER
set -uo pipefail
out=$1
started=$SECONDS
say() { echo "[$((SECONDS - started)) s] $*"; }

say "whole models"
python3 benchmarks/offline.py --start "$(mktemp -d)" --json "$out/offline.json" \
  --plot "$out/decode-step.png" 2>&1 | tee "$out/offline.txt"

say "tests"
python3 -m pytest tests/cuda -m gpu -q -p no:cacheprovider --timeout 120 >"$out/tests.txt" 2>&1
grep -E "^(FAILED|ERROR|E  )|passed|failed" "$out/tests.txt" | tail -30

say "the demo, over gRPC"
python3 -m zllm demo 2>&1 | grep -vE "^ " | tail -24

# cuda-bindings asks the driver for symbols that it may lack: that is no error of ours.
sanitize() {
  say "$1 of $2"
  timeout 200 compute-sanitizer --tool "$1" --report-api-errors no --target-processes all \
    python3 -m pytest tests/cuda -m gpu -q -p no:cacheprovider --timeout 200 -x -k "$2" \
    >"$out/$1.txt" 2>&1
  grep -E "passed|failed|ERROR SUMMARY|RACECHECK SUMMARY" "$out/$1.txt" | tail -3
}
sanitize memcheck small
sanitize racecheck small
say "done"
