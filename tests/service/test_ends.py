"""However a request ends, its blocks come back: cancels, vanished clients, deadlines, refusals."""

from __future__ import annotations

import asyncio
import logging
import random

import grpc
import pytest

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.clients.aio import AsyncClient
from zllm.clients.client import Client
from zllm.errors import EngineError, Overloaded
from zllm.service.config import ServerConfig
from zllm.v1 import generation_pb2, generation_pb2_grpc


def slow(**options: int) -> StubEngine:
    """So slow that no request ends by itself while a test waits: a whole context takes 25 s."""
    return StubEngine(step_s=0.1, **options)


async def begun(server: Harness, count: int) -> list[grpc.aio.UnaryStreamCall]:
    """Streams whose first message is here, so that they hold blocks."""
    stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
    request = generation_pb2.GenerateRequest(text="a long enough prompt to hold some blocks")
    calls = [stub.StreamGenerate(request) for _ in range(count)]
    for call in calls:
        assert (await call.read()).HasField("started")
    load = await server.until(lambda load: load.running_requests == count, "nothing runs")
    assert load.kv_blocks_free <= load.kv_blocks_total - count
    return calls


async def test_a_cancelled_stream_gives_its_blocks_back() -> None:
    async with running(slow()) as server:
        for call in await begun(server, 3):
            call.cancel()
        await server.until_idle()


async def test_a_client_that_vanishes_gives_its_blocks_back() -> None:
    async with running(slow()) as server:
        client = AsyncClient(server.target, attempts=1)
        stream = client.stream("a prompt")
        async for _ in stream:
            break
        await server.until(lambda load: load.kv_blocks_free < load.kv_blocks_total, "no blocks")
        await client.close()
        await server.until_idle()


async def test_a_passed_deadline_gives_its_blocks_back() -> None:
    async with running(slow()) as server:
        for call in (server.client.generate("abc", timeout=0.2), drained(server, 0.2)):
            with pytest.raises(TimeoutError):
                await call
        await server.until_idle()


async def test_a_write_that_fails_as_for_a_client_that_left_is_no_error_of_the_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def write(*_: object) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")

    async with running() as server:
        monkeypatch.setattr("zllm.service.generation._write_stream", write)
        stream = server.client.stream("abc")
        with pytest.raises(EngineError, match="could not be sent"):
            await anext(aiter(stream))
        await server.until_idle()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_random_cancels_leave_every_block_free() -> None:
    rng = random.Random(5)
    async with running(StubEngine(step_s=0.001, max_running=8)) as server:

        async def one() -> None:
            stream = server.client.stream("abcdef", max_tokens=rng.randint(1, 60))
            patience = rng.random() * 0.1
            try:
                async with asyncio.timeout(patience):
                    async for _ in stream:
                        pass
            except TimeoutError:
                stream.cancel()

        await asyncio.gather(*(one() for _ in range(100)))
        await server.until_idle()
        assert (await server.client.generate("abc", max_tokens=2)).text == "ab"


async def test_a_full_queue_is_resource_exhausted_with_a_time_to_retry() -> None:
    async with running(slow(max_running=1, max_queued=1)) as server:
        calls = await begun(server, 1)
        stub = generation_pb2_grpc.GenerationServiceStub(server.channel)
        waiting = stub.StreamGenerate(generation_pb2.GenerateRequest(text="waits"))
        await server.until(lambda load: load.queued_requests == 1, "nothing waits")
        with pytest.raises(Overloaded) as caught:
            await server.client.generate("abc")
        assert caught.value.retry_after > 0
        refused = stub.StreamGenerate(generation_pb2.GenerateRequest(text="abc"))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await refused.read()
        assert not list(failure.value.initial_metadata()), "headers would forbid a retry"
        for call in [*calls, waiting]:
            call.cancel()
        await server.until_idle()


@pytest.mark.parametrize("by_server", [False, True])
async def test_a_passed_queue_timeout_is_resource_exhausted(by_server: bool) -> None:
    config = ServerConfig(port=0, admin_port=0, queue_timeout=0.4 if by_server else 0.0)
    async with running(slow(max_running=1), config) as server:
        (call,) = await begun(server, 1)
        options = {} if by_server else {"queue_timeout": 0.4}
        with pytest.raises(Overloaded, match="queue_timeout"):
            await server.client.generate("abc", **options)
        call.cancel()
        await server.until_idle()


async def test_a_refused_request_is_retried_by_the_client_itself() -> None:
    engine = StubEngine(step_s=0.01, max_running=1, max_queued=0)
    async with running(engine) as server:
        engine.max_queued = 1
        (call,) = await begun(server, 1)
        engine.max_queued = 0

        async def make_room() -> None:
            await asyncio.sleep(0.1)
            call.cancel()
            await server.until_idle()
            engine.max_queued = 1

        def ask() -> str:
            with Client(server.target) as client:
                return client.generate("abc", max_tokens=3).text

        answer, _ = await asyncio.gather(asyncio.to_thread(ask), make_room())
    assert answer == "abc"


async def drained(server: Harness, timeout: float) -> None:
    async for _ in server.client.stream("abc", timeout=timeout):
        pass
