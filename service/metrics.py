"""The metrics of one server, with vLLM's names and meaning under `zllm:`.

Nothing here is done for a token: requests are counted when their first token comes and when they
end, and what the engine counts is read when someone asks (service/engine_metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

from zllm.errors import Overloaded, Unavailable
from zllm.runtime.messages import FinishReason
from zllm.service.calls import Call
from zllm.service.engine_metrics import EngineMetrics
from zllm.service.gpu_metrics import GpuMetrics
from zllm.service.served_model import Models

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

FINISHED_REASONS = tuple(reason.name.lower() for reason in FinishReason if 0 < reason < 100)
REFUSALS = (
    "queue_full",
    "queue_timeout",
    "deadline",
    "tenant_requests",
    "tenant_tokens",
    "draining",
    "engine_unavailable",
)
"""Why a request was not let in: the `cause` of Overloaded and Unavailable."""


class Metrics:
    """Hears of calls (calls.Observer) and of models; `registry` is what an exporter shows."""

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        self._known: set[str] = set()
        self._of_models: list[tuple[Counter | Histogram, Sequence[str]]] = []
        """With the values of the label beside model_name, where there is one."""
        seconds, tokens = self._seconds, self._tokens
        self._ttft = seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self._e2e = seconds("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = seconds("request_queue_time_seconds", "In the queue, before the first step.")
        self._prefill = seconds(
            "request_prefill_time_seconds", "From the first step to the first token."
        )
        self._decode = seconds(
            "request_decode_time_seconds", "From the first token to the last one."
        )
        self._inference = seconds(
            "request_inference_time_seconds", "From the first step to the last token."
        )
        self._per_token = seconds(
            "request_time_per_output_token_seconds", "A request's mean time between two tokens."
        )
        self._prompt_size = tokens("request_prompt_tokens", "Prompt tokens of a request.")
        self._output_size = tokens("request_generation_tokens", "Output tokens of a request.")
        self._max_tokens = tokens(
            "request_params_max_tokens", "max_tokens, where a request has it."
        )
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests that got a first token, cached ones too."
        )
        self._cached_tokens = self._counter(
            "prompt_tokens_cached", "Those of them that came from the prefix cache."
        )
        self._success = self._counter(
            "request_success",
            "Requests that finished, by how.",
            "finished_reason",
            FINISHED_REASONS,
        )
        self._refused = self._counter(
            "requests_refused", "Requests not let in, by why.", "reason", REFUSALS
        )
        self._rpcs = Counter(
            "zllm:rpc_requests", "Rpcs that ended, by gRPC's status code.", ["method", "code"],
            registry=self.registry,
        )  # fmt: skip
        # Asked from the exporter's thread, while the event loop may change what is served.
        self.registry.register(EngineMetrics(lambda: models.served))
        self.registry.register(GpuMetrics(lambda: models.served))
        ProcessCollector(registry=self.registry)

    def model_comes(self, name: str) -> None:
        """A model loads, or is served already."""
        if name in self._known:
            return
        self._known.add(name)
        # All at zero from the start: a series that appears with its first event hides that event
        # from rate().
        for metric, values in self._of_models:
            for value in values:
                metric.labels(name, value)
            if not values:
                metric.labels(name)

    def model_goes(self, name: str) -> None:
        """Its series end."""
        self._known.discard(name)
        for metric, _ in self._of_models:
            metric.remove_by_labels({"model_name": name})

    def first_token(self, call: Call) -> None:
        stream, name = call.started, call.model
        if stream is None or name not in self._known:
            return
        self._ttft.labels(name).observe(stream.first_token_at - call.began)
        self._prompt_tokens.labels(name).inc(len(call.prompt))
        self._cached_tokens.labels(name).inc(stream.cached_tokens)

    def ended(self, call: Call) -> None:
        self._rpcs.labels(call.method, call.code.name).inc()
        if call.model not in self._known:
            return
        if call.finish_reason is not None:
            self._finished(call, call.finish_reason)
        elif isinstance(call.error, (Overloaded, Unavailable)) and call.started is None:
            self._refused.labels(call.model, call.error.cause).inc()

    def _finished(self, call: Call, reason: str) -> None:
        name = call.model
        self._success.labels(name, reason).inc()
        self._e2e.labels(name).observe(call.latency)
        self._prompt_size.labels(name).observe(len(call.prompt))
        if call.request is not None and call.request.stopping.HasField("max_tokens"):
            self._max_tokens.labels(name).observe(call.request.stopping.max_tokens)
        stream, decode = call.started, call.decode_time
        if stream is None or decode is None:
            return
        self._queue.labels(name).observe(stream.queued_s)
        self._prefill.labels(name).observe(stream.prefill_s)
        self._decode.labels(name).observe(decode)
        self._inference.labels(name).observe(stream.prefill_s + decode)
        count = stream.produced_tokens
        self._output_size.labels(name).observe(count)
        if count > 1:
            self._per_token.labels(name).observe(decode / (count - 1))

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, SECONDS)

    def _tokens(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, TOKENS)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        metric = Histogram(
            f"zllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry
        )
        self._of_models.append((metric, ()))
        return metric

    def _counter(
        self, name: str, text: str, label: str = "", values: Sequence[str] = ()
    ) -> Counter:
        labels = ["model_name", label] if label else ["model_name"]
        metric = Counter(f"zllm:{name}", text, labels, registry=self.registry)
        self._of_models.append((metric, values))
        return metric
