"""What the server is told, apart from its models' EngineConfig."""

from __future__ import annotations

from dataclasses import dataclass

from zllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Frozen, checked once, printed by GetServerInfo."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 takes a free one."""
    admin_host: str = "127.0.0.1"
    admin_port: int = 50052
    reflection: bool | None = None
    """None: only where `host` is loopback."""
    max_message_bytes: int = 16 * 1024 * 1024
    queue_timeout: float = 0.0
    """Seconds that a request without its own may wait for its first step; 0: for ever."""
    shutdown_grace: float = 30.0
    """Seconds that running requests get to finish after SIGTERM or Drain."""
    drain_delay: float = 0.0
    """Seconds between NOT_SERVING and the refusal of new work: time for routers to notice."""
    engine_timeout: float = 3.0
    """Seconds of the engine's silence after which its requests fail; after twice that it is
    killed and started anew. Its heartbeat goes on through long steps."""
    max_restarts: int = 5
    """Failures of the engine in a row, at most; one more ends the server with exit code 3."""
    restart_backoff: float = 1.0
    """Seconds before the first restart; doubled with each failure in a row, to a minute at most."""

    def __post_init__(self) -> None:
        for name in ("port", "admin_port"):
            value = getattr(self, name)
            if not 0 <= value <= 65535:
                raise ConfigError(f"{name} is {value}: it must be in 0..65535")
        for name in ("queue_timeout", "shutdown_grace", "drain_delay", "restart_backoff"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name} is {value}: it must be 0 or more seconds")
        if not self.engine_timeout > 0:
            raise ConfigError(f"engine_timeout is {self.engine_timeout}: it must be above 0 s")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}: it must be 0 or more")
        if self.max_message_bytes < 1024:
            raise ConfigError(
                f"max_message_bytes is {self.max_message_bytes}: it must be at least 1024"
            )

    @property
    def shows_reflection(self) -> bool:
        return is_loopback(self.host) if self.reflection is None else self.reflection


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")
