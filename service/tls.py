"""TLS and mutual TLS from PEM files, read anew for new connections when they change."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from zllm.errors import ConfigError
from zllm.service.reloading import Reloading


def server_credentials(cert: str, key: str, client_ca: str = "") -> grpc.ServerCredentials:
    """With `client_ca`, only clients with a certificate that it signed get in. Raises ConfigError
    that names the file at fault."""

    def load() -> grpc.ServerCertificateConfiguration:
        return _load(cert, key, client_ca)

    paths = [path for path in (cert, key, client_ca) if path]
    configuration = Reloading(load, paths)
    return grpc.dynamic_ssl_server_credentials(
        configuration.get(), configuration.get, require_client_authentication=bool(client_ca)
    )


def _load(cert: str, key: str, client_ca: str) -> grpc.ServerCertificateConfiguration:
    chain, private = _read(cert, "--tls-cert"), _read(key, "--tls-key")
    authority = _read(client_ca, "--tls-client-ca") if client_ca else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password: an encrypted key is an error here, and not a prompt.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise ConfigError(
            f"--tls-cert {cert} and --tls-key {key} do not go together: give a PEM certificate "
            f"chain and its own PEM key without a password ({_reason(error)})"
        ) from None
    if authority is not None:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"--tls-client-ca {client_ca} holds no PEM certificate of an authority "
                f"({_reason(error)})"
            ) from None
    return grpc.ssl_server_certificate_configuration([(private, chain)], authority)


def _read(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}; name a PEM file") from None


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error) or type(error).__name__
