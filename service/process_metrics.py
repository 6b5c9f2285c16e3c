"""The usual `process_` metrics where the service is several processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_OWN = {"process_max_fds", "process_start_time_seconds"}
_CPU = "process_cpu_seconds"


class ProcessMetrics(Collector):
    """Of this process and others as of one: their sums, and the most descriptors that one of them
    has open, as the limit is each one's. The limit and the start are this one's."""

    def __init__(self, others: Callable[[], Iterable[int]]) -> None:
        """`others` gives their process ids. One that has ended counts for nothing but the time that
        it was seen to have used: a counter that falls looks to rate() like one that began anew."""
        self._others = others
        self._cpu: dict[int, float] = {}

    def collect(self) -> Iterator[Metric]:
        others: dict[str, list[float]] = {}
        for pid in self._others():
            for metric in _metrics_of(pid):
                value = metric.samples[0].value
                if metric.name == _CPU:
                    self._cpu[pid] = max(value, self._cpu.get(pid, 0.0))
                else:
                    others.setdefault(metric.name, []).append(value)
        others[_CPU] = list(self._cpu.values())
        for metric in _metrics_of(os.getpid()):
            values = [metric.samples[0].value]
            if metric.name not in _OWN:
                values += others.get(metric.name, [])
            value = max(values) if metric.name == "process_open_fds" else sum(values)
            metric.samples[0] = metric.samples[0]._replace(value=value)
            yield metric


def _metrics_of(pid: int) -> Iterable[Metric]:
    return ProcessCollector(pid=lambda: pid, registry=None).collect()
