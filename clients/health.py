"""Whether a server serves, by grpc.health.v1."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from zllm.clients.credentials import Tls
from zllm.clients.failures import to_error
from zllm.clients.request import deadline
from zllm.clients.service_config import proxy_options


def ask(target: str, service: str = "", *, tls: Tls | None = None, timeout: float = 5.0) -> str:
    """SERVING or NOT_SERVING, of the whole server or of one service of it, e.g. `model/tiny`.
    Raises the errors of zllm.errors, or TimeoutError."""
    options = proxy_options(target)
    if tls is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, tls.credentials(), options=options)
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(
                health_pb2.HealthCheckRequest(service=service), timeout=deadline(timeout)
            )
        except grpc.RpcError as failure:
            raise to_error(failure) from None
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
