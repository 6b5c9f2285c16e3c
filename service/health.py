"""grpc.health.v1 for the whole server, its services and each model: it follows the engines.

Our own servicer, as grpcio's writes to watchers under a lock: one that does not read would stop
health for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from grpc_health.v1 import health_pb2

from zllm.errors import UnknownModel
from zllm.service.rpc import Context

SERVICES = ("", "zllm.v1.GenerationService", "zllm.v1.ModelService")
ALIVE = "grpc.health.v1.Health"
"""The health service's own name: SERVING for as long as this process answers at all, through
loading, restarts and drains. What a liveness probe asks for."""
MODEL_PREFIX = "model/"
"""Before a model's name, which may hold slashes itself."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The servicer. Watchers each look for themselves after a change, and miss what is over when
    they come to it."""

    def __init__(self) -> None:
        self._status: dict[str, Any] = {}
        self._shut = False
        self._changed = asyncio.Event()
        self.set(False, {})

    def set(self, serving: bool, models: Mapping[str, bool]) -> None:
        """A model that is not among these is known no more."""
        services = dict.fromkeys(SERVICES, serving)
        self._tell(services | {MODEL_PREFIX + name: ok for name, ok in models.items()})

    def shut_down(self) -> None:
        """NOT_SERVING for good."""
        self._shut = True
        self._tell(dict.fromkeys(self._status, False))

    def _tell(self, up: Mapping[str, bool]) -> None:
        self._status = {
            name: _SERVING if ok and not self._shut else _NOT_SERVING for name, ok in up.items()
        }
        self._status[ALIVE] = _SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._status.get(request.service)
        if status is None:
            known = "ask for none, model/NAME or a service's full name"
            raise UnknownModel("service", f"{request.service[:200]!r} is not known: {known}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        told = None
        while True:
            changed = self._changed
            status = self._status.get(request.service, _UNKNOWN)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            else:
                await changed.wait()
