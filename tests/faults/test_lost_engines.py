"""Engines that die or hang under load: each is replaced, and nothing of it is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import psutil
import pytest

from tests.faults.ledger import assert_given_back, holdings
from tests.service.stub_server import Served, answers, serving
from zllm.clients.aio import AsyncClient
from zllm.clients.results import Delta
from zllm.errors import Unavailable

STREAMS = 50


async def lose(served: Served, harm: Callable[[psutil.Process], None]) -> None:
    """Harms the engine amidst streams; returns when all have failed and another engine serves."""
    engine = served.engine()
    async with AsyncClient(served.target, attempts=1) as client:
        streams = [client.stream("abc", ignore_eos=True, max_tokens=250) for _ in range(STREAMS)]
        deltas = [aiter(stream) for stream in streams]
        await asyncio.gather(*(anext(delta) for delta in deltas))
        harm(engine)

        await asyncio.gather(*(fails(delta) for delta in deltas))
    await served.until_health(True, seconds=20)
    assert not engine.is_running()
    await answers(served.target)


async def fails(deltas: AsyncIterator[Delta]) -> None:
    with pytest.raises(Unavailable):
        async for _ in deltas:
            pass


@pytest.mark.parametrize(
    ("harm", "times"), [(psutil.Process.kill, 3), (psutil.Process.suspend, 2)], ids=["kill", "stop"]
)
async def test_a_lost_engine_leaves_nothing_behind(
    harm: Callable[[psutil.Process], None], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So slow that no stream ends by itself.
    monkeypatch.setenv("STUB_STEP_S", "0.05")
    async with serving(max_restarts=10, restart_backoff=0.05, engine_timeout=0.5) as served:
        await lose(served, harm)
        before = holdings()
        for _ in range(times):
            await lose(served, harm)
        await assert_given_back(before)
