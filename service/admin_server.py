"""What operators talk to: AdminService behind a gRPC listener of its own."""

from __future__ import annotations

from zllm.service.admin import AdminService
from zllm.service.config import ServerConfig, is_loopback
from zllm.service.listener import LAST_WRITES_S, listen, make_listener
from zllm.service.tls import server_credentials
from zllm.v1 import admin_pb2


class AdminServer:
    """Listens from start() to stop(). On loopback it stays plain: the server's certificate would
    be for another name."""

    def __init__(self, config: ServerConfig, service: AdminService) -> None:
        self._config = config
        descriptor = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
        self._listener = make_listener(config, config.admin_host, [(descriptor, service)])
        self.port = 0

    async def start(self) -> None:
        """Raises ConfigError where the port is taken."""
        config = self._config
        credentials = None
        if config.tls_cert and not is_loopback(config.admin_host):
            credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
        self.port = listen(
            self._listener, config.admin_host, config.admin_port, "--admin-port", credentials
        )
        await self._listener.start()

    async def stop(self) -> None:
        await self._listener.stop(LAST_WRITES_S)
