#!/usr/bin/env bash
# Collects, where there is a network, the wheels that an offline GPU machine lacks (Python 3.12,
# x86-64, with torch, Cython, CMake and cuda-bindings already there). They land in .whl/, which
# is not committed; carry that folder along with the tree and run benchmarks/gpu/setup.sh there.
set -euo pipefail
cd "$(dirname "$0")/../.."
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done
rm -rf .whl
for name in grpcio grpcio-tools grpcio-health-checking grpcio-reflection grpcio-status \
            googleapis-common-protos protobuf msgspec \
            prometheus_client structlog nvidia-ml-py psutil uvloop; do
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" -d .whl "$(grep -i "^$name==" constraints.txt)"
done
du -sh .whl
