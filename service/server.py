"""The gRPC listeners over the served models: one for users, one for operators."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from zllm.errors import ConfigError
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import FinishReason
from zllm.service.admin import AdminService
from zllm.service.auth import ApiKeys
from zllm.service.config import ServerConfig, is_loopback
from zllm.service.generation import GenerationService
from zllm.service.health import Health
from zllm.service.models import ModelService
from zllm.service.rpc import add_service
from zllm.service.served_model import Models, ServedModel
from zllm.service.tls import server_credentials
from zllm.v1 import admin_pb2, generation_pb2, models_pb2

MAX_PENDING_REQUESTS = 20_000
"""Requests that gRPC holds for the event loop: 10,000 may come at once."""

KEYED_SERVICES = ("zllm.v1.GenerationService", "zllm.v1.ModelService")

LAST_WRITES_S = 0.5
"""How long the final messages of ended streams get to leave."""


class Server:
    """Listens from start() to stop(), and is healthy once it has a model whose engine is. The
    engines are the caller's."""

    def __init__(
        self, config: ServerConfig, *, version: str, engines: Sequence[EngineConfig] = ()
    ) -> None:
        self._config = config
        self._models = Models()
        self._health = Health()
        self._generation = GenerationService(
            self._models, config.queue_timeout, config.max_prompt_tokens
        )
        self._admin = AdminService(
            self._models, version, config, list(engines), self._generation, self.drain
        )
        self._keys = ApiKeys(config.api_keys) if config.api_keys else None
        self._credentials: grpc.ServerCredentials | None = None
        if config.tls_cert:
            self._credentials = server_credentials(
                config.tls_cert, config.tls_key, config.tls_client_ca
            )
        self._public = grpc.aio.server(options=_options(config))
        self._private = grpc.aio.server(options=_options(config))
        services = [
            (generation_pb2.DESCRIPTOR.services_by_name["GenerationService"], self._generation),
            (models_pb2.DESCRIPTOR.services_by_name["ModelService"], ModelService(self._models)),
            (health_pb2.DESCRIPTOR.services_by_name["Health"], self._health.servicer),
        ]
        self._add(self._public, services, config.shows_reflection)
        admin = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
        self._add(self._private, [(admin, self._admin)], config.shows_reflection)
        self.port = 0
        self.admin_port = 0

    async def start(self) -> None:
        """Listens; requests are UNAVAILABLE until add(). Raises ConfigError where a port is
        taken."""
        config = self._config
        credentials = self._credentials
        self.port = _listen(self._public, config.host, config.port, "--port", credentials)
        # On loopback the admin listener stays plain: its certificate would be for another name.
        self.admin_port = _listen(
            self._private,
            config.admin_host,
            config.admin_port,
            "--admin-port",
            None if is_loopback(config.admin_host) else credentials,
        )
        await self._health.set_now(False)
        await self._public.start()
        await self._private.start()

    async def add(self, model: ServedModel) -> None:
        """Serves this model too, from now on."""
        self._models.add(model)
        model.engine.on_health = self._follow
        await self._health.set_now(self._healthy())

    async def stop(self, grace: float, hurry: asyncio.Event | None = None) -> None:
        """Drains, and closes both listeners."""
        await self.drain(grace, hurry)
        await asyncio.gather(self._public.stop(LAST_WRITES_S), self._private.stop(LAST_WRITES_S))

    async def drain(self, grace: float, hurry: asyncio.Event | None = None) -> int:
        """NOT_SERVING for good; after `drain_delay` new work is refused; running requests get
        `grace` seconds or until `hurry`, and the rest ends with FINISH_REASON_SHUTDOWN. Returns
        how many those were. No grace: no delay either."""
        delay = self._config.drain_delay if grace > 0 and not self._admin.draining else 0.0
        self._admin.draining = True
        await self._health.shut_down()
        hurried = asyncio.create_task((hurry or asyncio.Event()).wait())
        if delay:
            await asyncio.wait({hurried}, timeout=delay)
        self._generation.draining = True
        idle = asyncio.create_task(self._generation.idle())
        await asyncio.wait({hurried, idle}, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        remaining = self._generation.num_live
        for model in self._models.by_name.values():
            model.engine.end_all(FinishReason.SHUTDOWN)
        await asyncio.wait({idle}, timeout=LAST_WRITES_S)
        for task in (hurried, idle):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        return remaining

    def _follow(self, _: bool = True) -> None:
        self._health.set(self._healthy())

    def _healthy(self) -> bool:
        models = self._models.by_name.values()
        return bool(models) and all(model.engine.healthy for model in models)

    def _add(
        self,
        server: grpc.aio.Server,
        services: Sequence[tuple[ServiceDescriptor, object]],
        shows_reflection: bool,
    ) -> None:
        for descriptor, servicer in services:
            # Health and the admin listener, which is apart, ask for no key.
            asks = descriptor.full_name in KEYED_SERVICES
            add_service(server, descriptor, servicer, self._keys if asks else None)
        if shows_reflection:
            names = [descriptor.full_name for descriptor, _ in services]
            reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # gRPC's own queue cancels requests at random beyond 1,000 that wait for the event loop: a
        # burst would be refused without a word. Admission is ours, and says RESOURCE_EXHAUSTED.
        ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_REQUESTS),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # The first is where refusals by chance would begin; both at one value refuse none below.
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
        # A second server on the same port is an error, not a silent half of the traffic.
        ("grpc.so_reuseport", 0),
        # Notices clients that vanished without a word; tolerates clients that ping.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


def _listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    flag: str,
    credentials: grpc.ServerCredentials | None,
) -> int:
    address = join_address(host, port)
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: it is taken or not this machine's; "
            f"choose another with {flag}, or 0 for a free one"
        ) from error
    return int(bound)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
