"""A burst of requests is served or refused by name; none is dropped on the way in."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc

from tests.service.harness import running
from tests.service.stub_engine import StubEngine
from zllm.v1 import generation_pb2, generation_pb2_grpc

BURST = 2500
CALLS_A_CONNECTION = 100


async def _codes(target: str) -> Counter[grpc.StatusCode]:
    """The codes of BURST unary calls that are all sent before the server has read one."""
    channels = [
        grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(BURST // CALLS_A_CONNECTION)
    ]
    stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
    request = generation_pb2.GenerateRequest(text="a")
    request.stopping.max_tokens = 2

    async def one(index: int) -> grpc.StatusCode:
        try:
            await stubs[index % len(stubs)].Generate(request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    found = Counter(await asyncio.gather(*(one(index) for index in range(BURST))))
    for channel in channels:
        await channel.close()
    return found


async def test_thousands_at_once_are_all_served() -> None:
    engine = StubEngine(max_running=BURST, max_queued=BURST)
    async with running(engine) as server:
        assert await _codes(server.target) == {grpc.StatusCode.OK: BURST}
        await server.until_idle()


async def test_what_the_queue_cannot_hold_is_refused_by_name() -> None:
    engine = StubEngine(max_running=10, max_queued=100, step_s=0.02)
    async with running(engine) as server:
        codes = await _codes(server.target)
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert codes.total() == BURST
        await server.until_idle()
