"""Who hears of users' calls beside the metrics: the request log and, where wanted, traces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from zllm.errors import ConfigError
from zllm.service.calls import Observer
from zllm.service.config import ServerConfig
from zllm.service.request_log import RequestLog

if TYPE_CHECKING:
    from zllm.service.tracing import Traces


@asynccontextmanager
async def observing(config: ServerConfig, version: str) -> AsyncIterator[list[Observer]]:
    """Raises ConfigError where traces are wanted and OpenTelemetry is not installed."""
    observers: list[Observer] = [RequestLog(config.log_prompts)]
    traces = _traces(config, version)
    if traces is None:
        yield observers
        return
    try:
        yield [*observers, traces]
    finally:
        await traces.stop()


def _traces(config: ServerConfig, version: str) -> Traces | None:
    if not config.otlp_endpoint:
        return None
    try:
        from zllm.service.tracing import Traces
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint needs OpenTelemetry ({error}): install zllm with its extra [tracing]"
        ) from None
    return Traces.to(config.otlp_endpoint, version)
