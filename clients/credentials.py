"""How a client shows who it is, and makes sure of the server: API key, TLS, mutual TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from zllm.errors import ConfigError

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """PEM files. `ca` signed the server's certificate (empty: gRPC's own roots); `cert` and `key`
    are the client's own, for mutual TLS."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ConfigError that names the file at fault."""
        if bool(self.cert) != bool(self.key):
            raise ConfigError("tls: a client certificate and its key go together; give both")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.cert))


def key_metadata(api_key: str) -> Metadata:
    """What goes with every call; empty without a key. Raises ConfigError, which shows no key."""
    if not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError("api_key has a character that no HTTP header can hold: use visible ASCII")
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _read(path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {path}: {error.strerror}; name a PEM file") from None
