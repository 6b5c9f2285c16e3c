"""AdminService, on a listener of its own: what runs here, and how busy it is."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from zllm.runtime.config import EngineConfig
from zllm.service.config import ServerConfig
from zllm.service.generation import GenerationService
from zllm.service.rpc import Context
from zllm.service.served_model import Models, ServedModel
from zllm.service.validation import Check
from zllm.v1 import admin_pb2

WATCH_INTERVAL_S = 1.0
"""Between two looks at the load where the caller names no interval; never below the next."""
MIN_WATCH_INTERVAL_S = 0.01


class AdminService:
    def __init__(
        self,
        models: Models,
        version: str,
        server: ServerConfig,
        engines: list[EngineConfig],
        generation: GenerationService,
        drain: Callable[[float], Awaitable[int]],
    ) -> None:
        self._models = models
        self._generation = generation
        self._drain = drain
        self._grace = server.shutdown_grace
        self._version = version
        self._instance_id = uuid.uuid4().hex
        config: dict[str, Any] = {"server": asdict(server), "engines": [asdict(e) for e in engines]}
        self._config_json = json.dumps(config, default=str)
        self.draining = False

    async def GetServerInfo(
        self, request: admin_pb2.GetServerInfoRequest, context: Context
    ) -> admin_pb2.GetServerInfoResponse:
        return admin_pb2.GetServerInfoResponse(
            version=self._version,
            instance_id=self._instance_id,
            models=[model.to_message() for model in self._models.by_name.values()],
            config_json=self._config_json,
        )

    async def GetLoad(
        self, request: admin_pb2.GetLoadRequest, context: Context
    ) -> admin_pb2.GetLoadResponse:
        return admin_pb2.GetLoadResponse(loads=self._loads())

    async def WatchLoad(self, request: admin_pb2.WatchLoadRequest, context: Context) -> None:
        """A snapshot now, and then one at each change, at most one an interval."""
        interval = WATCH_INTERVAL_S
        if request.HasField("min_interval"):
            check = Check()
            interval = max(
                check.seconds("min_interval", request.min_interval), MIN_WATCH_INTERVAL_S
            )
            check.done()
        told: admin_pb2.WatchLoadResponse | None = None
        while True:
            now = admin_pb2.WatchLoadResponse(loads=self._loads())
            if now != told:
                await context.write(now)
                told = now
            await asyncio.sleep(interval)

    async def AbortRequests(
        self, request: admin_pb2.AbortRequestsRequest, context: Context
    ) -> admin_pb2.AbortRequestsResponse:
        aborted = self._generation.abort(None if request.all else request.request_ids)
        return admin_pb2.AbortRequestsResponse(aborted_request_ids=aborted)

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """Answers when the last request is done, or ended for want of time; the process stays."""
        grace = self._grace
        if request.HasField("timeout"):
            check = Check()
            grace = check.seconds("timeout", request.timeout)
            check.done()
        # A caller that leaves does not undo a drain.
        remaining = await asyncio.shield(asyncio.ensure_future(self._drain(grace)))
        return admin_pb2.DrainResponse(remaining_requests=remaining)

    async def FlushCache(
        self, request: admin_pb2.FlushCacheRequest, context: Context
    ) -> admin_pb2.FlushCacheResponse:
        models = self._models.by_name.values()
        freed = await asyncio.gather(*(model.engine.flush_cache() for model in models))
        return admin_pb2.FlushCacheResponse(blocks_freed=sum(freed))

    def _loads(self) -> list[admin_pb2.Load]:
        return [self._load(model) for model in self._models.by_name.values()]

    def _load(self, model: ServedModel) -> admin_pb2.Load:
        load = model.engine.load
        prefix_hit_rate, tokens_per_second = model.engine.window()
        return admin_pb2.Load(
            model=model.name,
            running_requests=load.running_requests,
            queued_requests=load.queued_requests,
            queued_tokens=load.queued_tokens,
            kv_blocks_total=load.kv_blocks_total,
            kv_blocks_free=load.kv_blocks_free,
            prefix_hit_rate=prefix_hit_rate,
            tokens_per_second=tokens_per_second,
            draining=self.draining,
        )
