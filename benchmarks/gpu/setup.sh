#!/usr/bin/env bash
# Installs, on an offline GPU machine, the wheels of prepare.sh and zllm itself into a folder.
# Usage: source benchmarks/gpu/setup.sh   (sets PYTHONPATH)
site=${ZLLM_SITE:-/tmp/site}
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
  --target "$site" .whl/*.whl || return 1
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
python3 -m pip install -q --no-index --no-deps --no-build-isolation --no-cache-dir --upgrade \
  --target "$site" . || return 1
