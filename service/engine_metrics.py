"""What the engines count, read when someone asks: it costs their steps nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from zllm.runtime.messages import EngineStats, Histogram, Load
from zllm.service.served_model import RunningModel

_LABELS = ["model_name"]


class EngineMetrics(Collector):
    """Counters begin anew with a new engine, as Prometheus expects of a process. Gauges of an
    engine that does not answer are absent: nobody knows them."""

    def __init__(self, models: Callable[[], Sequence[RunningModel]]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = self._models()
        engines = [(model.name, model.engine) for model in models]
        up = GaugeMetricFamily("zllm:engine_up", "1 while the engine answers.", labels=_LABELS)
        for name, engine in engines:
            up.add_metric([name], engine.healthy)
        yield up
        restarts = CounterMetricFamily(
            "zllm:engine_restarts", "Engines that took the place of a lost one.", labels=_LABELS
        )
        for model in models:
            restarts.add_metric([model.name], model.restarts)
        yield restarts
        yield from _gauges([(name, engine.load) for name, engine in engines if engine.healthy])
        yield from _counters([(name, engine.load) for name, engine in engines])
        yield from _histograms([(name, engine.stats) for name, engine in engines])


def _gauges(loads: list[tuple[str, Load]]) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "zllm:num_requests_running", "Requests that have a row of the batch.", labels=_LABELS
    )
    waiting = GaugeMetricFamily(
        "zllm:num_requests_waiting", "Requests in the queue.", labels=_LABELS
    )
    tokens = GaugeMetricFamily(
        "zllm:num_tokens_waiting",
        "Those of their prompts' tokens that were not cached as they came.",
        labels=_LABELS,
    )
    usage = GaugeMetricFamily(
        "zllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", labels=_LABELS
    )
    for name, load in loads:
        running.add_metric([name], load.running_requests)
        waiting.add_metric([name], load.queued_requests)
        tokens.add_metric([name], load.queued_tokens)
        used = load.kv_blocks_total - load.kv_blocks_free
        usage.add_metric([name], used / max(load.kv_blocks_total, 1))
    return iter((running, waiting, tokens, usage))


def _counters(loads: list[tuple[str, Load]]) -> Iterator[Metric]:
    for name, text, field in (
        ("generation_tokens", "Output tokens.", "generated_tokens"),
        ("prefix_cache_queries", "Prompt tokens of requests that began.", "prefix_query_tokens"),
        ("prefix_cache_hits", "Those of them that the cache had.", "prefix_hit_tokens"),
        ("num_preemptions", "Requests that had to give their blocks up.", "preemptions"),
        ("scheduler_violations", "Failed checks of the scheduler's books.", "violations"),
    ):
        family = CounterMetricFamily(f"zllm:{name}", text, labels=_LABELS)
        for model, load in loads:
            family.add_metric([model], getattr(load, field))
        yield family


def _histograms(stats: list[tuple[str, EngineStats]]) -> Iterator[Metric]:
    for name, text, field in (
        ("inter_token_latency_seconds", "Between two tokens of a request.", "inter_token"),
        ("step_time_seconds", "An engine step.", "step_seconds"),
        ("iteration_tokens_total", "Tokens computed in an engine step.", "step_tokens"),
    ):
        family = HistogramMetricFamily(f"zllm:{name}", text, labels=_LABELS)
        for model, of_model in stats:
            histogram: Histogram = getattr(of_model, field)
            limits = [*map(str, map(float, histogram.bounds)), "+Inf"]
            totals = accumulate(histogram.counts)
            family.add_metric([model], list(zip(limits, totals, strict=True)), histogram.sum)
        yield family
