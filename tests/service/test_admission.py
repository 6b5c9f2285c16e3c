"""What is refused on its way in: a full queue, deadlines that passed, deadlines out of reach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.errors import DeadlineExceeded, Overloaded
from zllm.service.admission import check_deadline
from zllm.service.config import ServerConfig
from zllm.service.estimates import UNKNOWN_RETRY_S
from zllm.v1 import generation_pb2, generation_pb2_grpc

SLO = ServerConfig(port=0, admin_port=0, metrics=False, slo=True)


def ask(
    server: Harness, timeout: float | None = None, tokens: int = 200
) -> grpc.aio.UnaryUnaryCall:
    request = generation_pb2.GenerateRequest(text="abc")
    request.stopping.max_tokens = tokens
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    return stub.Generate(request, timeout=timeout)


async def until_moving(server: Harness) -> None:
    """Until the engine has admitted some requests while others waited behind them."""
    async with asyncio.timeout(20):
        while server.engine_client.load.admitted_requests < 4:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def crowded(server: Harness) -> AsyncIterator[None]:
    """A long queue that moves slowly: each request in it runs for 200 steps."""
    calls = [ask(server) for _ in range(70)]
    await until_moving(server)
    yield
    for call in calls:
        call.cancel()


async def test_a_full_queue_says_when_to_come_back() -> None:
    engine = StubEngine(step_s=0.002, max_running=1, max_queued=12)
    async with running(engine) as server:
        calls = [ask(server, tokens=60) for _ in range(12)]
        await until_moving(server)
        calls += [ask(server, tokens=60) for _ in range(20)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await calls[-1]
        for call in calls:
            call.cancel()
        await server.until_idle()
    error = refused.value
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not list(error.initial_metadata()), "headers would forbid a retry"
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    delay_ms = info.retry_delay.seconds * 1e3 + info.retry_delay.nanos / 1e6
    assert int(trailing["grpc-retry-pushback-ms"]) == pytest.approx(delay_ms, abs=1)
    # Twelve wait, and each takes 60 steps of 2 ms or more: half of them take 0.7 s or more.
    assert 500 < delay_ms < 30_000
    assert delay_ms != UNKNOWN_RETRY_S * 1e3, "nobody estimated it"


async def test_a_deadline_that_passed_on_the_way_never_reaches_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def long_prompt(*arguments: object) -> list[int]:
        time.sleep(0.1)  # the event loop is busy: gRPC cannot cancel the call
        return [1]

    monkeypatch.setattr("zllm.service.generation.prompt_ids", long_prompt)
    async with running() as server:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(server, timeout=0.05)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await server.until_idle()
        assert not server.engine.seen


@pytest.mark.parametrize("left", [0.0, -1.0])
@pytest.mark.parametrize("slo", [False, True])
async def test_no_time_left_is_deadline_exceeded(left: float, slo: bool) -> None:
    async with running() as server:
        with pytest.raises(DeadlineExceeded):
            check_deadline(server.engine_client, 1, left, slo=slo)


async def test_with_slo_a_deadline_out_of_reach_is_refused_at_once() -> None:
    async with (
        running(StubEngine(step_s=0.002, max_running=1), SLO) as server,
        crowded(server),
    ):
        seen = len(server.engine.seen)
        with pytest.raises(Overloaded, match="first token is expected in") as refused:
            await server.client.generate("abc", timeout=1.0)
        assert refused.value.retry_after > 0.5
        assert len(server.engine.seen) == seen
        generous, endless = ask(server, timeout=600), ask(server)
        await server.until(lambda load: len(server.engine.seen) >= seen + 2, "nothing was let in")
        for call in (generous, endless):
            assert not call.done()
            call.cancel()


async def test_with_slo_first_tokens_of_the_past_put_a_deadline_out_of_reach() -> None:
    async with running(StubEngine(step_s=0.4), SLO) as server:
        await server.client.generate("abc", max_tokens=1)
        with pytest.raises(Overloaded, match="first token is expected in"):
            await server.client.generate("abc", max_tokens=1, timeout=0.3)
        assert len(server.engine.seen) == 1


async def test_with_slo_an_idle_engine_does_not_refuse_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zllm.service.estimates.FORGET_S", 0.3)
    async with running(config=SLO) as server:
        # As after a time of load, which made all first steps long.
        now = asyncio.get_running_loop().time()
        server.engine_client.first_token.note(now, 3, 0, 5.0)
        with pytest.raises(Overloaded, match="first token is expected in"):
            await server.client.generate("abc", max_tokens=1, timeout=2)
        await asyncio.sleep(0.4)
        for _ in range(3):
            await server.client.generate("abc", max_tokens=1, timeout=2)


async def test_without_slo_the_same_request_waits_for_its_deadline() -> None:
    async with (
        running(StubEngine(step_s=0.002, max_running=1)) as server,
        crowded(server),
    ):
        with pytest.raises(TimeoutError):
            await server.client.generate("abc", timeout=0.5)


async def test_with_slo_an_engine_without_a_past_refuses_nobody() -> None:
    async with running(config=SLO) as server:
        answers = await asyncio.gather(
            *(server.client.generate("abc", max_tokens=2, timeout=30) for _ in range(20))
        )
    assert {answer.text for answer in answers} == {"ab"}
