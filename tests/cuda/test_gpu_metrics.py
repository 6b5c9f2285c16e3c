"""The name that an engine has for its GPU is the one by which NVML knows it."""

from __future__ import annotations

import pytest

from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.engine import Engine


@pytest.mark.gpu
def test_nvml_finds_the_gpu_that_an_engine_reports() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    engine = Engine(EngineConfig(model=EMBEDDED_MODEL, device="cuda", num_kv_blocks=64))
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(engine.ready().gpu)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        assert 0 < memory.used < memory.total
        assert 0 <= pynvml.nvmlDeviceGetUtilizationRates(handle).gpu <= 100
    finally:
        engine.close()
