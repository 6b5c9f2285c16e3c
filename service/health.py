"""grpc.health.v1 for the whole server and each of its services: it follows the engines."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

SERVICES = ("", "zllm.v1.GenerationService", "zllm.v1.ModelService")


class Health:
    def __init__(self) -> None:
        self.servicer = health_aio.HealthServicer()
        self._changes: set[asyncio.Task[None]] = set()

    def set(self, serving: bool) -> None:
        """Soon, in this order: a watcher that does not read must not hold up the caller."""
        task = asyncio.create_task(self.set_now(serving))
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def set_now(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.ServingStatus
        for service in SERVICES:
            await self.servicer.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def shut_down(self) -> None:
        """NOT_SERVING for good."""
        await self.servicer.enter_graceful_shutdown()
