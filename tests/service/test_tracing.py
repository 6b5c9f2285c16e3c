"""Traces: one span a request, under its caller's, with the conventions' names."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import (
    error_attributes,
    gen_ai_attributes,
    rpc_attributes,
)
from opentelemetry.trace import SpanKind, StatusCode

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from tests.service.stub_server import answers, serving
from zllm.clients.request import build_request
from zllm.errors import ConfigError, InvalidRequest
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.serve import serve
from zllm.service.tracing import Traces
from zllm.v1 import generation_pb2_grpc

SECRET = "the password is swordfish"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONVENTIONS = {
    value
    for module in (error_attributes, gen_ai_attributes, rpc_attributes)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str)
}


@asynccontextmanager
async def traced(
    spans: list[ReadableSpan], engine: StubEngine | None = None
) -> AsyncIterator[Harness]:
    """At the end, `spans` has what was exported, in the order of their ends."""
    exporter = InMemorySpanExporter()
    traces = Traces(exporter, "test")
    async with running(engine, observers=[traces]) as server:
        yield server
    await traces.stop()
    spans.extend(exporter.get_finished_spans())


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_is_a_span_with_its_parts_in_it() -> None:
    spans: list[ReadableSpan] = []
    before = time.time_ns()
    async with traced(spans, StubEngine(step_s=0.005)) as server:
        stream = server.client.stream(
            [{"role": "user", "content": SECRET}],
            request_id="mine", max_tokens=10, temperature=0.5, top_k=7, seed=11, stop=[SECRET],
        )  # fmt: skip
        async for _ in stream:
            pass
        assert stream.usage is not None
    queue, prefill, decode, whole = spans
    assert [span.name for span in spans] == ["queue", "prefill", "decode", "chat stub"]
    found = attributes(whole)
    assert 0 < found.pop("gen_ai.response.time_to_first_chunk") < 10
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "zllm",
        "gen_ai.request.model": "stub",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 10,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 7.0,
        "gen_ai.request.seed": 11,
        "gen_ai.output.type": "text",
        "gen_ai.response.id": "mine",
        "gen_ai.response.model": "stub",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": stream.usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 10,
        "rpc.system.name": "grpc",
        "rpc.method": "zllm.v1.GenerationService/StreamGenerate",
        "rpc.response.status_code": "OK",
    }
    assert set(attributes(whole)) <= CONVENTIONS
    assert (whole.kind, whole.parent, whole.status.status_code) == (
        SpanKind.SERVER, None, StatusCode.UNSET,
    )  # fmt: skip
    for part in (queue, prefill, decode):
        assert part.parent is not None
        assert part.parent.span_id == whole.context.span_id
    moments = [
        before, whole.start_time, queue.start_time, queue.end_time, prefill.end_time,
        decode.end_time, whole.end_time, time.time_ns(),
    ]  # fmt: skip
    assert moments == sorted(moments)
    assert (prefill.start_time, decode.start_time) == (queue.end_time, prefill.end_time)
    assert "swordfish" not in "".join(span.to_json() for span in spans)


async def ask(server: Harness, **metadata: str) -> None:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    await stub.Generate(build_request("abc", max_tokens=1), metadata=tuple(metadata.items()))


async def test_the_callers_span_is_the_parent_and_says_whether_to_trace() -> None:
    spans: list[ReadableSpan] = []
    async with traced(spans) as server:
        await ask(server, traceparent=f"00-{TRACE}-{SPAN}-01", tracestate="vendor=1")
        await ask(server, traceparent=f"00-{TRACE}-{SPAN}-00")
        await ask(server, traceparent="nonsense")
        await ask(server)
    sampled, strange, alone = [span for span in spans if span.kind is SpanKind.SERVER]
    assert sampled.parent is not None
    assert format(sampled.context.trace_id, "032x") == TRACE
    assert format(sampled.parent.span_id, "016x") == SPAN
    assert sampled.context.trace_state.get("vendor") == "1"
    assert strange.parent is alone.parent is None
    assert len(spans) == 3 * 4


async def test_a_failure_is_an_error_unless_it_is_the_clients() -> None:
    spans: list[ReadableSpan] = []
    async with traced(spans, StubEngine(step_s=0.02)) as server:
        with pytest.raises(InvalidRequest):
            await server.client.generate("abc", top_p=2.0)
        with pytest.raises(TimeoutError):
            await server.client.generate("abc", timeout=0.2)
        await server.until_idle()
        await server.client.models()
    refused, expired = [span for span in spans if span.kind is SpanKind.SERVER]
    assert attributes(refused)["error.type"] == "INVALID_ARGUMENT"
    assert refused.status.status_code is StatusCode.UNSET
    assert attributes(expired)["error.type"] == "DEADLINE_EXCEEDED"
    assert expired.status.status_code is StatusCode.ERROR


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self.services |= {
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            }
            self.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


async def test_a_collector_gets_the_spans_also_those_of_the_last_moment() -> None:
    with collecting() as (collector, endpoint):
        async with serving(otlp_endpoint=endpoint) as served:
            await answers(served.target)
        names = [span.name for span in collector.spans]
        assert sorted(names) == ["decode", "prefill", "queue", "text_completion stub"]
        assert collector.services == {"zllm"}


async def test_a_seed_that_otlp_has_no_number_for_is_left_out() -> None:
    with collecting() as (collector, endpoint):
        traces = Traces.to(endpoint, "test")
        async with running(observers=[traces]) as server:
            await server.client.generate("abc", seed=2**64 - 1, max_tokens=1)
        await traces.stop()
    keys = {attribute.key for span in collector.spans for attribute in span.attributes}
    assert "gen_ai.request.model" in keys
    assert "gen_ai.request.seed" not in keys


@pytest.mark.parametrize("silent", [False, True])
async def test_a_collector_that_is_away_or_silent_holds_nothing_up(silent: bool) -> None:
    with closing(socket.socket()) as hole:
        hole.bind(("127.0.0.1", 0))
        if silent:
            hole.listen()
        async with asyncio.timeout(15):
            endpoint = f"http://127.0.0.1:{hole.getsockname()[1]}"
            async with serving(otlp_endpoint=endpoint) as served:
                for _ in range(5):
                    await answers(served.target)


async def test_without_the_extra_the_setting_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "zllm.service.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    model = EngineConfig(model=EMBEDDED_MODEL, served_model_name="stub")
    config = ServerConfig(port=0, admin_port=0, otlp_endpoint="http://localhost:4317")
    with pytest.raises(ConfigError, match=r"extra \[tracing\]"):
        await serve(config, [model], model, version="test", say=print)


def test_an_endpoint_must_say_whether_it_is_encrypted() -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        ServerConfig(otlp_endpoint="localhost:4317")


def test_a_server_without_traces_never_loads_opentelemetry() -> None:
    code = "import zllm.service.serve, sys; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
