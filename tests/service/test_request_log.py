"""What the log says of requests and engines, and what it never says."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.clients.aio import AsyncClient
from zllm.clients.request import build_request
from zllm.errors import (
    EngineError,
    InvalidRequest,
    Overloaded,
    RequestExists,
    Unauthenticated,
    UnknownModel,
)
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.tokenizer import load_tokenizer
from zllm.service.config import ServerConfig
from zllm.service.request_log import RequestLog
from zllm.service.stats_log import StatsLog
from zllm.v1 import admin_pb2, generation_pb2, generation_pb2_grpc

SECRET = "the password is swordfish"
ANSWER = "it is swordfish indeed"
SCRIPT = load_tokenizer(EMBEDDED_MODEL).encode(ANSWER)
STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    caplog.set_level(logging.INFO, logger="zllm")
    return Lines(caplog)


class Lines:
    """The fields of the lines on requests, in the order of their ends."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def all(self, message: str = "request") -> list[dict[str, Any]]:
        return [
            {key: value for key, value in record.__dict__.items() if key not in STANDARD}
            for record in self._caplog.records
            if record.getMessage() == message
        ]

    async def next(self, number: int = 1) -> dict[str, Any]:
        """The line so numbered: a call may end after its client knows."""
        async with asyncio.timeout(5):
            while len(self.all()) < number:
                await asyncio.sleep(0.01)
        return self.all()[number - 1]


def speaking(**options: int) -> StubEngine:
    return StubEngine(script=SCRIPT, **options)


async def test_who_is_refused_first_is_logged_with_id_and_the_model_that_the_key_allows(
    tmp_path: Path, lines: Lines
) -> None:
    (tmp_path / "keys.yaml").write_text(
        "keys: [{key: small-small-small, tenant: t, models: [stub], tokens_per_minute: 1}]"
    )
    config = ServerConfig(port=0, admin_port=0, api_keys=str(tmp_path / "keys.yaml"))
    log = RequestLog(prompts=False)
    async with (
        running(config=config, observers=[log]) as server,
        AsyncClient(server.target, attempts=1, api_key="small-small-small") as client,
    ):
        await client.generate("abc", max_tokens=3)
        with pytest.raises(Overloaded):
            await client.generate("abc", request_id="mine")
        line = await lines.next(2)
    assert (line["request_id"], line["cause"]) == ("mine", "tenant_tokens")
    assert line["model"] == "stub"


async def test_an_id_that_is_refused_for_its_length_does_not_fill_the_log(lines: Lines) -> None:
    async with running(speaking(), observers=[RequestLog()]) as server:
        with pytest.raises(InvalidRequest, match="request_id"):
            await server.client.generate("abc", request_id="x" * 100_000)
        assert len((await lines.next())["request_id"]) == 256


async def test_a_request_is_one_line_with_ids_counts_and_times(lines: Lines) -> None:
    async with running(speaking(cached_tokens=2), observers=[RequestLog()]) as server:
        answer = await server.client.generate(SECRET, request_id="mine")
        line = await lines.next()
    times = {name: line.pop(name) for name in ("queue_time", "time_to_first_token", "e2e_latency")}
    assert line == {
        "request_id": "mine",
        "model": "stub",
        "method": "Generate",
        "code": "OK",
        "finish_reason": "eos",
        "prompt_tokens": answer.usage.prompt_tokens,
        "cached_tokens": 2,
        "output_tokens": len(SCRIPT) + 1,
    }
    assert 0 <= times["queue_time"] <= times["time_to_first_token"] <= times["e2e_latency"]
    assert len(lines.all()) == 1


async def test_prompts_and_answers_are_in_no_record_unless_asked_for(
    lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    prompts: list[Any] = [SECRET, [{"role": "user", "content": SECRET}], SCRIPT]
    async with running(speaking(), observers=[RequestLog()]) as server:
        for prompt in prompts:
            await server.client.generate(prompt)
            async for _ in server.client.stream(prompt):
                pass
        with pytest.raises(InvalidRequest):
            await server.client.generate(SECRET, stop=[SECRET * 100], top_p=3.0)
        with pytest.raises(UnknownModel):
            await server.client.generate(SECRET, model=SECRET)
        await lines.next(8)
    assert "swordfish" not in str([record.__dict__ for record in caplog.records])


@pytest.mark.parametrize("streamed", [False, True])
async def test_under_log_prompts_they_are_told(lines: Lines, streamed: bool) -> None:
    chat = [{"role": "user", "content": SECRET}]
    async with running(speaking(), observers=[RequestLog(prompts=True)]) as server:
        for prompt in (SECRET, chat, SCRIPT):
            if streamed:
                async for _ in server.client.stream(prompt):
                    pass
            else:
                await server.client.generate(prompt)
        told = [await lines.next(number) for number in (1, 2, 3)]
    assert [line["prompt"] for line in told] == [SECRET, chat, SCRIPT]
    assert [line["output"] for line in told] == [ANSWER] * 3


async def test_the_way_a_request_failed_is_told_by_code_and_field(lines: Lines) -> None:
    engine = StubEngine(step_s=0.02)
    async with running(engine, observers=[RequestLog()]) as server:
        with pytest.raises(InvalidRequest):
            await server.client.generate("abc", top_p=3.0)
        with pytest.raises(TimeoutError):
            await server.client.generate("abc", timeout=0.2)
        first = await lines.next(1)
        second = await lines.next(2)
        stream = server.client.stream("abc")
        async for _ in stream:
            break
        stream.cancel()
        third = await lines.next(3)
        engine.fail_at = 2
        with pytest.raises(EngineError):
            await server.client.generate("abc")
        fourth = await lines.next(4)
    assert (first["code"], first["field"]) == ("INVALID_ARGUMENT", "sampling.top_p")
    assert second["code"] == "DEADLINE_EXCEEDED"
    assert third["code"] == "CANCELLED"
    assert third["output_tokens"] >= 1
    assert "finish_reason" not in third
    assert fourth["code"] == "INTERNAL"


async def test_the_tenant_is_told_and_a_stranger_has_none(lines: Lines, tmp_path: Path) -> None:
    key = "a key of sixteen or more".replace(" ", "-")
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys:\n  - {{key: {key}, tenant: acme}}\n")
    config = ServerConfig(port=0, admin_port=0, api_keys=str(keys))
    async with (
        running(config=config, observers=[RequestLog()]) as server,
        AsyncClient(server.target, attempts=1, api_key=key) as acme,
    ):
        await acme.generate("abc", max_tokens=1)
        assert (await lines.next(1))["tenant"] == "acme"
        with pytest.raises(Unauthenticated):
            await server.client.generate("abc")
        stranger = await lines.next(2)
        assert (stranger["code"], "tenant" in stranger) == ("UNAUTHENTICATED", False)


async def ask_with_id(server: Harness, given: str, **options: Any) -> str:
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    request: generation_pb2.GenerateRequest = build_request("abc", max_tokens=1, **options)
    return (await stub.Generate(request, metadata=[("x-request-id", given)])).request_id


async def test_a_proxys_request_id_is_taken_where_the_request_has_none(lines: Lines) -> None:
    async with running(observers=[RequestLog()]) as server:
        assert await ask_with_id(server, "from-a-proxy") == "from-a-proxy"
        assert (await lines.next(1))["request_id"] == "from-a-proxy"
        assert await ask_with_id(server, "from-a-proxy", request_id="own") == "own"
        assert await ask_with_id(server, "x" * 300) != "x" * 300
        made = (await server.client.generate("abc", max_tokens=1)).request_id
        assert (await lines.next(4))["request_id"] == made


async def test_a_proxys_second_try_is_no_clash_with_its_first(lines: Lines) -> None:
    async with running(StubEngine(step_s=0.02), observers=[RequestLog()]) as server:
        first = asyncio.create_task(
            server.client.generate("abc", request_id="again", max_tokens=200)
        )
        await server.until(lambda load: load.running_requests == 1, "it never ran")
        assert await ask_with_id(server, "again") not in ("again", "")
        with pytest.raises(RequestExists):
            await server.client.generate("abc", request_id="again")
        await server.admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        await first


async def test_other_rpcs_are_not_told(lines: Lines) -> None:
    async with running(observers=[RequestLog()]) as server:
        await server.client.models()
        await server.client.generate("abc", max_tokens=1)
        await lines.next()
    assert [line["method"] for line in lines.all()] == ["Generate"]


async def test_the_summary_comes_while_there_is_work(lines: Lines) -> None:
    async with running(StubEngine(step_s=0.01, max_running=1)) as server:
        summary = asyncio.create_task(StatsLog(lambda: server.server.models).run(0.05))
        await asyncio.sleep(0.2)
        assert not lines.all("stats")
        tasks = [
            asyncio.create_task(server.client.generate([5] * 40, max_tokens=100)) for _ in range(3)
        ]
        await server.until(lambda load: load.queued_requests == 2, "nothing waits")
        async with asyncio.timeout(5):
            while not any(line["waiting"] == 2 for line in lines.all("stats")):
                await asyncio.sleep(0.01)
        line = lines.all("stats")[-1]
        assert (line["model"], line["running"]) == ("stub", 1)
        assert line["generation_tokens_per_s"] > 0
        assert 0 < line["kv_cache_usage_perc"] < 1
        await server.admin.AbortRequests(admin_pb2.AbortRequestsRequest(all=True))
        await asyncio.gather(*tasks)
        await server.until_idle()
        await asyncio.sleep(0.15)
        so_far = len(lines.all("stats"))
        await asyncio.sleep(0.2)
        assert len(lines.all("stats")) == so_far
        summary.cancel()
