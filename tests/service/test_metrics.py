"""What an operator's Prometheus reads: vLLM's names, and numbers that mean what they say."""

from __future__ import annotations

import asyncio
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from tests.service.stub_server import answers, serving
from zllm.clients.aio import AsyncClient
from zllm.errors import InvalidRequest, Overloaded, Unauthenticated, Unavailable, UnknownModel
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.service.config import ServerConfig
from zllm.service.metrics import FINISHED_REASONS, REFUSALS
from zllm.v1 import admin_pb2

STREAM = "zllm.v1.GenerationService/StreamGenerate"
GENERATE = "zllm.v1.GenerationService/Generate"
KEYS = """
keys:
  - {key: "small-small-small", tenant: small, max_concurrent_requests: 1}
  - {key: "poor-poor-poor-poor", tenant: poor, tokens_per_minute: 4}
"""

VLLM_NAMES = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "prompt_tokens_cached": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "iteration_tokens_total": "histogram",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_max_tokens": "histogram",
}
"""Those of vLLM 0.26's V1 engine that have a meaning here, without their prefix `vllm:`."""


def value(server: Harness, name: str, **labels: str) -> float | None:
    """A sample of the stub's model, or of the whole server where `method` is given."""
    if "method" not in labels:
        labels = {"model_name": "stub"} | labels
    return server.server.metrics.registry.get_sample_value(f"zllm:{name}", labels)


def num_finished(server: Harness) -> float:
    counts = [value(server, "request_success_total", finished_reason=r) for r in FINISHED_REASONS]
    return sum(count for count in counts if count is not None)


async def until(server: Harness, wanted: float | None, name: str, **labels: str) -> None:
    """Waits for the engine's next heartbeat, or for a call that ends after its client knows."""
    async with asyncio.timeout(5):
        while value(server, name, **labels) != wanted:
            await asyncio.sleep(0.01)


async def test_the_names_and_kinds_are_vllms() -> None:
    async with running() as server:
        page = generate_latest(server.server.metrics.registry).decode()
    kinds = {family.name: family.type for family in text_string_to_metric_families(page)}
    assert {f"zllm:{name}": kind for name, kind in VLLM_NAMES.items()}.items() <= kinds.items()


async def test_the_manual_lists_every_metric_with_its_kind_and_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_nvml(monkeypatch)
    async with running() as server:
        server.engine_client.gpu = "GPU-1"
        await server.client.generate("abc", max_tokens=1)
        await until(server, 1, "rpc_requests_total", method=GENERATE, code="OK")
        exported = set()
        for family in server.server.metrics.registry.collect():
            if family.name.startswith("zllm:"):
                labels = {label for sample in family.samples for label in sample.labels} - {"le"}
                name = family.name + "_total" * (family.type == "counter")
                exported.add((name, family.type, frozenset(labels), family.documentation))
    manual = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    rows = re.findall(r"^\| `(zllm:\w+)` \| (\w+) \| (.*) \| (.*) \|$", manual, re.MULTILINE)
    assert exported == {
        (name, kind, frozenset(re.findall(r"`(\w+)`", labels)), text)
        for name, kind, labels, text in rows
    }


async def test_every_series_of_a_model_is_there_before_its_first_event() -> None:
    async with running() as server:
        successes = {
            value(server, "request_success_total", finished_reason=reason)
            for reason in FINISHED_REASONS
        }
        assert successes == {0}
        refused = {value(server, "requests_refused_total", reason=reason) for reason in REFUSALS}
        assert refused == {0}
        assert value(server, "time_to_first_token_seconds_count") == 0
        assert value(server, "engine_restarts_total") == 0
        assert value(server, "engine_up") == 1


async def test_a_finished_request_is_counted_and_timed() -> None:
    async with running(StubEngine(step_s=0.005, cached_tokens=2)) as server:
        stream = server.client.stream([5, 6, 7], max_tokens=20)
        async for _ in stream:
            pass
        await until(server, 1, "request_success_total", finished_reason="length")
        await until(server, 19, "inter_token_latency_seconds_count")
        for name in (
            "time_to_first_token_seconds", "e2e_request_latency_seconds",
            "request_queue_time_seconds", "request_prefill_time_seconds",
            "request_decode_time_seconds", "request_inference_time_seconds",
            "request_time_per_output_token_seconds",
        ):  # fmt: skip
            assert value(server, f"{name}_count") == 1, name
        seconds = {
            name: value(server, f"{name}_seconds_sum") or 0.0
            for name in (
                "time_to_first_token", "e2e_request_latency", "request_queue_time",
                "request_prefill_time", "request_decode_time", "inter_token_latency",
                "request_inference_time", "request_time_per_output_token",
            )
        }  # fmt: skip
        to_first = seconds["request_queue_time"] + seconds["request_prefill_time"]
        assert 0 < to_first <= seconds["time_to_first_token"]
        whole = seconds["time_to_first_token"] + seconds["request_decode_time"]
        assert whole == pytest.approx(seconds["e2e_request_latency"])
        # 19 sleeps of 5 ms at least lie between the first token and the last.
        assert seconds["request_decode_time"] >= 0.5 * 19 * 0.005
        assert seconds["inter_token_latency"] >= 19 * 0.005
        per_token = seconds["request_decode_time"] / 19
        assert seconds["request_time_per_output_token"] == pytest.approx(per_token)
        inference = seconds["request_prefill_time"] + seconds["request_decode_time"]
        assert seconds["request_inference_time"] == pytest.approx(inference)
        assert value(server, "prompt_tokens_total") == 3
        assert value(server, "prompt_tokens_cached_total") == 2
        assert value(server, "request_prompt_tokens_sum") == 3
        assert value(server, "generation_tokens_total") == 20
        assert value(server, "request_generation_tokens_sum") == 20
        assert value(server, "request_params_max_tokens_sum") == 20
        assert value(server, "rpc_requests_total", method=STREAM, code="OK") == 1
        assert (value(server, "step_time_seconds_count") or 0) >= 20


async def test_gauges_follow_the_engine() -> None:
    async with running(StubEngine(step_s=0.02, max_running=1)) as server:
        tasks = [
            asyncio.create_task(server.client.generate([5] * 40, max_tokens=200)) for _ in range(3)
        ]
        await server.until(lambda load: load.queued_requests == 2, "nothing waits")
        await until(server, 1, "num_requests_running")
        assert value(server, "num_requests_waiting") == 2
        assert value(server, "num_tokens_waiting") == 80
        assert 0 < (value(server, "kv_cache_usage_perc") or 0) < 1
        await server.admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        await asyncio.gather(*tasks)
        await server.until_idle()
        assert value(server, "kv_cache_usage_perc") == 0
        assert value(server, "request_success_total", finished_reason="aborted") == 3


async def test_a_request_that_its_client_gave_up_is_no_success() -> None:
    async with running(StubEngine(step_s=0.02)) as server:
        stream = server.client.stream("abc")
        async for _ in stream:
            break
        stream.cancel()
        with pytest.raises(TimeoutError):
            await server.client.generate("abc", timeout=0.1)
        await until(server, 1, "rpc_requests_total", method=STREAM, code="CANCELLED")
        await until(server, 1, "rpc_requests_total", method=GENERATE, code="DEADLINE_EXCEEDED")
        assert value(server, "e2e_request_latency_seconds_count") == 0
        assert num_finished(server) == 0
        # It did get a first token.
        assert (value(server, "time_to_first_token_seconds_count") or 0) >= 1


async def test_a_deadline_is_one_though_the_client_leaves_before_the_servers_clock() -> None:
    """gRPC rounds what a client says of its time up, to 10 ms from one second on."""
    async with running(StubEngine(step_s=0.05)) as server:
        calls = [server.client.generate("abc" * 40, timeout=1.001 + i / 1000) for i in range(8)]
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(answer, TimeoutError)
        await until(server, 8, "rpc_requests_total", method=GENERATE, code="DEADLINE_EXCEEDED")


async def test_refusals_say_why() -> None:
    async with running(StubEngine(step_s=0.02, max_running=1, max_queued=1)) as server:
        running_one = asyncio.create_task(server.client.generate("abc", max_tokens=200))
        await server.until(lambda load: load.running_requests == 1, "it never ran")
        with pytest.raises(Overloaded):
            await server.client.generate("abc", queue_timeout=0.05)
        await until(server, 1, "requests_refused_total", reason="queue_timeout")
        waiting = asyncio.create_task(server.client.generate("abc", max_tokens=1))
        await server.until(lambda load: load.queued_requests == 1, "it never waited")
        with pytest.raises(Overloaded):
            await server.client.generate("abc")
        await until(server, 1, "requests_refused_total", reason="queue_full")
        await server.admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        await asyncio.gather(running_one, waiting)
        await server.admin.Drain(admin_pb2.DrainRequest())
        with pytest.raises(Unavailable):
            await server.client.generate("abc")
        await until(server, 1, "requests_refused_total", reason="draining")


def test_every_cause_that_the_code_gives_has_a_series() -> None:
    root = Path(__file__).parents[2]
    sources = [root / "zllm/errors.py", *(root / "service").glob("*.py")]
    given = re.findall(r'cause(?:: str)? ?= ?"(\w+)"', "".join(map(Path.read_text, sources)))
    assert set(given) == set(REFUSALS)


async def test_refusals_of_tenants_say_why(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_text(KEYS)
    config = ServerConfig(port=0, admin_port=0, api_keys=str(tmp_path / "keys.yaml"))
    async with (
        running(StubEngine(step_s=0.02), config) as server,
        AsyncClient(server.target, attempts=1, api_key="small-small-small") as small,
        AsyncClient(server.target, attempts=1, api_key="poor-poor-poor-poor") as poor,
    ):
        task = asyncio.create_task(small.generate("abc", max_tokens=200))
        await server.until(lambda load: load.running_requests == 1, "it never ran")
        with pytest.raises(Overloaded):
            await small.generate("abc")
        await until(server, 1, "requests_refused_total", reason="tenant_requests")
        await poor.generate("abc", max_tokens=4)
        with pytest.raises(Overloaded):
            await poor.generate("abc")
        await until(server, 1, "requests_refused_total", reason="tenant_tokens")
        with pytest.raises(Unauthenticated):
            await server.client.generate("abc")
        await until(server, 1, "rpc_requests_total", method=GENERATE, code="UNAUTHENTICATED")
        await server.admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        await task


async def test_what_a_client_makes_up_becomes_no_label() -> None:
    async with running() as server:
        with pytest.raises(UnknownModel):
            await server.client.generate("abc", model="made-up")
        with pytest.raises(InvalidRequest):
            await server.client.generate("abc", top_p=2.0)
        await until(server, 1, "rpc_requests_total", method=GENERATE, code="NOT_FOUND")
        await until(server, 1, "rpc_requests_total", method=GENERATE, code="INVALID_ARGUMENT")
        assert "made-up" not in generate_latest(server.server.metrics.registry).decode()


async def test_an_engine_that_hangs_is_down_and_its_gauges_are_gone() -> None:
    engine = StubEngine()
    async with running(engine, timeout=0.5) as server:
        engine.frozen.set()
        with pytest.raises(Unavailable):
            await server.client.generate("abc", timeout=10)
        assert value(server, "engine_up") == 0
        assert value(server, "num_requests_waiting") is None
        assert value(server, "generation_tokens_total") is not None
        with pytest.raises(Unavailable):
            await server.client.generate("abc", timeout=10)
        await until(server, 2, "requests_refused_total", reason="engine_unavailable")


async def test_each_model_has_its_own_series_and_a_new_engine_is_a_restart() -> None:
    async with serving(names=("first", "second")) as served:
        await answers(served.target, "second")
        page = await served.scrape()
        assert page["zllm:prompt_tokens_total", "first"] == 0
        assert page["zllm:prompt_tokens_total", "second"] > 0
        served.engines()[1].kill()
        await served.until_health(False, service="model/second")
        await served.until_health(True, service="model/second")
        page = await served.scrape()
        assert page["zllm:engine_restarts_total", "first"] == 0
        assert page["zllm:engine_restarts_total", "second"] == 1
        assert page["zllm:engine_up", "second"] == 1


async def test_an_unloaded_models_series_end() -> None:
    async with running() as server:
        await server.client.generate("abc", max_tokens=1)
        await server.server.remove("stub")
        assert "stub" not in generate_latest(server.server.metrics.registry).decode()


async def test_the_series_of_a_model_that_comes_again_begin_at_zero() -> None:
    async with running() as server:
        await server.client.generate("abc", max_tokens=1)
        await server.server.remove("stub")
        await server.server.expect("stub", EMBEDDED_MODEL)
        assert value(server, "request_success_total", finished_reason="length") == 0
        assert value(server, "time_to_first_token_seconds_count") == 0


class NVMLError(Exception):
    """As pynvml's own."""


def fake_nvml(monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    def memory(handle: str) -> Any:
        if fails:
            raise NVMLError("GPU is lost")
        return types.SimpleNamespace(used=30, total=100)

    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=50),
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


@pytest.mark.parametrize("fails", [False, True])
async def test_the_gpu_of_an_engine_is_read_through_nvml(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    fake_nvml(monkeypatch, fails=fails)
    async with running() as server:
        read = server.server.metrics.registry.get_sample_value
        assert "zllm:gpu" not in generate_latest(server.server.metrics.registry).decode()
        server.engine_client.gpu = "GPU-1"
        readings = [
            read(f"zllm:gpu_{name}", {"gpu": "GPU-1"})
            for name in ("memory_used_bytes", "memory_total_bytes", "utilization_ratio")
        ]
        assert readings == ([None] * 3 if fails else [30, 100, 0.5])
        assert value(server, "engine_up") == 1
