"""A gRPC listener: its limits, its address, its services."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection

from zllm.errors import ConfigError
from zllm.service.auth import ApiKeys
from zllm.service.calls import Observer
from zllm.service.config import ServerConfig
from zllm.service.polling_thread import let_it_wait
from zllm.service.rpc import add_service

MAX_PENDING_REQUESTS = 20_000
"""Requests that gRPC holds for the event loop: 10,000 may come at once."""

USER_SERVICES = ("zllm.v1.GenerationService", "zllm.v1.ModelService")
"""Health and the admin listener, which is apart, ask for no key and are not counted."""

LAST_WRITES_S = 0.5
"""How long the final messages of ended streams get to leave."""


def make_listener(
    config: ServerConfig,
    host: str,
    services: Sequence[tuple[ServiceDescriptor, object]],
    keys: ApiKeys | None = None,
    observers: Sequence[Observer] = (),
    *,
    shares_port: bool = False,
) -> grpc.aio.Server:
    """A server with these services that will listen on `host`, and does not yet. `observers` hear
    of users' calls."""
    server = grpc.aio.server(options=_options(config, shares_port=shares_port))
    let_it_wait()
    for descriptor, servicer in services:
        if descriptor.full_name in USER_SERVICES:
            add_service(server, descriptor, servicer, keys, observers)
        else:
            add_service(server, descriptor, servicer)
    if config.shows_reflection(host):
        names = [descriptor.full_name for descriptor, _ in services]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    return server


def listen(
    server: grpc.aio.Server,
    host: str,
    port: int,
    flag: str,
    credentials: grpc.ServerCredentials | None = None,
) -> int:
    """Binds the port and returns its number. Raises ConfigError where it is taken."""
    address = join_address(host, port)
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise _taken(address, flag) from error
    return int(bound)


def hold_port(host: str, port: int) -> socket.socket:
    """Binds the port without listening, so that frontends may share it and nobody else takes it.
    Raises ConfigError where somebody else listens there."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as alone:
            # Not shared yet: this fails where another server listens, even one that shares.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        held = socket.socket(family, kind)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        raise _taken(join_address(host, port), "--port") from error
    return held


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _taken(address: str, flag: str) -> ConfigError:
    return ConfigError(
        f"cannot listen on {address}: it is taken or not this machine's; "
        f"choose another with {flag}, or 0 for a free one"
    )


def _options(config: ServerConfig, *, shares_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # gRPC's own queue cancels requests at random beyond 1,000 that wait for the event loop: a
        # burst would be refused without a word. Admission is ours, and says RESOURCE_EXHAUSTED.
        ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MAX_PENDING_REQUESTS),
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        # Else gRPC counts calls until they are freed, a moment after their end, and resets those
        # that a client sends in that moment, in their turn. Rapid resets cost no more without it.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # The first is where refusals by chance would begin; both at one value refuse none below.
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
        # But for frontends of one server, a second one on the same port is an error, not a silent
        # half of the traffic.
        ("grpc.so_reuseport", int(shares_port)),
        # Notices clients that vanished without a word; tolerates clients that ping.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]
