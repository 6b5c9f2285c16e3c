"""AdminService, on a listener of its own: what runs here, and how busy it is."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from typing import Any

from zllm.runtime.config import EngineConfig
from zllm.service.config import ServerConfig
from zllm.service.rpc import Context
from zllm.service.served_model import Models, ServedModel
from zllm.v1 import admin_pb2


class AdminService:
    def __init__(
        self, models: Models, version: str, server: ServerConfig, engines: list[EngineConfig]
    ) -> None:
        self._models = models
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
        loads = [self._load(model) for model in self._models.by_name.values()]
        return admin_pb2.GetLoadResponse(loads=loads)

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
