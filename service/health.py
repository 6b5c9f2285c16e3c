"""grpc.health.v1 for the whole server, its services and each model: it follows the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

SERVICES = ("", "zllm.v1.GenerationService", "zllm.v1.ModelService")
ALIVE = "grpc.health.v1.Health"
"""The health service's own name: SERVING for as long as this process answers at all, through
loading, restarts and drains. What a liveness probe asks for."""
MODEL_PREFIX = "model/"
"""Before a model's name, which may hold slashes itself."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    def __init__(self) -> None:
        self.servicer = health_aio.HealthServicer()
        self._told: set[str] = set()
        self._shut = False
        self._changes: set[asyncio.Task[None]] = set()

    def set(self, serving: bool, models: Mapping[str, bool]) -> None:
        """Soon, in this order: a watcher that does not read must not hold up the caller. A model
        that was told of and is not here any more turns SERVICE_UNKNOWN."""
        gone = self._told - models.keys()
        self._told = set(models)
        up = {ALIVE: True} | dict.fromkeys(SERVICES, serving)
        up |= {MODEL_PREFIX + name: healthy for name, healthy in models.items()}
        task = asyncio.create_task(self._tell(up, [MODEL_PREFIX + name for name in gone]))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def shut_down(self) -> None:
        """NOT_SERVING for good."""
        self._shut = True
        told = [MODEL_PREFIX + name for name in self._told]
        await self._tell(dict.fromkeys((*SERVICES, *told), False), [])

    async def _tell(self, up: Mapping[str, bool], gone: Iterable[str]) -> None:
        for service, healthy in up.items():
            serving = healthy and (not self._shut or service == ALIVE)
            await self.servicer.set(service, _SERVING if serving else _NOT_SERVING)
        for service in gone:
            await self.servicer.set(service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
