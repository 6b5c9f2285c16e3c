"""OpenTelemetry traces: a server span a request, with spans for queue, prefill and decode in it.

Attributes are those of the GenAI and RPC semantic conventions
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/). Spans are made when a request
has ended, with the times that it noted on its way.
"""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from zllm.service.calls import Call
from zllm.v1 import generation_pb2

TRACED = "zllm.v1.GenerationService/"
EXPORT_S = 5.0
LAST_SPANS_S = 2.0
"""How long the last spans get to leave."""

_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""The codes that make a server's span an error; the others are the client's doing."""


class Traces:
    """Hears of calls (calls.Observer). The exporter sends from a thread of its own; sampling and
    the resource follow OpenTelemetry's environment variables."""

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        self._exporter = exporter
        resource = Resource.create({"service.name": "zllm", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("zllm", version)
        self._parents = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str, version: str) -> Traces:
        """To an OTLP collector; spans that it does not take are dropped."""
        return cls(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S), version)

    def first_token(self, call: Call) -> None:
        """Told at the end."""

    def ended(self, call: Call) -> None:
        if not call.method.startswith(TRACED):
            return
        operation = _operation(call.request)
        identity: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "zllm",
            "rpc.system.name": "grpc",
            "rpc.method": call.method,
        }
        if call.model:
            identity["gen_ai.request.model"] = call.model
        parent = self._parents.extract(
            {key: value for key, value in call.metadata.items() if isinstance(value, str)}
        )
        clock = _WallClock()
        span = self._tracer.start_span(
            f"{operation} {call.model}".rstrip(),
            context=parent,
            kind=SpanKind.SERVER,
            attributes=identity,
            start_time=clock.at(call.began),
        )
        if span.is_recording():
            span.set_attributes(_request_attributes(call) | _response_attributes(call))
            if call.code in _FAULTS:
                span.set_status(StatusCode.ERROR)
            self._add_parts(call, set_span_in_context(span, parent), clock)
        span.end(clock.at(call.ended))

    async def stop(self) -> None:
        """Sends what is left, for a short while."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True, name="last-spans")
        last.start()
        await asyncio.to_thread(last.join, LAST_SPANS_S)
        if last.is_alive():
            self._exporter.shutdown()

    def _add_parts(self, call: Call, context: Context, clock: _WallClock) -> None:
        stream = call.started
        if stream is None or call.decode_time is None:
            return
        first_token = stream.first_token_at
        planned = first_token - stream.prefill_s
        for name, begin, end in (
            ("queue", max(planned - stream.queued_s, call.began), planned),
            ("prefill", planned, first_token),
            ("decode", first_token, first_token + call.decode_time),
        ):
            part: Span = self._tracer.start_span(name, context, start_time=clock.at(begin))
            part.end(clock.at(end))


class _WallClock:
    """Nanoseconds since 1970 of times of the monotonic clock."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def at(self, monotonic: float) -> int:
        return int((monotonic + self._offset) * 1e9)


def _operation(request: generation_pb2.GenerateRequest | None) -> str:
    chat = request is not None and request.WhichOneof("prompt") == "chat"
    return "chat" if chat else "text_completion"


def _request_attributes(call: Call) -> dict[str, AttributeValue]:
    """What the request says itself, apart from prompt and stop strings."""
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.stream": call.method.endswith("/StreamGenerate"),
        "gen_ai.output.type": "text",
    }
    request = call.request
    if request is None:
        return attributes
    sampling = request.sampling
    for name in ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty"):
        if sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = float(getattr(sampling, name))
    # OTLP has signed integers of 64 bits.
    if sampling.HasField("seed") and sampling.seed < 2**63:
        attributes["gen_ai.request.seed"] = sampling.seed
    if sampling.num_sequences > 1:
        attributes["gen_ai.request.choice.count"] = sampling.num_sequences
    if request.stopping.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = request.stopping.max_tokens
    return attributes


def _response_attributes(call: Call) -> dict[str, AttributeValue]:
    attributes: dict[str, AttributeValue] = {"rpc.response.status_code": call.code.name}
    if call.code is not grpc.StatusCode.OK:
        attributes["error.type"] = call.code.name
    if call.request_id:
        attributes["gen_ai.response.id"] = call.request_id
    if call.tenant:
        attributes["zllm.tenant"] = call.tenant
    if call.stream is not None:
        attributes["gen_ai.response.model"] = call.model
        attributes["gen_ai.usage.input_tokens"] = len(call.prompt)
        attributes["gen_ai.usage.cache_read.input_tokens"] = call.stream.cached_tokens
        attributes["gen_ai.usage.output_tokens"] = call.stream.produced_tokens
    if call.finish_reason is not None:
        attributes["gen_ai.response.finish_reasons"] = [call.finish_reason]
    if call.time_to_first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = call.time_to_first_token
    return attributes
