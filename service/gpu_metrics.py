"""Memory and use of the GPUs that engines run on, as NVML tells them when someone asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from zllm.service.served_model import RunningModel

log = logging.getLogger(__name__)


class GpuMetrics(Collector):
    """Without a GPU there are no such metrics."""

    def __init__(self, models: Callable[[], Sequence[RunningModel]]) -> None:
        self._models = models
        self._nvml: Any = None
        self._looked = False

    def collect(self) -> Iterator[Metric]:
        gpus = {model.engine.gpu for model in self._models()} - {""}
        if not gpus:
            return
        if not self._looked:
            self._looked = True
            self._nvml = _load_nvml()
        if self._nvml is None:
            return
        try:
            readings = {gpu: self._read(gpu) for gpu in sorted(gpus)}
        except self._nvml.NVMLError as error:
            log.warning("no more metrics of the GPU: %s", error)
            self._nvml = None
            return
        for index, (name, text) in enumerate(
            (
                ("gpu_memory_used_bytes", "Memory in use on the GPU, by whomever."),
                ("gpu_memory_total_bytes", "Memory that the GPU has."),
                ("gpu_utilization_ratio", "Share of time in which a kernel ran, 0 to 1."),
            )
        ):
            family = GaugeMetricFamily(f"zllm:{name}", text, labels=["gpu"])
            for gpu, reading in readings.items():
                family.add_metric([gpu], reading[index])
            yield family

    def _read(self, gpu: str) -> tuple[float, float, float]:
        handle = self._nvml.nvmlDeviceGetHandleByUUID(gpu)
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        utilization = self._nvml.nvmlDeviceGetUtilizationRates(handle)
        return memory.used, memory.total, utilization.gpu / 100


def _load_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        log.warning("no metrics of the GPU: pip install nvidia-ml-py")
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.warning("no metrics of the GPU: %s", error)
        return None
    return pynvml
