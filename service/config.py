"""What the server is told, apart from its models' EngineConfig."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

from zllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Frozen, checked once, printed by GetServerInfo."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 takes a free one."""
    admin_host: str = "127.0.0.1"
    admin_port: int = 50052
    metrics: bool = True
    """Serve Prometheus metrics, plain HTTP, at metrics_host:metrics_port/metrics."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 50053
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_prompts: bool = False
    """Log what requests ask and what they are answered."""
    otlp_endpoint: str = ""
    """Where traces go, as http://HOST:PORT of an OTLP collector's gRPC; empty: nowhere."""
    stats_interval: float = 10.0
    """Seconds between two lines on what the engines do, while they have work; 0: none."""
    frontends: int = 1
    """Processes that share the port; with more than one, a supervisor leads them."""
    reflection: bool | None = None
    """None: only where `host` is loopback."""
    tls_cert: str = ""
    """PEM files, here and below; empty: none."""
    tls_key: str = ""
    tls_client_ca: str = ""
    """Clients need a certificate that it signed."""
    api_keys: str = ""
    """A file as service/auth.py says; empty: no key is asked for."""
    insecure: bool = False
    """Listen beyond loopback without TLS."""
    max_message_bytes: int = 16 * 1024 * 1024
    max_prompt_tokens: int = 0
    """0: as many as the context takes."""
    max_connections: int = 4096
    max_streams_per_connection: int = 4096
    """Calls that a client has open beyond it wait in the client."""
    max_metadata_bytes: int = 16 * 1024
    queue_timeout: float = 0.0
    """Seconds that a request without its own may wait for its first step; 0: for ever."""
    slo: bool = False
    """Refuse at once what could not have its first token before its deadline."""
    shutdown_grace: float = 30.0
    """Seconds that running requests get to finish after SIGTERM or Drain."""
    drain_delay: float = 0.0
    """Seconds between NOT_SERVING and the refusal of new work: time for routers to notice."""
    engine_timeout: float = 3.0
    """Seconds of the engine's silence after which its requests fail; after twice that it is
    killed and started anew. Its heartbeat goes on through long steps."""
    load_timeout: float = 600.0
    """Seconds that a model gets to load."""
    model_root: str = ""
    """LoadModel takes folders within this one alone; empty: any folder."""
    max_restarts: int = 5
    """Failures of an engine in a row, at most; one more gives its model up, and the last model's
    ends the server with exit code 3."""
    restart_backoff: float = 1.0
    """Seconds before the first restart; doubled with each failure in a row, to a minute at most."""

    def __post_init__(self) -> None:
        for name in ("port", "admin_port", "metrics_port"):
            value = getattr(self, name)
            if not 0 <= value <= 65535:
                raise ConfigError(f"{name} is {value}: it must be in 0..65535")
        for name in (
            "queue_timeout",
            "shutdown_grace",
            "drain_delay",
            "restart_backoff",
            "stats_interval",
        ):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name} is {value}: it must be 0 or more seconds")
        for name in ("engine_timeout", "load_timeout"):
            value = getattr(self, name)
            if not value > 0:
                raise ConfigError(f"{name} is {value}: it must be above 0 s")
        if not 1 <= self.frontends <= 64:
            raise ConfigError(f"frontends is {self.frontends}: it must be in 1..64")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}: it must be 0 or more")
        if self.max_prompt_tokens < 0:
            raise ConfigError(
                f"max_prompt_tokens is {self.max_prompt_tokens}: it must be 0 (no limit) or more"
            )
        for name in ("max_connections", "max_streams_per_connection"):
            value = getattr(self, name)
            if not 1 <= value < 2**31:
                raise ConfigError(f"{name} is {value}: it must be in 1..{2**31 - 1}")
        if not 1024 <= self.max_metadata_bytes <= 2**20:
            raise ConfigError(
                f"max_metadata_bytes is {self.max_metadata_bytes}: it must be in 1024..1048576"
            )
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_endpoint is {self.otlp_endpoint}: it must be http://HOST:PORT, or https://"
            )
        if not 1024 <= self.max_message_bytes < 2**31:
            raise ConfigError(
                f"max_message_bytes is {self.max_message_bytes}: it must be in 1024..{2**31 - 1}"
            )
        self._check_exposure()

    def _check_exposure(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError(
                "tls_cert and tls_key go together: give both --tls-cert and --tls-key"
            )
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("tls_client_ca needs TLS: give --tls-cert and --tls-key as well")
        if self.insecure:
            return
        if not (self.tls_cert or is_loopback(self.host)):
            raise ConfigError(
                f"host {self.host} is not loopback, and without TLS others may read along: "
                "give --tls-cert and --tls-key, or --insecure where the network is trusted"
            )
        if not (self.tls_client_ca or is_loopback(self.admin_host)):
            raise ConfigError(
                f"admin_host {self.admin_host} is not loopback, and AdminService asks for no key: "
                "give --tls-client-ca, or --insecure where the network is trusted"
            )

        if self.metrics and not is_loopback(self.metrics_host):
            raise ConfigError(
                f"metrics_host {self.metrics_host} is not loopback, and metrics are served without "
                "TLS: give --insecure where the network is trusted"
            )

    def shows_reflection(self, host: str) -> bool:
        """Whether a listener on `host` answers it."""
        return is_loopback(host) if self.reflection is None else self.reflection


def is_loopback(host: str) -> bool:
    """By the address itself: a name other than localhost may resolve to anything."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
