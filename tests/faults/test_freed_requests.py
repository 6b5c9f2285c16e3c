"""What a request leaves in memory, refused or answered: nothing, and at once."""

from __future__ import annotations

import asyncio
import gc
import time

import pytest

from tests.service.harness import Harness, running
from tests.service.stub_engine import StubEngine
from zllm.errors import EngineError, InvalidRequest
from zllm.native.delta_writer import DeltaWriter
from zllm.service.answers import Run
from zllm.service.calls import Call
from zllm.service.streams import Stream


async def test_no_request_waits_for_a_garbage_collection() -> None:
    engine = StubEngine()
    async with running(engine) as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                with pytest.raises(InvalidRequest):
                    await server.client.generate("abc", top_p=7.0)
                await server.client.generate("abc", max_tokens=3)
                await some_streams(server)
            await server.until_idle()
            deadline = time.monotonic() + 5.0
            while (held := _held()) and time.monotonic() < deadline:
                await asyncio.sleep(0.05)  # gRPC ends a call after its client has what it wants
            assert not held
        finally:
            gc.enable()


def _held() -> list[str]:
    """What of requests is still there, without holding it. A call holds its error, whose traceback
    holds the request with all of its bytes."""
    kinds = (Call, Run, Stream, DeltaWriter)
    return [repr(each)[:200] for each in gc.get_objects() if type(each) in kinds]


async def some_streams(server: Harness) -> None:
    """One that ends, one that its client leaves, and one that fails."""
    async for _ in server.client.stream("abc", max_tokens=3):
        pass
    left = server.client.stream("abc")
    async for _ in left:
        break
    left.cancel()
    server.engine.fail_at = 3
    with pytest.raises(EngineError):
        async for _ in server.client.stream("abc"):
            pass
    server.engine.fail_at = None
