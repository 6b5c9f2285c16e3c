"""AdminService, on a listener of its own: what runs here, and how busy it is."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Protocol

from google.protobuf.duration_pb2 import Duration

from zllm.errors import InvalidRequest, Unavailable
from zllm.runtime.config import EngineConfig
from zllm.service.config import ServerConfig
from zllm.service.daemon_thread import in_daemon_thread
from zllm.service.engines import Engines
from zllm.service.model_folders import MODEL_NAME, find_folder
from zllm.service.rpc import Context
from zllm.service.served_model import RunningModel
from zllm.service.validation import Check
from zllm.v1 import admin_pb2

WATCH_INTERVAL_S = 1.0
"""Between two looks at the load where the caller names no interval; never below the next."""
MIN_WATCH_INTERVAL_S = 0.01


class Front(Protocol):
    """What AdminService asks of whoever takes users' requests."""

    @property
    def models(self) -> Sequence[RunningModel]: ...
    @property
    def draining(self) -> bool: ...
    async def abort(self, request_ids: Iterable[str] | None) -> list[str]: ...
    async def drain(self, grace: float) -> int: ...


class AdminService:
    """`template` is what LoadModel's engines are told, apart from their model."""

    def __init__(
        self,
        server: ServerConfig,
        version: str,
        front: Front,
        engines: Engines,
        template: EngineConfig,
    ) -> None:
        self._server = server
        self._version = version
        self._front = front
        self._engines = engines
        self._template = template
        self._instance_id = uuid.uuid4().hex

    async def GetServerInfo(
        self, request: admin_pb2.GetServerInfoRequest, context: Context
    ) -> admin_pb2.GetServerInfoResponse:
        return admin_pb2.GetServerInfoResponse(
            version=self._version,
            instance_id=self._instance_id,
            models=[model.to_message() for model in self._front.models],
            config_json=self._config_json(),
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
        aborted = await self._front.abort(None if request.all else request.request_ids)
        return admin_pb2.AbortRequestsResponse(aborted_request_ids=aborted)

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """Answers when the last request is done, or ended for want of time; the process stays."""
        grace = self._grace(request.timeout if request.HasField("timeout") else None)
        # A caller that leaves does not undo a drain.
        remaining = await asyncio.shield(asyncio.ensure_future(self._front.drain(grace)))
        return admin_pb2.DrainResponse(remaining_requests=remaining)

    async def FlushCache(
        self, request: admin_pb2.FlushCacheRequest, context: Context
    ) -> admin_pb2.FlushCacheResponse:
        freed = await asyncio.gather(*(m.engine.flush_cache() for m in self._front.models))
        return admin_pb2.FlushCacheResponse(blocks_freed=sum(freed))

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Answers when the model is served. A caller that leaves before ends the loading."""
        if self._front.draining:
            raise Unavailable("the server is draining")
        if not MODEL_NAME.fullmatch(request.name):
            raise InvalidRequest("name", "it must be 1 to 200 letters, digits or . _ - / :")
        share = request.memory_share if request.HasField("memory_share") else None
        blocks = self._template.num_kv_blocks
        if request.HasField("num_kv_blocks"):
            blocks = request.num_kv_blocks
        if share is not None and not 0 < share <= 1:
            raise InvalidRequest("memory_share", f"it is {share}: it must be in (0, 1]")
        if blocks == 0:
            raise InvalidRequest("num_kv_blocks", "it is 0: it must be at least 1, or left out")
        config = replace(
            self._template,
            served_model_name=request.name,
            model=await in_daemon_thread(
                lambda: find_folder(request.path, self._server.model_root)
            ),
            memory_share=share,
            num_kv_blocks=blocks,
        )
        await self._engines.load(config)
        (model,) = [model for model in self._front.models if model.name == request.name]
        return admin_pb2.LoadModelResponse(model=model.to_message())

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Answers when the model's engine has ended."""
        grace = self._grace(request.timeout if request.HasField("timeout") else None)
        # A caller that leaves does not undo it.
        await asyncio.shield(asyncio.ensure_future(self._engines.unload(request.name, grace)))
        return admin_pb2.UnloadModelResponse()

    def _grace(self, timeout: Duration | None) -> float:
        if timeout is None:
            return self._server.shutdown_grace
        check = Check()
        grace = check.seconds("timeout", timeout)
        check.done()
        return grace

    def _config_json(self) -> str:
        """No secrets are in it: keys and certificates are named by their files."""
        engines = [asdict(config) for config in self._engines.effective]
        return json.dumps({"server": asdict(self._server), "engines": engines}, default=str)

    def _loads(self) -> list[admin_pb2.Load]:
        return [self._load(model) for model in self._front.models]

    def _load(self, model: RunningModel) -> admin_pb2.Load:
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
            draining=self._front.draining,
        )
