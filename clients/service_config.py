"""How the channel behaves: retries of refused requests, keepalive, message sizes, proxies.

A refusal comes before any response header, so gRPC itself may try again without the caller
seeing it; a stream that has begun is never retried.
"""

from __future__ import annotations

import json
import re

MAX_ATTEMPTS = 4
"""gRPC allows five at most."""

_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")

Options = list[tuple[str, int | str]]


def proxy_options(target: str) -> Options:
    """The environment's http_proxy, which gRPC honours, is another machine: it cannot reach what
    listens on this one's loopback."""
    return [("grpc.enable_http_proxy", 0)] if _LOOPBACK.fullmatch(target) else []


def channel_options(target: str, attempts: int = MAX_ATTEMPTS) -> Options:
    """`attempts` 1 never retries."""
    options: Options = [
        *proxy_options(target),
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
    if attempts < 2:
        return [*options, ("grpc.enable_retries", 0)]
    return [*options, ("grpc.enable_retries", 1), ("grpc.service_config", service_config(attempts))]


def service_config(attempts: int) -> str:
    """gRPC service config (JSON), https://grpc.io/docs/guides/service-config/."""
    policy = {
        "maxAttempts": attempts,
        "initialBackoff": "0.2s",
        "maxBackoff": "5s",
        "backoffMultiplier": 2.0,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    services = [
        {"service": "zllm.v1.GenerationService"},
        {"service": "zllm.v1.ModelService"},
    ]
    return json.dumps({"methodConfig": [{"name": services, "retryPolicy": policy}]})
