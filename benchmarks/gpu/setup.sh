#!/usr/bin/env bash
# Installs, on an offline GPU machine, the wheels of prepare.sh and zllm itself into a folder.
# Usage, in the repository's root: source benchmarks/gpu/setup.sh
# The root holds a zllm/ without the compiled parts: it comes last on the path, and never first.
# A safe path leaves out a script's own folder, so the benchmarks' is named.
export PYTHONSAFEPATH=1
site=${ZLLM_SITE:-/tmp/site}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$site" .whl/*.whl || return 1
export PYTHONPATH="$site:$PWD/benchmarks:$PWD"
python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-cache-dir --upgrade \
  --target "$site" . || return 1
