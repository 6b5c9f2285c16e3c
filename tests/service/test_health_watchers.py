"""Health as its servicer tells it: no watcher holds up another, and what is over is over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from zllm.errors import UnknownModel
from zllm.service.health import ALIVE, Health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Watcher:
    """The context of one Watch: what was written, and whether it reads."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def write(self, message: health_pb2.HealthCheckResponse) -> None:
        await self.reads.wait()
        self.heard.append(message.status)


async def check(health: Health, service: str) -> Any:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health.Check(request, None)).status


async def watching(health: Health, service: str) -> tuple[Watcher, asyncio.Task[None]]:
    watcher = Watcher()
    request = health_pb2.HealthCheckRequest(service=service)
    task = asyncio.create_task(health.Watch(request, watcher))
    await asyncio.sleep(0)
    return watcher, task


async def test_a_watcher_hears_each_change_and_nothing_twice() -> None:
    health = Health()
    watcher, task = await watching(health, "model/a")
    for models in ({}, {"a": True}, {"a": True, "b": False}, {"a": False}, {}):
        health.set(True, models)
        await asyncio.sleep(0.01)
    assert watcher.heard == [UNKNOWN, SERVING, NOT_SERVING, UNKNOWN]
    task.cancel()


async def test_one_that_does_not_read_holds_up_nobody() -> None:
    health = Health()
    health.set(True, {"a": True})
    deaf, deaf_task = await watching(health, "")
    deaf.reads.clear()
    health.set(False, {"a": False})
    await asyncio.sleep(0.01)
    health.shut_down()
    other, other_task = await watching(health, "")
    assert other.heard == [NOT_SERVING]
    assert await check(health, "") == NOT_SERVING
    deaf.reads.set()
    await asyncio.sleep(0.01)
    assert deaf.heard == [SERVING, NOT_SERVING]
    deaf_task.cancel()
    other_task.cancel()


async def test_in_a_drain_it_is_not_serving_for_good_but_alive() -> None:
    health = Health()
    health.set(True, {"a": True})
    health.shut_down()
    health.set(True, {"a": True})
    assert await check(health, "") == await check(health, "model/a") == NOT_SERVING
    assert await check(health, ALIVE) == SERVING


async def test_a_name_that_is_not_known_is_told() -> None:
    health = Health()
    health.set(True, {})
    with pytest.raises(UnknownModel, match="'model/a' is not known"):
        await check(health, "model/a")
