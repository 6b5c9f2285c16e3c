"""What a request leaves in memory, refused or answered: nothing, and at once."""

from __future__ import annotations

import asyncio
import gc

import pytest

from tests.service.harness import running
from zllm.errors import InvalidRequest
from zllm.service.calls import Call


async def test_no_request_waits_for_a_garbage_collection() -> None:
    async with running() as server:
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                with pytest.raises(InvalidRequest):
                    await server.client.generate("abc", top_p=7.0)
                await server.client.generate("abc", max_tokens=3)
            await asyncio.sleep(0.1)
            # A call holds its error, whose traceback holds the request with all of its bytes.
            assert not [held for held in gc.get_objects() if type(held) is Call]
        finally:
            gc.enable()
