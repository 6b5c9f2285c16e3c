"""The HTTP port that Prometheus reads: in threads of its own, off the event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from zllm.errors import ConfigError
from zllm.service.config import ServerConfig
from zllm.service.listener import join_address

STALLED_S = 10.0
"""A connection that is silent for so long is closed: each one holds a thread."""


class Exporter:
    """Listens from start() to stop()."""

    def __init__(self, config: ServerConfig, registry: CollectorRegistry) -> None:
        self._host, self._port = config.metrics_host, config.metrics_port
        self._app = make_wsgi_app(registry)
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Only once it has started."""
        port = self._server.server_port if self._server is not None else self._port
        return f"http://{join_address(self._host, port)}/metrics"

    async def start(self) -> None:
        """Raises ConfigError where the port is taken."""
        try:
            self._server = await asyncio.to_thread(self._bind)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {join_address(self._host, self._port)}: {error.strerror}; "
                "choose another with --metrics-port, 0 for a free one, or --no-metrics"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, daemon=True, name="metrics"
        )
        self._thread.start()

    async def stop(self) -> None:
        if self._server is None or self._thread is None:
            return
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
        self._thread.join()

    def _bind(self) -> WSGIServer:
        host = self._host.removeprefix("[").removesuffix("]")
        family, *_ = socket.getaddrinfo(host, self._port, type=socket.SOCK_STREAM)[0]
        kind = _Server6 if family == socket.AF_INET6 else ThreadingWSGIServer
        return make_server(host, self._port, self._app, kind, _Handler)


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = STALLED_S

    def log_message(self, format: str, *args: object) -> None:
        """A scrape is no event."""
